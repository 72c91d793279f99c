"""All rules on the demo's held-out problems, many parameters, with paired differences.

``python -m benchmarks.demo_pair --n 500 --json OUT`` prints the whole table; ``tta demo`` shows a
short one. With ``--journal`` a run that was cut off goes on from its last batch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
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
    Row,
    Setting,
    difference,
    evaluate,
)
from tta_ext.journal import Journal


def _settings(rule: str, *params: float, critical: str = "exclude") -> tuple[Setting, ...]:
    return tuple(Setting(rule, param, critical) for param in params)


SWEEP = (
    Setting(BASE_ALONE),
    Setting(PROXY_ALONE),
    *_settings("knapsack", 0.1, 0.3, 0.5, 0.7, 0.9, 0.95),
    *_settings("knapsack", 0.5, 0.9, critical="include"),
    *_settings("knapsack", 0.5, 0.9, critical="split"),
    *_settings("threshold", 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 0.95),
    *_settings("confidence_bet", 0.0, 0.2, 0.4, 0.6, 0.8),
    *_settings("nudging", 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 0.95),
    *_settings("relative", 0.05, 0.2, 0.5),
    Setting("argmax"),
    *_settings("proxy_below", -0.5, -0.2, 0.0),
    *_settings("proxy_above", -0.2, 0.0, 0.3),
    *_settings("relative_ratio", 0.3, 0.6, 0.9),
    *_settings("optimal", -0.3, 0.0, 0.3),
    *_settings(IMPLICIT_REWARD, 0.5, 1.0, 1.5),
)


def best_by_rule(rows: Iterable[Row], mode: str) -> dict[str, Row]:
    """The row of highest exact match for each rule; ties to the earlier."""
    best: dict[str, Row] = {}
    for row in rows:
        rule = row.setting.rule
        if row.mode == mode and (rule not in best or row.exact > best[rule].exact):
            best[rule] = row
    return best


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """The table's main comparisons for each mode, with paired standard errors.

    Parameters are chosen on the same problems, which flatters every swept rule alike.
    """
    result: dict[str, Any] = {}
    for mode in dict.fromkeys(row.mode for row in rows):
        best = best_by_rule(rows, mode)
        kad = [best[rule] for rule in ("knapsack", "threshold") if rule in best]
        if not kad or BASE_ALONE not in best or PROXY_ALONE not in best:
            continue
        top = max(kad, key=lambda row: row.exact)
        base, proxy = best[BASE_ALONE], best[PROXY_ALONE]
        steered = [row for rule, row in best.items() if rule not in (BASE_ALONE, PROXY_ALONE)]
        ranked = sorted(steered, key=lambda row: -row.exact)
        pairs = []
        for i, one in enumerate(ranked):
            for other in ranked[i + 1 :]:
                mean, error = difference(one, other)
                apart = mean / error if error else (math.inf if mean else 0.0)
                pairs.append(
                    {
                        "better": one.setting.label,
                        "worse": other.setting.label,
                        "difference": round(mean, 4),
                        "stderr": round(error, 4),
                        "stderrs_apart": None if math.isinf(apart) else round(apart, 1),
                    }
                )
        result[mode] = {
            "best_kad": top.setting.label,
            "exact": top.exact,
            "over_base": difference(top, base),
            "over_proxy": difference(top, proxy),
            "base_lenient": base.lenient,
            "over_base_lenient": difference(top.outcomes, base.lenient_outcomes),
            "best_by_rule": {row.setting.rule: [row.setting.label, row.exact] for row in ranked},
            "differences": pairs,
        }
    return result


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    columns = (
        "exact",
        "±",
        "lenient",
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
            f"| {row.lenient:.3f} | {row.formatted:.3f} | {row.proxy_call_rate:.3f} "
            f"| {deferred} | {row.tokens:.1f} | {row.tokens_per_second:.0f} |"
        )
    return "\n".join(lines)


def report(result: dict[str, Any], rows: Sequence[Row]) -> str:
    """A Markdown page: how it was run, what was found, the table."""
    lines = [
        "# Demo pair: all rules",
        "",
        f"`{result['command']}`",
        "",
        f"n = {result['n']} held-out problems, seed {result['seed']}, pair {result['pair']}, torch "
        f"{result['torch']}, {result['threads']} thread(s), batches of {result['batch_size']}. "
        "Standard errors are binomial; differences are paired over problems. Parameters are chosen "
        "on the same problems, which flatters every swept rule alike.",
        *(["", result["note"]] if result.get("note") else []),
        "",
    ]
    for mode, found in result["summary"].items():
        base, proxy = found["over_base"], found["over_proxy"]
        gain, error = found["over_base_lenient"]
        verdict = "beats" if gain > 2 * error else "loses to" if gain < -2 * error else "equals"
        lines += [
            f"**{mode}**: {found['best_kad']} {found['exact']:.3f}; over the base alone "
            f"{base[0]:+.3f} ± {base[1]:.3f}, over the proxy alone {proxy[0]:+.3f} ± "
            f"{proxy[1]:.3f}; with its exact match it {verdict} (within two standard errors) the "
            f"base's format-free score {found['base_lenient']:.3f}: {gain:+.3f} ± {error:.3f}.",
            "",
            "| best of each rule | exact | behind the first |",
            "|---|---:|---:|",
        ]
        behind = {}
        for pair in found["differences"]:
            if pair["better"] == next(iter(found["best_by_rule"].values()))[0]:
                behind[pair["worse"]] = f"{pair['difference']:.3f} ± {pair['stderr']:.3f}"
        for label, exact in found["best_by_rule"].values():
            lines.append(f"| {label} | {exact:.3f} | {behind.get(label, '')} |")
        lines.append("")
    return "\n".join([*lines, table(rows), ""])


def main() -> None:
    """Command line of the evaluation."""
    parser = argparse.ArgumentParser(description="Evaluate deferral rules on the demo pair.")
    parser.add_argument("--n", type=int, default=500, help="number of held-out problems")
    parser.add_argument("--rules", nargs="*", help="e.g. base threshold:0.4 knapsack:0.9:split")
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=MODES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=100)
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
    rows = []
    for row in evaluate(
        load_models(*(str(arguments.pair / name) for name in names)),
        evaluation_task(arguments.n),
        arguments.rules or SWEEP,
        modes=arguments.modes,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        journal=Journal(arguments.journal),
    ):
        rows.append(row)
        print(table([row]).splitlines()[-1], flush=True)
    result = {
        "command": f"python -m benchmarks.demo_pair --n {arguments.n}",
        "n": arguments.n,
        "seed": arguments.seed,
        "batch_size": arguments.batch_size,
        "pair": hashlib.sha256(b"".join(weights)).hexdigest()[:16],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "note": arguments.note,
        "summary": summary(rows),
        "rows": [row.as_dict() for row in rows],
    }
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
        arguments.json.with_suffix(".md").write_text(report(result, rows))


if __name__ == "__main__":
    main()
