"""What a user would write without this library: plain PyTorch chains, the baselines of every
ratio.
"""

from __future__ import annotations

import torch
from torch import Tensor


def probabilities(logits: Tensor) -> Tensor:
    """Softmax in float32 whatever the logits' dtype, as decoding code does."""
    return torch.softmax(logits, -1, dtype=torch.float32)


def knapsack_mask(p: Tensor, budget: float) -> Tensor:
    """Sort, running sum, scatter: the least likely tokens that together fit the budget."""
    ordered, index = p.sort(dim=-1, stable=True)
    taken = ordered.cumsum(-1) <= budget
    return torch.zeros_like(p, dtype=torch.bool).scatter(-1, index, taken)


def rule_mask(p: Tensor, q: Tensor | None, rule: str, param: float) -> Tensor:
    """Deferred tokens of the rules that the benchmarks run."""
    if rule == "knapsack":
        return knapsack_mask(p, param)
    if rule == "threshold":
        return p < param
    assert q is not None
    if rule == "confidence_bet":
        return p < q.amax(-1, keepdim=True) - param
    raise ValueError(f"no eager baseline of rule {rule!r}")


def deferral_mask(base: Tensor, proxy: Tensor, rule: str, param: float) -> Tensor:
    q = probabilities(proxy) if rule == "confidence_bet" else None
    return rule_mask(probabilities(base), q, rule, param)


def deferral_probs(base: Tensor, proxy: Tensor, rule: str, param: float) -> Tensor:
    """pi = (1 - mu) p + q D over the whole vocabulary."""
    p, q = probabilities(base), probabilities(proxy)
    deferred = torch.where(rule_mask(p, q, rule, param), p, 0.0)
    return p - deferred + q * deferred.sum(-1, keepdim=True)


def deferral_sample(base: Tensor, proxy: Tensor, rule: str, param: float) -> Tensor:
    return torch.multinomial(deferral_probs(base, proxy, rule, param), 1).squeeze(-1)


def deferral_propose(base: Tensor, rule: str, param: float) -> tuple[Tensor, Tensor]:
    p = probabilities(base)
    token = torch.multinomial(p, 1)
    deferred = rule_mask(p, None, rule, param).gather(-1, token)
    return token.squeeze(-1), deferred.squeeze(-1)


def deferral_stats(base: Tensor, proxy: Tensor, rule: str, param: float) -> Tensor:
    """Deferred mass alone."""
    p = probabilities(base)
    q = probabilities(proxy) if rule == "confidence_bet" else None
    return torch.where(rule_mask(p, q, rule, param), p, 0.0).sum(-1)


def deferral_verify(
    base: Tensor, proxy: Tensor, draft: Tensor, rule: str, param: float
) -> tuple[Tensor, Tensor]:
    """Speculative acceptance with dense pi at every position: accepted count and next token.

    The bonus position has no proxy row here and draws from p, which the baseline gets for free.
    """
    count = draft.shape[1]
    p, q = probabilities(base), probabilities(proxy)
    head = p[:, :count]
    deferred = torch.where(rule_mask(head, q, rule, param), head, 0.0)
    pi = head - deferred + q * deferred.sum(-1, keepdim=True)
    at = draft.unsqueeze(-1)
    ratio = (pi.gather(-1, at) / q.gather(-1, at)).squeeze(-1)
    accepted = (torch.rand_like(ratio) < ratio).long().cumprod(-1).sum(-1)
    residual = torch.cat([(pi - q).clamp(min=0), p[:, count:]], 1)
    row = residual[torch.arange(len(base)), accepted]
    return accepted, torch.multinomial(row, 1).squeeze(-1)


def implicit_reward_probs(base: Tensor, experts: Tensor, antis: Tensor, beta: Tensor) -> Tensor:
    steer = (beta[:, None, None] * (experts.float() - antis.float())).sum(0)
    return torch.softmax(base.float() + steer, -1)


def implicit_reward_sample(base: Tensor, experts: Tensor, antis: Tensor, beta: Tensor) -> Tensor:
    return torch.multinomial(implicit_reward_probs(base, experts, antis, beta), 1).squeeze(-1)


def categorical_sample(logits: Tensor) -> Tensor:
    return torch.multinomial(probabilities(logits), 1).squeeze(-1)


def greedy_knapsack(profit: Tensor, weight: Tensor, capacity: Tensor) -> Tensor:
    """Selection by falling density with torch.sort in float64, which is what makes it exact."""
    w = weight.double()
    item = (w > 0) & (w <= capacity)
    density = torch.where(item, profit.double() / w, -1.0)
    index = density.sort(dim=-1, descending=True, stable=True).indices
    used = torch.where(item, w, 0.0).gather(-1, index).cumsum(-1)
    taken = torch.zeros_like(item).scatter(-1, index, used <= capacity)
    return (taken & item) | (w == 0)


def greedy_knapsack_float32(profit: Tensor, weight: Tensor, capacity: Tensor) -> Tensor:
    """The same in float32: faster, and what most people would write."""
    item = (weight > 0) & (weight <= capacity)
    density = torch.where(item, profit / weight, -1.0)
    index = density.sort(dim=-1, descending=True, stable=True).indices
    used = torch.where(item, weight, 0.0).gather(-1, index).cumsum(-1)
    taken = torch.zeros_like(item).scatter(-1, index, used <= capacity)
    return (taken & item) | (weight == 0)


def prelogit_perturb(hidden: Tensor, u: Tensor, sigma: float, eps: Tensor) -> tuple[Tensor, Tensor]:
    """One step of n rollouts; the noise goes to ``eps`` and is kept for the update."""
    torch.randn(eps.shape, out=eps)
    return (hidden + (u + sigma * eps)).to(hidden.dtype), eps @ u


def importance_weights(
    reward: Tensor, dot: Tensor, norm2: Tensor, lam: float, alpha: float, sigma: float
) -> tuple[Tensor, Tensor]:
    slack = (1 - alpha) / sigma
    gain = (reward - reward.amax(-1, keepdim=True)) / lam
    weights = torch.softmax(gain - slack * dot - slack**2 / 2 * norm2, -1)
    return weights, 1 / weights.square().sum(-1)


def control_update(mean: Tensor, weights: Tensor, eps: Tensor, sigma: float) -> Tensor:
    """u + sigma sum_i w_i eps^i from the kept noise ``[tau, n, d]``."""
    return mean + sigma * torch.einsum("n,tnd->td", weights, eps)
