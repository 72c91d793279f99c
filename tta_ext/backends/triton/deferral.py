"""Deferral rules: mask, policy, statistics, and the token that a step emits.

Sampling judges the one token drawn: statistics, draw, verdict, and for the knapsack one masked sum
between them. What needs the whole set first resolves the rule to a cut (:mod:`cut`): mask, policy,
statistics, greedy choices.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tta_ext import rng, rules
from tta_ext.backends import reference
from tta_ext.backends.reference._common import KeyArguments
from tta_ext.backends.triton.cut import (
    CRITICAL,
    CRITICAL_X,
    FIELDS,
    INCLUDE,
    KNAPSACK,
    SPLIT,
    VALID,
    RuleArguments,
    canonical_weight,
    is_upper,
    judges_proxy,
    loads_proxy,
    plain,
    rule_threshold,
    split_fraction,
    valid_param,
)
from tta_ext.backends.triton.launch import (
    Rows,
    complain,
    factor,
    jit,
    launch,
    scratch,
)
from tta_ext.backends.triton.numerics import (
    INFINITY,
    double,
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
    masked_sums,
    policy_best,
    resolved,
    write_policy,
)
from tta_ext.backends.triton.rows import (
    Key,
    mass_sum,
    probability,
    row_max,
    row_pointer,
    row_sum,
    sample,
    stats,
    tiles_of,
)

SPLIT_TAG = tl.constexpr(rng.SPLIT)


# ---- mask, policy, statistics --------------------------------------------------------------------


@jit
def mask_tiles(judged, outer_stride, inner_stride, inner, limit, vocab, state, mask, critical,
               fraction, UPPER: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    blocks = tl.cdiv(vocab, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    j = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    first = row_pointer(judged, outer_stride, inner_stride, inner, row)
    x = tl.load(first + j, mask=j < vocab, other=-INFINITY).to(tl.float32)
    deferred, _, part = deferral_of(state, row, j, x)
    valid = tl.load(state + row * FIELDS + VALID) != 0.0
    tl.store(
        mask + row * vocab + j, tl.where(valid, flipped(deferred, UPPER), False), mask=j < vocab
    )
    if tl.program_id(0) % blocks == 0:
        item = tl.load(state + row * FIELDS + CRITICAL).to(tl.int64)
        share = part.to(tl.float32)
        if MODE == INCLUDE:
            share = tl.where(item >= 0, 1.0, 0.0)
        tl.store(critical + row, tl.where(valid, item, -2))
        tl.store(fraction + row, tl.where(valid, share, float("nan")))


@jit
def lowest_kept(data, outer_stride, inner_stride, inner, limit, vocab, judged, judged_outer,
                judged_inner, state, out, UPPER: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The smallest logit that a row keeps; +inf where it keeps none."""
    row = tl.program_id(0).to(tl.int64)
    base = row_pointer(data, outer_stride, inner_stride, inner, row)
    judge = row_pointer(judged, judged_outer, judged_inner, inner, row)
    low = tl.full((BLOCK,), INFINITY, tl.float32)
    for begin in range(0, vocab, BLOCK):
        j = begin + tl.arange(0, BLOCK)
        x = tl.load(base + j, mask=j < vocab, other=INFINITY).to(tl.float32)
        y = tl.load(judge + j, mask=j < vocab, other=INFINITY).to(tl.float32)
        deferred, _, _ = deferral_of(state, row, j, y)
        keeps = (flipped(deferred, UPPER) == 0) & (j < vocab)
        low = tl.where(keeps & (x < low), x, low)
    valid = tl.load(state + row * FIELDS + VALID) != 0.0
    least = (0.0 - tl.min(low, 0)) * -1.0  # of 0, -0: as the CPU has it
    tl.store(out + row, tl.where(valid, least, float("nan")))


def deferral_mask(base_logits: Tensor, proxy_logits: Tensor | None, *rest: Any, mask: Tensor,
                  critical_index: Tensor, fraction: Tensor) -> None:  # fmt: skip
    *given, check = rest
    r = resolved(base_logits, proxy_logits, RuleArguments(*given))
    x = r.judged
    launch(
        mask_tiles, x.rows * -(-x.vocab // BLOCK_SIZE), x.data, *x, r.state, mask, critical_index,
        fraction, UPPER=is_upper(r.rule.code), MODE=r.rule.critical, BLOCK=BLOCK_SIZE,
    )  # fmt: skip
    complain(check, critical_index == -2,
             lambda: reference.deferral_mask(base_logits, proxy_logits, *rest))  # fmt: skip


def deferral_probs(base_logits: Tensor, proxy_logits: Tensor, *rest: Any, out: Tensor) -> None:
    *given, check = rest
    r = resolved(base_logits, proxy_logits, RuleArguments(*given), reads_proxy=True)
    r.sums()
    write_policy(r, out)
    complain(check, r.state[:, VALID.value] == 0,
             lambda: reference.deferral_probs(base_logits, proxy_logits, *rest))  # fmt: skip


def deferral_stats(base_logits: Tensor, proxy_logits: Tensor | None, *rest: Any,
                   deferred_mass: Tensor, critical_index: Tensor, cut_logit: Tensor,
                   used: Tensor) -> None:  # fmt: skip
    *given, check = rest
    r = resolved(base_logits, proxy_logits, RuleArguments(*given))
    r.sums(deferred_mass)
    if r.inverse == factor(r.rule.rule_temperature):
        used.copy_(deferred_mass)
    else:
        r.sums(used, at_rule=True)
    invalid = r.state[:, VALID.value] == 0
    critical_index.copy_(torch.where(invalid, -2, r.state[:, CRITICAL.value]))
    if r.rule.code == rules.KNAPSACK:
        cut_logit.copy_(torch.where(invalid, torch.nan, r.state[:, CRITICAL_X.value]))
    else:
        launch(lowest_kept, r.base.rows, r.base.data, *r.base, *r.judged[:3], r.state, cut_logit,
               UPPER=is_upper(r.rule.code), BLOCK=BLOCK_SIZE)  # fmt: skip
    complain(check, invalid,
             lambda: reference.deferral_stats(base_logits, proxy_logits, *rest))  # fmt: skip


# ---- draws ---------------------------------------------------------------------------------------


@jit
def judge_rows(data, outer_stride, inner_stride, inner, limit, vocab,
               tile_max, rule_sum, proxy, proxy_stride, proxy_tile_max, proxy_rule_sum,
               through, before, param, param_stride, rule_inverse,
               seed, position, position_stride, sequence, sequence_stride, rollout, rollout_stride,
               iteration, token, deferred, RULE: tl.constexpr, MODE: tl.constexpr):  # fmt: skip
    """Whether the token drawn from p is deferred; -1 and no where the row has no law."""
    row = tl.program_id(0).to(tl.int64)
    tiles = tiles_of(vocab)
    v = tl.load(token + row)
    value = double(param, row * param_stride)
    valid = (v >= 0) & valid_param(value, RULE)
    v = tl.maximum(v, 0)
    x = tl.load(data + row * outer_stride + v).to(tl.float32)
    top = row_max(tile_max, row, tiles)
    z = row_sum(tile_max, rule_sum, row, tiles, top, rule_inverse)
    if RULE == KNAPSACK:
        bound = value * z
        within = mass_sum(through, row, tiles) <= bound
        if MODE == INCLUDE:
            within = mass_sum(before, row, tiles) <= bound
        if MODE == SPLIT:
            taken = mass_sum(before, row, tiles)
            weight = canonical_weight(tile_max, row, tiles, top, rule_inverse, x, v)
            coin = uniform(
                integer(seed, 0),
                row * 0,
                integer(position, row * position_stride),
                integer(sequence, row * sequence_stride),
                word3(SPLIT_TAG, iteration.to(tl.int64), integer(rollout, row * rollout_stride)),
            )
            part = coin < split_fraction(bound, taken, weight)
            within = within | ((taken <= bound) & part)
    else:
        if loads_proxy(RULE):
            proxy_top = row_max(proxy_tile_max, row, tiles)
            proxy_z = row_sum(proxy_tile_max, proxy_rule_sum, row, tiles, proxy_top, rule_inverse)
            valid = valid & (proxy_z == proxy_z)
            y = tl.load(proxy + row * proxy_stride + v).to(tl.float32)
        else:
            proxy_top, proxy_z, y = top, z, x
        threshold = rule_threshold(value, z, proxy_z, RULE)
        if judges_proxy(RULE):
            p = probability(y, proxy_top, rule_inverse, proxy_z).to(tl.float64)
        else:
            p = probability(x, top, rule_inverse, z).to(tl.float64)
        if is_upper(RULE):
            within = p > threshold
        else:
            within = p < threshold
    tl.store(token + row, tl.where(valid, v, -1))
    tl.store(deferred + row, within & valid)


@jit
def greedy_rows(data, outer_stride, inner_stride, inner, limit, vocab, judged, judged_stride,
                state, tile_max, inverse, first_x, first_id, second_x, best, best_id, blocks, token,
                deferred, UPPER: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    """The greedy token: of the base alone (propose), or, given ``best``, the argmax of pi."""
    row = tl.program_id(0).to(tl.int64)
    valid = tl.load(state + row * FIELDS + VALID) != 0.0
    if best is not None:
        v = best_of_row(best, best_id, row, blocks, BLOCKS)
        x = tl.load(judged + row * judged_stride + v).to(tl.float32)
        inside, _, _ = deferral_of(state, row, v, x)
        # A split item with the whole of its capacity left is deferred in full.
        _, at_split, fraction = deferral_of(state, row, v, x)
        flag = flipped(inside, UPPER) | (at_split & (fraction == 1.0))
    else:
        v, flag = greedy_row(data + row * outer_stride, vocab, state, row, tile_max, inverse,
                             first_x, first_id, second_x, blocks, BLOCKS)  # fmt: skip
    tl.store(token + row, tl.where(valid, v, -1))
    tl.store(deferred + row, flag & valid)


def _greedy(base_logits: Tensor, proxy_logits: Tensor | None, rule: RuleArguments,
            token: Tensor, deferred: Tensor) -> None:  # fmt: skip
    r = resolved(base_logits, proxy_logits, rule, reads_proxy=True)
    r.sums()
    alone = proxy_logits is None
    kept = kept_best(r) if alone else (None, None, None)
    best = (None, None) if alone else policy_best(r)
    x, blocks = r.base, -(-r.base.vocab // BLOCK_SIZE)
    launch(
        greedy_rows, x.rows, x.data, *x, *r.judged[:2], r.state, r.base_stats.tile_max, r.inverse,
        *kept, *best, blocks, token, deferred, UPPER=is_upper(rule.code),
        BLOCKS=triton.next_power_of_2(blocks),
    )  # fmt: skip


def _sampled(base_logits: Tensor, proxy_logits: Tensor | None, rule: RuleArguments,
             key: Key, token: Tensor, deferred: Tensor) -> None:  # fmt: skip
    rule, base = plain(base_logits, proxy_logits, rule), Rows.of(base_logits)
    inverse, rule_inverse = factor(rule.temperature), factor(rule.rule_temperature)
    s = stats(base, inverse, rule_inverse)
    sample(base, s, inverse, key, True, rng.BASE, 0, token)
    through = before = None
    if rule.code == rules.KNAPSACK:
        through, before = (scratch(base_logits, base.rows, base.tiles) for _ in range(2))
        launch(
            masked_sums, lambda sizes: base.rows * -(-base.tiles // sizes["T"]), base_logits, *base,
            *base[:3], None, token, s.tile_max, rule_inverse, through, before, base.work,
            UPPER=False,
        )  # fmt: skip
    early = rule.code in rules.NEEDS_PROXY
    proxy, q = None, None
    if proxy_logits is not None:
        proxy = Rows.of(proxy_logits)
        q = stats(proxy, inverse, rule_inverse) if early else None
    launch(
        judge_rows, base.rows, base_logits, *base, s.tile_max, s.rule_sum,
        *(proxy[:2] if proxy and early else (None, 0)), q.tile_max if q else None,
        q.rule_sum if q else None, through, before, *rule.per_row(), rule_inverse, *key, token,
        deferred, RULE=rule.code, MODE=rule.critical,
    )  # fmt: skip
    if proxy is not None:
        if q is None:
            q = stats(proxy, inverse, active=deferred)
        sample(proxy, q, inverse, key, True, rng.PROXY, 0, token, active=deferred)


def _choose(base_logits: Tensor, proxy_logits: Tensor | None, rest: tuple[Any, ...],
            token: Tensor, deferred: Tensor) -> None:  # fmt: skip
    rule, arguments, check = RuleArguments(*rest[:5]), KeyArguments(*rest[5:11]), rest[11]
    arguments.check(check)
    if arguments.do_sample:
        key = Key.of(*arguments[:5])
        _sampled(base_logits, proxy_logits, rule, key, token, deferred)
    else:
        _greedy(base_logits, proxy_logits, rule, token, deferred)


def deferral_propose(base_logits: Tensor, *rest: Any, token: Tensor, deferred: Tensor) -> None:
    _choose(base_logits, None, rest, token, deferred)
    complain(rest[-1], token < 0, lambda: reference.deferral_propose(base_logits, *rest))


def deferral_sample(base_logits: Tensor, proxy_logits: Tensor, *rest: Any, token: Tensor,
                    deferred: Tensor) -> None:  # fmt: skip
    _choose(base_logits, proxy_logits, rest, token, deferred)
    complain(rest[-1], token < 0,
             lambda: reference.deferral_sample(base_logits, proxy_logits, *rest))  # fmt: skip
