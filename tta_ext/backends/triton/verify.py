"""Speculative verification: keep the prefix of a proxy's draft that leaves the law pi intact.

Every position of every row is judged at once, by the kernels of deferral, and finds what it would
emit if the row stopped there; where a row stops follows from the verdicts of its positions.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from tta_ext import rng, rules
from tta_ext.backends.reference._common import KeyArguments, RuleArguments
from tta_ext.backends.triton import rows
from tta_ext.backends.triton import rule as resolution
from tta_ext.backends.triton.deferral import decide
from tta_ext.backends.triton.launch import Invalid, jit, launch, operator, outside

# What a position makes of its draft token; IMPOSSIBLE: rejects what q could not have drawn.
INVALID, ACCEPT = tl.constexpr(0), tl.constexpr(1)
REJECT, IMPOSSIBLE = tl.constexpr(2), tl.constexpr(3)


@jit
def judge_drafts(law, draft, token, seed, position, sequence, rollout, strides, iteration,
                 draw_number, verdict, RULE: tl.constexpr):  # fmt: skip
    """What a position makes of its draft token, INVALID of -1; greedy it wants what it emits."""
    row = tl.program_id(0).to(tl.int64)
    v, z = tl.load(draft + row), tl.load(law.q.z + row)
    what = tl.full((), INVALID, tl.int32)
    if tl.load(law.valid + row) & (z == z) & (v >= 0):
        if seed is None:
            what = tl.where(tl.load(token + row) == v, ACCEPT, REJECT)
        else:
            key = seed, position, sequence, rollout, strides, iteration, draw_number
            kept, q = rows.parts(law, row, v, RULE)
            bar = rows.coin(key, law.p.x, row, rng.VERIFY) * q
            what = tl.where(bar < kept + tl.load(law.mass + row) * q, ACCEPT, REJECT)
            what = tl.where(q > 0.0, what, IMPOSSIBLE)
    tl.store(verdict + row, what)


@operator
def deferral_verify(base_logits: Tensor, proxy_logits: Tensor, draft: Tensor, draft_length: Tensor,
                    rule: RuleArguments, arguments: KeyArguments, return_mass: bool, *,
                    accepted: Tensor, token: Tensor, deferred: Tensor,
                    mass: Tensor) -> Invalid:  # fmt: skip
    batch, positions, vocab = base_logits.shape
    at = torch.arange(positions, device=draft.device)

    def invalid() -> Tensor:
        last = arguments.position + (positions - 1) * arguments.do_sample
        wrong = torch.isnan(mass).any() | outside(draft_length, positions).any()
        wrong = wrong | (outside(draft, vocab) & (at[:-1] < draft_length.unsqueeze(-1))).any()
        return wrong | outside(last, rng.WORD).any().to(wrong.device)

    if not proxy_logits.shape[1]:  # no draft and no row for the token after it: nothing is read
        proxy_logits = base_logits[:, :0]
    reads, test = rule.code in rules.NEEDS_PROXY, resolution.test_of(rule)
    law = resolution.resolved(base_logits, proxy_logits, rule, both=reads)
    assert law.q is not None
    x, key, sampled = law.p.x, rows.key_of(arguments), arguments.do_sample
    kinds = torch.int64, torch.bool, torch.int32
    tokens, defers, verdict = (draft.new_zeros(batch, positions, dtype=kind) for kind in kinds)
    length = draft_length.clamp(0, positions - 1).unsqueeze(-1)
    bonus, drafted = at == length, torch.nn.functional.pad(draft, (0, 1), value=-1)
    drafted = drafted.masked_fill(outside(drafted, vocab) | (at >= length), -1)
    decide(law, rule, arguments, tokens, defers, kept=not reads, bonus=bonus)
    launch(judge_drafts, x.rows, law, drafted, tokens, *key, verdict, RULE=test)
    stands = verdict == ACCEPT.value
    if sampled:
        rejected = verdict >= REJECT.value
        left = rows.Softmax.of(x, law.p.inverse, law, test, active=rejected)
        rows.sample(left, key, rng.RESIDUAL, tokens, rejected, law, test)
        no_more = (law.mass == 1.0) | (left.z == 0.0)  # pi = q in floats
        defers = torch.where(rejected, no_more.view_as(rejected), defers & bonus)
        stands |= defers & (verdict == REJECT.value)
        rows.sample(law.q, key, torch.where(bonus, rng.PROXY, rng.RESIDUAL), tokens, active=defers)
    # q may have no row for the token after the drafts; a mass is NaN where all is invalid.
    valid = torch.where(bonus, law.valid.view_as(bonus), verdict != INVALID.value)
    valid &= (tokens >= 0) | (at >= law.q.x.limit)
    masses = torch.where(valid, law.mass.view_as(valid), torch.nan)
    accepted.copy_(stands.to(torch.int64).cumprod(-1).sum(-1))
    end = accepted.unsqueeze(-1)
    token.copy_(tokens.where(valid, -1).gather(-1, end).squeeze(-1))
    deferred.copy_((defers & valid).gather(-1, end).squeeze(-1))
    told = at <= end if return_mass else (at == end) & masses.isnan()
    mass.copy_(torch.where(told, masses, -1.0))
    return invalid
