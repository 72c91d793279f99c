"""``tta eval`` and ``tta sweep``: accuracy of rules and parameters, with standard errors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from tta_ext.cli import common
from tta_ext.cli.common import console, errors

if TYPE_CHECKING:
    from tta_ext.decoding import KnapsackDeferral
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
    from tta_ext.demo.evaluate import SHORT, Setting

    common.set_threads(threads)
    settings = [Setting.parse(rule) for rule in rules] if rules else list(SHORT)
    if anti is None and data is not None and not rules:
        settings = [s for s in settings if s.rule != "implicit_reward"]
    _run(
        settings, base, proxy, anti, data, pattern, n, mode, seed, max_new_tokens, batch_size, journal,
        output, dtype, device,
    )  # fmt: skip


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
    from tta_ext.demo.evaluate import Setting

    common.set_threads(threads)
    name = common.canonical_rule(rule)
    settings = [Setting.parse(f"{name}:{value:g}:{critical}") for value in parse_range(params)]
    _run(
        settings, base, proxy, anti, data, pattern, n, mode, seed, max_new_tokens, batch_size, journal,
        output, dtype, device,
    )  # fmt: skip


def parse_range(text: str) -> list[float]:
    """Numbers from ``a,b,c`` or ``start:stop:step``, stop included."""
    try:
        if ":" not in text:
            return [float(part) for part in text.split(",")]
        start, stop, step = (float(part) for part in text.split(":"))
        count = int(math.floor((stop - start) / step + 1e-9)) + 1
        if count < 1:
            raise ValueError
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"--params is {text!r}, expected a,b,c or start:stop:step") from None
    return [round(start + i * step, 10) for i in range(count)]


def _run(
    settings: Sequence[Setting],
    base: str | None,
    proxy: str | None,
    anti: str | None,
    data: Path | None,
    pattern: str | None,
    n: int,
    mode: Sequence[str] | None,
    seed: int,
    max_new_tokens: int,
    batch_size: int,
    journal: Path | None,
    output: Path | None,
    dtype: str,
    device: str | None,
) -> None:
    from tta_ext.demo.evaluate import MODES, evaluate_iter

    modes = tuple(mode or MODES)
    if (data is None) != (base is None):
        raise ValueError(
            "--data and --base/--proxy belong together; without them the demo is evaluated"
        )
    with common.bar() as bar:
        task = bar.add_task("problems", total=n * len(settings) * len(modes))
        rows: Iterator[Row]
        if data is None:
            common.quiet_transformers()
            rows = evaluate_iter(
                settings,
                n,
                modes=modes,
                seed=seed,
                batch_size=batch_size,
                journal=journal,
                progress=lambda done: bar.advance(task, done),
            )
        else:
            kad = common.load_pair(
                base, proxy, anti, dtype=dtype, device=device, **_first(settings)
            )
            problems = load_problems(data, n)
            bar.update(task, total=len(problems) * len(settings) * len(modes))
            rows = evaluate_data(
                kad, settings, problems, modes, pattern, seed, max_new_tokens, batch_size, journal,
                lambda done: bar.advance(task, done),
            )  # fmt: skip
        finished = list(rows)
    console.print(row_table(finished))
    if output is not None:
        output.write_text(json.dumps([row.as_dict() for row in finished], indent=1) + "\n")
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
    """The answer in a text: the pattern's last match (group 1 if it has one), or the text itself."""
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
    modes: Sequence[str],
    pattern: str | None,
    seed: int,
    max_new_tokens: int,
    batch_size: int,
    journal: Path | None,
    progress: Any,
) -> Iterator[Row]:
    """A row for each setting and mode over someone's own problems; resumes from a journal."""
    from tta_ext.decoding import DecodeStats
    from tta_ext.demo.evaluate import MODES, SAMPLED, Journal, Row

    if batch_size < 1:
        raise ValueError(f"--batch-size is {batch_size}, expected at least 1")
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"--mode is {mode!r}, expected one of {', '.join(MODES)}")
    book = None if journal is None else Journal(journal)
    names = [getattr(m.config, "_name_or_path", "") for m in (kad.base, *kad.proxies, *kad.anti)]
    for setting in settings:
        for mode in modes:
            outcomes: list[bool] = []
            matched = 0
            stats = DecodeStats()
            for start in range(0, len(problems), batch_size):
                chosen = problems[start : start + batch_size]
                key = {
                    "setting": setting.label, "mode": mode, "seed": seed, "models": names,
                    "max_new_tokens": max_new_tokens,
                    "problems": [common.record_prompt(p) for p in chosen],
                }  # fmt: skip
                batch = None if book is None else book.get(key)
                if batch is None:
                    result = kad.generate(
                        [common.record_prompt(p) for p in chosen],
                        seed=seed,
                        sequence=range(start, start + len(chosen)),
                        do_sample=mode == SAMPLED,
                        max_new_tokens=max_new_tokens,
                        **_options(setting),
                    )
                    counted = {k: v for k, v in vars(result.stats).items()}
                    batch = {"texts": result.texts, "stats": counted}
                    if book is not None:
                        book.put(key, batch)
                stats += DecodeStats(**batch["stats"])
                for problem, text in zip(chosen, batch["texts"], strict=True):
                    answer = found_answer(text, pattern)
                    matched += answer is not None
                    outcomes.append(answer == str(problem["answer"]).strip())
                progress(len(chosen))
            yield _row(Row, setting, mode, outcomes, matched / len(problems), stats)


def _options(setting: Setting) -> dict[str, Any]:
    """A setting as arguments of ``generate``; a model alone is a rule that rejects nothing or all."""
    if setting.rule in ("base", "proxy"):
        return {"rule": "knapsack", "param": 1.0} if setting.rule == "proxy" else {
            "rule": "threshold", "param": 0.0,
        }  # fmt: skip
    return {"rule": setting.rule, "param": setting.param, "critical": setting.critical}


def _row(
    kind: type[Row],
    setting: Setting,
    mode: str,
    outcomes: Sequence[bool],
    matched: float,
    stats: Any,
) -> Row:
    count = len(outcomes)
    exact = sum(outcomes) / count
    error = math.sqrt(exact * (1 - exact) / count)
    tokens = max(1, stats.tokens)
    return kind(
        rule=setting.rule,
        param=setting.param,
        critical=setting.critical,
        mode=mode,
        n=count,
        exact=exact,
        exact_stderr=error,
        lenient=exact,
        lenient_stderr=error,
        formatted=matched,
        deferred_rate=None if setting.rule == "implicit_reward" else stats.deferred_tokens / tokens,
        proxy_call_rate=stats.proxy_rows / tokens,
        tokens=stats.tokens / count,
        tokens_per_second=stats.tokens_per_second,
        outcomes=tuple(outcomes),
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
