"""The order of every sum, found from outside: on the CPU and in the CUDA kernels.

The definition is a symbolic expression: a leaf is an element, a node an addition in a precision.
What adds is asked in rooted triples, which determine a binary tree: is i + j formed before k comes
in? Let k be large, i and j each three eighths of its last place, all others nothing. Alone, either
is lost in k; together they move it by one place. So the sum says which two met first, and in which
precision.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import simt
import torch
from conftest import skip_or_fail
from torch import Tensor

from tta_ext import rules

TILE, LANES = 4096, 128
# The last place of a number between 1 and 2, and what is lost in one but not twice.
PLACE = {"float32": 2.0**-23, "float64": 2.0**-52}
SMALL = {precision: 0.375 * place for precision, place in PLACE.items()}


class Sum(NamedTuple):
    left: Any  # a Sum or an index
    right: Any
    precision: str


def chain(parts: Sequence[Any], precision: str) -> Any:
    """From left to right."""
    return functools.reduce(lambda a, b: Sum(a, b, precision), parts)


def halves(parts: Sequence[Any]) -> Any:
    """l + n/2, l + n/4, ... l + 1; None is nothing."""
    while len(parts) > 1:
        half = len(parts) // 2
        pairs = zip(parts[:half], parts[half:], strict=True)
        parts = [a if b is None else Sum(a, b, "float32") for a, b in pairs]
    return parts[0]


def neighbours(parts: Sequence[Any]) -> Any:
    """Pairs, pairs of pairs, ..."""
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [a if b is None else Sum(a, b, "float32") for a, b in pairs]
    return parts[0]


def row_tree(
    count: int,
    tile: int = TILE,
    lanes: int = LANES,
    fold: Callable[[Sequence[Any]], Any] = halves,
    strided: bool = True,
    backwards: bool = False,
    outer: str = "float64",
) -> Any:
    """The sum over a row; other arguments than the first make other sums."""
    tiles = []
    for begin in range(0, count, tile):
        items = range(begin, min(begin + tile, count))
        part = -(-len(items) // lanes)
        columns = [items[i::lanes] if strided else items[i * part : (i + 1) * part]
                   for i in range(lanes)]  # fmt: skip
        ordered = [column[::-1] if backwards else column for column in columns]
        tiles.append(fold([chain(column, "float32") if column else None for column in ordered]))
    return chain(tiles, outer)


def rollout_tree(count: int) -> Any:
    """The sum over rollouts: pairwise over their number padded to a power of two."""
    padded = 1 << (count - 1).bit_length()
    return neighbours([*range(count), *[None] * (padded - count)])


def paths(tree: Any) -> dict[int, list[tuple[bool, str]]]:
    """The way to each leaf: left or right at each addition, and its precision."""
    if not isinstance(tree, Sum):
        return {tree: []}
    found = {}
    for right, side in enumerate((tree.left, tree.right)):
        for leaf, rest in paths(side).items():
            found[leaf] = [(bool(right), tree.precision), *rest]
    return found


def meeting(a: list[tuple[bool, str]], b: list[tuple[bool, str]]) -> tuple[int, str]:
    """Depth and precision of the addition where two leaves meet."""
    depth = next(n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return depth, a[depth][1]


Triple = tuple[int, int, int]


def moved(way: dict[int, list[tuple[bool, str]]], triple: Triple, precision: str) -> bool:
    """Whether i and j together move k: they meet first, and k's additions round like that."""
    i, j, k = (way[leaf] for leaf in triple)
    (first, _), (then, rounds) = meeting(i, j), meeting(i, k)
    return first > then or PLACE[rounds] < PLACE[precision]


def triples(count: int, number: int, tile: int = TILE, seed: int = 0) -> list[Triple]:
    """Of one tile: from anywhere, of neighbouring lanes, of one lane."""
    r, found = np.random.default_rng(seed), []
    while len(found) < number:
        begin = tile * int(r.integers(-(-count // tile)))
        size = min(tile, count - begin)
        step = (1, 1, 2, LANES // 2, LANES)[int(r.integers(5))]
        if r.random() < 0.5:
            three = begin + r.integers(size, size=3)
        else:
            three = begin + (int(r.integers(size)) + step * r.permutation(3)) % size
        if len(set(three.tolist())) == 3:
            found.append(tuple(three.tolist()))
    return found


def small_beside(x: Tensor) -> float:
    """Three eighths of a float32's last place."""
    return 0.375 * float(np.spacing(x.numpy()))


class Prober(NamedTuple):
    """Sums of one kind by an implementation: for each triple, whether k was moved."""

    run: Callable[..., Any]

    def op(self, name: str, *args: Any) -> tuple[Tensor, ...]:
        found = self.run(name, *args)
        return found if isinstance(found, tuple) else (found,)

    def rows(self, asked: list[Triple], count: int, precision: str) -> tuple[Tensor, Tensor]:
        """Logits with i, j and k, and with k alone."""
        with_all = torch.full((len(asked), count), -torch.inf)
        for b, (i, j, k) in enumerate(asked):
            with_all[b, k] = 0.0
            with_all[b, [i, j]] = math.log(SMALL[precision])
        alone = torch.where(with_all == 0, with_all, -torch.inf)
        return with_all, alone

    def total(self, asked: list[Triple], count: int) -> list[bool]:
        """Z of a row, seen in p(k) = 1 / Z."""
        rows, _ = self.rows(asked, count, "float32")
        rule = torch.zeros(1, dtype=torch.float64), rules.THRESHOLD, 0, 1.0, 1.0
        (p,) = self.op("deferral_probs", rows, rows, *rule, False)
        return [float(p[b, k]) != 1.0 for b, (_, _, k) in enumerate(asked)]

    def masked(self, asked: list[Triple], count: int, precision: str) -> list[bool]:
        """The sum under a mask, seen in D: all but one likely token are below the threshold."""
        rows = torch.cat(self.rows(asked, count, precision))
        # It is the row's maximum, in a tile of its own behind the others.
        more = torch.full((len(rows), -count % TILE + 1), -torch.inf)
        more[:, -1] = math.log(6.0)  # what is scaled to it keeps clear of a power of two
        if precision == "float64":
            for b, (i, j, _) in enumerate(asked):
                rows[b, [i, j]] = math.log(1.5 * SMALL[precision] * 0.5)
        rule = torch.full((1,), 0.5, dtype=torch.float64), rules.THRESHOLD, 0, 1.0, 1.0
        mass = self.op("deferral_stats", torch.cat((rows, more), 1), None, *rule, False)[0]
        return (mass[: len(asked)] != mass[len(asked) :]).tolist()

    def dot(self, asked: list[Triple], count: int) -> list[bool]:
        """u . eps, of noise that is known."""
        seed, zero = torch.tensor([3]), torch.tensor([0])
        (eps,) = self.op("normal", count, seed, 0, 0, 0, 0)
        mean = torch.zeros(2 * len(asked), 1, count)
        for b, (i, j, k) in enumerate(asked):
            mean[b, 0, [i, j]] = small_beside(eps[k]) / eps[[i, j]]
            mean[[b, b + len(asked)], 0, k] = 1.0
        rows = torch.arange(len(mean))
        hidden = torch.zeros(len(mean), count)
        args = hidden, mean, zero, rows, zero, zero, 0, 1.0, seed, False
        sums = self.op("prelogit_perturb", *args)[1]
        return (sums[: len(asked)] != sums[len(asked) :]).tolist()

    def rollouts(self, asked: list[Triple], count: int) -> list[bool]:
        """The bare sum of w_i eps^i."""
        seed, padded = torch.tensor([3]), 1 << (count - 1).bit_length()
        weights = torch.zeros(2 * len(asked), count)
        zero = torch.tensor([0])
        eps = torch.cat([self.op("normal", 1, seed, 0, 0, 0, i)[0] for i in range(count)])
        for b, (i, j, k) in enumerate(asked):
            weights[b, [i, j]] = small_beside(eps[k]) / eps[[i, j]]
            weights[[b, b + len(asked)], k] = 1.0
        mean = torch.zeros(len(weights), 1, 1)
        args = mean, weights, None, seed, zero, 0, 1.0, 0, padded, True, False
        sums = self.op("control_update", *args)[0].flatten()
        return (sums[: len(asked)] != sums[len(asked) :]).tolist()

    def shards(self, asked: list[Triple], count: int) -> list[bool]:
        """The sum of partial sums."""
        parts = torch.zeros(count, 1, 1, 2 * len(asked))
        for b, (i, j, k) in enumerate(asked):
            parts[[i, j], 0, 0, b] = SMALL["float32"]
            parts[k, 0, 0, [b, b + len(asked)]] = 1.5
        (sums,) = self.op("control_merge", torch.zeros(parts.shape[1:]), parts, 1.0)
        return (sums.flatten()[: len(asked)] != sums.flatten()[len(asked) :]).tolist()


def on_cpu(name: str, *args: Any) -> Any:
    return getattr(torch.ops.tta_ext, name)(*args)


@pytest.fixture(params=["scalar", "avx2", "avx512", "cuda"])
def prober(request: pytest.FixtureRequest, native: None) -> Any:
    """The CPU's kernels at each instruction set, and CUDA's on the SIMT layer."""
    if request.param == "cuda":
        if reason := simt.missing():
            skip_or_fail("simt", reason)
        yield Prober(simt.kernels("plain"))
        return
    level, before = ["scalar", "avx2", "avx512"].index(request.param), on_cpu("cpu_isa", -1)
    try:
        if on_cpu("cpu_isa", level) != level:
            skip_or_fail(request.param, f"this machine has no {request.param}")
        yield Prober(on_cpu)
    finally:
        on_cpu("cpu_isa", before)


def expected(tree: Any, asked: list[Triple], precision: str = "float32") -> list[bool]:
    way = paths(tree)
    return [moved(way, triple, precision) for triple in asked]


@pytest.mark.parametrize("count", [3, 200, 4096, 9001])
def test_a_row_is_summed_as_defined(prober: Prober, count: int) -> None:
    asked = triples(count, 60)
    want = expected(row_tree(count), asked)
    assert len(set(want)) == 2 or count < 10
    assert prober.total(asked, count) == want
    assert prober.masked(asked, count, "float32") == want


def test_tiles_are_added_from_left_to_right_in_float64(prober: Prober) -> None:
    count, r = 5 * TILE, np.random.default_rng(1)
    tiles = [r.permutation(5)[:3] for _ in range(40)]
    asked = [tuple((TILE * t + r.integers(TILE, size=3)).tolist()) for t in tiles]
    want = expected(row_tree(count), asked, "float64")
    assert want == [max(i, j) < k for i, j, k in asked]
    assert prober.masked(asked, count, "float64") == want


@pytest.mark.parametrize("count", [3, 300, 5000])
def test_a_dot_product_is_summed_as_defined(prober: Prober, count: int) -> None:
    asked = triples(count, 40)
    assert prober.dot(asked, count) == expected(row_tree(count), asked)


@pytest.mark.parametrize("count", [3, 7, 8, 33])
def test_rollouts_are_summed_as_defined(prober: Prober, count: int) -> None:
    asked = triples(count, 40)
    assert prober.rollouts(asked, count) == expected(rollout_tree(count), asked)


@pytest.mark.parametrize("count", [4, 16])
def test_shards_are_summed_as_defined(prober: Prober, count: int) -> None:
    asked = triples(count, 40)
    assert prober.shards(asked, count) == expected(rollout_tree(count), asked)


OTHERS: dict[str, dict[str, Any]] = {
    "tiles of 2048": {"tile": 2048},
    "64 lanes": {"lanes": 64},
    "256 lanes": {"lanes": 256},
    "16 lanes": {"lanes": 16},
    "a lane is a run": {"strided": False},
    "lanes fold in pairs": {"fold": neighbours},
    "lanes fold from left to right": {
        "fold": lambda x: chain([y for y in x if y is not None], "float32")
    },
    "lanes run backwards": {"backwards": True},
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_another_order_is_found(other: str) -> None:
    """The triples asked above would tell the definition from each of these."""
    asked = triples(9001, 60)
    assert expected(row_tree(9001, **OTHERS[other]), asked) != expected(row_tree(9001), asked)


@pytest.mark.parametrize(
    "options", [{"fold": neighbours}, {"lanes": 64}, {}], ids=["neighbours", "64 lanes", "none"]
)
def test_a_kernel_that_adds_otherwise_is_found(options: dict[str, Any]) -> None:
    """One that evaluates an expression exactly as it stands, in place of the kernels."""
    count = 5000
    tree = row_tree(count, **options)

    def value(node: Any, weights: np.ndarray) -> Any:
        if not isinstance(node, Sum):
            return weights[node]
        kind = np.dtype(node.precision).type
        return kind(value(node.left, weights)) + kind(value(node.right, weights))

    def planted(name: str, rows: Tensor, *_: Any) -> Tensor:
        totals = [float(value(tree, row)) for row in rows.double().exp().float().numpy()]
        return (rows.double().exp() / torch.tensor(totals)[:, None].double()).float()

    asked = triples(count, 30)
    same = Prober(planted).total(asked, count) == expected(row_tree(count), asked)
    assert same == (not options)


def test_the_precision_is_found() -> None:
    """Between tiles, float32 would lose what the definition keeps."""
    asked = [(0, TILE, 2 * TILE), (TILE, 0, 2 * TILE)]
    tree, other = row_tree(3 * TILE), row_tree(3 * TILE, outer="float32")
    assert expected(tree, asked) == [True, True]
    way = paths(other)
    assert {meeting(way[i], way[j])[1] for i, j, _ in asked} == {"float32"}
    lost = [(0, 2 * TILE, TILE)]
    assert expected(tree, lost) != expected(other, lost)
