"""Speculative verification: keep the prefix of a proxy's draft that leaves the law pi intact.

Every position of every row is judged at once, by the kernels of deferral; then a program a row
walks along its draft to the first rejection, and draws.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tta_ext import rng, rules
from tta_ext.backends import reference
from tta_ext.backends.reference._common import KeyArguments, check_indices
from tta_ext.backends.triton.cut import (
    FIELDS,
    KEPT,
    MASS,
    PROXY_MAX,
    PROXY_VALID,
    PROXY_Z,
    TOP,
    VALID,
    RuleArguments,
    Z,
    is_upper,
    judges_proxy,
    loads_proxy,
)
from tta_ext.backends.triton.launch import complain, jit, launch, scratch
from tta_ext.backends.triton.numerics import (
    INFINITY,
    LANES,
    TILE,
    find_in_tile,
    fold,
    integer,
    uniform,
    word3,
)
from tta_ext.backends.triton.policy import (
    BLOCK_SIZE,
    best_of_row,
    deferral_of,
    flipped,
    greedy_row,
    kept_best,
    policy_best,
    resolved,
)
from tta_ext.backends.triton.rows import (
    Key,
    draw_row,
    groups_of,
    mass_sum,
    probability,
    row_pointer,
    tiles_of,
)

VERIFY, RESIDUAL = tl.constexpr(rng.VERIFY), tl.constexpr(rng.RESIDUAL)
BONUS, PROXY, SPLIT = tl.constexpr(rng.BONUS), tl.constexpr(rng.PROXY), tl.constexpr(rng.SPLIT)
# What a position makes of its draft token.
INVALID, ACCEPT, REJECT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def coin(seed, position, position_stride, sequence, sequence_stride, rollout, rollout_stride,
         iteration, b, k, TAG: tl.constexpr):  # fmt: skip
    """The uniform of row b, k tokens after its position."""
    return uniform(
        integer(seed, 0),
        b * 0,
        integer(position, b * position_stride) + k,
        integer(sequence, b * sequence_stride),
        word3(TAG, iteration.to(tl.int64), integer(rollout, b * rollout_stride)),
    )


@triton.jit
def draft_probability(data, state, row, v, inverse, AT: tl.constexpr, SUM: tl.constexpr):
    """fl32 p or q of a token."""
    here = state + row * FIELDS
    x = tl.load(data + v).to(tl.float32)
    return probability(x, tl.load(here + AT).to(tl.float32), inverse, tl.load(here + SUM))


@triton.jit
def deferred_share(base, proxy, state, row, v, UPPER: tl.constexpr, BY_PROXY: tl.constexpr):
    """mu(v), float64."""
    if BY_PROXY:
        x = tl.load(proxy + v).to(tl.float32)
    else:
        x = tl.load(base + v).to(tl.float32)
    inside, at_split, fraction = deferral_of(state, row, v, x)
    return tl.where(flipped(inside, UPPER), 1.0, tl.where(at_split, fraction, 0.0))


@jit
def judge_drafts(data, outer_stride, inner_stride, inner, limit, vocab,
                 proxy, proxy_outer, proxy_inner, draft, draft_outer, draft_inner, draft_length,
                 state, inverse, seed, position, position_stride, sequence, sequence_stride,
                 rollout, rollout_stride, iteration, best, best_id, blocks, verdict, chosen,
                 UPPER: tl.constexpr, BY_PROXY: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    """What position k makes of its draft token; greedy where ``best`` is given."""
    row = tl.program_id(0).to(tl.int64)
    b, k = row // inner, row % inner
    length = tl.load(draft_length + b)
    if k < tl.minimum(length, inner - 1):
        x = tl.load(draft + b * draft_outer + k * draft_inner)
        here = state + row * FIELDS
        valid = (tl.load(here + VALID) != 0.0) & (tl.load(here + PROXY_VALID) != 0.0)
        valid = valid & (x >= 0) & (x < vocab)
        v = tl.where(valid, x, 0)
        base = row_pointer(data, outer_stride, inner_stride, inner, row)
        other = row_pointer(proxy, proxy_outer, proxy_inner, inner, row)
        if best is not None:
            token = best_of_row(best, best_id, row, blocks, BLOCKS)
            accept = token == x
            tl.store(chosen + row, token)
        else:
            q = draft_probability(other, state, row, v, inverse, PROXY_MAX, PROXY_Z).to(tl.float64)
            p = draft_probability(base, state, row, v, inverse, TOP, Z).to(tl.float64)
            mu = deferred_share(base, other, state, row, v, UPPER, BY_PROXY)
            u = coin(seed, position, position_stride, sequence, sequence_stride, rollout,
                     rollout_stride, iteration, b, k, VERIFY)  # fmt: skip
            kept = (1.0 - mu) * p
            moved = tl.load(here + MASS) * q
            accept = (q > 0.0) & (u * q < kept + moved)
        tl.store(verdict + row, tl.where(valid, tl.where(accept, ACCEPT, REJECT), INVALID))


# ---- the residual law ----------------------------------------------------------------------------


@triton.jit
def power_of_two(exponent):
    """2^exponent as a float64."""
    return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def residual(base, proxy, state, row, j, vocab, inverse, UPPER: tl.constexpr,
             BY_PROXY: tl.constexpr):  # fmt: skip
    """max((1 - mu) p - (1 - D) q, 0) of tokens j, rounded once to float32."""
    here = state + row * FIELDS
    x = tl.load(base + j, mask=j < vocab, other=-INFINITY).to(tl.float32)
    y = tl.load(proxy + j, mask=j < vocab, other=-INFINITY).to(tl.float32)
    p = probability(x, tl.load(here + TOP).to(tl.float32), inverse, tl.load(here + Z))
    top, z = tl.load(here + PROXY_MAX).to(tl.float32), tl.load(here + PROXY_Z)
    q = probability(y, top, inverse, z).to(tl.float64)
    if BY_PROXY:
        inside, at_split, fraction = deferral_of(state, row, j, y)
    else:
        inside, at_split, fraction = deferral_of(state, row, j, x)
    kept = tl.where(flipped(inside, UPPER), 0.0, p.to(tl.float64))
    kept = tl.where(at_split, (1.0 - fraction) * p.to(tl.float64), kept)
    w = (kept - tl.load(here + KEPT) * q).to(tl.float32)
    return tl.where(w > 0.0, w, 0.0)


@jit
def residual_tiles(data, outer_stride, inner_stride, inner, limit, vocab,
                   proxy, proxy_outer, proxy_inner, draft_length, state, inverse, verdict,
                   mass, exponent, UPPER: tl.constexpr, BY_PROXY: tl.constexpr):  # fmt: skip
    """The residual's mass in each tile of the rejected positions, and the power of two that scales
    it to at most 1: a draw keeps its resolution however small the weights are.
    """
    tiles = tiles_of(vocab)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    t = tl.program_id(0) % tiles
    length = tl.load(draft_length + row // inner)
    if row % inner >= tl.minimum(length, inner - 1):
        return
    if tl.load(verdict + row) != REJECT:
        return
    base = row_pointer(data, outer_stride, inner_stride, inner, row)
    other = row_pointer(proxy, proxy_outer, proxy_inner, inner, row)
    most = tl.zeros((LANES,), tl.float32)
    for g in range(groups_of(vocab)):
        j = t * TILE + g * LANES + tl.arange(0, LANES)
        w = residual(base, other, state, row, j, vocab, inverse, UPPER, BY_PROXY)
        most = tl.where(w > most, w, most)
    most = tl.max(most, 0)
    raw = most.to(tl.float64).to(tl.int64, bitcast=True)
    e = tl.where(most > 0.0, ((raw >> 52) & 0x7FF) - 1022, 0)
    shrink = power_of_two(-e)
    lanes = tl.zeros((LANES,), tl.float32)
    for g in range(groups_of(vocab)):
        j = t * TILE + g * LANES + tl.arange(0, LANES)
        w = residual(base, other, state, row, j, vocab, inverse, UPPER, BY_PROXY)
        lanes = lanes + (w.to(tl.float64) * shrink).to(tl.float32)
    total = tl.sum(fold(lanes[None, :], 1), 0).to(tl.float64) * power_of_two(e)
    tl.store(mass + row * tiles + t, tl.where(most > 0.0, total, 0.0))
    tl.store(exponent + row * tiles + t, e)


@triton.jit
def draw_residual(base, proxy, state, row, vocab, tiles, inverse, mass, exponent, total, u,
                  UPPER: tl.constexpr, BY_PROXY: tl.constexpr):  # fmt: skip
    target = u * total
    before = tl.zeros((), tl.float64)
    found = tl.full((), -1, tl.int32)
    last = tl.full((), 0, tl.int32)
    for t in range(tiles):
        part = tl.load(mass + row * tiles + t)
        open_ = found < 0
        hit = open_ & (before + part > target)
        last = tl.where(open_ & (part > 0.0), t, last)
        found = tl.where(hit, t, found)
        before = tl.where(open_ & (hit == 0), before + part, before)
    target = tl.where(found < 0, INFINITY, target)
    t = tl.where(found < 0, last, found)
    e = tl.load(exponent + row * tiles + t)
    j = t * TILE + tl.arange(0, TILE)
    w = residual(base, proxy, state, row, j, vocab, inverse, UPPER, BY_PROXY)
    weight = (w.to(tl.float64) * power_of_two(-e)).to(tl.float32)
    return (t * TILE + find_in_tile(weight, power_of_two(e), before, target)).to(tl.int64)


# ---- the walk ------------------------------------------------------------------------------------


@jit
def walk_rows(data, outer_stride, inner_stride, inner, limit, vocab, proxy, proxy_outer,
              proxy_inner, draft, draft_outer, draft_inner, draft_length, state, inverse,
              tile_max, tile_sum, proxy_tile_max, proxy_tile_sum,
              seed, position, position_stride, sequence, sequence_stride, rollout, rollout_stride,
              iteration, verdict, chosen, residual_mass, exponent, first_x, first_id, second_x,
              best, best_id, blocks, accepted, token, deferred, mass,
              RULE: tl.constexpr, DO_SAMPLE: tl.constexpr, RETURN_MASS: tl.constexpr,
              BLOCKS: tl.constexpr):  # fmt: skip
    """From the first position to the first rejection, or to the token after the draft."""
    UPPER: tl.constexpr = is_upper(RULE)
    BY_PROXY: tl.constexpr = judges_proxy(RULE)
    NEEDS: tl.constexpr = loads_proxy(RULE)
    b = tl.program_id(0).to(tl.int64)
    tiles = tiles_of(vocab)
    length = tl.minimum(tl.maximum(tl.load(draft_length + b), 0), inner - 1)

    # Where it stops. A rejection with pi = q in floats is none, if q could have drawn the token.
    k = b * 0
    going = k < length
    while going:
        row = b * inner + k
        what = tl.load(verdict + row)
        onward = what == ACCEPT
        if DO_SAMPLE:
            if what == REJECT:
                here = state + row * FIELDS
                x = tl.load(draft + b * draft_outer + k * draft_inner)
                other = row_pointer(proxy, proxy_outer, proxy_inner, inner, row)
                q = draft_probability(other, state, row, x, inverse, PROXY_MAX, PROXY_Z)
                same = (tl.load(here + MASS) == 1.0) | (mass_sum(residual_mass, row, tiles) == 0.0)
                onward = same & (q > 0.0)
        if onward:
            if RETURN_MASS:
                tl.store(mass + row, tl.load(state + row * FIELDS + MASS))
            k += 1
        going = onward & (k < length)

    row = b * inner + k
    here = state + row * FIELDS
    base = row_pointer(data, outer_stride, inner_stride, inner, row)
    has_proxy = k < limit
    other = row_pointer(proxy, proxy_outer, proxy_inner, inner, tl.where(has_proxy, row, b * inner))
    top, z = tl.load(here + TOP).to(tl.float32), tl.load(here + Z)
    proxy_top, proxy_z = tl.load(here + PROXY_MAX).to(tl.float32), tl.load(here + PROXY_Z)
    proxy_valid = has_proxy & (tl.load(here + PROXY_VALID) != 0.0)
    v = b * 0 - 1
    by_proxy = b < 0
    if k < length:
        valid = tl.load(verdict + row) != INVALID
        if valid:
            if DO_SAMPLE:
                u = coin(seed, position, position_stride, sequence, sequence_stride, rollout,
                         rollout_stride, iteration, b, k, RESIDUAL)  # fmt: skip
                total = mass_sum(residual_mass, row, tiles)
                by_proxy = (tl.load(here + MASS) == 1.0) | (total == 0.0)
                if by_proxy:
                    v = draw_row(other, vocab, proxy_tile_max, proxy_tile_sum, row, tiles,
                                 proxy_top, proxy_z, inverse, u)  # fmt: skip
                else:
                    v = draw_residual(base, other, state, row, vocab, tiles, inverse,
                                      residual_mass, exponent, total, u, UPPER,
                                      BY_PROXY)  # fmt: skip
            else:
                v = tl.load(chosen + row)
                by_proxy = deferred_share(base, other, state, row, v, UPPER, BY_PROXY) == 1.0
    else:
        valid = tl.load(here + VALID) != 0.0
        if NEEDS:
            valid = valid & proxy_valid
        if valid:
            if DO_SAMPLE:
                u = coin(seed, position, position_stride, sequence, sequence_stride, rollout,
                         rollout_stride, iteration, b, k, BONUS)  # fmt: skip
                v = draw_row(base, vocab, tile_max, tile_sum, row, tiles, top, z, inverse, u)
                mu = deferred_share(base, other, state, row, v, UPPER, BY_PROXY)
                split = coin(seed, position, position_stride, sequence, sequence_stride, rollout,
                             rollout_stride, iteration, b, k, SPLIT)  # fmt: skip
                by_proxy = (mu == 1.0) | (split < mu)
            else:
                if NEEDS:
                    by_proxy = b >= 0
                else:
                    v, by_proxy = greedy_row(base, vocab, state, row, tile_max, inverse, first_x,
                                             first_id, second_x, blocks, BLOCKS)  # fmt: skip
            if by_proxy:
                v = b * 0 - 1
                if has_proxy:
                    valid = proxy_valid
                    if valid:
                        if DO_SAMPLE:
                            u = coin(seed, position, position_stride, sequence, sequence_stride,
                                     rollout, rollout_stride, iteration, b, k, PROXY)  # fmt: skip
                            v = draw_row(other, vocab, proxy_tile_max, proxy_tile_sum, row, tiles,
                                         proxy_top, proxy_z, inverse, u)  # fmt: skip
                        else:
                            v = best_of_row(best, best_id, row, blocks, BLOCKS)
                            share = deferred_share(base, other, state, row, v, UPPER, BY_PROXY)
                            by_proxy = share == 1.0
    tl.store(accepted + b, k)
    tl.store(token + b, tl.where(valid, v, -1))
    tl.store(deferred + b, by_proxy & valid)
    if RETURN_MASS:
        tl.store(mass + row, tl.load(here + MASS))
    if valid == 0:
        tl.store(mass + row, float("nan"))


def deferral_verify(base_logits: Tensor, proxy_logits: Tensor, draft: Tensor, draft_length: Tensor,
                    *rest: Any, accepted: Tensor, token: Tensor, deferred: Tensor,
                    mass: Tensor) -> None:  # fmt: skip
    rule, arguments = RuleArguments(*rest[:5]), KeyArguments(*rest[5:11])
    return_mass, check = rest[11:]
    batch, positions, vocab = base_logits.shape
    if check:
        arguments.check(True)
        check_indices("draft_length", draft_length, positions, True)
        in_draft = torch.arange(positions - 1, device=draft.device) < draft_length.unsqueeze(-1)
        check_indices("draft", torch.where(in_draft, draft, 0), vocab, True)
    mass.fill_(-1.0)
    if not batch:
        return
    if not proxy_logits.shape[1]:  # no draft and no row for the token after it: nothing is read
        proxy_logits = base_logits[:, :0]
    r = resolved(base_logits, proxy_logits, rule, reads_proxy=True, both=False)
    rule = r.rule
    r.sums()
    assert r.proxy is not None and r.proxy_stats is not None
    x, q, blocks = r.base, r.proxy, -(-vocab // BLOCK_SIZE)
    verdict = scratch(base_logits, x.rows, dtype=torch.int32)
    chosen = scratch(base_logits, x.rows, dtype=torch.int64)
    tiles = scratch(base_logits, x.rows, x.tiles), scratch(base_logits, x.rows, x.tiles,
                                                           dtype=torch.int64)  # fmt: skip
    flags = {"UPPER": is_upper(rule.code), "BY_PROXY": judges_proxy(rule.code)}
    best: tuple[Any, ...] = (None, None)
    kept: tuple[Any, ...] = (None, None, None)
    if not arguments.do_sample:
        best = policy_best(r)
        if rule.code not in rules.NEEDS_PROXY:
            kept = kept_best(r)
    width = triton.next_power_of_2(blocks)
    key = Key.of(*rest[5:10])
    drafts = draft, draft.stride(0), draft.stride(1), draft_length.contiguous()
    launch(
        judge_drafts, x.rows, base_logits, *x, *q[:3], *drafts, r.state, r.inverse, *key, *best,
        blocks, verdict, chosen, **flags, BLOCKS=width,
    )  # fmt: skip
    if arguments.do_sample:
        launch(
            residual_tiles, x.rows * x.tiles, base_logits, *x, *q[:3], drafts[3], r.state,
            r.inverse, verdict, *tiles, **flags,
        )  # fmt: skip
    launch(
        walk_rows, batch, base_logits, *x._replace(limit=q.limit), *q[:3], *drafts, r.state,
        r.inverse, *r.base_stats[:2], *r.proxy_stats[:2], *key, verdict, chosen, *tiles, *kept,
        *best, blocks, accepted, token, deferred, mass, RULE=rule.code,
        DO_SAMPLE=arguments.do_sample, RETURN_MASS=return_mass, BLOCKS=width,
        num_warps=8,
    )  # fmt: skip
    given = base_logits, proxy_logits, draft, draft_length, *rest
    complain(check, torch.isnan(mass).any(-1), lambda: reference.deferral_verify(*given))
