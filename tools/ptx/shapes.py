"""Does the shape of a row matter to the CUDA kernels? Machine instructions an element, by shape.

    python -m tools.ptx.shapes [--op OP ...] [--shape SHAPE ...] [--budget B ...] [--dtype D ...]
                               [--vocab V] [--screen V] [--worst N] [--all]

Needs what emulate.py needs. Every operator that finds or uses the knapsack's cut, over rows of the
shapes of common_cases.cpp, budgets and types, one row a call. The table has each operator's and
type's kind row (a language model's, a budget of .3) beside its worst.

A row of a real vocabulary takes half a minute of a core. So all cells are counted on a row of
--screen tokens, where what is done once a row weighs more, and the --worst of each operator and
type, with the kind one, on a row of --vocab. One of verify takes minutes: it is counted where it is
asked for.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks import harness
from tta_ext.build import BuildError

from .emulator import Emulator, Failed, concurrently

OPS = ("propose", "sample", "mask", "probs", "stats", "verify")
SHAPES = ("language-model", "small-model", "constant", "gaussian-.5", "gaussian-1", "gaussian-4",
          "zipf", "impossible", "ties", "plateaus")  # fmt: skip
BUDGETS = (0.001, 0.1, 0.3, 0.7, 0.95)
DTYPES = ("float32", "float16", "bfloat16")
KIND = ("language-model", 0.3)
VOCAB, SCREEN, WORST = 128256, 8 * 4096, 3
DRAFT = 4
# No shape takes more than so many times the kind one's instructions.
MOST = 1.5


class Cell(NamedTuple):
    op: str
    dtype: str
    shape: str
    budget: float

    @property
    def kind(self) -> bool:
        return (self.shape, self.budget) == KIND


def instructions(emulator: Emulator, vocab: int, cell: Cell) -> float:
    """Machine instructions an element of the base, of all threads."""
    ran = emulator.count("common", f"deferral_{cell.op}", "--vocab", vocab, "--shape", cell.shape,
                         "--budget", cell.budget, "--dtype", cell.dtype)  # fmt: skip
    rows = DRAFT + 1 if cell.op == "verify" else 1
    return sum(kernel.instructions for kernel in ran.values()) / (rows * vocab)


def grouped(found: dict[Cell, float]) -> list[list[tuple[Cell, float]]]:
    """The cells of each operator and type, those of most instructions first."""
    groups: dict[tuple[str, str], list[tuple[Cell, float]]] = {}
    for cell, count in sorted(found.items(), key=lambda item: -item[1]):
        groups.setdefault((cell.op, cell.dtype), []).append((cell, count))
    return [groups[key] for key in sorted(groups, key=lambda key: (OPS.index(key[0]), key[1]))]


def worst(found: dict[Cell, float], number: int) -> list[Cell]:
    """Of each operator and type the kind cell and the `number` others of most instructions."""
    return [
        cell
        for group in grouped(found)
        for cell in [
            *(cell for cell, _ in group if cell.kind),
            *[cell for cell, _ in group if not cell.kind][:number],
        ]
    ]


def lines(found: dict[Cell, float]) -> list[list[str]]:
    """A line an operator and type."""
    made = []
    for group in grouped(found):
        kind = next(count for cell, count in group if cell.kind)
        cell, count = group[0]
        ratio = count / kind
        made.append([f"deferral_{cell.op}", cell.dtype, f"{kind:.1f}", f"{count:.1f}",
                     f"{ratio:.2f}{' (over)' if ratio > MOST else ''}",
                     f"{cell.shape}, {cell.budget:g}"])  # fmt: skip
    return made


def counted(emulator: Emulator, vocab: int, cells: Iterable[Cell]) -> dict[Cell, float]:
    cells = list(cells)
    counts = concurrently(partial(instructions, emulator, vocab), cells)
    return dict(zip(cells, counts, strict=True))


def show(vocab: int, found: dict[Cell, float]) -> None:
    for cell, count in found.items():
        print(f"{vocab:7}  deferral_{cell.op:10}{cell.dtype:10}{cell.shape:16}{cell.budget:<8g}"
              f"{count:.1f}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS[:-1])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument("--budget", nargs="+", type=float, default=BUDGETS)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES[:1])
    parser.add_argument("--vocab", type=int, default=VOCAB, help=f"({VOCAB})")
    parser.add_argument("--screen", type=int, default=SCREEN, help=f"0: none ({SCREEN})")
    parser.add_argument("--worst", type=int, default=WORST, help=f"({WORST})")
    parser.add_argument("--all", action="store_true", help="every count, not only the worst")
    arguments = parser.parse_args()
    shapes = dict.fromkeys((KIND[0], *arguments.shape))
    budgets = dict.fromkeys((KIND[1], *arguments.budget))
    cells = [
        Cell(op, dtype, shape, budget)
        for op, dtype, shape, budget in itertools.product(
            arguments.op, arguments.dtype, shapes, budgets
        )
    ]
    try:
        with tempfile.TemporaryDirectory() as folder:
            emulator = Emulator(Path(folder))
            if arguments.screen:
                screened = counted(emulator, arguments.screen, cells)
                if arguments.all:
                    show(arguments.screen, screened)
                cells = worst(screened, arguments.worst)
            found = counted(emulator, arguments.vocab, cells)
    except (BuildError, Failed) as error:
        sys.exit(f"shapes: {error}")
    if arguments.all:
        show(arguments.vocab, found)
    header = ("operator", "type", "kind row", "worst", "times", "where")
    print(harness.table(header, lines(found)))


if __name__ == "__main__":
    main()
