"""``tta eval``: accuracy of rules and parameters, with standard errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from tta_ext.cli import common
from tta_ext.cli.answers import tell
from tta_ext.cli.common import errors
from tta_ext.cli.config import Config
from tta_ext.cli.progress import progress
from tta_ext.cli.tasks import run_task
from tta_ext.journal import Journal, run_facts

if TYPE_CHECKING:
    from tta_ext.evaluation import Row, Setting

__all__ = ["evaluate", "row_table", "run_settings"]

Mode = Annotated[list[str] | None, typer.Option(help="sampled, greedy; both by default.")]
JournalFile = Annotated[
    Path | None,
    typer.Option(help="JSONL file of finished batches; a run that was cut short goes on from it."),
]
Data = Annotated[
    Path | None,
    typer.Option(
        help='JSONL with "prompt", "question" or "messages", and "answer". Default: the demo\'s '
        "problems."
    ),
]
Pattern = Annotated[
    str | None,
    typer.Option(help="Regular expression whose last match (or its group 1) is the answer."),
]
Count = Annotated[
    int | None,
    typer.Option(min=1, help="Number of problems. Default: all of --data, 100 of the demo's."),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens after which an answer ends (128; 64 for the demo's)."),
]
Seed = Annotated[int, typer.Option(help="Seed of sampled rows.")]
Report = Annotated[Path | None, typer.Option(help="JSON file for the rows.")]
Plot = Annotated[
    Path | None, typer.Option(help="Image (pdf, png, svg) of accuracy and proxy calls.")
]
# Options of a --task alone.
TASK_ONLY = {"samples", "window"}


def evaluate(
    context: typer.Context,
    rules: Annotated[
        list[str] | None,
        typer.Argument(help="base, proxy, or rule:param[:critical], such as threshold:0.4."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="gsm8k, math500, svamp, arc_c, csqa or truthfulqa, whose copy --data is."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers to each problem of a --task.")] = 1,
    window: Annotated[
        int, typer.Option(min=0, help="Tokens that the proxy drafts on a --task; 0: none.")
    ] = 8,
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
    journal: JournalFile = None,
    output: Report = None,
    plot: Plot = None,
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
    """Accuracy of deferral rules, next to each model alone.

    Without --data, on the held-out problems of the demo's pair; with it, the share of answers that
    match: the --pattern's last match in the text, or the text itself, equals "answer". With --task
    the papers' protocol: zero-shot, the aligned model's chat template for both, temperature 1, 1024
    tokens, and three scorers side by side. Intervals are of 95%: Wilson's for shares, the paired
    bootstrap's for differences.
    """
    from tta_ext.evaluation import IMPLICIT_REWARD, SHORT, Setting

    settings = [Setting.parse(rule) for rule in rules] if rules else list(SHORT)
    if not rules and base is not None and anti is None:
        settings = [setting for setting in settings if setting.rule != IMPLICIT_REWARD]
    if task is not None:
        run_task(context, settings)
        return
    common.refuse_unused(context, "an evaluation without --task", TASK_ONLY)
    run_settings(context, settings)


def run_settings(context: typer.Context, settings: Sequence[Setting]) -> None:
    """Evaluate settings as the command's other options say, and show the rows."""
    from tta_ext.demo.task import evaluation_task
    from tta_ext.evaluation import IMPLICIT_REWARD, MODES, Answering, data_task
    from tta_ext.evaluation import evaluate as evaluate_rows
    from tta_ext.plots import MARK, check_plot, plot_rows

    options: dict[str, Any] = context.params
    implicit = any(setting.rule == IMPLICIT_REWARD for setting in settings)
    if not implicit:
        common.refuse_unused(context, "what is evaluated", {"anti"})
    data, n = options["data"], options["n"]
    if data is None:
        common.refuse_unused(context, "an evaluation without --data", {"pattern"})
        task = evaluation_task(n or 100)
    else:
        task = data_task(data, n, options["pattern"])
    part = common.chosen_shard(context, "journal")
    modes = tuple(options["mode"] or MODES)
    common.check_output(options["output"])
    picture: Path | None = options["plot"]
    if picture is not None:
        check_plot(picture)
        common.check_output(picture, MARK)
    with Journal(part.file(options["journal"])) as journal:
        named = {key: options[key] for key in ("base", "proxy", "anti", "proxy_revision")}
        loading = {**named, "implicit": implicit, **common.loading_options(context)}
        prompts = task.prompts
        crew = common.chosen_crew(
            context, lambda: Answering(common.load_models(**loading), prompts)
        )
        rows: list[Row] = []
        failures: dict[int, Exception] = {}
        chosen = {key: options[key] for key in ("seed", "batch_size", "max_new_tokens")}
        total, size = len(task.prompts), options["batch_size"]
        total = sum(min(size, total - at) for at in part.of(range(0, total, size)))
        with progress("problems", total * len(settings) * len(modes)) as advance:
            rows += evaluate_rows(
                None, task, settings, modes=modes, journal=journal, progress=advance,
                failures=failures, shard=part, crew=crew, **chosen,
            )  # fmt: skip
    if not rows:
        errors.print(f"no batch of {options['batch_size']} problems is left for this shard")
        return
    common.show_table(row_table(rows))
    for table in best_tables(rows):
        common.show_table(table)
    if picture is not None:
        title = f"{rows[0].n} problems, seed {options['seed']}"
        if options["base"] is not None:
            title += f"\n{options['base']} and {options['proxy']}"
        plot_rows(rows, picture, title, along=rows[0].setting.rule if "params" in options else None)
        errors.print(f"written: {picture}")
    if options["output"] is not None:
        facts = run_facts(models=crew.facts(), data=data or "demo", pattern=options["pattern"])
        report = [
            {"run": facts | {"seed": options["seed"]}, **row.as_dict()}
            | {"exact_interval": row.exact_interval, "lenient_interval": row.lenient_interval}
            | {"outcomes": [int(outcome) for outcome in row.outcomes]}
            for row in rows
        ]
        common.write_report(options["output"], report)
    if failures:
        told: Counter[str] = Counter()
        for place, error in failures.items():
            tell(task.name(place), error, told)
        errors.print(f"{len(failures)} of {rows[0].n} not answered, counted as wrong", style="red")
        raise typer.Exit(1)


def row_table(rows: Sequence[Row]) -> Table:
    """Rows of an evaluation for the terminal, all modes of a setting side by side.

    A score stands with its 95% interval; ``any form`` is the score without regard to format, where
    that is another question. The last columns are the last mode's.
    """
    modes = list(dict.fromkeys(row.mode for row in rows))
    best = {mode: max(row.exact for row in rows if row.mode == mode) for mode in modes}
    free = any(row.outcomes != row.lenient_outcomes for row in rows)
    scores = [
        name
        for mode in modes
        for name in (f"{mode}\nexact [95%]", *(["any\nform"] if free else []))
    ]
    table = common.table(f"{rows[0].n} problems", *scores, "proxy\ncalls", "\ntok/s")
    for setting, by_mode in _by_setting(rows).items():
        cells: list[str | Text] = []
        for mode in modes:
            one = by_mode[mode]
            style = "bold green" if one.exact == best[mode] else ""
            cells.append(Text(f"{one.exact:.3f} {interval(one.exact_interval, digits=2)}", style))
            cells += [f"{one.lenient:.2f}"] if free else []
        last = list(by_mode.values())[-1]
        table.add_row(
            setting.label,
            *cells,
            f"{last.proxy_call_rate:.2f}",
            f"{last.tokens_per_second:.0f}",
        )
    return table


def best_tables(rows: Sequence[Row]) -> list[Table]:
    """How far each setting is behind the best of its mode, where there are several."""
    from tta_ext.intervals import difference, difference_interval

    tables = []
    for mode in dict.fromkeys(row.mode for row in rows):
        ranked = sorted((row for row in rows if row.mode == mode), key=lambda row: -row.exact)
        best, *others = ranked
        if not others or best.n < 2:
            continue
        table = common.table(f"{mode}: behind {best.setting.label}", "difference [95%]")
        for row in others:
            mean, _ = difference(row, best)
            found = interval(difference_interval(row, best), sign=True)
            table.add_row(row.setting.label, f"{mean:+.3f} {found}")
        tables.append(table)
    return tables


def interval(bounds: tuple[float, float], sign: bool = False, digits: int = 3) -> str:
    """``[.012, .345]``."""
    form = f"{'+' if sign else ''}.{digits}f"
    low, high = (f"{x:{form}}".removeprefix("0") for x in bounds)
    return f"[{low}, {high}]"


def _by_setting(rows: Sequence[Row]) -> dict[Setting, dict[str, Row]]:
    settings: dict[Setting, dict[str, Row]] = {}
    for row in rows:
        settings.setdefault(row.setting, {})[row.mode] = row
    return settings
