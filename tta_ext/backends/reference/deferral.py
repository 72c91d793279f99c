"""Deferral rules: which tokens of the base model are left to the proxy, and what that samples.

Plain PyTorch over dense ``[B, V]`` tensors on any device. ``compute_dtype=torch.float64`` makes it
the oracle of the tests. The argument order is that of the operators in :mod:`tta_ext.schemas`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tta_ext import rng, rules
from tta_ext.backends.reference import _common as common
from tta_ext.backends.reference._common import KeyArguments, RuleArguments, Softmax, softmax


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


def best(p: Softmax) -> Tensor:
    return p.prob.amax(-1, keepdim=True)


def total_variation(p: Softmax, q: Softmax) -> Tensor:
    return (p.prob - q.prob).clamp(min=0.0).sum(-1, keepdim=True)


# The tokens with mu = 1 under the rules but the knapsack: of base, proxy (for NEEDS_PROXY) and
# parameter.
MASKS: dict[int, Callable[[Softmax, Any, Tensor], Tensor]] = {
    # Tokens the base model finds unlikely.
    rules.THRESHOLD: lambda p, q, t: p.prob < t,
    # Tokens less likely than the proxy's best token is to the proxy.
    rules.CONFIDENCE_BET: lambda p, q, margin: p.prob < best(q) - margin,
    # All tokens, where the base model is unsure.
    rules.NUDGING: lambda p, q, t: (best(p) < t).expand_as(p.prob),
    # Tokens much less likely than the base model's best.
    rules.RELATIVE: lambda p, q, margin: p.prob < best(p) - margin,
    # All tokens but the base model's best.
    rules.ARGMAX: lambda p, q, _: p.prob < best(p),
    # Tokens the proxy finds less likely than the base model finds its best.
    rules.PROXY_BELOW: lambda p, q, margin: q.prob < best(p) + margin,
    # Tokens the proxy finds more likely than the base model finds its best.
    rules.PROXY_ABOVE: lambda p, q, margin: q.prob > best(p) + margin,
    # Tokens less likely than a share of the base model's best.
    rules.RELATIVE_RATIO: lambda p, q, share: p.prob < best(p) * (1.0 - share),
    # All tokens, where the proxy is surer than the base by more than a part of their distance.
    rules.OPTIMAL: lambda p, q, part: (best(p) < best(q) - part * total_variation(p, q)).expand_as(
        p.prob
    ),
}


def screen(
    base: Tensor, proxy: Tensor | None, rule: RuleArguments, compute_dtype: torch.dtype
) -> Screen:
    """Apply a rule to valid rows of logits. Its parameter is float64 ``[B, 1]``."""
    p = softmax(base, rule.rule_temperature, compute_dtype)
    if rule.code == rules.KNAPSACK:
        return knapsack(base, p, rule.param, rule.critical)
    q = None
    if rule.code in rules.NEEDS_PROXY:
        if proxy is None:
            raise ValueError(f"rule {rules.RULE_NAMES[rule.code]!r} needs proxy_logits")
        q = softmax(proxy, rule.rule_temperature, compute_dtype)
    mask = MASKS[rule.code](p, q, rule.param)
    nothing = torch.zeros(base.shape[0], dtype=torch.float64, device=base.device)
    no_item = torch.full_like(nothing, -1, dtype=torch.int64)
    return Screen(mask, no_item, nothing, mask.to(torch.float64))


def row_param(param: Tensor, rule: int, batch: int, device: torch.device, check: bool) -> Tensor:
    """The parameter as float64 ``[B, 1]``, NaN where it is unusable (with ``check``: an error)."""
    values = param.to(device=device, dtype=torch.float64).reshape(-1).expand(batch)
    bad = torch.isnan(values)
    if rule == rules.KNAPSACK:
        bad = bad | (values < 0)
    wanted = "a budget >= 0" if rule == rules.KNAPSACK else "a number"
    common.checked(bad, check, lambda i: f"param[{i}] is {float(values[i])}, expected {wanted}")
    return torch.where(bad, torch.nan, values).unsqueeze(-1)


def _screen_rows(
    base_logits: Tensor,
    proxy_logits: Tensor | None,
    rule: RuleArguments,
    check: bool,
    compute_dtype: torch.dtype,
    reads_proxy: bool = False,
) -> tuple[Tensor, Tensor | None, Screen, Tensor]:
    """Base and proxy ready for arithmetic, what the rule decides, and which rows are invalid.

    The proxy's rows are read (else None) if the rule or the caller wants them.
    """
    values = row_param(rule.param, rule.code, base_logits.shape[0], base_logits.device, check)
    invalid = common.check_logits("base_logits", base_logits, check)
    proxy = None
    if proxy_logits is not None and (reads_proxy or rule.code in rules.NEEDS_PROXY):
        bad = common.check_logits("proxy_logits", proxy_logits, check)
        invalid = invalid | bad
        proxy = common.usable(proxy_logits, bad)
    invalid = invalid | torch.isnan(values).squeeze(-1)
    base = common.usable(base_logits, invalid)
    rule = rule._replace(param=values.nan_to_num(0.0))
    return base, proxy, screen(base, proxy, rule, compute_dtype), invalid


@common.flat
def deferral_mask(
    base_logits: Tensor,
    proxy_logits: Tensor | None,
    rule: RuleArguments,
    check: bool,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask ``[B, V]``, critical item ``[B]`` and its deferred fraction ``[B]``."""
    _, _, s, invalid = _screen_rows(base_logits, proxy_logits, rule, check, compute_dtype)
    return (
        s.mask & ~invalid.unsqueeze(-1),
        torch.where(invalid, -2, s.critical),
        torch.where(invalid, torch.nan, s.fraction).to(torch.float32),
    )


def mixture(mu: Tensor, p: Softmax, q: Softmax, compute_dtype: torch.dtype) -> Tensor:
    """pi(v) = (1 - mu(v)) p(v) + q(v) D, float64 rounded to the compute dtype."""
    pi = (1.0 - mu) * p.prob + q.prob * deferred_mass(mu, p).unsqueeze(-1)
    return pi.to(compute_dtype).to(torch.float64)


def deferred_mass(mu: Tensor, p: Softmax) -> Tensor:
    """D = sum_v mu(v) p(v), float64 ``[B]``."""
    return (mu * p.weight).sum(-1) / p.total.squeeze(-1)


@common.flat
def deferral_probs(
    base_logits: Tensor,
    proxy_logits: Tensor,
    rule: RuleArguments,
    check: bool,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The law pi of the next token, ``[B, V]`` in the compute dtype."""
    base, proxy, s, invalid = _screen_rows(
        base_logits, proxy_logits, rule, check, compute_dtype, reads_proxy=True
    )
    assert proxy is not None
    p = softmax(base, rule.temperature, compute_dtype)
    q = softmax(proxy, rule.temperature, compute_dtype)
    pi = mixture(s.mu, p, q, compute_dtype)
    return torch.where(invalid.unsqueeze(-1), torch.nan, pi).to(compute_dtype)


@common.flat
def deferral_stats(
    base_logits: Tensor,
    proxy_logits: Tensor | None,
    rule: RuleArguments,
    check: bool,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Deferred mass, critical item, logit at the cut, mass at the rule's temperature."""
    base, _, s, invalid = _screen_rows(base_logits, proxy_logits, rule, check, compute_dtype)
    logits = base.to(torch.float32)
    if rule.code == rules.KNAPSACK:
        at_critical = common.pick(logits, s.critical.clamp(min=0))
        cut_logit = torch.where(s.critical >= 0, at_critical, torch.inf)
    else:
        cut_logit = torch.where(s.mask, torch.inf, logits).amin(-1)
    mass = deferred_mass(s.mu, softmax(base, rule.temperature, compute_dtype))
    used = deferred_mass(s.mu, softmax(base, rule.rule_temperature, compute_dtype))
    return (
        torch.where(invalid, torch.nan, mass),
        torch.where(invalid, -2, s.critical),
        torch.where(invalid, torch.nan, cut_logit),
        torch.where(invalid, torch.nan, used),
    )


def base_choice(
    s: Screen, p: Softmax, key: KeyArguments, stream: int, compute_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The base model's token, and whether the proxy decides in its place."""
    if not key.do_sample:
        return _greedy_choice(s, p, compute_dtype)
    # Draw v ~ p and reject it with probability mu(v).
    token = common.draw(p.weight, key.uniform(p.weight, stream))
    rejected = common.pick(s.mask, token)
    at_critical = (token == s.critical) & ~rejected
    split = at_critical & (key.uniform(p.weight, rng.SPLIT) < s.fraction)
    return token, rejected | split


def _greedy_choice(s: Screen, p: Softmax, compute_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The best kept token, and whether the proxy could still change the choice.

    pi differs from the kept mass by q D, which is at most D: a lead greater than D is final, where
    pi as it is rounded shows it.
    """
    kept = (1.0 - s.mu) * p.prob
    anything = (kept > 0).any(-1)
    token = torch.where(anything, common.argmax(kept), common.argmax(p.prob))
    others = kept.scatter(-1, token.unsqueeze(-1), 0.0).amax(-1)
    rivals = (others + deferred_mass(s.mu, p)).to(compute_dtype)
    final = common.pick(kept, token).to(compute_dtype) > rivals
    return token, ~(final & anything)


def proxy_choice(
    s: Screen, p: Softmax, q: Softmax, key: KeyArguments, compute_dtype: torch.dtype
) -> Tensor:
    """The token where the base model's is not final: drawn from q, or argmax pi."""
    if key.do_sample:
        return common.draw(q.weight, key.uniform(q.weight, rng.PROXY))
    return common.argmax(mixture(s.mu, p, q, compute_dtype))


@common.flat
def deferral_propose(
    base_logits: Tensor,
    rule: RuleArguments,
    key: KeyArguments,
    check: bool,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The base model's token, and whether the proxy is to be asked instead."""
    key.check(check)
    base, _, s, invalid = _screen_rows(base_logits, None, rule, check, compute_dtype)
    p = softmax(base, rule.temperature, compute_dtype)
    token, deferred = base_choice(s, p, key, rng.BASE, compute_dtype)
    return torch.where(invalid, -1, token), deferred & ~invalid


@common.flat
def deferral_sample(
    base_logits: Tensor,
    proxy_logits: Tensor,
    rule: RuleArguments,
    key: KeyArguments,
    check: bool,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """A token of law pi, and whether the base model's choice was deferred."""
    key.check(check)
    base, _, s, invalid = _screen_rows(base_logits, proxy_logits, rule, check, compute_dtype)
    p = softmax(base, rule.temperature, compute_dtype)
    token, deferred = base_choice(s, p, key, rng.BASE, compute_dtype)

    # The proxy's row is looked at only where the base model's choice is not final.
    read = deferred & ~invalid
    bad_proxy = common.check_logits("proxy_logits", proxy_logits, check, read)
    q = softmax(common.usable(proxy_logits, ~read | bad_proxy), rule.temperature, compute_dtype)
    token = torch.where(deferred, proxy_choice(s, p, q, key, compute_dtype), token)
    if not key.do_sample:
        deferred = common.pick(s.mu, token) == 1.0
    invalid = invalid | bad_proxy
    return torch.where(invalid, -1, token), deferred & ~invalid
