"""Speculative decoding against the plain loop: ``python -m benchmarks speculative``.

Tokens are the same, so a figure is a ratio of times: providers run in turns with the same seed, in
an order that is reversed from round to round, each round gives a ratio to its own plain run, and
medians count. Answers have the full length. Three settings, all with the laws of the shipped pair,
so that drafts stand as often as on a real task:

* ``large base``: the base's MLPs are widened by units with random input and zero output weights,
  which are read and multiplied like any other and change nothing. Drafts pay.
* ``even``: the proxy's are widened until it costs what the base does. Drafts cost.
* ``short``: answers of a few tokens by the large base.

``auto`` remembers what earlier rounds measured; ``auto, first call`` is a new object each time.

The second table is exact arithmetic over positions that the rule wrote: how often a draft token
stands with the plain loop's own random numbers ("coupled", what the loop does), and the most that
any verification reaches ("optimal").
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
LAWS = (
    ("threshold", 0.4), ("threshold", 0.2), ("nudging", 0.4), ("confidence_bet", 0.2),
    ("relative", 0.2), ("knapsack", 0.5),
)  # fmt: skip
TEMPERATURES = (0.7, 1.0, 1.3)
SLOWEST_AUTO = 0.97
SHORT = 12


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
    """One way to write the same answers (``fresh``: forgetful), times and speeds over plain."""

    name: str
    speculative: int | str = 0
    fresh: bool = False
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    stats: Any = None
    equal: int = 0
    answers: int = 0
    note: str = ""


def run(
    pair: Sequence[Any],
    rule: tuple[str, float],
    prompts: list[str],
    tokens: int,
    rounds: int,
    lengths: Sequence[int],
) -> list[Provider]:
    """All providers in turns over the same prompts."""
    from tta_ext import KnapsackDeferral

    name, param = rule
    found = [Provider("plain"), *(Provider(f"speculative {k}", k) for k in lengths)]
    found += [Provider("auto", "auto"), Provider("auto, first call", "auto", fresh=True)]
    owners = {p.name: KnapsackDeferral(*pair, rule=name, param=param) for p in found}
    keys: dict[str, Any] = {"max_new_tokens": tokens, "eos_token_id": []}
    owners["plain"].generate(prompts, seed=0, **keys)  # warms up
    order = list(found)
    for seed in range(rounds):
        results = {}
        for one in order:
            owner = owners[one.name]
            if one.fresh:
                owner = KnapsackDeferral(*pair, rule=name, param=param, probe=False)
            start = time.perf_counter()
            results[one.name] = owner.generate(
                prompts, seed=seed, speculative=one.speculative, **keys
            )
            one.seconds.append(time.perf_counter() - start)
        plain = results["plain"].tokens
        for one in found:
            result = results[one.name]
            one.ratios.append(found[0].seconds[-1] / one.seconds[-1])
            one.stats = result.stats if one.stats is None else one.stats + result.stats
            one.equal += sum(a == b for a, b in zip(result.tokens, plain, strict=True))
            one.answers += len(plain)
            one.note = result.stats.speculation
        order.reverse()
    return found


HEADER = (
    "setting", "rule", "rows", "provider", "tokens/s", "x plain", "all rounds", "accepted",
    "a base forward", "base", "proxy", "ours", "equal", "note",
)  # fmt: skip


def _cells(head: Sequence[str], one: Provider, total: float) -> list[str]:
    stats = one.stats
    return [
        *head,
        one.name,
        f"{stats.tokens / len(one.seconds) / statistics.median(one.seconds):.1f}",
        f"{statistics.median(one.ratios):.2f}",
        f"{total:.2f}",
        f"{stats.acceptance_rate:.0%}" if stats.judged_tokens else "",
        f"{stats.tokens_per_base_forward:.2f}",
        f"{stats.base_seconds / stats.seconds:.0%}",
        f"{stats.proxy_seconds / stats.seconds:.0%}",
        f"{stats.other_share:.1%}",
        f"{one.equal}/{one.answers}",
        one.note,
    ]


@torch.inference_mode()
def acceptance(pair: Any, rule: str, param: float, temperature: float) -> list[str]:
    """Coupled and optimal acceptance over the positions of 24 answers."""
    from tta_ext import KnapsackDeferral, ops
    from tta_ext.demo.task import evaluation_problems

    kad = KnapsackDeferral(*pair, rule=rule, param=param, temperature=temperature, probe=False)
    prompts = [problem.prompt for problem in evaluation_problems(24)]
    result = kad.generate(prompts, max_new_tokens=48, seed=1)
    coupled, optimal = [], []
    for prompt, answer in zip(result.prompt_tokens, result.tokens, strict=True):
        tokens = torch.tensor([prompt + answer])
        base, proxy = (
            model(input_ids=tokens).logits[0, len(prompt) - 1 : -1].float()
            for model in (pair.base, pair.proxy)
        )
        taken = ops.deferral_mask(base, proxy, rule=rule, param=param, temperature=temperature).mask
        p, q = (torch.softmax(x.double() / temperature, -1) for x in (base, proxy))
        kept = torch.where(taken.bool(), 0.0, p)
        mass = 1.0 - kept.sum(-1)
        coupled += (mass + (kept * q).sum(-1)).tolist()
        optimal += torch.minimum(kept + mass[:, None] * q, q).sum(-1).tolist()
    a, b = statistics.mean(coupled), statistics.mean(optimal)
    return [rule, f"{param:g}", f"{temperature:g}", str(len(coupled)), f"{a:.3f}", f"{b:.3f}"]


def settings(pair: Any, args: argparse.Namespace) -> Iterator[tuple[Any, ...]]:
    """Name, pair, rule, rows, tokens of an answer, draft lengths."""
    large = (widen(pair.base, args.width), pair.proxy, pair.tokenizer)
    for rows in args.batch:
        for rule in RULES:
            yield "large base", large, rule, rows, args.tokens, LENGTHS
    even = (pair.base, as_slow(pair.proxy, pair.base), pair.tokenizer)
    for rule in RULES:
        yield "even", even, rule, 1, args.tokens, (5,)
        yield "short", large, rule, 1, SHORT, (5,)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; the exit status is 1 if ``auto`` is slower than it may be."""
    from tta_ext.demo.pair import demo_pair
    from tta_ext.demo.task import evaluation_problems

    parser = argparse.ArgumentParser(prog="python -m benchmarks speculative")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, default=96, help="of each answer (96)")
    parser.add_argument("--width", type=int, default=32768, help="units of the base's MLPs (32768)")
    parser.add_argument("--rounds", type=int, default=7, help="of all providers (7)")
    parser.add_argument("--only", nargs="+", metavar="SETTING", help="of the settings above")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (1)")
    parser.add_argument("--output", type=Path, help="also write the tables to this file")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    pair = demo_pair()
    laws = [acceptance(pair, *law, t) for law in LAWS for t in TEMPERATURES]
    lines, slow = [], []
    for name, models, rule, rows, tokens, lengths in settings(pair, args):
        if args.only and name not in args.only:
            continue
        prompts = [problem.prompt for problem in evaluation_problems(rows)]
        found = run(models, rule, prompts, tokens, args.rounds, lengths)
        plain = sum(found[0].seconds)
        head = [name, f"{rule[0]} {rule[1]:g}", str(rows)]
        lines += [_cells(head, one, plain / sum(one.seconds)) for one in found]
        slow += [
            f"MISS: {one.name} at {statistics.median(one.ratios):.2f}x plain ({', '.join(head)})"
            for one in found
            if one.speculative == "auto" and statistics.median(one.ratios) < SLOWEST_AUTO
        ]
    body = "\n\n".join(
        (
            harness.table(HEADER, lines),
            harness.table(("rule", "param", "T", "positions", "coupled", "optimal"), laws),
        )
    )
    harness.report(["python", "-m", "benchmarks", "speculative", *(argv or [])], body, args.output)
    print("\n".join(slow))
    return int(bool(slow))
