"""How long a draft to ask for: a fixed length, or one that follows what was measured.

Drafts change no token (:mod:`tta_ext.decoding.deferral.speculative`): a bad length costs time.
"""

from __future__ import annotations

import logging
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import log2

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


def _middle(window: deque[float]) -> float:
    """The median: near the mean of such times, whatever a prompt among them took."""
    return sorted(window)[(len(window) - 1) // 2] if window else 0.0


class _Costs:
    """The latest seconds for about so many rows: of plain steps without the drafting model and with
    it (``turns`` of ``steps``), of its forwards, and of the rest of a round, by draft length.
    """

    def __init__(self) -> None:
        window = partial(deque[float], maxlen=16)
        self.alone, self.asked, self.draft = window(), window(), window()
        self.rest: dict[int, deque[float]] = defaultdict(window)
        self.turns = self.steps = 0.0

    def plain(self) -> tuple[float, float]:
        """Seconds of a plain step: without the drafting model, and with its usual share."""
        alone = _middle(self.alone) or max(_middle(self.asked) - _middle(self.draft), 0.0)
        return alone, alone + self.turns / self.steps * max(_middle(self.asked) - alone, 0.0)

    def gains(self, stood: float, lengths: Iterable[int]) -> dict[int, float]:
        """Speed of rounds of some lengths over the plain loop's: each emits 1 + a + ... + a^K
        tokens a row, a the share of draft tokens that stand. Few rounds may have been slow ones.
        """
        draft, (alone, step) = _middle(self.draft), self.plain()
        found = {}
        for length in lengths:
            extra = 0.25 * alone  # what several columns cost over one, at a guess
            if self.rest:  # often most for two columns, so that a longer draft costs little
                known = self.rest[min(self.rest, key=lambda tried: abs(tried - length))]
                extra = max(_middle(known) - alone, 0.0) * (1.0 - 0.5 / len(known))
            tokens = sum(stood**k for k in range(length + 1))
            found[length] = tokens * step / (length * draft + alone + extra)
        return found

    def forget(self) -> None:
        """Forget the older half of the rounds of every length."""
        for known in self.rest.values():
            for _ in range(len(known) // 2):
                known.popleft()


@dataclass
class Memory:
    """What the calls of one object under one rule have measured.

    Attributes:
        costs: by number of rows, in steps of sqrt(2).
        stood, judged: draft tokens that stood, of those judged; they fade, and begin with a guess.
        steps, rounds: plain steps so far, and rounds since the last one.
        credit: how many plain steps' time rounds may still lose.
        paused, note: plain steps until drafts are tried again; why they pause or lately did.
    """

    costs: dict[int, _Costs] = field(default_factory=partial(defaultdict, _Costs))
    stood: float = 2.8
    judged: float = 4.0
    steps: int = 0
    rounds: int = 0
    credit: float = 4.0
    note: str = ""
    paused: int = 0

    def of(self, rows: int) -> _Costs:
        return self.costs[round(2 * log2(rows))]


class AutoLength:
    """The length that should write most tokens a second, or none where no length would.

    Plain steps come first and tell what a step costs, later one between ten rounds. Few lengths are
    tried, so that much is known of each, long ones after shorter ones. Drafts pause where all seem
    to lose, or have used up a credit of lost time, which gains fill up; they go on where plain
    steps have become dearer, and after PAUSE of those are tried again, whatever is known.
    """

    LENGTHS = 1, 3, 7  # two, four and eight columns, as matrix products are made for
    FIRST, ENOUGH, REFRESH = 12, 3, 10  # plain steps: of all, of about so many rows, again
    HOPELESS, PROMISING, PAUSE, TRY, MOST = 0.97, 1.2, 150, 1.0, 20.0

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    @property
    def note(self) -> str:
        return self.memory.note

    def plan(self, room: Sequence[int]) -> list[int] | None:
        """Draft lengths, or None for a plain step; as :meth:`FixedLength.plan`."""
        memory, costs, most = self.memory, self.memory.of(len(room)), max(room)
        new = memory.steps < self.FIRST or len(costs.alone) + len(costs.asked) < self.ENOUGH
        if new or most < 1 or memory.rounds >= self.REFRESH:
            return None
        reach = 2 * max(costs.rest, default=1) + 1
        lengths = {min(one, most) for one in self.LENGTHS if one <= reach}
        gains = costs.gains(memory.stood / memory.judged, lengths)
        gain, length = max((gain, length) for length, gain in gains.items())
        if gain >= (self.PROMISING if memory.paused else self.HOPELESS) and memory.credit > 0.0:
            memory.paused = 0
            return [min(length, one) for one in room]
        if not memory.paused:
            note = (
                "speculative decoding pauses, as drafts lost time or would: of their tokens "
                f"{memory.stood / memory.judged:.0%} stood, the best draft would run at {gain:.2f}x"
            )
            if not memory.note:
                log.warning(note)
            memory.note, memory.paused = note, self.PAUSE
        return None

    def report(self, step: StepReport) -> None:
        """Take down what a step took and, of a round, how many draft tokens stood."""
        memory, costs = self.memory, self.memory.of(step.rows)
        longest = max(step.drafts, default=0)
        if longest == 0:
            asked = step.draft_seconds > 0.0
            (costs.asked if asked else costs.alone).append(step.seconds)
            costs.turns, costs.steps = 0.99 * costs.turns + asked, 0.99 * costs.steps + 1.0
            if asked and (memory.paused or len(costs.draft) < self.ENOUGH):
                costs.draft.append(step.draft_seconds)
            if memory.rounds >= self.REFRESH:
                costs.forget()
            memory.steps, memory.rounds = memory.steps + 1, 0
            if memory.paused:
                memory.paused -= 1
                if not memory.paused:  # half of what was known is in doubt
                    memory.credit = max(memory.credit, self.TRY)
                    memory.stood = (memory.stood + Memory.stood) / 2
                    memory.judged = (memory.judged + Memory.judged) / 2
                    costs.forget()
            return
        memory.rounds += 1
        costs.draft.append(step.draft_seconds / longest)
        costs.rest[longest].append(step.seconds - step.draft_seconds)
        for length, accepted in zip(step.drafts, step.accepted, strict=True):
            memory.stood = 0.99 * memory.stood + accepted
            memory.judged = 0.99 * memory.judged + min(accepted + 1, max(length, 1))
        took = longest * _middle(costs.draft) + _middle(costs.rest[longest])
        lost = took / costs.plain()[1] - 1.0 - sum(step.accepted) / step.rows
        memory.credit = min(memory.credit - lost, self.MOST)
        if memory.credit >= Memory.credit:
            memory.note = ""


DraftLength = FixedLength | AutoLength
