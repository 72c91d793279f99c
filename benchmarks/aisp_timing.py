"""What AISP costs beside best-of-n, in wall-clock and in processor time.

``python -m benchmarks.aisp_timing`` runs both on SmolLM2-135M-Instruct: in turn, on the same rows
and answer lengths, several times, and prints the median of the ratios. Processor time is given as
well, which other processes disturb less.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import process_time
from typing import Any

import torch

from tta_ext.decoding import AdaptiveImportanceSampling, BestOfN
from tta_ext.decoding.rewards import parse_reward
from tta_ext.demo import smollm2

from . import harness
from .aisp_rewards import BASELINE, EVALUATION, conversations


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.aisp_timing", description=__doc__)
    p.add_argument("--samples", type=int, default=64, help="answers a prompt and method (64)")
    p.add_argument("--group", type=int, default=16, help="answers drawn together (16)")
    p.add_argument("--max-new-tokens", type=int, default=24)
    p.add_argument("--prompts", type=int, default=8, help="in one batch (8)")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--output", type=Path, help="where to write the table")
    return p


def timing(model: Any, tokenizer: Any, prompts: Sequence[Any], args: argparse.Namespace) -> str:
    """Time of AISP over best-of-n, the same rows and lengths, in turn."""
    common = {"max_new_tokens": args.max_new_tokens, "eos_token_id": [], "probe": False}
    scorer = parse_reward("letter:s")
    iterations = args.samples // args.group
    methods: dict[str, BestOfN | AdaptiveImportanceSampling] = {
        "best_of_n": BestOfN(
            model, scorer, tokenizer, n=iterations * args.group, group=args.group, **common
        ),
        "aisp": AdaptiveImportanceSampling(
            model, scorer, tokenizer, n=args.group, iterations=iterations, **common
        ),
    }
    part = prompts[: args.prompts]
    for method in methods.values():
        warm: dict[str, Any] = (
            {"n": args.group} if method.name == "best_of_n" else {"iterations": 1}
        )
        method.run(part, seed=0, **warm)
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    cpu: dict[str, list[float]] = {name: [] for name in methods}
    ours: dict[str, list[float]] = {name: [] for name in methods}
    for repeat in range(args.repeats):
        # Turn about, so that a drift of the machine's speed meets both.
        for name in sorted(methods, reverse=bool(repeat % 2)):
            start = process_time()
            result = methods[name].generate(part, seed=repeat)
            cpu[name].append(process_time() - start)
            seconds[name].append(result.timing.total)
            ours[name].append(result.timing.other)
    return timing_table(seconds, cpu, ours)


def timing_table(
    seconds: Mapping[str, Sequence[float]],
    cpu: Mapping[str, Sequence[float]],
    ours: Mapping[str, Sequence[float]],
) -> str:
    """Medians of each method, and AISP's over best-of-n's of the same repeat."""
    rows = []
    for name in seconds:
        ratios, cpu_ratios = (
            [a / b for a, b in zip(found[name], found[BASELINE], strict=True)]
            for found in (seconds, cpu)
        )
        rows.append(
            (
                name,
                f"{statistics.median(seconds[name]):.2f}",
                f"{statistics.median(ours[name]):.2f}",
                f"{statistics.median(ratios):.3f}",
                f"{min(ratios):.3f} to {max(ratios):.3f}",
                f"{statistics.median(cpu_ratios):.3f}",
            )
        )
    names = ("method", "seconds", "outside model and reward", f"x {BASELINE}", "of all repeats",
             "in processor time")  # fmt: skip
    return harness.table(names, rows)


def main() -> None:
    args = parser().parse_args()
    harness.check_files(args.output)
    torch.set_num_threads(args.threads)
    table = timing(*smollm2.load(), conversations(EVALUATION), args)
    harness.report(["python", "-m", "benchmarks.aisp_timing", *sys.argv[1:]], table, args.output)


if __name__ == "__main__":
    main()
