"""Plain ``generate`` and ``hf.kad`` over the same batch, whose rows end at different steps."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from models import EOS, PAD, make_model, proxy_model, ragged_prompts

import tta_ext

NEW = 8
# Rules under which the base writes every token: the proxy not asked, asked for all, with drafts.
NEVER: list[dict[str, Any]] = [
    {"rule": "threshold", "param": 0.0},
    {"rule": "knapsack", "param": 0.0, "speculative": 3},
    {"rule": "confidence_bet", "param": 2.0},
]


class Seen(transformers.LogitsProcessor):
    """Writes down which tokens are left; at the end of the list."""

    def __init__(self) -> None:
        self.kept: list[torch.Tensor] = []

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.kept.append(torch.isfinite(scores))
        return scores


@cache
def base() -> Any:
    """A base with several ends, so that rows leave at different steps."""
    model = make_model(seed=0)
    model.generation_config.eos_token_id = [EOS, 20, 33, 47, 60, 71]
    return model


@cache
def batch() -> dict[str, torch.Tensor]:
    prompts = ragged_prompts()
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), PAD)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def plain(**options: Any) -> torch.Tensor:
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD} | options
    return base().generate(**(batch() | {k: options.pop(k) for k in batch() if k in options}),
                           **options)  # fmt: skip


def kad(**options: Any) -> torch.Tensor:
    return plain(custom_generate=tta_ext.hf.kad, proxy_model=proxy_model(), seed=0, **options)
