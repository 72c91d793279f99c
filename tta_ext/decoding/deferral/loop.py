"""The decoding loop: rows advance together, leave when done, and each step draws one token a row.

:class:`Loop` owns what every method of decoding shares: the rows, logits processors and criteria,
sources, traces, events, time. How a step's tokens come about is a subclass's :meth:`Loop.draw`:

* :class:`LazyDeferral`: rules that look at the base alone; the proxy runs for rejected rows only.
* :class:`DenseDeferral`: rules that compare both models; the proxy runs at every step.
* :class:`~tta_ext.decoding.deferral.implicit_reward.ImplicitRewardLoop`: tilting by experts.

The step is kept thin: outputs are preallocated, and the host waits for the device once; twice where
a lazy proxy replaced a token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from tta_ext import ops
from tta_ext.decoding.deferral.options import AnswerBudget
from tta_ext.decoding.deferral.result import DecodeStats
from tta_ext.decoding.deferral.step import AskProxy, Drawn, deferral_step
from tta_ext.decoding.deferral.trace import TokenTrace, trace_step
from tta_ext.decoding.runtime.interface import ModelRunner
from tta_ext.decoding.runtime.processors import SequenceView
from tta_ext.decoding.runtime.rows import Limits, Rows

__all__ = ["Deferral", "DenseDeferral", "Emission", "LazyDeferral", "Loop", "LoopOptions", "Seen"]


@dataclass(frozen=True)
class Emission:
    """One token that a step produced: answer, id, source, and why the answer ended if it did."""

    row: int
    token: int
    deferred: bool
    finish: str | None


@dataclass(frozen=True)
class Seen:
    """The logits that some rows' tokens were drawn from.

    Attributes:
        base: ``[rows, V]``.
        others: name and logits of every other model, and the places of the rows that these belong
            to (None for all).
    """

    base: Tensor
    others: Sequence[tuple[str, Tensor, Sequence[int] | None]] = ()

    def select(self, places: Sequence[int]) -> Seen:
        """The same of some of the rows."""
        others: list[tuple[str, Tensor, Sequence[int] | None]] = []
        for name, logits, rows in self.others:
            have = range(len(self.base)) if rows is None else rows
            kept = [j for j, row in enumerate(have) if row in places]
            others.append((name, logits[kept], [places.index(have[j]) for j in kept]))
        return Seen(self.base[list(places)], others)

    def at(self, place: int) -> dict[str, Tensor]:
        """Each model's logits ``[V]`` of one row."""
        found = {"base": self.base[place]}
        for name, logits, rows in self.others:
            if rows is None:
                found[name] = logits[place]
            elif place in rows:
                found[name] = logits[rows.index(place)]
        return found


@dataclass
class LoopOptions:
    """What a loop needs to know besides its models; see :meth:`KnapsackDeferral.generate`.

    Attributes:
        rule: a :class:`tta_ext.rules.Rule`, or what another method has in its place.
        seed: int64 ``[1]`` on the base's device.
        sequence: sequence id of each row.
        limits: when a row ends.
        title: what messages call row i.
        errors: what becomes of a row whose logits make no law; see
            :class:`~tta_ext.decoding.runtime.rows.Rows`.
        trace: keep a :class:`TokenTrace` a token: ``"full"`` runs the proxy at every step for
            ``q``, ``"lazy"`` only where it is needed anyway; None keeps none.
        events: keep each step's emissions in :attr:`Loop.events`.
        budget: bounds the tokens of an answer that followers write; None: nothing does.
    """

    rule: Any
    seed: Tensor
    sequence: Sequence[int]
    limits: Limits
    title: Callable[[int], str]
    errors: str = "raise"
    do_sample: bool = True
    processors: Any = None
    criteria: Any = None
    context: SequenceView | None = None
    trace: str | None = None
    events: bool = False
    progress: Callable[[int], None] | None = None
    budget: AnswerBudget | None = None


class Loop(ABC):
    """Base class of the decoding loops.

    Args:
        base: the base model's runner.
        followers: runners of the other models, same rows.
        options: see :class:`LoopOptions`.

    Attributes:
        rows: the answers.
        deferred: for each answer's tokens, whether a follower wrote them.
        trace: for each answer's tokens, their accounts; empty without ``options.trace``.
        events: what the latest step emitted, with ``options.events``.
        rule: the options' rule for the active rows.
    """

    # Whether logits processors change the followers' logits too.
    processed = True

    def __init__(
        self, base: ModelRunner, followers: Sequence[ModelRunner], options: LoopOptions
    ) -> None:
        count = base.count
        self.base, self.options = base, options
        self.followers: Sequence[ModelRunner] = list(followers)
        self.rows = Rows(list(base.lengths), options.limits, options.title, options.errors)
        self.deferred: list[list[bool]] = [[] for _ in range(count)]
        self.trace: list[list[TokenTrace]] = [[] for _ in range(count)]
        self.events: list[Emission] = []
        self.stats = DecodeStats()
        self._start_costs = [(r.seconds, r.calls, r.rows_run, r.tokens_run) for r in self.runners]
        self.rule = options.rule
        self.sequence = torch.tensor(list(options.sequence), dtype=torch.int64, device=base.device)
        self._token = torch.empty(count, dtype=torch.int64, device=base.device)
        self._deferred = torch.zeros(count, dtype=torch.bool, device=base.device)
        self._fed = False

    @property
    def runners(self) -> Sequence[ModelRunner]:
        """The base's and the followers'."""
        return [self.base, *self.followers]

    @property
    def done(self) -> bool:
        """Whether every row has finished."""
        return not self.rows.active

    def run(self) -> None:
        """Step until every row has finished."""
        while self.rows.active:
            self.step()

    @torch.inference_mode()
    def step(self) -> None:
        """Advance every active row by one token."""
        if self.done:
            return
        start = perf_counter()
        self.stats.row_steps += len(self.rows.active)
        self.events = []
        (token, tokens, flags), seen = self.draw()
        ended = self.emit(range(len(tokens)), tokens, flags, lambda: seen)
        # Only the base may take the token from the op's output: by the time a lazy proxy runs, the
        # next proposal has overwritten it.
        self.base.append(tokens, token)
        for runner in self.followers:
            runner.append(tokens)
        self._fed = True
        self.drop(ended)
        self.stats.steps += 1
        self.stats.seconds += perf_counter() - start

    @abstractmethod
    def draw(self) -> tuple[Drawn, Seen]:
        """A token for every active row, and what they were drawn from."""

    @abstractmethod
    def drawn(
        self,
        logits: Tensor,
        others: Sequence[Tensor | AskProxy],
        index: Tensor | None = None,
        position: Tensor | None = None,
        allowed: Sequence[bool] | None = None,
    ) -> Drawn:
        """The draws that belong to some positions of some rows, a function of the logits alone.

        Args:
            logits: the base's ``[N, V]``.
            others: the followers', as :func:`deferral_step` takes them.
            index: int64 ``[N]``, the row of each; None for all rows, one position each.
            position: int64 ``[N]``, tokens that stand before each; None for what stands now.
            allowed: for each, whether a follower may write it; None: everywhere.
        """

    def allowed(self, rows: Sequence[int] | None = None) -> list[bool] | None:
        """Whether a follower may write the next token of some active rows (None: of all), by the
        answers' budget; None without one.
        """
        budget, limits = self.options.budget, self.options.limits
        if budget is None:
            return None
        active = self.rows.active
        answers = active if rows is None else [active[row] for row in rows]
        return [
            budget.allows(sum(self.deferred[i]), len(self.rows.tokens[i]), limits.max_new_tokens)
            for i in answers
        ]

    def finish_stats(self) -> DecodeStats:
        """The run's counters, with the models' costs filled in."""
        stats = self.stats
        stats.runners = {runner.name: runner.kind for runner in self.runners}
        stats.tokens = sum(map(len, self.rows.tokens))
        stats.deferred_tokens = sum(map(sum, self.deferred))
        costs = [
            (r.seconds - s, r.calls - c, r.rows_run - n, r.tokens_run - t)
            for r, (s, c, n, t) in zip(self.runners, self._start_costs, strict=True)
        ]
        stats.base_seconds, stats.base_calls, _, stats.base_tokens = costs[0]
        for seconds, calls, rows, tokens in costs[1:]:
            stats.proxy_seconds += seconds
            stats.proxy_calls += calls
            stats.proxy_rows += rows
            stats.proxy_tokens += tokens
        return stats

    # ---- logits ------------------------------------------------------------------------------

    def logits(self, runner: ModelRunner) -> Tensor:
        """Logits of all rows after their last token, processed."""
        if self._fed:
            return self.process(runner, runner.step())
        # The first time: prompts, or what a conversation has added since the last turn.
        runner.prefill()
        return self.process(runner, runner.catch_up())

    def processes(self, runner: ModelRunner) -> bool:
        """Whether logits processors change what this model says."""
        return bool(self.options.processors) and (self.processed or runner is self.base)

    def process(self, runner: ModelRunner, logits: Tensor, rows: list[int] | None = None) -> Tensor:
        """A model's logits of some rows as draws see them: processed, on the base's device."""
        context = self.options.context
        if logits.device != self.base.device:
            logits = logits.to(self.base.device)
        if context is not None and self.processes(runner):
            logits = context.process(self.options.processors, logits, rows)
        return logits

    # ---- after the draw ----------------------------------------------------------------------

    def emit(
        self,
        rows: Sequence[int],
        tokens: Sequence[int],
        flags: Sequence[bool],
        seen: Callable[[], Seen],
    ) -> list[int]:
        """Add one token to some rows' answers and tell everyone who wants to know.

        Args:
            rows: places among the active rows, ascending.
            tokens, flags: for each, its token and whether a follower wrote it.
            seen: what they were drawn from, made where it is wanted; in the order of ``rows``.

        Returns:
            The rows that ended.
        """
        options, answers = self.options, self.rows
        place = {row: i for i, row in enumerate(rows)}
        ended = answers.emit(rows, tokens, lambda row: seen().at(place[row]))
        good = [i for i, token in enumerate(tokens) if token >= 0]
        for i in good:
            self.deferred[answers.active[rows[i]]].append(flags[i])
        if options.trace and good:
            for i, trace in enumerate(self._traces(rows, tokens, flags, seen())):
                if tokens[i] >= 0:
                    self.trace[answers.active[rows[i]]].append(trace)
        if options.context is not None and good:
            options.context.write([rows[i] for i in good], [tokens[i] for i in good])
            if options.criteria:
                stopped = options.context.stopped(
                    options.criteria, seen().base[good], [rows[i] for i in good]
                )
                for i, stop in zip(good, stopped, strict=True):
                    number = answers.active[rows[i]]
                    if stop and not answers.finish[number]:
                        answers.finish[number] = "stop"
                        ended.append(rows[i])
        if options.events:
            for row, token, flag in zip(rows, tokens, flags, strict=True):
                number = answers.active[row]
                self.events.append(Emission(number, token, flag, answers.finish[number] or None))
        return ended

    def _traces(
        self, rows: Sequence[int], tokens: Sequence[int], flags: Sequence[bool], seen: Seen
    ) -> list[TokenTrace]:
        device = seen.base.device
        _, proxy, known = seen.others[0] if seen.others else ("", None, None)
        return trace_step(
            seen.base,
            proxy,
            known,
            torch.tensor(tokens, device=device).clamp_(min=0),
            flags,
            self.rule.select(torch.tensor(list(rows), device=device)),
        )

    def drop(self, ended: Sequence[int]) -> None:
        """Take rows that have ended out of the batch."""
        if not ended:
            return
        kept = self.rows.drop(ended)
        if self.options.progress is not None:
            self.options.progress(len(self.rows.tokens) - len(kept))
        if not kept:
            return
        for runner in self.runners:
            runner.keep(kept)
        index = torch.tensor(kept, device=self.base.device)
        if self.options.context is not None:
            self.options.context.keep(kept)
        self.keep(index)

    def keep(self, index: Tensor) -> None:
        """Drop what this loop holds for rows that are not in ``index`` (ascending)."""
        count = len(index)
        self.sequence, self.rule = self.sequence[index], self.rule.select(index)
        self._token, self._deferred = self._token[:count], self._deferred[:count]


class Deferral(Loop):
    """A base and one proxy, under a :class:`~tta_ext.rules.Rule`."""

    def __init__(
        self, base: ModelRunner, followers: Sequence[ModelRunner], options: LoopOptions
    ) -> None:
        super().__init__(base, followers, options)
        (self.proxy,) = self.followers

    def drawn(
        self,
        logits: Tensor,
        others: Sequence[Tensor | AskProxy],
        index: Tensor | None = None,
        position: Tensor | None = None,
        allowed: Sequence[bool] | None = None,
    ) -> Drawn:
        (proxy,) = others
        return deferral_step(
            logits,
            proxy,
            self.rule if index is None else self.rule.select(index),
            seed=self.options.seed,
            position=self.base.total if position is None else position,
            sequence=self.sequence if index is None else self.sequence[index],
            do_sample=self.options.do_sample,
            out=ops.Proposal(self._token, self._deferred) if position is None else None,
            allowed=allowed,
        )


class LazyDeferral(Deferral):
    """Rules that look at the base alone: the proxy is asked only about rejected tokens.

    The proxy's prompt is not run before the first rejection; a row that needs the proxy feeds it
    all tokens that it has missed, in one call for all such rows. A proxy in lock-step is fed every
    row at every step: nothing is saved, and the tokens are the same.
    """

    _warm = False

    def draw(self) -> tuple[Drawn, Seen]:
        options, logits, stats = self.options, self.logits(self.base), self.stats
        if not self.proxy.lags:
            self.proxy.catch_up()  # its rows are fed at every step, whatever the rule asks
        everyone = self._proxy_logits(None, None) if options.trace == "full" else None
        asked: list[tuple[str, Tensor, Sequence[int] | None]] = []
        saved = len(logits)

        def ask(rows: list[int] | None, index: Tensor | None) -> Tensor:
            nonlocal saved
            saved -= len(logits) if rows is None else len(rows)
            if everyone is not None:
                return everyone if index is None else everyone.index_select(0, index)
            found = self._proxy_logits(rows, index)
            asked.append(("proxy", found, rows))
            return found

        drawn = self.drawn(logits, [ask], allowed=self.allowed())
        if self.proxy.lags:
            stats.proxy_rows_saved += saved
            stats.proxy_calls_saved += everyone is None and not asked
        if everyone is not None:
            asked = [("proxy", everyone, None)]
        return drawn, Seen(logits, asked)

    def _proxy_logits(self, rows: list[int] | None, index: Tensor | None) -> Tensor:
        if not self._warm:
            self.proxy.prefill()
            self._warm = True
        if index is not None and index.device != self.proxy.device:
            index = None
        return self.process(self.proxy, self.proxy.catch_up(rows, index), rows)


class DenseDeferral(Deferral):
    """Rules that compare both models: the proxy runs for every row at every step."""

    def draw(self) -> tuple[Drawn, Seen]:
        logits, proxy_logits = self.logits(self.base), self.logits(self.proxy)
        seen = Seen(logits, [("proxy", proxy_logits, None)])
        return self.drawn(logits, [proxy_logits], allowed=self.allowed()), seen
