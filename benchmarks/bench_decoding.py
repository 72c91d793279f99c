"""Decoding with the shipped pair: what the loop costs beside the models.

``python -m benchmarks decoding``. A stopwatch of its own around each model's ``forward`` says how
long the models take; the rest of the loop's wall-clock (drawing, rules, masks, bookkeeping) is the
library's share. No trace is taken. The pair is tiny (3 million parameters), so its forwards are
about as short as any, and the share on real models is smaller.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import harness

BOUND = 0.05


@dataclass(frozen=True)
class Line:
    """Mean per step of one batch size and rule; the run of the median share counts."""

    rule: str
    param: float
    batch: int
    bound: float | None
    share: float
    share_of_runs: list[float]
    us_per_step: float
    us_outside_per_step: float
    steps: int
    tokens_per_second: float
    proxy_rows_saved: float


class Stopwatch:
    """Adds up the time inside the ``forward`` of some models."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def around(self, models: Sequence[torch.nn.Module]) -> Iterator[None]:
        """Time every call of the models' ``forward`` inside the block."""
        originals = [model.forward for model in models]
        for model, forward in zip(models, originals, strict=True):
            model.forward = self._timed(forward)
        try:
            yield
        finally:
            for model in models:
                del model.forward  # the class's own is seen again

    def _timed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return forward(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        # transformers looks at the signature.
        call.__wrapped__ = forward  # type: ignore[attr-defined]
        return call


def measure(pair: Any, rule: str, param: float, batch: int, tokens: int, repeats: int) -> Line:
    """Decode the same prompts several times; every answer runs to the full length."""
    from tta_ext import KnapsackDeferral
    from tta_ext.demo.task import evaluation_problems

    prompts = [problem.prompt for problem in evaluation_problems(batch)]
    kad = KnapsackDeferral(pair.base, pair.proxy, pair.tokenizer, rule=rule, param=param)
    options: dict[str, Any] = {"max_new_tokens": tokens, "eos_token_id": [], "seed": 0}
    kad.generate(prompts, **options)  # caches, allocator, lazy loading
    runs = []
    for _ in range(repeats):
        watch = Stopwatch()
        with watch.around([pair.base, pair.proxy]):
            stats = kad.generate(prompts, **options).stats
        runs.append((1 - watch.seconds / stats.seconds, stats))
    share, stats = sorted(runs, key=lambda run: run[0])[len(runs) // 2]
    return Line(
        rule,
        param,
        batch,
        BOUND if batch == 16 else None,
        statistics.median(run[0] for run in runs),
        [run[0] for run in runs],
        stats.seconds / stats.steps * 1e6,
        share * stats.seconds / stats.steps * 1e6,
        stats.steps,
        stats.tokens_per_second,
        stats.proxy_rows_saved / stats.tokens,
    )


HEADER = (
    "rule", "param", "rows", "outside models", "of all runs", "at most", "us/step", "us outside",
    "tokens/s", "proxy rows saved",
)  # fmt: skip


def _cells(line: Line) -> list[str]:
    missed = line.bound is not None and line.share > line.bound
    return [
        line.rule,
        f"{line.param:g}",
        str(line.batch),
        f"{line.share:.1%}{' (missed)' if missed else ''}",
        f"{min(line.share_of_runs):.1%} to {max(line.share_of_runs):.1%}",
        "" if line.bound is None else f"{line.bound:.0%}",
        f"{line.us_per_step:.0f}",
        f"{line.us_outside_per_step:.0f}",
        f"{line.tokens_per_second:.0f}",
        f"{line.proxy_rows_saved:.0%}",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; the exit status is 1 if the share at B=16 is above its bound."""
    from tta_ext.demo.pair import demo_pair

    parser = argparse.ArgumentParser(prog="python -m benchmarks decoding")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 1])
    parser.add_argument("--tokens", type=int, default=48, help="of each answer (48)")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each line (7)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (1)")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    args = parser.parse_args(argv)
    harness.check_files(args.output)
    torch.set_num_threads(args.threads)
    pair = demo_pair()
    lines = [
        measure(pair, rule, param, batch, args.tokens, args.repeats)
        for batch in args.batch
        for rule, param in (("threshold", 0.4), ("knapsack", 0.3), ("confidence_bet", 0.1))
    ]
    command = ["python", "-m", "benchmarks", "decoding", *(argv or [])]
    harness.report(command, harness.table(HEADER, map(_cells, lines)), args.output)
    return int(any(line.bound is not None and line.share > line.bound for line in lines))
