"""How long a draft to ask for: a fixed length, or one that follows measured costs and acceptance.

:class:`AdaptiveLength` maximises tokens per second by the cost model of
:mod:`draft_costs`, within the losses that :mod:`draft_budget`
allows. What it measures is kept in a :class:`Memory` from call to call.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from tta_ext.decoding.deferral.draft_budget import Budget
from tta_ext.decoding.deferral.draft_costs import CostModel, ForwardCost

__all__ = ["AdaptiveLength", "FixedLength", "Memory", "StepReport", "draft_length"]

LONGEST_FIXED = 64

log = logging.getLogger("tta_ext")


class FixedLength:
    """The same draft length for every row, as far as the answer's limit allows.

    Args:
        length: tokens to draft.
    """

    note = ""

    def __init__(self, length: int) -> None:
        self.longest = length

    def plan(self, rows: Sequence[int], room: Sequence[int]) -> list[int] | None:
        """Draft lengths of the active rows, or None for a plain step.

        Args:
            rows: numbers of the active rows.
            room: for each, the longest draft that makes sense.
        """
        return [min(self.longest, most) for most in room]


@dataclass
class _Tally:
    accepted: float = 0.0
    judged: float = 0.0

    def add(self, accepted: int, judged: int, memory: float) -> None:
        self.accepted = memory * self.accepted + accepted
        self.judged = memory * self.judged + judged

    def halve(self) -> None:
        self.accepted, self.judged = 0.5 * self.accepted, 0.5 * self.judged

    def rate(self, prior: float, weight: float) -> float:
        return (self.accepted + weight * prior) / (self.judged + weight)


class Memory:
    """What the calls of one object under one rule have measured.

    Args:
        scorers: number of models that run once a round.
        dense: as in :class:`CostModel`.

    Attributes:
        costs: the cost model.
        left: seconds that the calls have left over of what drafting may lose.
        front: length of the latest batch's answers; ``lengths`` of those before.
        paid: in the latest call that drafted, drafts have gained time so far.
        told: it has been logged that drafting does not pay.
    """

    def __init__(self, scorers: int, dense: bool) -> None:
        self.costs = CostModel(
            [ForwardCost() for _ in range(scorers)],
            [ForwardCost() for _ in range(scorers)],
            ForwardCost(),
            dense,
        )
        self.accepted, self.sources = _Tally(), _Tally()
        self.plain_steps = self.rounds = self.since_plain = 0
        self.tried = self.front = 0
        self.lengths: deque[int] = deque(maxlen=8)
        self.left = 0.0
        self.paid = self.told = False


@dataclass
class StepReport:
    """A step as :class:`AdaptiveLength` wants to know it.

    Attributes:
        positions: L + 1, or 0 for a plain step.
        rows: active rows before the step.
        tokens, deferred: what it emitted, and how many of these came from the proxy.
        front: tokens of the shortest unfinished answer after it (of the longest, if all are done).
        seconds: its time, planning included, without what the plain loop would have had to do at
            some time anyway (prompts).
        own_seconds: the part outside the models.
        planning: the part that planning took.
    """

    positions: int
    rows: int
    tokens: int
    deferred: int
    front: int
    seconds: float
    own_seconds: float
    planning: float = 0.0


@dataclass
class AdaptiveLength:
    """Draft lengths that follow what was measured, for one call.

    Plain steps come first and tell the base's cost. If even drafts that nearly always stand could
    not pay, given the models' sizes, nothing is drafted. Otherwise a short draft tells what
    forwards of several columns cost, and from then on the model decides. Drafts of a rule that
    looks at the base alone wait for the first token that defers: a proxy that is never asked need
    not even read the prompt. Several verdicts against drafting, one after the other, switch it off
    for the rest of the call; the next call believes old verdicts by half.

    Args:
        memory: what earlier calls have measured.

    Attributes:
        longest: longest draft.
        on: drafting has not been switched off.
    """

    memory: Memory
    longest: int = 8
    on: bool = True
    budget: Budget = field(init=False)

    PLAIN_STEPS = 3
    PROBE_LENGTH = 2
    FIRST_LENGTH = 4
    # Plain steps in between tell whether the plain loop's cost has changed.
    ROUNDS = 48
    # Less than that is noise.
    CHANGE = 0.25
    HOPE = 0.95
    DOUBT = 1.0
    MOST = 0.99
    MARGIN = 1.03
    FIRST_MARGIN = 0.8
    PATIENCE = 3
    PRIOR = 0.7
    WEIGHT = 4.0
    MEMORY = 0.98

    def __post_init__(self) -> None:
        memory = self.memory
        self.costs = memory.costs
        self._rows: dict[int, _Tally] = {}
        self._against = self._limit = self._expected = self._drafted = 0
        self._certain = self._after_round = False
        self._stopped = self._waiting = ""
        # What one call gains is not all for the next one, with other prompts, to lose.
        step = self.costs.plain(1) if memory.plain_steps else 0.0
        memory.left = min(memory.left, Budget.GAINED * step)
        self.budget = Budget(memory.left, memory.paid)
        memory.accepted.halve()

    def begin(self, limit: int, certain: bool) -> None:
        """A new batch, whose rows have no history.

        Args:
            limit: tokens of an answer at most.
            certain: nothing but the limit ends an answer.
        """
        self._rows.clear()
        memory = self.memory
        if memory.front:
            memory.lengths.append(memory.front)
        expected = limit if certain else min(memory.lengths, default=0)
        memory.front = 0
        self._limit, self._certain, self._expected = limit, certain, expected
        self._after_round = False

    @property
    def note(self) -> str:
        """Why nothing is drafted any more, or why nothing was; one sentence or nothing."""
        if self._stopped or self._drafted:
            return self._stopped
        return self._waiting

    # ---- decisions ---------------------------------------------------------------------------

    def plan(self, rows: Sequence[int], room: Sequence[int]) -> list[int] | None:
        """Draft lengths of the active rows, or None for a plain step; as :class:`FixedLength`."""
        memory, costs = self.memory, self.costs
        if not self.on or not any(room):
            return None
        if memory.plain_steps < self.PLAIN_STEPS or memory.since_plain >= self.ROUNDS:
            return None
        count = len(rows)
        if not costs.steps[0].near(count, 1.5):
            return None
        if not costs.proxy.count:
            self._waiting = "no draft was tried: the proxy has not been asked yet"
            return None
        step = costs.plain(count)
        ahead = (self._limit - memory.front) * step if self._certain else 0.0
        spare = self.budget.spare(ahead, self._expected * step)
        if spare <= 0.0 and memory.rounds:
            self._waiting = "no draft was tried: earlier ones have lost too much time"
            return None
        if not memory.rounds:
            return self._probe(room, spare)
        rates = [self.rate(row) for row in rows]
        # Little evidence is read hopefully: drafting teaches more than the plain loop does.
        weight = memory.accepted.judged + self.WEIGHT
        rates = [
            min(rate + self.DOUBT * math.sqrt(rate * (1.0 - rate) / weight), self.MOST)
            for rate in rates
        ]
        # What a forward of many columns costs is known where it was tried, and a call's first round
        # tells whether that is still true.
        longest = min(self.longest, 2 * memory.tried + 1)
        if not self._drafted:
            longest = min(longest, self.FIRST_LENGTH)
        lengths, speed, plain = costs.choose(rates, room, longest)
        # A model's first forward of many columns takes longer than the next ones.
        margin = self.MARGIN if memory.rounds > 1 else self.FIRST_MARGIN
        if speed > margin * plain:
            self._against = 0
            if costs.risk(lengths) > spare:
                lengths, speed, plain = costs.choose(rates, room, longest, spare)
                if speed <= margin * plain:
                    self._waiting = _TOO_SHORT
                    return None
            memory.tried = max(memory.tried, max(lengths))
            return lengths
        self._against += 1
        if self._against >= self.PATIENCE:
            self._stop(
                f"{memory.accepted.rate(self.PRIOR, 0.01):.0%} of the draft tokens stood, with "
                f"which the best draft would run at {speed / plain:.2f}x the speed of the plain "
                "loop"
            )
        return None

    def _probe(self, room: Sequence[int], spare: float) -> list[int] | None:
        """The very first draft, if one that mostly stands, verified at no cost, would pay."""
        hope = [self.HOPE] * len(room)
        lengths, speed, plain = self.costs.choose(hope, room, self.longest)
        if speed <= self.MARGIN * plain:
            self._stop(
                f"even if {self.HOPE:.0%} of the draft tokens stood, the best draft would run at "
                f"{speed / plain:.2f}x the speed of the plain loop"
            )
            return None
        for length in range(min(self.PROBE_LENGTH, max(lengths)), 0, -1):
            probe = [min(length, most) for most in room]
            if self.costs.risk(probe) <= spare:
                self.memory.tried = length
                return probe
        self._waiting = _TOO_SHORT
        return None

    def _stop(self, reason: str) -> None:
        self.on = False
        self._stopped = f"speculative decoding is off: {reason}"
        if not self.memory.told:
            self.memory.told = True
            log.warning(self._stopped)

    def rate(self, row: int) -> float:
        """Chance that a draft token of a row stands, drawn towards that of all rows."""
        common = self.memory.accepted.rate(self.PRIOR, self.WEIGHT)
        return min(self._rows.get(row, _Tally()).rate(common, self.WEIGHT), self.MOST)

    # ---- measurements ------------------------------------------------------------------------

    def proxy_ran(self, rows: int, columns: int, seconds: float, prompt: bool = False) -> None:
        """A forward of the model that drafts took so long."""
        if not prompt:
            self.costs.proxy.add(rows * columns, seconds)

    def scorer_ran(
        self, which: int, rows: int, columns: int, seconds: float, prompt: bool = False
    ) -> None:
        """A forward of another model took so long; the base is number 0."""
        step, score = self.costs.steps[which], self.costs.scores[which]
        if prompt:
            score.read_prompt(rows * columns, seconds)
        elif columns == 1:
            step.add(rows, seconds)
        else:
            tokens = rows * columns
            before, seen = score(tokens), score.seen(tokens)
            score.add(tokens, seconds)
            if seen > 2 and abs(seconds - before) > self.CHANGE * before:
                # Rounds tell how fast the machine is now; plain steps would be as much faster.
                step.scale(score(tokens) / before)

    def judged(self, row: int, accepted: int, judged: int) -> None:
        """A row's draft was judged up to its first rejection."""
        self.memory.accepted.add(accepted, judged, 0.99)
        self._rows.setdefault(row, _Tally()).add(accepted, judged, 0.9)

    def stepped(self, step: StepReport) -> None:
        """A step is over."""
        memory, costs = self.memory, self.costs
        memory.sources.add(step.deferred, step.tokens, self.MEMORY)
        # Rather too few than too many: the plain loop shall not seem slower than it is.
        share, weight = memory.sources.rate(0.5, 1.0), memory.sources.judged + 1.0
        costs.deferral = max(share - math.sqrt(share * (1.0 - share) / weight), 0.0)
        if step.positions:
            memory.rounds += 1
            memory.since_plain += 1
            self._drafted += 1
            costs.own_round = _fade(
                costs.own_round, step.own_seconds / step.positions, memory.rounds
            )
        else:
            memory.plain_steps += 1
            memory.since_plain = 0
            costs.own_plain = _fade(costs.own_plain, step.own_seconds, memory.plain_steps)
        if not memory.rounds:
            costs.own_round = costs.own_plain
        self._account(step)

    def _account(self, step: StepReport) -> None:
        costs, rows = self.costs, step.rows
        full = max(costs.plain(rows), 1e-12)
        # What a row adds: hardly more than a token of a prompt takes, weights read for it included.
        each = 0.0
        if rows > 1:
            guessed = any(cost.guessed for cost in costs.steps)
            prompt = sum(cost.each for cost in costs.scores)
            added = 0.25 * prompt if guessed else min(full - costs.plain(rows - 1), prompt)
            each = min(max(added, 0.0), full / rows)
        worth = each * step.tokens + (full - rows * each) * (step.front - self.memory.front)
        self.memory.front = step.front
        seconds = step.seconds
        if not step.positions:
            # What the plain loop takes is by definition what it takes, but for the way back to it.
            taken = seconds - step.planning
            worth *= (min(taken, full) if self._after_round else taken) / full
        self._after_round = bool(step.positions)
        self.memory.left += self.budget.add(worth, seconds)
        if self._drafted:
            self.memory.paid = self.budget.lost < 0.0


_TOO_SHORT = "no draft was tried: the answers are too short to risk one"


def _fade(average: float, value: float, count: int) -> float:
    """A running average; the first value, which warms up everything, hardly counts."""
    if count <= 2:
        return value
    return average + 0.1 * (min(value, 3.0 * average) - average)


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
