"""How long a draft to ask for: a fixed length, or one that follows what was measured.

Drafts change no token (:mod:`tta_ext.decoding.deferral.speculative`), so a length is a matter of
speed alone, and a wrong guess costs time and nothing else.
"""

from __future__ import annotations

import logging
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from math import log2
from statistics import fmean, median
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
        seconds: time of the step, without what was made up for (prompts, missed tokens).
        draft_seconds: the part spent in the drafting model.
    """

    drafts: Sequence[int]
    accepted: Sequence[int]
    rows: int
    seconds: float
    draft_seconds: float


class DraftLength(Protocol):
    """Says how long drafts are."""

    @property
    def note(self) -> str:
        """What it has to say at the end, one sentence or nothing."""

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


def _latest() -> deque[float]:
    return deque(maxlen=8)


@dataclass
class _Costs:
    """Seconds, the latest of each, for about so many rows.

    Attributes:
        plain: of plain steps.
        draft: of a forward of the drafting model.
        rest: of what is not the drafting model's, by draft length; 0 is a plain step.
    """

    plain: deque[float] = field(default_factory=_latest)
    draft: deque[float] = field(default_factory=_latest)
    rest: dict[int, deque[float]] = field(default_factory=partial(defaultdict, _latest))

    def step(self) -> float:
        """A plain step: a mean, as the proxy's turns come now and then, without the slowest."""
        return fmean(sorted(self.plain)[:-1])

    def round(self, length: int) -> float:
        """A round, by the line through the two nearest lengths that were tried."""
        low, *more = sorted(sorted(self.rest, key=lambda tried: abs(tried - length))[:2])
        rest = first = median(self.rest[low])
        for high in more:
            slope = max(0.0, median(self.rest[high]) - first) / (high - low)
            rest = max(0.5 * first, first + slope * (length - low))
        untried = 1.25  # what several columns cost over one, at a guess
        drafts = length * median(self.draft) if self.draft else 0.0
        return drafts + rest * (1.0 if more else untried)


@dataclass
class Memory:
    """What the calls of one object under one rule have measured.

    Attributes:
        costs: by number of rows, in steps of sqrt(2).
        stood, judged: draft tokens that stood, of those judged; they fade, and begin with a guess.
        steps: plain steps so far.
        trial: rounds to take before what was measured is trusted.
        pause: plain steps to take before drafts are tried again.
        next_pause: and after the next failure.
        note: why there is a pause.
    """

    costs: dict[int, _Costs] = field(default_factory=partial(defaultdict, _Costs))
    stood: float = 1.4
    judged: float = 2.0
    steps: int = 0
    trial: int = 2
    pause: int = 0
    next_pause: int = 64
    note: str = ""

    def of(self, rows: int) -> _Costs:
        """The costs for a number of rows."""
        return self.costs[round(2 * log2(rows))]

    def gain(self, length: int, costs: _Costs) -> float:
        """Speed of rounds of a length, as a multiple of the plain loop's.

        A round emits 1 + a + ... + a^K tokens a row, a the share of draft tokens that stand; a
        plain step emits one.
        """
        stood = self.stood / self.judged
        tokens = sum(stood**k for k in range(length + 1))
        return tokens * costs.step() / costs.round(length)


class AutoLength:
    """The length that should write most tokens a second, or none where no length would.

    Plain steps come first and tell what a step costs. Then lengths are tried, each at most twice
    the longest one before. Where the best is no faster than plain steps, a few of these are taken
    to see whether the machine has changed; if not, drafts pause, for ever longer times.

    Args:
        memory: what earlier calls have measured.
    """

    LONGEST = 8
    FIRST, ENOUGH = 8, 3  # plain steps before drafts: of all, and of about so many rows
    MARGIN, HOPELESS = 1.05, 0.8
    PATIENCE = 6
    LONGEST_PAUSE = 2048

    def __init__(self, memory: Memory) -> None:
        self.memory, self._against = memory, 0

    @property
    def note(self) -> str:
        """Why drafts pause, if they do."""
        return self.memory.note

    def plan(self, room: Sequence[int]) -> list[int] | None:
        """Draft lengths, or None for a plain step; as :class:`DraftLength`."""
        memory, costs = self.memory, self.memory.of(len(room))
        most = min(self.LONGEST, max(room), max(2, 2 * max(costs.rest, default=0)))
        if memory.pause or not most or memory.steps < self.FIRST:
            return None
        if len(costs.plain) < self.ENOUGH:
            return None
        gains = {length: memory.gain(length, costs) for length in range(1, most + 1)}
        best = max(gains, key=gains.__getitem__)
        if gains[best] >= (self.HOPELESS if memory.trial else self.MARGIN):
            self._against = 0
            return [min(best, one) for one in room]
        self._against += 1
        if self._against > self.PATIENCE:
            self._give_up(gains[best])
        return None

    def _give_up(self, gain: float) -> None:
        memory = self.memory
        note = (
            f"speculative decoding pauses: {memory.stood / memory.judged:.0%} of the draft tokens "
            f"stood, with which the best draft would run at {gain:.2f}x the speed of the plain loop"
        )
        if memory.next_pause == Memory.next_pause:
            log.warning(note)
        memory.note, memory.pause = note, memory.next_pause
        memory.next_pause = min(2 * memory.next_pause, self.LONGEST_PAUSE)

    def report(self, step: StepReport) -> None:
        """Take down what a step took and, of a round, how many draft tokens stood."""
        memory, costs = self.memory, self.memory.of(step.rows)
        longest = max(step.drafts, default=0)
        costs.rest[longest].append(step.seconds - step.draft_seconds)
        if not longest:
            costs.plain.append(step.seconds)
            if step.draft_seconds and len(costs.draft) < self.ENOUGH:
                costs.draft.append(step.draft_seconds)
            memory.steps += 1
            if memory.pause:
                memory.pause -= 1
                if not memory.pause:
                    self._try_again()
            return
        costs.draft.append(step.draft_seconds / longest)
        for length, accepted in zip(step.drafts, step.accepted, strict=True):
            memory.stood = 0.99 * memory.stood + accepted
            memory.judged = 0.99 * memory.judged + min(accepted + 1, length)
        if memory.trial:
            memory.trial -= 1
        else:
            memory.note, memory.next_pause = "", max(Memory.next_pause, memory.next_pause - 1)

    def _try_again(self) -> None:
        """Let new rounds outweigh what was measured long ago."""
        memory = self.memory
        memory.trial = Memory.trial
        memory.stood, memory.judged = 8 * memory.stood / memory.judged, 8.0
        for costs in memory.costs.values():
            for length in [length for length in costs.rest if length]:
                del costs.rest[length]


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
