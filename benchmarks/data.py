"""Inputs for the benchmarks: rows of logits shaped like a language model's."""

from __future__ import annotations

import torch
from torch import Tensor

ZIPF_EXPONENT = 1.6
ZIPF_OFFSET = 2.0
NOISE = 1.0


def language_model_logits(
    batch: int, vocab: int, seed: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Rows ``[batch, vocab]`` with a head of a few likely tokens and a long noisy tail.

    The token of rank r has the logit -1.6 log(r + 2) + N(0, 1) (Zipf-Mandelbrot with noise), and
    each row has its own random order of tokens. At a vocabulary of 128256 between tens and a few
    hundred tokens hold nine tenths of the mass (:func:`nucleus`), as in real next-token rows.
    """
    generator = torch.Generator().manual_seed(seed)
    rank = torch.arange(1, vocab + 1, dtype=torch.float64)
    head = -ZIPF_EXPONENT * torch.log(rank + ZIPF_OFFSET)
    rows = []
    for _ in range(batch):
        noise = NOISE * torch.randn(vocab, generator=generator, dtype=torch.float64)
        rows.append((head + noise)[torch.randperm(vocab, generator=generator)])
    return torch.stack(rows).to(dtype)


def language_model_pair(
    batch: int, vocab: int, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Base and proxy logits: the proxy's row is the base's plus N(0, 1) of its own."""
    base = language_model_logits(batch, vocab, seed, torch.float32)
    generator = torch.Generator().manual_seed(seed + 1_000_003)
    proxy = base + torch.randn(base.shape, generator=generator)
    return base.to(dtype), proxy.to(dtype)


def nucleus(row: Tensor, mass: float = 0.9) -> int:
    """How many of the likeliest tokens of one row together reach ``mass``."""
    p = torch.softmax(row.double(), -1).sort(descending=True).values.cumsum(-1)
    return int((p < mass).sum()) + 1
