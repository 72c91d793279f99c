"""From the operators' arguments to kernel launches: numbers, errors, block sizes."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from tta_ext import rng, schemas
from tta_ext.backends import reference
from tta_ext.backends.reference._common import flat

# A kernel is given one number a row as a pointer or, where the host knows it, as a number; these
# must not become constants of the kernel when they happen to be 1 or a multiple of 16.
NUMBERS = [
    *("seed", "position", "sequence", "rollout", "iteration", "draw_number", "tag"),
    *("param", "step", "prompt", "work", "start", "stop", "count", "key_low", "key_high"),
    *("experts", "horizon", "prompts", "inv_lambda", "slack", "cost", "offset", "last_step"),
]
# What check=True asks of arguments beside logits, where only the counter limits them.
LIMITS = dict.fromkeys(("position", "sequence", "step"), rng.WORD) | {"rollout": rng.ROLLOUTS}

jit = triton.jit(do_not_specialize=NUMBERS)


def tuned(*configs: tuple[int, int]) -> Callable[[Any], Any]:
    """A kernel tried with each (tiles a program, warps) once an amount of work.

    The amount is the argument ``work`` of the kernel. What was found is kept on disk in Triton's
    cache. Sums have one order whatever the block sizes, so the choice changes no bit.
    """
    if triton.knobs.runtime.interpret:
        configs = configs[:1]
    options = [triton.Config({"T": tiles}, num_warps=warps) for tiles, warps in configs]
    tune = triton.autotune(options, key=["work"], cache_results=True)
    return lambda kernel: tune(jit(kernel))


def tensors(values: tuple[Any, ...]) -> Iterator[Tensor]:
    """All tensors among arguments, those in groups included."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from tensors(value)


def launch(kernel: Any, programs: int | Callable[[dict[str, Any]], int], *args: Any,
           **constants: Any) -> None:  # fmt: skip
    """Run a kernel on the device of its first tensor; programs may depend on block sizes."""
    if not programs:
        return
    grid = (lambda sizes: (programs(sizes),)) if callable(programs) else (programs,)
    options = {"enable_fp_fusion": False, **constants}
    device = next(tensors(args)).device
    if device.type == "cpu":
        kernel[grid](*args, **options)
        return
    with torch.get_device_module(device).device(device):
        kernel[grid](*args, **options)


def outside(values: Tensor, stop: int) -> Tensor:
    """Which integers are not in ``[0, stop)``."""
    return (values < 0) | (values >= stop)


def operator(function: Callable[..., Callable[[], Tensor]]) -> Callable[..., None]:
    """An operator in the arguments of its schema, of a function that takes groups of them whole.

    The function returns what says which rows are invalid: with ``check`` that is asked, and the
    error is the one that the reference raises for these arguments.
    """
    grouped, spec = flat(function), schemas.OPS[function.__name__]

    def run(*args: Any, **outputs: Tensor) -> None:
        invalid = grouped(*args, **outputs)
        if not args[-1]:
            return
        limited = ((x, LIMITS.get(name)) for name, x in zip(spec.inputs, args, strict=True))
        wrong = [bool(outside(x, stop).any()) for x, stop in limited if stop]
        if any(wrong) or bool(invalid().any()):
            getattr(reference, spec.name)(*args)
            raise RuntimeError("a kernel found a row invalid that the reference does not")

    return run


def bits(value: float) -> int:
    """A double as the integer of its bits (Triton passes floats as float32)."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def number(values: Tensor) -> Any:
    """Per-row numbers for a kernel: the tensor, or the number that the host knows."""
    if values.is_cpu and values.numel() == 1:
        value = values.item()
        return bits(value) if values.is_floating_point() else value
    return values.contiguous()


def per_row(*values: Tensor) -> tuple[Any, ...]:
    """Each as :func:`number`, and their strides: 0 where one holds for all rows, or 1."""
    return *map(number, values), tuple(int(x.numel() != 1) for x in values)


def scratch(like: Tensor, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)
