"""Kernels over rows that every operator of deferral and sampling is made of: statistics, draws.

A row is cut into tiles of 4096. A kernel over tiles is a program a tile or few; what needs a whole
row (its sum, a draw) is a second kernel, a program a row. Programs never wait for each other: a
kernel's end is the only barrier.

Both take a softmax of logits and, given a rule's law beside it, the residual law (verify.py). They
differ in what a token counts, and in how a tile's tokens are scaled to weights of at most 1, so
that a draw keeps its resolution: by exp(x - m), or by the power of two above the largest.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from tta_ext.backends.reference._common import KeyArguments
from tta_ext.backends.triton import numerics as num
from tta_ext.backends.triton.launch import jit, launch, number, per_row, tuned
from tta_ext.backends.triton.law import Rows, Softmax, logits, residual, tiles_of


@triton.jit
def place(x, T: tl.constexpr):
    """For a program T tiles: its row, where results of its tiles go, which of them exist, and the
    tokens of their first groups of 128.
    """
    tiles = tiles_of(x.vocab)
    blocks = tl.cdiv(tiles, T)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    t = tl.program_id(0) % blocks * T + tl.arange(0, T)
    j = t[:, None] * num.TILE + tl.arange(0, num.LANES)[None, :]
    return row, row * tiles + t, t < tiles, j


@triton.jit
def groups_of(vocab):
    """How many groups of 128 the longest tile of a row has."""
    return tl.minimum(num.GROUPS, tl.cdiv(vocab, num.LANES))


@triton.jit
def relative(x, top, inverse):
    """exp(x - m_t), float32; a tile of only -inf has no mass."""
    return num.exp((x - tl.where(top == -num.INFINITY, 0.0, top)) * inverse)


@triton.jit
def power_above(most, SIGN: tl.constexpr):
    """The power of two above a float32, or its inverse, float64; of 0 it is 1."""
    raw = most.to(tl.float64).to(tl.int64, bitcast=True)
    exponent = tl.where(most > 0.0, (raw >> 52) - 1022, 0)
    return ((SIGN * exponent + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def value(s, law, row, j, RULE: tl.constexpr):
    """What tokens count: logits or, given a law, its residual."""
    if law is None:
        x = logits(s.x, row, j)
    else:
        x = residual(law, row, j, RULE)
    return x


@triton.jit
def weight(s, law, x, top):
    """Values as weights in [0, 1], relative to the largest of their tile."""
    if law is None:
        w = relative(x, top, s.inverse)
    else:
        w = (x.to(tl.float64) * power_above(top, -1)).to(tl.float32)
    return w


@triton.jit
def scale(s, law, at, row_top):
    """What a tile's weights are multiplied by, float64."""
    top = tl.load(s.tile_top + at)
    if law is None:
        factor = num.exp((top - row_top) * s.inverse).to(tl.float64)
    else:
        factor = power_above(top, 1)
    return factor


@tuned((4, 4), (1, 1), (1, 4), (2, 4), (8, 8))
def tile_stats(s, law, active, work, RULE: tl.constexpr, T: tl.constexpr):
    """Maximum and canonical sum of each tile of the active rows; others are left alone."""
    row, at, there, first = place(s.x, T)
    if active is not None:
        if tl.load(active + row) == 0:
            return
    top = tl.full((T, num.LANES), -num.INFINITY, tl.float32)
    for g in range(groups_of(s.x.vocab)):
        x = value(s, law, row, first + g * num.LANES, RULE)
        top = tl.where(x > top, x, top)
    top = tl.max(top, 1)
    lanes = tl.zeros((T, num.LANES), tl.float32)
    for g in range(groups_of(s.x.vocab)):
        x = value(s, law, row, first + g * num.LANES, RULE)
        lanes = lanes + weight(s, law, x, top[:, None])
    tl.store(s.tile_top + at, top, mask=there)
    tl.store(s.tile_sum + at, num.fold(lanes, T), mask=there)


def statistics(x: Rows, inverse: float, law: Any = None, rule: int = 0,
               active: Any = None) -> Softmax:  # fmt: skip
    """Launch tile_stats."""
    s = Softmax.of(x, inverse)
    launch(tile_stats, x.blocks, s, law, active, x.work, RULE=rule)
    return s


@triton.jit
def total(s, law, row):
    """The maximum of a row and its mass, tiles from left to right in float64; noted as well."""
    tiles = tiles_of(s.x.vocab)
    top, _ = best_tile(s.tile_top, row, tiles)
    z = tl.zeros((), tl.float64)
    for t in range(tiles):
        at = row * tiles + t
        z = z + tl.load(s.tile_sum + at).to(tl.float64) * scale(s, law, at, top)
    tl.store(s.top + row, top)
    tl.store(s.z + row, z)
    return top, z


@triton.jit
def draw(s, law, row, top, z, u, RULE: tl.constexpr):
    """Inverse CDF at u: the first tile whose cumulative mass passes the target, then a token of it.

    Where rounding lets no tile pass: the last one that has a mass, and a target beyond all sums.
    """
    tiles = tiles_of(s.x.vocab)
    target, before = u * z, tl.zeros((), tl.float64)
    found, last = tl.full((), -1, tl.int32), tl.full((), 0, tl.int32)
    for t in range(tiles):
        at = row * tiles + t
        mass = tl.load(s.tile_sum + at).to(tl.float64) * scale(s, law, at, top)
        passes = (found < 0) & (before + mass > target)
        last = tl.where((found < 0) & (mass > 0.0), t, last)
        found = tl.where(passes, t, found)
        before = tl.where(found < 0, before + mass, before)
    target = tl.where(found < 0, num.INFINITY, target)
    t = tl.where(found < 0, last, found)
    at = row * tiles + t
    x = value(s, law, row, t * num.TILE + tl.arange(0, num.TILE), RULE)
    inside = weight(s, law, x, tl.load(s.tile_top + at))
    inside = num.find_in_tile(inside, scale(s, law, at, top), before, target)
    return (t * num.TILE + inside).to(tl.int64)


@triton.jit
def best_tile(tile_top, row, tiles):
    """The largest of a row's tiles' values, and the tokens of the first tile that has it."""
    t = tl.arange(0, num.MAX_TILES)
    tops = tl.load(tile_top + row * tiles + t, mask=t < tiles, other=-num.INFINITY)
    top = tl.max(tops, 0)
    first = tl.min(tl.where((tops == top) & (t < tiles), t, tiles - 1), 0)
    return top, first * num.TILE + tl.arange(0, num.TILE)


@triton.jit
def first_of(flags, j):
    """The first token that has a flag, one at any rate."""
    return tl.min(tl.where(flags, j, tl.max(j, 0)), 0).to(tl.int64)


class Key(NamedTuple):
    """Whose random numbers, as kernels take them; without a seed nothing is drawn."""

    seed: Any
    position: Any
    sequence: Any
    rollout: Any
    strides: Any
    iteration: int
    draw: int

    @classmethod
    def of(cls, key: KeyArguments, draw: int = 0) -> Key:
        position, sequence, rollout, strides = per_row(key.position, key.sequence, key.rollout)
        seed = number(key.seed) if key.do_sample else None
        return cls(seed, position, sequence, rollout, strides, key.iteration, draw)


@triton.jit
def coin(key, b, k, tag):
    """The uniform of row b, k tokens after its position, for one purpose (philox_uniform)."""
    seed, position, sequence, rollout, strides, iteration, draw = key
    at = num.number(position, b * strides[0]) + k
    who, which = num.number(sequence, b * strides[1]), num.number(rollout, b * strides[2])
    word = num.word3(b * 0 + tag, iteration.to(tl.int64), which)
    first, _, _, _ = num.block_of(num.number(seed, 0), draw.to(tl.int64), at, who, word)
    return first.to(tl.float64) * 2.0**-32


@jit
def sample_rows(s, active, seed, position, sequence, rollout, strides, iteration, draw_number, tag,
                token):  # fmt: skip
    """A token a row, drawn or, without a seed, the most probable; -1 where a row has no law.

    Only of the active rows, if that is given; a row whose token becomes -1 is active no more.
    """
    row = tl.program_id(0).to(tl.int64)
    if active is not None:
        if tl.load(active + row) == 0:
            return
    top, z = total(s, None, row)
    if seed is not None:
        key = seed, position, sequence, rollout, strides, iteration, draw_number
        v = draw(s, None, row, top, z, coin(key, row, 0, tag), 0)
    else:
        _, j = best_tile(s.tile_top, row, tiles_of(s.x.vocab))
        v = first_of(logits(s.x, row, j) == top, j)
    tl.store(token + row, tl.where(z == z, v, -1))
    if active is not None:
        tl.store(active + row, z == z)


def sample(s: Softmax, key: Key, tag: int, token: Tensor, active: Any = None) -> None:
    """Launch sample_rows."""
    launch(sample_rows, s.x.rows, s, active, *key, tag, token, num_warps=8)
