"""Drawing a token of softmax(logits / T): two launches."""

from __future__ import annotations

from torch import Tensor

from tta_ext.backends.reference._common import KeyArguments, inverse_temperature
from tta_ext.backends.triton import rows
from tta_ext.backends.triton.launch import operator


@operator
def categorical_sample(logits: Tensor, temperature: float, key: KeyArguments, stream: int,
                       draw: int, *, out: Tensor) -> None:  # fmt: skip
    s = rows.Softmax.of(rows.Rows.of(logits), inverse_temperature(temperature))
    rows.sample(s, rows.key_of(key, draw), stream, out)
