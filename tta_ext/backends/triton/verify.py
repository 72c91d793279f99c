"""Speculative verification: keep the prefix of a proxy's draft that leaves the law pi intact.

Every position of every row is judged at once, by the kernels of deferral; then a program a row
walks along its draft to the first rejection, and draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tta_ext import rng
from tta_ext.backends.reference._common import KeyArguments, RuleArguments
from tta_ext.backends.triton import cut, policy, rows
from tta_ext.backends.triton import numerics as num
from tta_ext.backends.triton.launch import jit, launch, operator, outside, scratch

VERIFY, RESIDUAL = tl.constexpr(rng.VERIFY), tl.constexpr(rng.RESIDUAL)
BONUS, PROXY, SPLIT = tl.constexpr(rng.BONUS), tl.constexpr(rng.PROXY), tl.constexpr(rng.SPLIT)
# What a position makes of its draft token; IMPOSSIBLE: rejects what q could not have drawn.
INVALID, ACCEPT = tl.constexpr(0), tl.constexpr(1)
REJECT, IMPOSSIBLE = tl.constexpr(2), tl.constexpr(3)


class Draft(NamedTuple):
    """Draft tokens as kernels take them."""

    token: Tensor
    outer_stride: int
    inner_stride: int
    length: Tensor


@triton.jit
def length_of(law, draft, b):
    """How long the draft of row b is."""
    return tl.minimum(tl.maximum(tl.load(draft.length + b), 0), law.base.inner - 1)


@triton.jit
def share_of(law, row, v, RULE: tl.constexpr):
    """mu of one token."""
    return cut.mu(law, row, v, rows.logits(law.base, row, v), rows.logits(law.proxy, row, v), RULE)


@jit
def judge_drafts(law, draft, best, seed, position, sequence, rollout, strides, iteration, draw,
                 verdict, RULE: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    """What position k makes of its draft token; greedy where ``best`` is given."""
    row = tl.program_id(0).to(tl.int64)
    b, k = row // law.base.inner, row % law.base.inner
    if k < length_of(law, draft, b):
        x = tl.load(draft.token + b * draft.outer_stride + k * draft.inner_stride)
        state, vocab = law.state, law.base.vocab
        valid = tl.load(state.valid + row) & tl.load(state.proxy_valid + row)
        valid = valid & (x >= 0) & (x < vocab)
        v = tl.where(valid, x, 0)
        if best is not None:
            _, token, _ = policy.best_of_row(best, row, vocab, BLOCKS)
            what = tl.where(token == x, ACCEPT, REJECT)
        else:
            key = seed, position, sequence, rollout, strides, iteration, draw
            u = rows.coin(key, b, k, row * 0 + VERIFY)
            x, y = rows.logits(law.base, row, v), rows.logits(law.proxy, row, v)
            kept, q = policy.parts(law, row, v, x, y, RULE)
            moved = tl.load(state.mass + row) * q
            what = tl.where(u * q < kept + moved, ACCEPT, REJECT)
            what = tl.where(q > 0.0, what, IMPOSSIBLE)
        tl.store(verdict + row, tl.where(valid, what, INVALID))


# ---- the residual law ----------------------------------------------------------------------------


class Residual(NamedTuple):
    """Its mass in each tile, and the power of two that scales its weights there to at most 1: a
    draw keeps its resolution however small they are.
    """

    mass: Tensor
    exponent: Tensor


@triton.jit
def power_of_two(exponent):
    """2^exponent as a float64."""
    return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def residual(law, row, j, RULE: tl.constexpr):
    """max((1 - mu) p - (1 - D) q, 0) of tokens j, rounded once to float32."""
    kept, q = policy.parts(
        law, row, j, rows.logits(law.base, row, j), rows.logits(law.proxy, row, j), RULE
    )
    w = (kept - tl.load(law.state.kept + row) * q).to(tl.float32)
    return tl.where(w > 0.0, w, 0.0)


@jit
def residual_tiles(law, draft, verdict, out, RULE: tl.constexpr):
    """The residual in each tile of the rejected positions."""
    tiles = rows.tiles_of(law.base.vocab)
    row, t = rows.part(tiles)
    if row % law.base.inner >= length_of(law, draft, row // law.base.inner):
        return
    if tl.load(verdict + row) < REJECT:
        return
    begin = t * num.TILE + tl.arange(0, num.LANES)
    most = tl.zeros((num.LANES,), tl.float32)
    for g in range(rows.groups_of(law.base.vocab)):
        w = residual(law, row, begin + g * num.LANES, RULE)
        most = tl.where(w > most, w, most)
    most = tl.max(most, 0)
    raw = most.to(tl.float64).to(tl.int64, bitcast=True)
    e = tl.where(most > 0.0, ((raw >> 52) & 0x7FF) - 1022, 0)
    lanes = tl.zeros((num.LANES,), tl.float32)
    for g in range(rows.groups_of(law.base.vocab)):
        w = residual(law, row, begin + g * num.LANES, RULE)
        lanes = lanes + (w.to(tl.float64) * power_of_two(-e)).to(tl.float32)
    total = tl.sum(num.fold(lanes[None, :], 1), 0).to(tl.float64) * power_of_two(e)
    tl.store(out.mass + row * tiles + t, tl.where(most > 0.0, total, 0.0))
    tl.store(out.exponent + row * tiles + t, e)


@triton.jit
def draw_residual(law, row, left, total, u, RULE: tl.constexpr):
    tiles = rows.tiles_of(law.base.vocab)
    t, before, target = rows.find_tile(None, left.mass, row, tiles, 0.0, 0.0, u * total)
    e = tl.load(left.exponent + row * tiles + t)
    w = residual(law, row, t * num.TILE + tl.arange(0, num.TILE), RULE)
    weight = (w.to(tl.float64) * power_of_two(-e)).to(tl.float32)
    return (t * num.TILE + num.find_in_tile(weight, power_of_two(e), before, target)).to(tl.int64)


# ---- the walk ------------------------------------------------------------------------------------


@jit
def walk_rows(law, s, q, draft, verdict, left, best, kept, seed, position, sequence, rollout,
              strides, iteration, draw, accepted, token, deferred, mass, RULE: tl.constexpr,
              RETURN_MASS: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    """From the first position to the first rejection, or to the token after the draft."""
    b = tl.program_id(0).to(tl.int64)
    base, proxy, state = law.base, law.proxy, law.state
    tiles, first = rows.tiles_of(base.vocab), b * base.inner
    length = length_of(law, draft, b)

    # Where it stops. A rejection with pi = q in floats is none, if q could have drawn the token.
    k = b * 0
    going = k < length
    while going:
        row = first + k
        what = tl.load(verdict + row)
        onward = what == ACCEPT
        if left is not None:
            if what == REJECT:
                onward = tl.load(state.mass + row) == 1.0
                onward = onward | (rows.mass_sum(left.mass, row, tiles) == 0.0)
        if onward:
            if RETURN_MASS:
                tl.store(mass + row, tl.load(state.mass + row))
            k += 1
        going = onward & (k < length)

    row = first + k
    has_proxy = k < proxy.limit
    proxy_valid = has_proxy & tl.load(state.proxy_valid + row)
    v = b * 0 - 1
    by_proxy = b < 0
    if k < length:
        valid = tl.load(verdict + row) != INVALID
    else:
        valid = tl.load(state.valid + row)
        if cut.reads_proxy(RULE):
            valid = valid & proxy_valid
    if valid:
        if left is not None:
            key = seed, position, sequence, rollout, strides, iteration, draw
            if k < length:
                stream = b * 0 + RESIDUAL
                total = rows.mass_sum(left.mass, row, tiles)
                by_proxy = (tl.load(state.mass + row) == 1.0) | (total == 0.0)
                if by_proxy == 0:
                    v = draw_residual(law, row, left, total, rows.coin(key, b, k, stream), RULE)
            else:
                stream = b * 0 + PROXY
                u = rows.coin(key, b, k, b * 0 + BONUS)
                top, z = tl.load(state.top + row), tl.load(state.z + row)
                v = rows.draw_row(base, s, row, top, z, law.inverse, u)
                share = share_of(law, row, v, RULE)
                by_proxy = (share == 1.0) | (rows.coin(key, b, k, b * 0 + SPLIT) < share)
            if by_proxy:
                v = b * 0 - 1
                valid = valid & (proxy_valid | (has_proxy == 0))
                if proxy_valid:
                    top, z = (tl.load(state.proxy_top + row), tl.load(state.proxy_z + row))
                    u = rows.coin(key, b, k, stream)
                    v = rows.draw_row(proxy, q, row, top, z, law.inverse, u)
        else:
            by_proxy = b >= 0
            if k >= length:
                if not cut.reads_proxy(RULE):
                    v, by_proxy = policy.greedy_row(law, s, row, kept, BLOCKS)
            if by_proxy:
                v = b * 0 - 1
                valid = valid & (proxy_valid | (has_proxy == 0))
                if proxy_valid:
                    _, v, _ = policy.best_of_row(best, row, base.vocab, BLOCKS)
                    by_proxy = share_of(law, row, v, RULE) == 1.0
    tl.store(accepted + b, k)
    tl.store(token + b, tl.where(valid, v, -1))
    tl.store(deferred + b, by_proxy & valid)
    if RETURN_MASS:
        tl.store(mass + row, tl.load(state.mass + row))
    if valid == 0:
        tl.store(mass + row, float("nan"))


@operator
def deferral_verify(
    base_logits: Tensor, proxy_logits: Tensor, draft: Tensor, draft_length: Tensor,
    rule: RuleArguments, arguments: KeyArguments, return_mass: bool, check: bool, *,
    accepted: Tensor, token: Tensor, deferred: Tensor, mass: Tensor,
) -> Callable[[], Tensor] | None:  # fmt: skip
    batch, positions, vocab = base_logits.shape
    mass.fill_(-1.0)

    def invalid() -> Tensor:
        last = arguments.position + (positions - 1) * arguments.do_sample
        in_draft = torch.arange(positions - 1, device=draft.device) < draft_length.unsqueeze(-1)
        wrong = torch.isnan(mass).any() | outside(draft_length, positions).any()
        wrong = wrong | (outside(draft, vocab) & in_draft).any()
        return wrong | outside(last, rng.WORD).any().to(wrong.device)

    if not batch:
        return invalid
    if not proxy_logits.shape[1]:  # no draft and no row for the token after it: nothing is read
        proxy_logits = base_logits[:, :0]
    r = cut.resolved(base_logits, proxy_logits, rule, both=False)
    policy.sum_up(r)
    law, code, x = r.law, r.rule.code, r.law.base
    drafts = Draft(draft, draft.stride(0), draft.stride(1), draft_length.contiguous())
    verdict = scratch(base_logits, x.rows, dtype=torch.int32)
    best = kept = left = None
    if arguments.do_sample:
        exponent = scratch(base_logits, x.rows, x.tiles, dtype=torch.int64)
        left = Residual(scratch(base_logits, x.rows, x.tiles), exponent)
    else:
        best = policy.found_best(r, of_policy=True)
        kept = None if cut.reads_proxy(code) else policy.found_best(r, of_policy=False)
    key, width = rows.Key.of(arguments), triton.next_power_of_2(policy.blocks_of(x))
    launch(judge_drafts, x.rows, law, drafts, best, *key, verdict, RULE=code, BLOCKS=width)
    if left is not None:
        launch(residual_tiles, x.rows * x.tiles, law, drafts, verdict, left, RULE=code)
    launch(
        walk_rows, batch, law, r.base, r.proxy, drafts, verdict, left, best, kept, *key, accepted,
        token, deferred, mass, RULE=code, RETURN_MASS=return_mass, BLOCKS=width, num_warps=16,
    )  # fmt: skip
    return invalid
