"""``python -m benchmarks calls``: what a public call costs besides its work, part by part.

Rows of 64 logits, ``out=`` and tensor positions, as in a decoding step. Each column adds one part
to the one before it and shows the difference:

* *torch* is an operator of ATen's, ``torch.softmax(..., out=)``, whole: what torch itself takes.
* *dispatcher*: torch calls ours with no rows: arguments boxed and unboxed, checked in C++.
* *kernel*: the same with one row.
* *invoke*: the version counter, the guard below autograd, who is to run.
* *checks*: arguments turned into tensors in Python, and what of them the kernel does not check.
* *outputs*: made by the call, where the caller gives none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tta_ext import dispatch, ops, schemas

from . import harness
from .data import language_model_pair

VOCAB = 64
RULE: dict[str, Any] = {"rule": "knapsack", "param": 0.3}
HEADER = ("op", "public call, us", "dispatcher", "kernel", "invoke", "checks", "outputs", "torch")


def _calls(base: Tensor, proxy: Tensor) -> dict[str, tuple[Any, ...]]:
    """op -> (public function, its tensors, keywords)."""
    numbers = {"position": torch.zeros(len(base), dtype=torch.int64), "sequence": 0}
    keys: dict[str, Any] = {"seed": torch.tensor(1), **numbers}
    return {
        "deferral_sample": (ops.deferral_sample, (base, proxy), {**RULE, **keys}),
        "deferral_propose": (ops.deferral_propose, (base,), {**RULE, **keys}),
        "deferral_mask": (ops.deferral_mask, (base,), RULE),
        "deferral_probs": (ops.deferral_probs, (base, proxy), RULE),
        "deferral_stats": (ops.deferral_stats, (base,), RULE),
        "categorical_sample": (ops.categorical_sample, (base,), keys),
    }


def _parts(name: str, rows: int, seconds: float) -> dict[str, float]:
    """Microseconds of one operator's call, whole and from the inside out."""
    base, proxy = language_model_pair(1, VOCAB, 4)
    public, tensors, given = _calls(base[:rows], proxy[:rows])[name]
    out = public(*tensors, **given)
    invoked = mock.Mock(side_effect=lambda op, args, outs, recheck: outs)
    with mock.patch.object(sys.modules[public.__module__], "invoke", invoked):
        public(*tensors, **given, out=out)
    (spec, args, outs, recheck), run = invoked.call_args.args, schemas.OPS[name].run
    outputs = dict(zip(spec.outputs, outs, strict=True))

    def bare() -> None:
        run(*args, **outputs)

    with dispatch.below_autograd():
        found = harness.measure({"run": bare}, seconds)
    if rows:
        probs = torch.empty_like(base)
        whole = {
            "invoke": lambda: dispatch.invoke(spec, args, outs, recheck),
            "public": lambda: public(*tensors, **given, out=out),
            "made": lambda: public(*tensors, **given),
            "torch": lambda: torch.softmax(base, -1, out=probs),
        }
        found.update(harness.measure(whole, seconds))
    return {part: timing.best * 1e6 for part, timing in found.items()}


def lines(seconds: float = 0.5) -> list[list[str]]:
    """A line an operator."""
    found = []
    for name in _calls(*language_model_pair(1, VOCAB, 4)):
        empty, full = (_parts(name, rows, seconds) for rows in (0, 1))
        cells = [
            full["public"],
            empty["run"],
            full["run"] - empty["run"],
            full["invoke"] - full["run"],
            full["public"] - full["invoke"],
            full["made"] - full["public"],
            full["torch"],
        ]
        found.append([name, *(f"{cell:.1f}" for cell in cells)])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks calls", description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.5, help="on each call (0.5)")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    args = parser.parse_args(argv)
    harness.check_files(args.output)
    torch.set_num_threads(1)
    command = ["python", "-m", "benchmarks", "calls", *(argv or [])]
    harness.report(command, harness.table(HEADER, lines(args.seconds)), args.output)
    return 0
