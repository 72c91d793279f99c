"""The law pi over whole rows: masses by a cut, pi itself, the most probable kept token.

What mask, policy, statistics, greedy choices and verification share, once a rule is resolved.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tta_ext import rules
from tta_ext.backends.triton.cut import (
    CRITICAL,
    CRITICAL_X,
    CUT_ID,
    CUT_X,
    FIELDS,
    FRACTION,
    KEPT,
    MASS,
    PROXY_MAX,
    PROXY_Z,
    TOP,
    VALID,
    RuleArguments,
    Z,
    canonical_weight,
    is_upper,
    judges_proxy,
    plain,
    resolve,
)
from tta_ext.backends.triton.launch import (
    Rows,
    factor,
    jit,
    launch,
    scratch,
    tuned,
)
from tta_ext.backends.triton.numerics import (
    INFINITY,
    LANES,
    TILE,
    admits,
    exp,
    fold,
)
from tta_ext.backends.triton.rows import (
    Stats,
    first_of_value,
    groups_of,
    mass_sum,
    probability,
    row_max,
    row_pointer,
    row_sum,
    stats,
    tiles_of,
)

BLOCK_SIZE = 2048  # tokens a program


@triton.jit
def flipped(inside, UPPER: tl.constexpr):
    """Whether a rule defers what its cut has inside or, for an upper rule, outside."""
    if UPPER:
        return inside == 0
    return inside


@tuned(({"T": 4}, 4), ({"T": 1}, 1), ({"T": 1}, 4), ({"T": 2}, 4), ({"T": 8}, 8))
def masked_sums(data, outer_stride, inner_stride, inner, limit, vocab,
                judged, judged_outer, judged_inner, state, token, tile_max, inverse,
                inside, outside, work, UPPER: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """Two masses a tile, scaled to the row, float64.

    With ``token``, of what stands before the drawn token: that included, and not. Otherwise of what
    the rule defers, by the cut in ``state``, and of what it keeps.
    """
    tiles = tiles_of(vocab)
    blocks = tl.cdiv(tiles, T)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    here = (tl.program_id(0) % blocks) * T + tl.arange(0, T)
    at = row * tiles + here
    top = row_max(tile_max, row, tiles)
    tile_top = tl.load(tile_max + at, mask=here < tiles, other=-INFINITY)
    base = tl.where(tile_top == -INFINITY, 0.0, tile_top)[:, None]
    first = row_pointer(data, outer_stride, inner_stride, inner, row)
    judge = row_pointer(judged, judged_outer, judged_inner, inner, row)
    if token is not None:
        v = tl.maximum(tl.load(token + row), 0)
        cut_x = tl.load(first + v).to(tl.float32)
    else:
        cut_x = tl.load(state + row * FIELDS + CUT_X).to(tl.float32)
        v = tl.load(state + row * FIELDS + CUT_ID).to(tl.int64)
    begin = here[:, None] * TILE + tl.arange(0, LANES)[None, :]
    one = tl.zeros((T, LANES), tl.float32)
    two = one
    for g in range(groups_of(vocab)):
        j = begin + g * LANES
        x = tl.load(first + j, mask=j < vocab, other=-INFINITY).to(tl.float32)
        weight = exp((x - base) * inverse)
        if token is not None:
            one = one + tl.where(admits(cut_x, v + 1, x, j), weight, 0.0)
            two = two + tl.where(admits(cut_x, v, x, j), weight, 0.0)
        else:
            y = tl.load(judge + j, mask=j < vocab, other=-INFINITY).to(tl.float32)
            deferred = flipped(admits(cut_x, v, y, j), UPPER)
            one = one + tl.where(deferred, weight, 0.0)
            two = two + tl.where(deferred, 0.0, weight)
    scale = exp((tile_top - top) * inverse).to(tl.float64)
    tl.store(inside + at, fold(one, T).to(tl.float64) * scale, mask=here < tiles)
    tl.store(outside + at, fold(two, T).to(tl.float64) * scale, mask=here < tiles)


@jit
def mass_rows(state, vocab, tile_max, tile_sum, inside, outside, inverse, total):
    """The deferred and the kept mass of each row, into ``state`` or, the first, into ``total``."""
    row = tl.program_id(0).to(tl.int64)
    tiles = tiles_of(vocab)
    top = row_max(tile_max, row, tiles)
    here = state + row * FIELDS
    fraction = tl.load(here + FRACTION)
    part = fraction * canonical_weight(
        tile_max, row, tiles, top, inverse, tl.load(here + CRITICAL_X), tl.load(here + CRITICAL)
    )
    deferred = mass_sum(inside, row, tiles)
    kept = mass_sum(outside, row, tiles)
    deferred = tl.where(fraction > 0.0, deferred + part, deferred)
    kept = tl.where(fraction > 0.0, kept - part, kept)
    z = row_sum(tile_max, tile_sum, row, tiles, top, inverse)
    valid = tl.load(here + VALID) != 0.0
    mass = tl.where(valid, deferred / z, float("nan"))
    if total is not None:
        tl.store(total + row, mass)
    else:
        tl.store(here + MASS, mass)
        tl.store(here + KEPT, kept / z)


class Resolved(NamedTuple):
    """A rule resolved over rows: what :func:`resolve` found, and where to read the rows."""

    base: Rows
    proxy: Rows | None
    judged: Rows
    base_stats: Stats
    proxy_stats: Stats | None
    state: Tensor
    rule: RuleArguments

    @property
    def inverse(self) -> float:
        return factor(self.rule.temperature)

    def sums(self, total: Tensor | None = None, at_rule: bool = False) -> None:
        """The deferred mass (and the kept one), at the temperature of sampling or of the rule."""
        x, s = self.base, self.base_stats
        inverse = factor(self.rule.rule_temperature) if at_rule else self.inverse
        inside, outside = (scratch(x.data, x.rows, x.tiles) for _ in range(2))
        launch(
            masked_sums, lambda sizes: x.rows * -(-x.tiles // sizes["T"]), x.data, *x,
            *self.judged[:3], self.state, None, s.tile_max, inverse, inside, outside, x.work,
            UPPER=is_upper(self.rule.code),
        )  # fmt: skip
        launch(
            mass_rows, x.rows, x.data, self.state, x.vocab, s.tile_max,
            s.rule_sum if at_rule else s.tile_sum, inside, outside, inverse, total,
        )  # fmt: skip


def resolved(base_logits: Tensor, proxy_logits: Tensor | None, rule: RuleArguments,
             reads_proxy: bool = False, both: bool = True) -> Resolved:  # fmt: skip
    """Statistics of the rows that are read, and the rule as a cut."""
    rule = plain(base_logits, proxy_logits, rule)
    base = Rows.of(base_logits, base_logits.shape[1])
    inverses = factor(rule.temperature), factor(rule.rule_temperature)
    base_stats, proxy, proxy_stats = stats(base, *inverses), None, None
    if proxy_logits is not None and (reads_proxy or rule.code in rules.NEEDS_PROXY):
        proxy = Rows.of(proxy_logits, base_logits.shape[1])
        proxy_stats = stats(proxy, *inverses)
    state = resolve(base, base_stats, proxy, proxy_stats, rule, both)
    judged = proxy if judges_proxy(rule.code) and proxy is not None else base
    return Resolved(base, proxy, judged, base_stats, proxy_stats, state, rule)


@triton.jit
def deferral_of(state, row, v, x):
    """Of one token or many, whose judging logit is x: are they inside the cut, is one the split
    critical item, and how much of that is deferred.
    """
    here = state + row * FIELDS
    inside = admits(tl.load(here + CUT_X).to(tl.float32), tl.load(here + CUT_ID).to(tl.int64), x, v)
    fraction = tl.load(here + FRACTION)
    item = tl.where(fraction > 0.0, tl.load(here + CRITICAL), -1.0)
    return inside, v == item.to(tl.int64), fraction


@triton.jit
def policy(state, row, v, base, proxy, inverse, UPPER: tl.constexpr, BY_PROXY: tl.constexpr):
    """pi(v) = (1 - mu(v)) p(v) + q(v) D: p and q in float32, the sum in float64, rounded once."""
    here = state + row * FIELDS
    p = probability(base, tl.load(here + TOP).to(tl.float32), inverse, tl.load(here + Z))
    top, z = tl.load(here + PROXY_MAX).to(tl.float32), tl.load(here + PROXY_Z)
    moved = probability(proxy, top, inverse, z).to(tl.float64) * tl.load(here + MASS)
    if BY_PROXY:
        deferred, at_split, fraction = deferral_of(state, row, v, proxy)
    else:
        deferred, at_split, fraction = deferral_of(state, row, v, base)
    kept = tl.where(flipped(deferred, UPPER), 0.0, p.to(tl.float64))
    part = (1.0 - fraction) * p.to(tl.float64)
    kept = tl.where(at_split, part, kept)
    return (kept + moved).to(tl.float32)


@jit
def policy_tiles(data, outer_stride, inner_stride, inner, limit, vocab,
                 proxy, proxy_outer, proxy_inner, state, inverse, out, best, best_id,
                 UPPER: tl.constexpr, BY_PROXY: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """pi written out or, where ``best`` is given, its maximum and that one's lowest id a block."""
    blocks = tl.cdiv(vocab, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    j = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = j < vocab
    base = row_pointer(data, outer_stride, inner_stride, inner, row)
    other = row_pointer(proxy, proxy_outer, proxy_inner, inner, row)
    x = tl.load(base + j, mask=inside, other=-INFINITY).to(tl.float32)
    end = tl.where(row % inner < limit, vocab, 0)
    y = tl.load(other + j, mask=j < end, other=-INFINITY).to(tl.float32)
    pi = policy(state, row, j, x, y, inverse, UPPER, BY_PROXY)
    if best is not None:
        pi = tl.where(inside, pi, -1.0)
        top = tl.max(pi, 0)
        tl.store(best + tl.program_id(0), top)
        tl.store(best_id + tl.program_id(0), tl.min(tl.where(pi == top, j, vocab - 1), 0))
    else:
        valid = tl.load(state + row * FIELDS + VALID) != 0.0
        tl.store(out + row * vocab + j, tl.where(valid, pi, float("nan")), mask=inside)


@triton.jit
def best_of_row(best, best_id, row, blocks, BLOCKS: tl.constexpr):
    """The lowest id of the largest value; a valid token id even where all are NaN."""
    t = tl.arange(0, BLOCKS)
    value = tl.load(best + row * blocks + t, mask=t < blocks, other=-1.0)
    lowest = tl.load(best_id + row * blocks + t, mask=t < blocks, other=2**30)
    top = tl.max(value, 0)
    found = tl.min(tl.where(value == top, lowest, 2**30), 0)
    return tl.where(found < 2**30, found, 0).to(tl.int64)


def policy_best(r: Resolved) -> tuple[Tensor, Tensor]:
    """The largest pi of each block, and its token."""
    assert r.proxy is not None
    blocks = -(-r.base.vocab // BLOCK_SIZE)
    best = scratch(r.base.data, r.base.rows, blocks, dtype=torch.float32)
    best_id = torch.empty_like(best, dtype=torch.int32)
    write_policy(r, None, best, best_id)
    return best, best_id


def write_policy(r: Resolved, out: Any, best: Any = None, best_id: Any = None) -> None:
    assert r.proxy is not None
    x = r.base._replace(limit=r.proxy.limit)
    launch(
        policy_tiles, x.rows * -(-x.vocab // BLOCK_SIZE), x.data, *x, *r.proxy[:3], r.state,
        r.inverse, out, best, best_id, UPPER=is_upper(r.rule.code),
        BY_PROXY=judges_proxy(r.rule.code), BLOCK=BLOCK_SIZE,
    )  # fmt: skip


@jit
def kept_tiles(data, outer_stride, inner_stride, inner, limit, vocab, state, first_x, first_id,
               second_x, BLOCK: tl.constexpr):  # fmt: skip
    """The two largest logits of a block that a rule over p keeps whole, and the first one's id."""
    blocks = tl.cdiv(vocab, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    j = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    base = row_pointer(data, outer_stride, inner_stride, inner, row)
    x = tl.load(base + j, mask=j < vocab, other=-INFINITY).to(tl.float32)
    deferred, at_split, _ = deferral_of(state, row, j, x)
    x = tl.where(deferred | at_split, -INFINITY, x)
    top = tl.max(x, 0)
    v = tl.min(tl.where(x == top, j, vocab), 0)
    tl.store(first_x + tl.program_id(0), top)
    tl.store(first_id + tl.program_id(0), v)
    tl.store(second_x + tl.program_id(0), tl.max(tl.where(j == v, -INFINITY, x), 0))


def kept_best(r: Resolved) -> tuple[Tensor, Tensor, Tensor]:
    """The two largest kept logits of each block, and the first one's token."""
    x = r.base
    blocks = -(-x.vocab // BLOCK_SIZE)
    first, second = (scratch(x.data, x.rows, blocks, dtype=torch.float32) for _ in range(2))
    first_id = torch.empty_like(first, dtype=torch.int32)
    launch(kept_tiles, x.rows * blocks, x.data, *x, r.state, first, first_id, second,
           BLOCK=BLOCK_SIZE)  # fmt: skip
    return first, first_id, second


@triton.jit
def greedy_row(base, vocab, state, row, tile_max, inverse, first_x, first_id, second_x, blocks,
               BLOCKS: tl.constexpr):  # fmt: skip
    """propose_greedy of cpu/rule.h: the most probable kept token, and whether q may change it."""
    here = state + row * FIELDS
    top, z, mass = tl.load(here + TOP).to(tl.float32), tl.load(here + Z), tl.load(here + MASS)
    t = tl.arange(0, BLOCKS)
    x = tl.load(first_x + row * blocks + t, mask=t < blocks, other=-INFINITY)
    v = tl.load(first_id + row * blocks + t, mask=t < blocks, other=0)
    x2 = tl.load(second_x + row * blocks + t, mask=t < blocks, other=-INFINITY)
    best = tl.max(x, 0)
    where = tl.min(tl.where(x == best, t, BLOCKS - 1), 0)
    token = tl.max(tl.where(t == where, v, 0), 0).to(tl.int64)
    next_ = tl.maximum(tl.max(tl.where(t == where, -INFINITY, x), 0), tl.max(x2, 0))
    some = best > -INFINITY
    one = tl.where(some, probability(best, top, inverse, z), 0.0)
    two = tl.where(next_ > -INFINITY, probability(next_, top, inverse, z).to(tl.float64), 0.0)
    fraction, item = tl.load(here + FRACTION), tl.load(here + CRITICAL).to(tl.int64)
    item_x = tl.load(here + CRITICAL_X).to(tl.float32)
    part = (1.0 - fraction) * probability(item_x, top, inverse, z).to(tl.float64)
    splits = fraction > 0.0
    two = tl.where(splits & some & (part > two), part, two)
    one = tl.where(splits & (some == 0), part.to(tl.float32), one)
    token = tl.where(splits & (some == 0), item, token)
    some = some | splits
    ahead = (two + mass).to(tl.float32) < one
    needs = (some == 0) | ((mass > 0.0) & (ahead == 0))
    fallback = first_of_value(base, vocab, tile_max, row, tiles_of(vocab), top)
    return tl.where(some, token, fallback), needs
