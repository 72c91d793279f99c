"""Automatic draft lengths, told of steps whose seconds are made up."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import pytest

from tta_ext.decoding.deferral.draft_length import AutoLength, FixedLength, Memory, StepReport


@dataclass
class Machine:
    """Two models; seconds in steps of the base.

    Attributes:
        draft: seconds of a forward of the drafting model.
        rest: seconds of the base over so many columns.
        stand: chance that a draft token stands.
        asked: share of plain steps in which the drafting model runs.
        noise: relative; now and then a step takes three times as long.
    """

    draft: float = 0.05
    rest: Callable[[int], float] = lambda columns: 1.0 + 0.05 * columns
    stand: float = 0.8
    asked: float = 0.4
    noise: float = 0.2
    rows: int = 1
    draw: random.Random = field(default_factory=lambda: random.Random(0))
    memory: Memory = field(default_factory=Memory)

    def took(self, seconds: float) -> float:
        slow = 2.0 * (self.draw.random() < 0.02)
        return seconds * (1.0 + self.noise * self.draw.random() + slow)

    def call(self, tokens: int) -> tuple[float, list[int], AutoLength]:
        """Write answers: the speed over the plain loop's, lengths of all drafts, the policy."""
        policy, draw = AutoLength(self.memory), self.draw
        left, total, plain, lengths = [tokens] * self.rows, 0.0, 0.0, []
        while left:
            count = len(left)
            planned = policy.plan([one - 1 for one in left])
            drafts = [] if planned is None or not any(planned) else planned
            stood = [next((k for k in range(n) if draw.random() >= self.stand), n) for n in drafts]
            if drafts:
                drafted = self.took(self.draft * max(drafts))
                lengths.append(max(drafts))
            else:
                drafted = self.took(self.draft) * (draw.random() < self.asked)
            seconds = drafted + self.took(self.rest(1 + max(drafts, default=0)))
            policy.report(StepReport(drafts, stood, count, seconds, drafted))
            gained = [k + 1 for k in stood] or [1] * count
            total += seconds
            fair = (1.0 + 0.5 * self.noise + 0.04) * (self.rest(1) + self.asked * self.draft)
            plain += fair * sum(gained) / count if drafts else seconds
            left = [one - more for one, more in zip(left, gained, strict=True) if one > more]
        return plain / total, lengths, policy


def test_nothing_is_drafted_before_plain_steps_have_told_their_cost() -> None:
    policy = AutoLength(Memory())
    for step in range(AutoLength.FIRST):
        assert policy.plan([90 - step]) is None
        # The first one runs the prompt too.
        policy.report(StepReport([], [], 1, 1.0 + 9.0 * (step == 0), 0.0))
    assert policy.plan([80]) == [AutoLength.LENGTHS[1]]
    assert policy.plan([1]) == [1]
    assert policy.plan([0]) is None
    # Other numbers of rows have other costs.
    assert policy.plan([80] * 4) is None


def test_lengths_grow_where_drafts_stand_and_columns_are_cheap() -> None:
    machine = Machine(stand=0.9)
    speed, lengths, policy = machine.call(96)
    assert lengths[0] <= AutoLength.LENGTHS[1]
    assert max(lengths) == AutoLength.LENGTHS[-1]
    assert speed > 1.3
    assert policy.note == ""
    # The next call drafts from its first step on.
    speed, lengths, _ = machine.call(96)
    assert speed > 2.0
    assert lengths[0] > 2


def test_lengths_stay_short_where_columns_are_dear() -> None:
    machine = Machine(stand=0.7, rest=lambda columns: 1.0 + 0.2 * columns)
    for _ in range(3):
        speed, lengths, _ = machine.call(96)
    assert median(lengths) <= 4
    assert speed > 1.05


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("tokens", [12, 96])
@pytest.mark.parametrize(
    ("draft", "column", "stand"),
    [(1.0, 0.1, 0.4), (1.0, 0.1, 0.05), (0.1, 0.1, 0.05), (0.5, 1.0, 0.6), (4.0, 0.0, 0.7)],
)
def test_where_drafts_lose_little_is_lost(
    draft: float, column: float, stand: float, tokens: int, rows: int
) -> None:
    machine = Machine(
        draft=draft, rest=lambda columns: 1.0 + column * (columns - 1), stand=stand, rows=rows
    )
    speeds = [machine.call(tokens)[0] for _ in range(40)]
    assert sum(1.0 / speed for speed in speeds) / 40 < 1.0 / 0.97
    assert machine.memory.credit < AutoLength.MOST / 2


def test_a_pause_is_said_once_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine(draft=1.0, stand=0.1)
    rounds = [len(machine.call(96)[1]) for _ in range(30)]
    policy = AutoLength(machine.memory)
    assert sum(rounds[1:]) < 0.03 * 29 * 96
    assert "the best draft would run at" in policy.note
    assert caplog.text.count("speculative decoding pauses") == 1
    # Things have changed for the better: found out at the end of the pause.
    machine.draft, machine.stand = 0.05, 0.9
    speeds = [machine.call(96) for _ in range(25)]
    assert speeds[-1][0] > 2.0
    assert speeds[-1][2].note == ""


def test_a_machine_that_slows_down_does_not_stop_drafts() -> None:
    machine = Machine(stand=0.9)
    machine.call(96)
    quick = machine.rest
    machine.draft, machine.rest = 0.15, lambda columns: 3.0 * quick(columns)
    speed, _, policy = machine.call(96)
    assert speed > 1.5
    assert policy.note == ""


def test_rounds_without_a_draft_are_plain_steps() -> None:
    """A drafting model without a law drafts nothing."""
    policy = AutoLength(Memory())
    policy.report(StepReport([0, 0], [0, 0], 2, 1.0, 0.1))
    assert policy.memory.steps == 1


def test_fixed_lengths_keep_to_the_limit() -> None:
    assert FixedLength(5).plan([9, 2]) == [5, 2]
