"""Intervals of shares and of paired differences."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tta_ext.intervals import difference, difference_interval, wilson_interval


@pytest.mark.parametrize(("hits", "n"), [(0, 4), (4, 4), (7, 20), (500, 1319)])
def test_wilson_solves_its_equation(hits: int, n: int) -> None:
    """Its ends are where the share is 1.96 standard errors away, by the errors at the ends."""
    for bound in wilson_interval(hits, n):
        if 0.0 < bound < 1.0:
            distance = abs(hits / n - bound) / math.sqrt(bound * (1 - bound) / n)
            assert distance == pytest.approx(1.959964, rel=1e-5)
    low, high = wilson_interval(hits, n)
    assert 0.0 <= low <= hits / n <= high <= 1.0
    assert low < high


def test_paired_bootstrap_against_the_normal() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.random((2, 400)) < [[0.6], [0.5]]
    mean, error = difference(left, right)
    low, high = difference_interval(left, right)
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.1 * error)
    # The same problems drawn for both: equal outcomes have no interval but 0.
    assert difference_interval(left, left) == (0.0, 0.0)
    assert difference_interval(left, right) == (low, high)


def test_little_and_wrong_data() -> None:
    assert all(map(math.isnan, difference_interval([1.0], [0.0])))
    with pytest.raises(ValueError, match="not paired"):
        difference_interval([1.0, 2.0], [0.0])
    with pytest.raises(ValueError, match="not paired"):
        difference([], [])
