"""Drawing a token of softmax(logits / T)."""

from __future__ import annotations

import torch
from torch import Tensor

from tta_ext.backends.reference import _common as common


@common.flat
def categorical_sample(
    logits: Tensor,
    temperature: float,
    key: common.KeyArguments,
    stream: int,
    draw: int,
    check: bool,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """One token a row ``[B]``; the argmax (lowest id among equals) without ``do_sample``."""
    key.check(check)
    invalid = common.check_logits("logits", logits, check)
    rows = common.usable(logits, invalid)
    if key.do_sample:
        weight = common.softmax(rows, temperature, compute_dtype).weight
        token = common.draw(weight, key.uniform(rows, stream, draw))
    else:
        token = common.argmax(rows)
    return torch.where(invalid, -1, token)
