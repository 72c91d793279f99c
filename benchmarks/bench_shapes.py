"""``python -m benchmarks shapes``: does the shape of a row matter to its speed?

Every operator over rows of many shapes (:data:`SHAPES`), budgets, rules and types, one thread,
V = 128256. A *cell* is a call; its figure is its processor time over that of a ``torch.softmax``
of every row that it reads, just before, with the same instruction set, the median over rounds. A
round goes over all rows, so that a disturbance is in few of a cell's. The table shows, of each
operator and instruction set, the worst cell beside the kind one: a row as peaked as a language
model's, float32, a budget of .3.

The rows that a call reads: the base's; the proxy's too where the rule reads it or the draw is
deferred; of ``deferral_verify`` all positions that it reaches, of drafts that are accepted whole
or, in a line of its own, rejected at once. *Over base* divides by one softmax of the base's row,
however many are read. Sampling is a mean over seeds.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tta_ext import ops, rng, rules

from . import harness
from .data import SHAPES, shaped_pair

VOCAB = 128256
DTYPES = ("float32", "bfloat16", "float16")
BUDGETS = (0.001, 0.1, 0.3, 0.7, 0.95)
# Of the other rules, parameters about which a row's tokens divide.
RULES = {
    "threshold": 1e-5,
    "confidence_bet": 0.01,
    "nudging": 0.3,
    "relative": 1e-5,
    "argmax": None,
    "proxy_below": -1e-5,
    "proxy_above": -1e-5,
    "relative_ratio": 0.9,
    "optimal": -0.1,
}
KIND = ("language model", "float32", "knapsack .3")
SEEDS = 8
DRAFT = 4
TRIES = 100
ROUNDS = 31
# By level: the name here, and PyTorch's for ATEN_CPU_CAPABILITY.
ISAS = (("scalar", "default"), ("AVX2", "avx2"), ("AVX-512", "avx512"))


# What the worst cell of an operator may cost, in softmaxes of the rows that it reads. A rejected
# draft is replaced by a draw from the residual law, which takes the work of deferral_probs.
PROMISES: dict[str, float | None] = {
    "deferral_sample": 0.9,
    "deferral_propose": 0.9,
    "deferral_stats": 2.0,
    "deferral_mask": 2.0,
    "deferral_probs": 1.6,
    "deferral_verify": 0.9,
    "deferral_verify, rejected": None,
}


@dataclass(frozen=True)
class Cell:
    """One operator on one row; its time over softmaxes of all rows that it reads, and over one."""

    op: str
    shape: str
    dtype: str
    rule: str
    ratio: float
    over_base: float

    @property
    def name(self) -> str:
        return f"{self.shape}, {self.dtype}, {self.rule}"

    @property
    def kind(self) -> bool:
        return (self.shape, self.dtype, self.rule) == KIND


Run = Callable[[], Any]


@dataclass(frozen=True)
class Call:
    """Some calls of an operator, and of what a softmax is taken, how often for each call: the
    base's rows first.
    """

    run: Run
    times: int
    reads: Sequence[tuple[float, Tensor]]


def _keys(seed: int, batch: int = 1) -> dict[str, Any]:
    return {
        "seed": torch.tensor(seed, dtype=torch.int64),
        "position": torch.zeros(batch, dtype=torch.int64),
        "sequence": torch.zeros(batch, dtype=torch.int64),
    }


def _drafts(base: Tensor, proxy: Tensor, law: dict[str, Any], whole: bool) -> Any:
    """Drafts drawn from the proxy: accepted whole or rejected at once; None if no try gave such."""
    length = torch.tensor([DRAFT])
    for sequence in range(TRIES):
        keys = {**_keys(0), "sequence": torch.tensor([sequence])}
        draft = torch.stack(
            [
                ops.categorical_sample(
                    proxy[k : k + 1], **{**keys, "position": torch.tensor([k])}, stream=rng.DRAFT
                )
                for k in range(DRAFT)
            ],
            -1,
        )
        drafts = (base[None], proxy[None], draft, length)
        more = {**law, **keys, "return_mass": False}
        checked = ops.deferral_verify(*drafts, **more)
        if int(checked.accepted) == (DRAFT if whole else 0):
            return drafts, more, checked
    return None


def _calls(
    base: Tensor, proxy: Tensor, rule: str, param: float | None, outs: tuple[Any, Tensor]
) -> dict[str, Call]:
    """op -> its calls; all rules write to the same mask and probabilities, `outs`."""
    law: dict[str, Any] = {"rule": rule, "param": param}
    reads_q = rules.rule_code(rule) in rules.NEEDS_PROXY
    one, two = base[:1], proxy[:1]
    keys = [_keys(seed) for seed in range(SEEDS)]
    drawn = ops.deferral_sample(one, two, **law, **keys[0])
    share = sum(float(ops.deferral_sample(one, two, **law, **k).deferred) for k in keys) / SEEDS
    stats, (mask, probs) = ops.deferral_stats(one, two, **law), outs
    both = [(1.0, one), (1.0, two)]
    judged = both if reads_q else both[:1]
    found = {
        "deferral_sample": Call(
            lambda: [ops.deferral_sample(one, two, **law, **k, out=drawn) for k in keys],
            SEEDS,
            both if reads_q else [(1.0, one), (share, two)],
        ),
        "deferral_stats": Call(lambda: ops.deferral_stats(one, two, **law, out=stats), 1, judged),
        "deferral_mask": Call(lambda: ops.deferral_mask(one, two, **law, out=mask), 1, judged),
        "deferral_probs": Call(lambda: ops.deferral_probs(one, two, **law, out=probs), 1, both),
    }
    if not reads_q:
        found["deferral_propose"] = Call(
            lambda: [ops.deferral_propose(one, **law, **k, out=drawn) for k in keys], SEEDS, judged
        )
    positions = DRAFT + reads_q  # of the proxy
    for whole in (True, False):
        name = "deferral_verify" if whole else "deferral_verify, rejected"
        made = _drafts(base, proxy[:positions], law, whole)
        if made is None:
            continue
        drafts, more, checked = made
        reached = int(checked.accepted) + 1
        found[name] = Call(
            partial(ops.deferral_verify, *drafts, **more, out=checked),
            1,
            [(1.0, base[:reached]), (1.0, proxy[: min(reached, positions)])],
        )
    return found


def _spent(run: Run) -> float:
    start = time.thread_time_ns()
    run()
    return (time.thread_time_ns() - start) * 1e-9


def _softmax(rows: Tensor) -> float:
    return _spent(lambda: torch.softmax(rows, -1))


def row_calls(shape: str, dtype: str, vocab: int = VOCAB) -> dict[tuple[str, str], Call]:
    """(op, rule) -> its calls on one row."""
    base, proxy = shaped_pair(shape, DRAFT + 1, vocab, 0, getattr(torch, dtype))
    laws: list[tuple[str, str, float | None]] = [
        (f"knapsack {b:g}".replace("0.", "."), "knapsack", b) for b in BUDGETS
    ]
    laws += [(rule, rule, param) for rule, param in RULES.items()]
    one, two = base[:1], proxy[:1]
    outs = (
        ops.deferral_mask(one, two, rule="argmax"),
        ops.deferral_probs(one, two, rule="argmax"),
    )
    return {
        (op, name): call
        for name, rule, param in laws
        for op, call in _calls(base, proxy, rule, param, outs).items()
    }


def cells(rows: Sequence[tuple[str, str]], rounds: int, vocab: int = VOCAB) -> list[Cell]:
    """All cells of rows (shape and type), timed in turns with softmaxes of what they read."""
    runs = {
        (op, shape, dtype, name): call
        for shape, dtype in rows
        for (op, name), call in row_calls(shape, dtype, vocab).items()
    }
    ratios: dict[tuple[str, str, str, str], list[tuple[float, float]]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, call in runs.items():
            softmax = [_softmax(rows) for _, rows in call.reads]
            reads = sum(times * each for (times, _), each in zip(call.reads, softmax, strict=True))
            of_base = softmax[0] / len(call.reads[0][1])
            spent = _spent(call.run) / call.times
            ratios[key].append((spent / reads, spent / of_base))
    return [
        Cell(*key, *(statistics.median(each) for each in zip(*found, strict=True)))
        for key, found in ratios.items()
    ]


def extremes(found: Sequence[Cell], op: str) -> tuple[Cell, Cell, Cell]:
    """An operator's kind cell, its worst, and the worst over a softmax of the base's row alone."""
    here = [cell for cell in found if cell.op == op]
    kind = next(cell for cell in here if cell.kind)
    worst = max(here, key=lambda cell: cell.ratio)
    return kind, worst, max(here, key=lambda cell: cell.over_base)


def summary(found: Sequence[Cell], isa: str) -> list[list[str]]:
    """A line an operator: its worst cell beside the kind one."""
    lines = []
    for op, bound in PROMISES.items():
        kind, worst, base = extremes(found, op)
        missed = bound is not None and worst.ratio > bound
        lines.append(
            [op, isa, f"{kind.ratio:.2f}", f"{worst.ratio:.2f}{' (missed)' if missed else ''}",
             "" if bound is None else f"<= {bound:g}",
             worst.name, f"{base.over_base:.2f}", base.name]
        )  # fmt: skip
    return lines


HEADER = ("op", "instructions", "kind", "worst", "promised", "where", "worst over base", "where")


def levels() -> range:
    """Of the instruction sets of this machine that have vectors, widest first."""
    ops.normal(1, seed=0)  # the library is loaded from here on
    widest: int = torch.ops.tta_ext.cpu_isa(-1)
    return range(widest, min(widest, 1) - 1, -1)


def _cells(
    level: int, rounds: int, shapes: Sequence[str], dtypes: Sequence[str], vocab: int
) -> list[Cell]:
    torch.set_num_threads(1)
    ops.normal(1, seed=0)
    torch.ops.tta_ext.cpu_isa(level)
    return cells(list(itertools.product(shapes, dtypes)), rounds, vocab)


def measure(
    rounds: int = ROUNDS,
    shapes: Sequence[str] = tuple(SHAPES),
    dtypes: Sequence[str] = DTYPES,
    vocab: int = VOCAB,
) -> dict[str, list[Cell]]:
    """Instruction set -> its cells, those of :data:`KIND` among them.

    Each set in a process of its own, whose softmax has no wider one: PyTorch reads its limit where
    it is loaded.
    """
    shapes = list(dict.fromkeys([KIND[0], *shapes]))
    dtypes = list(dict.fromkeys([KIND[1], *dtypes]))
    found: dict[str, list[Cell]] = {}
    context = multiprocessing.get_context("spawn")
    for level in levels():
        name, limit = ISAS[level]
        with (
            mock.patch.dict(os.environ, ATEN_CPU_CAPABILITY=limit),
            ProcessPoolExecutor(1, mp_context=context) as pool,
        ):
            found[name] = pool.submit(_cells, level, rounds, shapes, dtypes, vocab).result()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the worst cell of every operator; the exit status is 1 if one breaks its promise."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks shapes", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of every call ({ROUNDS})")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--vocab", type=int, default=VOCAB, help=f"({VOCAB})")
    parser.add_argument("--all", action="store_true", help="every cell, not only the worst")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    args = parser.parse_args(argv)
    harness.check_files(args.output)
    torch.set_num_threads(1)
    start = time.perf_counter()
    found = measure(args.rounds, args.shape, args.dtype, args.vocab)
    if args.all:
        rows = [
            [c.op, isa, c.shape, c.dtype, c.rule, f"{c.over_base:.2f}", f"{c.ratio:.2f}"]
            for isa, every in found.items()
            for c in every
        ]
        print(
            harness.table(("op", "instructions", "shape", "dtype", "rule", "over base", "x"), rows)
        )
    lines = [line for isa, every in found.items() for line in summary(every, isa)]
    command = ["python", "-m", "benchmarks", "shapes", *(argv or [])]
    harness.report(command, harness.table(HEADER, lines), args.output)
    print(f"\n{time.perf_counter() - start:.0f} s in all")
    return int(any("missed" in line[3] for line in lines))
