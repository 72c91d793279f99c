"""Draft lengths: cost model, budget, and the floor under ``"auto"`` on a simulated clock."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
from tta_ext.decoding.deferral.draft_budget import Budget
from tta_ext.decoding.deferral.draft_costs import CostModel, ForwardCost

from tta_ext.decoding.deferral.draft_length import AdaptiveLength, FixedLength, Memory, StepReport

FLOOR = 0.97
PROMPT = 24


def line(fixed: float, slope: float) -> ForwardCost:
    cost = ForwardCost()
    cost.fixed, cost.slope, cost.count, cost.guessed = fixed, slope, 9, False
    return cost


# ---- the cost model ----------------------------------------------------------------------------


def test_forward_costs_are_fitted() -> None:
    cost = ForwardCost()
    for tokens in (50, 1, 2, 9, 4, 1, 9):
        cost.add(tokens, 3.0 + 0.25 * tokens if cost.count else 15.5)
    assert cost(6) == pytest.approx(4.5, rel=1e-6)
    assert cost.fixed == pytest.approx(3.0)
    assert cost.slope == pytest.approx(0.25)
    cost.add(9, 1000.0)
    assert cost(9) < 10.0
    through_zero = ForwardCost()
    for tokens in (1, 1, 9, 1, 9):
        through_zero.add(tokens, 0.1 if tokens == 1 else 2.0)
    assert through_zero.fixed == 0.0


def test_forward_costs_that_bend() -> None:
    """Flat while weights are read, then in proportion: no line would fit, a table does."""

    def true(tokens: int) -> float:
        return max(1.0, tokens / 8)

    cost = ForwardCost()
    for _ in range(3):
        for tokens in (2, 4, 8, 16, 24):
            cost.add(tokens, true(tokens))
    for tokens in (2, 3, 6, 8, 12, 20, 24, 36):
        assert cost(tokens) == pytest.approx(true(tokens), rel=1e-6)
    assert cost.most(48) >= true(48)
    assert cost.seen(8) == 3
    assert cost.near(30, 1.5)
    assert not cost.near(40, 1.5)
    cost.scale(2.0)
    assert cost(20) == pytest.approx(2 * true(20))


def test_a_slow_first_forward_is_forgotten() -> None:
    cost = ForwardCost()
    for seconds in (9.0, 1.0, 1.0):
        cost.add(4, seconds)
    assert cost(4) == pytest.approx(1.0)


def test_the_cost_model_never_chooses_what_it_thinks_slower() -> None:
    room = [20, 3, 0, 8]
    for base, slope, proxy, rate, dense in itertools.product(
        (1.0,), (0.0, 0.05, 1.0), (0.01, 0.2, 1.0), (0.05, 0.5, 0.95), (False, True)
    ):
        costs = CostModel(
            [line(base, slope)], [line(base, slope)], line(proxy, proxy * slope), dense, 0.3, 0.01,
            0.01,
        )  # fmt: skip
        rates = [rate, 0.9 * rate, rate, 0.3]
        lengths, speed, plain = costs.choose(rates, room, 8)
        assert all(n <= min(most, 8) for n, most in zip(lengths, room, strict=True))
        if any(lengths):
            tokens, seconds = costs.round(lengths, rates)
            assert speed == pytest.approx(tokens / seconds)
        assert plain == pytest.approx(4 / costs.plain(4))
        # No uniform length is better than the lengths found, but for the rows' limits.
        for k in range(1, 9):
            same = [min(most, k) for most in room]
            tokens, seconds = costs.round(same, rates)
            assert tokens / seconds <= max(speed, plain) * 1.0001
        spare = 0.5 * costs.risk(lengths) if any(lengths) else 0.0
        careful, _, _ = costs.choose(rates, room, 8, spare)
        assert not any(careful) or costs.risk(careful) <= spare


def test_rows_that_fail_draft_less() -> None:
    base = [line(1.0, 0.001)]
    costs = CostModel(base, base, line(0.05, 0.02), False, 0.2)
    lengths, _, _ = costs.choose([0.95, 0.3], [20, 20], 8)
    assert lengths[0] > lengths[1]


def test_expected_tokens_of_a_round() -> None:
    costs = CostModel([line(1.0, 0.0)], [line(1.5, 0.0)], line(0.1, 0.0), True, own_round=0.01)
    tokens, seconds = costs.round([2, 0], [0.5, 0.9])
    assert tokens == pytest.approx(2 + 0.5 + 0.25)
    assert seconds == pytest.approx(1.5 + 2 * 0.1 + 0.1 + 3 * 0.01)
    assert costs.risk([2, 0]) == pytest.approx(seconds - 1.1)


# ---- the budget --------------------------------------------------------------------------------


def test_a_budget_never_spends_what_it_has_not() -> None:
    budget, share = Budget(), Budget.SHARE
    assert budget.spare(0.0) == 0.0
    assert budget.spare(100.0) == pytest.approx(100 * share * Budget.LOAN)
    for _ in range(50):
        assert budget.add(1.0, 1.0) == pytest.approx(0.02)
    assert budget.spare(0.0) == pytest.approx(1.0)
    assert budget.add(1.0, 1.5) == pytest.approx(-0.48)
    assert budget.spare(0.0) == pytest.approx(0.52)
    budget.add(3.0, 1.5)  # a gain may be lost again
    assert budget.spare(0.0) == pytest.approx(2.08)


def test_what_calls_leave_over_is_capped_and_debts_are_paid() -> None:
    assert Budget(2.0).spare() == 0.0
    assert Budget(2.0).spare(call=50.0) == pytest.approx(50.0 * Budget.ONCE)
    assert Budget(2.0).spare(call=500.0) == 2.0
    assert Budget(2.0, paid=True).spare() == 2.0
    assert Budget(2.0).spare(ahead=200.0, call=200.0) == pytest.approx(3.6)
    assert Budget(-1.0).spare(ahead=100.0, call=100.0) == pytest.approx(0.8)


# ---- "auto" on a simulated clock ---------------------------------------------------------------


def constant(value: float) -> Callable[[float], float]:
    return lambda progress: value


@dataclass
class Machine:
    """Two models whose costs and agreement are given; time in base steps of one row.

    Attributes:
        slope: what a token adds to a forward that takes 1 without.
        ratio: the proxy's cost over the base's.
        accept: chance that a draft token stands, by progress (0 to 1) of the call.
        bend: a base forward of several columns takes so many times what a step would.
        base, proxy: costs of the models over what they are at first, by progress.
        noise: relative, of each forward.
        share: of tokens that defer; at most the chance of acceptance.
    """

    slope: float = 0.01
    ratio: float = 0.05
    accept: Callable[[float], float] = field(default_factory=lambda: constant(0.8))
    dense: bool = False
    bend: float = 1.0
    base: Callable[[float], float] = field(default_factory=lambda: constant(1.0))
    proxy: Callable[[float], float] = field(default_factory=lambda: constant(1.0))
    noise: float = 0.05
    share: float = 0.4
    own: float = 0.01
    seed: int = 0

    def memory(self) -> Memory:
        return Memory(1, self.dense)

    def plain_step(self, rows: int, progress: float) -> float:
        """Expected seconds of a plain step."""
        share = min(self.share, self.accept(progress))
        called = 1.0 if self.dense else 1.0 - (1.0 - share) ** rows
        base = self.base(progress) * (1.0 + self.slope * rows)
        return base + self.ratio * self.proxy(progress) * (called + self.slope * rows) + self.own

    def plain(self, answers: Sequence[int]) -> float:
        """Seconds of the plain loop for answers of these lengths."""
        longest = max(answers)
        return sum(
            self.plain_step(sum(n > step for n in answers), step / longest)
            for step in range(longest)
        )

    def call(
        self, memory: Memory, answers: Sequence[int], limit: int | None = None
    ) -> tuple[float, AdaptiveLength]:
        """An automatic run that writes answers of these lengths: the floor's ratio, and the policy.

        Args:
            limit: ``max_new_tokens``; answers end by themselves before. None: they all have the
                length of the first, and nothing else may end them.
        """
        draw = random.Random(self.seed)
        self.seed += 1
        policy = AdaptiveLength(memory)
        most = answers[0] if limit is None else limit
        policy.begin(most, limit is None)
        prompt = PROMPT * len(answers)
        policy.scorer_ran(0, len(answers), PROMPT, self.base(0) * (1 + self.slope * prompt), True)
        written, total = [0] * len(answers), 0.0
        while active := [r for r, n in enumerate(answers) if written[r] < n]:
            now = min(written[r] for r in active) / max(answers)
            accept = self.accept(now)
            share = min(self.share, accept)
            count = len(active)

            def run(scale: float, tokens: int) -> float:
                noise = 1.0 + self.noise * (draw.random() - 0.5)
                return scale * noise * (1.0 + self.slope * tokens)

            seconds, models = 0.0, 0.0
            lengths = policy.plan(active, [most - written[r] - 1 for r in active])
            if lengths is None:
                took = run(self.base(now), count)
                policy.scorer_ran(0, count, 1, took)
                # On average, as a lazy proxy's turns are the plain loop's too.
                average = (
                    self.plain_step(count, now)
                    - self.own
                    - self.base(now) * (1.0 + self.slope * count)
                )
                models = took + average
                proxy = self.ratio * self.proxy(now)
                if draw.random() < 1.0 - (1.0 - share) ** count or self.dense:
                    policy.proxy_ran(count, 1, run(proxy, count))
                own, gained = self.own, [1] * count
            else:
                longest, unsure = max(lengths), 0
                proxy = self.ratio * self.proxy(now)
                calls = [sum(n >= j for n in lengths) for j in range(longest)]
                for n in [*calls, *[count] * self.dense]:
                    took = run(proxy, n)
                    policy.proxy_ran(n, 1, took)
                    models += took
                took = run(self.bend * self.base(now), count * (longest + 1))
                policy.scorer_ran(0, count, longest + 1, took)
                models += took
                gained = []
                for r, length in zip(active, lengths, strict=True):
                    stood = next((k for k in range(length) if draw.random() >= accept), length)
                    if length:
                        policy.judged(r, stood, min(stood + 1, length))
                    gained.append(min(stood + 1, answers[r] - written[r]))
                    unsure += stood == length and draw.random() < share
                if unsure and not self.dense:
                    took = run(proxy, unsure)
                    policy.proxy_ran(unsure, 1, took)
                    models += took
                own = self.own * (longest + 1)
            seconds = models + own
            total += seconds
            for r, n in zip(active, gained, strict=True):
                written[r] += n
            left = [written[r] for r in active if written[r] < answers[r]]
            policy.stepped(
                StepReport(
                    positions=0 if lengths is None else max(lengths) + 1,
                    rows=count,
                    tokens=sum(gained),
                    deferred=sum(draw.random() < share for _ in range(sum(gained))),
                    front=min(left) if left else max(written),
                    seconds=seconds,
                    own_seconds=own,
                )
            )
        return self.plain(answers) / total, policy


def settings(full: bool) -> list[dict[str, float]]:
    grid = {
        "slope": (0.01, 0.1, 0.3) if full else (0.01, 0.3),
        "ratio": (0.05, 0.3, 1.0),
        "accept": (0.1, 0.5, 0.75, 0.9) if full else (0.1, 0.5, 0.9),
        "bend": (1.0, 1.6),
        "length": (32, 96, 128, 400) if full else (32, 128),
    }
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_auto_never_falls_behind_the_plain_loop(
    rows: int, dense: bool, request: pytest.FixtureRequest
) -> None:
    """In 432 settings, three calls each; with ``--slow`` in 1728."""
    for one in settings(request.config.getoption("--slow")):
        machine = Machine(
            slope=one["slope"], ratio=one["ratio"], accept=constant(one["accept"]), dense=dense,
            bend=one["bend"],
        )  # fmt: skip
        memory = machine.memory()
        for call in range(3):
            speed, policy = machine.call(memory, [int(one["length"])] * rows)
            assert speed >= FLOOR, (one, call)
            if not policy.on:
                assert "speculative decoding is off" in policy.note


def step_at(where: float, before: float, after: float) -> Callable[[float], float]:
    return lambda progress: before if progress < where else after


DRIFTS: dict[str, dict[str, Callable[[float], float]]] = {
    "drafts stop standing": {"accept": step_at(0.5, 0.95, 0.02)},
    "drafts stop standing soon": {"accept": step_at(0.1, 0.95, 0.02)},
    "drafts stand less and less": {"accept": lambda progress: 0.95 - 0.9 * progress},
    "by turns": {"accept": lambda progress: 0.95 if int(10 * progress) % 2 else 0.05},
    "base becomes fast": {"base": step_at(0.4, 1.0, 0.3)},
    "base becomes slow": {"base": step_at(0.4, 0.3, 1.0)},
    "base grows": {"base": lambda progress: 1.0 + 2.0 * progress},
    "proxy becomes slow": {"proxy": step_at(0.3, 1.0, 3.0)},
    "proxy becomes fast": {"proxy": step_at(0.5, 2.0, 1.0)},
    "both become fast": {"base": step_at(0.5, 1.0, 0.3), "proxy": step_at(0.5, 1.0, 0.3)},
}


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("drift", DRIFTS)
def test_auto_never_falls_behind_when_things_drift(drift: str, rows: int) -> None:
    for dense, bend, ratio in itertools.product((False, True), (1.0, 1.6), (0.05, 0.2)):
        machine = Machine(
            dense=dense, bend=bend, ratio=ratio, **({"accept": constant(0.85)} | DRIFTS[drift])
        )
        memory = machine.memory()
        for call in range(5):
            speed, _ = machine.call(memory, [128] * rows)
            assert speed >= FLOOR, (dense, bend, ratio, call)


@pytest.mark.parametrize("rows", [1, 4])
def test_answers_of_unknown_length_never_fall_behind_together(rows: int) -> None:
    """Answers end by themselves and prompts change: the account holds over all calls so far."""
    for accept, bend, seed in itertools.product((0.05, 0.5, 0.9, None), (1.0, 1.6), range(4)):
        draw = random.Random(seed)
        machine = Machine(bend=bend, seed=1000 * seed)
        memory, plain, taken = machine.memory(), 0.0, 0.0
        for _ in range(25):
            # None: some calls' drafts stand, others' do not.
            machine.accept = constant(draw.choice((0.05, 0.95)) if accept is None else accept)
            answers = [draw.randrange(4, 90) for _ in range(rows)]
            speed, _ = machine.call(memory, answers, limit=256)
            this = machine.plain(answers)
            plain, taken = plain + this, taken + this / speed
            assert plain / taken >= FLOOR, (accept, bend, seed)
            # One call: its share, or what drafts that paid have left over.
            step = machine.plain_step(rows, 0.0)
            assert this / speed - this < 0.03 * this + Budget.GAINED * step


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(("rows", "slope", "least"), [(1, 0.01, 1.8), (4, 0.05, 1.3)])
def test_auto_is_fast_where_drafts_pay(rows: int, slope: float, least: float, dense: bool) -> None:
    speeds = []
    for seed in range(10):
        machine = Machine(
            slope=slope, accept=constant(0.85), dense=dense, bend=1.3, seed=1000 * seed
        )
        memory = machine.memory()
        for _ in range(3):
            speed, _ = machine.call(memory, [96] * rows)
            speeds.append(speed)
    assert sum(speeds) / len(speeds) > least


def test_auto_switches_itself_off_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine(ratio=1.0, accept=constant(0.1))
    memory = machine.memory()
    for _ in range(3):
        _, policy = machine.call(memory, [200])
        assert not policy.on
        assert "x the speed of the plain loop" in policy.note
    assert caplog.text.count("speculative decoding is off") == 1
    short, hopeless = Machine(), Machine(ratio=1.0, accept=constant(0.0))
    assert "too short" in short.call(short.memory(), [12])[1].note
    assert "has not been asked" in hopeless.call(hopeless.memory(), [30])[1].note


def test_fixed_lengths_keep_to_the_limit() -> None:
    assert FixedLength(5).plan([0, 1], [9, 2]) == [5, 2]
