"""Units of AISP's settings: what the noise and the reward are measured against."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["deviation", "head_row_norm", "lam_for_ess", "prelogit_scale"]


def deviation(row: Sequence[float]) -> float:
    """Population standard deviation of the finite values."""
    values = [value for value in row if math.isfinite(value)]
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


def lam_for_ess(rewards: Sequence[float], target: float) -> float:
    """The lambda at which ``softmax(rewards / lambda)`` has a given effective sample size.

    Args:
        rewards: finite values or -inf, at least one finite.
        target: effective sample size. If more rewards than that are tied at the top, or fewer than
            that are finite, the nearest that can be had.

    Returns:
        lambda > 0; 0.0 if all finite rewards are equal.
    """
    values = [value for value in rewards if math.isfinite(value)]
    highest = max(values)
    gaps = [value - highest for value in values]
    width = -min(gaps)
    if width == 0.0:
        return 0.0

    def ess(lam: float) -> float:
        weights = [math.exp(gap / lam) for gap in gaps]
        return sum(weights) ** 2 / sum(weight * weight for weight in weights)

    low, high = math.log(width) - 14.0, math.log(width) + 14.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        if ess(math.exp(middle)) < target:
            low = middle
        else:
            high = middle
    return math.exp(0.5 * (low + high))


@torch.inference_mode()
def prelogit_scale(model: Any) -> float:
    """Root mean square of a model's pre-logits, over a fixed set of random tokens.

    The final normalisation of language models makes it much the same for any text.
    """
    head = model.get_output_embeddings()
    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(size, (4, 32), generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    try:
        model(input_ids=ids.to(model.get_input_embeddings().weight.device), use_cache=False)
    finally:
        handle.remove()
    if not seen:
        raise ValueError(f"{type(model).__name__} does not call its output embeddings as a module")
    return float(seen[0].double().square().mean().sqrt())


@torch.inference_mode()
def head_row_norm(model: Any) -> float:
    """Mean Euclidean norm of the rows of a model's head."""
    weight = model.get_output_embeddings().weight
    # In parts, so that no float32 copy of a large head is made.
    total = sum(float(part.float().norm(dim=-1).double().sum()) for part in weight.split(8192))
    return total / weight.shape[0]
