"""Tiny models and tokenizers, made in memory."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

EOS, BOS, PAD = 0, 1, 2
SPECIAL = ("<eos>", "<bos>", "<pad>", "<end>")
LETTERS = "".join(chr(c) for c in range(32, 127)) + "\n"
VOCABULARY = len(SPECIAL) + len(LETTERS) + 5
NEW = 10  # tokens of an answer

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_GEMMA: dict[str, Any] = _COMMON | {"head_dim": 8, "sliding_window": 5}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _COMMON),
    "llama-eager": ("LlamaConfig", _COMMON | {"attn_implementation": "eager"}),
    "qwen2-sliding": (
        "Qwen2Config",
        _COMMON | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "mistral": ("MistralConfig", _COMMON | {"sliding_window": 6}),
    "gemma2": ("Gemma2Config", _GEMMA),
    "gemma3": (
        "Gemma3TextConfig",
        _GEMMA | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "mla": (
        "DeepseekV3Config",
        _COMMON
        | {
            "num_key_value_heads": 4, "moe_intermediate_size": 16, "q_lora_rank": 16,
            "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
            "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "chunked": (
        "Llama4TextConfig",
        _COMMON
        | {"head_dim": 8, "attention_chunk_size": 6, "num_local_experts": 2,
           "intermediate_size_mlp": 48, "num_hidden_layers": 4},
    ),
}  # fmt: skip


@torch.inference_mode(False)
def make_model(
    kind: str = "llama", seed: int = 0, vocabulary: int = VOCABULARY, **extra: Any
) -> Any:
    """A model with random weights, wide enough to make argmax and sampling interesting."""
    name, options = ARCHITECTURES[kind]
    options = options | extra
    implementation = options.pop("attn_implementation", None)
    config = getattr(transformers, name)(
        vocab_size=vocabulary, eos_token_id=EOS, bos_token_id=BOS, pad_token_id=PAD, **options
    )
    torch.manual_seed(seed)
    kwargs = {"attn_implementation": implementation} if implementation else {}
    model = transformers.AutoModelForCausalLM.from_config(config, **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.22)
    return model


@cache
def base_model() -> Any:
    return make_model(seed=0)


@cache
def proxy_model() -> Any:
    return make_model(seed=1, hidden_size=16, intermediate_size=24)


@torch.inference_mode(False)
def in_double(model: Any) -> Any:
    """The model itself, made to compute in float64 and to hand on float32 logits.

    In float32 most logits of a forward over several columns differ in their last bits from those of
    one column; in float64 that is rounded away.
    """

    def narrow(module: Any, inputs: Any, output: Any) -> Any:
        output.logits = output.logits.float()
        return output

    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped matmul has no float64
    model.double().register_forward_hook(narrow)
    return model


@cache
def near_models(kind: str = "llama") -> tuple[Any, Any]:
    """A base and a proxy close to it in :func:`in_double`, whose drafts stand and fail by turns."""
    base, proxy = make_model(kind, seed=0), make_model(kind, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in proxy.parameters():
            if parameter.dim() > 1:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return in_double(base), in_double(proxy)


def make_tokenizer(vocabulary: dict[str, int] | None = None, template: str | None = None) -> Any:
    """A character tokenizer with four special tokens."""
    if vocabulary is None:
        tokens = [*SPECIAL, *LETTERS]
        vocabulary = {token: i for i, token in enumerate(tokens)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>"
    )
    tokenizer.chat_template = template
    return tokenizer


def ragged_prompts() -> list[list[int]]:
    """Prompts of several lengths, two of them equal, one of a single token."""
    generator = torch.Generator().manual_seed(7)
    lengths = (9, 3, 1, 14, 3)
    rows = [
        torch.randint(4, VOCABULARY, (length,), generator=generator).tolist() for length in lengths
    ]
    rows[4] = rows[1]
    return rows


@torch.inference_mode()
def greedy(model: Any, prompt: list[int], new: int) -> list[int]:
    """What plain ``generate`` of transformers answers."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=PAD,
        eos_token_id=None,
    )
    return out[0, len(prompt) :].tolist()


def answer(kad: Any, prompts: Any = None, **options: Any) -> Any:
    """What a method answers to the ragged prompts, or to others."""
    defaults: dict[str, Any] = {"max_new_tokens": NEW, "seed": 3, "eos_token_id": []}
    return kad.generate(ragged_prompts() if prompts is None else prompts, **(defaults | options))


@torch.inference_mode()
def next_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """Logits ``[1, V]`` after tokens, without any cache."""
    return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[:, -1]
