"""``tta compare``: methods of search by reward, side by side."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from tta_ext.cli import common
from tta_ext.cli.common import console, errors
from tta_ext.cli.search import (
    SMOLLM2,
    Model,
    RewardName,
    Settings,
    load_model_and_tokenizer,
    reward_facts,
)
from tta_ext.journal import Journal, model_facts

__all__ = ["compare"]

DEFAULT_METHODS = ["aisp:n=16", "best_of_n:group=16"]
DEFAULT_SAMPLES = 64


def compare(
    reward: RewardName,
    prompts: common.Prompts = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="METHOD, METHOD:name=value,... or LABEL=METHOD:name=value,...; repeat it for "
            "several. Methods: aisp, best_of_n, args, chunk_beam. Default: aisp and best_of_n."
        ),
    ] = None,
    model: Model = SMOLLM2,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Answers for each method and prompt (default 64).")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Wall-clock for each method and prompt instead.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Label to compare with. Default: best_of_n, or the last.")
    ] = None,
    source: common.Source = None,
    chat: common.Chat = False,
    system: common.System = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first prompts.")] = None,
    max_new_tokens: common.MaxNewTokens = 32,
    settings: Settings = None,
    seed: Annotated[int, typer.Option(help="Seed; the same seed gives the same answers.")] = 0,
    journal: Annotated[
        Path | None,
        typer.Option(help="JSONL file of finished answers; a run cut short goes on from it."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the tables.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Image of reward against samples and seconds.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Prompts in a batch; times are then shares of the batch's.")
    ] = 1,
    dtype: common.Dtype = "auto",
    device: common.Device = None,
    threads: common.Threads = None,
) -> None:
    """Compare methods on the same prompts and reward, at equal samples or equal wall-clock.

    Prints each method's reward and cost, and its paired difference to the baseline with standard
    error and win rate.
    """
    from tta_ext.decoding.rewards import parse_reward
    from tta_ext.decoding.search import compare as comparison

    if samples is None and seconds is None:
        samples = DEFAULT_SAMPLES
    asked = common.read_prompts(prompts, source, chat, system)[:limit]
    contestants = [comparison.Contestant.parse(text) for text in method or DEFAULT_METHODS]
    labels = [one.label for one in contestants]
    if baseline is None:
        baseline = next((c.label for c in contestants if c.method == "best_of_n"), labels[-1])
    if baseline not in labels:
        raise ValueError(f"--baseline is {baseline!r}, expected one of {', '.join(labels)}")
    scorer = parse_reward(reward)
    file = Journal(journal)
    common.check_writable(output)
    common.check_writable(plot)
    loaded, tokenizer = load_model_and_tokenizer(model, dtype, device)
    with common.progress("answers", len(asked) * len(contestants)) as advance:
        records = comparison.compare(
            loaded,
            tokenizer,
            scorer,
            asked,
            contestants,
            samples=samples,
            seconds=seconds,
            seed=seed,
            common={"max_new_tokens": max_new_tokens} | comparison.parse_settings(settings or ()),
            tag=[model_facts(loaded), reward_facts(reward)],
            journal=file,
            prompts_at_once=batch_size,
            progress=advance,
        )
    rows, pairs = comparison.summary(records), comparison.paired(records, baseline)
    console.print(methods_table(rows))
    if pairs:
        console.print(pairs_table(pairs, baseline))
    report = {
        "model": model,
        "reward": reward,
        "samples": samples,
        "seconds": seconds,
        "seed": seed,
        "baseline": baseline,
        "methods": rows,
        "paired": [vars(pair) | {"win_rate": pair.win_rate} for pair in pairs],
    }
    common.write_report(output, report)
    if plot is not None:
        comparison.plot(records, plot, f"{reward}, {len(asked)} prompts")
        errors.print(f"written: {plot}")


def methods_table(rows: list[dict[str, Any]]) -> Table:
    """Reward and cost of each method."""
    table = common.table(
        "method", "best reward", "first mean", "last mean", "KL", "asked", "tokens", "s", "ours s"
    )
    for row in rows:
        table.add_row(
            row["label"],
            with_error(row["reward"], row["error"]),
            f"{row['first']:.3f}",
            f"{row['last']:.3f}",
            "-" if row["kl"] is None else f"{row['kl']:.1f}",
            f"{row['asked']:.0f}",
            f"{row['tokens']:.0f}",
            f"{row['seconds']:.2f}",
            f"{row['other']:.2f}",
        )
    return table


def pairs_table(pairs: list[Any], baseline: str) -> Table:
    """Differences to the baseline."""
    columns = "difference", "in errors", "wins", "ties", "losses", "win rate"
    table = common.table(f"against {baseline}", *columns)
    for pair in pairs:
        known = math.isfinite(pair.error) and pair.error > 0
        table.add_row(
            pair.label,
            with_error(pair.difference, pair.error, sign=True),
            f"{pair.difference / pair.error:+.1f}" if known else "-",
            *map(str, (pair.wins, pair.ties, pair.losses)),
            f"{pair.win_rate:.2f}",
        )
    return table


def with_error(value: float, error: float, sign: bool = False) -> str:
    """``0.123 ± 0.004``."""
    text = f"{value:+.3f}" if sign else f"{value:.3f}"
    return text if math.isnan(error) else f"{text} ± {error:.3f}"
