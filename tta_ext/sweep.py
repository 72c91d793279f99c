"""Settings found by trying them on held-out prompts: a grid, or Optuna, with paired differences.

A *trial* is one choice of settings and its scores, one for each seed and prompt. What scores is the
caller's: exact match of a rule on problems (:mod:`tta_ext.evaluation`), the best reward of a search
(:mod:`tta_ext.decoding.search.compare`). The first trial is always the default's, and every other
one is compared with it prompt by prompt.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tta_ext.decoding.search.compare import literal, paired_scores
from tta_ext.plots import mean, mean_and_error

__all__ = ["Range", "Trial", "call", "grid", "parse_axis", "plot", "suggested", "table", "winner"]

# Values of one axis, and trials of one grid.
MOST = 10_000


@dataclass(frozen=True)
class Range:
    """Numbers that Optuna may choose from, ends included; ``log``: their logarithms evenly.

    Between two ints the whole numbers, else all.
    """

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class Trial:
    """One choice of settings, and its scores in the order of seeds and prompts."""

    settings: dict[str, Any]
    scores: tuple[float, ...]
    seconds: float = 0.0

    @property
    def mean(self) -> float:
        return mean(self.scores)

    @property
    def error(self) -> float:
        """Standard error of the mean; nan for a single score, and for a mean that is infinite."""
        return mean_and_error(self.scores)[1]

    @property
    def label(self) -> str:
        """``sigma=0.5 lam=0.1``; of the default ``default``."""
        return " ".join(f"{name}={value}" for name, value in self.settings.items()) or "default"


def numbers(text: str) -> list[float]:
    """Numbers from ``a,b,c`` or ``start:stop:step``, stop included.

    Raises:
        ValueError: not in this form, or more than 10,000.
    """
    if ":" not in text:
        return [float(part) for part in text.split(",")]
    start, stop, step = (float(part) for part in text.split(":"))
    count = math.floor((stop - start) / step + 1e-9) + 1
    if not 1 <= count <= MOST:
        raise ValueError(f"{count} numbers")
    return [round(start + i * step, 10) for i in range(count)]


def parse_axis(text: str) -> tuple[str, list[Any] | Range]:
    """A setting and its values from ``name=a,b,c``, ``name=start:stop:step``, or, for Optuna,
    ``name=low..high`` and ``name=low..high:log``. Numbers that are all written whole are ints.

    Raises:
        ValueError: not in one of these forms.
    """
    name, equals, values = (part.strip() for part in text.partition("="))
    try:
        if not (name and equals and values):
            raise ValueError
        if ".." in values:
            ends, _, scale = values.partition(":")
            low, high = _as_written(ends.split(".."), map(float, ends.split("..")))
            log = scale == "log"
            if (
                scale not in ("", "log")
                or not -math.inf < low < high < math.inf
                or (log and low <= 0)
            ):
                raise ValueError
            return name, Range(low, high, log)
        if ":" in values:
            return name, _as_written(values.split(":"), numbers(values))
        return name, [literal(value.strip()) for value in values.split(",")]
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(
            f"axis is {text!r}, expected name=a,b,c, name=start:stop:step or name=low..high[:log]"
        ) from None


def _as_written(texts: Sequence[str], values: Iterable[float]) -> list[Any]:
    """Values, as ints if all texts that they come from are whole numbers."""
    whole = all(text.strip().lstrip("+-").isdecimal() for text in texts)
    return [int(value) if whole else value for value in values]


def fractional(
    axes: dict[str, list[Any] | Range], names: Collection[str]
) -> dict[str, list[Any] | Range]:
    """The axes, with ranges over all numbers, however they are written, for some of them."""
    return {
        name: replace(values, low=float(values.low), high=float(values.high))
        if isinstance(values, Range) and name in names
        else values
        for name, values in axes.items()
    }


def grid(axes: dict[str, list[Any] | Range]) -> list[dict[str, Any]]:
    """All combinations, the last axis fastest.

    Raises:
        ValueError: an axis without single values, or more than 10,000 combinations.
    """
    for name, values in axes.items():
        if isinstance(values, Range):
            raise ValueError(f"axis {name} is a range, which a grid has not; list its values")
    if math.prod(len(values) for values in axes.values() if not isinstance(values, Range)) > MOST:
        raise ValueError(f"the grid has more than {MOST} settings")
    lists: Iterable[Any] = axes.values()
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*lists)]


def suggested(
    axes: dict[str, list[Any] | Range],
    score: Callable[[dict[str, Any]], Trial | None],
    trials: int,
    seed: int,
) -> Iterator[Trial]:
    """Trials that Optuna's tree-structured Parzen estimator asks for, one after another.

    Args:
        axes: what is chosen among.
        score: tries settings; None where they make no sense together.
        trials: how many are asked for.
        seed: of the choices.

    Raises:
        ImportError: optuna is missing; the message has the command.
    """
    try:
        import optuna
    except ModuleNotFoundError:
        from tta_ext._version import install

        raise ImportError(f"--search optuna needs optuna: {install('sweep')}") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for _ in range(trials):
        asked = study.ask()
        chosen = {
            name: _number(asked, name, values)
            if isinstance(values, Range)
            else asked.suggest_categorical(name, values)
            for name, values in axes.items()
        }
        found = score(chosen)
        if found is None:
            study.tell(asked, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(asked, found.mean)
            yield found


def _number(asked: Any, name: str, values: Range) -> float:
    """One of a range, as Optuna chooses."""
    whole = isinstance(values.low, int) and isinstance(values.high, int)
    suggest = asked.suggest_int if whole else asked.suggest_float
    found: float = suggest(name, values.low, values.high, log=values.log)
    return found


def winner(trials: Sequence[Trial]) -> Trial:
    """The trial of the highest mean, the earliest among equals; one without a mean is the last."""
    return max(trials, key=lambda trial: -math.inf if math.isnan(trial.mean) else trial.mean)


def table(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """A row a trial: settings, mean, error, seconds, and the paired difference to the first trial
    with its error, 95% interval (nan where they cannot be had: one score, or infinite ones), and
    numbers of scores above, equal and below.
    """
    default, rows = trials[0], []
    for trial in trials:
        pairs = list(zip(trial.scores, default.scores, strict=True))
        one = paired_scores(trial.label, pairs)
        low, high = (one.low, one.high) if one.ties < len(pairs) else (0.0, 0.0)
        rows.append(
            {
                **trial.settings,
                "scores": len(pairs),
                "mean": trial.mean,
                "error": trial.error,
                "difference": one.difference,
                "difference_error": one.error,
                "low": low,
                "high": high,
                "wins": one.wins,
                "ties": one.ties,
                "losses": one.losses,
                "seconds": trial.seconds,
            }
        )
    return rows


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """The table as CSV; settings that a trial leaves alone are empty."""
    names = list(dict.fromkeys(name for row in reversed(rows) for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def call(name: str, given: str, settings: dict[str, Any]) -> str:
    """The line of Python that uses settings, such as ``tta_ext.BestOfN(model, n=4)``."""
    texts = (f"{key}={_as_python(value)}" for key, value in settings.items())
    return f"tta_ext.{name}({', '.join([given, *texts])})"


def _as_python(value: Any) -> str:
    return 'float("inf")' if value == math.inf else repr(value)


def plot(trials: Sequence[Trial], path: Path, title: str) -> None:
    """Draw the means against each setting, with bars of one standard error. Needs matplotlib."""
    from tta_ext.plots import new_figure, save

    names = list(dict.fromkeys(name for trial in trials for name in trial.settings)) or ["default"]
    figure = new_figure()
    figure.set_size_inches(4.5 * len(names), 4)
    best = winner(trials)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        chosen = [trial for trial in trials[1:] if name in trial.settings]
        values = [trial.settings[name] for trial in chosen]
        if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in values):
            values = [str(value) for value in values]
        bars: dict[str, Any] = {"fmt": "o", "capsize": 2, "alpha": 0.7}
        means = [t.mean if math.isfinite(t.mean) else math.nan for t in chosen]
        axes.errorbar(values, means, [t.error for t in chosen], **bars)
        if best in chosen and math.isfinite(best.mean):
            axes.plot([values[chosen.index(best)]], [best.mean], "*", markersize=14, label="winner")
        if math.isfinite(trials[0].mean):
            axes.axhline(trials[0].mean, linestyle="--", color="gray", label="default")
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    save(figure, path)
