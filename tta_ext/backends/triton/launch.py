"""From the operators' arguments to kernel launches: numbers, errors, block sizes."""

from __future__ import annotations

from collections.abc import Callable
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


def tuned(kernel: Any) -> Any:
    """A kernel tried with each number of tiles a program and of warps, once an amount of work.

    The amount is the argument ``work`` of the kernel. What was found is kept on disk in Triton's
    cache. Sums have one order whatever the block sizes, so the choice changes no bit.
    """
    sizes = [(4, 4), (1, 1), (1, 4), (2, 4), (8, 8)][: 1 if triton.knobs.runtime.interpret else 5]
    options = [triton.Config({"T": tiles}, num_warps=warps) for tiles, warps in sizes]
    return triton.autotune(options, key=["work"], cache_results=True)(jit(kernel))


def launch(kernel: Any, programs: Any, *args: Any, **constants: Any) -> None:
    """Run a kernel, if not on nothing; the programs may be a grid that depends on block sizes."""
    if programs:
        grid = programs if callable(programs) else (programs,)
        kernel[grid](*args, enable_fp_fusion=False, **constants)


def outside(values: Tensor, stop: int) -> Tensor:
    """Which integers are not in ``[0, stop)``."""
    return (values < 0) | (values >= stop)


Invalid = Callable[[], Tensor]


def operator(function: Callable[..., Invalid | None]) -> Callable[..., None]:
    """An operator in the arguments of its schema, of a function that takes groups of them whole
    and no ``check``; its kernels run on the device of its outputs.

    With ``check`` the outputs are asked whether a row was invalid (a NaN, or if no output is a
    float a negative token), or what the function returns is; the error is then the one that the
    reference raises for these arguments.
    """
    grouped, spec = flat(function), schemas.OPS[function.__name__]

    def run(*args: Any, **outputs: Tensor) -> None:
        given = dict(zip(spec.inputs, args, strict=True))
        with torch.accelerator.device_index(next(iter(outputs.values())).device.index):
            invalid = grouped(*(x for name, x in given.items() if name != "check"), **outputs)
        if not given.get("check"):
            return
        floats = [x.isnan() for x in outputs.values() if x.is_floating_point()]
        found = [invalid()] if invalid else floats or [next(iter(outputs.values())) < 0]
        found += [outside(x, LIMITS[name]) for name, x in given.items() if name in LIMITS]
        if any(bool(x.any()) for x in found):
            getattr(reference, spec.name)(*args)
            raise RuntimeError("a kernel found a row invalid that the reference does not")

    return run


def number(values: Tensor) -> Any:
    """Per-row numbers for a kernel: the tensor, or the number that the host knows, of a double the
    integer of its bits (Triton passes floats as float32).
    """
    if values.is_cpu and values.numel() == 1:
        return int(values.view(torch.int64) if values.is_floating_point() else values)
    return values.contiguous()


def per_row(*values: Tensor) -> tuple[Any, ...]:
    """Each as :func:`number`, and their strides: 0 where one holds for all rows, or 1."""
    return *map(number, values), tuple(int(x.numel() != 1) for x in values)
