"""Which dtypes, shapes, rules and providers a run covers."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

VOCABULARIES = (32000, 50257, 128256, 151936, 256000)
BATCHES = (1, 4, 16, 64)
DTYPES = ("float32", "float16", "bfloat16")
RULES = ("knapsack", "threshold", "confidence_bet")
PARAMS = {"knapsack": 0.3, "threshold": 1e-3, "confidence_bet": 0.1}
PROVIDERS = ("eager", "compile", "reference", "ours")

# Beyond this many logits the reference takes seconds a call and tells nothing new.
REFERENCE_LIMIT = 1 << 21

Run = Callable[[], Any]


@dataclass(frozen=True)
class Grid:
    """What to run; :meth:`shapes` walks it."""

    vocabularies: tuple[int, ...] = VOCABULARIES
    batches: tuple[int, ...] = BATCHES
    dtypes: tuple[str, ...] = DTYPES
    rules: tuple[str, ...] = ("knapsack", "threshold")
    providers: tuple[str, ...] = PROVIDERS
    seed: int = 0

    def quick(self) -> Grid:
        """A few minutes instead of most of an hour."""
        return replace(
            self,
            vocabularies=(32000, 128256),
            batches=(1, 16),
            dtypes=("float32", "bfloat16"),
            providers=("eager", "ours"),
        )

    def shapes(self) -> Iterator[tuple[torch.dtype, int, int]]:
        for name, vocab, batch in itertools.product(self.dtypes, self.vocabularies, self.batches):
            yield getattr(torch, name), batch, vocab

    def select(
        self, logits: int, *, eager: Run, reference: Run, ours: Run, compiled: Run | None
    ) -> dict[str, Run]:
        """The providers of one case, less those that are not asked for or too slow to tell."""
        every = {"eager": eager, "reference": reference, "ours": ours}
        if compiled is not None:
            every["compile"] = compiled
        if logits > REFERENCE_LIMIT:
            del every["reference"]
        return {name: every[name] for name in PROVIDERS if name in every and name in self.providers}


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` of an eager chain, once for all shapes."""
    return torch.compile(function, dynamic=True)
