"""``tta sweep``: settings of a rule or of a search, tried on held-out prompts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tta_ext.cli import common
from tta_ext.cli.common import errors
from tta_ext.cli.config import Config
from tta_ext.cli.evaluate import (
    Count,
    Data,
    JournalFile,
    MaxNewTokens,
    Mode,
    Pattern,
    Report,
    Seed,
    interval,
    run_settings,
)
from tta_ext.cli.progress import progress
from tta_ext.cli.prompts import read_prompts
from tta_ext.cli.search import (
    SMOLLM2,
    Model,
    chosen_reward,
    given_settings,
    load_model_and_tokenizer,
    reward_facts,
)
from tta_ext.files import write_file
from tta_ext.journal import Journal, model_facts, run_facts

if TYPE_CHECKING:
    from tta_ext.evaluation import Setting
    from tta_ext.sweep import Range, Trial

    Axes = Mapping[str, list[Any] | Range]

__all__ = ["sweep"]

# What has a meaning with --axis alone, with --reward alone, and without --reward or --axis.
AXES_ONLY = {"reward", "search", "trials", "seeds", "table"}
SEARCH_ONLY = {"model", "method", "settings", "samples", "seconds", "chat", "system"}
RULES_ONLY = {"rule", "critical", "base", "proxy", "anti", "pattern", "mode", "proxy_revision"}
ONE_RULE_ONLY = {"params", "seed", "shard"}
RULE_AXES = ("rule", "param", "critical", "temperature", "rule_temperature")


def sweep(
    context: typer.Context,
    rule: common.Rule = "threshold",
    params: Annotated[
        str, typer.Option(help="Parameters: a,b,c or start:stop:step (stop included).")
    ] = "0.1:0.9:0.1",
    critical: common.Critical = "exclude",
    axis: Annotated[
        list[str] | None,
        typer.Option(
            help="Setting and values, NAME=a,b,c or NAME=start:stop:step, for Optuna also "
            "NAME=low..high[:log]; repeat it for several. Of rules: rule, param, critical, "
            "temperature, rule_temperature; of searches: any setting, such as sigma, lam, alpha, "
            "coherence, guard_lam."
        ),
    ] = None,
    reward: Annotated[
        str | None, typer.Option(help="Sweep a search by this reward, as of tta search.")
    ] = None,
    model: Model = SMOLLM2,
    method: Annotated[str, typer.Option(help="Search: aisp, best_of_n, args, ...")] = "aisp",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Setting of all trials of a search, name=value."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Answers for each trial and prompt of a search.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Wall-clock for each trial and prompt instead.")
    ] = None,
    search: Annotated[
        Literal["grid", "optuna"], typer.Option(help="All combinations, or Optuna's choice.")
    ] = "grid",
    trials: Annotated[int, typer.Option(min=1, help="Trials of Optuna.")] = 20,
    seeds: Annotated[str, typer.Option(help="Seeds of every trial: a,b,c.")] = "0",
    base: common.Base = None,
    proxy: common.Proxy = None,
    anti: common.Anti = None,
    data: Data = None,
    pattern: Pattern = None,
    n: Count = None,
    mode: Mode = None,
    seed: Seed = 0,
    max_new_tokens: MaxNewTokens = None,
    batch_size: common.BatchSize = 50,
    chat: common.Chat = False,
    system: common.System = None,
    journal: JournalFile = None,
    output: Report = None,
    table: Annotated[
        Path | None, typer.Option("--csv", help="CSV file for the trials of --axis.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Image of the scores against the settings.")
    ] = None,
    dtype: common.Dtype = "auto",
    device: common.Device = None,
    device_map: common.DeviceMap = None,
    attn_implementation: common.Attention = None,
    quantization_config: common.Quantization = None,
    revision: common.Revision = None,
    proxy_revision: common.ProxyRevision = None,
    shard: common.ShardOf = None,
    engine: common.Engine = "here",
    workers: common.WorkerCount = 1,
    address: common.Address = None,
    gpus_per_worker: common.GpusPerWorker = 0.0,
    threads: common.Threads = None,
    config: Config = None,
) -> None:
    """Accuracy of one rule over a range of its parameter; otherwise as eval.

    With --axis, settings of a rule, or with --reward of a search, over a grid or as Optuna chooses:
    each trial's score, its paired difference to the default, and the line of Python that uses the
    winner. Choose on prompts that you do not report on.
    """
    if axis is not None:
        _sweep_axes(context, axis)
        return
    common.refuse_unused(context, "a sweep without --axis", AXES_ONLY | SEARCH_ONLY)
    setting = common.chosen_setting(context, rule, None, critical)
    if setting.rule == "argmax":
        raise ValueError("argmax has no parameter to sweep; see tta eval argmax")
    chosen = [replace(setting, param=value) for value in parse_range(params)]
    run_settings(context, chosen)


def parse_range(text: str) -> list[float]:
    """Numbers from ``a,b,c`` or ``start:stop:step``, stop included."""
    from tta_ext.sweep import MOST, numbers

    try:
        return numbers(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(
            f"--params is {text!r}, expected a,b,c or start:stop:step, at most {MOST}"
        ) from None


# ---- several settings ------------------------------------------------------------------------


def _sweep_axes(context: typer.Context, axis: Sequence[str]) -> None:
    from tta_ext.plots import MARK, check_plot
    from tta_ext.sweep import Trial, as_csv, call, fractional, grid, parse_axis, suggested, winner
    from tta_ext.sweep import plot as draw
    from tta_ext.sweep import table as rows_of

    options: dict[str, Any] = context.params
    searching = options["reward"] is not None
    why = f"--axis {'with' if searching else 'without'} --reward"
    common.refuse_unused(context, why, (RULES_ONLY if searching else SEARCH_ONLY) | ONE_RULE_ONLY)
    axes = dict(map(parse_axis, axis))
    if len(axes) < len(axis):
        raise ValueError("an axis is given twice")
    axes = fractional(axes, _fractions(options) if searching else RULE_AXES)
    if options["search"] == "grid":
        common.refuse_unused(context, "--search grid", {"trials"})
        combinations = grid(axes)
    try:
        seeds = [int(part) for part in options["seeds"].split(",")]
    except ValueError:
        raise ValueError(f"--seeds is {options['seeds']!r}, expected a,b,c") from None
    common.check_output(options["output"])
    common.check_output(options["table"], re.compile(rb"[^\n]*difference_error"))
    common.check_output(options["plot"], MARK)
    if options["plot"] is not None:
        check_plot(options["plot"])
    with Journal(options["journal"]) as journal:
        kind = _searching if searching else _deferring
        check, tries, name, given, whole = kind(context, axes, journal)
        refused: list[ValueError] = []

        def score(settings: dict[str, Any]) -> Trial:
            begin = perf_counter()
            found = [value for one in seeds for value in tries(settings, one)]
            return Trial(settings, tuple(found), perf_counter() - begin)

        def possible(settings: dict[str, Any]) -> Trial | None:
            try:
                check(settings)
            except ValueError as error:
                refused.append(error)
                return None
            return score(settings)

        def all_trials() -> Iterator[Trial]:
            yield score({})
            if options["search"] == "optuna":
                yield from suggested(axes, possible, options["trials"], seeds[0])
            else:
                yield from map(score, combinations)

        check({})
        if options["search"] == "grid":
            for settings in combinations:
                check(settings)
        count = options["trials"] if options["search"] == "optuna" else len(combinations)
        done: list[Trial] = []
        with progress("trials", count + 1) as advance:
            for trial in all_trials():
                done.append(trial)
                advance(1, 0)
    if refused:
        told = f"{len(refused)} of {options['trials']} trials were of no use: {refused[-1]}"
        if len(refused) == options["trials"]:
            raise ValueError(told) from refused[-1]
        errors.print(told)
    rows, best = rows_of(done), winner(done)
    _show(done, rows)
    chosen = whole(best.settings)
    common.echo(call(name, given(chosen), chosen))
    if options["table"] is not None:
        write_file(options["table"], as_csv(rows))
        errors.print(f"written: {options['table']}")
    if options["plot"] is not None:
        draw(done, options["plot"], f"{name}, {len(done[0].scores)} scores a trial")
        errors.print(f"written: {options['plot']}")
    report = {"run": run_facts(method=name, seeds=seeds), "trials": rows, "winner": best.settings}
    common.write_report(options["output"], report)


def _show(trials: Sequence[Trial], rows: Sequence[dict[str, Any]]) -> None:
    shown = common.table(
        f"{len(trials[0].scores)} scores", "mean", "against default [95%]", "W/T/L"
    )
    for trial, row in sorted(zip(trials, rows, strict=True), key=lambda pair: -pair[0].mean):
        shown.add_row(
            trial.label,
            f"{trial.mean:.3f} ± {trial.error:.3f}",
            f"{row['difference']:+.3f} {interval((row['low'], row['high']), sign=True)}",
            f"{row['wins']}/{row['ties']}/{row['losses']}",
        )
    common.show_table(shown)


def _fractions(options: dict[str, Any]) -> list[str]:
    """The settings of a search that need not be whole numbers."""
    from tta_ext.decoding.search.compare import method_class, setting_types

    kinds = setting_types(method_class(options["method"]))
    return [name for name, allowed in kinds.items() if float in allowed]


def _deferring(context: typer.Context, axes: Axes, journal: Journal) -> tuple[Any, ...]:
    """How settings of a rule are checked and tried, and what the line of Python calls."""
    from tta_ext.demo.task import evaluation_task
    from tta_ext.evaluation import IMPLICIT_REWARD, SAMPLED, Answering, data_task, evaluate
    from tta_ext.rules import Rule, rule_name

    options: dict[str, Any] = context.params
    unknown = [name for name in axes if name not in RULE_AXES]
    if unknown:
        raise ValueError(f"axis is {unknown[0]!r}, expected one of {', '.join(RULE_AXES)}")
    modes = options["mode"] or [SAMPLED]
    if len(modes) != 1:
        raise ValueError("--axis takes one --mode")
    tried = axes.get("rule", ())
    implicit = IMPLICIT_REWARD in ([*tried] if isinstance(tried, list) else ())
    first = common.chosen_setting(
        context, options["rule"], None, options["critical"], {"anti"} if implicit else ()
    )

    def setting(chosen: dict[str, Any]) -> Setting:
        changes = dict(chosen)
        if "rule" in changes:
            if changes["rule"] != IMPLICIT_REWARD:
                changes["rule"] = rule_name(changes["rule"])
            changes.setdefault("param", common.DEFAULT_PARAM.get(changes["rule"]))
        return replace(first, **changes)

    def check(chosen: dict[str, Any]) -> None:
        one = setting(chosen)
        if one.rule != IMPLICIT_REWARD:
            Rule(one.rule, one.param, one.critical, one.temperature, one.rule_temperature)
        if one.critical != "exclude" and one.rule != "knapsack":
            raise ValueError(f"critical is {one.critical!r}, which rule {one.rule} does not use")

    if options["data"] is None:
        common.refuse_unused(context, "a sweep without --data", {"pattern"})
        task = evaluation_task(options["n"] or 100)
    else:
        task = data_task(options["data"], options["n"], options["pattern"])
    implicit = implicit or first.rule == IMPLICIT_REWARD
    named = {key: options[key] for key in ("base", "proxy", "anti", "proxy_revision")}
    loading = {**named, "implicit": implicit, **common.loading_options(context)}
    prompts = task.prompts
    crew = common.chosen_crew(context, lambda: Answering(common.load_models(**loading), prompts))

    def tries(chosen: dict[str, Any], seed: int) -> Sequence[float]:
        (row,) = evaluate(
            None, task, [setting(chosen)], modes=modes, seed=seed, journal=journal, crew=crew,
            batch_size=options["batch_size"], max_new_tokens=options["max_new_tokens"],
        )  # fmt: skip
        return [float(outcome) for outcome in row.outcomes]

    def whole(chosen: dict[str, Any]) -> dict[str, Any]:
        one = setting(chosen)
        return {k: v for k, v in one.facts().items() if k != "critical" or v != "exclude"}

    def given(chosen: dict[str, Any]) -> str:
        # The demo's pair brings one; others may do without, as an ensemble.
        there = options["anti"] is not None or options["base"] is None
        anti = ", anti=anti" if there and chosen["rule"] == IMPLICIT_REWARD else ""
        return f"base, proxy, tokenizer{anti}"

    return check, tries, "KnapsackDeferral", given, whole


def _searching(context: typer.Context, axes: Axes, journal: Journal) -> tuple[Any, ...]:
    """The same of a search by a reward."""
    from tta_ext.decoding.search.compare import Contestant, compare, method_class

    options: dict[str, Any] = context.params
    common.refuse_unused(
        context,
        "a sweep of a search",
        {"engine", "workers", "address", "gpus_per_worker", "batch_size"},
    )
    kind = method_class(options["method"])
    if options["data"] is None:
        raise ValueError("a sweep of a search needs --data, prompts that are not reported on")
    samples, seconds = options["samples"], options["seconds"]
    if samples is None and seconds is None:
        samples = 64
    shared = {"max_new_tokens": options["max_new_tokens"] or 32}
    shared |= given_settings(context, {"max_new_tokens"})

    def contestant(chosen: dict[str, Any]) -> Contestant:
        return Contestant("trial", kind.name, dict(chosen))

    def check(chosen: dict[str, Any]) -> None:
        contestant(chosen).resolved(shared, samples, seconds)

    check({})
    asked = read_prompts(None, options["data"], options["chat"], options["system"])[: options["n"]]
    scorer = chosen_reward(options["reward"])
    loaded, tokenizer = load_model_and_tokenizer(
        options["model"], **common.loading_options(context)
    )
    tag = {"model": model_facts(loaded), "reward": reward_facts(options["reward"])}

    def tries(chosen: dict[str, Any], seed: int) -> Sequence[float]:
        records = compare(
            loaded,
            tokenizer,
            scorer,
            [one.prompt for one in asked],
            [contestant(chosen)],
            samples=samples,
            seconds=seconds,
            seed=seed,
            common=shared,
            tag=tag,
            journal=journal,
        )
        return [record["reward"] for record in records]

    def given(chosen: dict[str, Any]) -> str:
        return "model, reward, tokenizer"

    return check, tries, kind.__name__, given, lambda found: shared | found
