"""Drawing a token of softmax(logits / T): two launches."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tta_ext.backends.reference._common import KeyArguments, inverse_temperature
from tta_ext.backends.triton import rows
from tta_ext.backends.triton.launch import operator
from tta_ext.backends.triton.law import Rows


@operator
def categorical_sample(
    logits: Tensor, temperature: float, key: KeyArguments, stream: int, draw: int, check: bool, *,
    out: Tensor,
) -> Callable[[], Tensor]:  # fmt: skip
    s = rows.statistics(Rows.of(logits), inverse_temperature(temperature))
    rows.sample(s, rows.Key.of(key, draw), stream, out)
    return lambda: out < 0
