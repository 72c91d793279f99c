"""Evaluate deferral rules on the demo's held-out problems.

``python -m tta_ext.demo.evaluate --n 500 --sweep --json OUT`` prints the whole table; ``tta demo``
shows a short one. Every row decodes the same problems through :class:`tta_ext.KnapsackDeferral`,
greedily (argmax of the mixture) or sampled at temperature 1.

Random numbers are keyed by seed, problem and position, so a row's answers do not depend on the
other rows, on their order, or on whether a run was cut off and resumed. With a *journal*, every
finished batch is one line of a JSONL file, on the disk before the next batch starts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from tta_ext.decoding.deferral.kad import KnapsackDeferral
from tta_ext.decoding.runtime.loading import load_model, load_tokenizer
from tta_ext.demo.journal import Journal
from tta_ext.demo.table import (
    BASE_ALONE,
    GREEDY,
    IMPLICIT_REWARD,
    MODES,
    PROXY_ALONE,
    SAMPLED,
    Row,
    Setting,
    best_by_rule,
    difference,
    report,
    summary,
    table,
)
from tta_ext.demo.task import (
    Problem,
    evaluation_problems,
    score_lenient,
    score_strict,
    strict_answer,
)

__all__ = [
    "ASSETS",
    "BASE_ALONE",
    "GREEDY",
    "IMPLICIT_REWARD",
    "MAX_NEW_TOKENS",
    "MODES",
    "PROXY_ALONE",
    "SAMPLED",
    "SHORT",
    "SWEEP",
    "Journal",
    "Pair",
    "Row",
    "Setting",
    "best_by_rule",
    "difference",
    "evaluate",
    "evaluate_iter",
    "load_pair",
    "report",
    "summary",
    "table",
]

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "demo"
MAX_NEW_TOKENS = 64
ALONE = (Setting(BASE_ALONE), Setting(PROXY_ALONE))
SHORT = (
    *ALONE,
    Setting("knapsack", 0.5),
    Setting("knapsack", 0.9),
    Setting("threshold", 0.4),
    Setting("confidence_bet", 0.2),
    Setting("nudging", 0.4),
    Setting(IMPLICIT_REWARD, 1.0),
)


def _settings(rule: str, *params: float, critical: str = "exclude") -> tuple[Setting, ...]:
    return tuple(Setting(rule, param, critical) for param in params)


SWEEP = (
    *ALONE,
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
    *_settings(IMPLICIT_REWARD, 0.5, 1.0, 1.5),
)


@dataclass
class Pair:
    """The demo's models, loaded."""

    base: Any
    proxy: Any
    proxy_init: Any
    tokenizer: Any
    fingerprint: str

    def decoder(self, setting: Setting) -> tuple[KnapsackDeferral, dict[str, Any]]:
        """What decodes a setting, and the options to hand to its ``generate``."""
        if setting.rule == IMPLICIT_REWARD:
            kad = KnapsackDeferral(
                self.base,
                self.proxy,
                self.tokenizer,
                rule=IMPLICIT_REWARD,
                param=setting.param,
                anti=self.proxy_init,
            )
            return kad, {}
        # Threshold 0 rejects nothing: the first model alone; the second one is never run.
        first = self.proxy if setting.rule == PROXY_ALONE else self.base
        kad = KnapsackDeferral(first, self.proxy, self.tokenizer, rule="threshold", param=0.0)
        if setting in ALONE:
            return kad, {}
        options = {"rule": setting.rule, "param": setting.param, "critical": setting.critical}
        return kad, options


def load_pair(directory: str | Path | None = None) -> Pair:
    """Load the pair in float32 on the CPU; None: the one that ships with the package.

    Raises:
        ValueError: a model is missing or not in safetensors.
    """
    root = ASSETS if directory is None else Path(directory)
    digest = hashlib.sha256()
    for name in ("base", "proxy", "proxy_init"):
        file = root / name / "model.safetensors"
        if not file.is_file():
            raise ValueError(
                f"there is no {file}; make the pair with: python -m tta_ext.demo.train"
            )
        digest.update(file.read_bytes())
    base, proxy, init = (
        load_model(str(root / name), dtype=torch.float32)
        for name in ("base", "proxy", "proxy_init")
    )
    return Pair(base, proxy, init, load_tokenizer(str(root / "base")), digest.hexdigest()[:16])


def _run_batch(
    pair: Pair, setting: Setting, mode: str, seed: int, start: int, problems: Sequence[Problem]
) -> dict[str, Any]:
    """Decode one batch; a JSON value with all that a row needs."""
    kad, options = pair.decoder(setting)
    generation = kad.generate(
        [problem.prompt for problem in problems],
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=mode == SAMPLED,
        seed=seed,
        sequence=list(range(start, start + len(problems))),
        **options,
    )
    assert generation.texts is not None
    stats = generation.stats
    return {
        "texts": generation.texts,
        "tokens": stats.tokens,
        "deferred_tokens": stats.deferred_tokens,
        "proxy_tokens_saved": stats.proxy_rows_saved,
        "seconds": stats.seconds,
    }


def _row(
    setting: Setting, mode: str, problems: Sequence[Problem], batches: list[dict[str, Any]]
) -> Row:
    texts = [text for batch in batches for text in batch["texts"]]
    total = {
        name: sum(batch[name] for batch in batches)
        for name in ("tokens", "deferred_tokens", "proxy_tokens_saved", "seconds")
    }
    n, tokens = len(problems), max(1, total["tokens"])
    outcomes = tuple(score_strict(p, t) for p, t in zip(problems, texts, strict=True))
    exact = sum(outcomes) / n
    lenient_outcomes = tuple(score_lenient(p, t) for p, t in zip(problems, texts, strict=True))
    lenient = sum(lenient_outcomes) / n
    deferred: float | None = total["deferred_tokens"] / tokens
    calls = (tokens - total["proxy_tokens_saved"]) / tokens
    if setting.rule == PROXY_ALONE:
        deferred = calls = 1.0
    elif setting.rule == IMPLICIT_REWARD:
        deferred = None
    return Row(
        rule=setting.rule,
        param=setting.param,
        critical=setting.critical,
        mode=mode,
        n=n,
        exact=exact,
        exact_stderr=math.sqrt(exact * (1 - exact) / n),
        lenient=lenient,
        lenient_stderr=math.sqrt(lenient * (1 - lenient) / n),
        formatted=sum(strict_answer(text) is not None for text in texts) / n,
        deferred_rate=deferred,
        proxy_call_rate=calls,
        tokens=total["tokens"] / n,
        tokens_per_second=total["tokens"] / total["seconds"] if total["seconds"] else 0.0,
        outcomes=outcomes,
        lenient_outcomes=lenient_outcomes,
    )


def evaluate_iter(
    rules: Iterable[Setting | str] = SHORT,
    n: int = 100,
    *,
    modes: Sequence[str] = MODES,
    seed: int = 0,
    batch_size: int = 100,
    pair: Pair | None = None,
    journal: str | Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Row]:
    """Rows as they are finished; see :func:`evaluate`."""
    settings = [rule if isinstance(rule, Setting) else Setting.parse(rule) for rule in rules]
    if n < 1:
        raise ValueError(f"n is {n}, expected at least 1")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}, expected one of {', '.join(MODES)}")
    pair = load_pair() if pair is None else pair
    book = None if journal is None else Journal(journal)
    problems = evaluation_problems(n)
    for setting in settings:
        for mode in modes:
            batches = []
            for start in range(0, n, batch_size):
                chosen = problems[start : start + batch_size]
                key = asdict(setting) | {
                    "mode": mode,
                    "seed": seed,
                    "start": start,
                    "stop": start + len(chosen),
                    "pair": pair.fingerprint,
                }
                batch = None if book is None else book.get(key)
                if batch is None:
                    batch = _run_batch(pair, setting, mode, seed, start, chosen)
                    if book is not None:
                        book.put(key, batch)
                batches.append(batch)
                if progress is not None:
                    progress(len(chosen))
            yield _row(setting, mode, problems, batches)


def evaluate(rules: Iterable[Setting | str] = SHORT, n: int = 100, **options: Any) -> list[Row]:
    """Evaluate settings on the first ``n`` held-out problems.

    Args:
        rules: settings, or texts that :meth:`Setting.parse` reads (``"base"``, ``"threshold:0.4"``,
            ``"knapsack:0.9:split"``, ``"implicit_reward:1"``).
        n: number of problems.
        modes: any of ``"greedy"`` and ``"sampled"``.
        seed: seed of the sampled rows; the problems do not depend on it.
        batch_size: problems decoded together.
        pair: from :func:`load_pair`; None loads the shipped one.
        journal: JSONL file that keeps finished batches; a run with the same file resumes.
        progress: called after each batch with its number of problems.

    Returns:
        One :class:`Row` for each setting and mode, in that order. The same arguments give the same
        rows, times apart.

    Raises:
        ValueError: an unknown setting or mode, or a number out of range.
    """
    return list(evaluate_iter(rules, n, **options))


def main() -> None:
    """Command line of the evaluation."""
    parser = argparse.ArgumentParser(description="Evaluate deferral rules on the demo pair.")
    parser.add_argument("--n", type=int, default=500, help="number of held-out problems")
    parser.add_argument("--rules", nargs="*", help="e.g. base threshold:0.4 knapsack:0.9:split")
    parser.add_argument("--sweep", action="store_true", help="all rules, many parameters")
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=MODES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--pair", type=Path, help="directory of another pair")
    parser.add_argument("--journal", type=Path, help="JSONL file; a cut-off run resumes from it")
    parser.add_argument(
        "--json", type=Path, help="file for rows and summary; .md is written beside"
    )
    parser.add_argument("--threads", type=int, help="torch threads")
    parser.add_argument("--note", default="", help="a remark to keep with the results")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    pair = load_pair(arguments.pair)
    rows = []
    for row in evaluate_iter(
        arguments.rules or (SWEEP if arguments.sweep else SHORT),
        arguments.n,
        modes=arguments.modes,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        pair=pair,
        journal=arguments.journal,
    ):
        rows.append(row)
        print(table([row]).splitlines()[-1], flush=True)
    result = {
        "command": f"python -m tta_ext.demo.evaluate --n {arguments.n}"
        + (" --sweep" if arguments.sweep else ""),
        "n": arguments.n,
        "seed": arguments.seed,
        "batch_size": arguments.batch_size,
        "pair": pair.fingerprint,
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
