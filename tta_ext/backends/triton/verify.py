"""Speculative verification: keep the prefix of a proxy's draft that leaves the law pi intact.

Every position of every row is judged at once, by the kernels of deferral, and finds what it would
emit if the row stopped there; where a row stops follows from the verdicts of its positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tta_ext import rng, rules
from tta_ext.backends.reference._common import KeyArguments, RuleArguments
from tta_ext.backends.triton import numerics as num
from tta_ext.backends.triton import rows
from tta_ext.backends.triton import rule as resolution
from tta_ext.backends.triton.launch import Invalid, jit, launch, operator, outside, scratch

# What a position makes of its draft token; IMPOSSIBLE: rejects what q could not have drawn.
INVALID, ACCEPT = tl.constexpr(0), tl.constexpr(1)
REJECT, IMPOSSIBLE = tl.constexpr(2), tl.constexpr(3)


@triton.jit
def position_of(law, lengths):
    """For a program a position: its row of logits, its row and place, how long its row's draft is,
    and whether the proxy has a law there.
    """
    row, k = tl.program_id(0).to(tl.int64), tl.program_id(0) % law.p.x.inner
    b, z = row // law.p.x.inner, tl.load(law.q.z + row)
    length = tl.minimum(tl.maximum(tl.load(lengths + b), 0), law.p.x.inner - 1)
    return row, b, k, length, z == z


@jit
def judge_drafts(law, draft, lengths, best, seed, position, sequence, rollout, strides, iteration,
                 draw_number, verdict, RULE: tl.constexpr):  # fmt: skip
    """What a position makes of its draft token; greedy where ``best`` is given."""
    row, b, k, length, q_has_law = position_of(law, lengths)
    what = tl.full((), INVALID, tl.int32)
    if k < length:
        v = tl.load(draft + row - b)  # of [B, K] beside [B, K + 1]
        if tl.load(law.valid + row) & q_has_law & (v >= 0) & (v < law.p.x.vocab):
            if best is not None:
                same = resolution.most_probable(law, best, row, RULE) == v
                what = tl.where(same, ACCEPT, REJECT)
            else:
                key = seed, position, sequence, rollout, strides, iteration, draw_number
                kept, q = rows.parts(law, row, v, RULE)
                bar = rows.coin(key, b, k, rng.VERIFY) * q
                what = tl.where(bar < kept + tl.load(law.mass + row) * q, ACCEPT, REJECT)
                what = tl.where(q > 0.0, what, IMPOSSIBLE)
    tl.store(verdict + row, what)


@jit
def end_rows(law, lengths, verdict, left, best, kept, seed, position, sequence, rollout, strides,
             iteration, draw_number, token, deferred, masses, stands,
             RULE: tl.constexpr):  # fmt: skip
    """What a position emits if its row ends there: in place of its draft token, or after all of
    them; and whether it stands by that token, so that the row goes on.

    A token is -1 as well where q is to draw and has no row; a mass is NaN where all is invalid.
    """
    row, b, k, length, q_has_law = position_of(law, lengths)
    what, mass = tl.load(verdict + row), tl.load(law.mass + row)
    if (k > length) | (what == ACCEPT):
        tl.store(stands + row, k < length)
        tl.store(masses + row, mass)
        return
    bonus, stays = k == length, b < 0
    v, by_proxy = b * 0 - 1, b < 0
    valid = tl.where(bonus, tl.load(law.valid + row), what != INVALID)
    if valid:
        if left is not None:
            key = seed, position, sequence, rollout, strides, iteration, draw_number
            if bonus:
                top, z = tl.load(law.p.top + row), tl.load(law.p.z + row)
                v = rows.draw(law.p, None, row, top, z, rows.coin(key, b, k, rng.BONUS), RULE)
                by_proxy = resolution.judged(law, key, b, k, row, v, RULE)
            else:
                top, z = rows.total(left, law, row)
                by_proxy = (mass == 1.0) | (z == 0.0)  # pi = q in floats
                stays = by_proxy & (what == REJECT)
                if by_proxy == 0:
                    u = rows.coin(key, b, k, rng.RESIDUAL)
                    v = rows.draw(left, law, row, top, z, u, RULE)
            if by_proxy:
                v = b * 0 - 1
                if q_has_law:
                    u = rows.coin(key, b, k, tl.where(bonus, rng.PROXY, rng.RESIDUAL))
                    top, z = tl.load(law.q.top + row), tl.load(law.q.z + row)
                    v = rows.draw(law.q, None, row, top, z, u, RULE)
        else:
            by_proxy = b >= 0
            if kept is not None:
                if bonus:
                    v, by_proxy = resolution.greedy(law, kept, row, RULE)
            if by_proxy:
                v = b * 0 - 1
                if q_has_law:
                    v = resolution.most_probable(law, best, row, RULE)
                    by_proxy = rows.mu(law, row, v, rows.logits(law.p.x, row, v), RULE) == 1.0
        valid = valid & ((v >= 0) | (k >= law.q.x.limit))
    tl.store(token + row, v)
    tl.store(deferred + row, by_proxy & valid)
    tl.store(masses + row, tl.where(valid, mass, num.NAN))
    tl.store(stands + row, stays)


@operator
def deferral_verify(
    base_logits: Tensor, proxy_logits: Tensor, draft: Tensor, draft_length: Tensor,
    rule: RuleArguments, arguments: KeyArguments, return_mass: bool, check: bool, *,
    accepted: Tensor, token: Tensor, deferred: Tensor, mass: Tensor,
) -> Invalid:  # fmt: skip
    batch, positions, vocab = base_logits.shape
    at = torch.arange(positions, device=draft.device)

    def invalid() -> Tensor:
        last = arguments.position + (positions - 1) * arguments.do_sample
        wrong = torch.isnan(mass).any() | outside(draft_length, positions).any()
        wrong = wrong | (outside(draft, vocab) & (at[:-1] < draft_length.unsqueeze(-1))).any()
        return wrong | outside(last, rng.WORD).any().to(wrong.device)

    if not batch:
        return invalid
    if not proxy_logits.shape[1]:  # no draft and no row for the token after it: nothing is read
        proxy_logits = base_logits[:, :0]
    code, reads = rule.code, rule.code in rules.NEEDS_PROXY
    law = resolution.resolved(base_logits, proxy_logits, rule, both=reads)
    resolution.sum_up(law, code)
    x, key, lengths = law.p.x, rows.key_of(arguments), draft_length.contiguous()
    verdict = scratch(base_logits, x.rows, dtype=torch.int32)
    best = kept = left = None
    if not arguments.do_sample:
        best = resolution.ask(law, code, best=True)
        if not reads:
            kept = resolution.ask(law, code, kept=True)
    launch(judge_drafts, x.rows, law, draft.contiguous(), lengths, best, *key, verdict, RULE=code,
           num_warps=8)  # fmt: skip
    if arguments.do_sample:
        left = rows.Softmax.of(x, law.p.inverse, law, code, active=verdict >= REJECT.value)
    kinds = torch.int64, torch.bool, torch.float64, torch.bool
    ends = [x.data.new_zeros(batch, positions, dtype=kind) for kind in kinds]
    launch(end_rows, x.rows, law, lengths, verdict, left, best, kept, *key, *ends, RULE=code,
           num_warps=8)  # fmt: skip
    accepted.copy_(ends[3].to(torch.int64).cumprod(-1).sum(-1))
    end = accepted.unsqueeze(-1)
    token.copy_(ends[0].gather(-1, end).squeeze(-1))
    deferred.copy_(ends[1].gather(-1, end).squeeze(-1))
    told = at <= end if return_mass else (at == end) & ends[2].isnan()
    mass.copy_(torch.where(told, ends[2], -1.0))
    return invalid
