"""Every CUDA kernel's PTX, executed without a GPU and compared with the CPU.

    python -m tools.ptx.emulate

Needs nvcc, nvdisasm and the PTX emulator whose folder ``TTA_EXT_PTXEMU`` names. csrc/testing/cuda
is linked against the emulator's CUDA runtime; every family runs in ascending, descending and random
thread orders, with random switches between threads, and compares each output with the CPU kernels
bit for bit; a kernel that no family launched is a fault. The emulator's check of races between
blocks is off: it does not know the pattern by which the last block to arrive takes over (its README
says so; the SIMT layer in csrc/testing/simt checks that one).
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tta_ext.build import BuildError

from .emulator import LAUNCH, Emulator, Failed, concurrently

# Repetitions of each family: so many that every kernel is launched, in most orders.
FAMILIES = {"deferral": 3, "verify": 3, "sampling": 3, "knapsack": 3, "prelogit": 4, "control": 9}
# Thread order (0 ascending, 1 descending, else random), the probability of a switch to another
# thread at a memory access, and the blocks that fill the device (1: blocks take several tiles).
ORDERS = ((0, 0.0, 512), (1, 0.0, 1), (2, 0.01, 1), (3, 0.1, 512))
VOCAB = 9000

# What nvcc makes of an anonymous namespace: the file's name between hashes.
_NAMESPACE = re.compile(r"\d+_GLOBAL__N__[0-9a-f]{8}_\d+_(\w+?)_cu_[0-9a-f]{8}")


def short(mangled: str) -> str:
    """A kernel's file (not of templates in headers), name, and template arguments."""
    file = _NAMESPACE.search(mangled)
    kernel = re.search(r"[a-z_]+_kernel(?:I\w*?E+v)?", _NAMESPACE.sub("", mangled))
    return (f"{file[1]}: " if file else "") + (kernel[0] if kernel else mangled)


def kernels_of(ptx: Iterable[Path]) -> set[str]:
    """The mangled names of all kernels in PTX files."""
    return {name for path in ptx for name in re.findall(r"\.entry\s+(\w+)", path.read_text())}


def check_family(
    emulator: Emulator, family: str, seed: int, preempt: float, width: int
) -> set[str]:
    """A family in an order; the kernels that were launched.

    Raises:
        Failed: it differs from the CPU.
    """
    order = f"{family}: order {seed}, switches {preempt}, width {width}"
    result = emulator(
        family, "--repetitions", FAMILIES[family], "--seed", seed + 1, "--vocab", VOCAB,
        "--width", width, seed=seed, preempt=preempt, prof=1,
    )  # fmt: skip
    if result.returncode:
        raise Failed(f"{order}\n{result.stdout[-2000:]}{result.stderr[-4000:]}")
    print(f"{order}: equal to the CPU", flush=True)
    return {name for name, _ in LAUNCH.findall(result.stderr)}


def check_families(emulator: Emulator, orders: Iterable[tuple[int, float, int]]) -> None:
    """Every family in every order.

    Raises:
        Failed: one differs from the CPU, or no family launched some kernel.
    """
    tasks = [(family, *order) for order in orders for family in FAMILIES]
    ran = concurrently(lambda task: check_family(emulator, *task), tasks)
    if missing := sorted(map(short, kernels_of(emulator.ptx).difference(*ran))):
        raise Failed(f"no family launched {', '.join(missing)}")


def main() -> None:
    try:
        with tempfile.TemporaryDirectory() as folder:
            check_families(Emulator(Path(folder)), ORDERS)
    except (BuildError, Failed) as error:
        sys.exit(f"emulate: {error}")


if __name__ == "__main__":
    main()
