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


def _read(proxy_logits: Tensor | None, rule: RuleArguments) -> Tensor | None:
    """The proxy's logits where the rule reads them."""
    return proxy_logits if rule.code in rules.NEEDS_PROXY else None


@operator
def deferral_mask(
    base_logits: Tensor, proxy_logits: Tensor | None, rule: RuleArguments, check: bool, *,
    mask: Tensor, critical_index: Tensor, fraction: Tensor,
) -> None:  # fmt: skip
    law = resolution.resolved(base_logits, _read(proxy_logits, rule), rule)
    resolution.ask(law, rule.code, mask=mask)
    critical_index.copy_(torch.where(law.valid, law.critical, -2))
    share = law.critical >= 0 if rule.critical == rules.INCLUDE else law.fraction
    fraction.copy_(torch.where(law.valid, share.double(), torch.nan))


@operator
def deferral_probs(
    base_logits: Tensor, proxy_logits: Tensor, rule: RuleArguments, check: bool, *, out: Tensor
) -> None:
    law = resolution.resolved(base_logits, proxy_logits, rule)
    resolution.sum_up(law, rule.code)
    resolution.ask(law, rule.code, pi=out)


@operator
def deferral_stats(
    base_logits: Tensor, proxy_logits: Tensor | None, rule: RuleArguments, check: bool, *,
    deferred_mass: Tensor, critical_index: Tensor, cut_logit: Tensor, used: Tensor,
) -> None:  # fmt: skip
    law = resolution.resolved(base_logits, _read(proxy_logits, rule), rule)
    deferred_mass.copy_(resolution.sum_up(law, rule.code))
    same = law.rule_p is law.p
    used.copy_(deferred_mass if same else resolution.sum_up(law, rule.code, law.rule_p))
    critical_index.copy_(torch.where(law.valid, law.critical, -2))
    if rule.code == rules.KNAPSACK:
        item = law.critical.clamp(0, base_logits.shape[1] - 1).unsqueeze(-1)
        x = base_logits.gather(-1, item).squeeze(-1).float()
        x = torch.where(law.critical < 0, torch.inf, x)
    else:
        x = resolution.ask(law, rule.code, kept=True)[2].amin(-1)
        x = torch.where(x == 0.0, -0.0, x)  # as the CPU has it
    cut_logit.copy_(torch.where(law.valid, x, torch.nan))


# ---- draws ---------------------------------------------------------------------------------------


@jit
def emit_rows(law, kept, best, seed, position, sequence, rollout, strides, iteration, draw_number,
              token, deferred, RULE: tl.constexpr):  # fmt: skip
    """A row's token, -1 where it has no law, and whether it is deferred: the token that was drawn
    from p or, greedy, the best kept one or, given ``best``, the argmax of pi.
    """
    row = tl.program_id(0).to(tl.int64)
    if seed is not None:
        v = tl.load(token + row)
        key = seed, position, sequence, rollout, strides, iteration, draw_number
        flag = (v >= 0) & resolution.judged(law, key, row, 0, row, tl.maximum(v, 0), RULE)
    elif best is not None:
        v = resolution.most_probable(law, best, row, RULE)
        flag = rows.mu(law, row, v, rows.logits(law.p.x, row, v), RULE) == 1.0
    else:
        v, flag = resolution.greedy(law, kept, row, RULE)
    valid = tl.load(law.valid + row)
    tl.store(token + row, tl.where(valid, v, -1))
    tl.store(deferred + row, flag & valid)


def _choose(base_logits: Tensor, proxy_logits: Tensor | None, rule: RuleArguments,
            arguments: KeyArguments, token: Tensor, deferred: Tensor) -> None:  # fmt: skip
    sampled, alone, kept, best = arguments.do_sample, proxy_logits is None, None, None
    early = _read(proxy_logits, rule) if sampled else proxy_logits
    law = resolution.resolved(base_logits, early, rule, whole=not sampled)
    key = rows.key_of(arguments)
    if sampled:
        rows.sample(law.p, key, rng.BASE, token)
        if rule.code == rules.KNAPSACK:
            resolution.search(law, rule, token)
    else:
        resolution.sum_up(law, rule.code)
        found = resolution.ask(law, rule.code, best=not alone, kept=alone)
        kept, best = (found, None) if alone else (None, found)
    launch(emit_rows, law.p.x.rows, law, kept, best, *key, token, deferred, RULE=rule.code,
           num_warps=8)  # fmt: skip
    if sampled and proxy_logits is not None:
        proxy = rows.Rows.of(proxy_logits)
        q = law.q or rows.Softmax.of(proxy, law.p.inverse, active=deferred)
        rows.sample(q, key, rng.PROXY, token, active=deferred)


@operator
def deferral_propose(
    base_logits: Tensor, rule: RuleArguments, key: KeyArguments, check: bool, *,
    token: Tensor, deferred: Tensor,
) -> None:  # fmt: skip
    _choose(base_logits, None, rule, key, token, deferred)


@operator
def deferral_sample(
    base_logits: Tensor, proxy_logits: Tensor, rule: RuleArguments, key: KeyArguments, check: bool,
    *, token: Tensor, deferred: Tensor,
) -> None:  # fmt: skip
    _choose(base_logits, proxy_logits, rule, key, token, deferred)
