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
from typing import TypeAlias

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


class FixedLength:
    """The same draft length for every row, as far as the answer's limit allows."""

    note = ""

    def __init__(self, length: int) -> None:
        self.length = length

    def plan(self, room: Sequence[int]) -> list[int] | None:
        """Draft lengths of the active rows, each at most its ``room``; None for a plain step."""
        return [min(self.length, most) for most in room]

    def report(self, step: StepReport) -> None:
        """A step is over."""


_Window: TypeAlias = "deque[float]"
_latest = partial(deque[float], maxlen=8)


def _low(window: _Window) -> float:
    """The lower quartile: what disturbs a step makes it slower."""
    return sorted(window)[len(window) // 4] if window else 0.0


@dataclass
class _Costs:
    """Seconds, the latest of each, for about so many rows.

    Attributes:
        alone, asked: of plain steps without the drafting model and with it.
        turns, steps: how many had it, of how many; they fade.
        draft: of a forward of the drafting model.
        rest: of the rest of a round, by draft length.
    """

    alone: _Window = field(default_factory=_latest)
    asked: _Window = field(default_factory=_latest)
    turns: float = 0.0
    steps: float = 0.0
    draft: _Window = field(default_factory=_latest)
    rest: dict[int, _Window] = field(default_factory=partial(defaultdict, _latest))

    def gains(self, stood: float, most: int) -> list[float]:
        """Speed of rounds of lengths 1 to ``most`` as a multiple of the plain loop's.

        A round of length K emits 1 + a + ... + a^K tokens a row, a the share of draft tokens that
        stand; a plain step emits one.
        """
        draft, asked = _low(self.draft), _low(self.asked)
        alone = _low(self.alone) or max(asked - draft, 0.0)
        step = alone + self.turns / self.steps * max(asked - alone, 0.0)
        more = {length: max(_low(known) - alone, 0.0) for length, known in self.rest.items()}
        found, tokens = [], 1.0
        for length in range(1, most + 1):
            tokens += stood**length
            extra = 0.25 * alone  # what several columns cost over one, at a guess
            if more:
                near = min(more, key=lambda tried: abs(tried - length))
                extra = more[near] * (length + 1) / (near + 1)
            found.append(tokens * step / (length * draft + alone + extra))
        return found


@dataclass
class Memory:
    """What the calls of one object under one rule have measured.

    Attributes:
        costs: by number of rows, in steps of sqrt(2).
        stood, judged: draft tokens that stood, of those judged; they fade, and begin with a guess.
        steps: plain steps so far.
        trial: rounds to take unless they are hopeless.
        pause: plain steps to take before drafts are tried again; ``next_pause`` after a failure.
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


class AutoLength:
    """The length that should write most tokens a second, or none where no length would.

    Plain steps come first and tell what a step costs. Then lengths are tried, each at most twice
    the longest one before. Where the best is no faster than plain steps, a few of these are taken
    to see whether the machine has changed; if not, drafts pause, for ever longer times.

    Args:
        memory: what earlier calls have measured.
    """

    LONGEST = 8
    FIRST, ENOUGH = 12, 3  # plain steps before drafts: of all, and of about so many rows
    MARGIN, HOPELESS = 1.08, 0.8
    PATIENCE = 6
    LONGEST_PAUSE = 2048

    def __init__(self, memory: Memory) -> None:
        self.memory, self._against = memory, 0

    @property
    def note(self) -> str:
        """Why drafts pause, if they do."""
        return self.memory.note

    def plan(self, room: Sequence[int]) -> list[int] | None:
        """Draft lengths, or None for a plain step; as :meth:`FixedLength.plan`."""
        memory, costs = self.memory, self.memory.of(len(room))
        most = min(self.LONGEST, max(room), max(2, 2 * max(costs.rest, default=0)))
        known = len(costs.alone) + len(costs.asked) >= self.ENOUGH
        if memory.pause or not most or memory.steps < self.FIRST or not known:
            return None
        gains = costs.gains(memory.stood / memory.judged, most)
        gain = max(gains)
        if gain >= (self.HOPELESS if memory.trial and costs.rest else self.MARGIN) or (
            memory.trial == Memory.trial and memory.note  # a pause is over
        ):
            self._against = 0
            return [min(gains.index(gain) + 1, one) for one in room]
        self._against += 1
        if self._against > self.PATIENCE:
            self._give_up(gain)
        return None

    def _give_up(self, gain: float) -> None:
        memory = self.memory
        note = (
            f"speculative decoding pauses: {memory.stood / memory.judged:.0%} of the draft tokens "
            f"stood, with which the best draft would run at {gain:.2f}x the speed of the plain loop"
        )
        if not memory.note:
            log.warning(note)
        memory.note, memory.pause, self._against = note, memory.next_pause, 0
        memory.next_pause = min(2 * memory.next_pause, self.LONGEST_PAUSE)

    def report(self, step: StepReport) -> None:
        """Take down what a step took and, of a round, how many draft tokens stood."""
        memory, costs = self.memory, self.memory.of(step.rows)
        longest = max(step.drafts, default=0)
        if not longest:
            asked = step.draft_seconds > 0.0
            (costs.asked if asked else costs.alone).append(step.seconds)
            costs.turns = 0.98 * costs.turns + asked
            costs.steps = 0.98 * costs.steps + 1.0
            if asked and len(costs.draft) < self.ENOUGH:
                costs.draft.append(step.draft_seconds)
            memory.steps += 1
            paused, memory.pause = memory.pause, max(0, memory.pause - 1)
            if paused == 1:
                # New rounds outweigh what was measured long ago.
                memory.trial = Memory.trial
                memory.stood, memory.judged = 2.0 * memory.stood / memory.judged, 2.0
                for one in memory.costs.values():
                    one.rest.clear()
                    one.draft.clear()
            return
        costs.draft.append(step.draft_seconds / longest)
        costs.rest[longest].append(step.seconds - step.draft_seconds)
        for length, accepted in zip(step.drafts, step.accepted, strict=True):
            memory.stood = 0.99 * memory.stood + accepted
            memory.judged = 0.99 * memory.judged + min(accepted + 1, length)
        if memory.trial:
            memory.trial -= 1
        else:
            memory.note, memory.next_pause = "", max(Memory.next_pause, memory.next_pause - 1)


DraftLength: TypeAlias = "FixedLength | AutoLength"


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
