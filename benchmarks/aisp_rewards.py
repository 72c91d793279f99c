"""What AISP buys on a real model: several rewards, paired with best-of-n at equal samples.

``python -m benchmarks.aisp_rewards`` runs SmolLM2-135M-Instruct on prompts that were not used to
choose any setting, and prints, for each reward: the mean reward of the first and the last iteration
with the paired rise, and the best reward against best-of-n on the same number of samples, with
standard errors, wins, ties and losses. ``--tune`` uses the other prompts: settings are chosen
there.

There are two baselines. ``best_of_n`` draws tokens at temperature 1, as best-of-n does; ``frozen``
is best-of-n with the randomness of the first AISP contestant, that is AISP whose u stays 0: the
difference to it is what the adaptation buys, the rest is what the noise buys. The answers of both
do not depend on the reward, so they are drawn once and scored by every reward.

Each finished batch is on the disk before the next begins (``--journal``), and a run that was cut
short goes on from there.

``python -m benchmarks.aisp_rewards --timing --samples 64`` measures wall-clock instead, AISP's over
best-of-n's: in turn, on the same rows and answer lengths, several times; the median of the ratios.
Ratios are given in processor time as well, which other processes disturb less.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from time import process_time
from typing import Any

import torch

from tta_ext.decoding import AdaptiveImportanceSampling, BestOfN
from tta_ext.decoding.rewards import call_reward, parse_reward
from tta_ext.decoding.search import compare as comparison
from tta_ext.decoding.search.base import SearchMethod
from tta_ext.decoding.search.outcome import SearchResult, spread
from tta_ext.demo import smollm2
from tta_ext.journal import Journal, model_facts, resume_key

from . import harness

REWARDS = ("letter:s", "letter:s:distinct", "sentiment", "sentiment:negative")

TUNING = (
    "Describe a quiet village.",
    "What is a good hobby?",
    "Write about the moon.",
    "Give me some advice.",
    "Tell me about trains.",
    "What did you do today?",
    "Describe a strange machine.",
    "What makes a good teacher?",
    "Write about an old house.",
    "Tell me something about rivers.",
    "What should I cook tonight?",
    "Describe the colour blue.",
)

EVALUATION = (
    "Tell me a short story.",
    "Describe your favourite place.",
    "What happens in a forest at night?",
    "Write a line about the sea.",
    "How was the weather yesterday?",
    "Tell me about a friend of yours.",
    "What is in the garden?",
    "Describe a busy market.",
    "Write about a long journey.",
    "What do cats do all day?",
    "Tell me about your school.",
    "What is music good for?",
    "Describe a winter morning.",
    "Give me a reason to read books.",
    "Write about a lost key.",
    "What can be seen from a mountain?",
    "Tell me about a famous painter.",
    "What is the best way to travel?",
    "Describe a meal you remember.",
    "Write about a small bird.",
    "What do people talk about at dinner?",
    "Tell me about the city at dawn.",
    "What would you do with a free day?",
    "Describe a game for children.",
)

DEFAULT_AISP = ("aisp",)
BASELINE, FROZEN = "best_of_n", "frozen"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.aisp_rewards", description=__doc__)
    p.add_argument("--reward", nargs="+", default=list(REWARDS), help="rewards (%(default)s)")
    p.add_argument("--aisp", nargs="+", default=list(DEFAULT_AISP), metavar="LABEL=aisp:K=V,...")
    p.add_argument("--samples", type=int, default=256, help="answers a prompt and method (256)")
    p.add_argument("--group", type=int, default=16, help="answers drawn together (16)")
    p.add_argument("--max-new-tokens", type=int, default=24)
    p.add_argument("--prompts", type=int, help="only the first so many")
    p.add_argument("--at-once", type=int, default=8, help="prompts in a batch (8)")
    p.add_argument("--tune", action="store_true", help="the prompts for choosing settings")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--journal", type=Path, default=Path("aisp_rewards.jsonl"))
    p.add_argument("--output", type=Path, help="where to write the table")
    p.add_argument("--plot", type=Path, help="folder for one plot a reward")
    p.add_argument("--timing", action="store_true", help="measure wall-clock instead")
    p.add_argument("--repeats", type=int, default=5, help="of --timing (5)")
    return p


def conversations(prompts: Sequence[str]) -> list[Any]:
    return [[{"role": "user", "content": prompt}] for prompt in prompts]


def rescored(result: SearchResult, at: int, reward: Any) -> dict[str, Any]:
    """The record of one prompt of a run, as if it had been made with another reward."""
    candidates = result.candidates[at]
    prompts = [result.prompts[at]] * len(candidates)
    values = call_reward(reward, prompts, [one.text for one in candidates])
    record = comparison.record_of(result, at)
    best = -float("inf")
    for point in record["curve"]:
        own = [
            value
            for value, one in zip(values, candidates, strict=True)
            if one.iteration == point["iteration"]
        ]
        mean, highest, deviation = spread(own)
        best = max(best, highest)
        point.update(mean=mean, max=highest, std=deviation, best=best)
    winner = values.index(max(values))
    return record | {"reward": values[winner], "text": candidates[winner].text}


def indifferent(prompts: Sequence[Any], responses: Sequence[Any]) -> list[float]:
    return [0.0] * len(responses)


def baselines(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, SearchMethod[Any]]:
    """The methods that do not look at the reward."""
    first = comparison.Contestant.parse(args.aisp[0])
    settings = first.resolved({"max_new_tokens": args.max_new_tokens}, args.samples, None)
    # Equal rewards have equal weights, and those less 1/n are 0: u stays where it is.
    frozen = asdict(settings) | {"baseline": True, "kl_rollouts": 0, "kl_budget": None}
    return {
        BASELINE: BestOfN(
            model,
            indifferent,
            tokenizer,
            n=args.samples,
            group=args.group,
            max_new_tokens=args.max_new_tokens,
        ),
        FROZEN: AdaptiveImportanceSampling(model, indifferent, tokenizer, probe=False, **frozen),
    }


def baseline_records(
    label: str,
    method: SearchMethod[Any],
    prompts: Sequence[Any],
    args: argparse.Namespace,
    file: Journal,
) -> list[dict[str, Any]]:
    """A baseline's answers, drawn once, with a record for every reward."""
    scorers = {name: parse_reward(name) for name in args.reward}
    settings = asdict(method.settings)
    keys = {
        (place, name): resume_key(
            label=label, reward=name, place=place, prompt=prompts[place], settings=settings,
            seed=args.seed, model=model_facts(method.model),
        )
        for place in range(len(prompts))
        for name in scorers
    }  # fmt: skip
    for first in range(0, len(prompts), args.at_once):
        part = [
            place
            for place in range(first, min(first + args.at_once, len(prompts)))
            if any(keys[place, name] not in file.records for name in scorers)
        ]
        if not part:
            continue
        result = method.generate([prompts[i] for i in part], seed=args.seed, sequence=part)
        file.add(
            {
                keys[place, name]: {"scorer": name, "index": place, "label": label}
                | rescored(result, at, scorer)
                for at, place in enumerate(part)
                for name, scorer in scorers.items()
                if keys[place, name] not in file.records
            }
        )
        print(f"{label}: {part[-1] + 1} of {len(prompts)} prompts", flush=True)
    return [file.records[key] for key in keys.values()]


def steered_records(
    model: Any, tokenizer: Any, prompts: Sequence[Any], args: argparse.Namespace, file: Journal
) -> list[dict[str, Any]]:
    """Every AISP contestant with every reward."""
    contestants = [comparison.Contestant.parse(text) for text in args.aisp]
    found: list[dict[str, Any]] = []
    for name in args.reward:
        records = comparison.compare(
            model,
            tokenizer,
            parse_reward(name),
            prompts,
            contestants,
            samples=args.samples,
            seed=args.seed,
            common={"max_new_tokens": args.max_new_tokens},
            prompts_at_once=args.at_once,
            tag=[model_facts(model), name],
            journal=file,
        )
        print(f"{name}: {len(records)} answers", flush=True)
        found += [record | {"scorer": name} for record in records]
    return found


HEADER = (
    "reward", "method", "first iteration", "last", "rise", "best", f"- {BASELINE}",
    "won/tied/lost", f"- {FROZEN}", "won/tied/lost", "KL",
)  # fmt: skip


def table_of(records: Sequence[dict[str, Any]]) -> str:
    """Per reward, the rise of the mean and the paired differences of the best."""
    rows = []
    for name in dict.fromkeys(record["scorer"] for record in records):
        own = [r for r in records if r["scorer"] == name]
        methods = comparison.summary(own)
        labels = [row["label"] for row in methods]
        pairs = {
            (base, pair.label): pair
            for base in (BASELINE, FROZEN)
            if base in labels
            for pair in comparison.paired(own, base)
        }
        rows += [_cells(name, row, pairs) for row in methods]
    return harness.table(HEADER, rows)


def _cells(
    name: str, row: dict[str, Any], pairs: Mapping[tuple[str, str], comparison.Paired]
) -> list[str]:
    cells = [
        name,
        row["label"],
        f"{row['first']:.3f}",
        f"{row['last']:.3f}",
        f"{row['rise']:+.3f} ± {row['rise_error']:.3f}",
        f"{row['reward']:.3f} ± {row['error']:.3f}",
    ]
    for base in (BASELINE, FROZEN):
        pair = pairs.get((base, row["label"]))
        cells += (
            [f"{pair.difference:+.3f} ± {pair.error:.3f}", f"{pair.wins}/{pair.ties}/{pair.losses}"]
            if pair
            else ["", ""]
        )
    return [*cells, "" if row["kl"] is None else f"{row['kl']:.1f}"]


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
    part = prompts[: args.at_once]
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
    model, tokenizer = smollm2.load()
    prompts = conversations((TUNING if args.tune else EVALUATION)[: args.prompts])
    if args.timing:
        table = timing(model, tokenizer, prompts, args)
    else:
        file = Journal(args.journal)
        records: list[dict[str, Any]] = []
        for label, method in baselines(model, tokenizer, args).items():
            records += baseline_records(label, method, prompts, args, file)
        records += steered_records(model, tokenizer, prompts, args, file)
        table = table_of(records)
        if args.plot is not None:
            args.plot.mkdir(parents=True, exist_ok=True)
            for name in args.reward:
                own = [r for r in records if r["scorer"] == name]
                comparison.plot(own, args.plot / f"{name.replace(':', '_')}.png", name)
    harness.report(["python", "-m", "benchmarks.aisp_rewards", *sys.argv[1:]], table, args.output)


if __name__ == "__main__":
    main()
