"""A rule resolved to a cut: all tokens before a logit and id are deferred (or all after it).

The rules that test a probability cut where the probability crosses their threshold, found by
bisection over the floats. The knapsack cuts at its critical item, the first whose canonical mass
exceeds the budget. Its search sorts nothing: each launch adds up the mass below sixteen logits at
once and keeps one of sixteen parts of what is left, 8 launches for float32, 5 for float16, 4 for
bfloat16; two more find the id among equal logits. Every sum is the canonical one, so the item is
the one that the definition gives.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tta_ext import rules
from tta_ext.backends.reference._common import softmax
from tta_ext.backends.reference.deferral import best, total_variation
from tta_ext.backends.triton.launch import Rows, factor, jit, launch, per_row, scratch
from tta_ext.backends.triton.numerics import (
    INFINITY,
    LANES,
    MAX_TILES,
    NO_LIMIT,
    TILE,
    double,
    exp,
    fold,
    from_ordered_bits,
    ordered_bits,
)
from tta_ext.backends.triton.rows import (
    Stats,
    groups_of,
    probability,
    row_max,
    row_pointer,
    row_sum,
    tile_scale,
    tiles_of,
)

# What is known about a row between launches, a float64 a field (token ids are exact in it).
FIELDS = tl.constexpr(16)
TOP, Z, RULE_Z = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
PROXY_MAX, PROXY_Z = tl.constexpr(3), tl.constexpr(4)
CUT_X, CUT_ID = tl.constexpr(5), tl.constexpr(6)  # deferred: what stands before (or not before)
CRITICAL, CRITICAL_X, FRACTION = tl.constexpr(7), tl.constexpr(8), tl.constexpr(9)
MASS, KEPT = tl.constexpr(10), tl.constexpr(11)
VALID = tl.constexpr(12)  # 1, or 0 where a row that was read has no law or the parameter is none
BOUND = tl.constexpr(13)  # the knapsack's capacity in units of the row's weights
PROXY_VALID = tl.constexpr(14)  # for rows of which the rule does not read the proxy

KNAPSACK, CONFIDENCE_BET = tl.constexpr(rules.KNAPSACK), tl.constexpr(rules.CONFIDENCE_BET)
THRESHOLD, NUDGING = tl.constexpr(rules.THRESHOLD), tl.constexpr(rules.NUDGING)
RELATIVE, ARGMAX = tl.constexpr(rules.RELATIVE), tl.constexpr(rules.ARGMAX)
PROXY_BELOW, PROXY_ABOVE = tl.constexpr(rules.PROXY_BELOW), tl.constexpr(rules.PROXY_ABOVE)
RELATIVE_RATIO = tl.constexpr(rules.RELATIVE_RATIO)
INCLUDE, SPLIT = tl.constexpr(rules.INCLUDE), tl.constexpr(rules.SPLIT)


class RuleArguments(NamedTuple):
    """The arguments of schemas.RULE."""

    param: Tensor
    code: int
    critical: int
    temperature: float
    rule_temperature: float

    def per_row(self) -> tuple[Any, int]:
        return per_row(self.param)


def plain(base: Tensor, proxy: Tensor | None, rule: RuleArguments) -> RuleArguments:
    """``optimal`` as the ``nudging`` that it is, by a number for each row: max q - a TV."""
    if rule.code != rules.OPTIMAL or proxy is None:
        return rule
    p, q = (softmax(x, rule.rule_temperature, torch.float32) for x in (base, proxy))
    param = rule.param if rule.param.dim() == base.dim() - 1 else rule.param.unsqueeze(-1)
    limit = best(q) - param.unsqueeze(-1) * total_variation(p, q)
    return rule._replace(code=rules.NUDGING, param=limit.squeeze(-1))


@triton.constexpr_function
def loads_proxy(rule):
    return rule in rules.NEEDS_PROXY


@triton.constexpr_function
def judges_proxy(rule):
    """Whether the rule tests q's probabilities, not p's."""
    return rule in (rules.PROXY_BELOW, rules.PROXY_ABOVE)


@triton.constexpr_function
def is_upper(rule):
    """Whether it defers what is above its threshold."""
    return rule == rules.PROXY_ABOVE


@triton.jit
def valid_param(value, RULE: tl.constexpr):
    valid = value == value
    if RULE == KNAPSACK:
        valid = value >= 0.0
    return valid


@triton.jit
def rule_threshold(param, z, proxy_z, RULE: tl.constexpr):
    """The probability that decides, as core/rules.h has it."""
    max_p = (1.0 / z).to(tl.float32).to(tl.float64)
    max_q = (1.0 / proxy_z).to(tl.float32).to(tl.float64)
    if RULE == THRESHOLD:
        threshold = param
    elif RULE == CONFIDENCE_BET:
        threshold = max_q - param
    elif RULE == NUDGING:
        threshold = tl.where(max_p < param, INFINITY, -INFINITY).to(tl.float64)
    elif RULE == RELATIVE:
        threshold = max_p - param
    elif RULE == RELATIVE_RATIO:
        threshold = max_p * (1.0 - param)
    elif RULE == ARGMAX:
        threshold = max_p
    else:
        threshold = max_p + param
    return threshold


@triton.jit
def canonical_weight(tile_max, row, tiles, top, inverse, x, v):
    """A token's weight as the canonical sum counts it, float64."""
    at = row * tiles + tl.maximum(v.to(tl.int64), 0) // TILE
    weight = exp((x.to(tl.float32) - tl.load(tile_max + at)) * inverse)
    return weight.to(tl.float64) * tile_scale(tile_max, at, top, inverse)


@triton.jit
def split_fraction(bound, before, weight):
    """How much of the critical item fills the capacity: float32, and used as such."""
    part = (bound - before) / weight
    part = tl.where(part < 0.0, 0.0, tl.where(part > 1.0, 1.0, part))
    return part.to(tl.float32).to(tl.float64)


@triton.jit
def below_probability(top, inverse, z, threshold, OR_EQUAL: tl.constexpr):
    """{v : p(v) < t} (or <= t) as a cut: 256 floats are tried at once, four times."""
    low = ordered_bits(tl.full((), -INFINITY, tl.float32))
    high = ordered_bits(top)
    i = tl.arange(0, 256).to(tl.int64)
    for k in tl.static_range(4):
        step = 1 << (24 - 8 * k)
        probe = low + (i + 1) * step
        p = probability(from_ordered_bits(tl.minimum(probe, high)), top, inverse, z).to(tl.float64)
        if OR_EQUAL:
            inside = (p <= threshold) & (probe < high)
        else:
            inside = (p < threshold) & (probe < high)
        low = low + tl.sum(inside.to(tl.int64), 0) * step
    at_low = probability(tl.full((), -INFINITY, tl.float32), top, inverse, z).to(tl.float64)
    at_top = probability(top, top, inverse, z).to(tl.float64)
    if OR_EQUAL:
        none, every = at_low > threshold, at_top <= threshold
    else:
        none, every = at_low >= threshold, at_top < threshold
    cut = tl.where(none, -INFINITY, from_ordered_bits(low))
    cut = tl.where(every, INFINITY, cut)
    limit = tl.where(none & (every == 0), 0.0, NO_LIMIT).to(tl.float64)
    return cut.to(tl.float64), limit


@jit
def resolve_rows(vocab, inner, tile_max, tile_sum, rule_sum, proxy_tile_max, proxy_tile_sum,
                 proxy_rule_sum, param, param_outer, param_inner, inverse, rule_inverse, state,
                 RULE: tl.constexpr, BOTH: tl.constexpr):  # fmt: skip
    """Sums, validity, and the cut of every rule but the knapsack."""
    row = tl.program_id(0).to(tl.int64)
    tiles = tiles_of(vocab)
    here = state + row * FIELDS
    top = row_max(tile_max, row, tiles)
    z = row_sum(tile_max, tile_sum, row, tiles, top, inverse)
    rule_z = row_sum(tile_max, rule_sum, row, tiles, top, rule_inverse)
    value = double(param, (row // inner) * param_outer + (row % inner) * param_inner)
    valid = (z == z) & valid_param(value, RULE)
    proxy_top, proxy_z, proxy_rule_z = top, z, rule_z
    if proxy_tile_max is not None:
        proxy_top = row_max(proxy_tile_max, row, tiles)
        proxy_z = row_sum(proxy_tile_max, proxy_tile_sum, row, tiles, proxy_top, inverse)
        proxy_rule_z = row_sum(proxy_tile_max, proxy_rule_sum, row, tiles, proxy_top, rule_inverse)
    if BOTH:
        valid = valid & (proxy_z == proxy_z)
    tl.store(here + TOP, top.to(tl.float64))
    tl.store(here + Z, z)
    tl.store(here + RULE_Z, rule_z)
    tl.store(here + PROXY_MAX, proxy_top.to(tl.float64))
    tl.store(here + PROXY_Z, proxy_z)
    tl.store(here + VALID, valid.to(tl.float64))
    tl.store(here + PROXY_VALID, (proxy_z == proxy_z).to(tl.float64))
    tl.store(here + BOUND, value * rule_z)
    tl.store(here + FRACTION, z * 0.0)
    tl.store(here + CRITICAL, (row * 0 - 1).to(tl.float64))
    tl.store(here + CRITICAL_X, tl.full((), INFINITY, tl.float64))
    if RULE != KNAPSACK:
        threshold = rule_threshold(value, rule_z, proxy_rule_z, RULE)
        if judges_proxy(RULE):
            cut, limit = below_probability(
                proxy_top, rule_inverse, proxy_rule_z, threshold, is_upper(RULE)
            )
        else:
            cut, limit = below_probability(top, rule_inverse, rule_z, threshold, False)
        tl.store(here + CUT_X, cut)
        tl.store(here + CUT_ID, limit)


# ---- the knapsack --------------------------------------------------------------------------------

PROBES = tl.constexpr(16)


@triton.jit
def coarse(x, SHIFT: tl.constexpr):
    """The number of a logit among those that its dtype can hold, by order; int64."""
    return ordered_bits(x) >> SHIFT


@triton.jit
def from_coarse(k, SHIFT: tl.constexpr):
    return from_ordered_bits((k << SHIFT) | tl.where(k < 0, (1 << SHIFT) - 1, 0))


@triton.jit
def within_budget(mass, row, tiles, bound):
    """How many of sixteen sums, which grow, are within the budget."""
    i = tl.arange(0, PROBES)
    total = tl.zeros((PROBES,), tl.float64)
    for t in range(tiles):
        total = total + tl.load(mass + (row * tiles + t) * PROBES + i)
    return tl.sum((total <= bound).to(tl.int64), 0)


@jit
def cut_pass(data, outer_stride, inner_stride, inner, limit, vocab, tile_max, state, inverse,
             level, step, offset, previous_step, low, previous_mass, mass,
             PASSES: tl.constexpr, SHIFT: tl.constexpr):  # fmt: skip
    """One pass of the search: the masses of a tile at or below sixteen logits.

    It first concludes the pass before: ``low[:, level]`` is the largest number known to be within
    the budget. Its successors ``step`` apart are tried; in the last pass (``offset`` 0) it itself
    and the number after it, which is the critical item's logit.
    """
    tiles = tiles_of(vocab)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    t = tl.program_id(0) % tiles
    at_level = low + row * (PASSES + 1) + level
    if previous_mass is None:
        start = coarse(tl.full((), -INFINITY, tl.float32), SHIFT) - 1
    else:
        bound = tl.load(state + row * FIELDS + BOUND)
        start = tl.load(at_level - 1)
        start += within_budget(previous_mass, row, tiles, bound) * previous_step
    if t == 0:
        tl.store(at_level, start)
    number = start + (tl.arange(0, PROBES).to(tl.int64) + offset) * step
    probe = from_coarse(tl.minimum(number, coarse(tl.full((), INFINITY, tl.float32), SHIFT)), SHIFT)
    at = row * tiles + t
    tile_top = tl.load(tile_max + at)
    base = tl.where(tile_top == -INFINITY, 0.0, tile_top)
    first = row_pointer(data, outer_stride, inner_stride, inner, row)
    lanes = tl.zeros((PROBES, LANES), tl.float32)
    for g in range(groups_of(vocab)):
        j = t * TILE + g * LANES + tl.arange(0, LANES)
        x = tl.load(first + j, mask=j < vocab, other=-INFINITY).to(tl.float32)
        weight = exp((x - base) * inverse)
        lanes = lanes + tl.where(x[None, :] <= probe[:, None], weight[None, :], 0.0)
    scale = tile_scale(tile_max, at, row_max(tile_max, row, tiles), inverse)
    tl.store(mass + at * PROBES + tl.arange(0, PROBES), fold(lanes, PROBES).to(tl.float64) * scale)


@triton.jit
def masses_before(first, vocab, t, tile_top, inverse, cut_x, cut_id):
    """The masses of tile t before sixteen cuts at one logit, relative to the tile's maximum."""
    lanes = tl.zeros((PROBES, LANES), tl.float32)
    for g in range(groups_of(vocab)):
        j = t * TILE + g * LANES + tl.arange(0, LANES)
        x = tl.load(first + j, mask=j < vocab, other=-INFINITY).to(tl.float32)
        weight = exp((x - tile_top) * inverse)
        before = (x < cut_x)[None, :] | ((x == cut_x)[None, :] & (j[None, :] < cut_id[:, None]))
        lanes = lanes + tl.where(before, weight[None, :], 0.0)
    return fold(lanes, PROBES)


@jit
def cut_rows(data, outer_stride, inner_stride, inner, limit, vocab, tile_max, state, inverse,
             low, mass, PASSES: tl.constexpr, SHIFT: tl.constexpr, MODE: tl.constexpr):  # fmt: skip
    """The critical item among the tokens of its logit, and the cut that follows from it."""
    row = tl.program_id(0).to(tl.int64)
    tiles = tiles_of(vocab)
    here = state + row * FIELDS
    bound = tl.load(here + BOUND)
    first = row_pointer(data, outer_stride, inner_stride, inner, row)
    top = row_max(tile_max, row, tiles)
    exists = tl.load(here + RULE_Z) > bound
    cut_x = from_coarse(tl.load(low + row * (PASSES + 1) + PASSES) + 1, SHIFT)

    # The first tile whose tokens of this logit, with all before them, exceed the budget.
    c = tl.arange(0, MAX_TILES)
    total = tl.zeros((MAX_TILES,), tl.float64)
    for t in range(tiles):
        at = mass + (row * tiles + t) * PROBES
        total = total + tl.where(c >= t, tl.load(at + 1), tl.load(at))
    tile = tl.min(tl.where(total > bound, c, tiles - 1), 0)
    tile = tl.minimum(tile, tiles - 1)
    head = tl.zeros((), tl.float64)
    for t in range(tile):
        head = head + tl.load(mass + (row * tiles + t) * PROBES + 1)

    # Inside it, the longest prefix of ids that is within.
    tile_top = tl.load(tile_max + row * tiles + tile)
    scale = tile_scale(tile_max, row * tiles + tile, top, inverse)
    i = tl.arange(0, PROBES)
    kept = tile * TILE
    before = head
    for k in tl.static_range(4):
        if k < 3:
            ids = kept + (i + 1) * (256 >> (4 * k))
        else:
            ids = kept + i * 0
        part = masses_before(first, vocab, tile, tile_top, inverse, cut_x, ids)
        sums = head + part.to(tl.float64) * scale
        for t in range(tile + 1, tiles):
            sums = sums + tl.load(mass + (row * tiles + t) * PROBES)
        if k < 3:
            kept += tl.sum((sums <= bound).to(tl.int32), 0) * (256 >> (4 * k))
        else:
            before = tl.max(sums, 0)  # all sixteen are the same
    item = tl.where(exists, kept, -1).to(tl.int64)
    item = tl.where(item < vocab, item, -1)  # of an invalid row alone
    x = tl.load(first + tl.maximum(item, 0)).to(tl.float32)
    fraction = tl.zeros((), tl.float64)
    if MODE == SPLIT:
        weight = canonical_weight(tile_max, row, tiles, top, inverse, x, item)
        fraction = tl.where(item >= 0, split_fraction(bound, before, weight), 0.0)
    end = item
    if MODE == INCLUDE:
        end = item + 1
    tl.store(here + CUT_X, tl.where(item >= 0, x, INFINITY).to(tl.float64))
    tl.store(here + CUT_ID, tl.where(item >= 0, end.to(tl.float64), NO_LIMIT))
    tl.store(here + CRITICAL, item.to(tl.float64))
    tl.store(here + CRITICAL_X, tl.where(item >= 0, x, INFINITY).to(tl.float64))
    tl.store(here + FRACTION, fraction)


# The low bits that are the same in all logits of a dtype, widened to float32.
_SHIFT = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}


def _knapsack(x: Rows, s: Stats, state: Tensor, rule: RuleArguments) -> None:
    inverse, shift = factor(rule.rule_temperature), _SHIFT[x.data.dtype]
    passes = -(-(32 - shift) // 4)
    low = scratch(x.data, x.rows, passes + 1, dtype=torch.int64)
    masses = scratch(x.data, 2, x.rows, x.tiles, PROBES.value)
    for level in range(passes + 1):
        step, last = 16 ** max(passes - 1 - level, 0), level == passes
        launch(
            cut_pass, x.rows * x.tiles, x.data, *x, s.tile_max, state, inverse, level, step,
            int(not last), 1 if last else 16 * step, low, masses[1 - level % 2] if level else None,
            masses[level % 2], PASSES=passes, SHIFT=shift,
        )  # fmt: skip
    launch(
        cut_rows, x.rows, x.data, *x, s.tile_max, state, inverse, low, masses[passes % 2],
        PASSES=passes, SHIFT=shift, MODE=rule.critical,
    )  # fmt: skip


def resolve(base: Rows, base_stats: Stats, proxy: Rows | None, proxy_stats: Stats | None,
            rule: RuleArguments, both: bool = True) -> Tensor:  # fmt: skip
    """What is known about each row, float64 ``[rows, 16]``, the cut included.

    A row is valid where its base is and, with ``both``, the proxy where that is given.
    """
    state = scratch(base.data, base.rows, FIELDS.value)
    param, _ = rule.per_row()
    count, batch = rule.param.numel(), base.data.shape[0]
    each = count not in (1, batch)
    strides = (base.inner, 1) if each else (int(count != 1), 0)
    launch(
        resolve_rows, base.rows, base.data, base.vocab, base.inner, *base_stats,
        *(proxy_stats or (None, None, None)), param, *strides, factor(rule.temperature),
        factor(rule.rule_temperature), state, RULE=rule.code,
        BOTH=both,
    )  # fmt: skip
    if rule.code == rules.KNAPSACK:
        _knapsack(base, base_stats, state, rule)
    return state
