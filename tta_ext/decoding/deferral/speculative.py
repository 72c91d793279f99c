"""Speculative decoding: the proxy drafts, the base judges a whole draft in one forward.

A round of :class:`Speculative` takes the place of several steps of the plain loop. The proxy draws
K tokens for a row (stream DRAFT), the base runs once over all K + 1 positions, and
:func:`tta_ext.ops.deferral_verify` keeps the longest prefix that leaves the law pi of the rule
intact and adds one token. Rows differ in how much they keep; both models' caches are rolled back by
setting lengths. The law of the answers is exactly the plain loop's, with each token's source: a
draft token that stood counts as the proxy's if its verification uniform r lies below the deferred
mass D. That has probability D whatever the token is (a draft token x stands at least if r < D), so
token and source together have the law ``q(x) D`` that they have in plain decoding. Other random
numbers are used, so with one seed the two loops write different answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from tta_ext import ops, rng
from tta_ext.decoding.deferral.draft_length import AdaptiveLength, FixedLength, StepReport
from tta_ext.decoding.deferral.loop import (
    DenseDeferral,
    Emission,
    ImplicitReward,
    LazyDeferral,
    Loop,
    LoopOptions,
)
from tta_ext.decoding.deferral.result import DecodeStats
from tta_ext.decoding.deferral.trace import trace_step
from tta_ext.decoding.runtime.profiling import span
from tta_ext.decoding.runtime.runner import Runner

__all__ = ["Speculative", "SpeculativeDense", "SpeculativeImplicit", "SpeculativeLazy"]


class Speculative(Loop):
    """Rounds of drafting and verification, mixed with the plain steps of another loop.

    Args:
        base, followers, options: as in :class:`Loop`; the first follower drafts.
        policy: says how long drafts are; where it says None a plain step is taken.
        plain: further arguments of the plain loop.
    """

    # The proxy also runs behind a whole draft, before anyone knows whether it is needed there.
    dense = False
    # Logits processors apply to the drafting model.
    processed = True

    def __init__(
        self,
        base: Runner,
        followers: Sequence[Runner],
        options: LoopOptions,
        *,
        policy: FixedLength | AdaptiveLength,
        **plain: Any,
    ) -> None:
        super().__init__(base, followers, options, **plain)
        self.policy, self.drafter = policy, self.followers[0]
        self._behind = self.dense or options.trace == "full"
        self._ready = self._drafted = False
        self._buffer: Tensor | None = None
        self._known: list[int] = []
        self._catching_up = 0.0  # seconds of the latest step that fed prompts
        seed = options.seed
        self._key = torch.cat((seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
        if isinstance(policy, AdaptiveLength):
            policy.begin(
                options.max_new_tokens, not (options.ends or options.stop or options.criteria)
            )
            self.drafter.observe = policy.proxy_ran
            for which, runner in enumerate([self.base, *self.followers[1:]]):
                runner.observe = partial(policy.scorer_ran, which)

    def finish_stats(self) -> DecodeStats:
        for runner in self._runners:
            runner.observe = None
        self.stats.speculation = self.policy.note
        return super().finish_stats()

    def step(self) -> None:
        """Advance every active row by one token or more."""
        start = perf_counter()
        rows, answers = self.active, self.answers
        before = [len(answers.tokens[row]) for row in rows]
        lengths = self.policy.plan(
            rows, [self.options.max_new_tokens - length - 1 for length in before]
        )
        planning = perf_counter() - start
        inside = sum(runner.seconds for runner in self._runners)
        self._catching_up = 0.0
        if lengths is None:
            self.stats.seconds += planning
            if self._drafted:
                self._drafted = self._fed = False  # a proxy may be two tokens behind
            super().step()
        else:
            self._drafted = True
            self._round(lengths)
            self.stats.steps += 1
            self.stats.row_steps += len(rows)
            self.stats.seconds += perf_counter() - start
        if isinstance(self.policy, AdaptiveLength):
            self._report(rows, before, lengths, start, planning, inside)

    def _report(
        self,
        rows: list[int],
        before: list[int],
        lengths: list[int] | None,
        start: float,
        planning: float,
        inside: float,
    ) -> None:
        """Tell an adaptive policy about the step that began at ``start`` with these rows."""
        assert isinstance(self.policy, AdaptiveLength)
        tokens, deferred = self.answers.tokens, self.answers.deferred
        seconds = perf_counter() - start
        inside = sum(runner.seconds for runner in self._runners) - inside
        left = [len(tokens[row]) for row in self.active]
        self.policy.stepped(
            StepReport(
                positions=0 if lengths is None else max(lengths) + 1,
                rows=len(rows),
                tokens=sum(len(tokens[row]) - n for row, n in zip(rows, before, strict=True)),
                deferred=sum(sum(deferred[row][n:]) for row, n in zip(rows, before, strict=True)),
                front=min(left) if left else max(map(len, tokens)),
                seconds=seconds - self._catching_up,
                own_seconds=seconds - inside,
                planning=planning,
            )
        )

    # ---- a round -----------------------------------------------------------------------------

    @torch.inference_mode()
    def _round(self, lengths: list[int]) -> None:
        context = self.options.context
        if not self._ready:
            start = perf_counter()
            for runner in self._runners:
                runner.prefill()
                runner.settle()
            self._ready = True
            self._catching_up = perf_counter() - start
        starts = [list(runner.lengths) for runner in self._runners]
        read = None if context is None else context.lengths
        position = self.base.total.clone()
        with span("draft"):
            drafts = self._draft(list(lengths), position)
        capacity = max(map(len, drafts))
        logits = self._score(drafts, read)
        if context is not None and read is not None:
            context.lengths = read
        if capacity:
            padded = [draft + [0] * (capacity - len(draft)) for draft in drafts]
            draft = torch.tensor(padded, dtype=torch.int64, device=self.base.device)
        else:
            draft = position.new_empty(len(drafts), 0)
        with span("verify"):
            verified = self._verify(logits, draft, list(map(len, drafts)), position)
            accepted = verified.accepted.tolist()
            sources = self._sources(verified, logits, draft, accepted, position)
        self._base_logits = logits
        self._count(drafts, accepted)
        self._emit_all(drafts, verified, accepted, sources, position, starts)

    def _draft(self, lengths: list[int], position: Tensor) -> list[list[int]]:
        """Draw drafts of these lengths (an end of answer cuts them short), keeping the logits.

        Verification may ask for the proxy's logits at every position of a row but the one behind
        the longest draft; :meth:`_missing` supplies that if need be.
        """
        options, proxy = self.options, self.drafter
        rows = len(lengths)
        every = list(range(rows))
        drafts: list[list[int]] = [[] for _ in every]
        self._known = [0] * rows
        step = 0
        while True:
            drawing = [i for i in every if lengths[i] > step]
            if not drawing and not self._behind:
                break
            asked = [i for i in every if lengths[i] >= step]
            if asked:
                whole = len(asked) == rows
                logits = proxy.catch_up(None if whole else asked)
                self._keep_logits(logits, None if whole else asked, step)
            if not drawing:
                break
            assert self._buffer is not None
            law = self._law(self._buffer[:rows, step])
            place, sequence = position + step, self.sequence
            if len(drawing) < rows:
                index = torch.tensor(drawing, device=law.device)
                law, place, sequence = law[index], place[index], sequence[index]
            token = ops.categorical_sample(
                law,
                temperature=self._temperature,
                stream=rng.DRAFT,
                seed=options.seed,
                position=place,
                sequence=sequence,
                do_sample=options.do_sample,
            )
            tokens = token.tolist()
            if len(drawing) == rows:
                proxy.append(tokens, token if token.device == proxy.device else None)
            else:
                proxy.extend(drawing, tokens)
            if options.context is not None and options.processors:
                options.context.write(drawing, tokens)
            for i, one in zip(drawing, tokens, strict=True):
                drafts[i].append(one)
                if one in options.ends:
                    lengths[i] = len(drafts[i])
            step += 1
        return drafts

    def _keep_logits(self, logits: Tensor, rows: list[int] | None, step: int) -> None:
        """Process the drafting model's logits after ``step`` draft tokens and put them by."""
        if self.processed:
            logits = self.process(logits, rows)
        elif logits.device != self.base.device:
            logits = logits.to(self.base.device)
        buffer = self._buffer
        if buffer is None:
            # Zeros: what was never written is not read, but may be computed with.
            shape = (len(self.active), self.policy.longest + 1, logits.shape[-1])
            buffer = self._buffer = logits.new_zeros(shape)
        every = range(len(self.active)) if rows is None else rows
        for i in every:
            self._known[i] = step + 1
        if rows is None:
            buffer[: len(logits), step] = logits
        else:
            buffer[torch.tensor(rows, device=logits.device), step] = logits

    def _score(self, drafts: list[list[int]], read: list[int] | None) -> Tensor:
        """The base's logits ``[rows, 1 + longest draft, V]``, processed."""
        options = self.options
        logits = self.base.score(drafts)
        context = options.context
        if not options.processors or context is None or read is None:
            return logits
        scores = torch.zeros(logits.shape, dtype=torch.float32, device=logits.device)
        for k in range(logits.shape[1]):
            rows = [i for i, draft in enumerate(drafts) if len(draft) >= k]
            context.lengths = [length + k for length in read]
            index = torch.tensor(rows, device=logits.device)
            scores[index, k] = context.process(options.processors, logits[index, k], rows)
        return scores

    @property
    def _temperature(self) -> float:
        """Temperature at which the drafting model's law is given."""
        return self.rule["temperature"]

    def _law(self, logits: Tensor) -> Tensor:
        """Logits of the law that drafts are drawn from."""
        return logits

    def _proxy_logits(self, rows: int, capacity: int, like: Tensor) -> Tensor:
        if self._buffer is None:
            return like.new_empty(rows, 0, like.shape[-1])
        return self._buffer[:rows, : capacity + self._behind]

    def _verify(
        self, logits: Tensor, draft: Tensor, lengths: list[int], position: Tensor
    ) -> ops.Verified:
        options = self.options
        rows, capacity = draft.shape
        return ops.deferral_verify(
            logits,
            self._proxy_logits(rows, capacity, logits),
            draft,
            torch.tensor(lengths, dtype=torch.int64, device=logits.device),
            **self.rule,
            seed=options.seed,
            position=position,
            sequence=self.sequence,
            do_sample=options.do_sample,
            return_mass=options.do_sample,  # sources are told by it
        )

    def _sources(
        self,
        verified: ops.Verified,
        logits: Tensor,
        draft: Tensor,
        accepted: list[int],
        position: Tensor,
    ) -> list[list[bool]]:
        """Whether the proxy wrote each of the draft tokens that stood."""
        rows, capacity = draft.shape
        if not any(accepted):
            return [[] for _ in accepted]
        if self.options.do_sample:
            counter = torch.zeros(rows, capacity, 4, dtype=torch.int64, device=draft.device)
            counter[..., 1] = position[:, None] + torch.arange(capacity, device=draft.device)
            counter[..., 2] = self.sequence[:, None]
            counter[..., 3] = rng.stream_word(rng.VERIFY)
            uniform = ops.philox(counter, self._key)[..., 0].double() * 2.0**-32
            return (uniform < verified.mass[:, :capacity]).tolist()
        where = [(i, k) for i, count in enumerate(accepted) for k in range(count)]
        i, k = torch.tensor(where, device=draft.device).T
        rule = self.rule
        if self._param_by_row:
            rule = rule | {"param": rule["param"][i]}
        proxy = None
        if self.dense:
            assert self._buffer is not None
            proxy = self._buffer[i, k]
        mask = ops.deferral_mask(logits[i, k], proxy, **rule)
        token = draft[i, k]
        gone = mask.mask.gather(1, token[:, None])[:, 0]
        gone = gone | ((mask.critical == token) & (mask.fraction == 1.0))
        flags: list[list[bool]] = [[] for _ in accepted]
        for (row, _), flag in zip(where, gone.tolist(), strict=True):
            flags[row].append(flag)
        return flags

    def _count(self, drafts: list[list[int]], accepted: list[int]) -> None:
        stats = self.stats
        for row, draft, count in zip(self.active, drafts, accepted, strict=True):
            if not draft:
                continue
            judged = min(count + 1, len(draft))
            stats.draft_tokens += len(draft)
            stats.judged_tokens += judged
            stats.accepted_tokens += count
            lengths = stats.accepted_lengths
            lengths += [0] * (count + 1 - len(lengths))
            lengths[count] += 1
            if isinstance(self.policy, AdaptiveLength):
                self.policy.judged(row, count, judged)

    # ---- tokens out --------------------------------------------------------------------------

    def _emit_all(
        self,
        drafts: list[list[int]],
        verified: ops.Verified,
        accepted: list[int],
        sources: list[list[bool]],
        position: Tensor,
        starts: list[list[int]],
    ) -> None:
        """Emit drafts as far as they stood, then a token more, and roll the models back."""
        rows = len(drafts)
        self.events = []
        kept = [0] * rows  # draft tokens emitted
        tails: list[list[int]] = [[] for _ in range(rows)]
        open_rows = list(range(rows))
        for k in range(max(accepted)):
            now = [i for i in open_rows if accepted[i] > k]
            ended = self._emit_some(
                now, [k] * len(now), [drafts[i][k] for i in now], [sources[i][k] for i in now]
            )
            for i in now:
                kept[i] = k + 1
            open_rows = [i for i in open_rows if i not in ended]
        if open_rows:
            tokens, flags = verified.token.tolist(), verified.deferred.tolist()
            missing = [i for i in open_rows if tokens[i] < 0]
            if missing:
                drawn, from_proxy = self._missing(missing, flags, drafts, position)
                for i, token, flag in zip(missing, drawn, from_proxy, strict=True):
                    tokens[i], flags[i] = token, flag
            for i in open_rows:
                tails[i] = [tokens[i]]
            ended = self._emit_some(
                open_rows,
                [accepted[i] for i in open_rows],
                [tokens[i] for i in open_rows],
                [flags[i] for i in open_rows],
            )
            open_rows = [i for i in open_rows if i not in ended]
        for runner, start in zip(self._runners, starts, strict=True):
            runner.rollback([n + more for n, more in zip(start, kept, strict=True)], tails)
        if len(open_rows) < rows:
            going = set(open_rows)
            self._drop([i for i in range(rows) if i not in going])
            if self.options.progress is not None:
                self.options.progress(len(self.answers.tokens) - len(self.active))

    def _missing(
        self, rows: list[int], flags: list[bool], drafts: list[list[int]], position: Tensor
    ) -> tuple[list[int], list[bool]]:
        """The token behind a whole draft, for rows where the proxy has to be asked for it."""
        options = self.options
        invalid = [i for i in rows if not flags[i]]
        if invalid:
            raise ValueError(
                f"row {invalid[0]} has logits with NaN or +inf, or no finite one; nothing is drawn"
            )
        place = len(drafts[rows[0]])  # all of the greatest length: the others had their logits
        logits = self.drafter.catch_up(None if len(rows) == len(drafts) else rows)
        self._keep_logits(logits, rows, place)
        assert self._buffer is not None
        index = torch.tensor(rows, device=self.base.device)
        logits = self._buffer[index, place]
        if options.do_sample:
            token = ops.categorical_sample(
                logits,
                temperature=self.rule["temperature"],
                stream=rng.PROXY,
                seed=options.seed,
                position=position[index] + place,
                sequence=self.sequence[index],
            )
            return token.tolist(), [True] * len(rows)
        rule = self.rule
        if self._param_by_row:
            rule = rule | {"param": rule["param"][index]}
        base = self._base_logits[index, place]
        drawn = ops.deferral_sample(base, logits, **rule, do_sample=False)
        return drawn.token.tolist(), drawn.deferred.tolist()

    def _emit_some(
        self, rows: list[int], places: list[int], tokens: list[int], flags: list[bool]
    ) -> set[int]:
        """Emit a token of some rows, drawn ``places`` positions into the round; rows that end."""
        options, answers = self.options, self.answers
        if not rows:
            return set()
        ended = {
            i
            for i, token, flag in zip(rows, tokens, flags, strict=True)
            if self._emit(self.active[i], token, flag)
        }
        if options.trace:
            self._trace(rows, places, tokens, flags)
        if options.context is not None:
            options.context.write(rows, tokens)
            if options.criteria:
                scores = self._base_logits[rows, places]
                stopped = options.context.stopped(options.criteria, scores, rows)
                for i, stop in zip(rows, stopped, strict=True):
                    if stop and i not in ended:
                        answers.finish[self.active[i]] = "stop"
                        ended.add(i)
        if options.events:
            self.events += [
                Emission(row, token, flag, answers.finish[row] or None)
                for row, token, flag in zip(
                    [self.active[i] for i in rows], tokens, flags, strict=True
                )
            ]
        return ended

    def _trace(
        self, rows: list[int], places: list[int], tokens: list[int], flags: list[bool]
    ) -> None:
        at = list(zip(rows, places, strict=True))
        known = [j for j, (i, k) in enumerate(at) if k < self._known[i]]
        proxy = None
        if known and self._buffer is not None:
            proxy = self._buffer[[rows[j] for j in known], [places[j] for j in known]]
        rule = self.rule
        if self._param_by_row:
            rule = rule | {"param": rule["param"][rows]}
        traces = trace_step(
            self._base_logits[rows, places],
            proxy,
            None if len(known) == len(rows) else known,
            torch.tensor(tokens, device=self.base.device),
            flags,
            rule,
            self.dense,
        )
        for i, trace in zip(rows, traces, strict=True):
            self.answers.trace[self.active[i]].append(trace)


class SpeculativeLazy(Speculative, LazyDeferral):
    """Drafts for rules that look at the base alone."""


class SpeculativeDense(Speculative, DenseDeferral):
    """Drafts for rules that compare both models."""

    dense = True


class SpeculativeImplicit(Speculative, ImplicitReward):
    """Drafts of the first expert for ``implicit_reward``; the other models score them.

    The law pi of the tilted base is known in full at every position, so this is the verification of
    a rule that never defers, with log pi in the base's place: accept if ``r < pi(x) / q(x)``, else
    draw from max(pi - q, 0). It is exact but for the rounding of log pi to float32. Temperature is
    inside pi, so the draft's law is given at temperature 1 too.
    """

    dense = True
    processed = False

    @property
    def _temperature(self) -> float:
        return 1.0

    def _law(self, logits: Tensor) -> Tensor:
        temperature = self.rule["temperature"]
        return logits if temperature == 1.0 else logits.float() / temperature

    def _score(self, drafts: list[list[int]], read: list[int] | None) -> Tensor:
        logits = super()._score(drafts, read)
        assert self._buffer is not None
        rows, positions, size = logits.shape
        others = [runner.score(drafts) for runner in self.followers[1:]]
        models = [self._buffer[:rows, :positions], *(x.to(logits.device) for x in others)]
        flat = [x.reshape(rows * positions, size) for x in models]
        anti = flat[self.experts :]
        law = ops.implicit_reward_probs(
            logits.reshape(rows * positions, size),
            torch.stack(flat[: self.experts]),
            torch.stack(anti) if anti else None,
            self.rule["param"],
            temperature=self.rule["temperature"],
        )
        return law.log_().view(rows, positions, size)

    def _verify(
        self, logits: Tensor, draft: Tensor, lengths: list[int], position: Tensor
    ) -> ops.Verified:
        options = self.options
        rows, capacity = draft.shape
        verified = ops.deferral_verify(
            logits,
            self._law(self._proxy_logits(rows, capacity, logits)),
            draft,
            torch.tensor(lengths, dtype=torch.int64, device=logits.device),
            rule="threshold",
            param=0.0,
            seed=options.seed,
            position=position,
            sequence=self.sequence,
            do_sample=options.do_sample,
            return_mass=False,
        )
        return verified._replace(deferred=torch.zeros_like(verified.deferred))

    def _sources(
        self,
        verified: ops.Verified,
        logits: Tensor,
        draft: Tensor,
        accepted: list[int],
        position: Tensor,
    ) -> list[list[bool]]:
        return [[False] * count for count in accepted]
