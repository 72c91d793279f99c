"""Kernels over rows of logits that every operator of deferral and sampling is made of.

A row is cut into tiles of 4096, a program takes one or a few; what needs a whole row (its sum, a
draw) is a second kernel, a program a row. Programs never wait for each other: a kernel's end is the
only barrier.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tta_ext.backends.reference._common import KeyArguments
from tta_ext.backends.triton import numerics as num
from tta_ext.backends.triton.launch import Rows, jit, launch, number, per_row, scratch, tuned


class Stats(NamedTuple):
    """What one pass learns about rows, float32 ``[rows, tiles]``: maxima and canonical sums.

    Sums are relative to the tile's maximum. Without ``tile_max`` they are masses, whole ones.
    """

    tile_max: Any
    tile_sum: Tensor
    rule_sum: Tensor  # that at the rule's temperature


@triton.jit
def part(count):
    """The row of this program, and its number among the ``count`` programs of the row."""
    return (tl.program_id(0) // count).to(tl.int64), tl.program_id(0) % count


@triton.jit
def logits(x, row, j):
    """Logits j of a row as float32: -inf beyond its end, and in a row that does not exist."""
    first = x.data + (row // x.inner) * x.outer_stride + (row % x.inner) * x.inner_stride
    end = tl.where(row % x.inner < x.limit, x.vocab, 0)
    return tl.load(first + j, mask=j < end, other=-num.INFINITY).to(tl.float32)


@triton.jit
def groups_of(vocab):
    """How many groups of 128 the longest tile of a row has."""
    return tl.minimum(num.GROUPS, tl.cdiv(vocab, num.LANES))


@triton.jit
def tiles_of(vocab):
    return tl.cdiv(vocab, num.TILE)


@triton.jit
def finite(top):
    """A tile's maximum as what its logits are taken relative to."""
    return tl.where(top == -num.INFINITY, 0.0, top)


@tuned(({"T": 4}, 4), ({"T": 1}, 1), ({"T": 1}, 4), ({"T": 2}, 4), ({"T": 8}, 8))
def tile_stats(x, s, active, inverse, rule_inverse, work, T: tl.constexpr):
    """Maximum and canonical sum of each tile, at one or two temperatures.

    NaN and +inf come back as a NaN sum. Rows that are not ``active`` are left alone.
    """
    tiles = tiles_of(x.vocab)
    row, block = part(tl.cdiv(tiles, T))
    if active is not None:
        if tl.load(active + row) == 0:
            return
    here = block * T + tl.arange(0, T)
    begin = here[:, None] * num.TILE + tl.arange(0, num.LANES)[None, :]
    top = tl.full((T, num.LANES), -num.INFINITY, tl.float32)
    for g in range(groups_of(x.vocab)):
        y = logits(x, row, begin + g * num.LANES)
        top = tl.where(y > top, y, top)
    top = tl.max(top, 1)
    base = finite(top)[:, None]
    lanes = tl.zeros((T, num.LANES), tl.float32)
    second = lanes
    for g in range(groups_of(x.vocab)):
        y = logits(x, row, begin + g * num.LANES) - base
        lanes = lanes + num.exp(y * inverse)
        if rule_inverse is not None:
            second = second + num.exp(y * rule_inverse)
    at = row * tiles + here
    tl.store(s.tile_max + at, top, mask=here < tiles)
    tl.store(s.tile_sum + at, num.fold(lanes, T), mask=here < tiles)
    if rule_inverse is not None:
        tl.store(s.rule_sum + at, num.fold(second, T), mask=here < tiles)


def stats(x: Rows, inverse: float, rule_inverse: float | None = None, active: Any = None) -> Stats:
    """Launch tile_stats over rows."""
    both = rule_inverse not in (None, inverse)
    new = [scratch(x.data, x.rows, x.tiles, dtype=torch.float32) for _ in range(2 + both)]
    s = Stats(new[0], new[1], new[-1])
    launch(tile_stats, x.blocks, x, s, active, inverse, rule_inverse if both else None, x.work)
    return s


@triton.jit
def row_max(tile_max, row, tiles):
    t = tl.arange(0, num.MAX_TILES)
    return tl.max(tl.load(tile_max + row * tiles + t, mask=t < tiles, other=-num.INFINITY), 0)


@triton.jit
def tile_scale(tile_max, at, top, inverse):
    """exp(m_t - m_row), float64."""
    return num.exp((tl.load(tile_max + at) - top) * inverse).to(tl.float64)


@triton.jit
def tile_mass(tile_max, sums, at, top, inverse):
    mass = tl.load(sums + at).to(tl.float64)
    if tile_max is not None:
        mass = mass * tile_scale(tile_max, at, top, inverse)
    return mass


@triton.jit
def row_sum(tile_max, sums, row, tiles, top, inverse):
    """Z: tiles from left to right in float64. NaN for a row that has no law."""
    z = tl.zeros((), tl.float64)
    for t in range(tiles):
        z = z + tile_mass(tile_max, sums, row * tiles + t, top, inverse)
    return z


@triton.jit
def mass_sum(mass, row, tiles):
    """The same of whole masses."""
    return row_sum(None, mass, row, tiles, 0.0, 0.0)


@triton.jit
def probability(x, top, inverse, z):
    """fl32(exp(x - m) / Z), of one logit or many."""
    return (num.exp((x - top) * inverse).to(tl.float64) / z).to(tl.float32)


@triton.jit
def find_tile(tile_max, sums, row, tiles, top, inverse, target):
    """The first tile whose cumulative mass passes the target, the mass before it, and the target.

    Where rounding lets none pass: the last tile that has a mass, and a target beyond all sums.
    """
    before = tl.zeros((), tl.float64)
    found = tl.full((), -1, tl.int32)
    last = tl.full((), 0, tl.int32)
    for t in range(tiles):
        mass = tile_mass(tile_max, sums, row * tiles + t, top, inverse)
        open_ = found < 0
        hit = open_ & (before + mass > target)
        last = tl.where(open_ & (mass > 0.0), t, last)
        found = tl.where(hit, t, found)
        before = tl.where(open_ & (hit == 0), before + mass, before)
    return tl.where(found < 0, last, found), before, tl.where(found < 0, num.INFINITY, target)


@triton.jit
def draw_row(x, s, row, top, z, inverse, u):
    """Inverse CDF at u: a tile, then a token of it."""
    tiles = tiles_of(x.vocab)
    t, before, target = find_tile(s.tile_max, s.tile_sum, row, tiles, top, inverse, u * z)
    at = row * tiles + t
    y = logits(x, row, t * num.TILE + tl.arange(0, num.TILE))
    weight = num.exp((y - tl.load(s.tile_max + at)) * inverse)
    scale = tile_scale(s.tile_max, at, top, inverse)
    return (t * num.TILE + num.find_in_tile(weight, scale, before, target)).to(tl.int64)


@triton.jit
def first_of_value(x, s, row, value):
    """The lowest id whose logit is ``value``, which is some tile's maximum."""
    tiles = tiles_of(x.vocab)
    t = tl.arange(0, num.MAX_TILES)
    top = tl.load(s.tile_max + row * tiles + t, mask=t < tiles, other=-num.INFINITY)
    where = tl.min(tl.where((top == value) & (t < tiles), t, tiles - 1), 0)
    j = tl.arange(0, num.TILE)
    inside = tl.min(tl.where(logits(x, row, where * num.TILE + j) == value, j, num.TILE - 1), 0)
    return (where * num.TILE + inside).to(tl.int64)


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
    """The uniform of row b, k tokens after its position, for one purpose."""
    seed, position, sequence, rollout, strides, iteration, draw = key
    place = num.integer(position, b * strides[0]) + k
    who, which = num.integer(sequence, b * strides[1]), num.integer(rollout, b * strides[2])
    word = num.word3(tag, iteration.to(tl.int64), which)
    return num.uniform(num.integer(seed, 0), draw.to(tl.int64), place, who, word)


@jit
def sample_rows(x, s, active, inverse, seed, position, sequence, rollout, strides, iteration, draw,
                tag, token):  # fmt: skip
    """A token a row, drawn or, without a seed, the most probable; -1 where a row has no law.

    Only of the active rows, if that is given; a row whose token becomes -1 is active no more.
    """
    row = tl.program_id(0).to(tl.int64)
    if active is not None:
        if tl.load(active + row) == 0:
            return
    tiles = tiles_of(x.vocab)
    top = row_max(s.tile_max, row, tiles)
    z = row_sum(s.tile_max, s.tile_sum, row, tiles, top, inverse)
    if seed is not None:
        key = seed, position, sequence, rollout, strides, iteration, draw
        u = coin(key, row, 0, tag.to(tl.int64))
        v = draw_row(x, s, row, top, z, inverse, u)
    else:
        v = first_of_value(x, s, row, top)
    tl.store(token + row, tl.where(z == z, v, -1))
    if active is not None:
        tl.store(active + row, z == z)


def sample(x: Rows, s: Stats, inverse: float, key: Key, tag: int, token: Tensor,
           active: Any = None) -> None:  # fmt: skip
    """Launch sample_rows."""
    launch(sample_rows, x.rows, x, s, active, inverse, *key, tag, token, num_warps=8)
