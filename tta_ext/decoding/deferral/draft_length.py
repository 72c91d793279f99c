"""How long a draft to ask for: a fixed length, or one that follows what was measured.

Drafts change no token (:mod:`tta_ext.decoding.deferral.speculative`), so a length is a matter of
speed alone, and a wrong guess costs time and nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

__all__ = ["AutoLength", "DraftLength", "FixedLength", "Memory", "StepReport", "draft_length"]

LONGEST_FIXED = 64

log = logging.getLogger("tta_ext")


@dataclass(frozen=True)
class StepReport:
    """What a step did.

    Attributes:
        drafts: length of each row's draft; empty for a plain step.
        accepted: how many of its tokens stood.
        rows: active rows before the step.
        tokens: tokens emitted.
        seconds: time of the step.
        draft_seconds: the part spent in the drafting model.
    """

    drafts: Sequence[int]
    accepted: Sequence[int]
    rows: int
    tokens: int
    seconds: float
    draft_seconds: float


class DraftLength(Protocol):
    """Says how long drafts are.

    Attributes:
        note: what it has to say at the end, one sentence or nothing.
    """

    note: str

    def plan(self, room: Sequence[int]) -> list[int] | None:
        """Draft lengths of the active rows, each at most its ``room``; None for a plain step."""

    def report(self, step: StepReport) -> None:
        """A step is over."""


class FixedLength:
    """The same draft length for every row, as far as the answer's limit allows."""

    note = ""

    def __init__(self, length: int) -> None:
        self.length = length

    def plan(self, room: Sequence[int]) -> list[int] | None:
        return [min(self.length, most) for most in room]

    def report(self, step: StepReport) -> None:
        pass


@dataclass
class _Average:
    """A running average that forgets."""

    value: float = 0.0
    weight: float = 0.0

    def add(self, value: float, keep: float = 0.9) -> None:
        self.weight = keep * self.weight + 1.0
        self.value += (value - self.value) / self.weight


@dataclass
class Memory:
    """What the calls of one object under one rule have measured.

    Attributes:
        plain: seconds of a plain step, by number of rows.
        draft: seconds of one forward of the drafting model.
        judge: seconds of the rest of a round, by number of rows.
        stood: share of the judged draft tokens that stood.
        lost: calls in a row in which drafting was given up.
        skip: calls that will not try it.
    """

    plain: dict[int, _Average] = field(default_factory=dict)
    judge: dict[int, _Average] = field(default_factory=dict)
    draft: _Average = field(default_factory=_Average)
    stood: _Average = field(default_factory=lambda: _Average(0.7, 2.0))
    lost: int = 0
    skip: int = 0


class AutoLength:
    """The length that should write most tokens a second, or none where no length would.

    A round of length K emits 1 + a + ... + a^K tokens a row, a the share of draft tokens that
    stand, in the time of K forwards of the drafting model and one judgement; a plain step emits
    one. Plain steps come first and tell what a step costs; where even drafts that always stand
    could not pay, nothing is drafted.

    Args:
        memory: what earlier calls have measured.
    """

    LONGEST = 8
    PLAIN_STEPS = 3
    MARGIN = 1.05
    PATIENCE = 2

    def __init__(self, memory: Memory) -> None:
        self.memory, self.note = memory, ""
        self._against = 0
        self._on = memory.skip == 0
        if not self._on:
            memory.skip -= 1
            self.note = "speculative decoding is off: earlier calls lost time by it"

    def plan(self, room: Sequence[int]) -> list[int] | None:
        """Draft lengths, or None for a plain step; as :class:`DraftLength`."""
        memory, rows = self.memory, len(room)
        plain = _near(memory.plain, rows)
        if not self._on or not any(room) or plain is None or plain.weight < 2.0:
            return None
        if not memory.draft.weight:
            return [min(1, most) for most in room]  # what does a draft cost?
        best, gain = 0, 0.0
        for length in range(1, self.LONGEST + 1):
            if (now := self.gain(length, rows, plain.value)) > gain:
                best, gain = length, now
        if gain >= self.MARGIN:
            self._against = 0
            return [min(best, most) for most in room]
        self._against += 1
        if self._against >= self.PATIENCE:
            self._stop(gain)
        return None

    def gain(self, length: int, rows: int, plain: float) -> float:
        """Expected speed of rounds of a length, as a multiple of the plain loop's."""
        memory = self.memory
        stood = min(memory.stood.value, 0.98)
        tokens = (1.0 - stood ** (length + 1)) / (1.0 - stood)
        judge = _near(memory.judge, rows)
        return tokens * plain / (length * memory.draft.value + (judge.value if judge else plain))

    def _stop(self, gain: float) -> None:
        memory, self._on = self.memory, False
        self.note = (
            f"speculative decoding is off: {memory.stood.value:.0%} of the draft tokens stood, "
            f"with which the best draft would run at {gain:.2f}x the speed of the plain loop"
        )
        if not memory.lost:
            log.warning(self.note)
        # Ever rarer tries: the machine or the prompts may have changed.
        memory.lost += 1
        memory.skip = min(2**memory.lost, 64)

    def report(self, step: StepReport) -> None:
        memory, rows = self.memory, step.rows
        if not step.drafts:
            memory.plain.setdefault(rows, _Average()).add(step.seconds)
            return
        longest = max(step.drafts)
        memory.draft.add(step.draft_seconds / longest)
        memory.judge.setdefault(rows, _Average()).add(step.seconds - step.draft_seconds)
        for length, accepted in zip(step.drafts, step.accepted, strict=True):
            for k in range(min(accepted + 1, length)):
                memory.stood.add(float(k < accepted), 0.99)
        if step.tokens > step.rows:
            memory.lost = 0


def _near(known: dict[int, _Average], rows: int) -> _Average | None:
    """What is known of the nearest number of rows."""
    if not known:
        return None
    return known[min(known, key=lambda other: (abs(other - rows), other))]


def draft_length(value: int | str | None) -> int | str | None:
    """The argument ``speculative`` itself if it makes sense.

    Raises:
        ValueError: it is not None, ``"auto"`` or a length from 1 to 64.
    """
    if value is None or value == "auto":
        return value
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LONGEST_FIXED:
        raise ValueError(
            f"speculative is {value!r}, expected None, 'auto' or a draft length "
            f"from 1 to {LONGEST_FIXED}"
        )
    return value
