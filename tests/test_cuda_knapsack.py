"""csrc/cuda/knapsack.cu, run by the SIMT layer, against the CPU kernel: the same bits."""

from __future__ import annotations

import numpy as np
import pytest
import simt
import torch
from conftest import skip_or_fail
from numpy.typing import NDArray
from torch import Tensor

import tta_ext
from tta_ext import ops

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

KINDS = (
    "random",
    "ties",
    "skewed",
    "one density",
    "close",
    "worthless",
    "identical",
    "wide",
    "huge densities",
    "tiny densities",
)


@pytest.fixture(params=["plain", "hooks"])
def layer(request: pytest.FixtureRequest, native: None) -> simt.Kernels:
    reason = simt.missing()
    if reason:
        skip_or_fail("simt", reason)
    return simt.kernels(request.param)


def items(seed: int, batch: int, count: int, kind: str = "random") -> tuple[Floats, Floats]:
    rng = np.random.default_rng(seed)
    profit = rng.random((batch, count), np.float32)
    weight = rng.random((batch, count), np.float32)
    if kind == "ties":
        return np.ceil(profit * 4), np.floor(weight * 3)
    if kind == "skewed":
        return profit**8, weight**12
    if kind == "one density":
        return weight.copy(), weight
    if kind == "close":
        return weight * (1 + np.float32(1e-6) * profit), weight
    if kind in ("huge densities", "tiny densities"):  # quotients that are no float32 numbers
        large, small = np.exp2(rng.integers((60, -140), (120, -100), (batch, count, 2))).T
        pair = large.T.astype(np.float32), small.T.astype(np.float32)
        return pair if kind == "huge densities" else pair[::-1]
    if kind == "worthless":
        return np.zeros_like(profit), weight
    if kind == "identical":
        return np.ones_like(profit), np.full_like(weight, 0.5)
    if kind == "wide":  # the whole range of float32, subnormal numbers included
        exponents = rng.integers(-149, 120, (2, batch, count))
        profit, weight = np.exp2(exponents.astype(np.float64)).astype(np.float32)
    return profit, weight


def total(weight: Floats) -> Doubles:
    return weight.astype(np.float64).sum(-1)


def check(
    layer: simt.Kernels,
    profit: Floats | Tensor,
    weight: Floats | Tensor,
    capacity: Doubles,
    *,
    seed: int = 0,
    preempt: float = 0.0,
) -> NDArray[np.int64]:
    """Compares all outputs bit for bit; returns the critical items."""
    arguments = tuple(torch.as_tensor(x) for x in (profit, weight, capacity))
    layer.configure(seed=seed, preempt=preempt)
    got = layer("greedy_knapsack", *arguments, False)
    with tta_ext.use_backend("cpu"):
        want = ops.greedy_knapsack(*arguments, check=False)
    for x, expected in zip(got, want, strict=True):
        assert x.dtype == expected.dtype
        as_bits = torch.int64 if x.dtype == torch.float64 else x.dtype
        torch.testing.assert_close(x.view(as_bits), expected.view(as_bits), rtol=0, atol=0)
    return got[3].numpy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 31, 128, 4096, 4097, 20000])
def test_equals_the_cpu(layer: simt.Kernels, count: int, kind: str) -> None:
    shares = np.array([0.0, 0.05, 0.31, 0.77, 1.0, 2.0])
    profit, weight = items(count, len(shares), count, kind)
    critical = check(layer, profit, weight, total(weight) * shares, seed=len(kind), preempt=0.001)
    assert critical[0] == -1  # what fits into nothing weighs nothing
    if count > 100 and kind not in ("wide", "huge densities", "tiny densities"):
        assert (critical[1:4] >= 0).all()


@pytest.mark.parametrize(("seed", "preempt"), [(0, 0.0), (1, 0.0), (2, 0.02), (3, 0.2)])
def test_any_order_of_threads_and_blocks(layer: simt.Kernels, seed: int, preempt: float) -> None:
    profit, weight = items(5, 2, 9001, "ties")
    profit[1], weight[1] = items(6, 1, 9001, "skewed")
    check(layer, profit, weight, total(weight) * 0.4, seed=seed, preempt=preempt)


@pytest.mark.parametrize("kind", ["random", "ties", "one density", "wide"])
def test_capacity_at_a_running_weight(layer: simt.Kernels, kind: str) -> None:
    """Integers cannot tell whether the item fits that ends at the capacity: the exact sum must."""
    profit, weight = items(7, 1, 9001, kind)
    with tta_ext.use_backend("cpu"):
        some = torch.tensor(total(weight) * 0.4)
        used = ops.greedy_knapsack(torch.tensor(profit), torch.tensor(weight), some).used.item()
    capacity = np.array(
        [used, np.nextafter(used, 0), np.nextafter(used, np.inf), used * (1 + 1e-9)]
    )
    n = len(capacity)
    critical = check(layer, profit.repeat(n, 0), weight.repeat(n, 0), capacity)
    assert critical[0] != critical[1]
    assert critical[0] == critical[2]


@pytest.mark.parametrize("equal", [False, True])
def test_thousands_of_items_within_the_error_of_integers(layer: simt.Kernels, equal: bool) -> None:
    """Ten thousand items beside one that fills the capacity: the search is by exact sums alone."""
    rng = np.random.default_rng(8)
    profit, weight = np.ones((2, 10000), np.float32), np.full((2, 10000), 1e-13, np.float32)
    if not equal:
        weight *= rng.uniform(1.0, 1.1, weight.shape).astype(np.float32)
    profit[:, 777], weight[:, 777] = 3e38, 1.0
    critical = check(layer, profit, weight, np.array([1 + 1e-10, 1 + 4e-10]))
    assert (critical >= 0).all()


def test_densities_that_crowd(layer: simt.Kernels) -> None:
    """More candidates than the list holds: equal densities, or close ones far from two others."""
    profit, weight = items(9, 4, 9001, "one density")
    profit[2:] = 1.0
    weight[2:] = 1 + np.arange(9001, dtype=np.float32) * 1e-7
    profit[:, 7], weight[:, 7] = 3e38, 1e-30
    profit[:, 8] = 0.0
    critical = check(layer, profit, weight, total(weight) * np.array([0.1, 0.9, 0.01, 0.5]), seed=2)
    assert (critical >= 0).all()


def test_weightless_and_heavy_items_and_odd_capacities(layer: simt.Kernels) -> None:
    capacity = np.array([0, -0.0, 1e-300, 0.01, 0.3, np.inf, np.nan, -1.0])
    profit, weight = items(10, len(capacity), 5000)
    weight[:, ::3] = 0.0
    weight[:, 1::7] = -0.0
    profit[:, ::5] = -0.0
    critical = check(layer, profit, weight, capacity)
    np.testing.assert_array_equal(critical[[0, 1, 2, 5, 6, 7]], [-1, -1, -1, -1, -2, -2])
    assert (critical[3:5] >= 0).all()


@pytest.mark.parametrize("scale", [1e-44, 3e38])
def test_the_ends_of_the_range(layer: simt.Kernels, scale: float) -> None:
    profit, weight = items(11, 4, 5000)
    weight *= np.float32(scale)
    profit *= np.float32(1e-44 if scale > 1 else 3e38)
    check(layer, profit, weight, np.array([100.0, 0.4, 0.1, 1e-3]) * scale)


@pytest.mark.parametrize("equal", [False, True])
def test_signs_of_zeros_and_rows_of_one_density(layer: simt.Kernels, equal: bool) -> None:
    """Tiles that are looked at twice: -0, no weights at all, one key beside worthless items."""
    profit, weight = items(15, 5, 9001, "one density" if equal else "random")
    profit[1, 4096:8192:3] = -0.0
    weight[2, :4096] = 0.0
    weight[3, 4000:4200] = -0.0
    profit[4, 8192:] = 0.0
    critical = check(layer, profit, weight, total(weight) * 0.6, seed=3)
    assert (critical >= 0).all()


@pytest.mark.parametrize("capacity", [2e38, 3.4028234e38, 3.4028236e38, 1e40, 1e44, 4e44, 1e45])
def test_capacities_about_the_largest_float32(layer: simt.Kernels, capacity: float) -> None:
    profit, weight = items(16, 2, 5000)
    weight = np.ceil(weight * 4) * np.float32(8e37)
    check(layer, profit, weight, np.array([capacity, np.nextafter(capacity, 0)]))


@pytest.mark.parametrize("exponent", [-145, -130, -126, -110, -108, -107, -90])
def test_small_capacities(layer: simt.Kernels, exponent: int) -> None:
    """Weights and capacities about the end of what the units' factors reach."""
    profit, weight = items(17, 3, 4300)
    weight = np.ldexp(np.ceil(weight * 16), exponent - 4).astype(np.float32)
    profit = np.ldexp(profit, -20)
    check(layer, profit, weight, total(weight) * np.array([0.02, 0.5, 0.9]))


def test_invalid_rows(layer: simt.Kernels) -> None:
    profit, weight = items(12, 5, 9001)
    weight[1, 8000] = np.nan
    weight[2, 3], profit[2, 9000] = -1.0, np.inf
    profit[3, 0] = -1e-45
    critical = check(layer, profit, weight, np.full(5, 50.0))
    assert (critical[1:4] == -2).all()
    assert (critical[[0, 4]] >= 0).all()


@pytest.mark.parametrize(("first", "name"), [(0, "row 1 of weight"), (2, "row 0 of profit")])
def test_checked_calls_name_the_first_invalid_row(
    layer: simt.Kernels, first: int, name: str
) -> None:
    profit, weight = items(12, 4, 9001)
    weight[1, 8000] = np.nan
    weight[2, 3], profit[2, 9000] = -1.0, np.inf
    arguments = [torch.as_tensor(x[first:]) for x in (profit, weight, np.full(4, 50.0))]
    layer.configure(seed=2)
    with pytest.raises(RuntimeError, match=name):
        layer("greedy_knapsack", *arguments, True)
    with tta_ext.use_backend("cpu"), pytest.raises(ValueError, match=name):
        ops.greedy_knapsack(*arguments, check=True)
    valid = [x[-1:] for x in arguments]
    for x, expected in zip(
        layer("greedy_knapsack", *valid, True), layer("greedy_knapsack", *valid, False), strict=True
    ):
        assert torch.equal(x, expected)


@pytest.mark.parametrize("padding", [(0, 0), (1, 3), (3, 3), (3, 7)])
@pytest.mark.parametrize("offset", [(0, 0), (0, 1), (3, 2)])
def test_strides_and_alignment(
    layer: simt.Kernels, padding: tuple[int, int], offset: tuple[int, int]
) -> None:
    count = 4105
    views = []
    for seed, (extra, first) in enumerate(zip(padding, offset, strict=True)):
        width = count + extra
        memory = torch.empty(3 * width + 8)  # torch aligns to 64 bytes
        view = memory[first : first + 3 * width].view(3, width)[:, :count]
        view.copy_(torch.as_tensor(items(13 + seed, 3, count)[0]))
        views.append(view)
    check(layer, *views, np.array([10.0, 300.0, 2000.0]))


def test_one_capacity_for_all_rows(layer: simt.Kernels) -> None:
    profit, weight = items(14, 3, 4500)
    in_device_memory, on_the_host = np.array([700.0]), np.array(700.0)
    critical = check(layer, profit, weight, in_device_memory)
    np.testing.assert_array_equal(check(layer, profit, weight, on_the_host), critical)


# A grid has 65535 lines of blocks, one for a row; more of them take further launches.
@pytest.mark.slow
@pytest.mark.parametrize("layer", ["plain"], indirect=True)
def test_more_rows_than_a_grid_has_lines(layer: simt.Kernels) -> None:
    profit, weight = items(15, 65535 + 3, 3)
    weight[65536, 1] = np.nan
    check(layer, profit, weight, total(weight) * 0.4)
