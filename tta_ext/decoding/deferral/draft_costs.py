"""What a round of speculative decoding costs, and what it gains: the model behind draft lengths.

A forward over ``t`` tokens (rows times columns, padding included) takes ``c(t)`` seconds: what was
measured for that ``t``, else a line between the nearest that were. No single line would do: a step
of one token a row reads every weight for little arithmetic, several columns are bound by the
arithmetic, and matrix products change their algorithm in between. So the base has one table for
steps and another for forwards over several columns. A step of the plain loop with n rows, of which
a share D defers, gains n tokens in

    plain(n) = c_step(n) + overhead + c_proxy(n)                              proxy at every step
    plain(n) = c_step(n) + overhead + (1 - (1 - D)^n) fixed + n slope         lazy proxy

(the lazy proxy is called when some row defers, and is fed every token sooner or later; ``fixed``
and ``slope`` are those of one line through all its forwards). A round in which row r drafts K_r
tokens, L = max K_r, gains ``sum_r (1 + a_r + ... + a_r^K_r)`` tokens, a_r being the chance that a
draft token stands, in

    c_score(n (L + 1)) + (L + 1) overhead' + sum_{j < L} c_proxy(rows with K_r >= j) + bonus

where ``bonus`` is a proxy forward: always if the rule compares the models, otherwise with the
chance that a row whose whole draft stood defers its next token.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

__all__ = ["CostModel", "ForwardCost"]


class ForwardCost:
    """Seconds of a forward over ``tokens`` tokens, from what was measured.

    A table of running averages by number of tokens, and least squares through all observations,
    whose weight fades. The very first observation, which warms up everything, is left out of the
    line, and outliers are cut down.

    Attributes:
        fixed, slope: the line.
        count: number of observations.
        guessed: all had the same number of tokens, so the line's slope is a guess.
        each: seconds of a token in the cheapest prompt that was read; 0 before one was.
    """

    MEMORY = 0.97
    FADE = 0.15
    PROMPT = 8
    # How much worse than a prompt's a token's cost may be in a forward over few.
    WORSE = 1.25
    # Share of a forward's time that grows with its tokens, while all had the same number.
    GUESS = 0.3

    def __init__(self) -> None:
        self.fixed = self.slope = self.each = 0.0
        self.count = 0
        self.guessed = True
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)
        self._keys: list[int] = []
        self._table: dict[int, tuple[int, float]] = {}

    def add(self, tokens: int, seconds: float) -> None:
        """Count one forward."""
        self.count += 1
        if self.count > 4:
            seconds = min(seconds, 3.0 * self(tokens))
        seen, mean = self._table.get(tokens, (0, seconds))
        if not seen:
            insort(self._keys, tokens)
        elif seen == 1:  # the first one of its shape may have been slow
            mean = min(mean, seconds) if seconds < mean else 0.5 * (mean + seconds)
        else:
            mean += max(1.0 / (seen + 1), self.FADE) * (seconds - mean)
        self._table[tokens] = seen + 1, mean
        if self.count == 1:
            self.slope = self.GUESS * seconds / tokens
            self.fixed = (1.0 - self.GUESS) * seconds
            return
        x, y, keep = float(tokens), seconds, self.MEMORY
        weight, sx, sxx, sy, sxy = self._sums = (
            keep * self._sums[0] + 1.0,
            keep * self._sums[1] + x,
            keep * self._sums[2] + x * x,
            keep * self._sums[3] + y,
            keep * self._sums[4] + x * y,
        )
        spread = weight * sxx - sx * sx
        self.guessed = spread <= 1e-9 * weight * sxx
        if not self.guessed:
            self.slope = max((weight * sxy - sx * sy) / spread, 0.0)
        else:
            self.slope = self.GUESS * sy / sx
        self.fixed = (sy - self.slope * sx) / weight
        if self.fixed < 0.0:
            self.fixed, self.slope = 0.0, sxy / sxx

    def read_prompt(self, tokens: int, seconds: float) -> None:
        """Count a forward over a prompt, long enough that arithmetic bounds its time."""
        if tokens >= self.PROMPT:
            each = seconds / tokens
            self.each = min(self.each, each) if self.each else each

    def seen(self, tokens: int) -> int:
        """How many forwards over so many tokens were counted."""
        return self._table.get(tokens, (0, 0.0))[0]

    def near(self, tokens: int, factor: float) -> bool:
        """Whether a forward over about so many tokens was counted."""
        return any(tokens <= factor * key and key <= factor * tokens for key in self._keys)

    def scale(self, factor: float) -> None:
        """Everything takes ``factor`` times as long as it did."""
        self.fixed, self.slope = factor * self.fixed, factor * self.slope
        self.each *= factor
        weight, sx, sxx, sy, sxy = self._sums
        self._sums = (weight, sx, sxx, factor * sy, factor * sxy)
        self._table = {key: (n, factor * mean) for key, (n, mean) in self._table.items()}

    def __call__(self, tokens: float) -> float:
        """Predicted seconds; 0 before anything was measured."""
        keys, table = self._keys, self._table
        at = bisect_left(keys, tokens)
        if at < len(keys) and keys[at] == tokens:
            return table[keys[at]][1]
        if not keys:
            return self.fixed + self.slope * tokens
        if at == 0:
            return max(table[keys[0]][1] - self.slope * (keys[0] - tokens), 0.0)
        low = table[keys[at - 1]][1]
        if at < len(keys):
            high = table[keys[at]][1]
            return low + (high - low) * (tokens - keys[at - 1]) / (keys[at] - keys[at - 1])
        slope = self.slope
        if at > 1:  # costs bend upwards
            slope = max(slope, (low - table[keys[-2]][1]) / (keys[-1] - keys[-2]))
        return low + slope * (tokens - keys[-1])

    def most(self, tokens: int) -> float:
        """Seconds that it may take, pessimistic beyond what was measured."""
        if not self._keys or tokens <= self._keys[-1]:
            return self(tokens)
        largest = self._keys[-1]
        known = self._table[largest][1]
        most = known * tokens / largest
        if self.each:
            most = min(most, known + self.WORSE * self.each * (tokens - largest))
        return max(self(tokens), most)


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

    # How much longer a forward of few columns may take than one of a single column.
    JUMP: ClassVar[float] = 1.75
    # How much longer than a step for each column.
    LOSS: ClassVar[float] = 1.5

    def plain(self, rows: int) -> float:
        """Seconds of a plain step."""
        scored = sum(cost(rows) for cost in self.steps)
        if self.dense:
            return scored + self.proxy(rows) + self.own_plain
        called = 1.0 - (1.0 - self.deferral) ** rows
        if self.proxy.guessed:  # rather too little than too much
            return scored + called * self.proxy(1) + self.own_plain
        return scored + called * self.proxy.fixed + rows * self.proxy.slope + self.own_plain

    def round(self, lengths: Sequence[int], rates: Sequence[float]) -> tuple[float, float]:
        """Expected tokens and seconds of a round.

        Args:
            lengths: draft length of each row.
            rates: chance that a draft token stands, of each row.
        """
        rows, longest = len(lengths), max(lengths)
        seconds = self.own_round * (longest + 1)
        for step, score in zip(self.steps, self.scores, strict=True):
            # Before anything was measured: at no extra cost.
            seconds += score(rows * (longest + 1)) if score.count else step(rows)
        seconds += self._drafting(lengths)
        tokens, whole = float(rows), 0.0
        for length, rate in zip(lengths, rates, strict=True):
            power = 1.0
            for _ in range(length):
                power *= rate
                tokens += power
            whole += power
        if self.dense:
            return tokens, seconds + self.proxy(rows)
        return tokens, seconds + min(1.0, self.deferral * whole) * self.proxy(1)

    def _drafting(self, lengths: Sequence[int]) -> float:
        """Seconds of the proxy's forwards that draw drafts."""
        seconds, before, cost = 0.0, -1, 0.0
        for j in range(max(lengths)):
            drawing = sum(length >= j for length in lengths)
            if drawing != before:
                before, cost = drawing, self.proxy(drawing)
            seconds += cost
        return seconds

    def risk(self, lengths: Sequence[int]) -> float:
        """Seconds that a round may cost beyond the plain step it replaces if no draft token stands.

        A forward over more columns than any that was measured is taken to be dear.
        """
        rows, longest = len(lengths), max(lengths)
        seconds = self.own_round * (longest + 1) + self._drafting(lengths)
        if self.dense:
            seconds += self.proxy(rows)
        for step, score in zip(self.steps, self.scores, strict=True):
            tokens = rows * (longest + 1)
            if score.count:
                seconds += score.most(tokens)
                continue
            most = self.LOSS * (longest + 1) * step(rows)
            if score.each:
                most = min(most, self.JUMP * step(rows) + score.WORSE * score.each * tokens)
            seconds += most
        return seconds - self.plain(rows)

    def choose(
        self,
        rates: Sequence[float],
        room: Sequence[int],
        longest: int,
        spare: float = math.inf,
    ) -> tuple[list[int], float, float]:
        """The best lengths, and tokens per second with them and in the plain loop.

        For each L, all rows draft L tokens, or row r drafts its k-th token only if ``a_r^k`` is
        worth more than the time that another row adds to the proxy's forward.

        Args:
            rates: chance that a draft token stands, of each row.
            room: longest draft of each row.
            longest: longest draft of all.
            spare: seconds that may be at :meth:`risk`.
        """
        rows = len(rates)
        plain = rows / max(self.plain(rows), 1e-12)
        best, speed = [0] * rows, 0.0
        alike = max(rates) - min(rates) < 0.02
        for limit in range(1, min(longest, max(room)) + 1):
            options = [[min(most, limit) for most in room]]
            if not alike:
                worth = max(speed, plain) * self.proxy.slope
                options.append(
                    [
                        min(most, _worthwhile(rate, worth, limit))
                        for rate, most in zip(rates, options[0], strict=True)
                    ]
                )
            for lengths in options:
                if not any(lengths) or (spare < math.inf and self.risk(lengths) > spare):
                    continue
                tokens, seconds = self.round(lengths, rates)
                if tokens / max(seconds, 1e-12) > speed:
                    best, speed = lengths, tokens / max(seconds, 1e-12)
        return best, speed, plain


def _worthwhile(rate: float, worth: float, limit: int) -> int:
    """How many k from 1 to ``limit`` have ``rate^k > worth``."""
    if worth <= 0.0:
        return limit
    if rate <= worth or rate <= 0.0:
        return 0
    if rate >= 1.0:
        return limit
    return min(limit, math.ceil(math.log(worth) / math.log(rate)) - 1)
