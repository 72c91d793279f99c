"""From the operators' arguments to kernel launches: scalars, scratch, autotuned block sizes."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from tta_ext.backends.reference._common import inverse_temperature
from tta_ext.backends.triton.numerics import TILE

# A kernel is given one number a row as a pointer or, where the host knows it, as a number; these
# must not become constants of the kernel when they happen to be 1 or a multiple of 16.
NUMBERS = [
    *("seed", "position", "sequence", "rollout", "iteration", "param", "draw", "step", "prompt"),
    *("work", "start", "stop", "count", "key_low", "key_high", "experts", "horizon"),
    *("shards", "size", "expert_stride", "anti_stride", "prompts", "positions"),
    *("inv_lambda", "slack", "cost", "tag", "level", "offset", "previous_step"),
]

jit = triton.jit(do_not_specialize=NUMBERS)


def tuned(*configs: tuple[dict[str, int], int]) -> Callable[[Any], Any]:
    """A kernel tried with each (block sizes, warps) once a dtype and amount of work.

    The amount is the argument ``work`` of the kernel. What was found is kept on disk in Triton's
    cache. Sums have one order whatever the block sizes, so the choice changes no bit.
    """
    if triton.knobs.runtime.interpret:
        configs = configs[:1]
    options = [triton.Config(sizes, num_warps=warps) for sizes, warps in configs]
    tune = triton.autotune(options, key=["work"], cache_results=True)
    return lambda kernel: tune(jit(kernel))


def launch(kernel: Any, programs: int | Callable[[dict[str, Any]], int], like: Tensor,
           *args: Any, **constants: Any) -> None:  # fmt: skip
    """Run a kernel on the device of a tensor; a number of programs may depend on block sizes."""
    if callable(programs):
        count = programs
        grid: Any = lambda sizes: (count(sizes),)  # noqa: E731
    elif not programs:
        return
    else:
        grid = (programs,)
    options = {"enable_fp_fusion": False, **constants}
    if like.device.type == "cpu":
        kernel[grid](*args, **options)
        return
    with torch.get_device_module(like.device).device(like.device):
        kernel[grid](*args, **options)


def number(values: Tensor) -> Any:
    """Per-row numbers for a kernel: the tensor, or the number that the host knows."""
    if values.is_cpu and values.numel() == 1:
        value = values.item()
        return bits(value) if values.is_floating_point() else value
    return values.contiguous()


def bits(value: float) -> int:
    """A double as the integer of its bits."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def per_row(values: Tensor) -> tuple[Any, int]:
    """One number for all rows (stride 0), or one a row."""
    return number(values), int(values.numel() != 1)


class Rows(NamedTuple):
    """Logits ``[B, V]`` or ``[B, K, V]`` as kernels take them.

    Row r is (r // inner, r % inner); of its ``inner`` positions only ``limit`` may exist.
    """

    data: Tensor
    outer_stride: int
    inner_stride: int
    inner: int
    limit: int
    vocab: int

    @classmethod
    def of(cls, logits: Tensor, positions: int = 1) -> Rows:
        if logits.dim() == 2:
            return cls(logits, logits.stride(0), 0, 1, 1, logits.shape[1])
        return cls(logits, logits.stride(0), logits.stride(1), positions, *logits.shape[1:])

    @property
    def rows(self) -> int:
        return self.data.shape[0] * self.inner

    @property
    def tiles(self) -> int:
        return -(-self.vocab // TILE.value)

    @property
    def work(self) -> int:
        """The number of tiles, to the next power of two: what block sizes are tuned for."""
        return int(triton.next_power_of_2(max(self.rows * self.tiles, 1)))


def factor(temperature: float) -> float:
    """1/T as the kernels take it."""
    return inverse_temperature(temperature)


def scratch(like: Tensor, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def complain(check: bool, invalid: Tensor, reference: Callable[[], object]) -> None:
    """With ``check``, and where a row is invalid: the error that the reference raises for it."""
    if check and bool(invalid.any()):
        reference()
        raise RuntimeError("a kernel found a row invalid that the reference does not")
