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
from tta_ext.backends.triton import cut, rows
from tta_ext.backends.triton import numerics as num
from tta_ext.backends.triton.launch import Rows, jit, launch, scratch, tuned

BLOCK = tl.constexpr(2048)  # tokens a program
NO_ID = tl.constexpr(2**30)


@tuned(({"T": 4}, 4), ({"T": 1}, 1), ({"T": 1}, 4), ({"T": 2}, 4), ({"T": 8}, 8))
def masked_sums(law, s, token, inverse, first, second, work, RULE: tl.constexpr, T: tl.constexpr):
    """Two masses a tile, scaled to the row, float64: of what the rule defers, by its cut, and of
    what it keeps; or, with ``token``, of what stands before the drawn token, that included and not.
    """
    x = law.base
    tiles = rows.tiles_of(x.vocab)
    row, block = rows.part(tl.cdiv(tiles, T))
    here = block * T + tl.arange(0, T)
    at = row * tiles + here
    top = rows.row_max(s.tile_max, row, tiles)
    tile_top = tl.load(s.tile_max + at, mask=here < tiles, other=-num.INFINITY)
    base = rows.finite(tile_top)[:, None]
    begin = here[:, None] * num.TILE + tl.arange(0, num.LANES)[None, :]
    one = tl.zeros((T, num.LANES), tl.float32)
    two = one
    if token is not None:
        v = tl.maximum(tl.load(token + row), 0)
        drawn = rows.logits(x, row, v)
    for g in range(rows.groups_of(x.vocab)):
        j = begin + g * num.LANES
        y = rows.logits(x, row, j)
        weight = num.exp((y - base) * inverse)
        if token is not None:
            one = one + tl.where(num.admits(drawn, v + 1, y, j), weight, 0.0)
            two = two + tl.where(num.admits(drawn, v, y, j), weight, 0.0)
        else:
            other = y
            if cut.judges_proxy(RULE):
                other = rows.logits(law.proxy, row, j)
            deferred = cut.inside(law, row, j, y, other, RULE)
            one = one + tl.where(deferred, weight, 0.0)
            two = two + tl.where(deferred, 0.0, weight)
    scale = num.exp((tile_top - top) * inverse).to(tl.float64)
    tl.store(first + at, num.fold(one, T).to(tl.float64) * scale, mask=here < tiles)
    tl.store(second + at, num.fold(two, T).to(tl.float64) * scale, mask=here < tiles)


@jit
def mass_rows(state, s, sums, vocab, deferred, kept, inverse):
    """The deferred and the kept mass of each row, into its state."""
    row = tl.program_id(0).to(tl.int64)
    tiles = rows.tiles_of(vocab)
    top = rows.row_max(s.tile_max, row, tiles)
    item, x = tl.load(state.critical + row), tl.load(state.critical_x + row)
    fraction = tl.load(state.fraction + row)
    share = fraction * cut.canonical_weight(s, row, tiles, top, inverse, x, item)
    one, two = rows.mass_sum(deferred, row, tiles), rows.mass_sum(kept, row, tiles)
    z = rows.row_sum(s.tile_max, sums, row, tiles, top, inverse)
    one = tl.where(fraction > 0.0, one + share, one) / z
    tl.store(state.mass + row, tl.where(tl.load(state.valid + row), one, float("nan")))
    tl.store(state.kept + row, tl.where(fraction > 0.0, two - share, two) / z)


def masses(r: cut.Resolved, token: Any, inverse: float) -> Tensor:
    """Launch masked_sums: float64 ``[2, rows, tiles]``."""
    x = r.law.base
    sums = scratch(x.data, 2, x.rows, x.tiles)
    launch(masked_sums, x.blocks, r.law, r.base, token, inverse, *sums, x.work, RULE=r.rule.code)
    return sums


def sum_up(r: cut.Resolved, at_rule: bool = False) -> Tensor:
    """The deferred and the kept mass, at the temperature of sampling or of the rule; the first."""
    inverse = inverse_temperature(r.rule.rule_temperature) if at_rule else r.law.inverse
    sums = r.base.rule_sum if at_rule else r.base.tile_sum
    x, state = r.law.base, r.law.state
    launch(mass_rows, x.rows, state, r.base, sums, x.vocab, *masses(r, None, inverse), inverse)
    return state.mass


@triton.jit
def block_of(x):
    """The row of this program, the tokens of its block, and their logits."""
    row, block = rows.part(tl.cdiv(x.vocab, BLOCK))
    j = block * BLOCK + tl.arange(0, BLOCK)
    return row, j, rows.logits(x, row, j)


def blocks_of(x: Rows) -> int:
    return -(-x.vocab // BLOCK.value)


@triton.jit
def base_probability(law, row, x):
    top, z = tl.load(law.state.top + row), tl.load(law.state.z + row)
    return rows.probability(x, top, law.inverse, z)


@triton.jit
def proxy_probability(law, row, y):
    top, z = tl.load(law.state.proxy_top + row), tl.load(law.state.proxy_z + row)
    return rows.probability(y, top, law.inverse, z)


@triton.jit
def parts(law, row, v, x, y, RULE: tl.constexpr):
    """(1 - mu) p and q of tokens, float64; p and q are rounded to float32 before."""
    p = base_probability(law, row, x).to(tl.float64)
    q = proxy_probability(law, row, y).to(tl.float64)
    return (1.0 - cut.mu(law, row, v, x, y, RULE)) * p, q


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
    kept, q = parts(law, row, j, x, rows.logits(law.proxy, row, j), RULE)
    pi = (kept + q * tl.load(law.state.mass + row)).to(tl.float32)
    if best is not None:
        note_best(best, j, tl.where(j < law.base.vocab, pi, -1.0), law.base.vocab)
    else:
        pi = tl.where(tl.load(law.state.valid + row), pi, float("nan"))
        tl.store(out + row * law.base.vocab + j, pi, mask=j < law.base.vocab)


@jit
def kept_tiles(law, best, RULE: tl.constexpr):
    """The two largest logits that a rule over p keeps whole."""
    row, j, x = block_of(law.base)
    keeps = cut.mu(law, row, j, x, x, RULE) == 0.0
    note_best(best, j, tl.where(keeps, x, -num.INFINITY), law.base.vocab)


@triton.jit
def note_best(best, j, x, vocab):
    top = tl.max(x, 0)
    v = tl.min(tl.where(x == top, j, vocab), 0)
    tl.store(best.value + tl.program_id(0), top)
    tl.store(best.token + tl.program_id(0), v)
    tl.store(best.second + tl.program_id(0), tl.max(tl.where(j == v, -num.INFINITY, x), 0))


def found_best(r: cut.Resolved, of_policy: bool) -> Best:
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
    value = tl.load(best.value + at, mask=t < blocks, other=-num.INFINITY)
    token = tl.load(best.token + at, mask=t < blocks, other=NO_ID)
    second = tl.load(best.second + at, mask=t < blocks, other=-num.INFINITY)
    top = tl.max(value, 0)
    found = tl.min(tl.where(value == top, token, NO_ID), 0)
    rest = tl.max(tl.where(token == found, second, value), 0)
    return top, tl.where(found < vocab, found, 0).to(tl.int64), rest


@triton.jit
def greedy_row(law, s, row, best, BLOCKS: tl.constexpr):
    """propose_greedy of cpu/rule.h: the most probable kept token, and whether q may change it."""
    mass, fraction = tl.load(law.state.mass + row), tl.load(law.state.fraction + row)
    x, token, second = best_of_row(best, row, law.base.vocab, BLOCKS)
    some, splits = x > -num.INFINITY, fraction > 0.0
    one = tl.where(some, base_probability(law, row, x), 0.0)
    two = tl.where(second > -num.INFINITY, base_probability(law, row, second).to(tl.float64), 0.0)
    item_x = tl.load(law.state.critical_x + row)
    share = (1.0 - fraction) * base_probability(law, row, item_x).to(tl.float64)
    two = tl.where(splits & some & (share > two), share, two)
    one = tl.where(splits & (some == 0), share.to(tl.float32), one)
    fallback = rows.first_of_value(law.base, s, row, tl.load(law.state.top + row))
    fallback = tl.where(splits, tl.load(law.state.critical + row), fallback)
    ahead = (two + mass).to(tl.float32) < one
    needs = ((some | splits) == 0) | ((mass > 0.0) & (ahead == 0))
    return tl.where(some, token, fallback), needs
