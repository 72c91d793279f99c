"""The general greedy knapsack against sorting, dynamic programming and enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from cases import generator
from oracle import best_knapsack
from torch import Tensor

import tta_ext
from tta_ext import ops


def items(seed: int, batch: int, vocabulary: int, kind: str = "random") -> tuple[Tensor, Tensor]:
    g = generator(seed)
    profit = torch.rand(batch, vocabulary, generator=g)
    weight = torch.rand(batch, vocabulary, generator=g)
    if kind == "ties":
        profit, weight = (profit * 4).ceil(), (weight * 3).floor()
    elif kind == "skewed":
        profit, weight = profit**8, weight**12
    elif kind == "one density":
        profit = weight.clone()
    return profit, weight


def stable_sort_selection(profit: Tensor, weight: Tensor, capacity: float) -> Tensor:
    """Selection of one row by a stable float64 sort and exact running sums."""
    p, w = profit.double().tolist(), weight.double().tolist()
    chosen = torch.tensor([size == 0 for size in w])
    density = {i: p[i] / w[i] for i in range(len(w)) if 0 < w[i] <= capacity}
    used: list[float] = []
    from math import fsum

    for i in sorted(density, key=lambda i: -density[i]):
        used.append(w[i])
        if fsum(used) > capacity:
            break
        chosen[i] = True
    return chosen


@pytest.mark.parametrize("kind", ["random", "ties", "skewed", "one density"])
@pytest.mark.parametrize("vocabulary", [1, 2, 37, 500])
def test_selection_is_that_of_a_stable_sort(kind: str, vocabulary: int, backend: str) -> None:
    profit, weight = items(vocabulary, 6, vocabulary, kind)
    total = weight.double().sum(-1)
    for share in (0.0, 0.05, 0.31, 0.77, 1.0, 2.0):
        capacity = total * share
        got = ops.greedy_knapsack(profit, weight, capacity)
        for b in range(6):
            want = stable_sort_selection(profit[b], weight[b], float(capacity[b]))
            # With all of a row's items the sum may round past a capacity that equals it.
            if share == 1.0 and not torch.equal(got.selected[b], want):
                assert (got.selected[b] != want).sum() == 1
                continue
            assert torch.equal(got.selected[b], want)
        check_numbers(profit, weight, capacity, got)


def check_numbers(profit: Tensor, weight: Tensor, capacity: Tensor, got: ops.Knapsack) -> None:
    used = (weight.double() * got.selected).sum(-1)
    value = (profit.double() * got.selected).sum(-1)
    torch.testing.assert_close(got.used, used, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.value, value, rtol=1e-12, atol=1e-12)
    assert (got.used <= capacity).all()
    exists = got.critical >= 0
    at = got.critical.clamp(min=0)[:, None]
    c_profit = profit.double().gather(1, at)[:, 0]
    c_weight = weight.double().gather(1, at)[:, 0]
    assert not got.selected.gather(1, at)[exists].any()
    gap = torch.where(exists, (capacity - used) * c_profit / c_weight, 0.0)
    torch.testing.assert_close(got.upper_bound, value + gap, rtol=1e-9, atol=1e-9)
    # Without a critical item everything that fits by itself is taken.
    fits = weight.double() <= capacity[:, None]
    assert (got.selected | ~fits)[~exists].all()


@pytest.mark.parametrize("seed", range(3))
def test_bound_and_half_of_the_optimum(seed: int, backend: str) -> None:
    """Integer weights, so dynamic programming is exact."""
    g = generator(seed + 100)
    profit = torch.rand(40, 24, generator=g) ** 3
    weight = torch.randint(0, 30, (40, 24), generator=g).float()
    capacity = torch.randint(0, 200, (40,), generator=g).double()
    got = ops.greedy_knapsack(profit, weight, capacity)
    for b in range(40):
        best = best_knapsack(profit[b].double().numpy(), weight[b].numpy(), int(capacity[b]))
        assert got.value[b] <= best + 1e-9
        assert best <= got.upper_bound[b] + 1e-9
        critical = int(got.critical[b])
        alone = float(profit[b, critical]) if critical >= 0 else 0.0
        assert max(float(got.value[b]), alone) >= best / 2 - 1e-9


def test_bound_by_enumeration(backend: str) -> None:
    """Real weights, all subsets of ten items."""
    profit, weight = items(7, 8, 10)
    capacity = weight.double().sum(-1) * 0.4
    got = ops.greedy_knapsack(profit, weight, capacity)
    choices = torch.tensor(list(itertools.product((0.0, 1.0), repeat=10)), dtype=torch.float64)
    for b in range(8):
        feasible = choices @ weight[b].double() <= capacity[b]
        best = float((choices @ profit[b].double())[feasible].max())
        assert best <= got.upper_bound[b] + 1e-12
        alone = float(profit[b, got.critical[b]]) if got.critical[b] >= 0 else 0.0
        assert max(float(got.value[b]), alone) >= best / 2


def test_weightless_heavy_and_worthless_items(backend: str) -> None:
    profit = torch.tensor([[0.0, 5.0, 100.0, 0.0, 1.0, 0.0]])
    weight = torch.tensor([[0.0, 0.0, 10.0, 1.0, 1.0, 0.5]])
    got = ops.greedy_knapsack(profit, weight, 2.0)
    # The heavy item is no candidate; worthless items come last, in order of their index.
    assert got.selected[0].tolist() == [True, True, False, True, True, False]
    assert int(got.critical) == 5
    nothing = ops.greedy_knapsack(profit, weight, 0.0)
    assert nothing.selected[0].tolist() == [True, True, False, False, False, False]
    assert int(nothing.critical) == -1
    everything = ops.greedy_knapsack(profit, weight, float("inf"))
    assert everything.selected.all()
    assert float(everything.upper_bound) == float(everything.value) == 106.0


def test_monotone_in_the_capacity_without_heavy_items(backend: str) -> None:
    profit, weight = items(9, 3, 200)
    before = torch.zeros_like(profit, dtype=torch.bool)
    for capacity in np.linspace(1.0, 110.0, 30).tolist():
        got = ops.greedy_knapsack(profit, weight, capacity).selected
        assert (got | ~before).all()
        before = got
    assert before.all()


def test_large_rows_match_a_float64_stable_sort(native: None) -> None:
    profit, weight = items(3, 2, 128256)
    for share in (0.001, 0.3, 0.9):
        capacity = weight.double().sum(-1) * share
        with tta_ext.use_backend("cpu"):
            got = ops.greedy_knapsack(profit, weight, capacity)
        density = profit.double() / weight.double()
        order = torch.argsort(density, dim=-1, descending=True, stable=True)
        running = weight.double().gather(1, order).cumsum(-1)
        want = torch.zeros_like(got.selected).scatter(1, order, running <= capacity[:, None])
        assert torch.equal(got.selected, want)


def test_native_equals_reference(native: None) -> None:
    for kind in ("random", "ties", "skewed", "one density"):
        profit, weight = items(21, 8, 9000, kind)
        capacity = weight.double().sum(-1) * 0.42
        results = []
        for name in ("reference", "cpu"):
            with tta_ext.use_backend(name):
                results.append(ops.greedy_knapsack(profit, weight, capacity))
        one, other = results
        assert torch.equal(one.selected, other.selected), kind
        assert torch.equal(one.critical, other.critical), kind
        for field in ("used", "value", "upper_bound"):
            torch.testing.assert_close(
                getattr(one, field), getattr(other, field), rtol=1e-12, atol=0
            )


def test_deferral_is_this_knapsack(backend: str) -> None:
    """Items with weight p and profit -p log p, as the deferral rule defines them.

    Logits that are multiples of 1/4 keep densities of different logits apart.
    """
    base = (torch.randn(12, 300, generator=generator(4)) * 12).round() / 4
    p = torch.softmax(base.double(), -1).float()
    profit = (-p.double() * base.double().log_softmax(-1)).float()
    for budget in (0.05, 0.3, 0.8):
        chosen = ops.deferral_mask(base, rule="knapsack", param=budget)
        general = ops.greedy_knapsack(profit, p, budget)
        # profit and weight are rounded to float32, so equal logits only nearly tie: compare masses.
        mass = (p.double() * chosen.mask).sum(-1)
        assert (mass <= budget + 1e-6).all()
        worst = p.double().amax(-1)
        assert ((general.used - mass).abs() <= worst + 1e-6).all()
