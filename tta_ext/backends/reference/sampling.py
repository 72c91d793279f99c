"""Drawing a token of softmax(logits / T)."""

from __future__ import annotations

import torch
from torch import Tensor

from tta_ext.backends.reference import _common as common
from tta_ext.backends.reference.philox import uniform


def categorical_sample(
    logits: Tensor,
    temperature: float,
    seed: Tensor,
    position: Tensor,
    sequence: Tensor,
    iteration: int,
    rollout: Tensor,
    do_sample: bool,
    stream: int,
    draw: int,
    check: bool,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """One token a row ``[B]``; the argmax (lowest id among equals) without ``do_sample``."""
    common.check_key(position, sequence, rollout, check)
    invalid = common.check_logits("logits", logits, None, check)
    rows = common.usable(logits, invalid)
    if do_sample:
        u = uniform(
            rows.shape[0], rows.device, seed, position, sequence, iteration, rollout, stream, draw
        )
        token = common.draw(common.softmax(rows, temperature, compute_dtype).weight, u)
    else:
        token = common.argmax(rows)
    return torch.where(invalid, -1, token)
