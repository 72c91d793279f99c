"""A rule resolved over rows, and the law pi that follows: masses, pi itself, what is most probable.

A rule that tests a probability is resolved to the one that decides. The knapsack cuts at its
critical item, the first whose canonical mass exceeds the budget. Its search sorts nothing: tokens
are numbered by logit and id, and each launch adds up the mass at or below 32 numbers, canonically,
and keeps one of 32 parts of what is left.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tta_ext import rules
from tta_ext.backends.reference._common import RuleArguments, inverse_temperature
from tta_ext.backends.triton import numerics as num
from tta_ext.backends.triton import rows
from tta_ext.backends.triton.launch import jit, launch, number
from tta_ext.backends.triton.rows import Law, Rows, Softmax, logits


def test_of(rule: RuleArguments) -> int:
    """The rule that tests a token the same way; but for three it is whether p is below a limit."""
    own = rules.KNAPSACK, rules.PROXY_BELOW, rules.PROXY_ABOVE
    return rule.code if rule.code in own else rules.THRESHOLD


@triton.jit
def most(z):
    """The largest probability of a row whose sum is z, float64."""
    return (1.0 / z).to(tl.float32).to(tl.float64)


@triton.jit
def rule_limit(param, p_z, q_z, RULE: tl.constexpr):
    """The probability that decides, as core/rules.h has it, a line a rule; or the capacity."""
    if RULE == rules.KNAPSACK:
        limit = param * p_z
    elif RULE == rules.THRESHOLD:
        limit = param
    elif RULE == rules.CONFIDENCE_BET:
        limit = most(q_z) - param
    elif RULE == rules.NUDGING:
        limit = tl.where(most(p_z) < param, num.INFINITY, -num.INFINITY).to(tl.float64)
    elif RULE == rules.RELATIVE:
        limit = most(p_z) - param
    elif RULE == rules.RELATIVE_RATIO:
        limit = most(p_z) * (1.0 - param)
    elif RULE == rules.ARGMAX:
        limit = most(p_z)
    else:
        limit = most(p_z) + param
    return limit


@jit
def resolve_rows(law, param, stride, RULE: tl.constexpr, BOTH: tl.constexpr):
    """Sums, validity, and what decides, but for ``optimal``."""
    row = tl.program_id(0).to(tl.int64)
    _, z = rows.total(law.p, None, row)
    _, p_z = rows.total(law.rule_p, None, row)
    value = num.number(param, row * stride, tl.float64)
    valid = (z == z) & (value == value)
    q_z = p_z
    if law.q is not None:
        _, z = rows.total(law.q, None, row)
        _, q_z = rows.total(law.rule_q, None, row)
        if BOTH:
            valid = valid & (z == z)
    if RULE == rules.KNAPSACK:
        valid = valid & (value >= 0.0)
    tl.store(law.limit + row, rule_limit(value, p_z, q_z, RULE))
    tl.store(law.valid + row, valid)
    tl.store(law.fraction + row, 0.0)
    tl.store(law.critical + row, -1)


@triton.jit
def masses(law, s, tried, RULE: tl.constexpr, N: tl.constexpr):
    """Of a program's tile: the N masses at or below numbers [N, 1], scaled to the row; without
    these the two of what the rule defers and of what it keeps; of ``optimal`` the part of the total
    variation, sum max(p - q, 0), with p, q, difference as float32.
    """
    row, at, _, first = rows.place(s.x, 1)
    lanes = tl.zeros((N, num.LANES), tl.float32)
    top = tl.load(s.tile_top + at)
    for g in range(s.x.groups):
        j = first + g * num.LANES
        x = logits(s.x, row, j)
        w = rows.weight(s, None, x, top[:, None])
        if tried is not None:
            inside = num.order(x, j) <= tried
        elif RULE == rules.OPTIMAL:
            w = rows.probability(s, row, x)
            w = w - rows.probability(law.rule_q, row, logits(law.rule_q.x, row, j))
            inside = w > 0.0
        else:
            inside = rows.deferred(law, row, j, x, RULE) == (tl.arange(0, N)[:, None] == 0)
        lanes = lanes + tl.where(inside, w, 0.0)
    scale = 1.0 if RULE == rules.OPTIMAL else rows.scale(s, None, top, tl.load(s.top + row))
    return num.fold(lanes).to(tl.float64) * scale


@jit
def mass_tiles(law, s, mass, RULE: tl.constexpr, N: tl.constexpr):
    tl.store(mass + tl.program_id(0) * N + tl.arange(0, N), masses(law, s, None, RULE, N))


@triton.jit
def mass_sum(mass, row, tiles, N: tl.constexpr):
    """The sums of N float64 masses a tile, from left to right."""
    sums = tl.zeros((N,), tl.float64)
    for t in range(tiles):
        sums = sums + tl.load(mass + (row * tiles + t) * N + tl.arange(0, N))
    return sums


@jit
def distance_rows(law, mass, param, stride):
    """What decides under ``optimal``: all or nothing."""
    row = tl.program_id(0).to(tl.int64)
    distance = tl.sum(mass_sum(mass, row, law.p.x.tiles, 1), 0)
    bar = most(tl.load(law.rule_q.z + row)) - num.number(param, row * stride, tl.float64) * distance
    surer = most(tl.load(law.rule_p.z + row)) < bar  # not where that is NaN
    tl.store(law.limit + row, tl.where(surer, num.INFINITY, -num.INFINITY).to(tl.float64))


def resolved(base_logits: Tensor, proxy_logits: Tensor | None, rule: RuleArguments,
             whole: bool = True, both: bool = True) -> Law:  # fmt: skip
    """The law of rows under a rule, the knapsack's cut too if it is wanted whole.

    A row is valid where its base is and, with ``both``, the proxy where that is given.

    Raises:
        ValueError: the rule reads the proxy at every position, and not all were given.
    """
    base = Rows.of(base_logits, base_logits.shape[1])
    proxy = None if proxy_logits is None else Rows.of(proxy_logits, base_logits.shape[1])
    reads, count = rule.code in rules.NEEDS_PROXY, base.rows
    if reads and (proxy is None or proxy.limit < base.limit):
        raise ValueError(
            f"rule {rules.RULE_NAMES[rule.code]!r} needs proxy_logits at each position "
            "of base_logits"
        )
    inverses = inverse_temperature(rule.temperature), inverse_temperature(rule.rule_temperature)
    p, q = Softmax.of(base, inverses[0]), proxy and Softmax.of(proxy, inverses[0])
    same = inverses[0] == inverses[1]
    rule_p = p if same else Softmax.of(base, inverses[1])
    rule_q = q if same or proxy is None or not reads else Softmax.of(proxy, inverses[1])
    kinds = [torch.float64] * 4 + [torch.int64] * 2 + [torch.bool]
    law = Law(p, q, rule_p, rule_q, *(base_logits.new_empty(count, dtype=kind) for kind in kinds))
    param, each = rule.param, int(rule.param.numel() != 1)
    if each and param.numel() == len(base_logits):  # one a row, not a position
        param = param.reshape(-1, 1).expand(-1, base.inner)
    given = number(param), each
    launch(resolve_rows, count, law, *given, RULE=rule.code, BOTH=both)
    if rule.code == rules.OPTIMAL:
        distances = law.mass.new_empty(base.programs)
        launch(mass_tiles, base.programs, law, rule_p, distances, RULE=rule.code, N=1, num_warps=1)
        launch(distance_rows, count, law, distances, *given)
    if rule.code == rules.KNAPSACK and whole:
        search(law, rule)
    return law


# ---- the knapsack --------------------------------------------------------------------------------


@triton.jit
def concluded(law, mass, row, low, step, N: tl.constexpr):
    """The largest number whose mass is within the budget, and that mass."""
    sums = mass_sum(mass, row, law.p.x.tiles, N)
    within = sums <= tl.load(law.limit + row)
    number = tl.load(low + row) + tl.sum(within.to(tl.int64), 0) * step
    return number, tl.max(tl.where(within, sums, 0.0), 0)


@jit
def cut_tiles(law, token, low, mass, last_step, new_low, new_mass, step, offset, N: tl.constexpr):
    """The mass of a tile at or below N numbers ``step`` apart: after the one that the last pass
    concludes or, given a token, of what stands before it and of that with the token.
    """
    s, n = law.rule_p, tl.arange(0, N)
    row = (tl.program_id(0) // s.x.tiles).to(tl.int64)
    if token is not None:
        v = tl.maximum(tl.load(token + row), 0)
        start = num.order(logits(s.x, row, v), v) - 1
    else:
        start, _ = concluded(law, mass, row, low, last_step, N)
    tl.store(new_low + row, start)  # every tile's program the same
    tried = start + (n.to(tl.int64) + offset) * step
    tl.store(new_mass + tl.program_id(0) * N + n, masses(law, s, tried[:, None], 0, N))


@triton.jit
def canonical_weight(s, row, v):
    """A token's weight as the canonical sum counts it, float64."""
    top = tl.load(s.tile_top + row * s.x.tiles + v // num.TILE)
    w = rows.weight(s, None, logits(s.x, row, v), top).to(tl.float64)
    return w * rows.scale(s, None, top, tl.load(s.top + row))


@jit
def cut_rows(law, low, mass, MODE: tl.constexpr, N: tl.constexpr):
    """The critical item, the one after the last number within, and the cut that follows from it;
    of a pass for one token only what they say of that token.
    """
    row = tl.program_id(0).to(tl.int64)
    bound = tl.load(law.limit + row)
    after, before = concluded(law, mass, row, low, 1, N)
    item = tl.minimum(after & num.ID_MASK, law.p.x.vocab - 1)
    some = tl.load(law.rule_p.z + row) > bound
    if MODE == rules.SPLIT:  # how much of it fills the capacity: float32, and used as such
        share = (bound - before) / canonical_weight(law.rule_p, row, item)
        share = tl.where(share < 0.0, 0.0, tl.where(share > 1.0, 1.0, share)).to(tl.float32)
        tl.store(law.fraction + row, tl.where(some, share, 0.0).to(tl.float64))
    if MODE == rules.INCLUDE:
        after += 1
    tl.store(law.cut + row, tl.where(some, after, 1 << 60))
    tl.store(law.critical + row, tl.where(some, item, -1))


# The low bits that are the same in all logits of a dtype, widened to float32.
_SHIFT = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
_LOWEST = -(0x7F800000 << num.ID_BITS.value) - 1  # before -inf


def search(law: Law, rule: RuleArguments, token: Tensor | None = None) -> None:
    """Launch the knapsack's search: for the logit, then for an id that has it; or find out about
    one token a row alone, in one pass.
    """
    x, bits = law.p.x, num.ID_BITS.value
    logit_steps = range(bits + _SHIFT[x.data.dtype], bits + 32, 5)
    levels = [*reversed(logit_steps), *reversed(range(0, bits, 5))] if token is None else [0]
    n, step = 32 if token is None else 2, 0
    low, mass = law.cut.new_full((x.rows,), _LOWEST), law.mass.new_full((x.programs, n), torch.inf)
    for level in levels:  # the last one tries the number that is known as well
        last = low, mass, step
        low, mass, step = torch.empty_like(low), torch.empty_like(mass), 1 << level
        launch(cut_tiles, x.programs, law, token, *last, low, mass, step, int(step > 1), N=n,
               num_warps=4 if n > 2 else 1)  # fmt: skip
    launch(cut_rows, x.rows, law, low, mass, MODE=rule.critical, N=n)


@jit
def mass_rows(law, s, mass):
    """The deferred and the kept mass of each row, into its law."""
    row = tl.program_id(0).to(tl.int64)
    fraction, z = tl.load(law.fraction + row), tl.load(s.z + row)
    share = fraction * canonical_weight(s, row, tl.maximum(tl.load(law.critical + row), 0))
    share = tl.where(fraction > 0.0, share, 0.0)
    one, two = tl.split(mass_sum(mass, row, s.x.tiles, 2))
    tl.store(law.mass + row, tl.where(tl.load(law.valid + row), (one + share) / z, num.NAN))
    tl.store(law.kept + row, (two - share) / z)


def sum_up(law: Law, rule: RuleArguments, s: Softmax | None = None) -> Tensor:
    """The deferred and the kept mass, at the temperature of sampling or of ``s``; the first."""
    s, mass = s or law.p, law.mass.new_empty(law.p.x.programs, 2)
    launch(mass_tiles, s.x.programs, law, s, mass, RULE=test_of(rule), N=2, num_warps=1)
    launch(mass_rows, s.x.rows, law, s, mass)
    return law.mass


@jit
def ask_tiles(law, mask, pi, best, kept, lowest, RULE: tl.constexpr):
    """What is asked of a tile: the set that the rule defers; pi, or p without a q; the largest pi;
    the largest and the smallest logit that the rule keeps whole.
    """
    row, j, x = rows.tile(law.p.x)
    valid, at, vocab = tl.load(law.valid + row), tl.program_id(0), law.p.x.vocab
    if mask is not None:
        verdict = valid & rows.deferred(law, row, j, x, RULE)
        tl.store(mask + row * vocab + j, verdict, mask=j < vocab)
    if pi is not None:
        p = rows.probability(law.p, row, x) if law.q is None else rows.policy(law, row, j, RULE)
        tl.store(pi + row * vocab + j, tl.where(valid, p, num.NAN), mask=j < vocab)
    if best is not None:
        p = tl.where(j < vocab, rows.policy(law, row, j, RULE), -1.0)
        tl.store(best + at, tl.max(p, 0))
    if kept is not None:
        tl.store(kept + at, tl.max(rows.kept(law, row, j, x, -num.INFINITY, RULE), 0))
    if lowest is not None:
        tl.store(lowest + at, tl.min(rows.kept(law, row, j, x, num.INFINITY, RULE), 0))


def ask(law: Law, rule: RuleArguments, mask: Tensor | None = None, pi: Tensor | None = None,
        best: bool = False, kept: bool = False, lowest: bool = False) -> Tensor:  # fmt: skip
    """Launch ask_tiles; returns the one that is asked for each tile, float32 ``[rows, tiles]``."""
    found = torch.empty_like(law.p.tile_top)
    given = (found if asked else None for asked in (best, kept, lowest))
    launch(ask_tiles, law.p.x.programs, law, mask, pi, *given, RULE=test_of(rule), num_warps=8)
    return found


@triton.jit
def greedy(law, kept, row, RULE: tl.constexpr):
    """propose_greedy of cpu/rule.h: the most probable kept token, and whether q may change it."""
    p, tiles = law.p, law.p.x.tiles
    mass, fraction = tl.load(law.mass + row), tl.load(law.fraction + row)
    top, j, rest = rows.best_tile(kept, row, tiles)
    x = rows.kept(law, row, j, logits(p.x, row, j), -num.INFINITY, RULE)
    token = rows.first_of(x == top, j)
    # The next value: another tile's largest, or of its own tile.
    rest = tl.maximum(rest, tl.max(tl.where(j == token, -num.INFINITY, x), 0))
    some, splits = top > -num.INFINITY, fraction > 0.0
    item = tl.load(law.critical + row)
    share = rows.probability(p, row, logits(p.x, row, tl.maximum(item, 0))).to(tl.float64)
    share = tl.where(splits, (1.0 - fraction) * share, 0.0)
    one = tl.where(some, rows.probability(p, row, top), share.to(tl.float32))
    two = rows.probability(p, row, rest).to(tl.float64)
    two = tl.where(some & (share > two), share, two)
    _, j, _ = rows.best_tile(p.tile_top, row, tiles)
    fallback = rows.first_of(logits(p.x, row, j) == tl.load(p.top + row), j)
    fallback = tl.where(splits, item, fallback)
    return tl.where(some, token, fallback), ((two + mass).to(tl.float32) < one) == 0
