"""categorical_sample, philox and normal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tta_ext import ops, rng
from tta_ext.backends import reference

from . import checks, eager
from .data import language_model_logits
from .grid import Grid, compiled
from .harness import Case


def cases(grid: Grid) -> Iterator[Case]:
    """All cases of the sampling operators; philox and normal run once a size."""
    for dtype, batch, vocab in grid.shapes():
        yield _categorical(grid, dtype, batch, vocab)
    for vocab in grid.vocabularies:
        yield _philox(grid, vocab)
        yield _normal(grid, vocab)


def _categorical(grid: Grid, dtype: torch.dtype, batch: int, vocab: int) -> Case:
    logits = language_model_logits(batch, vocab, grid.seed, dtype)
    seed = torch.tensor(grid.seed, dtype=torch.int64)
    index = torch.arange(batch, dtype=torch.int64)
    keys: dict[str, Any] = {"seed": seed, "position": index, "sequence": index}
    rows = checks.rows_to_check(batch, vocab)

    def by_reference(chosen: Tensor, compute_dtype: torch.dtype) -> Tensor:
        return reference.categorical_sample(
            logits[chosen], 1.0, seed, index[chosen], index[chosen], 0, torch.tensor(0), True,
            rng.BASE, 0, True,
            compute_dtype=compute_dtype,
        )  # fmt: skip

    want = by_reference(rows, torch.float64)
    p = torch.softmax(logits[rows].double(), -1)
    out = ops.categorical_sample(logits, **keys)
    return Case(
        "categorical_sample",
        "",
        dtype,
        batch,
        vocab,
        batch * vocab * logits.element_size(),
        "V s",
        grid.select(
            logits.numel(),
            eager=lambda: eager.categorical_sample(logits),
            compiled=lambda: compiled(eager.categorical_sample)(logits),
            reference=lambda: by_reference(index, torch.float32),
            ours=lambda: ops.categorical_sample(logits, **keys, out=out),
        ),
        lambda name, got: checks.tokens(name, got[rows], want, p),
        lambda: torch.softmax(logits, -1),
    )


def _philox(grid: Grid, blocks: int) -> Case:
    counter = torch.zeros(blocks, 4, dtype=torch.int64)
    counter[:, 0] = torch.arange(blocks)
    key = torch.tensor([1, 2], dtype=torch.int64)
    want = reference.philox(counter, key)
    out = torch.empty_like(counter)

    def check(name: str, got: Tensor) -> str:
        if name != "eager":
            return checks.equal(got, want)
        inside = bool(((got >= 0) & (got < 1 << 32)).all())
        return "" if inside else "words out of range"

    return Case(
        "philox",
        "eager: torch.randint",
        torch.int64,
        1,
        blocks,
        64 * blocks,
        "32 + 32 a block",
        grid.select(
            blocks,
            eager=lambda: torch.randint(0, 1 << 32, (blocks, 4)),
            compiled=None,
            reference=lambda: reference.philox(counter, key),
            ours=lambda: ops.philox(counter, key, out=out),
        ),
        check,
        _softmax_of(blocks),
    )


def _normal(grid: Grid, n: int) -> Case:
    seed = torch.tensor(grid.seed, dtype=torch.int64)
    want = reference.normal(n, seed, 0, 0, 0, 0, compute_dtype=torch.float64)
    out = torch.empty(n)

    def check(name: str, got: Tensor) -> str:
        if name != "eager":
            wrong = float((got.double() - want).abs().max())
            return "" if wrong < checks.TIGHT_BOUND else f"error {wrong:.1e}"
        mean, std = float(got.mean()), float(got.std())
        return "" if abs(mean) < 6 / n**0.5 and abs(std - 1) < 6 / n**0.5 else "not standard normal"

    return Case(
        "normal",
        "eager: torch.randn",
        torch.float32,
        1,
        n,
        4 * n,
        "4 n",
        grid.select(
            n,
            eager=lambda: torch.randn(n),
            compiled=None,
            reference=lambda: reference.normal(n, seed, 0, 0, 0, 0),
            ours=lambda: ops.normal(n, seed=seed, out=out),
        ),
        check,
        _softmax_of(n),
    )


def _softmax_of(size: int) -> Any:
    logits = torch.zeros(1, size)
    return lambda: torch.softmax(logits, -1)
