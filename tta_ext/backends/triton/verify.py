"""Speculative verification: keep the prefix of a proxy's draft that leaves the law pi intact.

Every position of every row is judged at once, by the kernels of deferral, and finds what it would
emit if the row stopped there; where a row stops follows from the verdicts of its positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tta_ext import rng, rules
from tta_ext.backends.reference._common import KeyArguments, RuleArguments
from tta_ext.backends.triton import cut, policy, rows
from tta_ext.backends.triton import law as laws
from tta_ext.backends.triton import numerics as num
from tta_ext.backends.triton.launch import jit, launch, operator, outside, scratch
from tta_ext.backends.triton.law import logits

# What a position makes of its draft token; IMPOSSIBLE: rejects what q could not have drawn.
INVALID, ACCEPT = tl.constexpr(0), tl.constexpr(1)
REJECT, IMPOSSIBLE = tl.constexpr(2), tl.constexpr(3)


class Draft(NamedTuple):
    """Draft tokens as kernels take them."""

    token: Tensor
    outer_stride: int
    inner_stride: int
    length: Tensor


@triton.constexpr_function
def reads_proxy(rule):
    return rule in rules.NEEDS_PROXY


@triton.jit
def length_of(law, draft, b):
    """How long the draft of row b is."""
    return tl.minimum(tl.maximum(tl.load(draft.length + b), 0), law.p.x.inner - 1)


@triton.jit
def has_law(s, row):
    z = tl.load(s.z + row)
    return z == z


@jit
def judge_drafts(law, draft, best, seed, position, sequence, rollout, strides, iteration,
                 draw_number, verdict, RULE: tl.constexpr):  # fmt: skip
    """What position k makes of its draft token; greedy where ``best`` is given."""
    row = tl.program_id(0).to(tl.int64)
    b, k = row // law.p.x.inner, row % law.p.x.inner
    what = tl.full((), INVALID, tl.int32)
    if k < length_of(law, draft, b):
        v = tl.load(draft.token + b * draft.outer_stride + k * draft.inner_stride)
        if tl.load(law.state.valid + row) & has_law(law.q, row) & (v >= 0) & (v < law.p.x.vocab):
            if best is not None:
                same = policy.most_probable(law, best, row, RULE) == v
                what = tl.where(same, ACCEPT, REJECT)
            else:
                key = seed, position, sequence, rollout, strides, iteration, draw_number
                kept, q = laws.parts(law, row, v, RULE)
                accepts = (
                    rows.coin(key, b, k, rng.VERIFY) * q < kept + tl.load(law.state.mass + row) * q
                )
                what = tl.where(accepts, ACCEPT, REJECT)
                what = tl.where(q > 0.0, what, IMPOSSIBLE)
    tl.store(verdict + row, what)


class Ends(NamedTuple):
    """What each position emits if the row ends there, ``[rows]``."""

    token: Tensor  # int64; -1 as well where q is to draw and has no row
    deferred: Tensor
    mass: Tensor  # float64; NaN: invalid
    stands: Tensor  # whether it keeps its draft token, and the row goes on


@jit
def end_rows(law, draft, verdict, left, best, kept, seed, position, sequence, rollout, strides,
             iteration, draw_number, ends, RULE: tl.constexpr):  # fmt: skip
    """What a position emits in place of its draft token, or after all of them."""
    row = tl.program_id(0).to(tl.int64)
    b, k = row // law.p.x.inner, row % law.p.x.inner
    length, what = length_of(law, draft, b), tl.load(verdict + row)
    if (k > length) | (what == ACCEPT):
        tl.store(ends.stands + row, k < length)
        tl.store(ends.mass + row, tl.load(law.state.mass + row))
        return
    bonus, mass = k == length, tl.load(law.state.mass + row)
    q_has_row, q_has_law = k < law.q.x.limit, has_law(law.q, row)
    v, by_proxy, stands = b * 0 - 1, b < 0, b < 0
    valid = tl.where(bonus, tl.load(law.state.valid + row), what != INVALID)
    if reads_proxy(RULE):
        valid = valid & q_has_law
    if valid:
        if left is not None:
            key = seed, position, sequence, rollout, strides, iteration, draw_number
            if bonus:
                top, z = tl.load(law.p.top + row), tl.load(law.p.z + row)
                v = rows.draw(law.p, None, row, top, z, rows.coin(key, b, k, rng.BONUS), RULE)
                share = laws.mu(law, row, v, logits(law.p.x, row, v), RULE)
                by_proxy = (share == 1.0) | (rows.coin(key, b, k, rng.SPLIT) < share)
            else:
                top, z = rows.total(left, law, row)
                by_proxy = (mass == 1.0) | (z == 0.0)  # pi = q in floats
                stands = by_proxy & (what == REJECT)
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
                    v, by_proxy = policy.greedy(law, kept, row, RULE)
            if by_proxy:
                v = b * 0 - 1
                if q_has_law:
                    v = policy.most_probable(law, best, row, RULE)
                    by_proxy = laws.mu(law, row, v, logits(law.p.x, row, v), RULE) == 1.0
        valid = valid & ((v >= 0) | (q_has_row == 0))
    tl.store(ends.token + row, v)
    tl.store(ends.deferred + row, by_proxy & valid)
    tl.store(ends.mass + row, tl.where(valid, mass, num.NAN))
    tl.store(ends.stands + row, stands)


@operator
def deferral_verify(
    base_logits: Tensor, proxy_logits: Tensor, draft: Tensor, draft_length: Tensor,
    rule: RuleArguments, arguments: KeyArguments, return_mass: bool, check: bool, *,
    accepted: Tensor, token: Tensor, deferred: Tensor, mass: Tensor,
) -> Callable[[], Tensor]:  # fmt: skip
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
    law, code = cut.resolved(base_logits, proxy_logits, rule, both=False), rule.code
    policy.sum_up(law, code)
    x, key = law.p.x, rows.Key.of(arguments)
    drafts = Draft(draft, draft.stride(0), draft.stride(1), draft_length.contiguous())
    verdict = scratch(base_logits, x.rows, dtype=torch.int32)
    best = kept = left = None
    if not arguments.do_sample:
        best = policy.best_of_policy(law, code)
        kept = None if code in rules.NEEDS_PROXY else policy.kept_logits(law, code)
    launch(judge_drafts, x.rows, law, drafts, best, *key, verdict, RULE=code, num_warps=8)
    if arguments.do_sample:
        rejected = verdict >= REJECT.value
        left = rows.statistics(x, law.p.inverse, law, code, active=rejected)
    kinds = torch.int64, torch.bool, torch.float64, torch.bool
    ends = Ends(*(x.data.new_zeros(batch, positions, dtype=kind) for kind in kinds))
    launch(end_rows, x.rows, law, drafts, verdict, left, best, kept, *key, ends, RULE=code,
           num_warps=8)  # fmt: skip
    accepted.copy_(ends.stands.to(torch.int64).cumprod(-1).sum(-1))
    end = accepted.unsqueeze(-1)
    token.copy_(ends.token.gather(-1, end).squeeze(-1))
    deferred.copy_(ends.deferred.gather(-1, end).squeeze(-1))
    told = at <= end if return_mass else (at == end) & ends.mass.isnan()
    mass.copy_(torch.where(told, ends.mass, -1.0))
    return invalid
