"""Does the shape of a row matter to the CUDA kernels? Machine instructions an element, by shape.

    python -m tools.ptx.shapes [--vocab V] [--op OP ...] [--shape SHAPE ...] [--budget B ...]
                               [--dtype DTYPE] [--all]

Needs what emulate.py needs. Every operator that finds or uses the knapsack's cut, over rows of the
shapes of common_cases.cpp and several budgets, one row a call. The table has each operator's kind
row (a language model's, a budget of .3) beside its worst. A cell takes about ten seconds of a core
at the default size, one of verify some minutes: that is counted where it is asked for.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

from benchmarks import harness
from tta_ext.build import BuildError

from .emulator import Emulator, Failed, concurrently

OPS = ("propose", "sample", "mask", "probs", "stats", "verify")
SHAPES = ("language-model", "small-model", "constant", "gaussian-.5", "gaussian-1", "gaussian-4",
          "zipf", "impossible", "ties", "plateaus")  # fmt: skip
BUDGETS = (0.3,)
KIND = ("language-model", 0.3)
VOCAB = 4 * 4096
DTYPES = ("float32", "float16", "bfloat16")
DRAFT = 4
# No shape takes more than so many times the kind one's instructions.
MOST = 1.5

Cell = tuple[str, str, float]


def instructions(
    emulator: Emulator, op: str, shape: str, budget: float, vocab: int, dtype: str
) -> float:
    """Machine instructions an element of the base, of all threads."""
    ran = emulator.count("common", f"deferral_{op}", "--vocab", vocab, "--shape", shape,
                         "--budget", budget, "--dtype", dtype)  # fmt: skip
    rows = DRAFT + 1 if op == "verify" else 1
    return sum(kernel.instructions for kernel in ran.values()) / (rows * vocab)


def lines(found: dict[Cell, float]) -> list[list[str]]:
    """A line an operator."""
    made = []
    for op in dict.fromkeys(cell[0] for cell in found):
        here = {cell[1:]: count for cell, count in found.items() if cell[0] == op}
        worst = max(here, key=here.__getitem__)
        ratio = here[worst] / here[KIND]
        made.append([f"deferral_{op}", f"{here[KIND]:.1f}", f"{here[worst]:.1f}",
                     f"{ratio:.2f}{' (over)' if ratio > MOST else ''}",
                     f"{worst[0]}, {worst[1]:g}"])  # fmt: skip
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--vocab", type=int, default=VOCAB, help=f"({VOCAB})")
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS[:-1])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument("--budget", nargs="+", type=float, default=[], help="beside .3")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    parser.add_argument("--all", action="store_true", help="every cell, not only the worst")
    arguments = parser.parse_args()
    budgets = dict.fromkeys((*BUDGETS, *arguments.budget))
    shapes = dict.fromkeys((KIND[0], *arguments.shape))
    cells = list(itertools.product(arguments.op, shapes, budgets))
    try:
        with tempfile.TemporaryDirectory() as folder:
            emulator = Emulator(Path(folder))
            counts = concurrently(
                lambda cell: instructions(emulator, *cell, arguments.vocab, arguments.dtype), cells
            )
    except (BuildError, Failed) as error:
        sys.exit(f"shapes: {error}")
    found = dict(zip(cells, counts, strict=True))
    if arguments.all:
        for (op, shape, budget), count in found.items():
            print(f"deferral_{op:10}{shape:16}{budget:<8g}{count:.1f}")
    print(harness.table(("operator", "kind row", "worst", "times", "where"), lines(found)))


if __name__ == "__main__":
    main()
