"""Speculative verification: keep the prefix of a proxy's draft that leaves the law pi intact."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tta_ext import rng, rules
from tta_ext.backends.reference import _common as common
from tta_ext.backends.reference._common import KeyArguments, RuleArguments, Softmax, softmax
from tta_ext.backends.reference.deferral import (
    Screen,
    base_choice,
    deferred_mass,
    mixture,
    proxy_choice,
    row_param,
    screen,
)


class _Position(NamedTuple):
    """One position of every row, where the walk along the draft has got to."""

    s: Screen
    p: Softmax
    q: Softmax
    mass: Tensor
    key: KeyArguments


def _residual(at: _Position) -> Tensor:
    """max(pi - q, 0) = max((1 - mu) p - (1 - D) q, 0), the kept mass 1 - D summed directly."""
    kept = ((1.0 - at.s.mu) * at.p.weight).sum(-1, keepdim=True) / at.p.total
    return ((1.0 - at.s.mu) * at.p.prob - kept * at.q.prob).clamp(min=0.0)


def _accept_or_resample(at: _Position, draft: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Accept x if r < pi(x) / q(x); otherwise a token of the residual law."""
    q_x = common.pick(at.q.prob, draft)
    pi_x = (1.0 - common.pick(at.s.mu, draft)) * common.pick(at.p.prob, draft) + at.mass * q_x
    residual = _residual(at)
    empty = (residual.sum(-1) == 0) | (at.mass >= 1.0)
    r = at.key.uniform(q_x, rng.VERIFY)
    accepted = (q_x > 0) & ((r * q_x < pi_x) | empty)
    # A draft that the proxy could not have drawn, with pi = q: any token of q will do.
    law = torch.where(empty.unsqueeze(-1), at.q.weight, residual)
    token = common.draw(law, at.key.uniform(q_x, rng.RESIDUAL))
    return accepted, token, empty


def _bonus(
    at: _Position, has_proxy: bool, compute_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """A token of pi after the draft, whether it was deferred, and whether the proxy was read."""
    s, p, q, _, key = at
    token, deferred = base_choice(s, p, key, rng.BONUS, compute_dtype)
    if not has_proxy:
        return torch.where(deferred, -1, token), deferred, torch.zeros_like(deferred)
    token = torch.where(deferred, proxy_choice(s, p, q, key, compute_dtype), token)
    source = deferred if key.do_sample else common.pick(s.mu, token) == 1.0
    return token, source, deferred


@common.flat
def deferral_verify(
    base_logits: Tensor,
    proxy_logits: Tensor,
    draft: Tensor,
    draft_length: Tensor,
    rule: RuleArguments,
    key: KeyArguments,
    return_mass: bool,
    check: bool,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Accepted count, next token, deferred flag ``[B]`` and deferred mass ``[B, K+1]``."""
    batch, positions, vocabulary = base_logits.shape
    device = base_logits.device
    key.check(check)
    if key.do_sample:  # the k-th position is so many further on
        common.check_indices("position", key.position, rng.WORD - (positions - 1), check)
    common.check_indices("draft_length", draft_length, positions, check)
    in_draft = torch.arange(positions - 1, device=device) < draft_length.unsqueeze(-1)
    common.check_indices("draft", torch.where(in_draft, draft, 0), vocabulary, check)

    params = rule.param if rule.param.dim() == 2 else rule.param.reshape(-1, 1)
    params = params.to(device).expand(batch, positions)
    accepted = torch.zeros(batch, dtype=torch.int64, device=device)
    token = torch.full_like(accepted, -1)
    deferred = torch.zeros_like(accepted, dtype=torch.bool)
    mass = torch.full((batch, positions), -1.0, dtype=torch.float64, device=device)
    alive = torch.ones_like(deferred)

    for k in range(positions):
        drafted = alive & (k < draft_length)
        bonus = alive & (k >= draft_length)
        has_proxy = k < proxy_logits.shape[1]
        reads_proxy = has_proxy and rule.code in rules.NEEDS_PROXY
        here = torch.where(alive, params[:, k], 0.0)
        values = row_param(here, rule.code, batch, device, check)
        bad = torch.isnan(values).squeeze(-1) & alive
        place = f", position {k}"
        bad = bad | common.check_logits("base_logits", base_logits[:, k], check, alive, place)
        proxy_rows = proxy_logits[:, k] if has_proxy else torch.zeros_like(base_logits[:, k])
        read = (alive if reads_proxy else drafted) & has_proxy
        bad = bad | common.check_logits("proxy_logits", proxy_rows, check, read, place)

        base = common.usable(base_logits[:, k], bad | ~alive)
        unread = ~alive | common.invalid_rows(proxy_rows)
        proxy = common.usable(proxy_rows, unread)
        s = screen(base, proxy, rule._replace(param=values.nan_to_num(0.0)), compute_dtype)
        p = softmax(base, rule.temperature, compute_dtype)
        q = softmax(proxy, rule.temperature, compute_dtype)
        here_key = key._replace(position=key.position.to(device) + k)
        at = _Position(s, p, q, deferred_mass(s.mu, p), here_key)

        # The draft, where there is one at this position.
        if k < positions - 1:
            x = draft[:, k].clamp(0, vocabulary - 1)
            if key.do_sample:
                ok, other, from_proxy = _accept_or_resample(at, x)
            else:
                other = common.argmax(mixture(s.mu, p, q, compute_dtype))
                ok = other == x
                from_proxy = common.pick(s.mu, other) == 1.0
            stop = drafted & ~ok & ~bad
            token = torch.where(stop, other, token)
            deferred = torch.where(stop, from_proxy, deferred)
            accepted = accepted + (drafted & ok & ~bad)
        else:
            stop = torch.zeros_like(alive)

        # The token after a fully accepted draft.
        extra, from_proxy, asked = _bonus(at, has_proxy, compute_dtype)
        asked = asked & bonus & ~bad
        bad = bad | common.check_logits("proxy_logits", proxy_rows, check, asked, place)
        finish = bonus & ~bad
        token = torch.where(finish, extra, token)
        deferred = torch.where(finish, from_proxy, deferred)

        if return_mass:
            mass[:, k] = torch.where(alive, at.mass, mass[:, k])
        mass[:, k] = torch.where(alive & bad, torch.nan, mass[:, k])
        alive = alive & ~stop & ~bonus & ~bad
    return accepted, token, deferred, mass
