"""Speculative decoding against what it replaces, in one run: ``python -m benchmarks speculative``.

The law is the shipped pair's, so drafts stand as often as they do on a real task; the base's size
is that of a larger model: its MLPs are widened by units with random input and zero output weights,
which are read and multiplied like any other and change nothing. Providers: the plain loop,
speculative decoding at several lengths and ``"auto"``, the base alone in our loop, and for single
rows transformers' own ``generate`` (base alone; assisted by the proxy, whose law is the base's, not
the rule's). Rounds of all providers alternate; medians count. Every answer has the full length.
A length is promised what the cost model of :mod:`tta_ext.decoding.draft_costs` is sure of, over the
plain loop: costs of each model's forwards are measured on their own at every number of rows and
columns that occurs, the chance that a draft token stands is the run's, and whole calls are played
by them, to the last row's last token. Calls differ by luck, so the model gives a range for the
median of the calls that are measured; where its low end (one in twenty falls below) is
:data:`PAYS`, the measurement must reach that too. Each round has a seed of its own.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import harness

LENGTHS = (3, 5, 8)
SLOWEST_AUTO = 0.97
PAYS = 1.5
CALLS_PLAYED = 200
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
    predicted_low: float | None = None
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


# One call with a seed.
Provider = Callable[[int], dict[str, Any]]


def _ours(kad: Any, prompts: list[str], options: dict[str, Any]) -> Provider:
    def run(seed: int) -> dict[str, Any]:
        watch = _Verification()
        start = time.perf_counter()
        with watch.watch():
            stats = kad.generate(prompts, seed=seed, **options).stats
        wall = time.perf_counter() - start
        return {"stats": stats, "speed": stats.tokens / wall, "verify": watch.seconds / wall}

    return run


def _theirs(base: Any, tokenizer: Any, prompt: str, tokens: int, assistant: Any) -> Provider:
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    options: dict[str, Any] = {} if assistant is None else {"assistant_model": assistant}

    def run(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
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


Costs = dict[tuple[int, int], float]


@torch.inference_mode()
def _forward_costs(model: Any, prompts: list[list[int]], longest: int, repeats: int = 5) -> Costs:
    """Median seconds of a forward of the loop's runner over (rows, columns), all that may occur."""
    from tta_ext.decoding.runtime.runner import Runner

    middle = 48  # tokens that an answer has written at half time
    rows = [[*prompt, *([prompt[-1]] * middle)] for prompt in prompts]
    runner = Runner(model, rows, room=longest + 1, vocabulary=_size(model))
    runner.prefill()
    costs: Costs = {}
    for count in range(len(rows), 0, -1):
        if count < len(rows):
            runner.keep(list(range(count)))
        for columns in range(1, longest + 2):
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                runner.score([[5] * (columns - 1)] * count)
                times.append(time.perf_counter() - start)
                runner.rollback([len(row) for row in rows[:count]], [[]] * count)
                runner.rollback([len(row) - 1 for row in rows[:count]], [[5]] * count)
            costs[count, columns] = statistics.median(times)
    return costs


def _size(model: Any) -> int:
    return model.get_output_embeddings().weight.shape[0]


def _play(
    length: int,
    rate: float,
    share: float,
    rows: int,
    tokens: int,
    base: Costs,
    proxy: Costs,
    own: float,
    dense: bool,
) -> list[float]:
    """Seconds of calls whose rounds draft ``length`` tokens (0: the plain loop).

    Args:
        rate: chance that a draft token stands.
        share: of tokens that come from the proxy.
        base, proxy: costs of forwards by (rows, columns).
        own: seconds outside the models for each position of a round.
        dense: the rule compares the models.
    """
    draw, calls = random.Random(0), []
    for _ in range(CALLS_PLAYED):
        left, total = [tokens] * rows, 0.0
        while left:
            count = len(left)
            drafts = [min(length, n - 1) for n in left]
            most = max(drafts)
            total += base[count, most + 1] + own * (most + 1)
            for j in range(most):
                drawing = sum(n >= j for n in drafts)
                total += proxy[drawing, 1]
            stood = [next((k for k in range(n) if draw.random() >= rate), n) for n in drafts]
            unsure = sum(
                k == n and draw.random() < share for k, n in zip(stood, drafts, strict=True)
            )
            if dense or unsure:
                total += proxy[count if dense else unsure, 1]
            left = [n - k - 1 for n, k in zip(left, stood, strict=True) if n > k + 1]
        calls.append(total)
    return calls


def _pooled(found: Sequence[Any], rate: str, weight: str) -> float:
    """A rate over several calls."""
    weights = [getattr(stats, weight) for stats in found]
    return sum(getattr(x, rate) * w for x, w in zip(found, weights, strict=True)) / sum(weights)


def _predict(
    costs: tuple[Costs, Costs],
    rows: int,
    tokens: int,
    speculative: dict[int, list[Any]],
    plain: list[Any],
    dense: bool,
) -> dict[str, float]:
    """The low end of what the cost model expects to be measured, of each length."""
    base, proxy = costs
    share = _pooled(plain, "deferral_rate", "tokens")
    own = statistics.median(stats.other_seconds / stats.steps for stats in plain)
    alone = statistics.mean(_play(0, 0.0, share, rows, tokens, base, proxy, own, dense))
    found = {}
    for length, runs in speculative.items():
        own = statistics.median(x.other_seconds / (x.steps * (length + 1)) for x in runs)
        rate = _pooled(runs, "acceptance_rate", "judged_tokens")
        calls = _play(length, rate, share, rows, tokens, base, proxy, own, dense)
        medians = [
            statistics.median(calls[i : i + len(runs)]) for i in range(len(calls) - len(runs) + 1)
        ]
        slow = statistics.quantiles(medians, n=20)[-1]
        found[f"speculative {length}"] = alone / slow
    return found


def measure(
    base: Any,
    pair: Any,
    rule: str,
    param: float,
    prompts: list[str],
    tokens: int,
    repeats: int,
    costs: tuple[Costs, Costs],
) -> list[Line]:
    """All providers over the same prompts; ``costs`` are base's and proxy's for so many rows."""
    from tta_ext import KnapsackDeferral, rules

    batch = len(prompts)
    kad = KnapsackDeferral(base, pair.proxy, pair.tokenizer, rule=rule, param=param)
    options: dict[str, Any] = {"max_new_tokens": tokens, "eos_token_id": []}
    runs: dict[str, Provider] = {
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
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    for round_ in range(repeats + 1):
        for name, run in runs.items():
            result = run(round_)
            if round_:  # the first warms up
                results[name].append(result)
    speeds = {name: statistics.median(r["speed"] for r in found) for name, found in results.items()}
    stats = {name: [r["stats"] for r in found if "stats" in r] for name, found in results.items()}
    predicted = _predict(
        costs,
        batch,
        tokens,
        {length: stats[f"speculative {length}"] for length in LENGTHS},
        stats["plain"],
        rules.rule_code(rule) in rules.NEEDS_PROXY,
    )
    lines = []
    for name, found in results.items():
        line = Line(rule, param, batch, name, speeds[name], speeds[name] / speeds["plain"])
        line.predicted_low = predicted.get(name)
        if stats[name]:
            last = stats[name][-1]
            line.base_share = last.base_seconds / last.seconds
            line.proxy_share = last.proxy_seconds / last.seconds
            line.own_share = last.other_share
            if last.draft_tokens:
                line.acceptance = _pooled(stats[name], "acceptance_rate", "judged_tokens")
                line.tokens_per_base_forward = last.tokens_per_base_forward
                line.verify_share = statistics.median(r["verify"] for r in found)
            line.note = last.speculation
        lines.append(line)
    return lines


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


HEADER = (
    "rule", "param", "rows", "provider", "tokens/s", "x plain", "promised", "accepted",
    "a base forward", "base", "proxy", "ours", "verify", "note",
)  # fmt: skip


def _cells(line: Line) -> list[str]:
    return [
        line.rule,
        f"{line.param:g}",
        str(line.batch),
        line.provider,
        f"{line.tokens_per_second:.1f}",
        f"{line.times_plain:.2f}",
        f">= {PAYS:g}" if (line.predicted_low or 0.0) >= PAYS else "",
        _cell(line.acceptance, ".0%"),
        _cell(line.tokens_per_base_forward, ".2f"),
        _cell(line.base_share, ".0%"),
        _cell(line.proxy_share, ".0%"),
        _cell(line.own_share, ".1%"),
        _cell(line.verify_share, ".1%"),
        line.note,
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; the exit status is 1 if a bound of it is missed."""
    from tta_ext.demo.pair import demo_pair
    from tta_ext.demo.task import evaluation_problems

    parser = argparse.ArgumentParser(prog="python -m benchmarks speculative")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, default=96, help="of each answer (96)")
    parser.add_argument("--width", type=int, default=32768, help="units of the base's MLPs (32768)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds that count (3)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (1)")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    pair = demo_pair()
    base = widen(pair.base, args.width)
    lines = []
    for batch in args.batch:
        prompts = [problem.prompt for problem in evaluation_problems(batch)]
        ids = [pair.tokenizer(prompt)["input_ids"] for prompt in prompts]
        costs = (_forward_costs(base, ids, max(LENGTHS)), _forward_costs(pair.proxy, ids, 1))
        for rule, param in (("threshold", 0.4), ("confidence_bet", 0.2)):
            lines += measure(base, pair, rule, param, prompts, args.tokens, args.repeats, costs)
    command = ["python", "-m", "benchmarks", "speculative", *(argv or [])]
    harness.report(command, harness.table(HEADER, map(_cells, lines)), args.output)
    slow = [x for x in lines if x.provider.endswith("auto") and x.times_plain < SLOWEST_AUTO]
    dear = [x for x in lines if (x.verify_share or 0.0) > VERIFY_SHARE]
    promised = [x for x in lines if (x.predicted_low or 0.0) >= PAYS]
    broken = [x for x in promised if x.times_plain < PAYS]
    print(
        f"the cost model is sure of {PAYS:g}x in {len(promised)} lines; "
        f"{len(promised) - len(broken)} of them reach it"
    )
    for line in broken:
        print(
            f"MISS: {line.times_plain:.2f}x plain where {line.predicted_low:.2f}x was predicted "
            f"({line.rule}, {line.provider}, B={line.batch})"
        )
    for line in slow:
        print(f"MISS: auto at {line.times_plain:.2f}x plain ({line.rule}, B={line.batch})")
    for line in dear:
        print(f"MISS: verification takes {line.verify_share:.1%} ({line.provider}, B={line.batch})")
    return int(bool(slow or dear or broken or not promised))
