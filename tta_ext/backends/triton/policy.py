"""The law pi over whole rows: masses by a cut, pi itself, the most probable kept token.

What mask, policy, statistics, greedy choices and verification share, once a rule is resolved.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tta_ext.backends.reference._common import inverse_temperature
from tta_ext.backends.triton.cut import (
    CRITICAL,
    CRITICAL_X,
    FRACTION,
    KEPT,
    MASS,
    PROXY_TOP,
    PROXY_Z,
    TOP,
    VALID,
    Resolved,
    Z,
    canonical_weight,
    get,
    inside,
    judges_proxy,
    mu,
    put,
)
from tta_ext.backends.triton.launch import Rows, jit, launch, scratch, tuned
from tta_ext.backends.triton.numerics import INFINITY, LANES, TILE, admits, exp, fold
from tta_ext.backends.triton.rows import (
    finite,
    first_of_value,
    groups_of,
    logits,
    mass_sum,
    part,
    probability,
    row_max,
    row_sum,
    tiles_of,
)

BLOCK = tl.constexpr(2048)  # tokens a program
NO_ID = tl.constexpr(2**30)


@tuned(({"T": 4}, 4), ({"T": 1}, 1), ({"T": 1}, 4), ({"T": 2}, 4), ({"T": 8}, 8))
def masked_sums(law, s, token, inverse, first, second, work, RULE: tl.constexpr, T: tl.constexpr):
    """Two masses a tile, scaled to the row, float64: of what the rule defers, by its cut, and of
    what it keeps; or, with ``token``, of what stands before the drawn token, that included and not.
    """
    x = law.base
    tiles = tiles_of(x.vocab)
    row, block = part(tl.cdiv(tiles, T))
    here = block * T + tl.arange(0, T)
    at = row * tiles + here
    top = row_max(s.tile_max, row, tiles)
    tile_top = tl.load(s.tile_max + at, mask=here < tiles, other=-INFINITY)
    base = finite(tile_top)[:, None]
    begin = here[:, None] * TILE + tl.arange(0, LANES)[None, :]
    one = tl.zeros((T, LANES), tl.float32)
    two = one
    if token is not None:
        v = tl.maximum(tl.load(token + row), 0)
        drawn = logits(x, row, v)
    for g in range(groups_of(x.vocab)):
        j = begin + g * LANES
        y = logits(x, row, j)
        weight = exp((y - base) * inverse)
        if token is not None:
            one = one + tl.where(admits(drawn, v + 1, y, j), weight, 0.0)
            two = two + tl.where(admits(drawn, v, y, j), weight, 0.0)
        else:
            other = y
            if judges_proxy(RULE):
                other = logits(law.proxy, row, j)
            deferred = inside(law, row, j, y, other, RULE)
            one = one + tl.where(deferred, weight, 0.0)
            two = two + tl.where(deferred, 0.0, weight)
    scale = exp((tile_top - top) * inverse).to(tl.float64)
    tl.store(first + at, fold(one, T).to(tl.float64) * scale, mask=here < tiles)
    tl.store(second + at, fold(two, T).to(tl.float64) * scale, mask=here < tiles)


@jit
def mass_rows(state, s, sums, vocab, deferred, kept, inverse):
    """The deferred and the kept mass of each row, into its state."""
    row = tl.program_id(0).to(tl.int64)
    tiles = tiles_of(vocab)
    top = row_max(s.tile_max, row, tiles)
    item, x = get(state, row, CRITICAL), get(state, row, CRITICAL_X)
    fraction = get(state, row, FRACTION)
    share = fraction * canonical_weight(s, row, tiles, top, inverse, x, item)
    one, two = mass_sum(deferred, row, tiles), mass_sum(kept, row, tiles)
    z = row_sum(s.tile_max, sums, row, tiles, top, inverse)
    one = tl.where(fraction > 0.0, one + share, one) / z
    put(state, row, MASS, tl.where(get(state, row, VALID) != 0.0, one, float("nan")))
    put(state, row, KEPT, tl.where(fraction > 0.0, two - share, two) / z)


def masses(r: Resolved, token: Any, inverse: float) -> Tensor:
    """Launch masked_sums: float64 ``[2, rows, tiles]``."""
    x = r.law.base
    sums = scratch(x.data, 2, x.rows, x.tiles)
    launch(masked_sums, x.blocks, r.law, r.base, token, inverse, *sums, x.work, RULE=r.rule.code)
    return sums


def sum_up(r: Resolved, at_rule: bool = False) -> Tensor:
    """The deferred and the kept mass, at the temperature of sampling or of the rule; the first."""
    inverse = inverse_temperature(r.rule.rule_temperature) if at_rule else r.law.inverse
    sums = r.base.rule_sum if at_rule else r.base.tile_sum
    x, state = r.law.base, r.law.state
    launch(mass_rows, x.rows, state, r.base, sums, x.vocab, *masses(r, None, inverse), inverse)
    return state[:, MASS.value]


@triton.jit
def block_of(x):
    """The row of this program, the tokens of its block, and their logits."""
    row, block = part(tl.cdiv(x.vocab, BLOCK))
    j = block * BLOCK + tl.arange(0, BLOCK)
    return row, j, logits(x, row, j)


def blocks_of(x: Rows) -> int:
    return -(-x.vocab // BLOCK.value)


@triton.jit
def base_probability(law, row, x):
    return probability(x, get(law.state, row, TOP).to(tl.float32), law.inverse,
                       get(law.state, row, Z))  # fmt: skip


@triton.jit
def proxy_probability(law, row, y):
    return probability(y, get(law.state, row, PROXY_TOP).to(tl.float32), law.inverse,
                       get(law.state, row, PROXY_Z))  # fmt: skip


@triton.jit
def parts(law, row, v, x, y, RULE: tl.constexpr):
    """(1 - mu) p and q of tokens, float64; p and q are rounded to float32 before."""
    p = base_probability(law, row, x).to(tl.float64)
    q = proxy_probability(law, row, y).to(tl.float64)
    return (1.0 - mu(law, row, v, x, y, RULE)) * p, q


class Best(NamedTuple):
    """Of each block: the largest value, the lowest token that has it, and the next value."""

    value: Tensor
    token: Tensor
    second: Tensor


@jit
def policy_tiles(law, out, best, RULE: tl.constexpr):
    """pi(v) = (1 - mu(v)) p(v) + q(v) D, the sum in float64, rounded once: written out or, where
    ``best`` is given, its maximum.
    """
    row, j, x = block_of(law.base)
    kept, q = parts(law, row, j, x, logits(law.proxy, row, j), RULE)
    pi = (kept + q * get(law.state, row, MASS)).to(tl.float32)
    if best is not None:
        note_best(best, j, tl.where(j < law.base.vocab, pi, -1.0), law.base.vocab)
    else:
        pi = tl.where(get(law.state, row, VALID) != 0.0, pi, float("nan"))
        tl.store(out + row * law.base.vocab + j, pi, mask=j < law.base.vocab)


@jit
def kept_tiles(law, best, RULE: tl.constexpr):
    """The two largest logits that a rule over p keeps whole."""
    row, j, x = block_of(law.base)
    keeps = mu(law, row, j, x, x, RULE) == 0.0
    note_best(best, j, tl.where(keeps, x, -INFINITY), law.base.vocab)


@triton.jit
def note_best(best, j, x, vocab):
    top = tl.max(x, 0)
    v = tl.min(tl.where(x == top, j, vocab), 0)
    tl.store(best.value + tl.program_id(0), top)
    tl.store(best.token + tl.program_id(0), v)
    tl.store(best.second + tl.program_id(0), tl.max(tl.where(j == v, -INFINITY, x), 0))


def found_best(r: Resolved, of_policy: bool) -> Best:
    """The most probable tokens by pi or, of a rule over p, of what it keeps."""
    x = r.law.base
    new = [scratch(x.data, x.rows, blocks_of(x), dtype=torch.float32) for _ in range(2)]
    best = Best(new[0], torch.empty_like(new[0], dtype=torch.int32), new[1])
    kernel, out = (policy_tiles, (None,)) if of_policy else (kept_tiles, ())
    launch(kernel, best.value.numel(), r.law, *out, best, RULE=r.rule.code)
    return best


@triton.jit
def best_of_row(best, row, vocab, BLOCKS: tl.constexpr):
    """The largest value, its lowest token (a token even where all are NaN), and the next value."""
    blocks = tl.cdiv(vocab, BLOCK)
    t = tl.arange(0, BLOCKS)
    at = row * blocks + t
    value = tl.load(best.value + at, mask=t < blocks, other=-INFINITY)
    token = tl.load(best.token + at, mask=t < blocks, other=NO_ID)
    second = tl.load(best.second + at, mask=t < blocks, other=-INFINITY)
    top = tl.max(value, 0)
    found = tl.min(tl.where(value == top, token, NO_ID), 0)
    rest = tl.max(tl.where(token == found, second, value), 0)
    return top, tl.where(found < vocab, found, 0).to(tl.int64), rest


@triton.jit
def greedy_row(law, s, row, best, BLOCKS: tl.constexpr):
    """propose_greedy of cpu/rule.h: the most probable kept token, and whether q may change it."""
    mass, fraction = get(law.state, row, MASS), get(law.state, row, FRACTION)
    x, token, second = best_of_row(best, row, law.base.vocab, BLOCKS)
    some, splits = x > -INFINITY, fraction > 0.0
    one = tl.where(some, base_probability(law, row, x), 0.0)
    two = tl.where(second > -INFINITY, base_probability(law, row, second).to(tl.float64), 0.0)
    item_x = get(law.state, row, CRITICAL_X).to(tl.float32)
    share = (1.0 - fraction) * base_probability(law, row, item_x).to(tl.float64)
    two = tl.where(splits & some & (share > two), share, two)
    one = tl.where(splits & (some == 0), share.to(tl.float32), one)
    fallback = first_of_value(law.base, s, row, get(law.state, row, TOP).to(tl.float32))
    fallback = tl.where(splits, get(law.state, row, CRITICAL).to(tl.int64), fallback)
    ahead = (two + mass).to(tl.float32) < one
    needs = ((some | splits) == 0) | ((mass > 0.0) & (ahead == 0))
    return tl.where(some, token, fallback), needs
