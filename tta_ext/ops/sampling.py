"""Drawing a token of softmax(logits / T)."""

from __future__ import annotations

from torch import Tensor

from tta_ext import rng, rules
from tta_ext.dispatch import invoke
from tta_ext.ops import _arguments as args
from tta_ext.ops._documentation import documented
from tta_ext.ops._left import is_left_to_kernel, rechecks
from tta_ext.schemas import OPS

__all__ = ["categorical_sample"]

_SAMPLE = OPS["categorical_sample"]
_MATRIX = "[B, V]"
_RECHECK = rechecks(_MATRIX)


@documented
def categorical_sample(
    logits: Tensor,
    *,
    seed: int | Tensor | None = None,
    position: int | Tensor | None = None,
    sequence: int | Tensor | None = None,
    iteration: int = 0,
    rollout: int | Tensor = 0,
    do_sample: bool = True,
    temperature: float = 1.0,
    stream: int = rng.BASE,
    draw: int = 0,
    check: bool | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One token a row by inverse CDF: the first v with ``sum_{w <= v} p(w) > u``.

    Args:
        logits: float32, float16 or bfloat16 ``[B, V]``, unit stride over V; -inf is impossible.
        {key}
        temperature: T > 0; p = softmax(logits / T).
        stream: tag of the stream, one of :data:`tta_ext.rng.STREAMS`. ``PROXY`` gives the
            replacement tokens of :func:`~tta_ext.ops.deferral.deferral_sample`.
        draw: number of the draw, for several draws at one position, ``0 <= draw < 2**32``.
        {check} its token is -1.
        out: contiguous int64 ``[B]`` to write.

    Returns:
        int64 ``[B]``.

    Errors: ``TypeError`` for dtypes and missing arguments, ``ValueError`` for shapes, devices,
    layout and ranges.

    Bytes moved: ``B V s`` with s bytes a logit, and one tile of 4096 logits a row once more.

    Example:
        >>> categorical_sample(torch.tensor([[0.0, 9.0]]), seed=0, position=0)
        tensor([1])
    """
    left = is_left_to_kernel(logits)
    if not left:
        args.check_logits("logits", logits, 2, _MATRIX)
    temperature = rules.check_temperature("temperature", temperature)
    key = args.key_arguments(logits, seed, position, sequence, iteration, rollout, do_sample, left)
    if type(stream) is not int or not 0 <= stream <= rng.USER:
        rng.check_stream(stream)
    if type(draw) is not int or not 0 <= draw < rng.WORD:
        rng.check_word("draw", draw)
    outs = args.outputs(_SAMPLE, out, logits, left=left)
    arguments = (logits, temperature, *key, stream, draw, args.check_flag(check, logits, left))
    return invoke(_SAMPLE, arguments, outs, _RECHECK if left else None)[0]
