"""Ranges of settings: one sentence for a value outside, whatever the setting."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["check_choice", "check_range"]

_RANGES: dict[str, Callable[[Any], bool]] = {
    "at least 1": lambda x: operator.index(x) >= 1,
    "more than 0": lambda x: x > 0,
    "a finite number": math.isfinite,
    "a finite number >= 0": lambda x: 0.0 <= x < math.inf,
    "a finite number > 0": lambda x: 0.0 < x < math.inf,
    "0 to 1": lambda x: 0.0 <= x <= 1.0,
    "0 <= {} <= 1": lambda x: 0.0 <= x <= 1.0,
    "0 < {} <= 1": lambda x: 0.0 < x <= 1.0,
}


def check_range(settings: Any, expected: str, *names: str) -> None:
    """``ValueError`` for the first field of a dataclass that is out of range.

    None is in range where it is the field's default.
    """
    for name in names:
        value = getattr(settings, name)
        if value is None and getattr(type(settings), name) is None:
            continue
        try:
            fits = not isinstance(value, bool) and _RANGES[expected](value)
        except TypeError:
            fits = False
        if not fits:
            raise ValueError(f"{name} is {value!r}, expected {expected.format(name)}")


def check_choice(settings: Any, name: str, known: Sequence[str]) -> None:
    """``ValueError`` unless a field is one of the strings ``known``."""
    value = getattr(settings, name)
    if value not in known:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
