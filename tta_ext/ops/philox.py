"""Philox4x32-10 blocks and the normals made from them; :mod:`tta_ext.rng` documents the stream."""

from __future__ import annotations

import torch
from torch import Tensor

from tta_ext import rng
from tta_ext.dispatch import invoke
from tta_ext.ops import _arguments as args
from tta_ext.schemas import OPS

__all__ = ["normal", "philox"]

_PHILOX = OPS["philox"]
_NORMAL = OPS["normal"]


def philox(counter: Tensor, key: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The Philox4x32-10 block of every counter.

    Args:
        counter: int64 ``[..., 4]``; the low 32 bits of each word count.
        key: int64 ``[2]``, likewise.
        out: contiguous int64 of the counter's shape to write.

    Returns:
        int64 ``[..., 4]``, 32-bit patterns (0 to 2**32 - 1).

    Errors: ``TypeError`` for other dtypes, ``ValueError`` for shapes and devices.

    Bytes moved: 64 a block.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Example:
        >>> philox(torch.zeros(4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
        tensor([1713891541, 3781805453, 3159862348, 2600524760])
    """
    for name, words in (("counter", counter), ("key", key)):
        if not isinstance(words, Tensor):
            raise TypeError(f"{name} is {type(words).__name__}, expected an int64 tensor")
        args.check_kind(name, words, torch.int64, counter.device)
    if counter.dim() < 1 or counter.shape[-1] != 4:
        raise ValueError(f"counter has shape {list(counter.shape)}, expected [..., 4]")
    if key.shape != (2,):
        raise ValueError(f"key has shape {list(key.shape)}, expected [2]")
    outs = args.outputs(_PHILOX, out, counter)
    return invoke(_PHILOX, (counter, key), outs)[0]


def normal(
    n: int,
    *,
    seed: int | Tensor,
    step: int = 0,
    sequence: int = 0,
    iteration: int = 0,
    rollout: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Dimensions 0 to n-1 of the standard normal noise of one step of one rollout (stream NOISE).

    These are the numbers that :func:`~tta_ext.ops.prelogit.prelogit_perturb` adds.

    Args:
        n: number of dimensions, ``0 <= n < 2**32``.
        seed: int, or int64 tensor of one element; the result is on its device.
        step: ``0 <= step < 2**32``.
        sequence: ``0 <= sequence < 2**32``.
        iteration: ``0 <= iteration < 4096``.
        rollout: ``0 <= rollout < 65536``.
        out: contiguous float32 ``[n]`` to write.

    Returns:
        float32 ``[n]``.

    Errors: ``ValueError`` for ranges, ``TypeError`` for a seed of another kind.

    Bytes moved: ``4 n``.

    Example:
        >>> normal(3, seed=1).shape
        torch.Size([3])
    """
    rng.check_word("n", n)
    device = seed.device if isinstance(seed, Tensor) else torch.device("cpu")
    key = args.seed_tensor(seed, device)
    rng.check_word("step", step)
    rng.check_word("sequence", sequence)
    rng.check_iteration(iteration)
    rng.check_rollout(rollout)
    outs = args.outputs(_NORMAL, out, key, shape=(n,))
    return invoke(_NORMAL, (n, key, step, sequence, iteration, rollout), outs)[0]
