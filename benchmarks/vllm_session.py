"""An engine of one configuration beside our own loop; what ``vllm_equality`` compares."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tta_ext.decoding import KnapsackDeferral, load_model, load_tokenizer
from tta_ext.demo.pair import ASSETS
from tta_ext.demo.task import evaluation_problems
from tta_ext.engines.vllm.pair import PROCESSOR

BASE, SHIPPED = ASSETS / "base", ASSETS / "proxy"
SEED, NEW, REQUESTS = 7, 48, 32
RULES: tuple[dict[str, Any], ...] = (
    {"rule": "threshold", "param": 0.4},
    {"rule": "knapsack", "param": 0.5, "critical": "split"},
    {"rule": "confidence_bet", "param": 0.2},
    {"rule": "nudging", "param": 0.4},
)
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "block_size": 32,
    "max_num_seqs": REQUESTS,
    "seed": 0,
    "logprobs_mode": "processed_logits",
    "disable_log_stats": False,
}
Row = tuple[str, str, int, int]  # configuration, what, equal, of


def cpu_seconds() -> float:
    """Of this process and those that it has started, the engine's among them."""
    import psutil

    here = psutil.Process()
    times = [one.cpu_times() for one in (here, *here.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def make_proxy(folder: Path) -> Path:
    """A Llama with random weights and heads of 32, over the shipped tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load_tokenizer(str(BASE))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                # With larger ones last bits, in which batches differ, move probabilities by 1e-6.
                weight.normal_(0.0, 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prompts(count: int = REQUESTS) -> list[list[int]]:
    """Token ids of questions, some after others, so that lengths differ."""
    tokenizer = load_tokenizer(str(BASE))
    texts = [problem.prompt for problem in evaluation_problems(count)]
    return [
        tokenizer("\n".join(texts[max(0, i - i % 3) : i + 1]))["input_ids"] for i in range(count)
    ]


def named(rule: dict[str, Any]) -> dict[str, Any]:
    return {f"tta_{key}": value for key, value in rule.items()}


class Findings:
    """What has been compared, and figures.

    Args:
        name: what the table calls the configuration.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows: list[Row] = []
        self.figures: dict[str, float] = {}

    def compare(self, what: str, found: Sequence[Any], wanted: Sequence[Any]) -> None:
        """Note how many of two lists agree."""
        pairs = zip(found, wanted, strict=True)
        self.rows.append((self.name, what, sum(a == b for a, b in pairs), len(wanted)))
        print(f"  {what}: {self.rows[-1][2]} of {len(wanted)}", flush=True)


class Session(Findings):
    """An engine of one configuration, and our own loop."""

    def __init__(self, name: str, model: Path, proxy: Path, **options: Any) -> None:
        from vllm import LLM

        super().__init__(name)
        self.own = KnapsackDeferral(
            load_model(str(BASE)), load_model(str(proxy)), load_tokenizer(str(BASE))
        )
        self.llm = LLM(str(model), logits_processors=[PROCESSOR], **(ENGINE | options))
        self.prompts = prompts()

    def params(self, rule: dict[str, Any] | None, i: int, sample: bool, **more: Any) -> Any:
        """What request i asks for; None is an ordinary request."""
        from vllm import SamplingParams

        extra = None if rule is None else named(rule) | {"tta_seed": SEED, "tta_sequence": i}
        options = {"temperature": 1.0 if sample else 0.0, "max_tokens": NEW, "extra_args": extra}
        return SamplingParams(**(options | more))

    def ask(self, asked: Sequence[tuple[int, Any]]) -> list[Any]:
        """Answers of the engine to some prompts, all at once."""
        found = self.llm.generate(
            [{"prompt_token_ids": self.prompts[i]} for i, _ in asked],
            [params for _, params in asked],
            use_tqdm=False,
        )
        return [one.outputs[0] for one in found]

    def wanted(self, rule: dict[str, Any], rows: Sequence[int], sample: bool, **more: Any) -> Any:
        options = {"do_sample": sample, "seed": SEED, "max_new_tokens": NEW} | more
        return self.own.generate([self.prompts[i] for i in rows], sequence=rows, **rule, **options)

    def rules(self, counts: Sequence[int], rules: Sequence[dict[str, Any]] = RULES) -> None:
        """Every rule, greedy and sampled."""
        for count in counts:
            rows = range(count)
            for rule in rules:
                for sample in (False, True):
                    found = self.ask([(i, self.params(rule, i, sample)) for i in rows])
                    label = f"{count} requests, {rule['rule']}, {'sampled' if sample else 'greedy'}"
                    wanted = self.wanted(rule, rows, sample).tokens
                    self.compare(label, [list(one.token_ids) for one in found], wanted)

    def preempted(self) -> None:
        """Note how often the engine has thrown a request out of its cache, and that it has."""
        counts = [m.value for m in self.llm.get_metrics() if m.name == "vllm:num_preemptions"]
        self.figures["preemptions"] = sum(counts)
        self.compare("requests were preempted", [sum(counts) > 0], [True])
