"""What a comparison says: paired differences to a baseline, a summary of each contestant."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tta_ext.decoding.rewards import Reward, call_reward
from tta_ext.intervals import difference_interval
from tta_ext.plots import by_label, mean, mean_and_error

__all__ = ["Paired", "measure", "paired", "paired_scores", "summary"]


def measure(records: Sequence[dict[str, Any]], metrics: Mapping[str, Reward]) -> None:
    """Add ``record["metrics"]``, what other rewards say of each best answer.

    Args:
        records: of :func:`~.compare.compare`; their methods had a tokenizer.
        metrics: rewards, by the names that tables call them.

    Raises:
        ValueError: a record has no text; or as of :func:`~tta_ext.decoding.rewards.call_reward`.
    """
    if metrics and any(record["text"] is None for record in records):
        raise ValueError("metrics read texts, and these answers have none; pass a tokenizer")
    asked = [record["prompt"] for record in records], [record["text"] for record in records]
    found = {name: call_reward(metric, *asked) for name, metric in metrics.items()}
    for place, record in enumerate(records):
        record["metrics"] = {name: values[place] for name, values in found.items()}


@dataclass(frozen=True)
class Paired:
    """A contestant against the baseline, over the prompts that both have answered.

    Attributes:
        label: the contestant.
        prompts: number of prompts.
        difference: mean of reward minus the baseline's reward.
        error: standard error of that mean; nan for fewer than two prompts.
        low, high: 95% interval of that mean by the paired bootstrap; nan likewise.
        wins, ties, losses: prompts with a higher, equal or lower reward.
    """

    label: str
    prompts: int
    difference: float
    error: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int

    @property
    def win_rate(self) -> float:
        """Share of wins, ties counted half."""
        return (self.wins + 0.5 * self.ties) / self.prompts if self.prompts else math.nan


def paired(records: Iterable[dict[str, Any]], baseline: str) -> list[Paired]:
    """Every other contestant against the baseline.

    Raises:
        ValueError: the baseline is not among the records.
    """
    table = by_label(records)
    if baseline not in table:
        raise ValueError(f"baseline is {baseline!r}, expected one of {', '.join(table)}")
    base = table.pop(baseline)
    found = []
    for label, rows in table.items():
        pairs = [(row["reward"], base[i]["reward"]) for i, row in rows.items() if i in base]
        found.append(paired_scores(label, pairs))
    return found


def paired_scores(label: str, pairs: Sequence[tuple[float, float]]) -> Paired:
    """Scores against others of the same prompts; infinite ones are allowed."""
    deltas = [a - b if a != b else 0.0 for a, b in pairs]
    mean, error = mean_and_error(deltas)
    low = high = math.nan
    if math.isfinite(error):
        low, high = difference_interval(deltas, [0.0] * len(deltas))
    wins, losses = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    ties = len(pairs) - wins - losses
    return Paired(label, len(pairs), mean, error, low, high, wins, ties, losses)


def summary(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each contestant: reward, cost, and how its mean reward moved.

    ``first`` and ``last`` are the mean rewards of the first and the last iteration, ``rise`` their
    paired difference with ``rise_error``; equal where there is one iteration only. ``kl`` and
    ``kl_fisher`` are of the last iteration, with ``kl_error`` and ``kl_fisher_error``; ``metrics``
    has mean and standard error of each metric.
    """
    rows = []
    for label, answers in by_label(records).items():
        items = [answers[i] for i in sorted(answers)]
        reward, error = mean_and_error([item["reward"] for item in items])
        first, last = ([item["curve"][at] for item in items] for at in (0, -1))
        rises = [b["mean"] - a["mean"] for a, b in zip(first, last, strict=True)]
        rise, rise_error = mean_and_error(rises)
        timing = [item["timing"] for item in items]
        rows.append(
            {
                "label": label,
                "prompts": len(items),
                "reward": reward,
                "error": error,
                "first": _mean_of(first, "mean"),
                "last": _mean_of(last, "mean"),
                "rise": rise,
                "rise_error": rise_error,
                "asked": _mean_of(last, "samples"),
                "training": max(item.get("training", 0) for item in items),
                "tokens": _mean_of(timing, "tokens"),
                "seconds": _mean_of(timing, "total"),
                "model": _mean_of(timing, "model"),
                "reward_seconds": _mean_of(timing, "reward"),
                "other": _mean_of(timing, "other"),
                **_with_error(last, "kl"),
                **_with_error(last, "kl_fisher"),
                "norm": _mean_of(last, "norm"),
                "ess": _mean_of(last, "ess"),
                "metrics": {
                    name: mean_and_error([item["metrics"][name] for item in items])
                    for name in items[0].get("metrics", {})
                },
            }
        )
    return rows


def _mean_of(rows: Iterable[dict[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return mean(values) if values else None


def _with_error(rows: Iterable[dict[str, Any]], name: str) -> dict[str, float | None]:
    values = [row[name] for row in rows if row.get(name) is not None]
    middle, error = mean_and_error(values) if values else (None, None)
    return {name: middle, f"{name}_error": error}
