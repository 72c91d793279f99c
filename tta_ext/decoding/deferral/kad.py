"""Knapsack deferral: a large base model proposes, a small aligned proxy takes over rejected tokens.

:class:`KnapsackDeferral` is the entry point: prompts in, aligned text out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tta_ext import rng, rules
from tta_ext.decoding.deferral.draft_length import AdaptiveLength, FixedLength, Memory, draft_length
from tta_ext.decoding.deferral.loop import (
    DenseDeferral,
    ImplicitReward,
    LazyDeferral,
    Loop,
    LoopOptions,
)
from tta_ext.decoding.deferral.result import Generation
from tta_ext.decoding.deferral.speculative import (
    Speculative,
    SpeculativeDense,
    SpeculativeImplicit,
    SpeculativeLazy,
)
from tta_ext.decoding.runtime.attention import check_model, probe_model
from tta_ext.decoding.runtime.processors import SequenceView
from tta_ext.decoding.runtime.prompts import encode_prompts, normalise_prompts, unpad
from tta_ext.decoding.runtime.runner import Runner
from tta_ext.decoding.runtime.stopping import StopStrings, end_ids
from tta_ext.decoding.runtime.streaming import StreamEvent, TextDeltas
from tta_ext.decoding.runtime.vocabulary import Vocabulary, align_vocabularies

__all__ = ["IMPLICIT_REWARD", "KnapsackDeferral"]

# Not a rejection rule, but decoded by the same loop.
IMPLICIT_REWARD = "implicit_reward"

_RULE_KEYS = ("rule", "param", "critical", "temperature", "rule_temperature")


class KnapsackDeferral:
    """Two frozen models and the rule by which one defers to the other.

    Args:
        base: a ``transformers`` causal language model, the one that knows.
        proxy: a smaller causal language model over the same vocabulary, the one that is aligned.
            For ``rule="implicit_reward"``, one or more experts.
        tokenizer: the base's tokenizer, and the proxy's unless ``proxy_tokenizer`` is given. Not
            needed if prompts are token ids.
        proxy_tokenizer: the proxy's tokenizer: same vocabulary, perhaps another chat template.
        rule: a deferral rule (:mod:`tta_ext.rules`) or ``"implicit_reward"``.
        param: the rule's parameter: a float, or a float64 tensor with a value for each prompt or
            for each answer. For ``"implicit_reward"`` it is beta: a float or one for each expert.
        critical: ``"exclude"``, ``"include"`` or ``"split"``, for the knapsack.
        temperature: temperature of both models.
        rule_temperature: temperature at which the rule looks at the models; None: ``temperature``.
        anti: for ``"implicit_reward"``, the experts before alignment, as many as experts; None
            tilts by the experts alone (an ensemble, or contrast with negative beta).
        chat_template, proxy_chat_template: templates that override the tokenizers' own. A model
            whose tokenizer has none uses the other's.
        speculative: K lets the proxy draft K tokens (1 to 64) that the base judges in one forward:
            same law, other random numbers, faster where drafts are cheap and mostly stand.
            ``"auto"`` chooses lengths by measured costs and acceptance
            (:mod:`draft_length`), which this object remembers from call to call,
            and leaves drafting where it does not pay; then tokens depend on timing as well as on
            the seed. None decodes token by token. For
            ``"implicit_reward"`` the first expert drafts.
        probe: run each model once on two short rows and refuse it if rows of different length
            cannot share its batch.

    Raises:
        TypeError: a model is not a causal language model.
        ValueError: a model of a kind that cannot be used, an unknown rule, vocabularies that
            differ.

    Both models are put into evaluation mode.

    Example:
        >>> kad = KnapsackDeferral(base, proxy, tokenizer, rule="threshold", param=0.4)
        >>> print(kad.generate("Q: 2 + 2?\\nA:", max_new_tokens=20, seed=0).text)
    """

    def __init__(
        self,
        base: Any,
        proxy: Any,
        tokenizer: Any = None,
        *,
        proxy_tokenizer: Any = None,
        rule: str = "threshold",
        param: float | Tensor | Sequence[float] | None = 0.4,
        critical: str = "exclude",
        temperature: float = 1.0,
        rule_temperature: float | None = None,
        anti: Any = None,
        chat_template: str | None = None,
        proxy_chat_template: str | None = None,
        speculative: int | str | None = None,
        probe: bool = True,
    ) -> None:
        self.speculative = draft_length(speculative)
        self._memories: dict[Any, Memory] = {}
        self.base, self.tokenizer = base, tokenizer
        self.proxies = list(proxy) if isinstance(proxy, Sequence) else [proxy]
        self.anti = [] if anti is None else list(anti) if isinstance(anti, Sequence) else [anti]
        self.proxy_tokenizer = tokenizer if proxy_tokenizer is None else proxy_tokenizer
        self.chat_template, self.proxy_chat_template = chat_template, proxy_chat_template
        self.rule = {
            "rule": rule,
            "param": param,
            "critical": critical,
            "temperature": temperature,
            "rule_temperature": rule_temperature,
        }
        self._merge_rule({})
        followers = [(m, "proxy") for m in self.proxies] + [(m, "anti") for m in self.anti]
        aligned = []
        for model, name in [(base, "base"), *followers]:
            check_model(model, name)
            model.eval()
        for model, name in followers:
            sizes = _logits_of(base), _logits_of(model)
            aligned.append(
                align_vocabularies(*sizes, tokenizer, self.proxy_tokenizer, proxy_name=name)
            )
        # All agree: ids come from the tokenizers, or all models have the same number of logits.
        self.vocabulary: Vocabulary = aligned[0]
        if probe:
            for model, name in [(base, "base"), *followers]:
                probe_model(model, name)

    @classmethod
    def from_pretrained(
        cls,
        base: str,
        proxy: str,
        *,
        anti: str | None = None,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        **options: Any,
    ) -> KnapsackDeferral:
        """Load two models and their tokenizers (safetensors or GGUF) and pair them.

        Args:
            base, proxy, anti: folders, ``.gguf`` files or hub names.
            dtype: dtype of the weights; ``"auto"`` keeps the files'.
            device: where the models go; None leaves them on the CPU.
            options: passed to the constructor.
        """
        from tta_ext.decoding.runtime.loading import load_model, load_tokenizer

        models = {
            name: load_model(path, dtype=dtype, device=device)
            for name, path in (("base", base), ("proxy", proxy), ("anti", anti))
            if path is not None
        }
        return cls(
            models["base"],
            models["proxy"],
            load_tokenizer(base),
            proxy_tokenizer=load_tokenizer(proxy),
            anti=models.get("anti"),
            **options,
        )

    # ---- public calls ------------------------------------------------------------------------

    def generate(
        self,
        prompts: Any = None,
        *,
        batch_size: int | None = None,
        streamer: Any = None,
        progress: Callable[[int], None] | None = None,
        **options: Any,
    ) -> Generation:
        """Answer prompts.

        Args:
            prompts: a string, a conversation (list of ``{"role", "content"}`` messages), a list of
                token ids, or a list of these.
            proxy_prompts: what the proxy reads instead, one for each prompt.
            input_ids, attention_mask: prompts as a padded int64 batch ``[rows, columns]``, in place
                of ``prompts``; ``proxy_input_ids``, ``proxy_attention_mask`` for the proxy.
            max_new_tokens: tokens after which an answer ends (default 128).
            do_sample: draw from the mixture; False takes its most probable token.
            seed: an int, or a ``torch.Generator`` that supplies one; None takes one from torch's
                default generator.
            sequence: 32-bit ids of the answers' random streams, one for each answer; default
                0, 1, ... The same seed and id give an answer the same random numbers in any batch.
            num_return_sequences: answers for each prompt; its prompt is run once.
            rule, param, critical, temperature, rule_temperature: in place of the constructor's.
            speculative: in place of the constructor's; 0 turns it off.
            eos_token_id: an id or several that end an answer; default: those of both models.
            stop_strings: a string or several that end an answer; its text is cut before them.
            logits_processor: transformers' ``LogitsProcessorList`` (or one processor), applied to
                both models' logits with the base's sequence as ``input_ids``, without padding. For
                ``"implicit_reward"``, to the base's alone.
            stopping_criteria: transformers' ``StoppingCriteriaList``, called after each step.
            lazy: False runs the proxy for all rows at every step even if the rule needs it only for
                rejected tokens; the random numbers and the rule are the same.
            trace: True keeps a :class:`TokenTrace` for each token and runs the proxy at every step
                to know ``q``; ``"lazy"`` leaves ``q`` None where the proxy was not needed.
            batch_size: prompts in a batch at most; None takes all at once.
            streamer: an object with ``put`` and ``end``, such as transformers'
                ``TextIteratorStreamer``; gets the prompts' ids, then each step's.
            progress: called with the number of finished answers whenever it changes.

        Raises:
            TypeError, ValueError: one sentence with the offending value and what is accepted.
        """
        request = _Request(self, prompts, **options)
        parts: list[Generation] = []
        for batch in request.batches(batch_size):
            counter = None if progress is None else partial(_report, progress, sum(map(len, parts)))
            loop = request.start(batch, events=streamer is not None, progress=counter)
            if streamer is None:
                loop.run()
            else:
                _feed(streamer, loop, request.pad_id, first=not parts, prompts=batch.base)
            parts.append(request.result(batch, loop))
        if streamer is not None:
            streamer.end()
        return Generation.concatenate(parts)

    def stream(
        self, prompts: Any = None, *, batch_size: int | None = None, **options: Any
    ) -> Iterator[StreamEvent]:
        """Answer prompts, yielding each token as it comes; arguments as :meth:`generate`."""
        request = _Request(self, prompts, **options)
        offset = 0
        for batch in request.batches(batch_size):
            loop = request.start(batch, events=True)
            yield from _events(loop, self.tokenizer, offset)
            offset += len(batch.sequence)

    def chat(self, system: str | None = None, **options: Any) -> Any:
        """A conversation that keeps both models' caches between turns; see :class:`Chat`."""
        from tta_ext.decoding.deferral.chat import Chat

        return Chat(self, system=system, **options)

    # ---- for this package --------------------------------------------------------------------

    def _merge_rule(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """The constructor's rule with a call's changes, checked as far as names go."""
        merged = self.rule | {k: v for k, v in changes.items() if v is not None}
        if changes.get("rule") and merged["rule"] == "argmax" and changes.get("param") is None:
            merged["param"] = None
        if not self.proxies:
            raise ValueError("proxy is an empty list, expected a model or several")
        if merged["rule"] != IMPLICIT_REWARD:
            if len(self.proxies) != 1 or self.anti:
                raise ValueError(
                    f"rule is {merged['rule']!r}, which takes one proxy and no anti; "
                    f"got {len(self.proxies)} and {len(self.anti)}"
                )
            code = rules.rule_code(merged["rule"])
            if code == rules.ARGMAX:
                merged["param"] = None
            rules.critical_code(merged["critical"])
        elif self.anti and len(self.anti) != len(self.proxies):
            raise ValueError(
                f"anti has {len(self.anti)} models, "
                f"expected one for each of {len(self.proxies)} experts"
            )
        return merged

    def _encode(
        self, prompts: Sequence[Any], proxy_prompts: Sequence[Any] | None
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids for base and proxy."""
        base = encode_prompts(
            prompts,
            self.tokenizer,
            template=self.chat_template,
            fallback=self.proxy_tokenizer,
        )
        proxy = encode_prompts(
            prompts if proxy_prompts is None else proxy_prompts,
            self.proxy_tokenizer,
            template=self.proxy_chat_template or self.chat_template,
            fallback=self.tokenizer,
        )
        return base, proxy


class _Batch:
    """Some of a request's answers: prompts for both models, sequence ids, parameters."""

    def __init__(
        self,
        base: list[list[int]],
        proxy: list[list[int]],
        sequence: list[int],
        param: Any,
        padded: list[list[int]] | None,
    ) -> None:
        self.base, self.proxy, self.sequence, self.param = base, proxy, sequence, param
        self.padded = padded


class _Request:
    """A call's arguments, checked and with defaults filled in."""

    def __init__(
        self,
        owner: KnapsackDeferral,
        prompts: Any = None,
        *,
        proxy_prompts: Any = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        proxy_input_ids: Tensor | None = None,
        proxy_attention_mask: Tensor | None = None,
        max_new_tokens: int = 128,
        do_sample: bool = True,
        seed: int | torch.Generator | None = None,
        sequence: Sequence[int] | Tensor | None = None,
        num_return_sequences: int = 1,
        eos_token_id: int | Sequence[int] | None = None,
        stop_strings: str | Sequence[str] | None = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        padded_context: bool = False,
        lazy: bool = True,
        trace: bool | str = False,
        speculative: int | str | None = None,
        **rule: Any,
    ) -> None:
        unknown = set(rule) - set(_RULE_KEYS)
        if unknown:
            raise TypeError(f"generate() got an unexpected argument {min(unknown)!r}")
        self.owner = owner
        self.rule = owner._merge_rule(rule)
        self.implicit = self.rule["rule"] == IMPLICIT_REWARD
        self.lazy = lazy and not self.implicit
        if self.lazy and rules.rule_code(self.rule["rule"]) in rules.NEEDS_PROXY:
            self.lazy = False
        if trace not in (False, True, "lazy", "full"):
            raise ValueError(f"trace is {trace!r}, expected False, True, 'full' or 'lazy'")
        if trace and self.implicit:
            raise ValueError(
                "rule 'implicit_reward' has no trace: no token comes from one model alone"
            )
        self.trace = None if not trace else "lazy" if trace == "lazy" else "full"
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
        if num_return_sequences < 1:
            raise ValueError(f"num_return_sequences is {num_return_sequences}, expected at least 1")
        self.max_new_tokens, self.do_sample = max_new_tokens, do_sample
        self.policy = self._policy(speculative)
        self.padded: list[list[int]] | None = None
        if (prompts is None) == (input_ids is None):
            raise ValueError("expected either prompts or input_ids")
        if input_ids is not None:
            base = unpad(input_ids, attention_mask)
            proxy = base
            if padded_context:
                self.padded = [
                    row for row in input_ids.tolist() for _ in range(num_return_sequences)
                ]
        else:
            listed = normalise_prompts(prompts)
            other = None if proxy_prompts is None else normalise_prompts(proxy_prompts)
            base, proxy = owner._encode(listed, other)
        if proxy_input_ids is not None:
            proxy = unpad(proxy_input_ids, proxy_attention_mask)
        if len(base) != len(proxy):
            raise ValueError(f"there are {len(base)} prompts and {len(proxy)} proxy prompts")
        self.base = [p for p in base for _ in range(num_return_sequences)]
        self.proxy = [p for p in proxy for _ in range(num_return_sequences)]
        self._check_prompts()
        rows = len(self.base)
        self.sequence = list(range(rows)) if sequence is None else [int(i) for i in sequence]
        if len(self.sequence) != rows:
            raise ValueError(
                f"sequence has {len(self.sequence)} ids, expected {rows}, one for each answer"
            )
        self.param = self._spread(self.rule["param"], len(base), num_return_sequences)
        self.seed = _seed(seed)
        followers = [*owner.proxies, *owner.anti]
        self.ends = end_ids(
            eos_token_id, [owner.base, *followers], [owner.tokenizer, owner.proxy_tokenizer]
        )
        self.stop = None if stop_strings is None else StopStrings(stop_strings, owner.tokenizer)
        self.processors = _as_list(logits_processor)
        self.criteria = _as_criteria(stopping_criteria)
        self.pad_id = _pad_id(owner, self.ends)

    def _policy(self, speculative: int | str | None) -> FixedLength | AdaptiveLength | None:
        """How long drafts are; None for the plain loop."""
        owner = self.owner
        length = owner.speculative if speculative is None else speculative
        if length is None or (length == 0 and speculative == 0):
            return None
        length = draft_length(length)
        if isinstance(length, int):
            return FixedLength(length)
        # Acceptance is a matter of the rule, costs of what runs at each step.
        rule = [v if isinstance(v, (str, int, float)) else None for v in self.rule.values()]
        key = (*rule, self.lazy, self.do_sample, self.trace)
        memory = owner._memories.get(key)
        if memory is None:
            memory = owner._memories[key] = Memory(
                len(owner.proxies) + len(owner.anti) if self.implicit else 1,
                dense=not self.lazy,
            )
        return AdaptiveLength(memory)

    def _check_prompts(self) -> None:
        """Ids that a model has no embedding for, and contexts that it has no positions for."""
        owner = self.owner
        named = [(owner.base, "base", self.base)]
        named += [(m, "proxy", self.proxy) for m in owner.proxies]
        named += [(m, "anti", self.proxy) for m in owner.anti]
        for model, name, prompts in named:
            size = model.get_input_embeddings().weight.shape[0]
            limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
            for row, prompt in enumerate(prompts):
                if prompt and not 0 <= min(prompt) <= max(prompt) < size:
                    wrong = next(i for i in prompt if not 0 <= i < size)
                    raise ValueError(
                        f"prompt {row} has the id {wrong}, "
                        f"expected ids from 0 to {size - 1} for {name}"
                    )
                if limit and len(prompt) + self.max_new_tokens - 1 > limit:
                    raise ValueError(
                        f"prompt {row} has {len(prompt)} tokens and max_new_tokens is "
                        f"{self.max_new_tokens}, but {name} has only {limit} positions"
                    )

    def _spread(self, param: Any, prompts: int, repeats: int) -> Any:
        """The parameter as the ops take it: None, a float, or float64 ``[answers]``."""
        owner = self.owner
        if self.implicit:
            experts = len(owner.proxies)
            beta = torch.as_tensor(param, dtype=torch.float32).flatten()
            if beta.numel() == 1:
                beta = beta.expand(experts).clone()
            if beta.numel() != experts:
                raise ValueError(
                    f"param has {beta.numel()} betas, expected {experts}, one for each expert"
                )
            return beta.to(_device_of(owner.base))
        if not isinstance(param, (Tensor, Sequence)):
            return param
        values = torch.as_tensor(param, dtype=torch.float64).flatten()
        if values.numel() == 1:
            return float(values)
        if values.numel() == prompts:
            values = values.repeat_interleave(repeats)
        if values.numel() != prompts * repeats:
            raise ValueError(
                f"param has {values.numel()} values, expected 1, {prompts} (one for each prompt) "
                f"or {prompts * repeats} (one for each answer)"
            )
        return values.to(_device_of(owner.base))

    def batches(self, size: int | None) -> list[_Batch]:
        """The answers in batches of ``size``."""
        rows = len(self.base)
        if size is not None and size < 1:
            raise ValueError(f"batch_size is {size}, expected at least 1")
        step = rows if size is None else size
        found = []
        for start in range(0, rows, step) if rows else [0]:
            part = slice(start, start + max(step, 1))
            param = self.param
            if isinstance(param, Tensor) and not self.implicit:
                param = param[part]
            found.append(
                _Batch(
                    self.base[part],
                    self.proxy[part],
                    self.sequence[part],
                    param,
                    None if self.padded is None else self.padded[part],
                )
            )
        return found

    def start(
        self,
        batch: _Batch,
        *,
        events: bool = False,
        progress: Callable[[int], None] | None = None,
        runners: Sequence[Runner] | None = None,
    ) -> Loop:
        """A loop over a batch, on given runners (whose caches are kept) or new ones."""
        owner = self.owner
        device = _device_of(owner.base)
        if runners is None:
            runners = self.runners(batch)
        else:
            with torch.inference_mode():
                for i, runner in enumerate(runners):
                    runner.reload(batch.proxy if i else batch.base, self.max_new_tokens)
        context = None
        if self.processors or self.criteria:
            context = SequenceView(
                batch.base if batch.padded is None else batch.padded, self.max_new_tokens, device
            )
        options = LoopOptions(
            rule=self.rule | {"param": batch.param},
            seed=torch.tensor([self.seed], dtype=torch.int64, device=device),
            sequence=batch.sequence,
            max_new_tokens=self.max_new_tokens,
            do_sample=self.do_sample,
            ends=self.ends,
            stop=self.stop,
            processors=self.processors,
            criteria=self.criteria,
            context=context,
            trace=self.trace,
            events=events,
            progress=progress,
        )
        base, *followers = runners
        if self.policy is not None:
            return self._speculative_loop(base, followers, options)
        if self.implicit:
            return ImplicitReward(base, followers, options, experts=len(owner.proxies))
        if self.lazy:
            return LazyDeferral(base, followers, options)
        return DenseDeferral(base, followers, options)

    def _speculative_loop(
        self, base: Runner, followers: Sequence[Runner], options: LoopOptions
    ) -> Speculative:
        assert self.policy is not None
        if self.implicit:
            experts = len(self.owner.proxies)
            return SpeculativeImplicit(
                base, followers, options, policy=self.policy, experts=experts
            )
        if self.lazy:
            return SpeculativeLazy(base, followers, options, policy=self.policy)
        return SpeculativeDense(base, followers, options, policy=self.policy)

    def runners(self, batch: _Batch) -> list[Runner]:
        """New runners with empty caches, the base's first."""
        owner = self.owner
        models = [(owner.base, "base", batch.base)]
        models += [(m, "proxy", batch.proxy) for m in owner.proxies]
        models += [(m, "anti", batch.proxy) for m in owner.anti]
        masked = owner.vocabulary.masked
        with torch.inference_mode():
            return [
                Runner(
                    model,
                    prompts,
                    room=self.max_new_tokens,
                    vocabulary=owner.vocabulary.size,
                    masked=torch.tensor(masked, device=_device_of(model)) if masked else None,
                    name=name,
                )
                for model, name, prompts in models
            ]

    def result(self, batch: _Batch, loop: Loop) -> Generation:
        """What a finished loop has produced."""
        answers = loop.answers
        tokenizer = self.owner.tokenizer
        texts = None
        if tokenizer is not None:
            texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers.tokens]
            if self.stop is not None:
                texts = [self.stop.cut(text) for text in texts]
        return Generation(
            tokens=answers.tokens,
            deferred=answers.deferred,
            finish=answers.finish,
            prompt_tokens=batch.base,
            texts=texts,
            sequence=batch.sequence,
            seed=self.seed,
            trace=answers.trace if self.trace else None,
            stats=loop.finish_stats(),
        )


def _events(loop: Loop, tokenizer: Any, offset: int = 0) -> Iterator[StreamEvent]:
    """Run a loop, yielding what each step emits."""
    deltas = [TextDeltas(tokenizer) for _ in loop.active] if tokenizer is not None else None
    while not loop.done:
        loop.step()
        for one in loop.events:
            text = (
                None if deltas is None else deltas[one.row].push(one.token, one.finish is not None)
            )
            yield StreamEvent(offset + one.row, one.token, text, one.deferred, one.finish)


def _feed(streamer: Any, loop: Loop, pad: int, first: bool, prompts: list[list[int]]) -> None:
    """Run a loop into a transformers streamer: prompts first, then at most one token a row."""
    rows = len(loop.active)
    if first and len({len(p) for p in prompts}) == 1:
        streamer.put(torch.tensor(prompts))
    while not loop.done:
        loop.step()
        columns: list[list[int]] = []
        seen = [0] * rows
        for one in loop.events:
            if seen[one.row] == len(columns):
                columns.append([pad] * rows)
            columns[seen[one.row]][one.row] = one.token
            seen[one.row] += 1
        for tokens in columns:
            streamer.put(torch.tensor(tokens))


def _report(progress: Callable[[int], None], before: int, finished: int) -> None:
    progress(before + finished)


def _logits_of(model: Any) -> int:
    return model.get_output_embeddings().weight.shape[0]


def _device_of(model: Any) -> torch.device:
    return model.get_input_embeddings().weight.device


def _pad_id(owner: KnapsackDeferral, ends: frozenset[int]) -> int:
    pad = getattr(owner.tokenizer, "pad_token_id", None)
    return pad if pad is not None else min(ends, default=0)


def _seed(seed: int | torch.Generator | None) -> int:
    if seed is None:
        return rng.seed_from_generator(torch.default_generator)
    if isinstance(seed, torch.Generator):
        return rng.seed_from_generator(seed)
    return rng.as_seed(int(seed))


def _as_list(processors: Any) -> Any:
    """A processor list from one processor, several, or none."""
    if processors is None or (isinstance(processors, Sequence) and not len(processors)):
        return None
    from transformers import LogitsProcessorList

    if isinstance(processors, LogitsProcessorList):
        return processors
    return LogitsProcessorList(processors if isinstance(processors, Sequence) else [processors])


def _as_criteria(criteria: Any) -> Any:
    if criteria is None or (isinstance(criteria, Sequence) and not len(criteria)):
        return None
    from transformers import StoppingCriteriaList

    if isinstance(criteria, StoppingCriteriaList):
        return criteria
    return StoppingCriteriaList(criteria if isinstance(criteria, Sequence) else [criteria])
