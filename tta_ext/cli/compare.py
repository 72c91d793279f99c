"""``tta compare``: methods of search by reward, side by side."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from tta_ext.cli import common
from tta_ext.cli.answers import tell
from tta_ext.cli.common import errors
from tta_ext.cli.config import Config
from tta_ext.cli.evaluate import interval
from tta_ext.cli.progress import progress
from tta_ext.cli.prompts import read_prompts
from tta_ext.cli.search import (
    SMOLLM2,
    Model,
    RewardName,
    Settings,
    chosen_reward,
    given_settings,
    load_model_and_tokenizer,
    reward_facts,
)
from tta_ext.journal import Journal, run_facts

__all__ = ["compare"]

DEFAULT_METHODS = ["aisp:n=16", "best_of_n:group=16"]
DEFAULT_SAMPLES = 64


def compare(
    context: typer.Context,
    reward: RewardName,
    prompts: common.Prompts = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="METHOD, METHOD:name=value,... or LABEL=METHOD:name=value,...; repeat it for "
            "several. Methods: aisp, best_of_n, args, chunk_beam, re_control. Default: aisp and "
            "best_of_n."
        ),
    ] = None,
    model: Model = SMOLLM2,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Answers for each method and prompt (default 64).")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Wall-clock for each method and prompt instead.")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="Something else to measure of the best answers, named as a reward: diversity, "
            "embedding:PATH (closeness to the prompt); repeat it for several."
        ),
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
    device_map: common.DeviceMap = None,
    attn_implementation: common.Attention = None,
    quantization_config: common.Quantization = None,
    revision: common.Revision = None,
    shard: common.ShardOf = None,
    engine: common.Engine = "here",
    workers: common.WorkerCount = 1,
    address: common.Address = None,
    gpus_per_worker: common.GpusPerWorker = 0.0,
    threads: common.Threads = None,
    config: Config = None,
) -> None:
    """Compare methods on the same prompts and reward, at equal samples or equal wall-clock.

    Prints each method's reward and cost, and its paired difference to the baseline with its
    bootstrap interval and win rate.
    """
    from tta_ext import plots
    from tta_ext.decoding.search import compare as comparison

    if samples is None and seconds is None:
        samples = DEFAULT_SAMPLES
    asked = read_prompts(prompts, source, chat, system)[:limit]
    contestants = [comparison.Contestant.parse(text) for text in method or DEFAULT_METHODS]
    labels = [one.label for one in contestants]
    if baseline is None:
        baseline = next((c.label for c in contestants if c.method == "best_of_n"), labels[-1])
    if baseline not in labels:
        raise ValueError(f"--baseline is {baseline!r}, expected one of {', '.join(labels)}")
    shared = {"max_new_tokens": max_new_tokens} | given_settings(context)
    for one in contestants:  # before any model is loaded
        one.resolved(shared, samples, seconds)
    part = common.chosen_shard(context, "journal")
    measures = {text: chosen_reward(text) for text in dict.fromkeys(metric or ())}
    common.check_output(output)
    if plot is not None:
        plots.check_plot(plot)
        common.check_output(plot, plots.MARK)
    with Journal(part.file(journal)) as file:
        chosen = comparison.resolved(contestants, shared, samples, seconds)
        loading, texts = common.loading_options(context), [one.prompt for one in asked]

        def make() -> comparison.Comparing:
            scorer = chosen_reward(reward)
            loaded, tokenizer = load_model_and_tokenizer(model, **loading)
            return comparison.Comparing(loaded, tokenizer, scorer, texts, chosen)

        crew = common.chosen_crew(context, make)
        facts = crew.facts() | {"reward": reward_facts(reward)}
        failures: dict[int, Exception] = {}
        with progress("answers", len(part.of(asked)) * len(contestants)) as advance:
            records = comparison.compare(
                None,
                None,
                None,
                texts,
                contestants,
                samples=samples,
                seconds=seconds,
                seed=seed,
                common=shared,
                tag=facts,
                journal=file,
                prompts_at_once=batch_size,
                progress=advance,
                failures=failures,
                shard=part,
                crew=crew,
                metrics=measures,
            )
    told: Counter[str] = Counter()
    for place, error in failures.items():
        tell(asked[place].name(place), error, told)
    if records:
        rows, pairs = comparison.summary(records), comparison.paired(records, baseline)
        for table in methods_tables(rows):
            common.show_table(table)
        if pairs:
            common.show_table(pairs_table(pairs, baseline))
        report = {
            "run": run_facts(**facts, settings=shared),
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
    if records and plot is not None:
        budget = f"{samples} samples" if seconds is None else f"{seconds:g} s"
        count = len(part.of(asked)) - len(failures)
        title = f"{model}, {reward}, {count} prompts, {budget}, seed {seed}"
        plots.plot(records, plot, title)
        errors.print(f"written: {plot}")
    if failures:
        errors.print(f"{len(failures)} of {len(asked)} prompts not answered", style="red")
        raise typer.Exit(1)


def methods_tables(rows: list[dict[str, Any]]) -> list[Table]:
    """What each method reached, what it cost, what else was measured; narrow, for logs."""
    reached = common.table("method", "best reward", "first mean", "last mean", "KL, nats")
    cost = common.table("method", "scored", "tokens", "seconds", "beside model\nand reward, s")
    trained = any(row["training"] for row in rows)
    if trained:
        cost.add_column("trained on", justify="right")
    for row in rows:
        reached.add_row(
            row["label"],
            with_error(row["reward"], row["error"]),
            f"{row['first']:.3f}",
            f"{row['last']:.3f}",
            "-" if row["kl"] is None else f"{row['kl']:.1f}",
        )
        cost.add_row(
            row["label"],
            f"{row['asked']:.0f}",
            f"{row['tokens']:.0f}",
            f"{row['seconds']:.2f}",
            f"{row['other']:.2f}",
            *([f"{row['training']}"] if trained else []),
        )
    if not rows[0]["metrics"]:
        return [reached, cost]
    measured = common.table("of the best answers", *rows[0]["metrics"])
    for row in rows:
        measured.add_row(row["label"], *(with_error(*pair) for pair in row["metrics"].values()))
    return [reached, cost, measured]


def pairs_table(pairs: list[Any], baseline: str) -> Table:
    """Differences to the baseline."""
    columns = "difference [95%]", "wins", "ties", "losses", "win rate"
    table = common.table(f"against {baseline}", *columns)
    for pair in pairs:
        found = f"{pair.difference:+.3f}"
        if math.isfinite(pair.low):
            found += f" {interval((pair.low, pair.high), sign=True)}"
        table.add_row(
            pair.label,
            found,
            *map(str, (pair.wins, pair.ties, pair.losses)),
            f"{pair.win_rate:.2f}",
        )
    return table


def with_error(value: float, error: float) -> str:
    """``0.123 ± 0.004``."""
    return f"{value:.3f}" if math.isnan(error) else f"{value:.3f} ± {error:.3f}"
