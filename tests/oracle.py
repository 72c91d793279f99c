"""Independent float64 answers, by sorting and enumeration, and what may differ from them.

A kernel in float32 may decide differently from float64 where the deciding number lies on the edge.
Each oracle therefore says which of its answers are ``certain``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tta_ext import rng

EDGE = 2.0**-20


def softmax64(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """exp((x - max) fl32(1/T)) / sum in float64."""
    x = logits.to(torch.float64)
    x = (x - x.amax(-1, keepdim=True)) * torch.tensor(1.0 / temperature).item()
    return torch.softmax(x, -1)


def greedy_order(logits: Tensor) -> Tensor:
    """Token ids of one row by ascending float32 logit, ties by ascending id."""
    return torch.argsort(logits.to(torch.float32) + 0.0, stable=True)


@dataclass
class Screen64:
    """mu of one batch in float64, and where it is certain."""

    p: Tensor
    mask: Tensor
    certain: Tensor
    mu: Tensor
    critical: Tensor


def _near(values: Tensor, edge: Tensor | float, level: Tensor | float = 0.0) -> Tensor:
    """Close, by the rounding of the values or of the level that the edge was computed from."""
    scale = values.abs()
    for other in (edge, level):
        scale = torch.maximum(scale, torch.as_tensor(other, dtype=torch.float64).abs())
    return (values - edge).abs() <= 16 * EDGE * scale


def variation(p: Tensor, q: Tensor) -> Tensor:
    """Total variation, as half the absolute differences: where both sum to one, that is it."""
    return (p - q).abs().sum(-1, keepdim=True) / 2


def screen64(base: Tensor, proxy: Tensor | None, kwargs: dict[str, Any]) -> Screen64:
    """Apply a rule given by the keyword arguments of the public functions."""
    rule, param = kwargs["rule"], kwargs.get("param")
    policy = kwargs.get("critical", "exclude")
    temperature = kwargs.get("rule_temperature") or kwargs.get("temperature", 1.0)
    p = softmax64(base, temperature)
    top = p.amax(-1, keepdim=True) if base.numel() else p[..., :1]
    critical = torch.full((base.shape[0],), -1, dtype=torch.int64)
    if rule != "knapsack":
        if proxy is not None:
            q = softmax64(proxy, temperature)
            top_q = q.amax(-1, keepdim=True) if base.numel() else q[..., :1]
        table = {
            "threshold": lambda: (p, param, p < param, 0.0),
            "confidence_bet": lambda: (p, top_q - param, p < top_q - param, top_q),
            "nudging": lambda: (top.expand_as(p), param, (top < param).expand_as(p), 0.0),
            "relative": lambda: (p, top - param, p < top - param, top),
            "argmax": lambda: (p, top, p < top, 0.0),
            "proxy_below": lambda: (q, top + param, q < top + param, top),
            "proxy_above": lambda: (q, top + param, q > top + param, top),
            "relative_ratio": lambda: (p, top * (1 - param), p < top * (1 - param), top),
            "optimal": lambda: (
                top.expand_as(p),
                top_q - param * variation(p, q),
                (top < top_q - param * variation(p, q)).expand_as(p),
                top_q,
            ),
        }
        values, edge, mask, level = table[rule]()
        certain = ~_near(values, edge, level)
        if rule == "argmax":
            certain |= base == base.amax(-1, keepdim=True) if base.numel() else certain
        return Screen64(p, mask, certain, mask.to(torch.float64), critical)

    budgets = torch.as_tensor(param, dtype=torch.float64).expand(base.shape[0])
    mask = torch.zeros_like(base, dtype=torch.bool)
    certain, mu = mask.clone(), torch.zeros_like(p)
    for b in range(base.shape[0]):
        budget = budgets[b]
        order = greedy_order(base[b])
        used = p[b][order].cumsum(0)
        taken = used <= budget
        if budget >= 1:
            taken[:] = True
        count = int(taken.sum())
        mask[b, order[:count]] = True
        certain[b, order] = ((used - budget).abs() > EDGE) | (budget >= 1)
        mu[b] = mask[b]
        if count < len(order):
            critical[b] = order[count]
            room = budget - (used[count - 1] if count else 0.0)
            fraction = (room / p[b, critical[b]]).clamp(0, 1)
            mu[b, critical[b]] = {"exclude": 0.0, "include": 1.0, "split": fraction}[policy]
            if policy == "include":
                mask[b, critical[b]] = True
                # Which item is critical hangs on the item before it, too.
                decided = certain[b, order]
                certain[b, order[1:]] &= decided[:-1]
    return Screen64(p, mask, certain, mu, critical)


def mixture64(base: Tensor, proxy: Tensor, mu: Tensor, temperature: float = 1.0) -> Tensor:
    """pi = (1 - mu) p + q D."""
    p, q = softmax64(base, temperature), softmax64(proxy, temperature)
    return (1 - mu) * p + q * (mu * p).sum(-1, keepdim=True)


def assert_probabilities(
    got: Tensor, want: Tensor, spread: float = 1.0, slack: float = 1e-37
) -> None:
    """Relative error as float32 allows it: rounding x = ln p costs |x| ulps of the result."""
    ulps = 16 + 4 * want.clamp(min=1e-40).log().abs() * spread
    bound = ulps * 2.0**-24 * want + slack
    worst = ((got.to(torch.float64) - want).abs() - bound).max() if got.numel() else got.sum()
    assert worst <= 0, f"probability off by {worst} more than the bound"


def uniform(
    seed: int,
    position: int,
    sequence: int,
    stream: int,
    draw: int = 0,
    iteration: int = 0,
    rollout: int = 0,
) -> float:
    """The uniform of a draw, by Philox4x32-10 in Python's integers."""
    most = 2**32 - 1
    c0, c1, c2, c3 = draw, position, sequence, rng.stream_word(stream, iteration, rollout)
    k0, k1 = rng.key(seed)
    for _ in range(10):
        one, other = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = other >> 32 ^ c1 ^ k0, other & most, one >> 32 ^ c3 ^ k1, one & most
        k0, k1 = k0 + 0x9E3779B9 & most, k1 + 0xBB67AE85 & most
    return c0 * 2.0**-32


def assert_drawn(token: int, law: Tensor, u: float) -> None:
    """The token is where the cumulative law passes u, up to the edge."""
    assert law[token] > 0, f"token {token} is impossible"
    below = float(law[:token].sum())
    assert below - EDGE <= u <= below + float(law[token]) + EDGE


def best_knapsack(profit: np.ndarray, weight: np.ndarray, capacity: int) -> float:
    """Optimal value by dynamic programming over integer weights."""
    best = np.zeros(capacity + 1)
    for value, size in zip(profit, weight.astype(int), strict=True):
        if size == 0:
            best += value
        elif size <= capacity:
            best[size:] = np.maximum(best[size:], best[:-size] + value)
    return float(best[capacity])
