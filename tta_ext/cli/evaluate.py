"""``tta eval`` and ``tta sweep``: accuracy of rules and parameters, with standard errors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from tta_ext.cli import common
from tta_ext.cli.common import console, errors

if TYPE_CHECKING:
    from tta_ext.decoding import DecodeStats, KnapsackDeferral
    from tta_ext.demo.evaluate import Row, Setting

__all__ = ["evaluate", "row_table", "sweep"]

Mode = Annotated[list[str] | None, typer.Option(help="sampled, greedy; both by default.")]
Journal = Annotated[
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


def evaluate(
    rules: Annotated[
        list[str] | None,
        typer.Argument(help="base, proxy, or rule:param[:critical], such as threshold:0.4."),
    ] = None,
    base: common.Base = None,
    proxy: common.Proxy = None,
    anti: Annotated[
        str | None, typer.Option(help="The proxy before alignment, for implicit_reward.")
    ] = None,
    data: Data = None,
    pattern: Pattern = None,
    n: Annotated[int, typer.Option(help="Number of problems.")] = 100,
    mode: Mode = None,
    seed: Annotated[int, typer.Option(help="Seed of sampled rows.")] = 0,
    max_new_tokens: common.MaxNewTokens = 128,
    batch_size: common.BatchSize = 50,
    journal: Journal = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the rows.")] = None,
    dtype: common.Dtype = "auto",
    device: common.Device = None,
    threads: common.Threads = None,
) -> None:
    """Accuracy of deferral rules, next to each model alone.

    Without --data, on the held-out problems of the demo's pair; with it, the share of answers that
    match: the --pattern's last match in the text, or the text itself, equals "answer".
    """
    from tta_ext.demo.evaluate import MODES, SHORT, Setting

    common.set_threads(threads)
    settings = [Setting.parse(rule) for rule in rules] if rules else list(SHORT)
    if anti is None and data is not None and not rules:
        settings = [s for s in settings if s.rule != "implicit_reward"]
    job = Job(n, tuple(mode or MODES), seed, max_new_tokens, batch_size, journal, pattern)
    _show(_run(settings, job, data, base, proxy, anti, dtype, device), output)


def sweep(
    rule: common.Rule = "threshold",
    params: Annotated[
        str, typer.Option(help="Parameters: a,b,c or start:stop:step (stop included).")
    ] = "0.1:0.9:0.1",
    critical: common.Critical = "exclude",
    base: common.Base = None,
    proxy: common.Proxy = None,
    anti: Annotated[
        str | None, typer.Option(help="The proxy before alignment, for implicit_reward.")
    ] = None,
    data: Data = None,
    pattern: Pattern = None,
    n: Annotated[int, typer.Option(help="Number of problems.")] = 100,
    mode: Mode = None,
    seed: Annotated[int, typer.Option(help="Seed of sampled rows.")] = 0,
    max_new_tokens: common.MaxNewTokens = 128,
    batch_size: common.BatchSize = 50,
    journal: Journal = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the rows.")] = None,
    dtype: common.Dtype = "auto",
    device: common.Device = None,
    threads: common.Threads = None,
) -> None:
    """Accuracy of one rule over a range of its parameter; otherwise as eval."""
    from tta_ext.demo.evaluate import MODES, Setting

    common.set_threads(threads)
    name = common.canonical_rule(rule)
    settings = [Setting.parse(f"{name}:{value:g}:{critical}") for value in parse_range(params)]
    job = Job(n, tuple(mode or MODES), seed, max_new_tokens, batch_size, journal, pattern)
    _show(_run(settings, job, data, base, proxy, anti, dtype, device), output)


def _run(
    settings: Sequence[Setting],
    job: Job,
    data: Path | None,
    base: str | None,
    proxy: str | None,
    anti: str | None,
    dtype: str,
    device: str | None,
) -> list[Row]:
    """The rows of all settings: of the demo's pair, or of other models on other data."""
    if data is None and base is None:
        return _run_demo(settings, job)
    if data is None or base is None:
        raise ValueError("--data and --base/--proxy belong together; without both, the demo is run")
    kad = common.load_pair(base, proxy, anti, dtype=dtype, device=device, **_first(settings))
    return _run_data(kad, settings, data, job)


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


@dataclass(frozen=True)
class Job:
    """How to evaluate, whatever on."""

    n: int
    modes: tuple[str, ...]
    seed: int
    max_new_tokens: int
    batch_size: int
    journal: Path | None
    pattern: str | None


def _run_demo(settings: Sequence[Setting], job: Job) -> list[Row]:
    from tta_ext.demo.evaluate import evaluate_iter

    common.quiet_transformers()
    with common.bar() as bar:
        task = bar.add_task("problems", total=job.n * len(settings) * len(job.modes))
        return list(
            evaluate_iter(
                settings,
                job.n,
                modes=job.modes,
                seed=job.seed,
                batch_size=job.batch_size,
                journal=job.journal,
                progress=lambda done: bar.advance(task, done),
            )
        )


def _run_data(
    kad: KnapsackDeferral, settings: Sequence[Setting], data: Path, job: Job
) -> list[Row]:
    problems = load_problems(data, job.n)
    with common.bar() as bar:
        task = bar.add_task("problems", total=len(problems) * len(settings) * len(job.modes))
        return list(
            evaluate_data(kad, settings, problems, job, lambda done: bar.advance(task, done))
        )


def _show(rows: Sequence[Row], output: Path | None) -> None:
    console.print(row_table(rows))
    if output is not None:
        output.write_text(json.dumps([row.as_dict() for row in rows], indent=1) + "\n")
        errors.print(f"rows: {output}")


def _first(settings: Sequence[Setting]) -> dict[str, Any]:
    """Arguments for a pair that can take all settings: experts stay experts."""
    kinds = {setting.rule == "implicit_reward" for setting in settings}
    if kinds == {True}:
        return {"rule": "implicit_reward"}
    if True in kinds:
        raise ValueError(
            "implicit_reward cannot be mixed with other rules over --data; run it alone"
        )
    return {"rule": "threshold"}


def load_problems(path: Path, n: int) -> list[dict[str, Any]]:
    """The first ``n`` records of a JSONL file, each with a prompt and an answer."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    records = common.parse_jsonl(lines[:n])
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict) or "answer" not in record:
            raise ValueError(f"line {number} of {path} has no 'answer'")
        common.record_prompt(record)
    if not records:
        raise ValueError(f"{path} has no problems")
    return records


def found_answer(text: str, pattern: str | None) -> str | None:
    """The pattern's last match in a text (its group 1 if it has one); without one, the text."""
    if pattern is None:
        return text.strip()
    matches = list(re.finditer(pattern, text))
    if not matches:
        return None
    last = matches[-1]
    return last.group(1 if last.re.groups else 0).strip()


def evaluate_data(
    kad: KnapsackDeferral,
    settings: Sequence[Setting],
    problems: Sequence[dict[str, Any]],
    job: Job,
    progress: Callable[[int], None],
) -> Iterator[Row]:
    """A row for each setting and mode over someone's own problems; resumes from a journal."""
    from tta_ext.decoding import DecodeStats
    from tta_ext.demo.evaluate import MODES, SAMPLED, Journal

    if job.batch_size < 1:
        raise ValueError(f"--batch-size is {job.batch_size}, expected at least 1")
    for mode in job.modes:
        if mode not in MODES:
            raise ValueError(f"--mode is {mode!r}, expected one of {', '.join(MODES)}")
    book = None if job.journal is None else Journal(job.journal)
    models = [getattr(m.config, "_name_or_path", "") for m in (kad.base, *kad.proxies, *kad.anti)]
    for setting, mode in product(settings, job.modes):
        texts: list[str] = []
        stats = DecodeStats()
        for start in range(0, len(problems), job.batch_size):
            prompts = [common.record_prompt(p) for p in problems[start : start + job.batch_size]]
            options = {
                "seed": job.seed,
                "sequence": list(range(start, start + len(prompts))),
                "do_sample": mode == SAMPLED,
                "max_new_tokens": job.max_new_tokens,
                **_options(setting),
            }
            key = options | {"prompts": prompts, "models": models}
            batch = None if book is None else book.get(key)
            if batch is None:
                result = kad.generate(prompts, **options)
                batch = {"texts": result.texts, "stats": vars(result.stats)}
                if book is not None:
                    book.put(key, batch)
            stats += DecodeStats(**batch["stats"])
            texts += batch["texts"]
            progress(len(prompts))
        answers = [found_answer(text, job.pattern) for text in texts]
        wanted = [str(problem["answer"]).strip() for problem in problems]
        yield _row(setting, mode, answers, wanted, stats)


def _options(setting: Setting) -> dict[str, Any]:
    """A setting as arguments of ``generate``; a model alone: a rule that rejects all or nothing."""
    if setting.rule == "proxy":
        return {"rule": "knapsack", "param": 1.0}
    if setting.rule == "base":
        return {"rule": "threshold", "param": 0.0}
    return {"rule": setting.rule, "param": setting.param, "critical": setting.critical}


def _row(
    setting: Setting,
    mode: str,
    answers: Sequence[str | None],
    wanted: Sequence[str],
    stats: DecodeStats,
) -> Row:
    from tta_ext.demo.evaluate import Row

    outcomes = tuple(a == w for a, w in zip(answers, wanted, strict=True))
    count = len(outcomes)
    exact = sum(outcomes) / count
    error = math.sqrt(exact * (1 - exact) / count)
    tokens = max(1, stats.tokens)
    return Row(
        rule=setting.rule,
        param=setting.param,
        critical=setting.critical,
        mode=mode,
        n=count,
        exact=exact,
        exact_stderr=error,
        lenient=exact,
        lenient_stderr=error,
        formatted=sum(answer is not None for answer in answers) / count,
        deferred_rate=None if setting.rule == "implicit_reward" else stats.deferred_tokens / tokens,
        proxy_call_rate=stats.proxy_rows / tokens,
        tokens=stats.tokens / count,
        tokens_per_second=stats.tokens_per_second,
        outcomes=outcomes,
    )


def row_table(rows: Sequence[Row]) -> Table:
    """Rows of an evaluation for the terminal, all modes of a setting side by side.

    ``free`` is the score without regard to format; the last columns are the last mode's.
    """
    modes = list(dict.fromkeys(row.mode for row in rows))
    best = {mode: max(row.exact for row in rows if row.mode == mode) for mode in modes}
    table = Table(box=None, pad_edge=False)
    table.add_column("rule", no_wrap=True)
    for mode in modes:
        table.add_column(f"{mode}\nexact ± se", justify="right", no_wrap=True)
        table.add_column("free", justify="right", no_wrap=True)
    for name in ("proxy\ncalls", "tokens\n/s"):
        table.add_column(name, justify="right", no_wrap=True)
    settings: dict[Any, dict[str, Row]] = {}
    for row in rows:
        settings.setdefault(row.setting, {})[row.mode] = row
    for setting, by_mode in settings.items():
        cells = []
        for mode in modes:
            one = by_mode.get(mode)
            if one is None:
                cells += ["", ""]
                continue
            exact = f"{one.exact:.3f} ±{f'{one.exact_stderr:.3f}'.removeprefix('0')}"
            cells += [f"[bold green]{exact}[/]" if one.exact == best[mode] else exact]
            cells += [f"{one.lenient:.3f}"]
        last = list(by_mode.values())[-1]
        table.add_row(
            setting.label,
            *cells,
            f"{last.proxy_call_rate:.2f}",
            f"{last.tokens_per_second:.0f}",
        )
    return table
