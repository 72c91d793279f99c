"""``python -m benchmarks``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tta_ext import plots

from . import (
    bench_deferral,
    bench_implicit_reward,
    bench_knapsack,
    bench_prelogit,
    bench_sampling,
    bench_verify,
    harness,
)
from .grid import BATCHES, DTYPES, PROVIDERS, RULES, VOCABULARIES, Grid

STEMS = {
    "deferral": bench_deferral,
    "implicit_reward": bench_implicit_reward,
    "sampling": bench_sampling,
    "knapsack": bench_knapsack,
    "prelogit": bench_prelogit,
    "verify": bench_verify,
}
# With command lines of their own.
OTHERS = {
    "architectures": "architectures",
    "calls": "bench_calls",
    "claims": "claims",
    "json_answers": "json_answers",
    "decoding": "bench_decoding",
    "shapes": "bench_shapes",
    "speculative": "bench_speculative",
    "acceptance": "acceptance",
}
RESULTS = Path("benchmarks") / "results"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Times the operators side by side with what they replace. Each line of the "
        "table is checked against float64 before it is timed.",
    )
    p.add_argument("stems", nargs="*", metavar="STEM", help=f"of {', '.join(STEMS)} (all), "
                   "or: " + ", ".join(OTHERS))  # fmt: skip
    p.add_argument("--quick", action="store_true", help="two vocabularies, two batches, minutes")
    p.add_argument("--vocab", type=int, nargs="+", metavar="V", help=f"of {VOCABULARIES}")
    p.add_argument("--batch", type=int, nargs="+", metavar="B", help=f"of {BATCHES}")
    p.add_argument("--dtype", nargs="+", choices=DTYPES)
    p.add_argument("--rule", nargs="+", choices=RULES)
    p.add_argument("--provider", nargs="+", choices=PROVIDERS)
    p.add_argument("--threads", type=int, default=1, help="torch threads (1)")
    p.add_argument("--seconds", type=float, default=0.3, help="spent on each line, about (0.3)")
    p.add_argument("--output", type=Path, help="also write the table to this file")
    p.add_argument("--record", action="store_true", help=f"write {RESULTS}/STEM.md, in a checkout")
    p.add_argument("--plot", type=Path, help="image of the times against the vocabulary")
    p.add_argument("--seed", type=int, default=0)
    return p


def grid_of(args: argparse.Namespace) -> Grid:
    """The grid that the arguments describe; ``--quick`` first, single choices over it."""
    grid = Grid(seed=args.seed)
    if args.quick:
        grid = grid.quick()
    chosen: dict[str, Any] = {
        "vocabularies": args.vocab,
        "batches": args.batch,
        "dtypes": args.dtype,
        "rules": args.rule,
        "providers": args.provider,
    }
    given: Any = {name: tuple(value) for name, value in chosen.items() if value}
    return replace(grid, **given)


def main(argv: Sequence[str] | None = None) -> int:
    """Run; the exit status is 1 if a provider failed its check."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] and arguments[0] in OTHERS:
        module = importlib.import_module(f".{OTHERS[arguments[0]]}", __package__)
        return int(module.main(arguments[1:]))
    args = parser().parse_args(arguments)
    if args.output and args.record:
        parser().error("--output and --record name two places for one table")
    unknown = set(args.stems) - set(STEMS)
    if unknown:
        parser().error(f"unknown stem {unknown.pop()!r}, expected one of {', '.join(STEMS)}")
    harness.check_files(args.output, args.plot)
    for stem in (args.stems or STEMS) if args.record else ():
        harness.check_files(RESULTS / f"{stem}.md")
    torch.set_num_threads(args.threads)
    command = ["python", "-m", "benchmarks", *arguments]
    every = []
    for stem in args.stems or STEMS:
        rows = []
        for case in STEMS[stem].cases(grid_of(args)):
            rows += harness.run_case(case, args.seconds)
        if not args.output:
            path = RESULTS / f"{stem}.md" if args.record else None
            harness.report(command, harness.table_of(rows), path)
        every += rows
    if args.output:
        harness.report(command, harness.table_of(every), args.output)
    if args.plot is not None:
        plots.plot_bench(every, args.plot, f"{args.threads} threads")
        print(f"written: {args.plot}")
    return int(any(row.error for row in every))


if __name__ == "__main__":
    raise SystemExit(main())
