"""What the tests of foreign engines share: rules, models, our own loop's answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tta_ext.decoding import KnapsackDeferral
from tta_ext.demo.pair import ASSETS

BASE, PROXY = str(ASSETS / "base"), str(ASSETS / "proxy")
SEED, NEW = 7, 10
RULES: list[dict[str, Any]] = [
    {"tta_rule": "threshold", "tta_param": 0.4},
    {"tta_rule": "threshold", "tta_param": 0.7},
    {"tta_rule": "knapsack", "tta_param": 0.5, "tta_critical": "split"},
    {"tta_rule": "confidence_bet", "tta_param": 0.2},
]


@torch.no_grad()
def last_logits(model: Any, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits after each row, one forward a row."""
    return torch.cat([model(torch.tensor([list(row)])).logits[:, -1].float() for row in rows])


def wanted(own: KnapsackDeferral, prompt: list[int], i: int, sample: bool = True) -> Any:
    rule = {key.removeprefix("tta_"): value for key, value in RULES[i % len(RULES)].items()}
    return own.generate(
        [prompt], sequence=[i], seed=SEED, do_sample=sample, max_new_tokens=NEW, trace=True,
        eos_token_id=[], **rule,
    )  # fmt: skip
