"""Deferral rules: mask, policy, statistics, and the token that a step emits.

Sampling judges the one token drawn: statistics, draw, verdict, and for the knapsack one masked sum
between them. What needs the whole set first resolves the rule to a cut (:mod:`cut`): mask, policy,
statistics, greedy choices.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tta_ext import rng, rules
from tta_ext.backends import reference
from tta_ext.backends.reference._common import KeyArguments
from tta_ext.backends.triton.cut import (
    CRITICAL,
    CRITICAL_X,
    CUT_ID,
    CUT_X,
    FIELDS,
    FRACTION,
    INCLUDE,
    KEPT,
    KNAPSACK,
    MASS,
    PROXY_MAX,
    PROXY_Z,
    SPLIT,
    TOP,
    VALID,
    RuleArguments,
    Z,
    canonical_weight,
    is_upper,
    judges_proxy,
    loads_proxy,
    resolve,
    rule_threshold,
    split_fraction,
    valid_param,
)
from tta_ext.backends.triton.launch import Rows, complain, factor, jit, launch, scratch, tuned
from tta_ext.backends.triton.numerics import (
    INFINITY,
    LANES,
    TILE,
    admits,
    double,
    exp,
    fold,
    integer,
    uniform,
    word3,
)
from tta_ext.backends.triton.rows import (
    Key,
    Stats,
    first_of_value,
    groups_of,
    mass_sum,
    probability,
    row_max,
    row_pointer,
    row_sum,
    sample,
    stats,
    tiles_of,
)

SPLIT_TAG = tl.constexpr(rng.SPLIT)


@triton.jit
def flipped(inside, UPPER: tl.constexpr):
    """Whether a rule defers what its cut has inside or, for an upper rule, outside."""
    if UPPER:
        return inside == 0
    return inside


# ---- masked sums ---------------------------------------------------------------------------------


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
    base = Rows.of(base_logits, base_logits.shape[1])
    inverses = factor(rule.temperature), factor(rule.rule_temperature)
    base_stats, proxy, proxy_stats = stats(base, *inverses), None, None
    if proxy_logits is not None and (reads_proxy or rule.code in rules.NEEDS_PROXY):
        proxy = Rows.of(proxy_logits, base_logits.shape[1])
        proxy_stats = stats(proxy, *inverses)
    state = resolve(base, base_stats, proxy, proxy_stats, rule, both)
    judged = proxy if judges_proxy(rule.code) and proxy is not None else base
    return Resolved(base, proxy, judged, base_stats, proxy_stats, state, rule)


# ---- mask, policy, statistics --------------------------------------------------------------------


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


@jit
def mask_tiles(judged, outer_stride, inner_stride, inner, limit, vocab, state, mask, critical,
               fraction, UPPER: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    blocks = tl.cdiv(vocab, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    j = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    first = row_pointer(judged, outer_stride, inner_stride, inner, row)
    x = tl.load(first + j, mask=j < vocab, other=-INFINITY).to(tl.float32)
    deferred, _, part = deferral_of(state, row, j, x)
    valid = tl.load(state + row * FIELDS + VALID) != 0.0
    tl.store(
        mask + row * vocab + j, tl.where(valid, flipped(deferred, UPPER), False), mask=j < vocab
    )
    if tl.program_id(0) % blocks == 0:
        item = tl.load(state + row * FIELDS + CRITICAL).to(tl.int64)
        share = part.to(tl.float32)
        if MODE == INCLUDE:
            share = tl.where(item >= 0, 1.0, 0.0)
        tl.store(critical + row, tl.where(valid, item, -2))
        tl.store(fraction + row, tl.where(valid, share, float("nan")))


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


@jit
def lowest_kept(data, outer_stride, inner_stride, inner, limit, vocab, judged, judged_outer,
                judged_inner, state, out, UPPER: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The smallest logit that a row keeps; +inf where it keeps none."""
    row = tl.program_id(0).to(tl.int64)
    base = row_pointer(data, outer_stride, inner_stride, inner, row)
    judge = row_pointer(judged, judged_outer, judged_inner, inner, row)
    low = tl.full((BLOCK,), INFINITY, tl.float32)
    for begin in range(0, vocab, BLOCK):
        j = begin + tl.arange(0, BLOCK)
        x = tl.load(base + j, mask=j < vocab, other=INFINITY).to(tl.float32)
        y = tl.load(judge + j, mask=j < vocab, other=INFINITY).to(tl.float32)
        deferred, _, _ = deferral_of(state, row, j, y)
        keeps = (flipped(deferred, UPPER) == 0) & (j < vocab)
        low = tl.where(keeps & (x < low), x, low)
    valid = tl.load(state + row * FIELDS + VALID) != 0.0
    least = (0.0 - tl.min(low, 0)) * -1.0  # of 0, -0: as the CPU has it
    tl.store(out + row, tl.where(valid, least, float("nan")))


_BLOCK = 2048


def policy_best(r: Resolved) -> tuple[Tensor, Tensor]:
    """The largest pi of each block, and its token."""
    assert r.proxy is not None
    blocks = -(-r.base.vocab // _BLOCK)
    best = scratch(r.base.data, r.base.rows, blocks, dtype=torch.float32)
    best_id = torch.empty_like(best, dtype=torch.int32)
    write_policy(r, None, best, best_id)
    return best, best_id


def write_policy(r: Resolved, out: Any, best: Any = None, best_id: Any = None) -> None:
    assert r.proxy is not None
    x = r.base._replace(limit=r.proxy.limit)
    launch(
        policy_tiles, x.rows * -(-x.vocab // _BLOCK), x.data, *x, *r.proxy[:3], r.state, r.inverse,
        out, best, best_id, UPPER=is_upper(r.rule.code), BY_PROXY=judges_proxy(r.rule.code),
        BLOCK=_BLOCK,
    )  # fmt: skip


def deferral_mask(base_logits: Tensor, proxy_logits: Tensor | None, *rest: Any, mask: Tensor,
                  critical_index: Tensor, fraction: Tensor) -> None:  # fmt: skip
    *given, check = rest
    r = resolved(base_logits, proxy_logits, RuleArguments(*given))
    x = r.judged
    launch(
        mask_tiles, x.rows * -(-x.vocab // _BLOCK), x.data, *x, r.state, mask, critical_index,
        fraction, UPPER=is_upper(r.rule.code), MODE=r.rule.critical, BLOCK=_BLOCK,
    )  # fmt: skip
    complain(check, critical_index == -2,
             lambda: reference.deferral_mask(base_logits, proxy_logits, *rest))  # fmt: skip


def deferral_probs(base_logits: Tensor, proxy_logits: Tensor, *rest: Any, out: Tensor) -> None:
    *given, check = rest
    r = resolved(base_logits, proxy_logits, RuleArguments(*given), reads_proxy=True)
    r.sums()
    write_policy(r, out)
    complain(check, r.state[:, VALID.value] == 0,
             lambda: reference.deferral_probs(base_logits, proxy_logits, *rest))  # fmt: skip


def deferral_stats(base_logits: Tensor, proxy_logits: Tensor | None, *rest: Any,
                   deferred_mass: Tensor, critical_index: Tensor, cut_logit: Tensor,
                   used: Tensor) -> None:  # fmt: skip
    *given, check = rest
    r = resolved(base_logits, proxy_logits, RuleArguments(*given))
    r.sums(deferred_mass)
    if r.inverse == factor(r.rule.rule_temperature):
        used.copy_(deferred_mass)
    else:
        r.sums(used, at_rule=True)
    invalid = r.state[:, VALID.value] == 0
    critical_index.copy_(torch.where(invalid, -2, r.state[:, CRITICAL.value]))
    if r.rule.code == rules.KNAPSACK:
        cut_logit.copy_(torch.where(invalid, torch.nan, r.state[:, CRITICAL_X.value]))
    else:
        launch(lowest_kept, r.base.rows, r.base.data, *r.base, *r.judged[:3], r.state, cut_logit,
               UPPER=is_upper(r.rule.code), BLOCK=_BLOCK)  # fmt: skip
    complain(check, invalid,
             lambda: reference.deferral_stats(base_logits, proxy_logits, *rest))  # fmt: skip


# ---- draws ---------------------------------------------------------------------------------------


@jit
def judge_rows(data, outer_stride, inner_stride, inner, limit, vocab,
               tile_max, rule_sum, proxy, proxy_stride, proxy_tile_max, proxy_rule_sum,
               through, before, param, param_stride, rule_inverse,
               seed, position, position_stride, sequence, sequence_stride, rollout, rollout_stride,
               iteration, token, deferred, RULE: tl.constexpr, MODE: tl.constexpr):  # fmt: skip
    """Whether the token drawn from p is deferred; -1 and no where the row has no law."""
    row = tl.program_id(0).to(tl.int64)
    tiles = tiles_of(vocab)
    v = tl.load(token + row)
    value = double(param, row * param_stride)
    valid = (v >= 0) & valid_param(value, RULE)
    v = tl.maximum(v, 0)
    x = tl.load(data + row * outer_stride + v).to(tl.float32)
    top = row_max(tile_max, row, tiles)
    z = row_sum(tile_max, rule_sum, row, tiles, top, rule_inverse)
    if RULE == KNAPSACK:
        bound = value * z
        within = mass_sum(through, row, tiles) <= bound
        if MODE == INCLUDE:
            within = mass_sum(before, row, tiles) <= bound
        if MODE == SPLIT:
            taken = mass_sum(before, row, tiles)
            weight = canonical_weight(tile_max, row, tiles, top, rule_inverse, x, v)
            coin = uniform(
                integer(seed, 0),
                row * 0,
                integer(position, row * position_stride),
                integer(sequence, row * sequence_stride),
                word3(SPLIT_TAG, iteration.to(tl.int64), integer(rollout, row * rollout_stride)),
            )
            part = coin < split_fraction(bound, taken, weight)
            within = within | ((taken <= bound) & part)
    else:
        if loads_proxy(RULE):
            proxy_top = row_max(proxy_tile_max, row, tiles)
            proxy_z = row_sum(proxy_tile_max, proxy_rule_sum, row, tiles, proxy_top, rule_inverse)
            valid = valid & (proxy_z == proxy_z)
            y = tl.load(proxy + row * proxy_stride + v).to(tl.float32)
        else:
            proxy_top, proxy_z, y = top, z, x
        threshold = rule_threshold(value, z, proxy_z, RULE)
        if judges_proxy(RULE):
            p = probability(y, proxy_top, rule_inverse, proxy_z).to(tl.float64)
        else:
            p = probability(x, top, rule_inverse, z).to(tl.float64)
        if is_upper(RULE):
            within = p > threshold
        else:
            within = p < threshold
    tl.store(token + row, tl.where(valid, v, -1))
    tl.store(deferred + row, within & valid)


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


@jit
def greedy_rows(data, outer_stride, inner_stride, inner, limit, vocab, judged, judged_stride,
                state, tile_max, inverse, first_x, first_id, second_x, best, best_id, blocks, token,
                deferred, UPPER: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    """The greedy token: of the base alone (propose), or, given ``best``, the argmax of pi."""
    row = tl.program_id(0).to(tl.int64)
    valid = tl.load(state + row * FIELDS + VALID) != 0.0
    if best is not None:
        v = best_of_row(best, best_id, row, blocks, BLOCKS)
        x = tl.load(judged + row * judged_stride + v).to(tl.float32)
        inside, _, _ = deferral_of(state, row, v, x)
        # A split item with the whole of its capacity left is deferred in full.
        _, at_split, fraction = deferral_of(state, row, v, x)
        flag = flipped(inside, UPPER) | (at_split & (fraction == 1.0))
    else:
        v, flag = greedy_row(data + row * outer_stride, vocab, state, row, tile_max, inverse,
                             first_x, first_id, second_x, blocks, BLOCKS)  # fmt: skip
    tl.store(token + row, tl.where(valid, v, -1))
    tl.store(deferred + row, flag & valid)


def kept_best(r: Resolved) -> tuple[Tensor, Tensor, Tensor]:
    """The two largest kept logits of each block, and the first one's token."""
    x = r.base
    blocks = -(-x.vocab // _BLOCK)
    first, second = (scratch(x.data, x.rows, blocks, dtype=torch.float32) for _ in range(2))
    first_id = torch.empty_like(first, dtype=torch.int32)
    launch(kept_tiles, x.rows * blocks, x.data, *x, r.state, first, first_id, second,
           BLOCK=_BLOCK)  # fmt: skip
    return first, first_id, second


def _greedy(base_logits: Tensor, proxy_logits: Tensor | None, rule: RuleArguments,
            token: Tensor, deferred: Tensor) -> None:  # fmt: skip
    r = resolved(base_logits, proxy_logits, rule, reads_proxy=True)
    r.sums()
    alone = proxy_logits is None
    kept = kept_best(r) if alone else (None, None, None)
    best = (None, None) if alone else policy_best(r)
    x, blocks = r.base, -(-r.base.vocab // _BLOCK)
    launch(
        greedy_rows, x.rows, x.data, *x, *r.judged[:2], r.state, r.base_stats.tile_max, r.inverse,
        *kept, *best, blocks, token, deferred, UPPER=is_upper(rule.code),
        BLOCKS=triton.next_power_of_2(blocks),
    )  # fmt: skip


def _sampled(base_logits: Tensor, proxy_logits: Tensor | None, rule: RuleArguments,
             key: Key, token: Tensor, deferred: Tensor) -> None:  # fmt: skip
    base = Rows.of(base_logits)
    inverse, rule_inverse = factor(rule.temperature), factor(rule.rule_temperature)
    s = stats(base, inverse, rule_inverse)
    sample(base, s, inverse, key, True, rng.BASE, 0, token)
    through = before = None
    if rule.code == rules.KNAPSACK:
        through, before = (scratch(base_logits, base.rows, base.tiles) for _ in range(2))
        launch(
            masked_sums, lambda sizes: base.rows * -(-base.tiles // sizes["T"]), base_logits, *base,
            *base[:3], None, token, s.tile_max, rule_inverse, through, before, base.work,
            UPPER=False,
        )  # fmt: skip
    early = rule.code in rules.NEEDS_PROXY
    proxy, q = None, None
    if proxy_logits is not None:
        proxy = Rows.of(proxy_logits)
        q = stats(proxy, inverse, rule_inverse) if early else None
    launch(
        judge_rows, base.rows, base_logits, *base, s.tile_max, s.rule_sum,
        *(proxy[:2] if proxy and early else (None, 0)), q.tile_max if q else None,
        q.rule_sum if q else None, through, before, *rule.per_row(), rule_inverse, *key, token,
        deferred, RULE=rule.code, MODE=rule.critical,
    )  # fmt: skip
    if proxy is not None:
        if q is None:
            q = stats(proxy, inverse, active=deferred)
        sample(proxy, q, inverse, key, True, rng.PROXY, 0, token, active=deferred)


def _choose(base_logits: Tensor, proxy_logits: Tensor | None, rest: tuple[Any, ...],
            token: Tensor, deferred: Tensor) -> None:  # fmt: skip
    rule, arguments, check = RuleArguments(*rest[:5]), KeyArguments(*rest[5:11]), rest[11]
    arguments.check(check)
    if arguments.do_sample:
        key = Key.of(*arguments[:5])
        _sampled(base_logits, proxy_logits, rule, key, token, deferred)
    else:
        _greedy(base_logits, proxy_logits, rule, token, deferred)


def deferral_propose(base_logits: Tensor, *rest: Any, token: Tensor, deferred: Tensor) -> None:
    _choose(base_logits, None, rest, token, deferred)
    complain(rest[-1], token < 0, lambda: reference.deferral_propose(base_logits, *rest))


def deferral_sample(base_logits: Tensor, proxy_logits: Tensor, *rest: Any, token: Tensor,
                    deferred: Tensor) -> None:  # fmt: skip
    _choose(base_logits, proxy_logits, rest, token, deferred)
    complain(rest[-1], token < 0,
             lambda: reference.deferral_sample(base_logits, proxy_logits, *rest))  # fmt: skip
