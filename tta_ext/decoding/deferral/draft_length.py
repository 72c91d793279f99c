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

__all__ = ["AutoLength", "DraftLength", "FixedLength", "Memory", "StepReport"]

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


def _low(window: deque[float]) -> float:
    """The lower quartile: what disturbs a step makes it slower."""
    return sorted(window)[len(window) // 4] if window else 0.0


class _Costs:
    """The latest seconds for about so many rows: of plain steps without the drafting model and with
    it (``turns`` of ``steps``), of its forwards, and of the rest of a round, by draft length.
    """

    def __init__(self) -> None:
        window = partial(deque[float], maxlen=8)
        self.alone, self.asked, self.draft = window(), window(), window()
        self.rest: dict[int, deque[float]] = defaultdict(window)
        self.turns = self.steps = 0.0

    def gains(self, stood: float, most: int) -> list[float]:
        """Speed of rounds of lengths 1 to ``most`` over the plain loop's: each emits
        1 + a + ... + a^K tokens a row, a the share of draft tokens that stand, not one.
        """
        draft, asked = _low(self.draft), _low(self.asked)
        alone = _low(self.alone) or max(asked - draft, 0.0)
        step = alone + self.turns / self.steps * max(asked - alone, 0.0)
        more = {length: max(_low(known) - alone, 0.0) for length, known in self.rest.items()}
        found, tokens = [], 1.0
        for length in range(1, most + 1):
            tokens += stood**length
            extra = 0.25 * alone  # what several columns cost over one, at a guess
            if more:  # often most for two columns, so that a longer draft costs little
                extra = more[min(more, key=lambda tried: abs(tried - length))]
            found.append(tokens * step / (length * draft + alone + extra))
        return found


@dataclass
class Memory:
    """What the calls of one object under one rule have measured.

    Attributes:
        costs: by number of rows, in steps of sqrt(2).
        stood, judged: draft tokens that stood, of those judged; they fade, and begin with a guess.
        steps, rounds: plain steps so far, and rounds since the last one.
        trial: rounds to take unless they are hopeless.
        pause, next_pause: plain steps before drafts are tried again, now and the next time.
        note: why there is a pause.
    """

    costs: dict[int, _Costs] = field(default_factory=partial(defaultdict, _Costs))
    stood: float = 1.4
    judged: float = 2.0
    steps: int = 0
    rounds: int = 0
    trial: int = 6
    pause: int = 0
    next_pause: int = 32
    note: str = ""

    def of(self, rows: int) -> _Costs:
        """The costs for a number of rows."""
        return self.costs[round(2 * log2(rows))]


class AutoLength:
    """The length that should write most tokens a second, or none where no length would.

    Plain steps come first and tell what a step costs. Then lengths are tried, each at most twice
    the longest one before. Where the best is no faster than plain steps, a few of these are taken
    to see whether the machine has changed; if not, drafts pause, for ever longer times.
    """

    FIRST, ENOUGH = 12, 3  # plain steps before drafts: of all, and of about so many rows
    MARGIN, HOPELESS = 1.08, 0.85
    LONGEST, PATIENCE, REFRESH, LONGEST_PAUSE = 8, 6, 20, 2048

    def __init__(self, memory: Memory) -> None:
        self.memory, self._against = memory, 0

    @property
    def note(self) -> str:
        return self.memory.note

    def plan(self, room: Sequence[int]) -> list[int] | None:
        """Draft lengths, or None for a plain step; as :meth:`FixedLength.plan`."""
        memory, costs = self.memory, self.memory.of(len(room))
        most = min(self.LONGEST, max(room), max(2, 2 * max(costs.rest, default=0)))
        new = memory.steps < self.FIRST or len(costs.alone) + len(costs.asked) < self.ENOUGH
        if new or not most or memory.pause > 0 or memory.rounds >= self.REFRESH:
            return None
        gains = costs.gains(memory.stood / memory.judged, most)
        gain = max(gains)
        least = self.HOPELESS if memory.trial and costs.rest else self.MARGIN
        if gain >= least or (memory.note and memory.trial == Memory.trial):  # a pause is over
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
        if longest == 0:
            asked = step.draft_seconds > 0.0
            (costs.asked if asked else costs.alone).append(step.seconds)
            costs.turns = 0.99 * costs.turns + asked
            costs.steps = 0.99 * costs.steps + 1.0
            if asked and len(costs.draft) < self.ENOUGH:
                costs.draft.append(step.draft_seconds)
            memory.steps, memory.rounds = memory.steps + 1, 0
            memory.pause -= 1
            if memory.pause == 0:  # new rounds outweigh what was measured long ago
                memory.trial = Memory.trial
                memory.stood, memory.judged = 2.0 * memory.stood / memory.judged, 2.0
                for one in memory.costs.values():
                    one.rest.clear()
                    one.draft.clear()
            return
        memory.rounds += 1
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
