"""Answers in flight: the one place that adds a token, says why an answer ended, and lets it go.

Every loop holds a :class:`Rows`. Its *active* answers are the rows of the models' batch, in order;
an answer keeps its number when others leave.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from tta_ext.decoding.runtime.prompts import whole_number
from tta_ext.decoding.runtime.stopping import StopStrings

__all__ = ["ERRORS", "Limits", "Rows", "picked_rows"]

# What becomes of a row whose logits make no law.
ERRORS = ("raise", "finish")


@dataclass(frozen=True)
class Limits:
    """When an answer ends.

    Attributes:
        max_new_tokens: tokens after which it ends with ``"length"``; at least 1.
        ends: ids that end it with ``"eos"``.
        stop: stop strings that end it with ``"stop"``.
    """

    max_new_tokens: int
    ends: frozenset[int] = frozenset()
    stop: StopStrings | None = None

    def __post_init__(self) -> None:
        whole_number("max_new_tokens", self.max_new_tokens)

    def why(self, tokens: Sequence[int]) -> str:
        """Why an answer ends with its newest token; "" if it goes on."""
        if tokens[-1] in self.ends:
            return "eos"
        if self.stop is not None and self.stop(tokens):
            return "stop"
        return "length" if len(tokens) >= self.max_new_tokens else ""


class Rows:
    """Answers, which of them go on, and why the others ended.

    Operators mark a row whose logits hold NaN or +inf, or nothing finite, with the token -1. It is
    never added to an answer and never fed to a model: the row ends with an error that names prompt,
    position and model.

    Args:
        prompts: number of tokens in each answer's prompt.
        limits: when an answer ends.
        title: what messages call answer i, such as ``"prompt 3"``.
        errors: ``"raise"`` lets the error out; ``"finish"`` ends that answer alone, with
            ``finish`` ``"error"``.

    Attributes:
        active: numbers of the answers that go on, in the order of the models' rows.
        tokens: ids of each answer so far.
        finish: why each ended: ``"eos"``, ``"stop"``, ``"length"``, ``"error"``; "" while it goes
            on.
        errors: for answers that ended with ``"error"``, the sentence.
    """

    def __init__(
        self,
        prompts: Sequence[int],
        limits: Limits,
        title: Callable[[int], str],
        errors: str = "raise",
    ) -> None:
        if errors not in ERRORS:
            raise ValueError(f"errors is {errors!r}, expected one of {', '.join(ERRORS)}")
        self.limits, self._prompts, self._title, self._policy = limits, prompts, title, errors
        self.active = list(range(len(prompts)))
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.finish = [""] * len(prompts)
        self.errors: dict[int, str] = {}

    def emit(
        self,
        rows: Sequence[int],
        tokens: Sequence[int],
        logits: Callable[[int], Mapping[str, Tensor]],
    ) -> list[int]:
        """Add one token to some active answers.

        Args:
            rows: places in :attr:`active`.
            tokens: for each, what was drawn; negative if nothing could be.
            logits: asked about a row whose draw failed: the logits ``[V]`` of each model that it
                was drawn from, by the model's name.

        Returns:
            The rows that ended with it.

        Raises:
            ValueError: a draw failed, unless errors end their row alone.
        """
        ended = []
        for row, token in zip(rows, tokens, strict=True):
            number = self.active[row]
            if token < 0:
                self._fail(number, logits(row))
            else:
                self.tokens[number].append(token)
                self.finish[number] = self.limits.why(self.tokens[number])
            if self.finish[number]:
                ended.append(row)
        return ended

    def _fail(self, number: int, logits: Mapping[str, Tensor]) -> None:
        culprits = [name for name, row in logits.items() if _makes_no_law(row)]
        position = self._prompts[number] + len(self.tokens[number])
        where = f"{self._title(number)}, position {position}"
        if culprits:
            message = (
                f"the logits of {' and '.join(culprits)} for {where}, have NaN or +inf, or no "
                "finite value"
            )
        else:
            message = f"no token can be drawn from {' and '.join(logits)} for {where}"
        if self._policy == "raise":
            raise ValueError(message)
        self.errors[number], self.finish[number] = message, "error"

    def drop(self, ended: Sequence[int]) -> list[int]:
        """Take rows out of :attr:`active`; the places, ascending, of those that stay."""
        gone = set(ended)
        kept = [row for row in range(len(self.active)) if row not in gone]
        self.active = [self.active[row] for row in kept]
        return kept

    def branch(self, parents: Sequence[int]) -> None:
        """Make answer i a copy of what answer ``parents[i]`` is now; all of them go on."""
        self._prompts = [self._prompts[parent] for parent in parents]
        self.tokens = [self.tokens[parent].copy() for parent in parents]
        self.finish = [""] * len(parents)
        self.active = list(range(len(parents)))


def _makes_no_law(logits: Tensor) -> bool:
    highest = logits.float().amax()  # NaN if there is one
    return not bool(torch.isfinite(highest))


def picked_rows(result: Any, index: int | slice) -> tuple[list[int], dict[str, Any]]:
    """Some rows of a finished result: which, and its fields that are lists, cut to them.

    Args:
        result: a dataclass with ``len()``, whose lists have an entry for each row.
        index: as lists take it.
    """
    rows = range(len(result))[index]  # IndexError ends an iteration
    chosen = [rows] if isinstance(rows, int) else list(rows)
    lists = {one.name: getattr(result, one.name) for one in fields(result)}
    return chosen, {
        name: [value[row] for row in chosen]
        for name, value in lists.items()
        if isinstance(value, list)
    }
