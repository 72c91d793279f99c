"""A rule resolved over rows, and the law pi that follows: masses, pi itself, what is most probable.

A rule that tests a probability is resolved to the one that decides. The knapsack cuts at its
critical item, the first whose canonical mass exceeds the budget. Its search sorts nothing: tokens
are numbered by logit and id, and each launch adds up the mass at or below 32 numbers, canonically,
and keeps one of 32 parts of what is left.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tta_ext import rng, rules
from tta_ext.backends.reference._common import RuleArguments, inverse_temperature
from tta_ext.backends.triton import numerics as num
from tta_ext.backends.triton import rows
from tta_ext.backends.triton.launch import jit, launch, number, scratch, tuned
from tta_ext.backends.triton.rows import Law, Rows, Softmax, logits


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
    for g in range(p.x.groups):
        j = first + g * num.LANES
        more = rows.probability(p, row, logits(p.x, row, j))
        more = more - rows.probability(q, row, logits(q.x, row, j))
        lanes = lanes + tl.where(more > 0.0, more, 0.0)
    tl.store(mass + at, num.fold(lanes).to(tl.float64))


@triton.jit
def mass_sum(mass, row, tiles, N: tl.constexpr):
    """The sums of N float64 masses a tile, from left to right."""
    sums = tl.zeros((N,), tl.float64)
    for t in range(tiles):
        sums = sums + tl.load(mass + (row * tiles + t) * N + tl.arange(0, N))
    return sums


@jit
def resolve_rows(law, distances, param, stride, RULE: tl.constexpr, BOTH: tl.constexpr):
    """Sums, validity, and what decides."""
    row = tl.program_id(0).to(tl.int64)
    _, z = rows.total(law.p, None, row)
    _, rule_z = rows.total(law.rule_p, None, row)
    value = num.double(param, row * stride)
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
        distance = tl.zeros((1,), tl.float64)
        if distances is not None:
            distance = mass_sum(distances, row, law.p.x.tiles, 1)
        limit = rule_limit(value, max_p, max_q, tl.sum(distance, 0), RULE)
    tl.store(law.limit + row, limit)
    tl.store(law.valid + row, valid)
    tl.store(law.fraction + row, 0.0)
    tl.store(law.critical + row, -1)


def resolved(base_logits: Tensor, proxy_logits: Tensor | None, rule: RuleArguments,
             whole: bool = True, both: bool = True) -> Law:  # fmt: skip
    """The law of rows under a rule, the knapsack's cut too if it is wanted whole.

    A row is valid where its base is and, with ``both``, the proxy where that is given.

    Raises:
        ValueError: the rule reads the proxy at every position, and not all were given.
    """
    base, proxy = Rows.of(base_logits, base_logits.shape[1]), None
    if proxy_logits is not None:
        proxy = Rows.of(proxy_logits, base_logits.shape[1])
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
    law = Law(p, q, rule_p, rule_q, *(scratch(base_logits, count, dtype=kind) for kind in kinds))
    param, each = rule.param, int(rule.param.numel() != 1)
    if each and param.numel() == len(base_logits):  # one a row, not a position
        param = param.reshape(-1, 1).expand(-1, base.inner)
    distances = None
    for again in range(1 + (rule.code == rules.OPTIMAL)):
        if again:  # now that the rows are summed
            distances = scratch(base_logits, base.programs)
            launch(distance_tiles, base.programs, law, distances, num_warps=1)
        launch(resolve_rows, count, law, distances, number(param), each, RULE=rule.code, BOTH=both)
    if rule.code == rules.KNAPSACK and whole:
        search(law, rule)
    return law


# ---- the knapsack --------------------------------------------------------------------------------

PROBES = tl.constexpr(32)


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
    s = law.rule_p
    row, at, _, first = rows.place(s.x, 1)
    if token is not None:
        v = tl.maximum(tl.load(token + row), 0)
        start = num.order(logits(s.x, row, v), v) - 1
    else:
        start, _ = concluded(law, mass, row, low, last_step, N)
    tl.store(new_low + row, start)  # every tile's program the same
    tried = start + (tl.arange(0, N).to(tl.int64) + offset) * step
    lanes = tl.zeros((N, num.LANES), tl.float32)
    top = tl.load(s.tile_top + at)
    for g in range(s.x.groups):
        j = first + g * num.LANES
        x = logits(s.x, row, j)
        inside = num.order(x, j) <= tried[:, None]
        lanes = lanes + tl.where(inside, rows.weight(s, None, x, top[:, None]), 0.0)
    sums = num.fold(lanes).to(tl.float64) * rows.scale(s, None, top, tl.load(s.top + row))
    tl.store(new_mass + at * N + tl.arange(0, N), sums)


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
    n = PROBES.value if token is None else 2
    low = scratch(x.data, 3, x.rows, dtype=torch.int64).fill_(_LOWEST)
    mass = scratch(x.data, 3, x.programs, n).fill_(torch.inf)
    at, step = 2, 0
    for level in levels:  # the last one tries the number that is known as well
        last, last_step, at, step = at, step, (at + 1) % 3, 1 << level
        launch(cut_tiles, x.programs, law, token, low[last], mass[last], last_step, low[at],
               mass[at], step, int(step > 1), N=n, num_warps=4 if n > 2 else 1)  # fmt: skip
    launch(cut_rows, x.rows, law, low[at], mass[at], MODE=rule.critical, N=n)


# ---- pi ------------------------------------------------------------------------------------------


@tuned
def masked_tiles(law, s, deferred, kept, work, RULE: tl.constexpr, T: tl.constexpr):
    """The mass of what the rule defers in a tile, and of what it keeps, scaled to the row."""
    row, at, there, first = rows.place(s.x, T)
    top = tl.load(s.tile_top + at, mask=there, other=-num.INFINITY)
    one = tl.zeros((T, num.LANES), tl.float32)
    two = one
    for g in range(s.x.groups):
        j = first + g * num.LANES
        x = logits(s.x, row, j)
        weight, inside = rows.weight(s, None, x, top[:, None]), rows.deferred(law, row, j, x, RULE)
        one = one + tl.where(inside, weight, 0.0)
        two = two + tl.where(inside, 0.0, weight)
    scale = rows.scale(s, None, top, tl.load(s.top + row))
    tl.store(deferred + at, num.fold(one).to(tl.float64) * scale, mask=there)
    tl.store(kept + at, num.fold(two).to(tl.float64) * scale, mask=there)


@jit
def mass_rows(law, s, deferred, kept):
    """The deferred and the kept mass of each row, into its law."""
    row = tl.program_id(0).to(tl.int64)
    fraction, z = tl.load(law.fraction + row), tl.load(s.z + row)
    share = fraction * canonical_weight(s, row, tl.maximum(tl.load(law.critical + row), 0))
    one = tl.sum(mass_sum(deferred, row, s.x.tiles, 1), 0)
    two = tl.sum(mass_sum(kept, row, s.x.tiles, 1), 0)
    one = tl.where(fraction > 0.0, one + share, one) / z
    tl.store(law.mass + row, tl.where(tl.load(law.valid + row), one, num.NAN))
    tl.store(law.kept + row, tl.where(fraction > 0.0, two - share, two) / z)


def sum_up(law: Law, rule: int, s: Softmax | None = None) -> Tensor:
    """The deferred and the kept mass, at the temperature of sampling or of ``s``; the first."""
    s, sums = s or law.p, scratch(law.mass, 2, law.p.x.programs)
    s.x.walk(masked_tiles, law, s, *sums, RULE=rule)
    launch(mass_rows, s.x.rows, law, s, *sums)
    return law.mass


@jit
def ask_tiles(law, mask, pi, best, kept, RULE: tl.constexpr):
    """What is asked of a tile: the set that the rule defers; pi; the largest pi; the largest, the
    next and the smallest logit that the rule keeps whole.
    """
    row, j, x = rows.tile(law.p.x)
    valid, at, vocab = tl.load(law.valid + row), tl.program_id(0), law.p.x.vocab
    if mask is not None:
        verdict = valid & rows.deferred(law, row, j, x, RULE)
        tl.store(mask + row * vocab + j, verdict, mask=j < vocab)
    if pi is not None:
        p = tl.where(valid, rows.policy(law, row, j, RULE), num.NAN)
        tl.store(pi + row * vocab + j, p, mask=j < vocab)
    if best is not None:
        p = tl.where(j < vocab, rows.policy(law, row, j, RULE), -1.0)
        tl.store(best + at, tl.max(p, 0))
    if kept is not None:
        keeps = (rows.mu(law, row, j, x, RULE) == 0.0) & (j < vocab)
        some = tl.where(keeps, x, -num.INFINITY)
        top = tl.max(some, 0)
        rest = tl.where(j == rows.first_of(some == top, j), -num.INFINITY, some)
        tl.store(kept[0] + at, top)
        tl.store(kept[1] + at, tl.max(rest, 0))
        tl.store(kept[2] + at, tl.min(tl.where(keeps, x, num.INFINITY), 0))


def ask(law: Law, rule: int, mask: Tensor | None = None, pi: Tensor | None = None,
        best: bool = False, kept: bool = False) -> Any:  # fmt: skip
    """Launch ask_tiles; returns the largest pi, or the logits kept, float32 ``[rows, tiles]``."""
    x = law.p.x
    found = scratch(x.data, 3, x.rows, x.tiles, dtype=torch.float32).unbind()
    launch(ask_tiles, x.programs, law, mask, pi, found[0] if best else None,
           found if kept else None, RULE=rule, num_warps=8)  # fmt: skip
    return found if kept else found[0]


@triton.jit
def most_probable(law, best, row, RULE: tl.constexpr):
    """The first token of a row that has the largest pi."""
    top, j = rows.best_tile(best, row, law.p.x.tiles)
    return rows.first_of(rows.policy(law, row, j, RULE) == top, j)


@triton.jit
def greedy(law, kept, row, RULE: tl.constexpr):
    """propose_greedy of cpu/rule.h: the most probable kept token, and whether q may change it."""
    p, tiles = law.p, law.p.x.tiles
    mass, fraction = tl.load(law.mass + row), tl.load(law.fraction + row)
    top, j = rows.best_tile(kept[0], row, tiles)
    x = logits(p.x, row, j)
    token = rows.first_of((rows.mu(law, row, j, x, RULE) == 0.0) & (x == top), j)
    # The next value: of its own tile, or another tile's largest.
    t = tl.arange(0, num.MAX_TILES)
    tops = tl.load(kept[0] + row * tiles + t, mask=t < tiles, other=-num.INFINITY)
    rest = tl.load(kept[1] + row * tiles + t, mask=t < tiles, other=-num.INFINITY)
    rest = tl.max(tl.where(t == token // num.TILE, rest, tops), 0)
    some, splits = top > -num.INFINITY, fraction > 0.0
    item = tl.load(law.critical + row)
    share = rows.probability(p, row, logits(p.x, row, tl.maximum(item, 0))).to(tl.float64)
    share = (1.0 - fraction) * share
    one = tl.where(some, rows.probability(p, row, top), 0.0)
    two = rows.probability(p, row, rest).to(tl.float64)
    two = tl.where(splits & some & (share > two), share, two)
    one = tl.where(splits & (some == 0), share.to(tl.float32), one)
    _, j = rows.best_tile(p.tile_top, row, tiles)
    fallback = rows.first_of(logits(p.x, row, j) == tl.load(p.top + row), j)
    fallback = tl.where(splits, item, fallback)
    ahead = (two + mass).to(tl.float32) < one
    needs = ((some | splits) == 0) | (ahead == 0)
    return tl.where(some, token, fallback), needs


@triton.jit
def judged(law, key, b, k, row, v, RULE: tl.constexpr):
    """Whether a token drawn from p is deferred, by a coin where the rule splits it."""
    share = rows.mu(law, row, v, logits(law.p.x, row, v), RULE)
    return (share == 1.0) | (rows.coin(key, b, k, rng.SPLIT) < share)
