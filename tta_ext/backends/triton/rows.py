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

from tta_ext.backends.triton.launch import Rows, jit, launch, number, per_row, scratch, tuned
from tta_ext.backends.triton.numerics import (
    GROUPS,
    INFINITY,
    LANES,
    MAX_TILES,
    TILE,
    exp,
    find_in_tile,
    fold,
    integer,
    uniform,
    word3,
)


@triton.jit
def row_pointer(data, outer_stride, inner_stride, inner, row):
    return data + (row // inner) * outer_stride + (row % inner) * inner_stride


@triton.jit
def groups_of(vocab):
    """How many groups of 128 the longest tile of a row has."""
    return tl.minimum(GROUPS, tl.cdiv(vocab, LANES))


@triton.jit
def tiles_of(vocab):
    return tl.cdiv(vocab, TILE)


@tuned(({"T": 4}, 4), ({"T": 1}, 1), ({"T": 1}, 4), ({"T": 2}, 4), ({"T": 8}, 8))
def tile_stats(data, outer_stride, inner_stride, inner, limit, vocab, active,
               tile_max, tile_sum, second_sum, inverse, second_inverse, work,
               T: tl.constexpr):  # fmt: skip
    """Maximum and canonical sum of each tile, relative to it, at one or two temperatures.

    NaN and +inf come back as a NaN sum. What lies beyond ``limit`` is like a row of -inf, and rows
    that are not ``active`` are left alone.
    """
    tiles = tiles_of(vocab)
    blocks = tl.cdiv(tiles, T)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    if active is not None:
        if tl.load(active + row) == 0:
            return
    here = (tl.program_id(0) % blocks) * T + tl.arange(0, T)
    first = row_pointer(data, outer_stride, inner_stride, inner, row)
    begin = here[:, None] * TILE + tl.arange(0, LANES)[None, :]
    end = tl.where(row % inner < limit, vocab, 0)
    top = tl.full((T, LANES), -INFINITY, tl.float32)
    for g in range(groups_of(vocab)):
        j = begin + g * LANES
        x = tl.load(first + j, mask=j < end, other=-INFINITY).to(tl.float32)
        top = tl.where(x > top, x, top)
    top = tl.max(top, 1)
    base = tl.where(top == -INFINITY, 0.0, top)[:, None]
    lanes = tl.zeros((T, LANES), tl.float32)
    second = lanes
    for g in range(groups_of(vocab)):
        j = begin + g * LANES
        x = tl.load(first + j, mask=j < end, other=-INFINITY).to(tl.float32) - base
        lanes = lanes + exp(x * inverse)
        if second_sum is not None:
            second = second + exp(x * second_inverse)
    at = row * tiles + here
    tl.store(tile_max + at, top, mask=here < tiles)
    tl.store(tile_sum + at, fold(lanes, T), mask=here < tiles)
    if second_sum is not None:
        tl.store(second_sum + at, fold(second, T), mask=here < tiles)


@triton.jit
def row_max(tile_max, row, tiles):
    t = tl.arange(0, MAX_TILES)
    return tl.max(tl.load(tile_max + row * tiles + t, mask=t < tiles, other=-INFINITY), 0)


@triton.jit
def tile_scale(tile_max, at, top, inverse):
    """exp(m_t - m_row), float64."""
    return exp((tl.load(tile_max + at) - top) * inverse).to(tl.float64)


@triton.jit
def row_sum(tile_max, tile_sum, row, tiles, top, inverse):
    """Z: tiles from left to right in float64. NaN for a row that has no law."""
    z = tl.zeros((), tl.float64)
    for t in range(tiles):
        at = row * tiles + t
        z = z + tl.load(tile_sum + at).to(tl.float64) * tile_scale(tile_max, at, top, inverse)
    return z


@triton.jit
def mass_sum(mass, row, tiles):
    """The same of masses that are scaled already."""
    z = tl.zeros((), tl.float64)
    for t in range(tiles):
        z = z + tl.load(mass + row * tiles + t)
    return z


@triton.jit
def probability(x, top, inverse, z):
    """fl32(exp(x - m) / Z), of one logit or many."""
    return (exp((x - top) * inverse).to(tl.float64) / z).to(tl.float32)


@triton.jit
def load_tile(first, t, vocab):
    """Tile t of a row as float32, -inf beyond the end."""
    j = t * TILE + tl.arange(0, TILE)
    return tl.load(first + j, mask=j < vocab, other=-INFINITY).to(tl.float32)


@triton.jit
def draw_row(first, vocab, tile_max, tile_sum, row, tiles, top, z, inverse, u):
    """Inverse CDF at u: the first tile whose cumulative mass passes u Z, then a token of it."""
    target = u * z
    before = tl.zeros((), tl.float64)
    found = tl.full((), -1, tl.int32)
    last = tl.full((), 0, tl.int32)
    for t in range(tiles):
        at = row * tiles + t
        mass = tl.load(tile_sum + at).to(tl.float64) * tile_scale(tile_max, at, top, inverse)
        open_ = found < 0
        hit = open_ & (before + mass > target)
        last = tl.where(open_ & (mass > 0.0), t, last)
        found = tl.where(hit, t, found)
        before = tl.where(open_ & (hit == 0), before + mass, before)
    target = tl.where(found < 0, INFINITY, target)
    t = tl.where(found < 0, last, found)
    at = row * tiles + t
    weight = exp((load_tile(first, t, vocab) - tl.load(tile_max + at)) * inverse)
    scale = tile_scale(tile_max, at, top, inverse)
    return (t * TILE + find_in_tile(weight, scale, before, target)).to(tl.int64)


@triton.jit
def first_of_value(first, vocab, tile_max, row, tiles, value):
    """The lowest id whose logit is ``value``, which is some tile's maximum."""
    t = tl.arange(0, MAX_TILES)
    top = tl.load(tile_max + row * tiles + t, mask=t < tiles, other=-INFINITY)
    where = tl.min(tl.where((top == value) & (t < tiles), t, tiles - 1), 0)
    j = tl.arange(0, TILE)
    inside = tl.min(tl.where(load_tile(first, where, vocab) == value, j, TILE - 1), 0)
    return (where * TILE + inside).to(tl.int64)


@jit
def sample_rows(data, outer_stride, inner_stride, inner, limit, vocab, active,
                tile_max, tile_sum, inverse,
                seed, position, position_stride, sequence, sequence_stride,
                rollout, rollout_stride, iteration, tag, draw, token,
                DO_SAMPLE: tl.constexpr):  # fmt: skip
    """A token a row, -1 where it has no law; only of the active rows, if that is given.

    A row whose token becomes -1 is active no more.
    """
    row = tl.program_id(0).to(tl.int64)
    if active is not None:
        if tl.load(active + row) == 0:
            return
    tiles = tiles_of(vocab)
    first = row_pointer(data, outer_stride, inner_stride, inner, row)
    top = row_max(tile_max, row, tiles)
    z = row_sum(tile_max, tile_sum, row, tiles, top, inverse)
    if DO_SAMPLE:
        word = word3(
            tag.to(tl.int64), iteration.to(tl.int64), integer(rollout, row * rollout_stride)
        )
        u = uniform(
            integer(seed, 0),
            draw.to(tl.int64),
            integer(position, row * position_stride),
            integer(sequence, row * sequence_stride),
            word,
        )
        v = draw_row(first, vocab, tile_max, tile_sum, row, tiles, top, z, inverse, u)
    else:
        v = first_of_value(first, vocab, tile_max, row, tiles, top)
    valid = z == z
    tl.store(token + row, tl.where(valid, v, -1))
    if active is not None:
        tl.store(active + row, valid)


class Stats(NamedTuple):
    """What one pass learns about rows: a tile's maximum and its sums at one or two temperatures."""

    tile_max: Tensor
    tile_sum: Tensor
    rule_sum: Tensor  # that at the rule's temperature


def stats(x: Rows, inverse: float, second: float | None = None, active: Any = None) -> Stats:
    """Launch tile_stats over rows."""
    shape = x.rows, x.tiles
    tile_max, tile_sum = (scratch(x.data, *shape, dtype=torch.float32) for _ in range(2))
    both = second is not None and second != inverse
    more = scratch(x.data, *shape, dtype=torch.float32) if both else None
    launch(
        tile_stats, lambda sizes: x.rows * -(-x.tiles // sizes["T"]), x.data, *x, active,
        tile_max, tile_sum, more, inverse, second if both else inverse, x.work,
    )  # fmt: skip
    return Stats(tile_max, tile_sum, tile_sum if more is None else more)


class Key(NamedTuple):
    """Whose random numbers: the arguments of schemas.KEY as kernels take them."""

    seed: Any
    position: Any
    position_stride: int
    sequence: Any
    sequence_stride: int
    rollout: Any
    rollout_stride: int
    iteration: int

    @classmethod
    def of(cls, seed: Tensor, position: Tensor, sequence: Tensor, iteration: int,
           rollout: Tensor) -> Key:  # fmt: skip
        rows = (*per_row(position), *per_row(sequence), *per_row(rollout))
        return cls(number(seed), *rows, iteration)


def sample(x: Rows, s: Stats, inverse: float, key: Key, do_sample: bool, tag: int, draw: int,
           token: Tensor, active: Any = None) -> None:  # fmt: skip
    """Launch sample_rows."""
    launch(
        sample_rows, x.rows, x.data, *x, active, s.tile_max, s.tile_sum, inverse, *key, tag, draw,
        token, DO_SAMPLE=do_sample, num_warps=8,
    )  # fmt: skip
