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

    def plain(self) -> tuple[float, float]:
        """Seconds of a plain step: without the drafting model, and with its usual share."""
        alone = _low(self.alone) or max(_low(self.asked) - _low(self.draft), 0.0)
        return alone, alone + self.turns / self.steps * max(_low(self.asked) - alone, 0.0)

    def gains(self, stood: float, most: int) -> list[float]:
        """Speed of rounds of lengths 1 to ``most`` over the plain loop's: each emits
        1 + a + ... + a^K tokens a row, a the share of draft tokens that stand, not one.
        """
        draft, (alone, step) = _low(self.draft), self.plain()
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
        credit: how many plain steps' time rounds may still lose.
        rate: what each plain step adds to it, less after every pause.
        note: why drafts pause or did lately.
        paused: only plain steps are taken.
    """

    costs: dict[int, _Costs] = field(default_factory=partial(defaultdict, _Costs))
    stood: float = 2.8
    judged: float = 4.0
    steps: int = 0
    rounds: int = 0
    credit: float = 0.5
    rate: float = 0.02
    note: str = ""
    paused: bool = False

    def of(self, rows: int) -> _Costs:
        """The costs for a number of rows."""
        return self.costs[round(2 * log2(rows))]


class AutoLength:
    """The length that should write most tokens a second, or none where no length would.

    Plain steps come first and tell what a step costs. Then lengths are tried, each at most twice
    the longest one before. What a round loses is taken from a credit, which gains fill up; without
    credit drafts pause until plain steps have filled it, each time more slowly. So drafts that do
    not pay cost a few steps, and later nearly none, however wrong the estimates are.
    """

    FIRST, ENOUGH = 12, 3  # plain steps before drafts: of all, and of about so many rows
    PROMISING, HOPELESS, DEBT, MOST = 1.1, 0.85, 2.0, 6.0
    LONGEST, START, REFRESH, LEAST_RATE = 8, 4, 20, 0.002

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    @property
    def note(self) -> str:
        return self.memory.note

    def plan(self, room: Sequence[int]) -> list[int] | None:
        """Draft lengths, or None for a plain step; as :meth:`FixedLength.plan`."""
        memory, costs = self.memory, self.memory.of(len(room))
        most = min(self.LONGEST, max(room), max(self.START, 2 * max(costs.rest, default=0)))
        new = memory.steps < self.FIRST or len(costs.alone) + len(costs.asked) < self.ENOUGH
        if new or most < 1 or memory.paused or memory.rounds >= self.REFRESH:
            return None
        gains = costs.gains(memory.stood / memory.judged, most)
        gain = max(gains)
        # Bad luck is forgiven where the estimate is good.
        debt = self.DEBT if gain >= self.PROMISING else 0.0
        if gain >= self.HOPELESS and memory.credit + debt > 0.0:
            return [min(gains.index(gain) + 1, one) for one in room]
        note = (
            f"speculative decoding pauses: {memory.stood / memory.judged:.0%} of the draft tokens "
            f"stood, with which the best draft would run at {gain:.2f}x the speed of the plain "
            "loop, too little for what drafts have lost"
        )
        if not memory.note:
            log.warning(note)
        memory.note, memory.paused, memory.credit = note, True, min(memory.credit, 0.0)
        memory.rate = max(memory.rate / 2, self.LEAST_RATE)
        return None

    def report(self, step: StepReport) -> None:
        """Take down what a step took and, of a round, how many draft tokens stood."""
        memory, costs = self.memory, self.memory.of(step.rows)
        longest = max(step.drafts, default=0)
        if longest == 0:
            asked = step.draft_seconds > 0.0
            (costs.asked if asked else costs.alone).append(step.seconds)
            costs.turns = 0.99 * costs.turns + asked
            costs.steps = 0.99 * costs.steps + 1.0
            if asked and (memory.paused or len(costs.draft) < self.ENOUGH):
                costs.draft.append(step.draft_seconds)
            memory.steps, memory.rounds = memory.steps + 1, 0
            memory.credit = max(memory.credit, min(memory.credit + memory.rate, Memory.credit))
            if memory.paused and memory.credit >= Memory.credit:  # another try, from the start
                memory.paused, memory.stood, memory.judged = False, Memory.stood, Memory.judged
                for one in memory.costs.values():
                    one.rest.clear()
            return
        memory.rounds += 1
        costs.draft.append(step.draft_seconds / longest)
        costs.rest[longest].append(step.seconds - step.draft_seconds)
        for length, accepted in zip(step.drafts, step.accepted, strict=True):
            memory.stood = 0.99 * memory.stood + accepted
            # A row without a draft gains no more than one whose draft fails.
            memory.judged = 0.99 * memory.judged + min(accepted + 1, max(length, 1))
        took = longest * _low(costs.draft) + _low(costs.rest[longest])
        lost = took / costs.plain()[1] - 1.0 - sum(step.accepted) / step.rows
        memory.credit = min(memory.credit - lost, self.MOST)
        if memory.credit >= self.MOST / 2:
            memory.note, memory.rate = "", Memory.rate


DraftLength: TypeAlias = "FixedLength | AutoLength"
