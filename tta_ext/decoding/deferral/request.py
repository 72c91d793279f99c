"""A call of :meth:`KnapsackDeferral.generate`: its arguments, checked, and what runs them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tta_ext import rng
from tta_ext.decoding.deferral.draft_length import AutoLength, DraftLength, FixedLength, Memory
from tta_ext.decoding.deferral.implicit_reward import ImplicitReward, ImplicitRewardLoop
from tta_ext.decoding.deferral.loop import DenseDeferral, LazyDeferral, Loop, LoopOptions
from tta_ext.decoding.deferral.options import AnswerBudget, draft_length, draft_source
from tta_ext.decoding.deferral.result import Generation
from tta_ext.decoding.deferral.speculative import (
    SpeculativeDense,
    SpeculativeImplicit,
    SpeculativeLazy,
)
from tta_ext.decoding.runtime.fit import Fit, takes_drafts
from tta_ext.decoding.runtime.interface import ModelRunner
from tta_ext.decoding.runtime.models import class_name, device_of
from tta_ext.decoding.runtime.processors import (
    SequenceView,
    as_criteria,
    as_processors,
    warpers,
)
from tta_ext.decoding.runtime.prompts import (
    check_prompts,
    encode_prompts,
    flag,
    id_rows,
    normalise_prompts,
    sequence_ids,
    text_of,
    unpad,
    whole_number,
)
from tta_ext.decoding.runtime.rows import Limits
from tta_ext.decoding.runtime.stopping import StopStrings, end_ids
from tta_ext.decoding.runtime.streaming import StreamEvent, TextDeltas
from tta_ext.decoding.runtime.vocabulary import Vocabulary
from tta_ext.rules import Rule

log = logging.getLogger("tta_ext")

__all__ = ["Models", "Request"]


@dataclass(frozen=True)
class Models:
    """The models of a deferral, and how they read prompts."""

    base: Any
    proxies: list[Any]
    anti: list[Any]
    tokenizer: Any
    proxy_tokenizer: Any
    chat_template: str | None
    proxy_chat_template: str | None
    vocabulary: Vocabulary
    fits: list[Fit]  # of each model, the base first
    notes: set[str] = field(default_factory=set)  # what has been said once

    @property
    def named(self) -> list[tuple[Any, str]]:
        """Every model with its name in messages and profiles, the base first."""
        named = [(self.base, "base")]
        for models, name in ((self.proxies, "proxy"), (self.anti, "anti")):
            several = len(models) > 1
            named += [(m, f"{name} {i}" if several else name) for i, m in enumerate(models)]
        return named

    def encode(
        self, prompts: Sequence[Any], proxy_prompts: Sequence[Any] | None
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids for the base and for the others."""
        own, theirs = self.chat_template, self.proxy_chat_template or self.chat_template
        mine, others = self.tokenizer, self.proxy_tokenizer
        base = encode_prompts(prompts, mine, name="the base", template=own, fallback=others)
        if proxy_prompts is None:
            proxy_prompts = prompts
        proxy = encode_prompts(
            proxy_prompts, others, name="the proxy", template=theirs, fallback=mine
        )
        return base, proxy


@dataclass(frozen=True)
class Batch:
    """Some of a request's answers: prompts of the base and the others, sequence ids, rule."""

    first: int
    base: list[list[int]]
    proxy: list[list[int]]
    sequence: list[int]
    rule: Rule | ImplicitReward


class Request:
    """A call's arguments, checked and with defaults filled in.

    Args:
        models: who answers.
        rule: how they are combined; a ``param`` by row has a value for each prompt or answer.
        memories: what earlier calls have measured about drafts.
        prompts: and all others: see :meth:`KnapsackDeferral.generate`.
    """

    def __init__(
        self,
        models: Models,
        rule: Rule | ImplicitReward,
        memories: dict[Any, Memory],
        prompts: Any = None,
        *,
        proxy_prompts: Any = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        proxy_input_ids: Tensor | None = None,
        proxy_attention_mask: Tensor | None = None,
        max_new_tokens: int = 128,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | torch.Generator | None = None,
        sequence: Sequence[int] | Tensor | None = None,
        num_return_sequences: int = 1,
        eos_token_id: int | Sequence[int] | None = None,
        stop_strings: str | Sequence[str] | None = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        padded_context: bool = False,
        pad_token_id: int | None = None,
        lazy: bool = True,
        trace: bool | str = False,
        speculative: int | str | None = None,
        draft: str | None = None,
        errors: str = "raise",
        answer_budget: float | None = None,
        answer_spending: str | None = None,
    ) -> None:
        self.models, self.errors = models, errors
        self.do_sample = do_sample = flag("do_sample", do_sample)
        self.lazy = flag("lazy", lazy) and not rule.needs_proxy
        if trace not in (False, True, "lazy", "full"):
            raise ValueError(f"trace is {trace!r}, expected False, True, 'full' or 'lazy'")
        if trace and isinstance(rule, ImplicitReward):
            raise ValueError(
                "rule 'implicit_reward' has no trace: no token comes from one model alone"
            )
        self.budget = AnswerBudget.of(answer_budget, answer_spending)
        if self.budget is not None and isinstance(rule, ImplicitReward):
            raise ValueError(
                "rule 'implicit_reward' has no answer_budget: no token comes from the proxy alone"
            )
        self.trace = None if not trace else "lazy" if trace == "lazy" else "full"
        num_return_sequences = whole_number("num_return_sequences", num_return_sequences)
        max_new_tokens = whole_number("max_new_tokens", max_new_tokens)
        stop = StopStrings.of(stop_strings, models.tokenizer)
        tokenizers = [models.tokenizer, models.proxy_tokenizer]
        ends = end_ids(eos_token_id, [model for model, _ in models.named], tokenizers)
        self.limits = Limits(max_new_tokens, ends, stop)
        base, proxy = self._prompts(prompts, proxy_prompts, input_ids, attention_mask)
        if proxy_input_ids is None and proxy_attention_mask is not None:
            raise ValueError("proxy_attention_mask goes with proxy_input_ids")
        if proxy_input_ids is not None:
            proxy = unpad(proxy_input_ids, proxy_attention_mask)
        if len(base) != len(proxy):
            raise ValueError(f"there are {len(base)} prompts and {len(proxy)} proxy prompts")
        for i, (model, name) in enumerate(models.named):
            check_prompts(model, proxy if i else base, max_new_tokens, name)
        self.padded = input_ids is not None and padded_context
        context = id_rows(input_ids, "input_ids") if self.padded else base
        self.repeats = num_return_sequences
        self.base, self.proxy, self.context = (
            [prompt for prompt in each for _ in range(num_return_sequences)]
            for each in (base, proxy, context)
        )
        pad = getattr(models.tokenizer, "pad_token_id", None)
        if pad_token_id is not None:
            pad = whole_number("pad_token_id", pad_token_id, 0)
        self.pad: int = min(ends, default=0) if pad is None else pad
        self.padding = pad_token_id  # of models that look at it
        self.sequence = sequence_ids(sequence, len(self.base))
        self.rule = self._spread(rule, len(base))
        self.draft = draft_source(draft) or "proxy"
        if draft is not None and speculative is None:
            raise ValueError(f"draft is {draft!r} without a length: pass speculative=K or 'auto'")
        self.policy = self._policy(speculative, memories)
        self.seed = rng.resolve_seed(seed)
        cuts: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
        given = [name for name, value in cuts.items() if value is not None]
        if given and not do_sample:
            raise ValueError(f"{given[0]} goes with do_sample=True")
        own = as_processors(logits_processor) or ()
        self.processors = as_processors([*own, *warpers(rule.temperature, **cuts)])
        self.criteria = as_criteria(stopping_criteria)

    def _prompts(
        self, prompts: Any, proxy_prompts: Any, input_ids: Tensor | None, mask: Tensor | None
    ) -> tuple[list[list[int]], list[list[int]]]:
        if (prompts is None) == (input_ids is None):
            raise ValueError("expected either prompts or input_ids")
        if input_ids is not None:
            if proxy_prompts is not None:
                raise ValueError("proxy_prompts go with prompts; with input_ids: proxy_input_ids")
            base = unpad(input_ids, mask)
            return base, base
        if mask is not None:
            raise ValueError("attention_mask goes with input_ids")
        other = None if proxy_prompts is None else normalise_prompts(proxy_prompts)
        return self.models.encode(normalise_prompts(prompts), other)

    def _spread(self, rule: Rule | ImplicitReward, prompts: int) -> Rule | ImplicitReward:
        """The rule with a parameter for each answer, if it has several, on the base's device."""
        param = rule.param
        if isinstance(rule, ImplicitReward) or not isinstance(param, Tensor):
            return rule
        values, answers = param.flatten(), len(self.base)
        if values.numel() == prompts:
            values = values.repeat_interleave(self.repeats)
        if values.numel() not in (1, answers):
            raise ValueError(
                f"param has {values.numel()} values, expected 1, {prompts} (one for each prompt) "
                f"or {answers} (one for each answer)"
            )
        one = values.numel() == 1
        return rule.replace(param=float(values) if one else values.to(device_of(self.models.base)))

    def _policy(
        self, speculative: int | str | None, memories: dict[Any, Memory]
    ) -> DraftLength | None:
        """How long drafts are; None for the plain loop."""
        length = None if speculative == 0 else draft_length(speculative)
        if length is None or isinstance(length, int):
            return None if length is None else FixedLength(length)
        # Acceptance is a matter of the rule, costs of what runs at each step.
        rule = self.rule
        param = None if isinstance(rule.param, Tensor) else rule.param
        kind = rule.codes if isinstance(rule, Rule) else rule.temperature
        key = (rule.name, param, kind, self.lazy, self.do_sample, self.trace, self.draft)
        if key not in memories:
            memories[key] = Memory()
        return AutoLength(memories[key])

    def batches(self, size: int | None) -> Iterator[Batch]:
        """The answers to ``size`` prompts at a time; one batch that is empty if there are none."""
        rows = len(self.base)
        if size is not None:
            size = whole_number("batch_size", size)
        # A prompt's answers stay together, as it is run once for all of them.
        step = max(rows, 1) if size is None else size * self.repeats
        for first in range(0, max(rows, 1), step):
            part = slice(first, first + step)
            rule = self.rule
            if isinstance(rule, Rule) and rows:
                rule = rule.select(part)
            yield Batch(
                first,
                self.base[part],
                self.proxy[part],
                self.sequence[part],
                rule,
            )

    def start(
        self,
        batch: Batch,
        *,
        events: bool = False,
        progress: Callable[[int], None] | None = None,
        runners: Sequence[ModelRunner] | None = None,
    ) -> Loop:
        """A loop over a batch, on given runners (whose caches are kept) or new ones."""
        device, room = device_of(self.models.base), self.limits.max_new_tokens
        with torch.inference_mode():
            runners = self._runners(batch, runners)
        context = None
        if self.processors or self.criteria:
            # Of every batch, so that a row is found at its place in the call.
            rows = range(batch.first, batch.first + len(batch.base))
            context = SequenceView(
                self.context, room, device, pad=self.pad, rows=rows, whole=self.padded
            )
        options = LoopOptions(
            rule=batch.rule,
            seed=torch.tensor([self.seed], dtype=torch.int64, device=device),
            sequence=batch.sequence,
            limits=self.limits,
            title=lambda row: self._title(batch.first + row),
            errors=self.errors,
            do_sample=self.do_sample,
            processors=self.processors,
            criteria=self.criteria,
            context=context,
            trace=self.trace,
            events=events,
            progress=progress,
            budget=self.budget,
        )
        base, *followers = runners
        mixed = isinstance(self.rule, ImplicitReward)
        stuck = [] if self.policy is None else self._stuck(runners)
        if self.policy is not None and not stuck:
            fast = (
                SpeculativeImplicit if mixed else SpeculativeLazy if self.lazy else SpeculativeDense
            )
            return fast(base, followers, options, policy=self.policy, draft=self.draft)
        plain = ImplicitRewardLoop if mixed else LazyDeferral if self.lazy else DenseDeferral
        loop = plain(base, followers, options)
        if stuck:
            loop.stats.speculation = self._without_drafts(stuck)
        return loop

    def _stuck(self, runners: Sequence[ModelRunner]) -> list[str]:
        """The models that cannot take drafts back."""
        models = self.models
        return [
            f"{name} ({class_name(model)})"
            for (model, name), fit, runner in zip(models.named, models.fits, runners, strict=True)
            # Rotary factors that follow the length would follow a draft's too.
            if not runner.lags and (fit.reach is not None or not takes_drafts(model))
        ]

    def _without_drafts(self, stuck: Sequence[str]) -> str:
        """Why nothing is drafted, said once."""
        note = (
            f"nothing is drafted: {' and '.join(stuck)} in lock-step cannot take tokens back but "
            "by reading again, which costs what drafts save"
        )
        if not self.models.notes & {note}:
            self.models.notes.add(note)
            log.warning(note)
        return note

    def _title(self, answer: int) -> str:
        prompt, number = divmod(answer, self.repeats)
        return f"prompt {prompt}" + (f", answer {number}" if self.repeats > 1 else "")

    def _runners(self, batch: Batch, old: Sequence[ModelRunner] | None) -> list[ModelRunner]:
        """A runner a model, the base's first: new ones, or old ones with what they have cached."""
        models, room, runners = self.models, self.limits.max_new_tokens, []
        for i, ((model, name), fit) in enumerate(zip(models.named, models.fits, strict=True)):
            prompts = batch.proxy if i else batch.base
            tokens = max(map(len, prompts), default=0) + room
            if old is not None and old[i].kind == fit.kind_for(tokens):
                old[i].reload(prompts, room)
                runners.append(old[i])
            else:
                runners.append(
                    fit.runner(
                        model,
                        prompts,
                        room=room,
                        vocabulary=models.vocabulary.size,
                        masked=models.vocabulary.masked,
                        name=name,
                        pad=self.padding,
                    )
                )
        return runners

    def stream(self, loop: Loop, first: int = 0) -> Iterator[StreamEvent]:
        """Run a loop, yielding what each step emits; answers are numbered from ``first``."""
        tokenizer = self.models.tokenizer
        deltas = None
        if tokenizer is not None:
            deltas = [TextDeltas(tokenizer, self.limits.stop) for _ in loop.rows.active]
        while not loop.done:
            loop.step()
            for one in loop.events:
                text = None
                if deltas is not None:
                    last = one.finish is not None
                    delta = deltas[one.row]
                    text = delta.push(one.token, last) if one.token >= 0 else delta.flush()
                yield StreamEvent(first + one.row, one.token, text, one.deferred, one.finish)

    def feed(self, streamer: Any, loop: Loop, prompts: Sequence[Sequence[int]] | None) -> None:
        """Run a loop into a transformers streamer: prompts, if any, then a token a row at most."""
        pad, count = self.pad, len(loop.rows.active)
        if prompts:
            # Padded where lengths differ, as generate() of transformers would have them.
            rows = [torch.tensor(prompt) for prompt in prompts]
            streamer.put(pad_sequence(rows, True, pad, padding_side="left"))
        while not loop.done:
            loop.step()
            columns: list[list[int]] = []
            seen = [0] * count
            for one in loop.events:
                if one.token < 0:
                    continue
                if seen[one.row] == len(columns):
                    columns.append([pad] * count)
                columns[seen[one.row]][one.row] = one.token
                seen[one.row] += 1
            for tokens in columns:
                streamer.put(torch.tensor(tokens))

    def result(self, batch: Batch, loop: Loop) -> Generation:
        """What a finished loop has produced."""
        rows, tokenizer, stop = loop.rows, self.models.tokenizer, self.limits.stop
        texts = None
        if tokenizer is not None:
            texts = [text_of(tokenizer, ids) for ids in rows.tokens]
            if stop is not None:
                texts = [stop.cut(text) for text in texts]
        return Generation(
            tokens=rows.tokens,
            deferred=loop.deferred,
            finish=rows.finish,
            prompt_tokens=batch.base,
            texts=texts,
            sequence=batch.sequence,
            seed=self.seed,
            trace=loop.trace if self.trace else None,
            stats=loop.finish_stats(),
            errors={batch.first + row: why for row, why in rows.errors.items()},
        )
