"""What the tests of noise on pre-logits and of their mean share: sizes, keys, noise in float64."""

from __future__ import annotations

from typing import Any

import torch
from cases import generator
from torch import Tensor

from tta_ext import ops
from tta_ext.backends import reference

P, N, TAU, D = 2, 6, 5, 23
SEED, SIGMA, ITERATION = 12, 0.37, 3
SEQUENCE = torch.tensor([11, 2**32 - 1])


def noise64() -> Tensor:
    """eps[P, N, TAU, D] in float64."""
    eps = torch.zeros(P, N, TAU, D, dtype=torch.float64)
    for p in range(P):
        for i in range(N):
            for t in range(TAU):
                eps[p, i, t] = reference.normal(
                    D,
                    torch.tensor(SEED),
                    t,
                    int(SEQUENCE[p]),
                    ITERATION,
                    i,
                    compute_dtype=torch.float64,
                )
    return eps


def control(seed: int = 0) -> Tensor:
    return torch.randn(P, TAU, D, generator=generator(seed)) * 0.5


ROW = torch.arange(P * N) // N
ROLLOUT = torch.arange(P * N) % N


def perturb(hidden: Tensor, mean: Tensor, step: int | Tensor, **kwargs: Any) -> Tensor:
    arguments: dict[str, Any] = {
        "row": ROW,
        "sequence": SEQUENCE[ROW],
        "rollout": ROLLOUT,
        "iteration": ITERATION,
        "sigma": SIGMA,
        "seed": SEED,
        **kwargs,
    }
    return ops.prelogit_perturb(hidden, mean, step=step, **arguments)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({4: torch.int32, 2: torch.int16}[x.element_size()])
