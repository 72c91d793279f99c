"""Deferral rules: mask, policy, statistics, and the token that a step emits.

Sampling judges the one token drawn: statistics, draw, verdict, and for the knapsack one pass over
the row between them. Mask, policy, statistics and greedy choices need the whole set.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from tta_ext import rng, rules
from tta_ext.backends.reference._common import KeyArguments, RuleArguments
from tta_ext.backends.triton import rows
from tta_ext.backends.triton import rule as resolution
from tta_ext.backends.triton.launch import jit, launch, operator
from tta_ext.backends.triton.rows import Law


def _read(proxy_logits: Tensor | None, rule: RuleArguments) -> Tensor | None:
    """The proxy's logits where the rule reads them."""
    return proxy_logits if rule.code in rules.NEEDS_PROXY else None


@operator
def deferral_mask(base_logits: Tensor, proxy_logits: Tensor | None, rule: RuleArguments, *,
                  mask: Tensor, critical_index: Tensor, fraction: Tensor) -> None:  # fmt: skip
    law = resolution.resolved(base_logits, _read(proxy_logits, rule), rule)
    resolution.ask(law, rule, mask=mask)
    critical_index.copy_(torch.where(law.valid, law.critical, -2))
    share = law.critical >= 0 if rule.critical == rules.INCLUDE else law.fraction
    fraction.copy_(torch.where(law.valid, share.double(), torch.nan))


@operator
def deferral_probs(base_logits: Tensor, proxy_logits: Tensor, rule: RuleArguments, *,
                   out: Tensor) -> None:  # fmt: skip
    law = resolution.resolved(base_logits, proxy_logits, rule)
    resolution.sum_up(law, rule)
    resolution.ask(law, rule, pi=out)


@operator
def deferral_stats(base_logits: Tensor, proxy_logits: Tensor | None, rule: RuleArguments, *,
                   deferred_mass: Tensor, critical_index: Tensor, cut_logit: Tensor,
                   used: Tensor) -> None:  # fmt: skip
    law = resolution.resolved(base_logits, _read(proxy_logits, rule), rule)
    deferred_mass.copy_(resolution.sum_up(law, rule))
    used.copy_(deferred_mass if law.rule_p is law.p else resolution.sum_up(law, rule, law.rule_p))
    critical_index.copy_(torch.where(law.valid, law.critical, -2))
    if rule.code == rules.KNAPSACK:
        item = law.critical.clamp(0, base_logits.shape[1] - 1).unsqueeze(-1)
        x = base_logits.gather(-1, item).squeeze(-1).float()
        x = torch.where(law.critical < 0, torch.inf, x)
    else:
        x = resolution.ask(law, rule, lowest=True).amin(-1)
        x = torch.where(x == 0.0, -0.0, x)  # as the CPU has it
    cut_logit.copy_(torch.where(law.valid, x, torch.nan))


@jit
def emit_rows(law, kept, best, seed, position, sequence, rollout, strides, iteration, draw_number,
              token, deferred, RULE: tl.constexpr):  # fmt: skip
    """A row's token, -1 where it has no law, and whether it is deferred: the token that was drawn
    from p or, greedy, the argmax of pi or, without it or where q has no law, the best kept one.
    """
    row = tl.program_id(0).to(tl.int64)
    if seed is not None:
        v = tl.load(token + row)
        key = seed, position, sequence, rollout, strides, iteration, draw_number
        at = tl.maximum(v, 0)
        share = rows.mu(law, row, at, rows.logits(law.p.x, row, at), RULE)
        flag = (v >= 0) & ((share == 1.0) | (rows.coin(key, law.p.x, row, rng.SPLIT) < share))
    elif best is None:
        v, flag = resolution.greedy(law, kept, row, RULE)
    else:
        top, j, _ = rows.best_tile(best, row, law.p.x.tiles)
        v = rows.first_of(rows.policy(law, row, j, RULE) == top, j)
        flag = rows.mu(law, row, v, rows.logits(law.p.x, row, v), RULE) == 1.0
        if kept is not None:
            own, needs = resolution.greedy(law, kept, row, RULE)
            z = tl.load(law.q.z + row)
            v = tl.where(z == z, v, tl.where(needs, -1, own))
            flag = tl.where(z == z, flag, needs)
    valid = tl.load(law.valid + row)
    tl.store(token + row, tl.where(valid, v, -1))
    tl.store(deferred + row, flag & valid)


def decide(law: Law, rule: RuleArguments, arguments: KeyArguments, token: Tensor, deferred: Tensor,
           best: bool = True, kept: bool = True, bonus: Tensor | None = None) -> None:  # fmt: skip
    """Launch what chooses each row's token as emit_rows has it, or draws that of verification's
    ``bonus`` rows; a greedy choice asks for the best of pi, of what is kept, or both.
    """
    key, tops, logits = rows.key_of(arguments), None, None
    alone = arguments.do_sample and bonus is None  # one token's verdict needs no sums
    if not alone:
        resolution.sum_up(law, rule)
    if arguments.do_sample:
        rows.sample(law.p, key, rng.BASE if alone else rng.BONUS, token, bonus)
        if rule.code == rules.KNAPSACK and alone:
            resolution.search(law, rule, token)
    else:
        tops = resolution.ask(law, rule, best=True) if best else None
        logits = resolution.ask(law, rule, kept=True) if kept else None
    launch(emit_rows, law.p.x.rows, law, logits, tops, *key, token, deferred,
           RULE=resolution.test_of(rule), num_warps=16)  # fmt: skip


@operator
def deferral_propose(base_logits: Tensor, rule: RuleArguments, key: KeyArguments, *,
                     token: Tensor, deferred: Tensor) -> None:  # fmt: skip
    law = resolution.resolved(base_logits, None, rule, whole=not key.do_sample)
    decide(law, rule, key, token, deferred, best=False)


@operator
def deferral_sample(base_logits: Tensor, proxy_logits: Tensor, rule: RuleArguments,
                    key: KeyArguments, *, token: Tensor, deferred: Tensor) -> None:  # fmt: skip
    early = _read(proxy_logits, rule) if key.do_sample else proxy_logits
    law = resolution.resolved(base_logits, early, rule, whole=not key.do_sample)
    decide(law, rule, key, token, deferred, kept=False)
    if key.do_sample:
        proxy = rows.Rows.of(proxy_logits)
        q = law.q or rows.Softmax.of(proxy, law.p.inverse, active=deferred)
        rows.sample(q, rows.key_of(key), rng.PROXY, token, active=deferred)
        deferred &= token >= 0
