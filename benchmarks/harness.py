"""Timing, checking and reporting that all benchmarks share.

Everything that is compared runs in one process and in turns: one round times each provider once,
the order is reversed from round to round, and a figure is the least or a quantile over rounds. So
a busy machine disturbs all providers alike, and the ratios hold when the absolute times do not.

Inputs, outputs and seeds are made before the clock starts. The same tensors are read again in each
call: sizes below the last-level cache are measured warm, for every provider and for the copy.
"""

from __future__ import annotations

import datetime
import os
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tta_ext import plots
from tta_ext.files import check_output, write_file

TARGET_SECONDS = 0.001  # a round repeats a fast call until it fills this
MIN_ROUNDS = 3
# What stands above a table, of `environment`.
FACTS = (
    "time", "tta_ext", "torch", "packages", "processor", "memory", "GPUs", "instruction set in use",
    "threads", "load average",
)  # fmt: skip

Run = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Seconds per call over ``rounds`` rounds."""

    best: float
    q20: float
    q50: float
    q80: float
    rounds: int


@dataclass(frozen=True)
class Case:
    """One operator at one dtype and shape.

    Attributes:
        op: name of the operator.
        variant: rule or setting.
        dtype: of the logits.
        batch, vocab: shape of the logits.
        bytes: memory traffic that the operator cannot avoid, by the formula beside it.
        formula: the same in words; s is the bytes of one logit, V the vocabulary, a row.
        providers: name -> call; each returns what ``check`` understands.
        check: (provider, result) -> what is wrong with it against float64, or an empty string.
        softmax: ``torch.softmax`` over the base logits, the yardstick.
    """

    op: str
    variant: str
    dtype: torch.dtype
    batch: int
    vocab: int
    bytes: int
    formula: str
    providers: dict[str, Run]
    check: Callable[[str, Any], str]
    softmax: Run


@dataclass
class Row:
    """One line of the table: a provider of a case."""

    op: str
    variant: str
    dtype: str
    batch: int
    vocab: int
    provider: str
    error: str = ""
    us: dict[str, float] = field(default_factory=dict)
    rounds: int = 0
    bytes: int = 0
    formula: str = ""
    gb_per_s: float = 0.0
    percent_of_copy: float = 0.0
    times_softmax: float = 0.0
    speedup_over_eager: float = 0.0


def measure(runs: dict[str, Run], seconds: float = 0.5, max_rounds: int = 200) -> dict[str, Timing]:
    """Time several calls in turns.

    Args:
        runs: name -> call without arguments.
        seconds: time to spend on each, about; slow calls still get three rounds.
        max_rounds: upper limit of rounds.
    """
    inner, wanted = {}, {}
    for name, run in runs.items():
        run()  # first call: allocations, lazy loading
        start = time.perf_counter()
        run()
        once = max(time.perf_counter() - start, 1e-7)
        inner[name] = max(1, int(TARGET_SECONDS / once))
        wanted[name] = min(max_rounds, max(MIN_ROUNDS, int(seconds / (once * inner[name]))))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for turn in range(max(wanted.values(), default=0)):
        for name in order:
            if turn < wanted[name]:
                samples[name].append(_timed(runs[name], inner[name]))
        order.reverse()
    return {name: summarize(values) for name, values in samples.items()}


def _timed(run: Run, repeats: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(repeats):
        run()
    return (time.perf_counter_ns() - start) / repeats * 1e-9


def summarize(values: Sequence[float]) -> Timing:
    """Least and quantiles of seconds per call."""
    if len(values) > 1:
        tenths = statistics.quantiles(values, n=10, method="inclusive")
    else:
        tenths = list(values) * 9
    return Timing(min(values), tenths[1], tenths[4], tenths[7], len(values))


def copy_run(size: int) -> Run:
    """A copy that moves ``size`` bytes in all (half read, half written): the bandwidth there is."""
    source = torch.zeros(max(1, size // 2), dtype=torch.uint8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def run_case(case: Case, seconds: float, log: Callable[[str], None] = print) -> list[Row]:
    """Check every provider of a case, time those that pass, and derive the figures."""
    rows, runs = [], {}
    for name, run in case.providers.items():
        row = Row(case.op, case.variant, str(case.dtype).removeprefix("torch."), case.batch,
                  case.vocab, name, bytes=case.bytes, formula=case.formula)  # fmt: skip
        try:
            row.error = case.check(name, run())
        except Exception as error:  # a provider that cannot run is a line of the table
            row.error = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if row.error:
            shape = f"{case.batch}x{case.vocab}"
            log(f"{case.op} {case.variant} {row.dtype} {shape} {name}: {row.error}")
        else:
            runs[name] = run
        rows.append(row)
    timings = measure({**runs, "": case.softmax, " copy": copy_run(case.bytes)}, seconds)
    softmax, copy = timings.pop("").best, timings.pop(" copy").best
    for row in rows:
        if row.provider not in timings:
            continue
        timing = timings[row.provider]
        row.us = {key: getattr(timing, key) * 1e6 for key in ("best", "q20", "q50", "q80")}
        row.rounds = timing.rounds
        row.gb_per_s = case.bytes / timing.best * 1e-9
        row.percent_of_copy = 100 * copy / timing.best
        row.times_softmax = timing.best / softmax
        if "eager" in timings:
            row.speedup_over_eager = timings["eager"].best / timing.best
    return rows


def environment() -> dict[str, str]:
    """The machine and the software, and how busy the machine was, to stand beside every figure."""
    from tta_ext import doctor, env

    # Where things lie is of use to who asks the doctor, not beside a figure.
    facts = {k: v.partition(" at ")[0] for k, v in env.collect().items() if k != "C++ sources"}
    facts["time"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    facts["threads"] = str(torch.get_num_threads())
    facts["instruction set in use"] = doctor.diagnose().cpu_isa or "none: reference"
    if hasattr(os, "getloadavg"):
        facts["load average"] = " ".join(f"{value:.2f}" for value in os.getloadavg())
    return facts


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns also stand below one another as plain text.

    Args:
        header: names of the columns.
        rows: cells; a row that ends early has empty ones.
    """
    lines = [list(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    for line in lines:
        line += [""] * (len(header) - len(line))
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |"
        for line in lines
    )


def document(title: str, command: str, facts: Mapping[str, str], body: str) -> str:
    """A table under what was run, where, and with what (:func:`environment`)."""
    head = [f"- {name}: {facts[name]}" for name in FACTS if name in facts]
    return "\n".join([f"# {title}", "", f"`{command}`", "", *head, "", body]) + "\n"


# How such a document begins.
MARK = re.compile(rb"# [^\n]*\n\n`[^\n]*`\n\n- (?:" + "|".join(FACTS).encode() + rb"): ")


def check_files(output: Path | None, plot: Path | None = None) -> None:
    """An error before the work if a document or picture cannot be written, or is another's file.

    Raises:
        ImportError, OSError, ValueError: as of :func:`tta_ext.files.check_output` and
            :func:`tta_ext.plots.check_plot`.
    """
    check_output(output, MARK)
    if plot is not None:
        plots.check_plot(plot)
        check_output(plot, plots.MARK)


def report(command: Sequence[str], body: str, path: Path | None) -> None:
    """Print a table; write it, with its head, to a Markdown file named after the benchmark."""
    print(body)
    if path is None:
        return
    check_files(path)
    write_file(path, document(path.stem, " ".join(command), environment(), body))
    print(f"written: {path}")


COLUMNS = (
    "op", "variant", "dtype", "BxV", "provider", "best us", "q.2", "q.5", "q.8",
    "GB/s", "% copy", "x softmax", "eager/this", "bytes",
)  # fmt: skip


def _cells(row: Row) -> list[str]:
    head = [row.op, row.variant, row.dtype, f"{row.batch}x{row.vocab}", row.provider]
    if row.error:
        return [*head, row.error]
    return [
        *head,
        *(f"{row.us[key]:.1f}" for key in ("best", "q20", "q50", "q80")),
        f"{row.gb_per_s:.2f}",
        f"{row.percent_of_copy:.0f}",
        f"{row.times_softmax:.2f}",
        f"{row.speedup_over_eager:.1f}" if row.speedup_over_eager else "",
        row.formula,
    ]


def table_of(rows: Sequence[Row]) -> str:
    """The figures of the operators' benchmarks."""
    return table(COLUMNS, map(_cells, rows))
