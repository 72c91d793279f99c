"""The families that people download most, and odd ones, tiny, against their own ``generate``.

All classes of transformers: ``python -m benchmarks architectures``.
"""

from __future__ import annotations

import pytest

from benchmarks import architectures
from benchmarks.tiny_models import families, tiny_model

RAGGED = (
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text",
    "gemma4_text/vision", "phi3", "gpt2", "gpt_neox", "opt", "falcon", "deepseek_v3", "gpt_oss",
    "smollm3", "olmo2", "granitemoehybrid/attention", "cohere2",
)  # fmt: skip
LOCKSTEP = (
    "qwen3_5_text", "qwen3_next", "lfm2", "mamba", "bloom", "gpt_neo", "falcon/alibi",
    # Of their kind: a cache that picks rows its own way, padding that is looked at, a window that
    # no mask has, masks wider than the text.
    "minimax", "cpmant", "moshi", "git",
)  # fmt: skip


@pytest.mark.parametrize("family", [*RAGGED, *LOCKSTEP])
def test_family(family: str) -> None:
    if family not in families():
        pytest.skip("not in these transformers")
    models = [tiny_model(family, seed) for seed in (0, 1)]
    known = architectures.reference(models, alone=False)
    verdicts = architectures.checks(models, known, architectures.QUICK)
    kind = verdicts.pop("runner")
    assert kind == ("ragged/ragged" if family in RAGGED else "lockstep/lockstep")
    assert {verdicts[name] for name in architectures.QUICK} <= set(architectures.RIGHT)
