"""Inputs for the benchmarks: rows of logits shaped like a language model's, and unlike."""

from __future__ import annotations

from collections.abc import Callable

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


def _peaked(exponent: float) -> Callable[[int, torch.Generator], Tensor]:
    """Zipf-Mandelbrot with noise, as :func:`language_model_logits`, of another exponent."""

    def row(vocab: int, generator: torch.Generator) -> Tensor:
        rank = torch.arange(1, vocab + 1, dtype=torch.float64)
        noise = NOISE * torch.randn(vocab, generator=generator, dtype=torch.float64)
        logits = noise - exponent * torch.log(rank + ZIPF_OFFSET)
        return logits[torch.randperm(vocab, generator=generator)]

    return row


def _gaussian(width: float) -> Callable[[int, torch.Generator], Tensor]:
    return lambda vocab, generator: width * torch.randn(vocab, generator=generator)


def _zipf(vocab: int, generator: torch.Generator) -> Tensor:
    logits = -torch.log(torch.arange(1, vocab + 1, dtype=torch.float64))
    return logits[torch.randperm(vocab, generator=generator)]


def _impossible(vocab: int, generator: torch.Generator) -> Tensor:
    """All but a token in a thousand."""
    logits = torch.full((vocab,), -torch.inf)
    possible = torch.randperm(vocab, generator=generator)[: max(1, vocab // 1000)]
    logits[possible] = torch.randn(len(possible), generator=generator)
    return logits


def _plateaus(vocab: int, generator: torch.Generator) -> Tensor:
    """Two logits, a nat apart; a budget above .27 cuts through the upper."""
    return torch.randint(2, (vocab,), generator=generator).float()


# Shapes of rows, from the kindest to those of a small model, a high temperature, a first token. At
# V = 128256 nine tenths of the mass of the first two lie in 161 and 2,400 tokens, .7 of the third's
# in 2,480.
SHAPES: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "language model": _peaked(ZIPF_EXPONENT),
    "peaked, 2400": _peaked(1.295),
    "small model": _peaked(1.04),
    "constant": lambda vocab, generator: torch.full((vocab,), 1.5),
    "Gaussian .5": _gaussian(0.5),
    "Gaussian 1": _gaussian(1.0),
    "Gaussian 2.2": _gaussian(2.2),
    "Gaussian 4": _gaussian(4.0),
    "Zipf": _zipf,
    "99.9% impossible": _impossible,
    "ties": lambda vocab, generator: (4 * _gaussian(4.0)(vocab, generator)).round() / 4,
    "two plateaus": _plateaus,
}


def shaped_pair(
    shape: str, batch: int, vocab: int, seed: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Base and proxy logits ``[batch, vocab]`` of a shape; the proxy's have N(0, .3) more."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.stack([SHAPES[shape](vocab, generator).float() for _ in range(batch)])
    proxy = base + 0.3 * torch.randn(base.shape, generator=generator)
    return base.to(dtype), proxy.to(dtype)
