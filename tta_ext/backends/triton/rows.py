"""Rows of logits and their laws: statistics of tiles, what they make of a token, draws.

A kernel over tiles of 4096 is a program a tile or few; what needs a whole row (a sum, a draw) is a
second one, a program a row. A kernel's end is the only barrier; what it learnt stands in records.

Statistics and draws take a softmax of logits or, given a rule's law beside it, the residual law of
verification, max((1 - mu) p - (1 - D) q, 0). These differ in what a token counts, and in what makes
a tile's tokens weights of at most 1: exp(x - m), or the power of two above the largest.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tta_ext import rules
from tta_ext.backends.reference._common import KeyArguments
from tta_ext.backends.triton import numerics as num
from tta_ext.backends.triton.launch import jit, launch, number, per_row, tuned


class Rows(NamedTuple):
    """Logits ``[B, V]`` or ``[B, K, V]``.

    Row r is (r // inner, r % inner); of its ``inner`` positions only ``limit`` may exist.
    """

    data: Tensor
    outer_stride: int
    inner_stride: int
    inner: int
    limit: int
    vocab: int
    tiles: int  # of a row
    groups: int  # of 128 logits, in its longest tile

    @classmethod
    def of(cls, logits: Tensor, positions: int = 1) -> Rows:
        x = logits if logits.dim() == 3 else logits.unsqueeze(1)
        limit, vocab = x.shape[1:]
        tiles, groups = -(-vocab // num.TILE.value), -(-min(vocab, num.TILE.value) // 128)
        inner = positions if x is logits else 1
        return cls(logits, x.stride(0), x.stride(1), inner, limit, vocab, tiles, groups)

    @property
    def rows(self) -> int:
        return self.data.shape[0] * self.inner

    @property
    def programs(self) -> int:
        """One a tile."""
        return self.rows * self.tiles


class Softmax(NamedTuple):
    """Rows at a temperature, with canonical statistics, of tiles ``[rows, tiles]`` and of rows."""

    x: Rows
    inverse: float  # 1/T
    tile_top: Tensor  # float32
    tile_sum: Tensor  # float32, relative to the tile's maximum; NaN where a logit is NaN or +inf
    top: Tensor  # float32
    z: Tensor  # float64; NaN for a row that has no law

    @classmethod
    def of(cls, x: Rows, inverse: float, law: Law | None = None, rule: int = 0,
           active: Tensor | None = None) -> Softmax:  # fmt: skip
        """Launch tile_stats; the rows' own are added by :func:`total`.

        Its programs take T tiles; the work for which T is tuned is about that many bytes.
        """
        top = x.data.new_empty(x.rows, x.tiles, dtype=torch.float32)
        z = x.data.new_empty(x.rows, dtype=torch.float64)
        s = cls(x, inverse, top, torch.empty_like(top), top.new_empty(x.rows), z)
        if x.programs:
            work = triton.next_power_of_2(x.programs) * x.data.element_size()
            launch(tile_stats, lambda sizes: (x.rows * triton.cdiv(x.tiles, sizes["T"]),), s, law,
                   active, work, RULE=rule)  # fmt: skip
        return s


class Law(NamedTuple):
    """Two models' rows, at the temperature of sampling and of the rule, and what the rule makes of
    them, ``[rows]``.
    """

    p: Softmax
    q: Softmax | None
    rule_p: Softmax
    rule_q: Softmax | None
    limit: Tensor  # float64: the probability that decides, or the knapsack's capacity in weights
    fraction: Tensor  # of the critical item that is deferred
    mass: Tensor  # deferred, and kept
    kept: Tensor
    cut: Tensor  # int64: the knapsack defers what is ordered before it
    critical: Tensor  # -1: none
    valid: Tensor  # bool; not where a row that was read has no law, or the parameter is none


# ---- tokens --------------------------------------------------------------------------------------


@triton.jit
def logits(x, row, j):
    """Logits j of a row as float32: -inf beyond its end, and in a row that does not exist."""
    first = x.data + (row // x.inner) * x.outer_stride + (row % x.inner) * x.inner_stride
    end = tl.where(row % x.inner < x.limit, x.vocab, 0)
    return tl.load(first + j, mask=j < end, other=-num.INFINITY).to(tl.float32)


@triton.jit
def probability(s, row, x):
    """fl32(exp(x - m) / Z), of one logit or many."""
    w = num.exp((x - tl.load(s.top + row)) * s.inverse)
    return (w.to(tl.float64) / tl.load(s.z + row)).to(tl.float32)


@triton.jit
def deferred(law, row, j, x, RULE: tl.constexpr):
    """The verdict of a rule (its ``test_of``) on tokens j, whose logits are x: deferred whole?"""
    limit = tl.load(law.limit + row)
    if RULE == rules.KNAPSACK:
        verdict = num.order(x, j) < tl.load(law.cut + row)
    elif RULE == rules.THRESHOLD:
        verdict = probability(law.rule_p, row, x).to(tl.float64) < limit
    else:
        q = probability(law.rule_q, row, logits(law.rule_q.x, row, j)).to(tl.float64)
        verdict = q < limit if RULE == rules.PROXY_BELOW else q > limit
    return verdict


@triton.jit
def mu(law, row, j, x, RULE: tl.constexpr):
    """How much of tokens j a rule defers, float64: all, or the critical item's share."""
    share = tl.where(j == tl.load(law.critical + row), tl.load(law.fraction + row), 0.0)
    return tl.where(deferred(law, row, j, x, RULE), 1.0, share)


@triton.jit
def kept(law, row, j, x, other, RULE: tl.constexpr):
    """The logits x of those tokens j that a rule keeps whole; for the rest a number."""
    return tl.where((mu(law, row, j, x, RULE) == 0.0) & (j < law.p.x.vocab), x, other)


@triton.jit
def parts(law, row, j, RULE: tl.constexpr):
    """(1 - mu) p and q of tokens j, float64; p and q are rounded to float32 before."""
    x = logits(law.p.x, row, j)
    p = probability(law.p, row, x).to(tl.float64)
    q = probability(law.q, row, logits(law.q.x, row, j)).to(tl.float64)
    return (1.0 - mu(law, row, j, x, RULE)) * p, q


@triton.jit
def policy(law, row, j, RULE: tl.constexpr):
    """pi(v) = (1 - mu(v)) p(v) + q(v) D, the sum in float64, rounded once."""
    kept, q = parts(law, row, j, RULE)
    return (kept + q * tl.load(law.mass + row)).to(tl.float32)


@triton.jit
def value(s, law, row, j, RULE: tl.constexpr):
    """What tokens count, float32: logits or, given a law, its residual, rounded once."""
    if law is None:
        x = logits(s.x, row, j)
    else:
        kept, q = parts(law, row, j, RULE)
        x = (kept - tl.load(law.kept + row) * q).to(tl.float32)
        x = tl.where(x > 0.0, x, 0.0)
    return x


@triton.jit
def power_above(most, SIGN: tl.constexpr):
    """The power of two above a float32, or its inverse, float64; of 0 it is 1."""
    raw = most.to(tl.float64).to(tl.int64, bitcast=True)
    exponent = tl.where(most > 0.0, (raw >> 52) - 1022, 0)
    return ((SIGN * exponent + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def weight(s, law, x, top):
    """Values as weights in [0, 1], relative to the largest of their tile."""
    d = (x - tl.where(top == -num.INFINITY, 0.0, top)) * s.inverse  # only -inf: a tile of no mass
    return num.exp(d) if law is None else (x.to(tl.float64) * power_above(top, -1)).to(tl.float32)


@triton.jit
def scale(s, law, top, row_top):
    """What the weights of a tile are multiplied by, float64."""
    d = (top - row_top) * s.inverse
    return num.exp(d).to(tl.float64) if law is None else power_above(top, 1)


# ---- tiles ---------------------------------------------------------------------------------------


@triton.jit
def tile(x):
    """For a program a tile: its row, the tokens of the tile, and their logits."""
    row, t = (tl.program_id(0) // x.tiles).to(tl.int64), tl.program_id(0) % x.tiles
    j = t * num.TILE + tl.arange(0, num.TILE)
    return row, j, logits(x, row, j)


@triton.jit
def place(x, T: tl.constexpr):
    """For a program T tiles: its row, where results of its tiles go, which of them exist, and the
    tokens of their first groups of 128.
    """
    blocks = tl.cdiv(x.tiles, T)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    t = tl.program_id(0) % blocks * T + tl.arange(0, T)
    j = t[:, None] * num.TILE + tl.arange(0, num.LANES)[None, :]
    return row, row * x.tiles + t, t < x.tiles, j


@tuned
def tile_stats(s, law, active, work, RULE: tl.constexpr, T: tl.constexpr):
    """Maximum and canonical sum of each tile of the active rows; others are left alone."""
    row, at, there, first = place(s.x, T)
    if active is not None:
        if tl.load(active + row) == 0:
            return
    top = tl.full((T, num.LANES), -num.INFINITY, tl.float32)
    for g in range(s.x.groups):
        x = value(s, law, row, first + g * num.LANES, RULE)
        top = tl.where(x > top, x, top)
    top = tl.max(top, 1)
    lanes = tl.zeros((T, num.LANES), tl.float32)
    for g in range(s.x.groups):
        x = value(s, law, row, first + g * num.LANES, RULE)
        lanes = lanes + weight(s, law, x, top[:, None])
    tl.store(s.tile_top + at, top, mask=there)
    tl.store(s.tile_sum + at, num.fold(lanes), mask=there)


@triton.jit
def best_tile(tile_top, row, tiles):
    """The largest of a row's tiles' values, the tokens of the first tile that has it, and the
    largest of other tiles.
    """
    t = tl.arange(0, num.MAX_TILES)
    tops = tl.load(tile_top + row * tiles + t, mask=t < tiles, other=-num.INFINITY)
    top = tl.max(tops, 0)
    first = tl.min(tl.where((tops == top) & (t < tiles), t, tiles - 1), 0)
    rest = tl.max(tl.where(t == first, -num.INFINITY, tops), 0)
    return top, first * num.TILE + tl.arange(0, num.TILE), rest


@triton.jit
def first_of(flags, j):
    """The first token that has a flag, one at any rate."""
    return tl.min(tl.where(flags, j, tl.max(j, 0)), 0).to(tl.int64)


# ---- rows ----------------------------------------------------------------------------------------


@triton.jit
def tile_mass(s, law, at, row_top):
    mass = tl.load(s.tile_sum + at).to(tl.float64)
    return mass * scale(s, law, tl.load(s.tile_top + at), row_top)


@triton.jit
def total(s, law, row):
    """The maximum of a row and its mass, tiles from left to right in float64; noted as well."""
    top, _, _ = best_tile(s.tile_top, row, s.x.tiles)
    z = tl.zeros((), tl.float64)
    for t in range(s.x.tiles):
        z = z + tile_mass(s, law, row * s.x.tiles + t, top)
    tl.store(s.top + row, top)
    tl.store(s.z + row, z)
    return top, z


@triton.jit
def draw(s, law, row, top, z, u, RULE: tl.constexpr):
    """Inverse CDF at u: the first tile whose cumulative mass passes the target, then a token of it.

    Where rounding lets no tile pass: the last one that has a mass, and a target beyond all sums.
    """
    target, before, after = u * z, tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    t, last = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    for i in range(s.x.tiles):
        mass = tile_mass(s, law, row * s.x.tiles + i, top)
        after = after + mass
        before, t = tl.where(after > target, before, after), tl.where(after > target, t, i + 1)
        last = tl.where(mass > 0.0, i, last)
    target, t = tl.where(t < s.x.tiles, target, num.INFINITY), tl.where(t < s.x.tiles, t, last)
    tile_top = tl.load(s.tile_top + row * s.x.tiles + t)
    x = value(s, law, row, t * num.TILE + tl.arange(0, num.TILE), RULE)
    weights, factor = weight(s, law, x, tile_top), scale(s, law, tile_top, top)
    return (t * num.TILE + num.find_in_tile(weights, factor, before, target)).to(tl.int64)


def key_of(key: KeyArguments, draw_number: int = 0) -> tuple[Any, ...]:
    """Whose random numbers, as kernels take them; without a seed nothing is drawn."""
    seed = number(key.seed) if key.do_sample else None
    places = per_row(key.position, key.sequence, key.rollout)
    return seed, *places, key.iteration, draw_number


@triton.jit
def coin(key, x, row, tag):
    """The uniform of one of x's rows for one purpose (philox_uniform)."""
    seed, position, sequence, rollout, strides, iteration, draw_number = key
    b = row // x.inner
    at = num.number(position, b * strides[0]) + row % x.inner
    who, which = num.number(sequence, b * strides[1]), num.number(rollout, b * strides[2])
    seed, draw_number = num.number(seed, 0), draw_number.to(tl.int64)
    first, _, _, _ = num.block_of(seed, draw_number, at, who, tag, iteration, which)
    return first.to(tl.float64) * 2.0**-32


@jit
def sample_rows(s, law, active, seed, position, sequence, rollout, strides, iteration, draw_number,
                tag, token, RULE: tl.constexpr):  # fmt: skip
    """A token a row, drawn or, without a seed, the most probable; -1 where a row has no law.

    Only of the active rows, if that is given.
    """
    row = tl.program_id(0).to(tl.int64)
    if active is not None:
        if tl.load(active + row) == 0:
            return
    top, z = total(s, law, row)
    if seed is not None:
        key = seed, position, sequence, rollout, strides, iteration, draw_number
        v = draw(s, law, row, top, z, coin(key, s.x, row, num.number(tag, row)), RULE)
    else:
        _, j, _ = best_tile(s.tile_top, row, s.x.tiles)
        v = first_of(logits(s.x, row, j) == top, j)
    tl.store(token + row, tl.where(z == z, v, -1))


def sample(s: Softmax, key: Any, tag: int | Tensor, token: Tensor, active: Tensor | None = None,
           law: Law | None = None, rule: int = 0) -> None:  # fmt: skip
    """Launch sample_rows; ``tag`` is one stream or a row's each, int64."""
    launch(sample_rows, s.x.rows, s, law, active, *key, tag, token, RULE=rule, num_warps=8)
