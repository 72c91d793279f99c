"""The decoding loop: rows advance together, leave when done, and each step draws one token a row.

:class:`Loop` owns what every method of decoding shares: rows and their answers, stopping, logits
processors, traces, events, time. How a step's tokens come about is a subclass's :meth:`Loop.draw`:

* :class:`LazyDeferral`: rules that look at the base alone; the proxy runs for rejected rows only.
* :class:`DenseDeferral`: rules that compare both models; the proxy runs at every step.
* :class:`ImplicitReward`: tilting by experts' log-probability ratios.

The step is kept thin: outputs are preallocated, and the host waits for the device once or twice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tta_ext import ops, rng
from tta_ext.decoding.deferral.result import DecodeStats
from tta_ext.decoding.deferral.trace import TokenTrace, trace_step
from tta_ext.decoding.runtime.processors import SequenceView
from tta_ext.decoding.runtime.profiling import span
from tta_ext.decoding.runtime.runner import Runner
from tta_ext.decoding.runtime.stopping import StopStrings

__all__ = ["DenseDeferral", "Emission", "ImplicitReward", "LazyDeferral", "Loop", "LoopOptions"]


@dataclass(frozen=True)
class Emission:
    """One token that a step produced: answer, id, source, and why the answer ended if it did."""

    row: int
    token: int
    deferred: bool
    finish: str | None


@dataclass
class LoopOptions:
    """What a loop needs to know besides its models; see :meth:`KnapsackDeferral.generate`.

    Attributes:
        rule: keyword arguments that the deferral ops share (``rule``, ``param``, ``critical``,
            ``temperature``, ``rule_temperature``); for :class:`ImplicitReward` ``param`` is beta.
        seed: int64 ``[1]`` on the base's device.
        sequence: sequence id of each row.
        max_new_tokens: tokens after which an answer ends.
        ends: ids that end an answer.
        trace: keep a :class:`TokenTrace` a token: ``"full"`` runs the proxy at every step for
            ``q``, ``"lazy"`` only where it is needed anyway; None keeps none.
        events: keep each step's emissions in :attr:`Loop.events`.
    """

    rule: dict[str, Any]
    seed: Tensor
    sequence: Sequence[int]
    max_new_tokens: int
    do_sample: bool = True
    ends: frozenset[int] = frozenset()
    stop: StopStrings | None = None
    processors: Any = None
    criteria: Any = None
    context: SequenceView | None = None
    trace: str | None = None
    events: bool = False
    progress: Callable[[int], None] | None = None


@dataclass
class Answers:
    """The growing answers of all rows, finished or not."""

    tokens: list[list[int]]
    deferred: list[list[bool]]
    finish: list[str]
    trace: list[list[TokenTrace]] = field(default_factory=list)


class Loop(ABC):
    """Base class of the decoding loops.

    Args:
        base: the base model's runner.
        followers: runners of the other models, same rows.
        options: see :class:`LoopOptions`.
    """

    def __init__(self, base: Runner, followers: Sequence[Runner], options: LoopOptions) -> None:
        rows = base.count
        self.base, self.followers, self.options = base, list(followers), options
        self.active = list(range(rows))
        self.answers = Answers([[] for _ in range(rows)], [[] for _ in range(rows)], [""] * rows)
        if options.trace:
            self.answers.trace = [[] for _ in range(rows)]
        self.events: list[Emission] = []
        self.stats = DecodeStats()
        self._start_costs = [(r.seconds, r.calls, r.rows_run, r.tokens_run) for r in self._runners]
        self.sequence_ids = list(options.sequence)
        self.sequence = torch.tensor(self.sequence_ids, dtype=torch.int64, device=base.device)
        self.token = torch.empty(rows, dtype=torch.int64, device=base.device)
        self.deferred = torch.zeros(rows, dtype=torch.bool, device=base.device)
        self.rule = dict(options.rule)
        param = self.rule["param"]
        self._param_by_row = isinstance(param, Tensor) and param.numel() > 1
        self._fed = False

    @property
    def _runners(self) -> list[Runner]:
        return [self.base, *self.followers]

    @property
    def done(self) -> bool:
        """Whether every row has finished."""
        return not self.active

    @torch.inference_mode()
    def step(self) -> None:
        """Advance every active row by one token."""
        start = perf_counter()
        self.stats.row_steps += len(self.active)
        flags = self.draw()
        self._commit(self.token.tolist(), flags)
        self.stats.steps += 1
        self.stats.seconds += perf_counter() - start

    @abstractmethod
    def draw(self) -> list[bool]:
        """Put one token a row into ``self.token``; return which came from a follower."""

    def run(self) -> None:
        """Step until every row has finished."""
        while self.active:
            self.step()

    def finish_stats(self) -> DecodeStats:
        """The run's counters, with the models' costs filled in."""
        stats = self.stats
        stats.tokens = sum(map(len, self.answers.tokens))
        stats.deferred_tokens = sum(map(sum, self.answers.deferred))
        costs = [
            (r.seconds - s, r.calls - c, r.rows_run - n, r.tokens_run - t)
            for r, (s, c, n, t) in zip(self._runners, self._start_costs, strict=True)
        ]
        stats.base_seconds, stats.base_calls, _, stats.base_tokens = costs[0]
        for seconds, calls, rows, tokens in costs[1:]:
            stats.proxy_seconds += seconds
            stats.proxy_calls += calls
            stats.proxy_rows += rows
            stats.proxy_tokens += tokens
        return stats

    # ---- logits ------------------------------------------------------------------------------

    def logits(self, runner: Runner, process: bool = True) -> Tensor:
        """Logits of all rows after their last token; with the logits processors applied or not."""
        if self._fed:
            logits = runner.step()
        else:
            # The first time: prompts, or what a conversation has added since the last turn.
            runner.prefill()
            logits = runner.catch_up()
        if process:
            return self.process(logits, None)
        return logits if logits.device == self.base.device else logits.to(self.base.device)

    @property
    def _every(self) -> list[int]:
        return list(range(len(self.active)))

    def process(self, logits: Tensor, rows: list[int] | None) -> Tensor:
        """Apply the logits processors, and move to the base's device."""
        if logits.device != self.base.device:
            logits = logits.to(self.base.device)
        options = self.options
        if options.processors and options.context is not None:
            logits = options.context.process(options.processors, logits, rows)
        return logits

    # ---- after the draw ----------------------------------------------------------------------

    def _commit(self, tokens: list[int], flags: list[bool]) -> None:
        """Hand the step's tokens to everyone and take finished rows out."""
        options, answers = self.options, self.answers
        self._fed = True
        # Only the base may take the token from the op's output: by the time a lazy proxy runs, the
        # next proposal has overwritten it.
        self.base.append(tokens, self.token)
        for runner in self.followers:
            runner.append(tokens)
        finished = []
        for i, row in enumerate(self.active):
            if self._emit(row, tokens[i], flags[i]):
                finished.append(i)
        if options.context is not None:
            options.context.append(self.token)
            if options.criteria:
                finished = self._apply_criteria(finished)
        if options.events:
            self.events = [
                Emission(row, token, flag, answers.finish[row] or None)
                for row, token, flag in zip(self.active, tokens, flags, strict=True)
            ]
        if finished:
            self._drop(finished)
            if options.progress is not None:
                options.progress(len(answers.tokens) - len(self.active))

    def _emit(self, row: int, token: int, from_proxy: bool) -> bool:
        """Add a token to an answer; whether that ends it."""
        options, answers = self.options, self.answers
        tokens = answers.tokens[row]
        tokens.append(token)
        answers.deferred[row].append(from_proxy)
        if token in options.ends:
            answers.finish[row] = "eos"
        elif options.stop is not None and options.stop(tokens):
            answers.finish[row] = "stop"
        elif len(tokens) >= options.max_new_tokens:
            answers.finish[row] = "length"
        else:
            return False
        return True

    def _apply_criteria(self, finished: list[int]) -> list[int]:
        context = self.options.context
        assert context is not None
        stopped = context.stopped(self.options.criteria, self._base_logits)
        for i, stop in enumerate(stopped):
            row = self.active[i]
            if stop and not self.answers.finish[row]:
                self.answers.finish[row] = "stop"
                finished.append(i)
        return sorted(finished)

    def _drop(self, finished: list[int]) -> None:
        """Take finished rows out of the batch."""
        gone = set(finished)
        rows = [i for i in range(len(self.active)) if i not in gone]
        self.active = [self.active[i] for i in rows]
        if not rows:
            return
        for runner in self._runners:
            runner.keep(rows)
        index = torch.tensor(rows, device=self.base.device)
        if self.options.context is not None:
            self.options.context.keep(rows, index)
        self.keep(rows, index)

    def keep(self, rows: list[int], index: Tensor) -> None:
        """Drop what this loop keeps for rows that are not in ``rows`` (``index``: as a tensor)."""
        self.sequence_ids = [self.sequence_ids[i] for i in rows]
        self.sequence = self.sequence[index]
        self.token, self.deferred = self.token[: len(index)], self.deferred[: len(index)]
        if self._param_by_row:
            self.rule["param"] = self.rule["param"].index_select(0, index)

    # Of the latest step, for criteria and traces.
    _base_logits: Tensor

    def _record(
        self,
        proxy_logits: Tensor | None,
        rows: list[int] | None,
        flags: list[bool],
        needs_proxy: bool,
    ) -> None:
        traces = trace_step(
            self._base_logits, proxy_logits, rows, self.token, flags, self.rule, needs_proxy
        )
        for row, trace in zip(self.active, traces, strict=True):
            self.answers.trace[row].append(trace)


class LazyDeferral(Loop):
    """Rules that look at the base alone: the proxy is asked only about rejected tokens.

    The proxy's prompt is not run before the first rejection; a row that needs the proxy feeds it
    all tokens that it has missed, in one call for all such rows.
    """

    def __init__(self, base: Runner, followers: Sequence[Runner], options: LoopOptions) -> None:
        super().__init__(base, followers, options)
        (self.proxy,) = self.followers
        self._warm = False

    def draw(self) -> list[bool]:
        options = self.options
        logits = self._base_logits = self.logits(self.base)
        position = self.base.total
        with span("propose"):
            ops.deferral_propose(
                logits,
                **self.rule,
                seed=options.seed,
                position=position,
                sequence=self.sequence,
                do_sample=options.do_sample,
                out=ops.Proposal(self.token, self.deferred),
            )
        flags = self.deferred.tolist()
        rows = [i for i, flag in enumerate(flags) if flag]
        self.stats.proxy_rows_saved += len(flags) - len(rows)
        full = options.trace == "full"
        if not rows and not full:
            self.stats.proxy_calls_saved += 1
            if options.trace:
                self._record(None, None, flags, False)
            return flags
        asked = None if full or len(rows) == len(flags) else rows
        names = None
        if rows and len(rows) < len(flags):
            # Everything that goes by row number, in one small transfer.
            lengths, ids = self.base.lengths, self.sequence_ids
            table = (rows, [lengths[i] for i in rows], [ids[i] for i in rows])
            names = torch.from_numpy(np.array(table, dtype=np.int64)).to(self.base.device)
        if not self._warm:
            self.proxy.prefill()
            self._warm = True
        index = None
        if names is not None and asked is not None and self.proxy.device == self.base.device:
            index = names[0]
        proxy_logits = self.process(self.proxy.catch_up(asked, index), asked)
        if rows:
            with span("replace"):
                self._replace(names, logits, proxy_logits[rows] if full else proxy_logits)
            if not options.do_sample:
                flags = self.deferred.tolist()
        if options.trace:
            self._record(proxy_logits, asked, flags, False)
        return flags

    def _replace(self, names: Tensor | None, logits: Tensor, proxy_logits: Tensor) -> None:
        """Draw the tokens of some rows, whose proxy logits these are, with the proxy's help.

        Args:
            names: int64 ``[3, rows]``: row numbers, positions, sequence ids; None for all rows.
            logits: the base's, of all rows.
            proxy_logits: those of the rows asked for.
        """
        options, rule = self.options, self.rule
        everyone = names is None
        if names is None:
            position, sequence = self.base.total, self.sequence
        else:
            index, position, sequence = names
        if options.do_sample:
            token = ops.categorical_sample(
                proxy_logits,
                temperature=rule["temperature"],
                stream=rng.PROXY,
                seed=options.seed,
                position=position,
                sequence=sequence,
                out=self.token if everyone else None,
            )
            if not everyone:
                self.token.index_copy_(0, index, token)
            return
        # Greedy: `deferred` said "cannot tell without q".
        if not everyone:
            logits = logits.index_select(0, index)
            if self._param_by_row:
                rule = rule | {"param": rule["param"].index_select(0, index)}
        drawn = ops.deferral_sample(logits, proxy_logits, **rule, do_sample=False)
        if everyone:
            self.token.copy_(drawn.token)
            self.deferred.copy_(drawn.deferred)
        else:
            self.token.index_copy_(0, index, drawn.token)
            self.deferred.index_copy_(0, index, drawn.deferred)


class DenseDeferral(Loop):
    """Rules that compare both models: the proxy runs for every row at every step."""

    def __init__(self, base: Runner, followers: Sequence[Runner], options: LoopOptions) -> None:
        super().__init__(base, followers, options)
        (self.proxy,) = self.followers

    def draw(self) -> list[bool]:
        options = self.options
        logits = self._base_logits = self.logits(self.base)
        proxy_logits = self.logits(self.proxy)
        with span("sample"):
            ops.deferral_sample(
                logits,
                proxy_logits,
                **self.rule,
                seed=options.seed,
                position=self.base.total,
                sequence=self.sequence,
                do_sample=options.do_sample,
                out=ops.Proposal(self.token, self.deferred),
            )
        flags = self.deferred.tolist()
        if options.trace:
            self._record(proxy_logits, None, flags, True)
        return flags


class ImplicitReward(Loop):
    """Proxy tuning: ``log pi = log p + sum_e beta_e (log q_e - log q0_e) - log Z``.

    The first followers are the experts, then come as many anti-experts, or none. Logits processors
    change the base alone: in a ratio of experts they would cancel, or divide zero by zero.

    Args:
        experts: number of experts.
    """

    def __init__(
        self, base: Runner, followers: Sequence[Runner], options: LoopOptions, experts: int
    ) -> None:
        super().__init__(base, followers, options)
        self.experts = experts
        self._param_by_row = False  # beta has a value for each expert

    def draw(self) -> list[bool]:
        options = self.options
        logits = self._base_logits = self.logits(self.base)
        others = [self.logits(runner, process=False) for runner in self.followers]
        anti = others[self.experts :]
        with span("sample"):
            ops.implicit_reward_sample(
                logits,
                torch.stack(others[: self.experts]),
                torch.stack(anti) if anti else None,
                self.rule["param"],
                temperature=self.rule["temperature"],
                seed=options.seed,
                position=self.base.total,
                sequence=self.sequence,
                do_sample=options.do_sample,
                out=self.token,
            )
        return [False] * len(self.active)
