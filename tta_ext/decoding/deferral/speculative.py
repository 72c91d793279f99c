"""Speculative decoding that changes no token: drafts are guesses of what the plain loop will emit.

The plain loop's draws are functions of seed, sequence and position: the base's under stream BASE,
and where it is rejected the proxy's under stream PROXY. So a round of :class:`Speculative` lets the
proxy draw K tokens under stream PROXY, runs the base once over all K + 1 positions, and puts the
plain loop's own question to each: where the base's draw is rejected, the plain loop emits exactly
the drafted token; where it is kept, the draft stands if it is the same token. The longest prefix
that the plain loop would have emitted stands, the first difference is emitted in its place, and
behind a draft that stands whole comes one plain draw. Both caches are rolled back by setting
lengths.

Given equal logits the tokens are the plain loop's, for every rule, seed, batch and draft length. A
draft token is accepted with probability D + sum over kept v of p(v) q(v), D the deferred mass;
nothing can exceed sum min(pi, q), which :func:`tta_ext.ops.deferral_verify` reaches with other
random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import torch
from torch import Tensor

from tta_ext import ops, rng
from tta_ext.decoding.deferral.draft_length import DraftLength, StepReport
from tta_ext.decoding.deferral.implicit_reward import ImplicitRewardLoop
from tta_ext.decoding.deferral.loop import DenseDeferral, LazyDeferral, Loop, LoopOptions, Seen
from tta_ext.decoding.deferral.result import DecodeStats
from tta_ext.decoding.deferral.step import Drawn, deferral_step
from tta_ext.decoding.runtime.profiling import span
from tta_ext.decoding.runtime.runner import Runner

__all__ = ["Speculative", "SpeculativeDense", "SpeculativeImplicit", "SpeculativeLazy"]


class Speculative(Loop):
    """Rounds of drafting and judging, mixed with the plain steps of another loop.

    Args:
        base, followers, options: as in :class:`Loop`; the first follower drafts.
        policy: says how long drafts are; where it says None a plain step is taken.
    """

    # The stream whose draw from the drafting model is the likeliest token of the plain loop.
    stream = rng.PROXY
    # Logits processors apply to the drafting model.
    processed = True

    # Rows gain different numbers of tokens, and lose drafts again.
    base: Runner
    followers: Sequence[Runner]

    def __init__(
        self,
        base: Runner,
        followers: Sequence[Runner],
        options: LoopOptions,
        *,
        policy: DraftLength,
    ) -> None:
        super().__init__(base, followers, options)
        self.policy, self.drafter = policy, self.followers[0]
        # The drafting model's logits behind the first tokens of the drafts, [rows, K + 1, V].
        self._drafted: Tensor | None = None
        self._failed: list[bool] = []  # the rows whose drafting model had no law to draw from
        self._doubt = False  # a round ended before a position whose law a plain step has to tell
        self._draft_seconds = 0.0  # of the latest step

    @property
    def runners(self) -> Sequence[Runner]:
        return [self.base, *self.followers]

    def finish_stats(self) -> DecodeStats:
        self.stats.speculation = self.policy.note
        return super().finish_stats()

    @property
    def keeps_logits(self) -> bool:
        """The drafting model's logits are wanted after the draws from them."""
        return not self.options.do_sample or self.options.trace is not None

    @torch.inference_mode()
    def step(self) -> None:
        """Advance every active row by one token or more."""
        start, answers = perf_counter(), self.rows
        rows, most = len(answers.active), self.options.limits.max_new_tokens
        lengths = self.policy.plan([most - len(answers.tokens[i]) - 1 for i in answers.active])
        drafts: list[list[int]] = []
        accepted: list[int] = []
        begin, self._draft_seconds = start, -self.drafter.seconds
        if self._doubt or lengths is None or not any(lengths):
            self._doubt = False
            super().step()
            self._draft_seconds += self.drafter.seconds
        else:
            if self._fed or not self.stats.steps:  # what was missed is no cost of this round
                for runner in self.runners:
                    runner.prefill()
                    runner.settle()
            begin = perf_counter()
            drafts, accepted = self._round(lengths)
            self.stats.row_steps += rows
            self.stats.steps += 1
            self.stats.seconds += perf_counter() - start
        self.policy.report(
            StepReport(
                drafts=[len(draft) for draft in drafts],
                accepted=accepted,
                rows=rows,
                seconds=perf_counter() - begin,
                draft_seconds=self._draft_seconds,
            )
        )

    # ---- a round -----------------------------------------------------------------------------

    def _round(self, lengths: list[int]) -> tuple[list[list[int]], list[int]]:
        """Draft, judge, emit; the drafts and how much of each stood."""
        context = self.options.context
        self.events = []
        # A follower may be two tokens behind after a round, so a plain step must catch up.
        self._fed = False
        starts = [list(runner.lengths) for runner in self.runners]
        read = None if context is None else context.lengths
        position = self.base.total.clone()
        begin = perf_counter()
        with span("draft"):
            drafts = self._draft(list(lengths), position)
        # Each draw waits for its forward, which on CUDA the runner's own clock does not.
        self._draft_seconds = perf_counter() - begin
        logits = self._score(drafts, read)
        if context is not None and read is not None:
            context.lengths = read
        with span("judge"):
            tokens, flags = self._judge(logits, drafts, position)
        accepted, unknown = self._emit_drafts(drafts, tokens, flags, logits)
        finish, active = self.rows.finish, self.rows.active
        tails: list[list[int]] = [[] for _ in drafts]
        behind = []
        for i, count in enumerate(accepted):
            if count < len(drafts[i]):
                tails[i] = [] if i in unknown else [tokens[i][count]]
            elif not finish[active[i]]:
                behind.append(i)
        if behind:
            drawn, seen = self._behind(behind, [len(drafts[i]) for i in behind], logits, position)
            more = drawn.token.tolist()
            unknown |= {i for i, token in zip(behind, more, strict=True) if token < 0}
            known = [j for j, i in enumerate(behind) if i not in unknown]
            rows = [behind[j] for j in known]
            flags_of = [drawn.from_proxy[j] for j in known]
            self.emit(rows, [more[j] for j in known], flags_of, lambda: seen.select(known))
            for j in known:
                tails[behind[j]] = [more[j]]
        for runner, start in zip(self.runners, starts, strict=True):
            kept = [n + count for n, count in zip(start, accepted, strict=True)]
            runner.rollback(kept, tails)
            for i, draft in enumerate(drafts):
                if i in unknown or self._failed[i] or min(tokens[i][: len(draft) + 1]) < 0:
                    runner.scrub(i)
        self._doubt = bool(unknown)
        self.drop([i for i in range(len(drafts)) if finish[active[i]]])
        return drafts, accepted

    def _draft(self, lengths: list[int], position: Tensor) -> list[list[int]]:
        """Guesses of these lengths at most: an end of answer, or no law to draw from, ends one."""
        options, drafter, rows = self.options, self.drafter, len(lengths)
        drafts: list[list[int]] = [[] for _ in lengths]
        self._drafted, self._failed = None, [False] * rows
        step = 0
        while drawing := [i for i in range(rows) if lengths[i] > step]:
            whole = len(drawing) == rows
            logits = self._own(drafter.catch_up(None if whole else drawing), drawing)
            index = None if whole else torch.tensor(drawing, device=logits.device)
            if self.keeps_logits:
                self._keep(logits, index, step, max(lengths))
            place, sequence = position + step, self.sequence
            token = ops.categorical_sample(
                logits,
                temperature=self.rule.temperature,
                stream=self.stream,
                seed=options.seed,
                position=place if index is None else place[index],
                sequence=sequence if index is None else sequence[index],
                do_sample=options.do_sample,
                check=False,
            )
            tokens = token.tolist()
            good = [j for j, one in enumerate(tokens) if one >= 0]
            fed = [drawing[j] for j in good]
            if len(fed) == rows:
                drafter.append(tokens, token if token.device == drafter.device else None)
            elif fed:
                drafter.extend(fed, [tokens[j] for j in good])
            if options.context is not None and options.processors and fed:
                options.context.write(fed, [tokens[j] for j in good])
            for i, one in zip(drawing, tokens, strict=True):
                if one >= 0:
                    drafts[i].append(one)
                if one < 0 or one in options.limits.ends:
                    lengths[i] = len(drafts[i])
                self._failed[i] = one < 0
            step += 1
        return drafts

    def _own(self, logits: Tensor, rows: list[int]) -> Tensor:
        """The drafting model's logits of some rows as its draws see them."""
        return self.process(logits, rows) if self.processed else self.at_base(logits)

    def _keep(self, logits: Tensor, index: Tensor | None, step: int, longest: int) -> None:
        if self._drafted is None:
            # Zeros: what was never written is judged with the rest, and not looked at.
            shape = (len(self.rows.active), longest + 1, logits.shape[-1])
            self._drafted = logits.new_zeros(shape)
        if index is None:
            self._drafted[:, step] = logits
        else:
            self._drafted[index, step] = logits

    def _score(self, drafts: list[list[int]], read: list[int] | None) -> Tensor:
        """The base's logits ``[rows, 1 + longest draft, V]``, processed."""
        context, processors = self.options.context, self.options.processors
        logits = self.base.score(drafts)
        if not processors or context is None or read is None:
            return logits
        scores = torch.zeros(logits.shape, dtype=torch.float32, device=logits.device)
        for k in range(logits.shape[1]):
            rows = [i for i, draft in enumerate(drafts) if len(draft) >= k]
            context.lengths = [length + k for length in read]
            index = torch.tensor(rows, device=logits.device)
            scores[index, k] = context.process(processors, logits[index, k], rows)
        return scores

    def _judge(
        self, logits: Tensor, drafts: list[list[int]], position: Tensor
    ) -> tuple[list[list[int]], list[list[bool]]]:
        """What the plain loop emits at each position, if all before it stood, and from where.

        What is said of positions that no draft reaches, and of the one behind a row's draft, means
        nothing.
        """
        rows, columns, size = logits.shape
        index = torch.arange(rows, device=logits.device).repeat_interleave(columns)
        places = position[:, None] + torch.arange(columns, device=logits.device)
        drawn = self._plain(logits.reshape(rows * columns, size), index, places.flatten(), drafts)
        tokens = drawn.token.view(rows, columns).tolist()
        flags = [drawn.from_proxy[i * columns : (i + 1) * columns] for i in range(rows)]
        return tokens, flags

    def _plain(
        self, logits: Tensor, index: Tensor, position: Tensor, drafts: list[list[int]]
    ) -> Drawn:
        """The plain loop's draws at all positions of a round, ``[rows * (K + 1)]``.

        Args:
            logits: the base's ``[rows * (K + 1), V]``.
            index: the row of each.
            position: and its position.
            drafts: the rows' drafts.
        """
        assert self._drafted is not None
        columns = len(index) // len(drafts)
        return deferral_step(
            logits,
            self._drafted[:, :columns].reshape(logits.shape),
            self.rule.select(index),
            seed=self.options.seed,
            position=position,
            sequence=self.sequence[index],
            do_sample=self.options.do_sample,
        )

    def _emit_drafts(
        self,
        drafts: list[list[int]],
        tokens: list[list[int]],
        flags: list[list[bool]],
        logits: Tensor,
    ) -> tuple[list[int], set[int]]:
        """Emit each row up to its first difference.

        Returns:
            How many draft tokens of each row stood, and the rows for which a position without a law
            was reached. Its cause may be a wrong guess, whose NaN reaches earlier positions of the
            same forward through the mask, so a plain step has to tell.
        """
        stats, unknown = self.stats, set()
        accepted = [0] * len(drafts)
        going = list(range(len(drafts)))
        for k in range(max(map(len, drafts))):
            unknown |= {i for i in going if len(drafts[i]) > k and tokens[i][k] < 0}
            going = [i for i in going if i not in unknown]
            now = [i for i in going if len(drafts[i]) > k]

            def seen(rows: list[int] = now, k: int = k) -> Seen:
                others = []
                if self._drafted is not None:
                    others = [(self.drafter.name, self._drafted[rows, k], None)]
                return Seen(logits[rows, k], others)

            ended = self.emit(now, [tokens[i][k] for i in now], [flags[i][k] for i in now], seen)
            for i in now:
                accepted[i] += tokens[i][k] == drafts[i][k]
            going = [
                i for i in going if i not in ended and accepted[i] == min(k + 1, len(drafts[i]))
            ]
        for draft, count in zip(drafts, accepted, strict=True):
            if draft:
                stats.draft_tokens += len(draft)
                stats.judged_tokens += min(count + 1, len(draft))
                stats.accepted_tokens += count
                stats.accepted_lengths += [0] * (count + 1 - len(stats.accepted_lengths))
                stats.accepted_lengths[count] += 1
        return accepted, unknown

    def _behind(
        self, rows: list[int], places: list[int], logits: Tensor, position: Tensor
    ) -> tuple[Drawn, Seen]:
        """The plain loop's draw behind the whole drafts of some rows."""
        index = torch.tensor(rows, device=logits.device)
        base = logits[rows, places]
        known: list[tuple[str, Tensor, Sequence[int] | None]] = []

        def ask(some: list[int] | None, _: Tensor | None) -> Tensor:
            asked = rows if some is None else [rows[j] for j in some]
            found = self._own(self.drafter.catch_up(asked), asked)
            known.append((self.drafter.name, found, some))
            return found

        everyone = self.rule.needs_proxy or self.options.trace == "full"
        q = ask(None, None) if everyone else None

        def answer(some: list[int] | None, which: Tensor | None) -> Tensor:
            return ask(some, which) if q is None else q if which is None else q[which]

        drawn = deferral_step(
            base,
            q if self.rule.needs_proxy and q is not None else answer,
            self.rule.select(index),
            seed=self.options.seed,
            position=position[index] + torch.tensor(places, device=logits.device),
            sequence=self.sequence[index],
            do_sample=self.options.do_sample,
        )
        return drawn, Seen(base, known)


class SpeculativeLazy(Speculative, LazyDeferral):
    """Drafts for rules that look at the base alone."""

    def _plain(
        self, logits: Tensor, index: Tensor, position: Tensor, drafts: list[list[int]]
    ) -> Drawn:
        if not self.options.do_sample:
            return super()._plain(logits, index, position, drafts)
        columns = len(index) // len(drafts)
        padded = [draft + [0] * (columns - len(draft)) for draft in drafts]
        replacement = torch.tensor(padded, dtype=torch.int64, device=logits.device).flatten()
        drawn = ops.deferral_propose(
            logits,
            rule=self.rule.select(index),
            seed=self.options.seed,
            position=position,
            sequence=self.sequence[index],
            check=False,
        )
        token = torch.where(drawn.deferred, replacement, drawn.token)
        return Drawn(token, drawn.deferred.tolist())


class SpeculativeDense(Speculative, DenseDeferral):
    """Drafts for rules that compare both models."""

    @property
    def keeps_logits(self) -> bool:
        return True


class SpeculativeImplicit(Speculative, ImplicitRewardLoop):
    """Drafts of the first expert for ``implicit_reward``; the other models score them.

    The emitted token is one inverse-CDF draw of the mixture, and the guess is the expert's draw by
    the same uniform.
    """

    stream = rng.BASE
    processed = False

    @property
    def keeps_logits(self) -> bool:
        return True

    def _score(self, drafts: list[list[int]], read: list[int] | None) -> Tensor:
        self._others = [self.at_base(runner.score(drafts)) for runner in self.followers[1:]]
        return super()._score(drafts, read)

    def _mixed(
        self, logits: Tensor, models: list[Tensor], index: Tensor, position: Tensor
    ) -> Drawn:
        token = self.mix(logits, models, position, self.sequence[index])
        return Drawn(token, [False] * len(token))

    def _plain(
        self, logits: Tensor, index: Tensor, position: Tensor, drafts: list[list[int]]
    ) -> Drawn:
        assert self._drafted is not None
        columns = len(index) // len(drafts)
        models = [self._drafted[:, :columns], *self._others]
        return self._mixed(logits, [m.reshape(logits.shape) for m in models], index, position)

    def _behind(
        self, rows: list[int], places: list[int], logits: Tensor, position: Tensor
    ) -> tuple[Drawn, Seen]:
        index = torch.tensor(rows, device=logits.device)
        first = self._own(self.drafter.catch_up(rows), rows)
        models = [first, *(other[rows, places] for other in self._others)]
        position = position[index] + torch.tensor(places, device=logits.device)
        base = logits[rows, places]
        named = zip([runner.name for runner in self.followers], models, strict=True)
        seen = Seen(base, [(name, one, None) for name, one in named])
        return self._mixed(base, models, index, position), seen
