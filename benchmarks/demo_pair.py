"""All rules on the demo's held-out problems, with paired differences.

``python -m benchmarks.demo_pair --json OUT``: each rule's parameter is chosen on problems kept for
tuning, one for greedy and sampled answers alike; the chosen settings and both models alone then
answer the ``--n`` evaluation problems. ``tta demo`` shows a short table. With ``--journal`` a run
that was cut off goes on from its last batch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tta_ext.cli.common import load_models
from tta_ext.demo.pair import ASSETS
from tta_ext.demo.task import evaluation_task
from tta_ext.evaluation import (
    BASE_ALONE,
    IMPLICIT_REWARD,
    MODES,
    PROXY_ALONE,
    Models,
    Row,
    Setting,
    Task,
    difference,
    evaluate,
)
from tta_ext.journal import Journal


def _settings(rule: str, *params: float, critical: str = "exclude") -> tuple[Setting, ...]:
    return tuple(Setting(rule, param, critical) for param in params)


SWEEP = (
    *_settings("knapsack", 0.3, 0.6, 0.9),
    *_settings("threshold", 0.2, 0.3, 0.4, 0.5, 0.6),
    *_settings("confidence_bet", 0.0, 0.2, 0.4, 0.6),
    *_settings("nudging", 0.3, 0.4, 0.5, 0.6),
    *_settings("relative", 0.05, 0.2),
    Setting("argmax"),
    *_settings("proxy_below", -0.2, 0.0),
    *_settings("proxy_above", -0.2, 0.0),
    *_settings("relative_ratio", 0.1, 0.3, 0.6),
    *_settings("optimal", -0.3, 0.0, 0.3),
    *_settings(IMPLICIT_REWARD, 0.5, 1.0, 1.5),
)
KAD_RULES = ("knapsack", "threshold")


def chosen(rows: Iterable[Row]) -> list[Setting]:
    """A setting for each rule, by the mean of its exact match over the modes; the best rule first.

    Ties go to the earlier setting.
    """
    found: dict[Setting, list[float]] = {}
    for row in rows:
        found.setdefault(row.setting, []).append(row.exact)
    best: dict[str, Setting] = {}
    for setting in sorted(found, key=lambda one: -sum(found[one])):
        best.setdefault(setting.rule, setting)
    return list(best.values())


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """What the first setting of knapsack or threshold gains in each mode, with paired errors.

    Each entry is a pair: difference, standard error. ``behind`` holds every other setting's.
    """
    result: dict[str, Any] = {}
    for mode in dict.fromkeys(row.mode for row in rows):
        by = {row.setting.rule: row for row in reversed(rows) if row.mode == mode}
        kad = next((r for r in rows if r.mode == mode and r.setting.rule in KAD_RULES), None)
        if kad is None or BASE_ALONE not in by or PROXY_ALONE not in by:
            continue
        base, proxy = by[BASE_ALONE], by[PROXY_ALONE]
        result[mode] = {
            "kad": kad.setting.label,
            "exact": kad.exact,
            "base_lenient": base.lenient,
            "over_base": difference(kad, base),
            "over_base_lenient": difference(kad.outcomes, base.lenient_outcomes),
            "over_proxy": difference(kad, proxy),
            "behind": {
                row.setting.label: difference(kad, row)
                for row in rows
                if row.mode == mode and row.setting.rule not in (BASE_ALONE, PROXY_ALONE)
            },
        }
    return result


def speeds(models: Models, setting: Setting, rounds: int = 20) -> list[dict[str, Any]]:
    """Tokens a second of the plain loop and of ``speculative="auto"``, in turns."""
    keys: dict[str, Any] = {"max_new_tokens": 32, "eos_token_id": []}
    found = []
    for count in (1, 16):
        prompts = evaluation_task(count).prompts
        loops = {name: models.decoder(setting, speculative=name) for name in (None, "auto")}
        seconds: dict[Any, list[float]] = {name: [] for name in loops}
        for seed in range(-1, rounds):
            for name, kad in loops.items():
                start = time.perf_counter()
                kad.generate(prompts, seed=max(seed, 0), **keys)
                if seed >= 0:  # the first one warms up
                    seconds[name].append(time.perf_counter() - start)
        plain, drafted = (32 * count / median(seconds[name]) for name in loops)
        found.append({"rows": count, "plain": round(plain), "speculative": round(drafted)})
    return found


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    columns = (
        "exact",
        "±",
        "lenient",
        "±",
        "formatted",
        "proxy calls",
        "deferred",
        "tokens",
        "tokens/s",
    )
    lines = [f"| rule | mode | {' | '.join(columns)} |", "|---|---|" + "---:|" * len(columns)]
    for row in rows:
        deferred = "-" if row.deferred_rate is None else f"{row.deferred_rate:.3f}"
        lines.append(
            f"| {row.setting.label} | {row.mode} | {row.exact:.3f} | {row.exact_stderr:.3f} "
            f"| {row.lenient:.3f} | {row.lenient_stderr:.3f} | {row.formatted:.3f} "
            f"| {row.proxy_call_rate:.3f} | {deferred} | {row.tokens:.1f} "
            f"| {row.tokens_per_second:.0f} |"
        )
    return "\n".join(lines)


def report(result: dict[str, Any], rows: Sequence[Row], tuning: Sequence[Row]) -> str:
    """A Markdown page: how it was run, what was found, the tables."""
    lines = [
        "# Demo pair: all rules",
        "",
        f"`{result['command']}`",
        "",
        f"n = {result['n']} held-out problems, seed {result['seed']}, pair {result['pair']}, torch "
        f"{result['torch']}, {result['threads']} thread(s), batches of {result['batch_size']}. "
        "Standard errors are binomial; differences are paired over problems. Each rule has one "
        f"setting for both modes, chosen on {result['tuning']} other problems (last table).",
        *(["", result["note"]] if result.get("note") else []),
        "",
    ]

    def gain(pair: tuple[float, float]) -> str:
        return f"{pair[0]:+.3f} ± {pair[1]:.3f}"

    for mode, found in result["summary"].items():
        lines += [
            f"**{mode}**: {found['kad']} {found['exact']:.3f}; over the base's format-free score "
            f"{found['base_lenient']:.3f} {gain(found['over_base_lenient'])}; over the base "
            f"{gain(found['over_base'])}; over the proxy {gain(found['over_proxy'])}.",
            "",
        ]
    lines += [table(rows), ""]
    if result.get("speeds"):
        lines += [
            f"Tokens a second of {result['kad']}, sampled, plain and with drafts "
            '(`speculative="auto"`), medians of twenty runs in turns:',
            "",
            "| rows | plain | speculative |",
            "|---:|---:|---:|",
            *(f"| {s['rows']} | {s['plain']} | {s['speculative']} |" for s in result["speeds"]),
            "",
        ]
    if result["summary"]:
        modes = list(result["summary"])
        lines += [
            f"| behind {result['kad']} | {' | '.join(modes)} |",
            "|---|" + "---|" * len(modes),
        ]
        for label in result["summary"][modes[0]]["behind"]:
            if label != result["kad"]:
                cells = [gain(result["summary"][mode]["behind"][label]) for mode in modes]
                lines.append(f"| {label} | {' | '.join(cells)} |")
        lines.append("")
    if tuning:
        lines += [f"The sweep, on {result['tuning']} problems that are not among these:", ""]
        lines += [table(tuning), ""]
    return "\n".join(lines)


def main() -> None:
    """Command line of the evaluation."""
    parser = argparse.ArgumentParser(description="Evaluate deferral rules on the demo pair.")
    parser.add_argument("--n", type=int, default=1000, help="number of held-out problems")
    parser.add_argument("--tuning", type=int, default=100, help="other problems, for parameters")
    parser.add_argument("--rules", nargs="*", help="these settings alone, e.g. base threshold:0.4")
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=MODES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--pair", type=Path, default=ASSETS, help="directory of another pair")
    parser.add_argument("--journal", type=Path, help="JSONL file; a cut-off run resumes from it")
    parser.add_argument(
        "--json", type=Path, help="file for rows and summary; .md is written beside"
    )
    parser.add_argument("--threads", type=int, help="torch threads")
    parser.add_argument("--note", default="", help="a remark to keep with the results")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    names = ("base", "proxy", "proxy_init")
    weights = [(arguments.pair / name / "model.safetensors").read_bytes() for name in names]
    models = load_models(*(str(arguments.pair / name) for name in names))
    journal = Journal(arguments.journal)

    def answered(task: Task, settings: Sequence[Setting | str]) -> list[Row]:
        rows = []
        for row in evaluate(
            models,
            task,
            settings,
            modes=arguments.modes,
            seed=arguments.seed,
            batch_size=arguments.batch_size,
            journal=journal,
        ):
            rows.append(row)
            print(table([row]).splitlines()[-1], flush=True)
        return rows

    tuning: list[Row] = []
    settings: Sequence[Setting | str] = arguments.rules or ()
    if not settings:
        tuning = answered(evaluation_task(arguments.tuning, skip=arguments.n), SWEEP)
        settings = [Setting(BASE_ALONE), Setting(PROXY_ALONE), *chosen(tuning)]
    rows = answered(evaluation_task(arguments.n), settings)
    kad = next((row.setting for row in rows if row.setting.rule in KAD_RULES), None)
    result = {
        "command": f"python -m benchmarks.demo_pair --n {arguments.n}",
        "n": arguments.n,
        "tuning": arguments.tuning,
        "seed": arguments.seed,
        "batch_size": arguments.batch_size,
        "pair": hashlib.sha256(b"".join(weights)).hexdigest()[:16],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "note": arguments.note,
        "kad": kad and kad.label,
        "summary": summary(rows),
        "speeds": kad and speeds(models, kad),
        "rows": [row.as_dict() for row in rows],
    }
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
        arguments.json.with_suffix(".md").write_text(report(result, rows, tuning))


if __name__ == "__main__":
    main()
