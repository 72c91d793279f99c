"""Units of AISP's settings: what the noise and the reward are measured against."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tta_ext.decoding.runtime.compat import logits_of
from tta_ext.decoding.runtime.models import class_name, device_of, embedding_count, loaded

__all__ = [
    "LOGIT_NOISE",
    "deviation",
    "head_row_norm",
    "lam_for_ess",
    "noise_gain",
    "prelogit_scale",
]

# Where no sigma is given: noise that moves logits by this much. Chosen on the tuning prompts of
# benchmarks/aisp_rewards.py.
LOGIT_NOISE = 2.0


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
    hidden, *_ = _head_run(model)
    return float(hidden.double().square().mean().sqrt())


@torch.inference_mode()
def head_row_norm(model: Any) -> float:
    """Mean Euclidean norm of the rows of a model's head.

    Where the weights are packed it is measured, as what noise does to the outputs.
    """
    with loaded(model.get_output_embeddings()) as head:
        weight = head.weight
        if type(weight) in (Tensor, torch.nn.Parameter) and weight.is_floating_point():
            # In parts, so that no float32 copy of a large head is made.
            parts = [float(part.float().norm(dim=-1).double().sum()) for part in weight.split(8192)]
            return sum(parts) / weight.shape[0]
    _, before, _ = _head_run(model)
    _, after, _ = _head_run(model, 1.0)
    return _moved(before, after)


@torch.inference_mode()
def noise_gain(model: Any) -> float:
    """By how much noise on the pre-logits moves the logits: the head's row norm, times what the
    model does to the head's outputs (scales, soft caps), measured with noise as large as AISP's.

    A sigma of ``x / noise_gain(model)`` moves logits by about x.
    """
    norm = head_row_norm(model)
    _, outputs, logits = _head_run(model)
    _, moved_outputs, moved_logits = _head_run(model, LOGIT_NOISE / norm)
    behind = _moved(logits, moved_logits) / _moved(outputs, moved_outputs)
    return norm if abs(behind - 1.0) < 1e-3 else norm * behind  # 1: logits are the head's outputs


def _moved(before: Tensor, after: Tensor) -> float:
    """Root mean square of a change, where there is a number (masked ids have none)."""
    change = after.double() - before.double()
    return float(change[change.isfinite()].square().mean().sqrt())


def _head_run(model: Any, sigma: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """The head's inputs and outputs and the model's logits over a fixed set of random tokens.

    Args:
        model: a causal language model.
        sigma: standard deviation of noise on the head's inputs.
    """
    head, device = model.get_output_embeddings(), device_of(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(embedding_count(model), (4, 32), generator=generator)
    seen: list[Tensor] = []

    def before(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = arguments[0]
        seen.append(hidden)
        if not sigma:
            return arguments
        noise = torch.randn(hidden.shape, generator=generator) * sigma
        return (hidden + noise.to(hidden), *arguments[1:])

    handles = [
        head.register_forward_pre_hook(before),
        head.register_forward_hook(lambda _, arguments, output: seen.append(output)),
    ]
    try:
        logits = logits_of(model, ids.to(device))
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise ValueError(f"{class_name(model)} does not call its output embeddings as a module")
    return seen[0], seen[1], logits
