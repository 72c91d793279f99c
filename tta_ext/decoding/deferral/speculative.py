"""Speculative decoding that changes no token: drafts are guesses of what the plain loop will emit.

The plain loop's draws are functions of seed, sequence and position: the base's under stream BASE,
and where it is rejected the proxy's under stream PROXY. So a round of :class:`Speculative` guesses
K tokens, runs the models that did not guess once over all K + 1 positions, and puts the plain
loop's own question to each. The longest prefix that the plain loop would have emitted stands, the
first difference is emitted in its place, and behind a draft that stands whole comes one more plain
draw. Caches are rolled back by setting lengths. Where a model's rows advance in lock-step all rows
draft as many tokens, and a round ends for all at the first difference of any.

Given equal logits the tokens are the plain loop's, for every rule, seed, batch and draft length,
whatever is guessed. Who guesses:

* ``"proxy"``: the first follower.
* ``"base"``: the base, for a proxy that is slow: it then reads a whole draft at once.
* ``"lookup"``: nobody; what followed the same words before, in prompt or answer, may follow again.

A model guesses one of three tokens, whichever kind has been right most often in this call: the one
it finds most probable; what it draws with the random number that the plain loop would use if its
draw counted; or what the plain loop would emit if all models were this one. The first stands most
often where models are sure, the second where draws are mostly rejected, the third where neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import torch
from torch import Tensor

from tta_ext import ops, rng
from tta_ext.decoding.deferral.draft_length import DraftLength, StepReport
from tta_ext.decoding.deferral.implicit_reward import ImplicitRewardLoop
from tta_ext.decoding.deferral.lookup import Lookup
from tta_ext.decoding.deferral.loop import (
    Deferral,
    DenseDeferral,
    LazyDeferral,
    Loop,
    LoopOptions,
    Seen,
)
from tta_ext.decoding.deferral.result import DecodeStats
from tta_ext.decoding.deferral.step import AskProxy, Drawn
from tta_ext.decoding.runtime.interface import ModelRunner
from tta_ext.decoding.runtime.profiling import span

__all__ = ["Speculative", "SpeculativeDense", "SpeculativeImplicit", "SpeculativeLazy"]


class Speculative(Loop):
    """Rounds of drafting and judging, mixed with the plain steps of another loop.

    Args:
        base, followers, options: as in :class:`Loop`.
        policy: says how long drafts are; where it says None a plain step is taken.
        draft: who guesses, of :data:`~tta_ext.decoding.deferral.options.DRAFTS`.
    """

    def __init__(
        self,
        base: ModelRunner,
        followers: Sequence[ModelRunner],
        options: LoopOptions,
        *,
        policy: DraftLength,
        draft: str = "proxy",
    ) -> None:
        super().__init__(base, followers, options)
        self.policy = policy
        self._even = not all(runner.lags for runner in self.runners)
        self.drafter = {"proxy": followers[0], "base": base, "lookup": None}[draft]
        self._lookups = [Lookup() for _ in self.rows.tokens]
        self._drafts: list[list[int]] = []
        self._right = [0, 0, 0]  # how often each kind of guess was right
        self._guesses: list[list[list[int]]] = []  # of each row and position of this round
        # Of this round each model's logits behind the first tokens of the drafts, [rows, K + 1, V].
        self._columns: dict[str, Tensor] = {}
        self._read: list[int] = []  # tokens that processors saw before the round
        self._failed: list[bool] = []  # the rows whose drafting model had no law to draw from
        self._doubt = False  # a round ended before a position whose law a plain step has to tell
        self._draft_seconds = 0.0  # of the latest step

    @property
    def asks(self) -> bool:
        """Whether followers run only where the base's draw is rejected."""
        return isinstance(self, LazyDeferral) and self.options.trace != "full"

    def finish_stats(self) -> DecodeStats:
        self.stats.speculation = self.policy.note
        return super().finish_stats()

    def keep(self, index: Tensor) -> None:
        super().keep(index)
        self._lookups = [self._lookups[row] for row in index.tolist()]

    @torch.inference_mode()
    def step(self) -> None:
        """Advance every active row by one token or more."""
        start, answers, drafter = perf_counter(), self.rows, self.drafter
        rows, most = len(answers.active), self.options.limits.max_new_tokens
        lengths = self.policy.plan([most - len(answers.tokens[i]) - 1 for i in answers.active])
        if lengths is not None and drafter is None:
            self._drafts = [
                lookup.guess(self.base.tokens(i), length)
                for i, (lookup, length) in enumerate(zip(self._lookups, lengths, strict=True))
            ]
            lengths = list(map(len, self._drafts))
        if self._even and lengths is not None:
            # The first step reads the prompts as the plain loop does.
            lengths = [min(lengths) if self.stats.steps else 0] * rows
            self._drafts = [draft[: lengths[0]] for draft in self._drafts]
        accepted: list[int] = []
        begin, before = start, 0.0 if drafter is None else drafter.seconds
        if self._doubt or lengths is None or not any(lengths):
            self._doubt, self._drafts = False, []
            super().step()
            self._draft_seconds = 0.0 if drafter is None else drafter.seconds - before
        else:
            if self._fed or not self.stats.steps:  # what was missed is no cost of this round
                for runner in self.runners:
                    if not self.asks or runner in (self.base, drafter):
                        runner.prefill()
                        runner.settle()
            begin = perf_counter()
            accepted = self._round(lengths)
            self.stats.row_steps += rows
            self.stats.steps += 1
            self.stats.seconds += perf_counter() - start
        self.policy.report(
            StepReport(
                drafts=list(map(len, self._drafts)),
                accepted=accepted,
                rows=rows,
                seconds=perf_counter() - begin,
                draft_seconds=self._draft_seconds,
            )
        )

    # ---- a round -----------------------------------------------------------------------------

    def _round(self, lengths: list[int]) -> list[int]:
        """Draft, judge, emit; how much of each draft stood."""
        context = self.options.context
        # A follower may be two tokens behind after a round, so a plain step must catch up.
        self.events, self._fed, self._columns = [], False, {}
        self._failed = [False] * len(lengths)
        starts = [list(runner.lengths) for runner in self.runners]
        self._read = [] if context is None else context.lengths
        position = self.base.total.clone()
        begin = perf_counter()
        with span("draft"):
            if self.drafter is not None:
                self._drafts = self._draft(self.drafter, lengths, position)
        # Each draw waits for its forward, which on CUDA the runner's own clock does not.
        self._draft_seconds = perf_counter() - begin
        if context is not None and self.options.processors:
            if self.drafter is None:
                for k in range(max(lengths)):
                    rows = [i for i, length in enumerate(lengths) if length > k]
                    context.write(rows, [self._drafts[i][k] for i in rows])
            context.lengths = self._read
        with span("judge"):
            tokens, flags = self._judge(position)
        drafts, finish, active = self._drafts, self.rows.finish, self.rows.active
        accepted, tails, unknown = self._emit_drafts(tokens, flags)
        going = [i for i in range(len(drafts)) if not finish[active[i]]]
        behind = [i for i in going if not tails[i] and i not in unknown]
        if self._even and len(behind) < len(going):
            behind = []
        if behind:
            drawn, seen = self._behind(behind, position)
            more = drawn.tokens
            unknown |= {i for i, token in zip(behind, more, strict=True) if token < 0}
            known = [j for j, i in enumerate(behind) if i not in unknown]
            if self._even and len(known) < len(behind):
                known = []
            rows = [behind[j] for j in known]
            flags_of = [drawn.from_proxy[j] for j in known]
            self.emit(rows, [more[j] for j in known], flags_of, lambda: seen.select(known))
            for j in known:
                tails[behind[j]] = [more[j]]
        for runner, start in zip(self.runners, starts, strict=True):
            fed = runner.name in self._columns
            kept, rest = start.copy(), []
            for i, (draft, count) in enumerate(zip(drafts, accepted, strict=True)):
                kept[i] += count if fed else 0
                rest.append(tails[i] if fed else draft[:count] + tails[i])
            runner.rollback(kept, rest)
            for i, draft in enumerate(drafts):
                if i in unknown or self._failed[i] or min(tokens[i][: len(draft) + 1]) < 0:
                    runner.scrub(i)
        self._doubt = bool(unknown)
        self.drop([i for i in range(len(drafts)) if finish[active[i]]])
        return accepted

    def _draft(self, drafter: ModelRunner, lengths: list[int], position: Tensor) -> list[list[int]]:
        """Guesses of these lengths at most: an end of answer, or no law to draw from, ends one."""
        options, rows, lengths = self.options, len(lengths), lengths.copy()
        drafts: list[list[int]] = [[] for _ in lengths]
        self._guesses = [[] for _ in lengths]
        chosen = self._right.index(max(self._right))
        kept: Tensor | None = None
        step = 0
        while drawing := [i for i in range(rows) if lengths[i] > step]:
            whole = len(drawing) == rows
            logits = self.process(drafter, drafter.catch_up(None if whole else drawing), drawing)
            index = torch.tensor(drawing, device=logits.device)
            if kept is None:
                # Zeros: what was never written is judged with the rest, and not looked at.
                kept = logits.new_zeros((rows, max(lengths) + 1, logits.shape[-1]))
            kept[index, step] = logits
            token = self._guess(drafter, logits, index, position[index] + step)
            guesses = token.tolist()
            tokens = [guess[chosen] for guess in guesses]
            if self._even and min(tokens) < 0:
                self._failed = [one < 0 for one in tokens]
                break
            good = [j for j, one in enumerate(tokens) if one >= 0]
            fed = [drawing[j] for j in good]
            if len(fed) == rows:
                newest = token[:, chosen].contiguous()
                drafter.append(tokens, newest if newest.device == drafter.device else None)
            elif fed:
                drafter.extend(fed, [tokens[j] for j in good])
            if options.context is not None and options.processors and fed:
                options.context.write(fed, [tokens[j] for j in good])
            step += 1
            for i, one, guess in zip(drawing, tokens, guesses, strict=True):
                if one >= 0:
                    drafts[i].append(one)
                    self._guesses[i].append(guess)
                if one < 0 or one in options.limits.ends:
                    lengths[i] = step
                self._failed[i] = one < 0
            if self._even:
                lengths = [min(lengths)] * rows
        assert kept is not None
        self._columns[drafter.name] = kept[:, : 1 + max(map(len, drafts))]
        return drafts

    def _guess(
        self, drafter: ModelRunner, logits: Tensor, index: Tensor, position: Tensor
    ) -> Tensor:
        """Each kind of guess for some rows, ``[N, kinds]``; one kind where nothing is drawn."""
        options = self.options
        replaces = isinstance(self, Deferral) and drafter is not self.base
        found = [
            ops.categorical_sample(
                logits,
                temperature=self.rule.temperature,
                stream=rng.PROXY if replaces else rng.BASE,
                seed=options.seed,
                position=position,
                sequence=self.sequence[index],
                do_sample=do_sample,
                check=False,
            )
            for do_sample in (False, True)[: 1 + options.do_sample]
        ]
        if options.do_sample:
            found.append(self.drawn(logits, [logits] * len(self.followers), index, position).token)
        return torch.stack(found, 1)

    def _over(self, runner: ModelRunner) -> Tensor:
        """A model's logits ``[rows, 1 + longest draft, V]``, processed; run at the first call."""
        if runner.name not in self._columns:
            runner.prefill()
            logits = runner.score(self._drafts)
            context = self.options.context
            if context is None or not self.processes(runner):
                logits = self.process(runner, logits)
            else:
                now, raw = context.lengths, logits
                logits = torch.zeros(raw.shape, dtype=torch.float32, device=self.base.device)
                for k in range(raw.shape[1]):
                    rows = [i for i, draft in enumerate(self._drafts) if len(draft) >= k]
                    context.lengths = [length + k for length in self._read]
                    logits[rows, k] = self.process(runner, raw[rows, k], rows)
                context.lengths = now
            self._columns[runner.name] = logits
        return self._columns[runner.name]

    def _judge(self, position: Tensor) -> tuple[list[list[int]], list[list[bool]]]:
        """What the plain loop emits at each position, if all before it stood, and from where.

        What is said of positions that no draft reaches means nothing, nor what is said behind a
        draft of a model.
        """
        rows, columns, _ = self._over(self.base).shape
        index = torch.arange(rows, device=position.device).repeat_interleave(columns)
        places = position[:, None] + torch.arange(columns, device=position.device)

        def ask(_: list[int] | None, which: Tensor | None) -> Tensor:
            logits = self._over(self.followers[0]).flatten(0, 1)
            return logits if which is None else logits[which]

        others: list[Tensor | AskProxy] = [ask]
        if not self.asks:
            others = [self._over(runner).flatten(0, 1) for runner in self.followers]
        logits, places = self._over(self.base).flatten(0, 1), places.flatten()
        drawn = self.drawn(logits, others, index, places)
        parts = [slice(i * columns, (i + 1) * columns) for i in range(rows)]
        tokens = [drawn.tokens[part] for part in parts]
        flags = [drawn.from_proxy[part] for part in parts]
        if (budget := self.options.budget) is not None:
            # Whether the proxy may write hangs on what it wrote before: both answers to each.
            barred = self.drawn(logits, others, index, places, [False] * len(logits)).tokens
            most = self.options.limits.max_new_tokens
            for i, answer in enumerate(self.rows.active):
                spent, written = sum(self.deferred[answer]), len(self.rows.tokens[answer])
                for k in range(columns):
                    if not budget.allows(spent, written + k, most):
                        tokens[i][k], flags[i][k] = barred[i * columns + k], False
                    spent += flags[i][k]
        return tokens, flags

    def _emit_drafts(
        self, tokens: list[list[int]], flags: list[list[bool]]
    ) -> tuple[list[int], list[list[int]], set[int]]:
        """Emit each row up to its first difference.

        Returns:
            How many draft tokens of each row stood, what was emitted behind them, and the rows for
            which a position without a law was reached. Its cause may be a wrong guess, whose NaN
            reaches earlier positions of the same forward through the mask, so a plain step has to
            tell.
        """
        stats, drafts, unknown = self.stats, self._drafts, set()
        accepted, tails = [0] * len(drafts), [list[int]() for _ in drafts]
        # Where no model drafted, all models have run over the position behind a draft too.
        judged = [len(draft) + (self.drafter is None) for draft in drafts]
        going = list(range(len(drafts)))
        for k in range(max(judged)):
            going = [i for i in going if judged[i] > k]
            unknown |= {i for i in going if tokens[i][k] < 0}
            going = [i for i in going if i not in unknown] if not (self._even and unknown) else []

            def seen(rows: list[int] = going, k: int = k) -> Seen:
                known = {name: logits[rows, k] for name, logits in self._columns.items()}
                base = known.pop(self.base.name)
                return Seen(base, [(name, logits, None) for name, logits in known.items()])

            given = [tokens[i][k] for i in going]
            ended = self.emit(going, given, [flags[i][k] for i in going], seen)
            stood = [i for i in going if drafts[i][k : k + 1] == [tokens[i][k]]]
            for i in going:
                for kind, guess in enumerate(self._guesses[i][k] if self.drafter else ()):
                    self._right[kind] += guess == tokens[i][k]
                if i in stood:
                    accepted[i] += 1
                else:
                    tails[i] = [tokens[i][k]]
            even = not self._even or {*stood} >= {*going} - {*ended}
            going = [i for i in stood if i not in ended] if even else []
        for draft, count in zip(drafts, accepted, strict=True):
            if draft:
                stats.draft_tokens += len(draft)
                stats.judged_tokens += min(count + 1, len(draft))
                stats.accepted_tokens += count
                stats.accepted_lengths += [0] * (count + 1 - len(stats.accepted_lengths))
                stats.accepted_lengths[count] += 1
        return accepted, tails, unknown

    def _behind(self, rows: list[int], position: Tensor) -> tuple[Drawn, Seen]:
        """The plain loop's draw behind the whole drafts of some rows."""
        known: list[tuple[str, Tensor, Sequence[int] | None]] = []
        ends = list(map(len, self._drafts))

        def column(runner: ModelRunner, some: list[int] | None = None) -> Tensor:
            asked = rows if some is None else [rows[j] for j in some]
            if runner is self.drafter:
                found = self.process(runner, runner.catch_up(asked), asked)
            else:
                found = self._over(runner)[asked, [ends[i] for i in asked]]
            if runner is not self.base:
                known.append((runner.name, found, some))
            return found

        base = column(self.base)
        others: list[Tensor | AskProxy] = [lambda some, _: column(self.followers[0], some)]
        if not self.asks:
            others = [column(runner) for runner in self.followers]
        index = torch.tensor(rows, device=position.device)
        place = position[index] + torch.tensor([ends[i] for i in rows], device=position.device)
        return self.drawn(base, others, index, place, self.allowed(rows)), Seen(base, known)


class SpeculativeLazy(Speculative, LazyDeferral):
    """Drafts for rules that look at the base alone."""


class SpeculativeDense(Speculative, DenseDeferral):
    """Drafts for rules that compare both models."""


class SpeculativeImplicit(Speculative, ImplicitRewardLoop):
    """Drafts for ``implicit_reward``."""
