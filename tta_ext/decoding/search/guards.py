"""What keeps AISP's u from going too far: bounds on it, and a pull back by the Fisher matrix.

The mean u of the noise adds w = W u to a step's logits, and to second order the divergence of the
moved law from the base's p is ``u . F u / 2`` with ``F u = W^T (p * w - p (p . w))``, half the
variance of w under p. With ``guard="fisher"`` an update is, as in MISVO,

    u <- u + eta (g - lambda sigma^2 F u),   g = sigma sum_i w_i eps_i

with F summed over an answer's steps. The weighted mean g of the noise is sigma^2 times the gradient
of log E exp(reward / lam), hence the sigma^2: lambda is nats of that for nats of divergence. F's
curvature is uneven: a few directions move the likely tokens' logits, most move none that count. A
step of that size may overshoot in the few and come out farther from the base than before, so it is
cut at the lowest divergence along its line (:func:`pull_back`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tta_ext.decoding.search.aisp_settings import KL_A_TOKEN, AISPSettings

__all__ = ["bounded", "pull_back"]


def pull_back(step: Tensor, bend: Tensor, sigma: float, coherence: float, lam: float) -> Tensor:
    """The guard's step ``lam sigma^2 F u``, cut where the divergence along it is lowest.

    With f a step's own F u, a move by ``-a sigma^2`` f changes that step's divergence by
    ``-a sigma^2 f . f + (a sigma^2)^2 f . F f / 2``. The part of u that all K steps have in common
    moves each by the sum of their f, taken here for K times its own: steps that pull in different
    directions make the cut shorter than it need be, never longer.

    Args:
        step: ``sigma^2 F u`` with each row's own standard deviation, float32 ``[P, rows, d]``.
        bend: sums over the steps of ``f . f`` and ``f . F f``, and their number, ``[P, 3]``.
        sigma: standard deviation of the noise in all.
        coherence: share of its variance that all steps have in common.
        lam: weight, 0 or more.
    """
    along, curvature, steps = bend.double().unbind(-1)
    reach = 1.0 - coherence + coherence * steps
    most = along / (sigma**2 * reach * curvature).clamp(min=torch.finfo(torch.float64).tiny)
    return step * most.clamp(max=lam).float().to(step.device)[:, None, None]


def bounded(
    mean: Tensor,
    kl: Sequence[float | None],
    lengths: Sequence[Sequence[int]],
    different: Sequence[int],
    settings: AISPSettings,
) -> Tensor:
    """u after the divergence budget, the watch over collapse and the norm cap.

    Args:
        mean: float32 ``[P, rows, d]``.
        kl: of each prompt, in nats an answer, where it was measured.
        lengths: of each prompt, the tokens of each answer on which it was measured.
        different: of each prompt, the number of different answers.
    """
    factor = torch.ones(len(kl), dtype=torch.float32, device=mean.device)
    for place, (value, tokens) in enumerate(zip(kl, lengths, strict=True)):
        if value is None:
            continue
        budget = settings.kl_budget
        if budget is None:
            budget = KL_A_TOKEN * sum(tokens) / len(tokens)
        if value > budget:
            factor[place] = math.sqrt(budget / value)
    if settings.distinct_low is not None:
        for place, count in enumerate(different):
            if count < settings.distinct_low * settings.n:
                factor[place] *= 0.5
    if settings.norm_cap is not None:
        norm = mean.double().square().sum((1, 2)).sqrt().float() * factor
        factor = torch.where(norm > settings.norm_cap, factor * settings.norm_cap / norm, factor)
    return mean * factor[:, None, None] if bool((factor != 1.0).any()) else mean
