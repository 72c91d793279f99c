"""Gaussian noise on pre-logits, the weights of rollouts, and the update of the noise's mean.

The noise is a function of indices and is made anew wherever it is needed; nothing of size
rollouts x steps x dimensions is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tta_ext.backends.reference import _common as common
from tta_ext.backends.reference.philox import noise
from tta_ext.rng import ROLLOUTS


def _check_finite(name: str, values: Tensor, check: bool) -> Tensor:
    bad = ~torch.isfinite(values).all(-1)
    return common.checked(bad, check, lambda i: f"row {i} of {name} has NaN or inf")


def prelogit_perturb(
    hidden: Tensor,
    mean: Tensor,
    step: Tensor,
    row: Tensor,
    sequence: Tensor,
    rollout: Tensor,
    iteration: int,
    sigma: float,
    seed: Tensor,
    check: bool,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """hidden + u + sigma eps ``[N, d]``, and u . eps ``[N]`` of these steps."""
    count, dimensions = hidden.shape
    prompts, horizon, _ = mean.shape
    common.check_indices("step", step, 1 << 32, check)
    common.check_indices("row", row, prompts, check)
    common.check_indices("sequence", sequence, 1 << 32, check)
    common.check_indices("rollout", rollout, ROLLOUTS, check)
    step, row, sequence, rollout = (
        index.to(hidden.device).reshape(-1).expand(count)
        for index in (step, row, sequence, rollout)
    )
    inside = ((step < horizon) & (step >= 0)).unsqueeze(-1)
    control = mean[row.clamp(0, prompts - 1), step.clamp(0, horizon - 1)].to(compute_dtype)
    eps = noise(dimensions, seed, step, sequence, iteration, rollout, compute_dtype)
    perturbed = (hidden.to(compute_dtype) + (control + sigma * eps)).to(hidden.dtype)
    dot = torch.where(inside, control * eps, 0.0).to(torch.float64).sum(-1)
    return torch.where(inside, perturbed, hidden), dot.to(compute_dtype)


def importance_weights(
    reward: Tensor,
    dot: Tensor,
    norm2: Tensor,
    lam: float,
    alpha: float,
    sigma: float,
    check: bool,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """softmax(s) over the rollouts ``[P, n]``, and the effective sample size ``[P]``.

    s = (r - max r) / lambda - (1 - alpha) / sigma u.eps - (1 - alpha)^2 / (2 sigma^2) |u|^2
    """
    invalid = common.check_logits("reward", reward, check)
    invalid = invalid | _check_finite("dot", dot, check) | _check_finite("norm2", norm2, check)
    r = common.usable(reward, invalid).to(compute_dtype)
    if lam == 0:
        weights = torch.zeros_like(r).scatter(-1, common.argmax(r).unsqueeze(-1), 1.0)
    else:
        score = (r - r.amax(-1, keepdim=True)) / lam
        if sigma != 0:
            slack = (1.0 - alpha) / sigma
            penalty = slack * dot.to(compute_dtype) + 0.5 * slack * slack * norm2.to(compute_dtype)
            score = score - torch.where(invalid.unsqueeze(-1), 0.0, penalty)
        # A cost that overflows leaves nothing to compare, or no weight for anybody.
        undefined = (score.isnan() | (score == torch.inf)).any(-1) | ~score.isfinite().any(-1)
        invalid = invalid | common.checked(
            undefined & ~invalid,
            check,
            lambda i: f"row {i} of the scores is undefined or has no finite value",
        )
        weights = torch.softmax(score, dim=-1)
    ess = 1.0 / weights.square().sum(-1)
    return (
        torch.where(invalid.unsqueeze(-1), torch.nan, weights),
        torch.where(invalid, torch.nan, ess),
    )


def _pairwise(values: list[Tensor]) -> Tensor:
    """Sum by a balanced tree; the count is a power of two, so halves are subtrees."""
    while len(values) > 1:
        values = [a + b for a, b in zip(values[0::2], values[1::2], strict=True)]
    return values[0]


def control_update(
    mean: Tensor,
    weights: Tensor,
    length: Tensor | None,
    seed: Tensor,
    sequence: Tensor,
    iteration: int,
    sigma: float,
    start: int,
    stop: int,
    partial: bool,
    check: bool,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """u + sigma sum_i w_i eps^i ``[P, tau, d]``, or the bare sum over ``[start, stop)``.

    The sum over rollouts is a pairwise tree over the rollout index padded to a power of two, so an
    aligned range of rollouts is a subtree, and its sum can be computed elsewhere.
    """
    if not 0 <= start < stop <= ROLLOUTS:  # the tree below would have no end
        raise ValueError(f"rollouts {start} to {stop} are none of {ROLLOUTS}")
    prompts, horizon, dimensions = mean.shape
    count = weights.shape[1]
    common.check_indices("sequence", sequence, 1 << 32, check)
    _check_finite("weights", weights, check)
    steps = torch.arange(horizon, device=mean.device).expand(prompts, horizon)
    ids = sequence.to(mean.device).reshape(-1, 1).expand(prompts, horizon)

    def contribution(i: int) -> Tensor:
        if i >= count:
            return torch.zeros(mean.shape, dtype=compute_dtype, device=mean.device)
        rollout = torch.full_like(steps, i)
        eps = noise(dimensions, seed, steps, ids, iteration, rollout, compute_dtype)
        if length is not None:
            eps = torch.where((steps < length[:, i : i + 1]).unsqueeze(-1), eps, 0.0)
        return weights[:, i].to(compute_dtype).reshape(-1, 1, 1) * eps

    # A stack of finished subtrees (size, sum) keeps memory at log2(rollouts) sums.
    stack: list[tuple[int, Tensor]] = []
    padded = start + (1 << max(stop - start - 1, 0).bit_length())
    for i in range(start, padded):
        size, total = 1, contribution(i)
        while stack and stack[-1][0] == size:
            total = stack.pop()[1] + total
            size *= 2
        stack.append((size, total))
    total = stack[0][1]
    if partial:
        return total
    return control_merge(mean, total.unsqueeze(0), sigma, compute_dtype)


def control_merge(
    mean: Tensor,
    partials: Tensor,
    sigma: float,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """u + sigma times the sum of the partial sums ``[S, P, tau, d]``."""
    if sigma == 0:
        return mean.clone()
    return mean.to(compute_dtype) + sigma * _pairwise(list(partials.unbind(0)))
