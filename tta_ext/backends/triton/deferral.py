"""Deferral rules: mask, policy, statistics, and the token that a step emits.

Sampling judges the one token drawn: statistics, draw, verdict, and for the knapsack two masked sums
between them. What needs the whole set first resolves the rule (:mod:`cut`): mask, policy,
statistics, greedy choices.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton.language as tl
from torch import Tensor

from tta_ext import rng, rules
from tta_ext.backends.reference._common import KeyArguments, RuleArguments
from tta_ext.backends.triton import cut, policy, rows
from tta_ext.backends.triton import law as laws
from tta_ext.backends.triton.launch import jit, launch, operator
from tta_ext.backends.triton.law import Rows, logits, tiles_of

Invalid = Callable[[], Tensor]


def _read(proxy_logits: Tensor | None, rule: RuleArguments) -> Tensor | None:
    """The proxy's logits where the rule reads them."""
    return proxy_logits if rule.code in rules.NEEDS_PROXY else None


@jit
def mask_tiles(law, mask, RULE: tl.constexpr):
    """The set that the rule defers; nothing in a row that is not valid."""
    row, j, x = laws.tile(law.p.x)
    verdict = tl.load(law.state.valid + row) & laws.deferred(law, row, j, x, RULE)
    tl.store(mask + row * law.p.x.vocab + j, verdict, mask=j < law.p.x.vocab)


@operator
def deferral_mask(
    base_logits: Tensor, proxy_logits: Tensor | None, rule: RuleArguments, check: bool, *,
    mask: Tensor, critical_index: Tensor, fraction: Tensor,
) -> Invalid:  # fmt: skip
    law = cut.resolved(base_logits, _read(proxy_logits, rule), rule)
    x, state = law.p.x, law.state
    launch(mask_tiles, x.rows * x.tiles, law, mask, RULE=rule.code, num_warps=8)
    critical_index.copy_(torch.where(state.valid, state.critical, -2))
    share = state.critical >= 0 if rule.critical == rules.INCLUDE else state.fraction
    fraction.copy_(torch.where(state.valid, share.double(), torch.nan))
    return lambda: ~state.valid


@operator
def deferral_probs(
    base_logits: Tensor, proxy_logits: Tensor, rule: RuleArguments, check: bool, *, out: Tensor
) -> Invalid:
    law = cut.resolved(base_logits, proxy_logits, rule)
    policy.sum_up(law, rule.code)
    x = law.p.x
    launch(policy.policy_tiles, x.rows * x.tiles, law, out, None, RULE=rule.code, num_warps=8)
    return lambda: ~law.state.valid


@operator
def deferral_stats(
    base_logits: Tensor, proxy_logits: Tensor | None, rule: RuleArguments, check: bool, *,
    deferred_mass: Tensor, critical_index: Tensor, cut_logit: Tensor, used: Tensor,
) -> Invalid:  # fmt: skip
    law = cut.resolved(base_logits, _read(proxy_logits, rule), rule)
    state = law.state
    deferred_mass.copy_(policy.sum_up(law, rule.code))
    same = law.rule_p is law.p
    used.copy_(deferred_mass if same else policy.sum_up(law, rule.code, law.rule_p))
    critical_index.copy_(torch.where(state.valid, state.critical, -2))
    if rule.code == rules.KNAPSACK:
        item = state.critical.clamp(min=0).unsqueeze(-1)
        x = base_logits.gather(-1, item).squeeze(-1).float()
        x = torch.where(state.critical < 0, torch.inf, x)
    else:
        x = policy.kept_logits(law, rule.code)[2].amin(-1)
        x = torch.where(x == 0.0, -0.0, x)  # as the CPU has it
    cut_logit.copy_(torch.where(state.valid, x, torch.nan))
    return lambda: ~state.valid


# ---- draws ---------------------------------------------------------------------------------------


@jit
def judge_rows(law, masses, seed, position, sequence, rollout, strides, iteration, draw_number,
               token, deferred, RULE: tl.constexpr, MODE: tl.constexpr):  # fmt: skip
    """Whether the token drawn from p is deferred; -1 and no where the row has no law."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.load(token + row)
    valid = (v >= 0) & tl.load(law.state.valid + row)
    v = tl.maximum(v, 0)
    x = logits(law.p.x, row, v)
    if RULE == rules.KNAPSACK:
        bound = tl.load(law.state.limit + row)
        sums = cut.mass_sum(masses, row, tiles_of(law.p.x.vocab), 2)
        before, through = tl.min(sums, 0), tl.max(sums, 0)
        verdict = through <= bound
        if MODE == rules.INCLUDE:
            verdict = before <= bound
        if MODE == rules.SPLIT:
            key = seed, position, sequence, rollout, strides, iteration, draw_number
            share = cut.split_fraction(law, row, v, x, before)
            verdict |= (before <= bound) & (rows.coin(key, row, 0, rng.SPLIT) < share)
    else:
        verdict = laws.deferred(law, row, v, x, RULE)
    tl.store(token + row, tl.where(valid, v, -1))
    tl.store(deferred + row, verdict & valid)


@jit
def greedy_rows(law, kept, best, token, deferred, RULE: tl.constexpr):
    """The greedy token: of the base alone (propose), or, given ``best``, the argmax of pi."""
    row = tl.program_id(0).to(tl.int64)
    if best is not None:
        v = policy.most_probable(law, best, row, RULE)
        flag = laws.mu(law, row, v, logits(law.p.x, row, v), RULE) == 1.0
    else:
        v, flag = policy.greedy(law, kept, row, RULE)
    valid = tl.load(law.state.valid + row)
    tl.store(token + row, tl.where(valid, v, -1))
    tl.store(deferred + row, flag & valid)


def _choose(base_logits: Tensor, proxy_logits: Tensor | None, rule: RuleArguments,
            arguments: KeyArguments, token: Tensor, deferred: Tensor) -> Invalid:  # fmt: skip
    code, sampled = rule.code, arguments.do_sample
    early = _read(proxy_logits, rule) if sampled else proxy_logits
    law = cut.resolved(base_logits, early, rule, whole=not sampled)
    if sampled:
        key = rows.Key.of(arguments)
        rows.sample(law.p, key, rng.BASE, token)
        masses = cut.before_token(law, token).mass if code == rules.KNAPSACK else None
        launch(judge_rows, law.p.x.rows, law, masses, *key, token, deferred, RULE=code,
               MODE=rule.critical)  # fmt: skip
        if proxy_logits is not None:
            proxy = Rows.of(proxy_logits)
            q = law.q or rows.statistics(proxy, law.p.inverse, active=deferred)
            rows.sample(q, key, rng.PROXY, token, active=deferred)
    else:
        policy.sum_up(law, code)
        alone = proxy_logits is None
        kept = policy.kept_logits(law, code) if alone else None
        best = None if alone else policy.best_of_policy(law, code)
        launch(greedy_rows, law.p.x.rows, law, kept, best, token, deferred, RULE=code, num_warps=8)
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
