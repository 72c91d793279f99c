"""Calls of the operators with small good arguments, any of which a test replaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tta_ext import ops

B, V = 3, 8


def good() -> Tensor:
    return torch.zeros(B, V)


def sample(base: Any = None, proxy: Any = None, **kwargs: Any) -> ops.Proposal:
    arguments: dict[str, Any] = {
        "rule": "threshold",
        "param": 0.3,
        "seed": 1,
        "position": 0,
        **kwargs,
    }
    return ops.deferral_sample(
        good() if base is None else base, good() if proxy is None else proxy, **arguments
    )


def propose(base: Any = None, **kwargs: Any) -> ops.Proposal:
    arguments = {"rule": "threshold", "param": 0.3, "seed": 1, "position": 0, **kwargs}
    return ops.deferral_propose(good() if base is None else base, **arguments)


def mask(base: Any = None, proxy: Any = None, **kwargs: Any) -> ops.Mask:
    arguments = {"rule": "knapsack", "param": 0.3, **kwargs}
    return ops.deferral_mask(good() if base is None else base, proxy, **arguments)


def draw(logits: Any = None, **kwargs: Any) -> Tensor:
    return ops.categorical_sample(
        good() if logits is None else logits, **{"seed": 1, "position": 0, **kwargs}
    )


def verify(**kwargs: Any) -> ops.Verified:
    arguments: dict[str, Any] = {
        "base_logits": torch.zeros(B, 3, V),
        "proxy_logits": torch.zeros(B, 3, V),
        "draft": torch.zeros(B, 2, dtype=torch.int64),
        "draft_length": torch.full((B,), 2),
        "rule": "threshold",
        "param": 0.3,
        "seed": 1,
        "position": 0,
        **kwargs,
    }
    models = [arguments.pop(n) for n in ("base_logits", "proxy_logits", "draft", "draft_length")]
    return ops.deferral_verify(*models, **arguments)


def reward(**kwargs: Any) -> Tensor:
    arguments: dict[str, Any] = {
        "base": good(),
        "expert": torch.zeros(2, B, V),
        "anti": torch.zeros(2, B, V),
        "beta": torch.ones(2),
        **kwargs,
    }
    models = [arguments.pop(n) for n in ("base", "expert", "anti", "beta")]
    return ops.implicit_reward_probs(*models, **arguments)


def knapsack(**kwargs: Any) -> ops.Knapsack:
    arguments: dict[str, Any] = {
        "profit": torch.ones(B, V),
        "weight": torch.ones(B, V),
        "capacity": 2.0,
        **kwargs,
    }
    items = [arguments.pop(n) for n in ("profit", "weight", "capacity")]
    return ops.greedy_knapsack(*items, **arguments)


def perturb(**kwargs: Any) -> Tensor:
    arguments: dict[str, Any] = {
        "hidden": torch.zeros(B, V),
        "mean": torch.zeros(2, 4, V),
        "step": 0,
        "row": 0,
        "sequence": 0,
        "rollout": 0,
        "iteration": 0,
        "sigma": 1.0,
        "seed": 1,
        **kwargs,
    }
    tensors = [arguments.pop(n) for n in ("hidden", "mean")]
    return ops.prelogit_perturb(*tensors, **arguments)


def weights(**kwargs: Any) -> ops.Weights:
    arguments: dict[str, Any] = {
        "reward": torch.zeros(2, 4),
        "dot": torch.zeros(2, 4),
        "norm2": torch.zeros(2, 4),
        "lam": 1.0,
        "alpha": 0.5,
        "sigma": 1.0,
        **kwargs,
    }
    return ops.importance_weights(**arguments)


def update(**kwargs: Any) -> Tensor:
    arguments: dict[str, Any] = {
        "mean": torch.zeros(2, 4, V),
        "weights": torch.zeros(2, 5),
        "sigma": 1.0,
        "seed": 1,
        "iteration": 0,
        **kwargs,
    }
    tensors = [arguments.pop(n) for n in ("mean", "weights")]
    return ops.control_update(*tensors, **arguments)


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def spoiled(value: float, row: int = 2) -> Tensor:
    x = good()
    x[row, 5] = value
    return x


def hopeless(row: int = 1) -> Tensor:
    x = good()
    x[row] = -torch.inf
    return x


Case = tuple[Callable[[], Any], type[Exception], str]
