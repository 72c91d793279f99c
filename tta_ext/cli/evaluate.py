"""``tta eval`` and ``tta sweep``: accuracy of rules and parameters, with standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from tta_ext.cli import common
from tta_ext.cli.common import console
from tta_ext.journal import Journal

if TYPE_CHECKING:
    from tta_ext.evaluation import Row, Setting
    from tta_ext.tasks import TaskRow

__all__ = ["evaluate", "row_table", "sweep"]

Mode = Annotated[list[str] | None, typer.Option(help="sampled, greedy; both by default.")]
JournalFile = Annotated[
    Path | None,
    typer.Option(help="JSONL file of finished batches; a run that was cut short goes on from it."),
]
Data = Annotated[
    Path | None,
    typer.Option(
        help='JSONL with "prompt" or "messages", and "answer". Default: the demo\'s problems.'
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
# Options of a --task alone, and those that it does not use.
TASK_ONLY = {"samples", "window"}
NOT_TASK = {"pattern", "mode", "journal"}


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
    dtype: common.Dtype = "auto",
    device: common.Device = None,
    threads: common.Threads = None,
) -> None:
    """Accuracy of deferral rules, next to each model alone.

    Without --data, on the held-out problems of the demo's pair; with it, the share of answers that
    match: the --pattern's last match in the text, or the text itself, equals "answer". With --task
    the papers' protocol: zero-shot, the aligned model's chat template for both, temperature 1, 1024
    tokens, and three scorers side by side.
    """
    from tta_ext.evaluation import IMPLICIT_REWARD, SHORT, Setting

    settings = [Setting.parse(rule) for rule in rules] if rules else list(SHORT)
    if not rules and base is not None and anti is None:
        settings = [setting for setting in settings if setting.rule != IMPLICIT_REWARD]
    if task is not None:
        _run_task(context, settings)
        return
    common.refuse_unused(context, "an evaluation without --task", TASK_ONLY)
    _run(context, settings)


def sweep(
    context: typer.Context,
    rule: common.Rule = "threshold",
    params: Annotated[
        str, typer.Option(help="Parameters: a,b,c or start:stop:step (stop included).")
    ] = "0.1:0.9:0.1",
    critical: common.Critical = "exclude",
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
    dtype: common.Dtype = "auto",
    device: common.Device = None,
    threads: common.Threads = None,
) -> None:
    """Accuracy of one rule over a range of its parameter; otherwise as eval."""
    setting = common.chosen_setting(context, rule, None, critical)
    if setting.rule == "argmax":
        raise ValueError("argmax has no parameter to sweep; see tta eval argmax")
    _run(context, [replace(setting, param=value) for value in parse_range(params)])


def _run(context: typer.Context, settings: Sequence[Setting]) -> None:
    """Evaluate settings as the command's other options say, and show the rows."""
    from tta_ext.demo.task import evaluation_task
    from tta_ext.evaluation import IMPLICIT_REWARD, MODES, data_task
    from tta_ext.evaluation import evaluate as evaluate_rows

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
    journal = Journal(options["journal"])
    modes = tuple(options["mode"] or MODES)
    common.check_writable(options["output"])
    named = {key: options[key] for key in ("base", "proxy", "anti", "dtype", "device")}
    models = common.load_models(**named, implicit=implicit)
    total = len(task.prompts) * len(settings) * len(modes)
    with common.progress("problems", total) as advance:
        rows = list(
            evaluate_rows(
                models,
                task,
                settings,
                modes=modes,
                journal=journal,
                progress=advance,
                **{key: options[key] for key in ("seed", "batch_size", "max_new_tokens")},
            )
        )
    console.print(row_table(rows))
    common.write_report(options["output"], [row.as_dict() for row in rows])


def _run_task(context: typer.Context, settings: Sequence[Setting]) -> None:
    """Answer a task's problems as the command's other options say, and show the rows."""
    from tta_ext.evaluation import IMPLICIT_REWARD
    from tta_ext.tasks import MAX_NEW_TOKENS, load_task, run

    options: dict[str, Any] = context.params
    common.refuse_unused(context, "--task", NOT_TASK)
    implicit = any(setting.rule == IMPLICIT_REWARD for setting in settings)
    if not implicit:
        common.refuse_unused(context, "what is evaluated", {"anti"})
    if options["data"] is None:
        raise ValueError(f"--task {options['task']} needs --data, a local copy of its problems")
    problems = load_task(options["task"], options["data"], options["n"])
    common.check_writable(options["output"])
    named = {key: options[key] for key in ("base", "proxy", "anti", "dtype", "device")}
    models = common.load_models(**named, implicit=implicit)
    chosen = {key: options[key] for key in ("samples", "window", "seed", "batch_size")}
    length = options["max_new_tokens"] or MAX_NEW_TOKENS
    with common.progress("problems", len(problems) * len(settings)) as advance:
        rows = list(
            run(models, problems, settings, max_new_tokens=length, progress=advance, **chosen)
        )
    console.print(task_table(rows))
    common.write_report(options["output"], [row.as_dict() for row in rows])


def task_table(rows: Sequence[TaskRow]) -> Table:
    """Rows of a task for the terminal: three scorers, pass@k where there are several answers."""
    samples = rows[0].samples if rows else 1
    names = ("string", "numeric", "exact")
    passes = [f"{name}\npass@{samples}" for name in names] if samples > 1 else []
    scores = [f"{name}\n± se" for name in names]
    table = common.table("rule", *scores, *passes, "proxy\ncalls", "drafts\nkept", "tokens\n/s")
    for row in rows:
        cells = []
        for name in names:
            error = f"{getattr(row, f'{name}_stderr'):.3f}".removeprefix("0")
            cells.append(f"{getattr(row, name):.3f} ±{error}")
        if samples > 1:
            cells += [f"{getattr(row, name + '_pass'):.3f}" for name in names]
        cells += [f"{row.proxy_call_rate:.2f}", f"{row.acceptance_rate:.2f}"]
        table.add_row(row.setting.label, *cells, f"{row.tokens_per_second:.0f}")
    return table


def parse_range(text: str) -> list[float]:
    """Numbers from ``a,b,c`` or ``start:stop:step``, stop included."""
    try:
        if ":" not in text:
            return [float(part) for part in text.split(",")]
        start, stop, step = (float(part) for part in text.split(":"))
        count = math.floor((stop - start) / step + 1e-9) + 1
        if count < 1:
            raise ValueError
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"--params is {text!r}, expected a,b,c or start:stop:step") from None
    return [round(start + i * step, 10) for i in range(count)]


def row_table(rows: Sequence[Row]) -> Table:
    """Rows of an evaluation for the terminal, all modes of a setting side by side.

    ``free`` is the score without regard to format; the last columns are the last mode's.
    """
    modes = list(dict.fromkeys(row.mode for row in rows))
    best = {mode: max(row.exact for row in rows if row.mode == mode) for mode in modes}
    scores = [name for mode in modes for name in (f"{mode}\nexact ± se", "free")]
    table = common.table("rule", *scores, "proxy\ncalls", "tokens\n/s")
    settings: dict[Any, dict[str, Row]] = {}
    for row in rows:
        settings.setdefault(row.setting, {})[row.mode] = row
    for setting, by_mode in settings.items():
        cells: list[str | Text] = []
        for mode in modes:
            one = by_mode[mode]
            exact = f"{one.exact:.3f} ±{f'{one.exact_stderr:.3f}'.removeprefix('0')}"
            style = "bold green" if one.exact == best[mode] else ""
            cells += [Text(exact, style), f"{one.lenient:.3f}"]
        last = list(by_mode.values())[-1]
        table.add_row(
            setting.label,
            *cells,
            f"{last.proxy_call_rate:.2f}",
            f"{last.tokens_per_second:.0f}",
        )
    return table
