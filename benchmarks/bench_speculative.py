"""Speculative decoding against the plain loop: ``python -m benchmarks speculative``.

Tokens are the same, so a figure is a ratio of times: providers run in turns with the same seed, in
an order that is reversed from round to round, each round gives a ratio to its own plain run.
Answers have the full length. All settings have the laws of the shipped pair, so that drafts stand
as often as on a real task:

* ``large base``: the base's MLPs are widened by units with random input and zero output weights,
  which are read and multiplied like any other and change nothing. Drafts pay.
* ``slow proxy``: the proxy's are, and the base drafts.
* ``even``: the proxy's are widened until it costs what the base does. Drafts cost.
* ``bad drafts``: the pair as it is, and drafts by lookup, of which few stand.
* ``short``: answers of a few tokens by the large base.

``auto`` is one object for all rounds and remembers what earlier ones measured, as a user's later
calls do; ``auto, first`` is a new object each time. In the second table one object's first 40 calls
run between two plain runs each, and a ratio is to the mean of both; ``plain again`` over ``plain``
says what the machine's noise is. Its times are of the process's CPU. The third counts equal answers
where models compute in few digits, so that a forward of several columns rounds otherwise than one
of one column; given equal logits all are equal, which ``tests/test_speculative.py`` shows.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import harness

LENGTHS = (3, 5, 8)
RULES = (("threshold", 0.4), ("confidence_bet", 0.2))
SLOWEST_AUTO = 0.97
SHORT, RUNS = 12, 40


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


def as_slow(model: Any, other: Any) -> Any:
    """``model`` widened until a forward of one column takes as long as one of ``other``."""
    token, width = torch.tensor([[5]]), model.config.intermediate_size
    while True:
        runs: dict[str, harness.Run] = {
            "this": partial(model, token),
            "other": partial(other, token),
        }
        with torch.inference_mode():
            times = harness.measure(runs, 0.2)
        if times["this"].q20 >= times["other"].q20:
            return model
        width *= 2
        model = widen(model, width)


@dataclass
class Provider:
    """One way to write the same answers (``fresh``: forgetful), its times and what it did."""

    name: str
    speculative: int | str = 0
    draft: str = "proxy"
    fresh: bool = False
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    stats: Any = None
    equal: int = 0
    answers: int = 0


@dataclass
class Setting:
    """What is answered, by whom, and who is compared; the first provider is the plain loop."""

    name: str
    pair: Sequence[Any]
    rule: tuple[str, float]
    rows: int
    tokens: int
    rounds: int
    others: Sequence[Provider]


def run(setting: Setting) -> list[Provider]:
    """All providers in turns over the same prompts."""
    from tta_ext import KnapsackDeferral
    from tta_ext.demo.task import evaluation_problems

    name, param = setting.rule
    found = [Provider("plain"), *setting.others]
    owners = [KnapsackDeferral(*setting.pair, rule=name, param=param) for _ in found]
    keys: dict[str, Any] = {"max_new_tokens": setting.tokens, "eos_token_id": []}
    prompts = [problem.prompt for problem in evaluation_problems(setting.rows)]
    owners[0].generate(prompts, seed=0, **keys)  # warms up
    order = list(zip(found, owners, strict=True))
    for seed in range(setting.rounds):
        results = {}
        for one, owner in order:
            if one.fresh:
                owner = KnapsackDeferral(*setting.pair, rule=name, param=param, probe=False)
            start, cpu = time.perf_counter(), time.process_time()
            result = results[one.name] = owner.generate(
                prompts, seed=seed, speculative=one.speculative, draft=one.draft, **keys
            )
            one.seconds.append(time.perf_counter() - start)
            one.cpu.append(time.process_time() - cpu)
            one.stats = result.stats if one.stats is None else one.stats + result.stats
        plain = results["plain"].tokens
        for one in found:
            one.equal += sum(a == b for a, b in zip(results[one.name].tokens, plain, strict=True))
            one.answers += len(plain)
        order.reverse()
    return found


def ratios(one: Provider, plain: Provider, clock: str = "seconds") -> list[float]:
    """Speed over the plain run of the same round."""
    pairs = zip(getattr(plain, clock), getattr(one, clock), strict=True)
    return [a / b for a, b in pairs]


HEADER = (
    "setting", "rule", "rows", "provider", "tokens/s", "x plain", "x, CPU", "all rounds",
    "accepted", "a base forward", "base", "proxy", "ours", "equal", "note",
)  # fmt: skip
LONG = (
    "setting", "rule", "provider", "runs", "least", "q.1", "median", "all", "tokens a forward",
    "note",
)  # fmt: skip


def _head(setting: Setting) -> list[str]:
    return [setting.name, f"{setting.rule[0]} {setting.rule[1]:g}"]


def speeds(setting: Setting) -> list[list[str]]:
    """A line a provider."""
    plain, *_ = found = run(setting)
    lines = []
    for one in found:
        stats = one.stats
        cells = [
            str(setting.rows),
            one.name,
            f"{stats.tokens / len(one.seconds) / statistics.median(one.seconds):.1f}",
            f"{statistics.median(ratios(one, plain)):.2f}",
            f"{statistics.median(ratios(one, plain, 'cpu')):.2f}",
            f"{sum(plain.seconds) / sum(one.seconds):.2f}",
            f"{stats.acceptance_rate:.0%}" if stats.judged_tokens else "",
            f"{stats.tokens_per_base_forward:.2f}",
            f"{stats.base_seconds / stats.seconds:.0%}",
            f"{stats.proxy_seconds / stats.seconds:.0%}",
            f"{stats.other_share:.1%}",
            f"{one.equal}/{one.answers}",
            stats.speculation,
        ]
        lines.append(_head(setting) + cells)
    return lines


def long_run(setting: Setting) -> tuple[list[list[str]], float]:
    """Lines of the second table, and the speed of ``auto`` over all its runs."""
    plain, auto, again = run(setting)
    both = [(a + b) / 2 for a, b in zip(plain.cpu, again.cpu, strict=True)]
    lines = []
    for one, beside in ((again, plain.cpu), (auto, both)):
        each = sorted(a / b for a, b in zip(beside, one.cpu, strict=True))
        shown = (
            each[0],
            each[len(each) // 10],
            statistics.median(each),
            sum(beside) / sum(one.cpu),
        )
        cells = [one.name, str(len(each)), *(f"{x:.2f}" for x in shown),
                 f"{one.stats.tokens_per_base_forward:.2f}", one.stats.speculation]  # fmt: skip
        lines.append(_head(setting) + cells)
    return lines, sum(both) / sum(auto.cpu)


def equal_answers(pair: Any, dtype: torch.dtype, rule: tuple[str, float]) -> list[str]:
    """Of 96 answers of 48 tokens how many speculation leaves as they are, and of their tokens."""
    from tta_ext import KnapsackDeferral
    from tta_ext.demo.task import evaluation_problems

    base, proxy = (copy.deepcopy(model).to(dtype) for model in (pair.base, pair.proxy))
    kad = KnapsackDeferral(base, proxy, pair.tokenizer, rule=rule[0], param=rule[1], probe=False)
    prompts = [problem.prompt for problem in evaluation_problems(32)]
    keys: dict[str, Any] = {"max_new_tokens": 48, "num_return_sequences": 3, "seed": 0}
    plain = kad.generate(prompts, **keys)
    drafted = kad.generate(prompts, speculative=5, **keys)
    both = list(zip(plain.tokens, drafted.tokens, strict=True))
    before = sum(
        next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
        for a, b in both
    )
    return [
        str(dtype).removeprefix("torch."),
        f"{rule[0]} {rule[1]:g}",
        str(len(both)),
        f"{sum(a == b for a, b in both) / len(both):.1%}",
        f"{before / sum(map(len, plain.tokens)):.1%}",
    ]


def settings(pair: Any, args: argparse.Namespace) -> Iterator[Setting]:
    """The first table's."""
    large = (widen(pair.base, args.width), pair.proxy, pair.tokenizer)
    for rows in args.batch:
        for rule in RULES:
            lengths = LENGTHS if rows == 1 else LENGTHS[:2]
            others = [Provider(f"speculative {k}", k) for k in lengths]
            others.append(Provider("auto", "auto"))
            if rows == 1:
                others.append(Provider("auto, first", "auto", fresh=True))
                others += [Provider("lookup 5", 5, "lookup")] * (rule is RULES[0])
            yield Setting("large base", large, rule, rows, args.tokens, args.rounds, others)
    slow = (pair.base, widen(pair.proxy, args.width), pair.tokenizer)
    others = [Provider("base 5", 5, "base"), Provider("auto, base", "auto", "base")]
    yield Setting("slow proxy", slow, RULES[1], 1, args.tokens, args.rounds, others)


def long_settings(pair: Any, args: argparse.Namespace) -> Iterator[Setting]:
    """The second table's."""
    large = (widen(pair.base, args.width), pair.proxy, pair.tokenizer)
    even = (pair.base, as_slow(pair.proxy, pair.base), pair.tokenizer)
    for name, models, tokens, draft, rules in (
        ("large base", large, 32, "proxy", RULES[:1]),
        ("even", even, args.tokens, "proxy", RULES),
        ("bad drafts", tuple(pair), args.tokens, "lookup", RULES[:1]),
        ("short", large, SHORT, "proxy", RULES[:1]),
    ):
        for rule in rules:
            others = [Provider("auto", "auto", draft), Provider("plain again")]
            yield Setting(name, models, rule, 1, tokens, args.runs, others)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; the exit status is 1 if ``auto`` is slower than it may be."""
    from tta_ext.demo.pair import demo_pair

    parser = argparse.ArgumentParser(prog="python -m benchmarks speculative")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, default=48, help="of each answer (48)")
    parser.add_argument("--width", type=int, default=32768, help="units of the wide MLPs (32768)")
    parser.add_argument("--rounds", type=int, default=3, help="of all providers (3)")
    parser.add_argument("--runs", type=int, default=RUNS, help=f"of the second table ({RUNS})")
    parser.add_argument("--only", nargs="+", metavar="SETTING", help="of the settings above")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (1)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/speculative.md"))
    args = parser.parse_args(argv)
    harness.check_files(args.output)
    torch.set_num_threads(args.threads)
    pair = demo_pair()
    lines: list[list[str]] = []
    runs: list[list[str]] = []
    slow = []
    for setting in settings(pair, args):
        if not args.only or setting.name in args.only:
            lines += speeds(setting)
            print(harness.table(HEADER, lines[-1 - len(setting.others) :]), flush=True)
    for setting in long_settings(pair, args):
        if not args.only or setting.name in args.only:
            found, total = long_run(setting)
            runs += found
            print(harness.table(LONG, found), flush=True)
            if total < SLOWEST_AUTO:
                slow.append(f"MISS: auto at {total:.2f}x plain ({', '.join(_head(setting))})")
    dtypes = (torch.float32, torch.bfloat16)
    equal = [equal_answers(pair, dtype, rule) for dtype in dtypes for rule in RULES]
    tables = (
        harness.table(HEADER, lines),
        harness.table(LONG, runs),
        harness.table(("models", "rule", "answers", "equal", "tokens before a difference"), equal),
    )
    command = ["python", "-m", "benchmarks", "speculative", *(argv or [])]
    harness.report(command, "\n\n".join(tables), args.output)
    print("\n".join(slow))
    return int(bool(slow))
