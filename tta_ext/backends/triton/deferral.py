"""Deferral rules: mask, policy, statistics, and the token that a step emits.

Sampling judges the one token drawn: statistics, draw, verdict, and for the knapsack one masked sum
between them. What needs the whole set first resolves the rule to a cut (:mod:`cut`): mask, policy,
statistics, greedy choices.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from tta_ext import rng, rules
from tta_ext.backends.reference._common import KeyArguments, RuleArguments, inverse_temperature
from tta_ext.backends.triton import cut, policy, rows
from tta_ext.backends.triton import numerics as num
from tta_ext.backends.triton.launch import Rows, jit, launch, operator

Invalid = Callable[[], Tensor]
SPLIT_STREAM = tl.constexpr(rng.SPLIT)

# ---- mask, policy, statistics --------------------------------------------------------------------


def _read(proxy_logits: Tensor | None, rule: RuleArguments) -> Tensor | None:
    """The proxy's logits where the rule reads them."""
    return proxy_logits if rule.code in rules.NEEDS_PROXY else None


@triton.jit
def judging(law, row, v, x, RULE: tl.constexpr):
    """The logits by which a rule judges tokens."""
    if cut.judges_proxy(RULE):
        x = rows.logits(law.proxy, row, v)
    return x


@jit
def mask_tiles(law, mask, critical, fraction, RULE: tl.constexpr, MODE: tl.constexpr):
    row, j, x = policy.block_of(law.base)
    y = judging(law, row, j, x, RULE)
    valid = tl.load(law.state.valid + row)
    deferred = tl.where(valid, cut.inside(law, row, j, x, y, RULE), False)
    tl.store(mask + row * law.base.vocab + j, deferred, mask=j < law.base.vocab)
    if tl.program_id(0) % tl.cdiv(law.base.vocab, policy.BLOCK) == 0:
        item = tl.load(law.state.critical + row)
        share = tl.load(law.state.fraction + row)
        if MODE == cut.INCLUDE:
            share = tl.where(item >= 0, 1.0, share)
        tl.store(critical + row, tl.where(valid, item, -2))
        tl.store(fraction + row, tl.where(valid, share, float("nan")))


@operator
def deferral_mask(
    base_logits: Tensor, proxy_logits: Tensor | None, rule: RuleArguments, check: bool, *,
    mask: Tensor, critical_index: Tensor, fraction: Tensor,
) -> Invalid:  # fmt: skip
    r = cut.resolved(base_logits, _read(proxy_logits, rule), rule)
    x = r.law.base
    launch(mask_tiles, x.rows * policy.blocks_of(x), r.law, mask, critical_index, fraction,
           RULE=r.rule.code, MODE=rule.critical)  # fmt: skip
    return lambda: critical_index == -2


def _invalid(r: cut.Resolved) -> Tensor:
    return ~r.law.state.valid


@operator
def deferral_probs(
    base_logits: Tensor, proxy_logits: Tensor, rule: RuleArguments, check: bool, *, out: Tensor
) -> Invalid:
    r = cut.resolved(base_logits, proxy_logits, rule)
    x = r.law.base
    policy.sum_up(r)
    launch(policy.policy_tiles, x.rows * policy.blocks_of(x), r.law, out, None, RULE=r.rule.code)
    return lambda: _invalid(r)


@jit
def lowest_kept(law, out, RULE: tl.constexpr):
    """The smallest logit that a row keeps; +inf where it keeps none."""
    row = tl.program_id(0).to(tl.int64)
    low = tl.full((policy.BLOCK,), num.INFINITY, tl.float32)
    for begin in range(0, law.base.vocab, policy.BLOCK):
        j = begin + tl.arange(0, policy.BLOCK)
        x = rows.logits(law.base, row, j)
        deferred = cut.inside(law, row, j, x, judging(law, row, j, x, RULE), RULE)
        low = tl.where((deferred == 0) & (j < law.base.vocab) & (x < low), x, low)
    least = (0.0 - tl.min(low, 0)) * -1.0  # of 0, -0: as the CPU has it
    tl.store(out + row, tl.where(tl.load(law.state.valid + row), least, float("nan")))


@operator
def deferral_stats(
    base_logits: Tensor, proxy_logits: Tensor | None, rule: RuleArguments, check: bool, *,
    deferred_mass: Tensor, critical_index: Tensor, cut_logit: Tensor, used: Tensor,
) -> Invalid:  # fmt: skip
    r = cut.resolved(base_logits, _read(proxy_logits, rule), rule)
    state, invalid = r.law.state, _invalid(r)
    deferred_mass.copy_(policy.sum_up(r))
    same = rule.temperature == rule.rule_temperature
    used.copy_(deferred_mass if same else policy.sum_up(r, at_rule=True))
    critical_index.copy_(torch.where(invalid, -2, state.critical))
    if r.rule.code == rules.KNAPSACK:
        cut_logit.copy_(torch.where(invalid, torch.nan, state.critical_x))
    else:
        launch(lowest_kept, len(cut_logit), r.law, cut_logit, RULE=r.rule.code)
    return lambda: invalid


# ---- draws ---------------------------------------------------------------------------------------


@jit
def judge_rows(law, s, through, before, inverse, seed, position, sequence, rollout, strides,
               iteration, draw, token, deferred, RULE: tl.constexpr,
               MODE: tl.constexpr):  # fmt: skip
    """Whether the token drawn from p is deferred; -1 and no where the row has no law."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.load(token + row)
    valid = (v >= 0) & tl.load(law.state.valid + row)
    v = tl.maximum(v, 0)
    x = rows.logits(law.base, row, v)
    if RULE == cut.KNAPSACK:
        tiles = rows.tiles_of(law.base.vocab)
        bound, taken = tl.load(law.state.bound + row), rows.mass_sum(before, row, tiles)
        within = rows.mass_sum(through, row, tiles) <= bound
        if MODE == cut.INCLUDE:
            within = taken <= bound
        if MODE == cut.SPLIT:
            top = rows.row_max(s.tile_max, row, tiles)
            weight = cut.canonical_weight(s, row, tiles, top, inverse, x, v)
            key = seed, position, sequence, rollout, strides, iteration, draw
            u = rows.coin(key, row, 0, row * 0 + SPLIT_STREAM)
            within = within | ((taken <= bound) & (u < cut.split_fraction(bound, taken, weight)))
    else:
        within = cut.inside(law, row, v, x, judging(law, row, v, x, RULE), RULE)
    tl.store(token + row, tl.where(valid, v, -1))
    tl.store(deferred + row, within & valid)


@jit
def greedy_rows(law, s, kept, best, token, deferred, RULE: tl.constexpr, BLOCKS: tl.constexpr):
    """The greedy token: of the base alone (propose), or, given ``best``, the argmax of pi."""
    row = tl.program_id(0).to(tl.int64)
    if best is not None:
        _, v, _ = policy.best_of_row(best, row, law.base.vocab, BLOCKS)
        x = rows.logits(law.base, row, v)
        flag = cut.mu(law, row, v, x, judging(law, row, v, x, RULE), RULE) == 1.0
    else:
        v, flag = policy.greedy_row(law, s, row, kept, BLOCKS)
    valid = tl.load(law.state.valid + row)
    tl.store(token + row, tl.where(valid, v, -1))
    tl.store(deferred + row, flag & valid)


def _choose(base_logits: Tensor, proxy_logits: Tensor | None, rule: RuleArguments,
            arguments: KeyArguments, token: Tensor, deferred: Tensor) -> Invalid:  # fmt: skip
    sampled = arguments.do_sample
    early = _read(proxy_logits, rule) if sampled else proxy_logits
    r = cut.resolved(base_logits, early, rule, whole=not sampled)
    x, law, code = r.law.base, r.law, r.rule.code
    if sampled:
        key, sums = rows.Key.of(arguments), [None, None]
        rows.sample(x, r.base, law.inverse, key, rng.BASE, token)
        inverse = inverse_temperature(rule.rule_temperature)
        if code == rules.KNAPSACK:
            sums = list(policy.masses(r, token, inverse))
        launch(judge_rows, x.rows, law, r.base, *sums, inverse, *key, token, deferred, RULE=code,
               MODE=rule.critical)  # fmt: skip
        if proxy_logits is not None:
            proxy = Rows.of(proxy_logits)
            q = r.proxy or rows.stats(proxy, law.inverse, active=deferred)
            rows.sample(proxy, q, law.inverse, key, rng.PROXY, token, active=deferred)
    else:
        policy.sum_up(r)
        alone = proxy_logits is None
        found = policy.found_best(r, of_policy=not alone)
        kept, best = (found, None) if alone else (None, found)
        launch(greedy_rows, x.rows, law, r.base, kept, best, token, deferred, RULE=code,
               BLOCKS=triton.next_power_of_2(policy.blocks_of(x)))  # fmt: skip
    return lambda: token < 0


@operator
def deferral_propose(
    base_logits: Tensor, rule: RuleArguments, key: KeyArguments, check: bool, *,
    token: Tensor, deferred: Tensor,
) -> Invalid:  # fmt: skip
    return _choose(base_logits, None, rule, key, token, deferred)


@operator
def deferral_sample(
    base_logits: Tensor, proxy_logits: Tensor, rule: RuleArguments, key: KeyArguments, check: bool,
    *, token: Tensor, deferred: Tensor,
) -> Invalid:  # fmt: skip
    return _choose(base_logits, proxy_logits, rule, key, token, deferred)
