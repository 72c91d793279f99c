"""``tta eval --task``: the papers' tasks from a local copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from tta_ext.cli import common
from tta_ext.cli.progress import progress
from tta_ext.journal import run_facts

if TYPE_CHECKING:
    from tta_ext.evaluation import Setting
    from tta_ext.tasks import TaskRow

__all__ = ["run_task", "task_table"]

# Options of the command that a task does not use.
UNUSED = {
    "pattern", "mode", "journal", "plot", "shard", "engine", "workers", "address", "gpus_per_worker"
}  # fmt: skip


def run_task(context: typer.Context, settings: Sequence[Setting]) -> None:
    """Answer a task's problems as the command's other options say, and show the rows."""
    from tta_ext.evaluation import IMPLICIT_REWARD
    from tta_ext.tasks import MAX_NEW_TOKENS, load_task, run

    options: dict[str, Any] = context.params
    common.refuse_unused(context, "--task", UNUSED)
    implicit = any(setting.rule == IMPLICIT_REWARD for setting in settings)
    if not implicit:
        common.refuse_unused(context, "what is evaluated", {"anti"})
    if options["data"] is None:
        raise ValueError(f"--task {options['task']} needs --data, a local copy of its problems")
    problems = load_task(options["task"], options["data"], options["n"])
    common.check_output(options["output"])
    named = {key: options[key] for key in ("base", "proxy", "anti", "proxy_revision")}
    models = common.load_models(**named, implicit=implicit, **common.loading_options(context))
    chosen = {key: options[key] for key in ("samples", "window", "seed", "batch_size")}
    length = options["max_new_tokens"] or MAX_NEW_TOKENS
    with progress("problems", len(problems) * len(settings)) as advance:
        rows = list(
            run(models, problems, settings, max_new_tokens=length, progress=advance, **chosen)
        )
    common.show_table(task_table(rows))
    if options["output"] is not None:
        facts = run_facts(
            models=models.facts(), task=options["task"], data=options["data"],
            max_new_tokens=length, **chosen,
        )  # fmt: skip
        report = [{"run": facts, **row.as_dict()} for row in rows]
        common.write_report(options["output"], report)


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
