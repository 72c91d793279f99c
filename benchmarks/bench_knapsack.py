"""greedy_knapsack on random profits and weights, against a sort."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tta_ext import ops
from tta_ext.backends import reference

from . import checks, eager
from .grid import Grid, compiled
from .harness import Case

FILL = 0.3  # capacity over the sum of the weights


def items(batch: int, size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Profit and weight, uniform in (0, 1], and a capacity of three tenths of the weight."""
    generator = torch.Generator().manual_seed(seed)
    profit = 1.0 - torch.rand(batch, size, generator=generator)
    weight = 1.0 - torch.rand(batch, size, generator=generator)
    return profit, weight, FILL * weight.double().sum(-1)


def cases(grid: Grid) -> Iterator[Case]:
    """Batches and sizes of the grid, in float32, the operator's only dtype."""
    for vocab in grid.vocabularies:
        for batch in grid.batches:
            yield case(grid, batch, vocab)


def case(grid: Grid, batch: int, vocab: int) -> Case:
    profit, weight, capacity = items(batch, vocab, grid.seed)
    column = capacity.unsqueeze(-1)
    want = eager.greedy_knapsack(profit, weight, column)
    out = ops.greedy_knapsack(profit, weight, capacity)

    def check(name: str, got: Tensor) -> str:
        if name in checks.TIGHT:
            return checks.equal(got, want)
        return checks.mask(name, got, want, profit.double() / profit.double().sum(-1, keepdim=True))

    return Case(
        "greedy_knapsack",
        "random items",
        torch.float32,
        batch,
        vocab,
        batch * vocab * 9,
        "V (4 + 4 + 1)",
        grid.select(
            profit.numel(),
            eager=lambda: eager.greedy_knapsack_float32(profit, weight, column),
            compiled=lambda: compiled(eager.greedy_knapsack_float32)(profit, weight, column),
            reference=lambda: reference.greedy_knapsack(profit, weight, capacity, True)[0],
            ours=lambda: ops.greedy_knapsack(profit, weight, capacity, out=out)[0],
        ),
        check,
        lambda: torch.softmax(profit, -1),
    )
