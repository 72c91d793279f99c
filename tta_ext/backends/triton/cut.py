"""A rule resolved to a cut: all tokens before a logit and id are deferred (or all after it).

The rules that test a probability cut where the probability crosses their threshold, found by
bisection over the floats. The knapsack cuts at its critical item, the first whose canonical mass
exceeds the budget. Its search sorts nothing: tokens are numbered by logit and id, each launch adds
up the mass at or below 32 numbers at once and keeps one of 32 parts of what is left. Every sum is
the canonical one, so the item is the one that the definition gives.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tta_ext import rules
from tta_ext.backends.reference._common import RuleArguments, inverse_temperature
from tta_ext.backends.triton import numerics as num
from tta_ext.backends.triton import rows
from tta_ext.backends.triton.launch import Rows, jit, launch, number, scratch

KNAPSACK, CONFIDENCE_BET = tl.constexpr(rules.KNAPSACK), tl.constexpr(rules.CONFIDENCE_BET)
THRESHOLD, NUDGING = tl.constexpr(rules.THRESHOLD), tl.constexpr(rules.NUDGING)
RELATIVE, ARGMAX = tl.constexpr(rules.RELATIVE), tl.constexpr(rules.ARGMAX)
RELATIVE_RATIO, OPTIMAL = tl.constexpr(rules.RELATIVE_RATIO), tl.constexpr(rules.OPTIMAL)
INCLUDE, SPLIT = tl.constexpr(rules.INCLUDE), tl.constexpr(rules.SPLIT)


class State(NamedTuple):
    """What is known about each row between launches, ``[rows]``."""

    top: Tensor  # float32, as all logits: those that p and q are taken relative to
    proxy_top: Tensor
    cut_x: Tensor
    critical_x: Tensor
    z: Tensor  # float64
    rule_z: Tensor
    proxy_z: Tensor
    bound: Tensor  # the knapsack's capacity in units of the row's weights
    fraction: Tensor
    mass: Tensor
    kept: Tensor
    cut_id: Tensor  # int64; what stands before (cut_x, cut_id) is deferred, or what does not
    critical: Tensor
    valid: Tensor  # bool; not where a row that was read has no law, or the parameter is none
    proxy_valid: Tensor  # for rows of which the rule does not read the proxy

    @classmethod
    def of(cls, x: Rows) -> State:
        padded = -(-x.rows // 16) * 16  # aligned alike whatever the number of rows
        kinds = ((4, torch.float32), (7, torch.float64), (2, torch.int64), (2, torch.bool))
        fields = [scratch(x.data, n, padded, dtype=dtype)[:, : x.rows] for n, dtype in kinds]
        return cls(*(field for group in fields for field in group))


class Law(NamedTuple):
    """Rows and what is known about them, as kernels take them."""

    base: Rows
    proxy: Rows | None
    state: State
    inverse: float


class Resolved(NamedTuple):
    """A rule resolved over rows."""

    law: Law
    base: rows.Stats
    proxy: rows.Stats | None
    rule: RuleArguments


@triton.constexpr_function
def reads_proxy(rule):
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
def rule_threshold(param, z, proxy_z, distance, RULE: tl.constexpr):
    """The probability that decides, as core/rules.h has it: a line a rule."""
    max_p = (1.0 / z).to(tl.float32).to(tl.float64)
    max_q = (1.0 / proxy_z).to(tl.float32).to(tl.float64)
    if RULE == THRESHOLD:
        threshold = param
    elif RULE == CONFIDENCE_BET:
        threshold = max_q - param
    elif RULE == NUDGING:
        threshold = tl.where(max_p < param, num.INFINITY, -num.INFINITY).to(tl.float64)
    elif RULE == RELATIVE:
        threshold = max_p - param
    elif RULE == RELATIVE_RATIO:
        threshold = max_p * (1.0 - param)
    elif RULE == ARGMAX:
        threshold = max_p
    elif RULE == OPTIMAL:
        surer = max_p < max_q - param * distance  # not where that is NaN
        threshold = tl.where(surer, num.INFINITY, -num.INFINITY).to(tl.float64)
    else:
        threshold = max_p + param
    return threshold


@triton.jit
def under(x, top, inverse, z, threshold, OR_EQUAL: tl.constexpr):
    """Whether p of a logit is below a threshold, or at it."""
    p = rows.probability(x, top, inverse, z).to(tl.float64)
    if OR_EQUAL:
        below = p <= threshold
    else:
        below = p < threshold
    return below


@triton.jit
def below_probability(top, inverse, z, threshold, OR_EQUAL: tl.constexpr):
    """{v : p(v) < t} (or <= t) as a cut: 256 floats are tried at once, four times."""
    lowest = tl.full((), -num.INFINITY, tl.float32)
    low, high = num.ordered_bits(lowest), num.ordered_bits(top)
    i = tl.arange(0, 256).to(tl.int64)
    for k in tl.static_range(4):
        step = 1 << (24 - 8 * k)
        probe = low + (i + 1) * step
        x = num.from_ordered_bits(tl.minimum(probe, high))
        below = under(x, top, inverse, z, threshold, OR_EQUAL) & (probe < high)
        low = low + tl.sum(below.to(tl.int64), 0) * step
    some = under(lowest, top, inverse, z, threshold, OR_EQUAL)
    every = under(top, top, inverse, z, threshold, OR_EQUAL)
    cut = tl.where(some, num.from_ordered_bits(low), -num.INFINITY)
    cut = tl.where(every, num.INFINITY, cut)
    return cut, tl.where(some | every, num.NO_LIMIT, 0)


@jit
def distance_tiles(x, s, y, q, inverse, mass):
    """A tile's part of the total variation, sum max(p - q, 0): p, q, difference as float32."""
    tiles = rows.tiles_of(x.vocab)
    row, t = rows.part(tiles)
    top, proxy_top = rows.row_max(s.tile_max, row, tiles), rows.row_max(q.tile_max, row, tiles)
    z = rows.row_sum(s.tile_max, s.rule_sum, row, tiles, top, inverse)
    proxy_z = rows.row_sum(q.tile_max, q.rule_sum, row, tiles, proxy_top, inverse)
    lanes = tl.zeros((num.LANES,), tl.float32)
    for g in range(rows.groups_of(x.vocab)):
        j = t * num.TILE + g * num.LANES + tl.arange(0, num.LANES)
        more = rows.probability(rows.logits(x, row, j), top, inverse, z)
        more = more - rows.probability(rows.logits(y, row, j), proxy_top, inverse, proxy_z)
        lanes = lanes + tl.where(more > 0.0, more, 0.0)
    tl.store(mass + row * tiles + t, tl.sum(num.fold(lanes[None, :], 1), 0).to(tl.float64))


@jit
def resolve_rows(state, s, q, distances, vocab, inner, param, param_outer, param_inner, inverse,
                 rule_inverse, RULE: tl.constexpr, BOTH: tl.constexpr):  # fmt: skip
    """Sums, validity, and the cut of every rule but the knapsack."""
    row = tl.program_id(0).to(tl.int64)
    tiles = rows.tiles_of(vocab)
    top = rows.row_max(s.tile_max, row, tiles)
    z = rows.row_sum(s.tile_max, s.tile_sum, row, tiles, top, inverse)
    rule_z = rows.row_sum(s.tile_max, s.rule_sum, row, tiles, top, rule_inverse)
    value = num.double(param, (row // inner) * param_outer + (row % inner) * param_inner)
    valid = (z == z) & (value == value)
    if RULE == KNAPSACK:
        valid = valid & (value >= 0.0)
    proxy_top, proxy_z, proxy_rule_z = top, z, rule_z
    if q is not None:
        proxy_top = rows.row_max(q.tile_max, row, tiles)
        proxy_z = rows.row_sum(q.tile_max, q.tile_sum, row, tiles, proxy_top, inverse)
        proxy_rule_z = rows.row_sum(q.tile_max, q.rule_sum, row, tiles, proxy_top, rule_inverse)
    if BOTH:
        valid = valid & (proxy_z == proxy_z)
    tl.store(state.top + row, top)
    tl.store(state.z + row, z)
    tl.store(state.rule_z + row, rule_z)
    tl.store(state.proxy_top + row, proxy_top)
    tl.store(state.proxy_z + row, proxy_z)
    tl.store(state.valid + row, valid)
    tl.store(state.proxy_valid + row, proxy_z == proxy_z)
    tl.store(state.bound + row, value * rule_z)
    tl.store(state.fraction + row, 0.0)
    tl.store(state.critical + row, -1)
    tl.store(state.critical_x + row, num.INFINITY)
    if RULE != KNAPSACK:
        distance = tl.zeros((), tl.float64)
        if distances is not None:
            distance = rows.mass_sum(distances, row, tiles)
        threshold = rule_threshold(value, rule_z, proxy_rule_z, distance, RULE)
        if judges_proxy(RULE):
            cut, limit = below_probability(
                proxy_top, rule_inverse, proxy_rule_z, threshold, is_upper(RULE)
            )
        else:
            cut, limit = below_probability(top, rule_inverse, rule_z, threshold, False)
        tl.store(state.cut_x + row, cut)
        tl.store(state.cut_id + row, limit)


@triton.jit
def inside(law, row, v, x, y, RULE: tl.constexpr):
    """Whether the rule defers tokens v whole, whose logits are x and, the proxy's, y."""
    if judges_proxy(RULE):
        x = y
    cut_x = tl.load(law.state.cut_x + row)
    before = num.admits(cut_x, tl.load(law.state.cut_id + row), x, v)
    if is_upper(RULE):
        before = before == 0
    return before


@triton.jit
def mu(law, row, v, x, y, RULE: tl.constexpr):
    """How much of tokens v the rule defers, float64: all, or the critical item's share."""
    fraction = tl.load(law.state.fraction + row)
    share = tl.where(v == tl.load(law.state.critical + row), fraction, 0.0)
    return tl.where(inside(law, row, v, x, y, RULE), 1.0, share)


# ---- the knapsack --------------------------------------------------------------------------------

PROBES = tl.constexpr(32)


@triton.jit
def canonical_weight(s, row, tiles, top, inverse, x, v):
    """A token's weight as the canonical sum counts it, float64."""
    at = row * tiles + tl.maximum(v, 0) // num.TILE
    weight = num.exp((x - tl.load(s.tile_max + at)) * inverse)
    return weight.to(tl.float64) * rows.tile_scale(s.tile_max, at, top, inverse)


@triton.jit
def split_fraction(bound, before, weight):
    """How much of the critical item fills the capacity: float32, and used as such."""
    share = (bound - before) / weight
    share = tl.where(share < 0.0, 0.0, tl.where(share > 1.0, 1.0, share))
    return share.to(tl.float32).to(tl.float64)


@triton.jit
def coarse(x, SHIFT: tl.constexpr):
    """The number of a logit among those that its dtype can hold, by order; int64."""
    return num.ordered_bits(tl.full((), x, tl.float32)) >> SHIFT


@triton.jit
def concluded(low, mass, row, tiles, bound, step):
    """The largest number whose mass is within the budget, and that mass."""
    total = tl.zeros((PROBES,), tl.float64)
    for t in range(tiles):
        total = total + tl.load(mass + (row * tiles + t) * PROBES + tl.arange(0, PROBES))
    within = total <= bound
    number = tl.load(low + row) + tl.sum(within.to(tl.int64), 0) * step
    return number, tl.max(tl.where(within, total, 0.0), 0)


@jit
def cut_pass(x, s, state, inverse, previous, previous_step, low, mass, step, offset,
             SHIFT: tl.constexpr, ID_BITS: tl.constexpr):  # fmt: skip
    """One pass of the search: it concludes the one before, whose masses ``previous`` has, and adds
    up a tile's mass at or below 32 numbers ``step`` apart.
    """
    tiles = rows.tiles_of(x.vocab)
    row, t = rows.part(tiles)
    if previous is None:
        start = (coarse(-num.INFINITY, SHIFT) << ID_BITS) - 1
    else:
        bound = tl.load(state.bound + row)
        start, _ = concluded(previous[0], previous[1], row, tiles, bound, previous_step)
    if t == 0:
        tl.store(low + row, start)
    number = start + (tl.arange(0, PROBES).to(tl.int64) + offset) * step
    number = tl.minimum(number, coarse(num.INFINITY, SHIFT) << ID_BITS)
    probe = num.from_ordered_bits((number >> ID_BITS) << SHIFT)
    probe_id = (number & ((1 << ID_BITS) - 1)).to(tl.int32)
    at = row * tiles + t
    base = rows.finite(tl.load(s.tile_max + at))
    lanes = tl.zeros((PROBES, num.LANES), tl.float32)
    for g in range(rows.groups_of(x.vocab)):
        j = t * num.TILE + g * num.LANES + tl.arange(0, num.LANES)
        y = rows.logits(x, row, j)
        weight = num.exp((y - base) * inverse)[None, :]
        below = num.admits(probe[:, None], probe_id[:, None] + 1, y[None, :], j[None, :])
        lanes = lanes + tl.where(below, weight, 0.0)
    scale = rows.tile_scale(s.tile_max, at, rows.row_max(s.tile_max, row, tiles), inverse)
    tl.store(
        mass + at * PROBES + tl.arange(0, PROBES), num.fold(lanes, PROBES).to(tl.float64) * scale
    )


@jit
def cut_rows(x, s, state, inverse, low, mass, MODE: tl.constexpr, ID_BITS: tl.constexpr):
    """The critical item, the one after the last number within, and the cut that follows from it."""
    row = tl.program_id(0).to(tl.int64)
    tiles = rows.tiles_of(x.vocab)
    bound = tl.load(state.bound + row)
    after, before = concluded(low, mass, row, tiles, bound, 1)
    item = tl.where(tl.load(state.rule_z + row) > bound, after & ((1 << ID_BITS) - 1), -1)
    item = tl.where(item < x.vocab, item, -1)  # of an invalid row alone
    y = rows.logits(x, row, tl.maximum(item, 0))
    if MODE == SPLIT:
        top = rows.row_max(s.tile_max, row, tiles)
        weight = canonical_weight(s, row, tiles, top, inverse, y, item)
        tl.store(
            state.fraction + row, tl.where(item >= 0, split_fraction(bound, before, weight), 0.0)
        )
    end = item
    if MODE == INCLUDE:
        end = item + 1
    tl.store(state.cut_x + row, tl.where(item >= 0, y, num.INFINITY))
    tl.store(state.cut_id + row, tl.where(item >= 0, end, num.NO_LIMIT))
    tl.store(state.critical + row, item)
    tl.store(state.critical_x + row, tl.where(item >= 0, y, num.INFINITY))


# The low bits that are the same in all logits of a dtype, widened to float32.
_SHIFT = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}


def _search(x: Rows, s: rows.Stats, state: State, rule: RuleArguments) -> None:
    """Launch the knapsack's search."""
    inverse, shift = inverse_temperature(rule.rule_temperature), _SHIFT[x.data.dtype]
    id_bits = x.vocab.bit_length()
    passes = -(-(32 - shift + id_bits) // 5)
    low = scratch(x.data, 2, x.rows, dtype=torch.int64)
    mass = scratch(x.data, 2, x.rows, x.tiles, PROBES.value)
    previous: Any = None
    for level in reversed(range(passes)):  # the last one tries the number that is known as well
        now = low[level % 2], mass[level % 2]
        launch(
            cut_pass, x.rows * x.tiles, x, s, state, inverse, previous, 32 ** (level + 1), *now,
            32**level, int(level > 0), SHIFT=shift, ID_BITS=id_bits,
        )  # fmt: skip
        previous = now
    launch(cut_rows, x.rows, x, s, state, inverse, *previous, MODE=rule.critical, ID_BITS=id_bits)


def resolved(base_logits: Tensor, proxy_logits: Tensor | None, rule: RuleArguments,
             whole: bool = True, both: bool = True) -> Resolved:  # fmt: skip
    """Statistics of the rows, and the rule as a cut, the knapsack's too if it is wanted whole.

    A row is valid where its base is and, with ``both``, the proxy where that is given.

    Raises:
        ValueError: the rule reads the proxy at every position, and not all were given.
    """
    positions = base_logits.shape[1]
    base, q, distances = Rows.of(base_logits, positions), None, None
    proxy = None if proxy_logits is None else Rows.of(proxy_logits, positions)
    if rule.code in rules.NEEDS_PROXY and (proxy is None or proxy.limit < base.limit):
        raise ValueError(
            f"rule {rules.RULE_NAMES[rule.code]!r} needs proxy_logits at each position "
            "of base_logits"
        )
    inverses = inverse_temperature(rule.temperature), inverse_temperature(rule.rule_temperature)
    s = rows.stats(base, *inverses)
    if proxy is not None:
        q = rows.stats(proxy, *inverses)
    if rule.code == rules.OPTIMAL:
        distances = scratch(base_logits, base.rows, base.tiles)
        launch(distance_tiles, base.rows * base.tiles, base, s, proxy, q, inverses[1], distances)
    state = State.of(base)
    each = rule.param.numel() not in (1, len(base_logits))  # one a position, not a row
    strides = (base.inner, 1) if each else (int(rule.param.numel() != 1), 0)
    launch(resolve_rows, base.rows, state, s, q, distances, base.vocab, base.inner,
           number(rule.param), *strides, *inverses, RULE=rule.code, BOTH=both)  # fmt: skip
    if rule.code == rules.KNAPSACK and whole:
        _search(base, s, state, rule)
    return Resolved(Law(base, proxy, state, inverses[0]), s, q, rule)
