"""A tiny model of every causal language model class that the installed transformers has.

Sizes are forced small by the names that configurations share; what a family needs besides is in
:data:`FAMILIES`. Weights are random, wide enough that argmax and draws are not all alike.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

VOCABULARY = 112
EOS, BOS, PAD = 0, 1, 2

# One value a name, wherever a configuration has it.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "eos_token_id": EOS, "bos_token_id": BOS, "pad_token_id": PAD,
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim_model": 32, "emb_dim": 32,
    "is_decoder": True, "embedding_size": 32, "word_embed_proj_dim": 32, "input_embedding_size": 32,
    "output_embedding_size": 32, "embedding_dim": 32, "attention_hidden_size": 32,
    "intermediate_size": 48, "ffn_dim": 48, "dim_ff": 48, "dff": 48, "n_inner": 48,
    "d_inner": 48, "ffn_hidden_size": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48,
    "intermediate_size_mlp": 48, "shared_intermediate_size": 48, "feed_forward_size": 48,
    "num_hidden_layers": 2, "n_layer": 2, "num_layers": 2, "n_layers": 2, "decoder_layers": 2,
    "encoder_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4, "num_key_value_heads": 2,
    "num_kv_heads": 2, "head_dim": 8, "dim_head": 8, "d_head": 8, "attention_head_size": 8,
    "kv_channels": 8, "max_position_embeddings": 512, "n_positions": 512, "n_ctx": 512,
    "model_max_length": 512, "context_length": 512, "max_target_positions": 512,
    "sliding_window": 6, "sliding_window_size": 6, "window_size": 6, "attention_chunk_size": 6,
    "attention_window_size": 6, "local_attention": 6,
    # experts
    "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "shared_experts_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16,
    "expert_ffn_hidden_size": 16, "dense_intermediate_size": 48, "first_k_dense_replace": 1,
    "n_shared_experts": 1, "router_hidden_size": 16, "moe_latent_size": None,
    # latent attention, and its index
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "o_lora_rank": 16, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 64,
    # linear attention and state spaces
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_head_dim": 8, "linear_num_heads": 4,
    "mamba_d_state": 8, "state_size": 8, "ssm_state_size": 8, "mamba_n_heads": 4,
    "mamba_num_heads": 4, "mamba_d_head": 16, "mamba_head_dim": 16, "mamba_headdim": 16,
    "mamba_chunk_size": 8, "chunk_size": 8, "mamba_dt_rank": 4, "time_step_rank": 4,
    "mamba_n_groups": 1, "mamba_ngroups": 1, "n_groups": 1, "lru_width": 32,
    # per-layer embeddings
    "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
    "laurel_rank": 8, "global_head_dim": 8, "num_global_key_value_heads": 2,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8,
    "swa_v_head_dim": 8, "num_kv_shared_layers": 0, "rotary_dim": 8,
}  # fmt: skip

# What a family needs besides, by its name in transformers' map (a name with a slash is a variant);
# a part's configuration has a dictionary of its own.
_LONGROPE: dict[str, Any] = {
    "original_max_position_embeddings": 14,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
        "long_factor": [4.0, 8.0, 16.0, 32.0], "factor": 25.6,
        "original_max_position_embeddings": 14,
    },
}  # fmt: skip
_QWEN4: dict[str, Any] = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64,
    "indexer_compress_ratio": 2, "hc_count": 2, "hc_lowrank": 8, "ple_layer_ids": [1],
    "heads_per_ngram": 2, "ngram_vocab_size_base": 50, "split_ngram_parts": 1,
    "make_ngram_vocab_size_divisible_by": 8,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "bert/both ways": {"is_decoder": False},
    "bamba": {"attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "blt": {
        "num_hidden_layers": 2, "encoder_hash_byte_group_vocab": 64,
        "encoder_config": {"hidden_size_global": 32}, "decoder_config": {"hidden_size_global": 32},
    },
    "gemma4_assistant": {
        "backbone_hidden_size": 32,
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
    },
    "gemma4_unified_assistant": {
        "backbone_hidden_size": 32,
        "text_config": {"num_hidden_layers": 4, "num_kv_shared_layers": 2,
                        "layer_types": ["sliding_attention", "full_attention"] * 2},
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"head_dim": 16},
    "prophetnet": {"pad_token_id": 0, "num_encoder_layers": 2, "num_decoder_layers": 2,
                   "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4},
    "qwen4_exp": _QWEN4,
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "autocast_kernel_dtype": "float32"},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"],
              "num_hidden_layers": 3, "attention_hidden_size": 64},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "n_mamba_heads": 4},
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"], "num_experts_per_tok": 1},
    "falcon/alibi": {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True,
                     "num_kv_heads": 4},
    "falcon/new": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "phi3/longrope": _LONGROPE,
    "phimoe/longrope": {
        "rope_parameters": _LONGROPE["rope_parameters"] | {"short_mscale": 1.0, "long_mscale": 1.0},
    },
    "llama/dynamic": {
        "max_position_embeddings": 14,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    },
    "llama/yarn": {
        "max_position_embeddings": 14,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                            "original_max_position_embeddings": 14},
    },
    "llama/biases": {"attention_bias": True, "mlp_bias": True},
    "mistral/full": {"sliding_window": None},
    "qwen2/sliding": {"use_sliding_window": True, "max_window_layers": 1},
    "opt/projected": {"word_embed_proj_dim": 16},
    "granitemoehybrid/attention": {
        "layer_types": ["full_attention"] * 2, "num_hidden_layers": 2,
    },
    "gemma4_text/vision": {"use_bidirectional_attention": "vision"},
    "minimax/attention": {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2},
}  # fmt: skip


def families() -> dict[str, str]:
    """Every entry of transformers' map of causal language models, and variants: name to class."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names

    found = {name: cls if isinstance(cls, str) else cls[0] for name, cls in names.items()}
    for variant in FAMILIES:
        kind = variant.partition("/")[0]
        if kind != variant and kind in names:
            found[variant] = found[kind]
    return dict(sorted(found.items()))


def tiny_config(family: str) -> Any:
    """A small configuration of a family, of the class that its model takes."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = family.partition("/")[0]
    cls, wanted = CONFIG_MAPPING[kind], model_class(family).config_class
    return _config(
        cls if issubclass(cls, wanted) else wanted,
        FAMILIES.get(kind, {}) | FAMILIES.get(family, {}),
    )


def model_class(family: str) -> Any:
    """The class of a family's models."""
    import transformers

    return getattr(transformers, families()[family])


def _config(cls: Any, extra: Mapping[str, Any]) -> Any:
    """A configuration of a class, its parts small as well."""
    known = set(inspect.signature(cls.__init__).parameters) | set(
        getattr(cls, "__dataclass_fields__", ())
    )
    inner = set((getattr(cls, "attribute_map", None) or {}).values())
    given = {name: value for name, value in SIZES.items() if name in known | inner}
    if "kv_lora_rank" in known:  # latent attention has no groups
        given["num_key_value_heads"] = given["num_attention_heads"]
    parts = _parts(cls)
    if not parts:
        given |= _layers(cls, known, extra)
    given |= extra
    for name, part in parts.items():
        given[name] = _config(part, extra.get(name, {}))
    return cls(**given)


def _parts(cls: Any) -> dict[str, Any]:
    """The classes of the configurations inside a configuration."""
    from transformers import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not getattr(cls, "sub_configs", None):
        return {}
    specs = getattr(cls, "sub_configs_defaults", None)
    if specs:
        parts = {
            name: spec.config_class
            if issubclass(spec.config_class, PreTrainedConfig)
            else CONFIG_MAPPING[spec.model_type]  # AutoConfig
            for name, spec in specs.items()
        }
    else:
        default = cls()
        parts = {name: type(getattr(default, name, None)) for name in cls.sub_configs}
    return {name: part for name, part in parts.items() if issubclass(part, PreTrainedConfig)}


def _layers(cls: Any, known: set[str], extra: Mapping[str, Any]) -> dict[str, Any]:
    """As many layers as show each kind that the class has by default."""
    if "layer_types" not in known or "num_hidden_layers" in extra:
        return {}
    kinds = list(dict.fromkeys(getattr(cls(), "layer_types", None) or ()))
    if len(kinds) < 2:
        return {}
    return {"layer_types": kinds, "num_hidden_layers": len(kinds)}


@torch.inference_mode(False)
def tiny_model(family: str, seed: int = 0) -> Any:
    """A model of a family with random weights."""
    config = tiny_config(family)
    torch.manual_seed(seed)
    model = model_class(family)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and parameter.is_floating_point() and "A_log" not in name:
                parameter.copy_(0.22 * torch.randn(parameter.shape, generator=generator))
    return model
