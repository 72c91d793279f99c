"""A rule resolved over rows: the probability that decides or, of the knapsack, a cut.

The knapsack cuts at its critical item, the first whose canonical mass exceeds the budget. Its
search sorts nothing: tokens are numbered by logit and id, each launch adds up the mass at or below
32 numbers at once and keeps one of 32 parts of what is left. Every sum is the canonical one, so the
item is the one that the definition gives.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tta_ext import rules
from tta_ext.backends.reference._common import RuleArguments, inverse_temperature
from tta_ext.backends.triton import law as laws
from tta_ext.backends.triton import numerics as num
from tta_ext.backends.triton import rows
from tta_ext.backends.triton.launch import jit, launch, number, scratch
from tta_ext.backends.triton.law import Law, Rows, logits, tiles_of


@triton.jit
def rule_limit(param, max_p, max_q, distance, RULE: tl.constexpr):
    """The probability that decides, as core/rules.h has it: a line a rule."""
    if RULE == rules.THRESHOLD:
        limit = param
    elif RULE == rules.CONFIDENCE_BET:
        limit = max_q - param
    elif RULE == rules.NUDGING:
        limit = tl.where(max_p < param, num.INFINITY, -num.INFINITY).to(tl.float64)
    elif RULE == rules.RELATIVE:
        limit = max_p - param
    elif RULE == rules.RELATIVE_RATIO:
        limit = max_p * (1.0 - param)
    elif RULE == rules.ARGMAX:
        limit = max_p
    elif RULE == rules.OPTIMAL:
        surer = max_p < max_q - param * distance  # not where that is NaN
        limit = tl.where(surer, num.INFINITY, -num.INFINITY).to(tl.float64)
    else:
        limit = max_p + param
    return limit


@jit
def distance_tiles(law, mass):
    """A tile's part of the total variation, sum max(p - q, 0): p, q, difference as float32."""
    p, q = law.rule_p, law.rule_q
    row, at, _, first = rows.place(p.x, 1)
    lanes = tl.zeros((1, num.LANES), tl.float32)
    for g in range(rows.groups_of(p.x.vocab)):
        j = first + g * num.LANES
        more = laws.probability(p, row, logits(p.x, row, j))
        more = more - laws.probability(q, row, logits(q.x, row, j))
        lanes = lanes + tl.where(more > 0.0, more, 0.0)
    tl.store(mass + at, num.fold(lanes, 1).to(tl.float64))


@triton.jit
def mass_sum(mass, row, tiles, N: tl.constexpr):
    """The sums of N float64 masses a tile, from left to right."""
    sums = tl.zeros((N,), tl.float64)
    for t in range(tiles):
        sums = sums + tl.load(mass + (row * tiles + t) * N + tl.arange(0, N))
    return sums


@jit
def resolve_rows(law, distances, param, param_outer, param_inner, RULE: tl.constexpr,
                 BOTH: tl.constexpr):  # fmt: skip
    """Sums, validity, and what decides."""
    row = tl.program_id(0).to(tl.int64)
    x, state = law.p.x, law.state
    _, z = rows.total(law.p, None, row)
    _, rule_z = rows.total(law.rule_p, None, row)
    value = num.double(param, (row // x.inner) * param_outer + (row % x.inner) * param_inner)
    valid = (z == z) & (value == value)
    rule_q_z = rule_z
    if law.q is not None:
        _, q_z = rows.total(law.q, None, row)
        _, rule_q_z = rows.total(law.rule_q, None, row)
        if BOTH:
            valid = valid & (q_z == q_z)
    if RULE == rules.KNAPSACK:
        valid = valid & (value >= 0.0)
        limit = value * rule_z
    else:
        max_p = (1.0 / rule_z).to(tl.float32).to(tl.float64)
        max_q = (1.0 / rule_q_z).to(tl.float32).to(tl.float64)
        distance = tl.zeros((), tl.float64)
        if distances is not None:
            distance = tl.sum(mass_sum(distances, row, tiles_of(x.vocab), 1), 0)
        limit = rule_limit(value, max_p, max_q, distance, RULE)
    tl.store(state.limit + row, limit)
    tl.store(state.valid + row, valid)
    tl.store(state.fraction + row, 0.0)
    tl.store(state.critical + row, -1)


# ---- the knapsack --------------------------------------------------------------------------------

PROBES = tl.constexpr(32)


class Search(NamedTuple):
    """Where a pass of the search began, and the masses at or below the numbers that it tried."""

    low: Tensor  # int64 [rows]
    mass: Tensor  # float64 [rows, tiles, probes]

    @classmethod
    def of(cls, x: Rows, probes: int) -> Search:
        mass = scratch(x.data, x.rows, x.tiles, probes)
        return cls(scratch(x.data, x.rows, dtype=torch.int64), mass)


@triton.jit
def concluded(law, search, row, step):
    """The largest number whose mass is within the budget, and that mass."""
    sums = mass_sum(search.mass, row, tiles_of(law.p.x.vocab), PROBES)
    within = sums <= tl.load(law.state.limit + row)
    largest = tl.load(search.low + row) + tl.sum(within.to(tl.int64), 0) * step
    return largest, tl.max(tl.where(within, sums, 0.0), 0)


@jit
def cut_pass(law, token, last, last_step, here, step, offset, N: tl.constexpr):
    """The mass of a tile at or below N numbers ``step`` apart: after the one that the last pass
    concludes or, given a token, of what stands before it and of that with the token.
    """
    s = law.rule_p
    row, at, _, first = rows.place(s.x, 1)
    if token is not None:
        v = tl.maximum(tl.load(token + row), 0)
        low = num.order(logits(s.x, row, v), v) - 1
    else:
        low, _ = concluded(law, last, row, last_step)
    tl.store(here.low + row, low)  # each tile's program the same
    tried = low + (tl.arange(0, N).to(tl.int64) + offset) * step
    lanes = tl.zeros((N, num.LANES), tl.float32)
    top = tl.load(s.tile_top + at)
    for g in range(rows.groups_of(s.x.vocab)):
        j = first + g * num.LANES
        x = logits(s.x, row, j)
        inside = num.order(x, j) <= tried[:, None]
        lanes = lanes + tl.where(inside, rows.relative(x, top[:, None], s.inverse), 0.0)
    mass = num.fold(lanes, N).to(tl.float64) * rows.scale(s, None, at, tl.load(s.top + row))
    tl.store(here.mass + at * N + tl.arange(0, N), mass)


@triton.jit
def split_fraction(law, row, v, x, before):
    """How much of an item fills the capacity after ``before``: float32, and used as such."""
    share = (tl.load(law.state.limit + row) - before) / canonical_weight(law.rule_p, row, v, x)
    share = tl.where(share < 0.0, 0.0, tl.where(share > 1.0, 1.0, share))
    return share.to(tl.float32).to(tl.float64)


@triton.jit
def canonical_weight(s, row, v, x):
    """A token's weight as the canonical sum counts it, float64."""
    at = row * tiles_of(s.x.vocab) + tl.maximum(v, 0) // num.TILE
    w = rows.relative(x, tl.load(s.tile_top + at), s.inverse).to(tl.float64)
    return w * rows.scale(s, None, at, tl.load(s.top + row))


@jit
def cut_rows(law, last, MODE: tl.constexpr):
    """The critical item, the one after the last number within, and the cut that follows from it."""
    row = tl.program_id(0).to(tl.int64)
    state = law.state
    after, before = concluded(law, last, row, 1)
    item = after & num.ID_MASK
    some = tl.load(law.rule_p.z + row) > tl.load(state.limit + row)
    some = some & (item < law.p.x.vocab)  # but of an invalid row
    if MODE == rules.SPLIT:
        share = split_fraction(law, row, item, logits(law.p.x, row, item), before)
        tl.store(state.fraction + row, tl.where(some, share, 0.0))
    if MODE == rules.INCLUDE:
        after += 1
    tl.store(state.cut + row, tl.where(some, after, 1 << 60))
    tl.store(state.critical + row, tl.where(some, item, -1))


def before_token(law: Law, token: Tensor) -> Search:
    """Launch cut_pass: the masses of what stands before a row's token, and of that with it."""
    x, here = law.p.x, Search.of(law.p.x, 2)
    launch(cut_pass, x.rows * x.tiles, law, token, None, 0, here, 1, 0, N=2, num_warps=1)
    return here


# The low bits that are the same in all logits of a dtype, widened to float32.
_SHIFT = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
_LOWEST = -(0x7F800000 << num.ID_BITS.value) - 1  # before -inf


def _search(law: Law, rule: RuleArguments) -> None:
    """Launch the knapsack's search: for the logit, then for an id that has it."""
    x = law.p.x
    passes, here = [Search.of(x, PROBES.value) for _ in range(2)], Search.of(x, PROBES.value)
    id_bits, shift = num.ID_BITS.value, _SHIFT[x.data.dtype]
    logit_steps = range(id_bits + shift, id_bits + 32, 5)
    steps = [1 << n for n in (*reversed(logit_steps), *reversed(range(0, id_bits, 5)))]
    last, last_step = here, 0
    here.low.fill_(_LOWEST)
    here.mass.fill_(torch.inf)
    for i, step in enumerate(steps):  # the last one tries the number that is known as well
        now = passes[i % 2]
        launch(cut_pass, x.rows * x.tiles, law, None, last, last_step, now, step, int(step > 1),
               N=PROBES)  # fmt: skip
        last, last_step = now, step
    launch(cut_rows, x.rows, law, last, MODE=rule.critical)


def resolved(base_logits: Tensor, proxy_logits: Tensor | None, rule: RuleArguments,
             whole: bool = True, both: bool = True) -> Law:  # fmt: skip
    """The law of rows under a rule, the knapsack's cut too if it is wanted whole.

    A row is valid where its base is and, with ``both``, the proxy where that is given.

    Raises:
        ValueError: the rule reads the proxy at every position, and not all were given.
    """
    positions, reads = base_logits.shape[1], rule.code in rules.NEEDS_PROXY
    base, proxy = Rows.of(base_logits, positions), None
    if proxy_logits is not None:
        proxy = Rows.of(proxy_logits, positions)
    if reads and (proxy is None or proxy.limit < base.limit):
        raise ValueError(
            f"rule {rules.RULE_NAMES[rule.code]!r} needs proxy_logits at each position "
            "of base_logits"
        )
    inverses = inverse_temperature(rule.temperature), inverse_temperature(rule.rule_temperature)
    same = inverses[0] == inverses[1]
    p = rows.statistics(base, inverses[0])
    q = None if proxy is None else rows.statistics(proxy, inverses[0])
    rule_p = p if same else rows.statistics(base, inverses[1])
    rule_q = q if same or proxy is None or not reads else rows.statistics(proxy, inverses[1])
    law = Law(p, q, rule_p, rule_q, laws.State.of(base))
    each = rule.param.numel() not in (1, len(base_logits))  # one a position, not a row
    strides = (base.inner, 1) if each else (int(rule.param.numel() != 1), 0)

    def resolve(distances: Tensor | None) -> None:
        launch(resolve_rows, base.rows, law, distances, number(rule.param), *strides,
               RULE=rule.code, BOTH=both)  # fmt: skip

    resolve(None)
    if rule.code == rules.OPTIMAL:  # now that the rows are summed
        distances = scratch(base_logits, base.rows, base.tiles)
        launch(distance_tiles, base.rows * base.tiles, law, distances, num_warps=1)
        resolve(distances)
    if rule.code == rules.KNAPSACK and whole:
        _search(law, rule)
    return law
