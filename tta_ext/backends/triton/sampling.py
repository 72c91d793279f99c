"""Drawing a token of softmax(logits / T): two launches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tta_ext.backends import reference
from tta_ext.backends.reference._common import KeyArguments
from tta_ext.backends.triton.launch import Rows, complain, factor
from tta_ext.backends.triton.rows import Key, sample, stats


def categorical_sample(logits: Tensor, temperature: float, *rest: Any, out: Tensor) -> None:
    *key, stream, draw, check = rest
    KeyArguments(*key).check(check)
    x, inverse = Rows.of(logits), factor(temperature)
    s = stats(x, inverse)
    sample(x, s, inverse, Key.of(*key[:5]), key[5], stream, draw, out)
    complain(check, out < 0, lambda: reference.categorical_sample(logits, temperature, *rest))
