"""Speculative decoding against what it replaces, in one run: ``python -m benchmarks speculative``.

The law is the shipped pair's, so drafts stand as often as they do on a real task; the base's size
is that of a larger model: its MLPs are widened by units with random input and zero output weights,
which are read and multiplied like any other and change nothing. Providers: the plain loop,
speculative decoding at several lengths and ``"auto"``, the base alone in our loop, and for single
rows transformers' own ``generate`` (base alone; assisted by the proxy, whose law is the base's, not
the rule's). Rounds of all providers alternate; medians count. Every answer has the full length.
``predicted`` is what the cost model of :mod:`tta_ext.decoding.draft_length` expects of a length, by
the costs that the automatic run has measured, over the plain loop.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import harness

LENGTHS = (3, 5, 8)
SLOWEST_AUTO = 0.97
VERIFY_SHARE = 0.03


@dataclass
class Line:
    """One provider at one batch size and rule; medians over the rounds."""

    rule: str
    param: float
    batch: int
    provider: str
    tokens_per_second: float
    times_plain: float
    predicted: float | None = None
    acceptance: float | None = None
    tokens_per_base_forward: float | None = None
    base_share: float | None = None
    proxy_share: float | None = None
    own_share: float | None = None
    verify_share: float | None = None
    note: str = ""


@torch.inference_mode(False)
def widen(model: Any, width: int, seed: int = 0) -> Any:
    """A Llama with MLPs of ``width`` units and the logits of ``model``."""
    config = copy.deepcopy(model.config)
    narrow, config.intermediate_size = config.intermediate_size, width
    large = type(model)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    source = model.state_dict()
    with torch.no_grad():
        for name, target in large.state_dict().items():
            weight = source[name]
            if weight.shape == target.shape:
                target.copy_(weight)
            elif weight.shape[0] == narrow:  # what goes into the units
                target.copy_(torch.randn(target.shape, generator=generator) * 0.02)
                target[:narrow] = weight
            else:
                target.zero_()
                target[:, :narrow] = weight
        tokens = torch.arange(2, 12)[None]
        torch.testing.assert_close(
            large(input_ids=tokens).logits, model(input_ids=tokens).logits, rtol=1e-4, atol=1e-3
        )
    return large


class _Verification:
    """Adds up the time inside ``deferral_verify``."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def watch(self) -> Iterator[None]:
        from tta_ext import ops

        original = ops.deferral_verify

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        ops.deferral_verify = timed
        try:
            yield
        finally:
            ops.deferral_verify = original


def _ours(kad: Any, prompts: list[str], options: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    def run() -> dict[str, Any]:
        watch = _Verification()
        start = time.perf_counter()
        with watch.watch():
            stats = kad.generate(prompts, **options).stats
        wall = time.perf_counter() - start
        return {"stats": stats, "speed": stats.tokens / wall, "verify": watch.seconds / wall}

    return run


def _theirs(
    base: Any, tokenizer: Any, prompt: str, tokens: int, assistant: Any
) -> Callable[[], dict[str, Any]]:
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    options: dict[str, Any] = {} if assistant is None else {"assistant_model": assistant}

    def run() -> dict[str, Any]:
        start = time.perf_counter()
        out = base.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=True,
            top_k=0,
            pad_token_id=0,
            **options,
        )
        return {"speed": (out.shape[1] - ids.shape[1]) / (time.perf_counter() - start)}

    return run


def _predict(kad: Any, prompts: list[str], options: dict[str, Any]) -> dict[str, float]:
    """What the cost model expects of each fixed length, after an automatic run."""
    from tta_ext.decoding.kad import _Request

    request = _Request(kad, prompts, **options, speculative="auto")
    (batch,) = request.batches(None)
    request.start(batch).run()
    policy: Any = request.policy
    rates = np.full(len(prompts), policy.rate(-1))
    rows = len(prompts)
    plain = rows / policy.costs.plain(rows)
    found = {}
    for length in LENGTHS:
        tokens, seconds = policy.costs.round(np.full(rows, length), rates)
        found[f"speculative {length}"] = tokens / seconds / plain
    return found


def measure(
    base: Any, pair: Any, rule: str, param: float, batch: int, tokens: int, repeats: int
) -> list[Line]:
    """All providers over the same prompts."""
    from tta_ext import KnapsackDeferral
    from tta_ext.demo.task import evaluation_problems

    prompts = [problem.prompt for problem in evaluation_problems(batch)]
    kad = KnapsackDeferral(base, pair.proxy, pair.tokenizer, rule=rule, param=param)
    options: dict[str, Any] = {"max_new_tokens": tokens, "eos_token_id": [], "seed": 0}
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        "plain": _ours(kad, prompts, options),
        "base alone": _ours(kad, prompts, options | {"rule": "threshold", "param": 0.0}),
    }
    for length in (*LENGTHS, "auto"):
        runs[f"speculative {length}"] = _ours(kad, prompts, options | {"speculative": length})
    if batch == 1:
        runs["transformers, base"] = _theirs(base, pair.tokenizer, prompts[0], tokens, None)
        runs["transformers, assisted"] = _theirs(
            base, pair.tokenizer, prompts[0], tokens, pair.proxy
        )
    predicted = _predict(kad, prompts, options)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    for round_ in range(repeats + 1):
        for name, run in runs.items():
            result = run()
            if round_:  # the first warms up
                results[name].append(result)
    speeds = {name: statistics.median(r["speed"] for r in found) for name, found in results.items()}
    lines = []
    for name, found in results.items():
        line = Line(rule, param, batch, name, speeds[name], speeds[name] / speeds["plain"])
        line.predicted = predicted.get(name)
        stats = found[-1].get("stats")
        if stats is not None:
            line.base_share = stats.base_seconds / stats.seconds
            line.proxy_share = stats.proxy_seconds / stats.seconds
            line.own_share = stats.other_share
            if stats.draft_tokens:
                line.acceptance = stats.acceptance_rate
                line.tokens_per_base_forward = stats.tokens_per_base_forward
                line.verify_share = statistics.median(r["verify"] for r in found)
            line.note = stats.speculation
        lines.append(line)
    return lines


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def show(lines: Sequence[Line]) -> None:
    """Print the table."""
    print(
        f"{'rule':<14} {'B':>2} {'provider':<22} {'tokens/s':>8} {'x plain':>7} {'predicted':>9} "
        f"{'accepted':>8} {'per base':>8} {'base':>5} {'proxy':>5} {'ours':>5} {'verify':>6}"
    )
    for line in lines:
        print(
            f"{line.rule:<14} {line.batch:>2} {line.provider:<22} {line.tokens_per_second:>8.1f} "
            f"{line.times_plain:>7.2f} {_cell(line.predicted, '.2f'):>9} "
            f"{_cell(line.acceptance, '.0%'):>8} {_cell(line.tokens_per_base_forward, '.2f'):>8} "
            f"{_cell(line.base_share, '.0%'):>5} {_cell(line.proxy_share, '.0%'):>5} "
            f"{_cell(line.own_share, '.1%'):>5} {_cell(line.verify_share, '.1%'):>6} "
            f"{line.note}".rstrip()
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; the exit status is 1 if a bound of it is missed."""
    from tta_ext.demo.evaluate import load_pair

    parser = argparse.ArgumentParser(prog="python -m benchmarks speculative")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, default=96, help="of each answer (96)")
    parser.add_argument("--width", type=int, default=32768, help="units of the base's MLPs (32768)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds that count (3)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (1)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    pair = load_pair()
    base = widen(pair.base, args.width)
    lines = []
    for batch in args.batch:
        for rule, param in (("threshold", 0.4), ("confidence_bet", 0.2)):
            lines += measure(base, pair, rule, param, batch, args.tokens, args.repeats)
    show(lines)
    slow = [x for x in lines if x.provider.endswith("auto") and x.times_plain < SLOWEST_AUTO]
    dear = [x for x in lines if (x.verify_share or 0.0) > VERIFY_SHARE]
    for line in slow:
        print(f"MISS: auto at {line.times_plain:.2f}x plain ({line.rule}, B={line.batch})")
    for line in dear:
        print(f"MISS: verification takes {line.verify_share:.1%} ({line.provider}, B={line.batch})")
    if args.json:
        harness.save(
            args.json, lines, command=["python", "-m", "benchmarks", "speculative", *(argv or [])]
        )
    return int(bool(slow or dear))
