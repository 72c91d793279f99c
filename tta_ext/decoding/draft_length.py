"""How long a draft to ask for: a fixed length, or one that follows measured costs and acceptance.

**Cost model.** A forward over ``t`` tokens (rows times columns, padding included) takes
``c(t) = fixed + slope t`` seconds, fitted to what a model's forwards took; the base has one line
for steps of one token a row and another for those of several, since matrix products may change
their algorithm in between. A step of the plain loop with n rows, of which a share D defers, gains
n tokens in

    plain(n) = c_step(n) + overhead + c_proxy(n)                              proxy at every step
    plain(n) = c_step(n) + overhead + (1 - (1 - D)^n) fixed + n slope         lazy proxy

(the lazy proxy is called when some row defers, and is fed every token sooner or later). A round in
which row r drafts K_r tokens, L = max K_r, gains ``sum_r (1 + a_r + ... + a_r^K_r)`` tokens, a_r
being the chance that a draft token stands, in

    c_score(n (L + 1)) + (L + 1) overhead' + sum_{j < L} c_proxy(rows with K_r >= j) + bonus

where ``bonus`` is a proxy forward: always if the rule compares the models, otherwise with the
chance that a row whose whole draft stood defers its next token. Lengths are chosen to maximise
tokens per second: for each L, all rows draft L tokens, or row r drafts its k-th token only if
``a_r^k`` is worth more than the time that another row adds to the proxy's forward. Where the best
round promises less than the plain loop (with a margin), the plain loop runs; several such verdicts
one after the other switch drafting off for good.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

__all__ = ["AdaptiveLength", "CostModel", "FixedLength", "ForwardCost", "draft_length"]

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


class ForwardCost:
    """Seconds of a forward over ``tokens`` tokens: a line through what was measured.

    Least squares in which an observation's weight fades; the first one, which warms up everything,
    is left out, and outliers are cut down.
    """

    MEMORY = 0.97
    # Share of a forward's time that grows with its tokens, while all had the same number.
    GUESS = 0.3

    def __init__(self) -> None:
        self.fixed = self.slope = 0.0
        self.count = 0
        self._sums = np.zeros(5)

    def add(self, tokens: int, seconds: float) -> None:
        """Count one forward."""
        self.count += 1
        if self.count == 1:
            self.slope = self.GUESS * seconds / tokens
            self.fixed = (1.0 - self.GUESS) * seconds
            return
        if self.count > 4:
            seconds = min(seconds, 3.0 * self(tokens))
        x, y = float(tokens), seconds
        self._sums = self.MEMORY * self._sums + (1.0, x, x * x, y, x * y)
        weight, sx, sxx, sy, sxy = self._sums.tolist()
        spread = weight * sxx - sx * sx
        if spread > 1e-9 * weight * sxx:
            self.slope = max((weight * sxy - sx * sy) / spread, 0.0)
        else:
            self.slope = self.GUESS * sy / sx
        self.fixed = (sy - self.slope * sx) / weight
        if self.fixed < 0.0:
            self.fixed, self.slope = 0.0, sxy / sxx

    def __call__(self, tokens: float) -> float:
        """Predicted seconds; 0 before anything was measured."""
        return self.fixed + self.slope * tokens


@dataclass
class CostModel:
    """The module's cost model, its quantities measured or given.

    Attributes:
        steps: costs of a token a row for the models that run once a round (the base; all but the
            drafting expert).
        scores: the same models' costs of several tokens a row.
        proxy: cost of the model that drafts.
        dense: the proxy runs at every step of the plain loop and once more in every round.
        deferral: D, share of tokens that come from the proxy.
        own_plain: seconds of a plain step outside the models.
        own_round: the same of a round, for each of its L + 1 positions.
    """

    steps: list[ForwardCost]
    scores: list[ForwardCost]
    proxy: ForwardCost
    dense: bool
    deferral: float = 0.5
    own_plain: float = 0.0
    own_round: float = 0.0

    def plain(self, rows: int) -> float:
        """Seconds of a plain step."""
        scored = sum(cost(rows) for cost in self.steps)
        if self.dense:
            return scored + self.proxy(rows) + self.own_plain
        called = 1.0 - (1.0 - self.deferral) ** rows
        return scored + called * self.proxy.fixed + rows * self.proxy.slope + self.own_plain

    def round(self, lengths: np.ndarray, rates: np.ndarray) -> tuple[float, float]:
        """Expected tokens and seconds of a round.

        Args:
            lengths: draft length of each row.
            rates: chance that a draft token stands, of each row.
        """
        rows, longest = len(lengths), int(lengths.max())
        powers = rates[:, None] ** np.arange(1, longest + 1)
        tokens = rows + float(powers[np.arange(longest) < lengths[:, None]].sum())
        seconds = 0.0
        for step, score in zip(self.steps, self.scores, strict=True):
            # Before anything was measured: at no extra cost.
            seconds += score(rows * (longest + 1)) if score.count else step(rows)
        seconds += sum(self.proxy(float((lengths >= j).sum())) for j in range(longest))
        whole = float((rates**lengths).sum())
        called = 1.0 if self.dense else min(1.0, self.deferral * whole)
        seconds += called * self.proxy(rows if self.dense else 1)
        return tokens, seconds + self.own_round * (longest + 1)

    def choose(
        self, rates: np.ndarray, room: np.ndarray, longest: int
    ) -> tuple[np.ndarray, float, float]:
        """The best lengths, and tokens per second with them and in the plain loop.

        Args:
            rates: chance that a draft token stands, of each row.
            room: longest draft of each row.
            longest: longest draft of all.
        """
        rows = len(rates)
        plain = rows / max(self.plain(rows), 1e-12)
        best, speed = np.zeros(rows, dtype=np.int64), 0.0
        powers = rates[:, None] ** np.arange(1, longest + 1)
        for limit in range(1, min(longest, int(room.max())) + 1):
            worth = powers[:, :limit] > max(speed, plain) * self.proxy.slope
            everyone = np.minimum(room, limit)
            for lengths in (everyone, np.minimum(worth.sum(1), everyone)):
                if not lengths.any():
                    continue
                tokens, seconds = self.round(lengths, rates)
                if tokens / max(seconds, 1e-12) > speed:
                    best, speed = lengths, tokens / max(seconds, 1e-12)
        return best, speed, plain


@dataclass
class _Tally:
    accepted: float = 0.0
    judged: float = 0.0

    def add(self, accepted: int, judged: int, memory: float) -> None:
        self.accepted = memory * self.accepted + accepted
        self.judged = memory * self.judged + judged

    def rate(self, prior: float, weight: float) -> float:
        return (self.accepted + weight * prior) / (self.judged + weight)


@dataclass
class AdaptiveLength:
    """Draft lengths that follow what was measured; see the module's text for the model.

    It starts with a few plain steps, which tell the base's cost. If even drafts that nearly always
    stand could not pay, given the models' sizes, nothing is drafted. Otherwise a short draft
    tells what longer forwards cost, and from then on the model decides.

    Args:
        scorers: number of models that run once a round.
        dense: as in :class:`CostModel`.
        ratio: the proxy's size over the base's, a guess at its cost before it has run.

    Attributes:
        longest: longest draft.
        on: drafting has not been switched off.
        note: why it was, in one sentence.
    """

    scorers: int
    dense: bool
    ratio: float
    longest: int = 8
    note: str = ""
    on: bool = True
    costs: CostModel = field(init=False)

    PLAIN_STEPS = 3
    PROBE_LENGTH = 2
    PROBE_TOKENS = 4
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
        self.costs = CostModel(
            [ForwardCost() for _ in range(self.scorers)],
            [ForwardCost() for _ in range(self.scorers)],
            ForwardCost(),
            self.dense,
        )
        self._all = _Tally()
        self._rows: dict[int, _Tally] = {}
        self._sources = _Tally()
        self._plain = self._rounds = self._against = 0
        self._probe = self._tried = self.PROBE_LENGTH

    def begin(self) -> None:
        """A new batch: its rows have no history."""
        self._rows.clear()

    # ---- decisions ---------------------------------------------------------------------------

    def plan(self, rows: Sequence[int], room: Sequence[int]) -> list[int] | None:
        """Draft lengths of the active rows, or None for a plain step; as :class:`FixedLength`."""
        if not self.on or not any(room):
            return None
        if self._plain < self.PLAIN_STEPS:
            return None
        if not self.costs.proxy.count:
            self.costs.proxy.fixed = self.ratio * self.costs.steps[0](len(rows))
        most = np.asarray(room, dtype=np.int64)
        if not self._rounds:
            if not self._may_pay(most):
                return None
            return [min(self._probe, one) for one in room]
        rates = np.array([self.rate(row) for row in rows])
        # Little evidence is read hopefully: drafting teaches more than the plain loop does.
        doubt = np.sqrt(rates * (1.0 - rates) / (self._all.judged + self.WEIGHT))
        rates = np.minimum(rates + self.DOUBT * doubt, self.MOST)
        # What a forward of many columns costs is known where it was tried.
        longest = min(self.longest, 2 * self._tried + 1)
        lengths, speed, plain = self.costs.choose(rates, most, longest)
        # A model's first forward of many columns takes longer than the next ones.
        margin = self.MARGIN if self._rounds > 1 else self.FIRST_MARGIN
        if speed > margin * plain:
            self._against = 0
            self._tried = max(self._tried, int(lengths.max()))
            return lengths.tolist()
        self._against += 1
        if self._against >= self.PATIENCE:
            self._stop(
                f"{self._all.rate(self.PRIOR, 0.01):.0%} of the draft tokens stood, with which the "
                f"best draft would run at {speed / plain:.2f}x the speed of the plain loop"
            )
        return None

    def _may_pay(self, room: np.ndarray) -> bool:
        """Whether drafts that mostly stand, verified at no extra cost, would be faster."""
        rates = np.full(len(room), self.HOPE)
        lengths, speed, plain = self.costs.choose(rates, room, self.longest)
        # Few rows teach little about acceptance unless their drafts are longer.
        wanted = max(self.PROBE_LENGTH, self.PROBE_TOKENS // len(room))
        self._probe = min(wanted, max(1, int(lengths.max())))
        self._tried = max(self._tried, self._probe)
        if speed > self.MARGIN * plain:
            return True
        self._stop(
            f"even if {self.HOPE:.0%} of the draft tokens stood, the best draft would run at "
            f"{speed / plain:.2f}x the speed of the plain loop"
        )
        return False

    def _stop(self, reason: str) -> None:
        self.on = False
        self.note = f"speculative decoding is off: {reason}"
        log.warning(self.note)

    def rate(self, row: int) -> float:
        """Chance that a draft token of a row stands, drawn towards that of all rows."""
        common = self._all.rate(self.PRIOR, self.WEIGHT)
        return min(self._rows.get(row, _Tally()).rate(common, self.WEIGHT), self.MOST)

    # ---- measurements ------------------------------------------------------------------------

    def proxy_ran(self, rows: int, columns: int, seconds: float) -> None:
        """A forward of the model that drafts took so long."""
        self.costs.proxy.add(rows * columns, seconds)

    def scorer_ran(self, which: int, rows: int, columns: int, seconds: float) -> None:
        """A forward of another model took so long; the base is number 0."""
        costs = self.costs.steps if columns == 1 else self.costs.scores
        costs[which].add(rows * columns, seconds)

    def judged(self, row: int, accepted: int, judged: int) -> None:
        """A row's draft was judged up to its first rejection."""
        self._all.add(accepted, judged, 0.995)
        self._rows.setdefault(row, _Tally()).add(accepted, judged, 0.9)

    def stepped(self, positions: int, own_seconds: float, deferred: int, tokens: int) -> None:
        """A step is over.

        Args:
            positions: L + 1, or 0 for a plain step.
            own_seconds: its time outside the models.
            deferred, tokens: what it emitted.
        """
        costs = self.costs
        self._sources.add(deferred, tokens, self.MEMORY)
        costs.deferral = self._sources.rate(0.5, 1.0)
        if positions:
            self._rounds += 1
            costs.own_round = _fade(costs.own_round, own_seconds / positions, self._rounds)
        else:
            self._plain += 1
            costs.own_plain = _fade(costs.own_plain, own_seconds, self._plain)
        if not self._rounds:
            costs.own_round = costs.own_plain


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
