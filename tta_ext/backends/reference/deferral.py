"""Deferral rules: which tokens of the base model are left to the proxy, and what that samples.

Plain PyTorch over dense ``[B, V]`` tensors on any device. ``compute_dtype=torch.float64`` makes it
the oracle of the tests. The argument order is that of the operators in :mod:`tta_ext.schemas`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tta_ext import rng, rules
from tta_ext.backends.reference import _common as common
from tta_ext.backends.reference._common import Softmax, softmax
from tta_ext.backends.reference.philox import uniform


class Screen(NamedTuple):
    """What a rule decides about every token of every row."""

    mask: Tensor  # [B, V] bool: tokens deferred for certain
    critical: Tensor  # [B] int64: the knapsack's first item not taken, -1 if none
    fraction: Tensor  # [B] float64: how much of the critical item is deferred
    mu: Tensor  # [B, V] float64: probability of deferral


def knapsack(base: Tensor, p: Softmax, budget: Tensor, critical: int) -> Screen:
    """The least likely tokens whose probabilities together stay within the budget.

    Token v is an item of weight p(v) and profit -p(v) log p(v). Its density -log p(v) falls as the
    logit grows, so greedy order is ascending logit.
    """
    everything = torch.ones_like(base, dtype=torch.bool)
    capacity = budget * p.total
    prefix = common.greedy_prefix(common.ascending_key(base), everything, p.weight, capacity)
    mask, fraction = prefix.taken, torch.zeros_like(prefix.used)
    mu = mask.to(torch.float64)
    exists = prefix.critical >= 0
    at = prefix.critical.clamp(min=0).unsqueeze(-1)
    if critical == rules.INCLUDE:
        fraction = exists.to(torch.float64)
        mask = mask.scatter(-1, at, mask.gather(-1, at) | exists.unsqueeze(-1))
        mu = mask.to(torch.float64)
    elif critical == rules.SPLIT:
        room = (capacity.squeeze(-1) - prefix.used) / common.pick(p.weight, at.squeeze(-1))
        fraction = torch.where(exists, room.clamp(0.0, 1.0), 0.0)
        mu = mu.scatter_add(-1, at, fraction.unsqueeze(-1))
    return Screen(mask, prefix.critical, fraction, mu)


def threshold(p: Softmax, t: Tensor) -> Tensor:
    """Tokens the base model finds unlikely."""
    return p.prob < t


def confidence_bet(p: Softmax, q: Softmax, margin: Tensor) -> Tensor:
    """Tokens less likely than the proxy's best token is to the proxy."""
    return p.prob < q.prob.amax(-1, keepdim=True) - margin


def nudging(p: Softmax, t: Tensor) -> Tensor:
    """All tokens, where the base model is unsure."""
    return (p.prob.amax(-1, keepdim=True) < t).expand_as(p.prob)


def relative(p: Softmax, margin: Tensor) -> Tensor:
    """Tokens much less likely than the base model's best."""
    return p.prob < p.prob.amax(-1, keepdim=True) - margin


def argmax_only(p: Softmax) -> Tensor:
    """All tokens but the base model's best."""
    return p.prob < p.prob.amax(-1, keepdim=True)


def proxy_below(p: Softmax, q: Softmax, margin: Tensor) -> Tensor:
    """Tokens the proxy finds less likely than the base model finds its best."""
    return q.prob < p.prob.amax(-1, keepdim=True) + margin


def proxy_above(p: Softmax, q: Softmax, margin: Tensor) -> Tensor:
    """Tokens the proxy finds more likely than the base model finds its best."""
    return q.prob > p.prob.amax(-1, keepdim=True) + margin


def screen(
    base: Tensor,
    proxy: Tensor | None,
    param: Tensor,
    rule: int,
    critical: int,
    rule_temperature: float,
    compute_dtype: torch.dtype,
) -> Screen:
    """Apply a rule to valid rows of logits. ``param`` is float64 ``[B, 1]``."""
    p = softmax(base, rule_temperature, compute_dtype)
    if rule == rules.KNAPSACK:
        return knapsack(base, p, param, critical)
    if rule == rules.THRESHOLD:
        mask = threshold(p, param)
    elif rule == rules.NUDGING:
        mask = nudging(p, param)
    elif rule == rules.RELATIVE:
        mask = relative(p, param)
    elif rule == rules.ARGMAX:
        mask = argmax_only(p)
    else:
        if proxy is None:
            raise ValueError(f"rule {rules.RULE_NAMES[rule]!r} needs proxy_logits")
        q = softmax(proxy, rule_temperature, compute_dtype)
        needs_proxy = {
            rules.CONFIDENCE_BET: confidence_bet,
            rules.PROXY_BELOW: proxy_below,
            rules.PROXY_ABOVE: proxy_above,
        }
        mask = needs_proxy[rule](p, q, param)
    nothing = torch.zeros(base.shape[0], dtype=torch.float64, device=base.device)
    no_item = torch.full_like(nothing, -1, dtype=torch.int64)
    return Screen(mask, no_item, nothing, mask.to(torch.float64))


def row_param(param: Tensor, rule: int, batch: int, device: torch.device, check: bool) -> Tensor:
    """The parameter as float64 ``[B, 1]``, NaN where it is unusable (with ``check``: an error)."""
    values = param.to(device=device, dtype=torch.float64).reshape(-1).expand(batch)
    bad = torch.isnan(values)
    if rule == rules.KNAPSACK:
        bad = bad | (values < 0)
    if check:
        wanted = "a budget >= 0" if rule == rules.KNAPSACK else "a number"
        common.raise_first(bad, lambda i: f"param[{i}] is {float(values[i])}, expected {wanted}")
    return torch.where(bad, torch.nan, values).unsqueeze(-1)


class _Inputs(NamedTuple):
    """Rows ready for arithmetic, and which of them are not to be believed."""

    base: Tensor
    proxy: Tensor | None
    param: Tensor
    invalid: Tensor


def _prepare(
    base_logits: Tensor,
    proxy_logits: Tensor | None,
    param: Tensor,
    rule: int,
    check: bool,
    reads_proxy: bool,
) -> _Inputs:
    values = row_param(param, rule, base_logits.shape[0], base_logits.device, check)
    invalid = common.check_logits("base_logits", base_logits, None, check)
    proxy = None
    if reads_proxy and proxy_logits is not None:
        bad = common.check_logits("proxy_logits", proxy_logits, None, check)
        invalid = invalid | bad
        proxy = common.usable(proxy_logits, bad)
    invalid = invalid | torch.isnan(values).squeeze(-1)
    return _Inputs(common.usable(base_logits, invalid), proxy, values.nan_to_num(0.0), invalid)


def deferral_mask(
    base_logits: Tensor,
    proxy_logits: Tensor | None,
    param: Tensor,
    rule: int,
    critical: int,
    temperature: float,
    rule_temperature: float,
    check: bool,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask ``[B, V]``, critical item ``[B]`` and its deferred fraction ``[B]``."""
    rows = _prepare(base_logits, proxy_logits, param, rule, check, rule in rules.NEEDS_PROXY)
    s = screen(rows.base, rows.proxy, rows.param, rule, critical, rule_temperature, compute_dtype)
    return (
        s.mask & ~rows.invalid.unsqueeze(-1),
        torch.where(rows.invalid, -2, s.critical),
        torch.where(rows.invalid, torch.nan, s.fraction).to(torch.float32),
    )


def mixture(mu: Tensor, p: Softmax, q: Softmax, compute_dtype: torch.dtype) -> Tensor:
    """pi(v) = (1 - mu(v)) p(v) + q(v) D, float64 rounded to the compute dtype."""
    pi = (1.0 - mu) * p.prob + q.prob * deferred_mass(mu, p).unsqueeze(-1)
    return pi.to(compute_dtype).to(torch.float64)


def deferred_mass(mu: Tensor, p: Softmax) -> Tensor:
    """D = sum_v mu(v) p(v), float64 ``[B]``."""
    return (mu * p.weight).sum(-1) / p.total.squeeze(-1)


def deferral_probs(
    base_logits: Tensor,
    proxy_logits: Tensor,
    param: Tensor,
    rule: int,
    critical: int,
    temperature: float,
    rule_temperature: float,
    check: bool,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The law pi of the next token, ``[B, V]`` in the compute dtype."""
    rows = _prepare(base_logits, proxy_logits, param, rule, check, True)
    assert rows.proxy is not None
    s = screen(rows.base, rows.proxy, rows.param, rule, critical, rule_temperature, compute_dtype)
    p = softmax(rows.base, temperature, compute_dtype)
    q = softmax(rows.proxy, temperature, compute_dtype)
    pi = mixture(s.mu, p, q, compute_dtype)
    return torch.where(rows.invalid.unsqueeze(-1), torch.nan, pi).to(compute_dtype)


def deferral_stats(
    base_logits: Tensor,
    proxy_logits: Tensor | None,
    param: Tensor,
    rule: int,
    critical: int,
    temperature: float,
    rule_temperature: float,
    check: bool,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Deferred mass, critical item, logit at the cut, mass at the rule's temperature."""
    rows = _prepare(base_logits, proxy_logits, param, rule, check, rule in rules.NEEDS_PROXY)
    s = screen(rows.base, rows.proxy, rows.param, rule, critical, rule_temperature, compute_dtype)
    logits = rows.base.to(torch.float32)
    if rule == rules.KNAPSACK:
        at_critical = common.pick(logits, s.critical.clamp(min=0))
        cut_logit = torch.where(s.critical >= 0, at_critical, torch.inf)
    else:
        cut_logit = torch.where(s.mask, torch.inf, logits).amin(-1)
    mass = deferred_mass(s.mu, softmax(rows.base, temperature, compute_dtype))
    used = deferred_mass(s.mu, softmax(rows.base, rule_temperature, compute_dtype))
    return (
        torch.where(rows.invalid, torch.nan, mass),
        torch.where(rows.invalid, -2, s.critical),
        torch.where(rows.invalid, torch.nan, cut_logit),
        torch.where(rows.invalid, torch.nan, used),
    )


class Key(NamedTuple):
    """Whose random numbers are drawn."""

    seed: Tensor
    position: Tensor
    sequence: Tensor
    iteration: int
    rollout: Tensor

    def uniform(self, like: Tensor, stream: int) -> Tensor:
        return uniform(like.shape[0], like.device, *self, stream)


def draw_base(base: Tensor, s: Screen, p: Softmax, key: Key, stream: int) -> tuple[Tensor, Tensor]:
    """Draw v ~ p and reject it with probability mu(v)."""
    token = common.draw(p.weight, key.uniform(base, stream))
    rejected = common.pick(s.mask, token)
    at_critical = (token == s.critical) & ~rejected
    split = at_critical & (key.uniform(base, rng.SPLIT) < s.fraction)
    return token, rejected | split


def greedy_base(s: Screen, p: Softmax, compute_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The best kept token, and whether the proxy could still change the choice.

    pi differs from the kept mass by q D, which is at most D: a lead greater than D is final.
    """
    kept = (1.0 - s.mu) * p.prob
    anything = (kept > 0).any(-1)
    token = torch.where(anything, common.argmax(kept), common.argmax(p.prob))
    others = kept.scatter(-1, token.unsqueeze(-1), 0.0).amax(-1)
    final = common.pick(kept, token) > others + deferred_mass(s.mu, p)
    return token, ~(final & anything)


def deferral_propose(
    base_logits: Tensor,
    param: Tensor,
    rule: int,
    critical: int,
    temperature: float,
    rule_temperature: float,
    seed: Tensor,
    position: Tensor,
    sequence: Tensor,
    iteration: int,
    rollout: Tensor,
    do_sample: bool,
    check: bool,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The base model's token, and whether the proxy is to be asked instead."""
    common.check_key(position, sequence, rollout, check)
    rows = _prepare(base_logits, None, param, rule, check, False)
    s = screen(rows.base, None, rows.param, rule, critical, rule_temperature, compute_dtype)
    p = softmax(rows.base, temperature, compute_dtype)
    if do_sample:
        key = Key(seed, position, sequence, iteration, rollout)
        token, deferred = draw_base(rows.base, s, p, key, rng.BASE)
    else:
        token, deferred = greedy_base(s, p, compute_dtype)
    return torch.where(rows.invalid, -1, token), deferred & ~rows.invalid


def deferral_sample(
    base_logits: Tensor,
    proxy_logits: Tensor,
    param: Tensor,
    rule: int,
    critical: int,
    temperature: float,
    rule_temperature: float,
    seed: Tensor,
    position: Tensor,
    sequence: Tensor,
    iteration: int,
    rollout: Tensor,
    do_sample: bool,
    check: bool,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """A token of law pi, and whether the base model's choice was deferred."""
    common.check_key(position, sequence, rollout, check)
    reads_all = rule in rules.NEEDS_PROXY
    rows = _prepare(base_logits, proxy_logits, param, rule, check, reads_all)
    s = screen(rows.base, rows.proxy, rows.param, rule, critical, rule_temperature, compute_dtype)
    p = softmax(rows.base, temperature, compute_dtype)
    key = Key(seed, position, sequence, iteration, rollout)
    if do_sample:
        token, deferred = draw_base(rows.base, s, p, key, rng.BASE)
    else:
        token, deferred = greedy_base(s, p, compute_dtype)

    # The proxy's row is looked at only where the base model's choice is not final.
    read = deferred & ~rows.invalid
    bad_proxy = common.check_logits("proxy_logits", proxy_logits, read, check)
    q = softmax(common.usable(proxy_logits, ~read | bad_proxy), temperature, compute_dtype)
    if do_sample:
        replacement = common.draw(q.weight, key.uniform(q.weight, rng.PROXY))
        token = torch.where(deferred, replacement, token)
    else:
        best = common.argmax(mixture(s.mu, p, q, compute_dtype))
        token = torch.where(deferred, best, token)
        deferred = common.pick(s.mu, token) == 1.0
    invalid = rows.invalid | bad_proxy
    return torch.where(invalid, -1, token), deferred & ~invalid
