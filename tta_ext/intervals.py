"""How sure a share, and a difference between paired outcomes, is. Intervals need scipy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from tta_ext._version import install

__all__ = ["difference", "difference_interval", "wilson_interval"]


def difference(one: Any, other: Any) -> tuple[float, float]:
    """Paired difference, ``one - other``, and its standard error.

    Args:
        one, other: outcomes, problem by problem; or rows of an evaluation, for exact match.

    Raises:
        ValueError: the rows answered different numbers of problems.
    """
    deltas = _deltas(one, other)
    spread = stdev(deltas) if len(deltas) > 1 else 0.0
    return fmean(deltas), spread / math.sqrt(len(deltas))


def difference_interval(one: Any, other: Any) -> tuple[float, float]:
    """95% interval of :func:`difference` by the paired bootstrap: problems are drawn anew.

    Percentiles of 9,999 resamples of a fixed seed; nan for fewer than two problems. Source: Efron
    and Tibshirani, "An Introduction to the Bootstrap", 1993.

    Args:
        one, other: rows of an evaluation, or their outcomes, problem by problem.

    Raises:
        ValueError: the rows answered different numbers of problems.
        ImportError: scipy is missing; the message has the command.
    """
    import numpy as np

    deltas = _deltas(one, other)
    if len(deltas) < 2:
        return math.nan, math.nan
    found = _stats().bootstrap(
        (deltas,), np.mean, n_resamples=9999, batch=500, method="percentile",
        rng=np.random.default_rng(0),
    )  # fmt: skip
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def wilson_interval(hits: int, n: int) -> tuple[float, float]:
    """95% interval of a share.

    Args:
        hits, n: how many of how many; ``0 <= hits <= n``, ``n >= 1``.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927.

    Raises:
        ImportError: scipy is missing; the message has the command.
    """
    found = _stats().binomtest(hits, n).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def _deltas(one: Any, other: Any) -> list[float]:
    left: Sequence[float] = getattr(one, "outcomes", one)
    right: Sequence[float] = getattr(other, "outcomes", other)
    if len(left) != len(right) or len(left) == 0:
        raise ValueError("rows are not paired: they answered different problems")
    return [float(a) - float(b) for a, b in zip(left, right, strict=True)]


def _stats() -> Any:
    try:
        from scipy import stats
    except ModuleNotFoundError:
        raise ImportError(f"intervals need scipy: {install('cli')}") from None
    return stats
