"""Checks that are left to the compiled kernel, which must make them anyway, and their words.

A decoding step calls operators on rows that are right, whose checks in Python cost as much as all
else. Where a call surely goes to a compiled CPU kernel, Python looks only at what the kernel does
not; a call that the kernel refuses is looked at again, by the checks of all other calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tta_ext.dispatch import Recheck, kernel_is_next
from tta_ext.ops import _arguments as args
from tta_ext.schemas import OpSpec


def is_left_to_kernel(logits: Tensor, other: Tensor | None = None) -> bool:
    """Whether these may be left to the compiled kernel's checks, for :func:`rechecks` to word.

    It looks at dtypes, numbers of elements, strides and devices, but not at all shapes and not at
    what autograd knows: what ``left`` in _arguments.py leaves to it is no less.
    """
    return (
        type(logits) is Tensor
        and (other is None or type(other) is Tensor)
        and logits.is_cpu
        and logits.dim() == 2
        and kernel_is_next()
    )


def rechecks(form: str, fields: tuple[str, ...] = ()) -> Recheck:
    """What says why the kernel refused a call of whose arguments some were left to it.

    Args:
        form: of the logits, in words.
        fields: as in :func:`~tta_ext.ops._arguments.outputs`.
    """

    def recheck(op: OpSpec, arguments: Sequence[Any], out: Sequence[Tensor] | None) -> None:
        like_name, like = op.inputs[0], arguments[0]
        args.check_logits(like_name, like, 2, form)
        count, device = like.shape[0], like.device
        for name, value in zip(op.inputs, arguments, strict=True):
            if name == "proxy_logits" and value is not None:
                args.check_alike(name, value, like_name, like, form)
            elif name == "seed":
                args.seed_tensor(value, device)
            elif name in ("position", "sequence", "rollout"):
                args.index_tensor(name, value, count, device)
        args.outputs(op, out if fields or out is None else out[0], like, fields)

    return recheck
