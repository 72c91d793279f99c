"""Knapsack deferral: a large base model proposes, a small aligned proxy takes over rejected tokens.

:class:`KnapsackDeferral` is the entry point: prompts in, aligned text out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from tta_ext.decoding.deferral.chat import Chat
from tta_ext.decoding.deferral.draft_length import Memory
from tta_ext.decoding.deferral.implicit_reward import ImplicitReward
from tta_ext.decoding.deferral.options import GenerationOptions, draft_length, draft_source
from tta_ext.decoding.deferral.request import Models, Request
from tta_ext.decoding.deferral.result import Generation
from tta_ext.decoding.runtime.attention import check_model
from tta_ext.decoding.runtime.fit import fit_model
from tta_ext.decoding.runtime.loading import LoadingOptions, load_model, load_tokenizer
from tta_ext.decoding.runtime.models import class_name, device_of, logit_count, refuse_path
from tta_ext.decoding.runtime.signatures import keywords_of
from tta_ext.decoding.runtime.streaming import StreamEvent, check_streamer
from tta_ext.decoding.runtime.views import adapter_pair, as_model, share_weights
from tta_ext.decoding.runtime.vocabulary import align_vocabularies
from tta_ext.rules import ARGMAX, IMPLICIT_REWARD, Rule, rule_code

__all__ = ["KnapsackDeferral"]

_RULE_KEYS = ("rule", "param", "critical", "temperature", "rule_temperature")
# What a request is made of besides a call's keywords; what a conversation supplies itself.
_OWN = ("models", "rule", "memories")
_PROMPTS = (
    "prompts",
    "proxy_prompts",
    "input_ids",
    "attention_mask",
    "proxy_input_ids",
    "proxy_attention_mask",
    "padded_context",
)
_TURN = [name for name in GenerationOptions.__annotations__ if name not in _PROMPTS]
_BOTH = "rule is a Rule, which brings param, critical, temperature and rule_temperature with it"


class _Options(LoadingOptions, total=False):
    """The keywords of :meth:`KnapsackDeferral.from_pretrained`: the constructor's and loading's."""

    rule: str | Rule
    param: float | Tensor | Sequence[float] | None
    critical: str
    temperature: float
    rule_temperature: float | None
    chat_template: str | None
    proxy_chat_template: str | None
    speculative: int | str | None
    num_assistant_tokens: int | str | None
    draft: str | None
    probe: bool
    runner: str | None


class KnapsackDeferral:
    """Two frozen models and the rule by which one defers to the other.

    Args:
        base: a ``transformers`` causal language model, the one that knows.
        proxy: a smaller causal language model over the same vocabulary, the one that is aligned.
            For ``rule="implicit_reward"``, one or more experts.
        tokenizer: the base's tokenizer, and the proxy's unless ``proxy_tokenizer`` is given. Not
            needed if prompts are token ids.
        proxy_tokenizer: the proxy's tokenizer: same vocabulary, perhaps another chat template.
        rule: a name of :mod:`tta_ext.rules`; a :class:`tta_ext.Rule`, which brings the next four
            arguments with it; or ``"implicit_reward"``
            (:mod:`tta_ext.decoding.deferral.implicit_reward`).
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
            same seed, same tokens, faster where drafts are cheap and mostly stand. ``"auto"``
            chooses lengths by measured costs and acceptance, which this object remembers from call
            to call, and leaves drafting where it does not pay. None decodes token by token.
        num_assistant_tokens: transformers' name for ``speculative``.
        draft: who drafts: ``"proxy"`` (None too; the first expert of several); ``"base"``, for a
            proxy that is slow, which then reads a draft at once; or ``"lookup"``, nobody: drafts
            are what followed the same words before, in prompt or answer.
        probe: try each model on two short rows, to learn whether rows of different length can
            share its batch.
        runner: ``"ragged"`` or ``"lockstep"`` for all models; None chooses for each by what it is.
            Lock-step decodes whatever ``generate`` does, with all rows fed at every step: there the
            proxy is never lazy, and all rows draft as many tokens.
        adapter: name of an adapter of ``base``, a peft model: the proxy is that model with the
            adapter on, the base the same weights with all adapters off; ``proxy`` is then None.

    Raises:
        TypeError: a model is not a causal language model.
        ValueError: a model of a kind that cannot be used, an unknown rule, vocabularies that
            differ.

    Both models are put into evaluation mode.

    Attributes:
        fits: how each model is run and why, the base's first:
            :class:`~tta_ext.decoding.runtime.fit.Fit`.

    Example:
        >>> kad = KnapsackDeferral(base, proxy, tokenizer, rule="threshold", param=0.4)
        >>> print(kad.generate("Q: 2 + 2?\\nA:", max_new_tokens=20, seed=0).text)
    """

    def __init__(
        self,
        base: Any,
        proxy: Any = None,
        tokenizer: Any = None,
        *,
        proxy_tokenizer: Any = None,
        rule: str | Rule = "threshold",
        param: float | Tensor | Sequence[float] | None = 0.4,
        critical: str = "exclude",
        temperature: float = 1.0,
        rule_temperature: float | None = None,
        anti: Any = None,
        chat_template: str | None = None,
        proxy_chat_template: str | None = None,
        speculative: int | str | None = None,
        num_assistant_tokens: int | str | None = None,
        draft: str | None = None,
        probe: bool = True,
        runner: str | None = None,
        adapter: str | None = None,
    ) -> None:
        self.speculative = draft_length(_either(speculative, num_assistant_tokens))
        self.draft = draft_source(draft)
        self._memories: dict[Any, Memory] = {}
        for name, given_model in (("base", base), ("proxy", proxy), ("anti", anti)):
            refuse_path(given_model, name, type(self).__name__)
        if (proxy is None) == (adapter is None):
            raise ValueError("expected either proxy or adapter, the name of an adapter of base")
        if adapter is not None:
            base, proxy = adapter_pair(base, adapter)
        proxies = list(proxy) if isinstance(proxy, Sequence) else [proxy]
        antis = [] if anti is None else list(anti) if isinstance(anti, Sequence) else [anti]
        proxies = [as_model(model, "proxy") for model in proxies]
        antis = [as_model(model, "anti") for model in antis]
        base = as_model(base, "base")
        for model in proxies:
            base = share_weights(base, model)
            antis = [share_weights(anti, model) for anti in antis]
        if not proxies:
            raise ValueError("proxy is an empty list, expected a model or several")
        named = [(base, "base")]
        named += [(m, "proxy") for m in proxies] + [(m, "anti") for m in antis]
        for model, name in named:
            check_model(model, name)
            model.eval()
        proxy_tokenizer = tokenizer if proxy_tokenizer is None else proxy_tokenizer
        sizes = [logit_count(model) for model, _ in named]
        # All agree: ids come from the tokenizers, or all models have the same number of logits.
        vocabulary, *_ = [
            align_vocabularies(sizes[0], size, tokenizer, proxy_tokenizer, proxy_name=name)
            for size, (_, name) in zip(sizes[1:], named[1:], strict=True)
        ]
        self.base, self.proxies, self.anti = base, proxies, antis
        self.tokenizer, self.proxy_tokenizer = tokenizer, proxy_tokenizer
        self.vocabulary = vocabulary
        self._models = Models(
            base=base,
            proxies=proxies,
            anti=antis,
            tokenizer=tokenizer,
            proxy_tokenizer=proxy_tokenizer,
            chat_template=chat_template,
            proxy_chat_template=proxy_chat_template,
            vocabulary=vocabulary,
            fits=[],
        )
        given = (param, critical, temperature, rule_temperature)
        if isinstance(rule, Rule):
            if isinstance(param, (Tensor, Sequence)) or given != (0.4, "exclude", 1.0, None):
                raise ValueError(_BOTH)
            given = (rule.param, rule.critical, rule.temperature, rule.rule_temperature)
            rule = rule.name
        elif isinstance(param, float) and param == 0.4 and _is_argmax(rule):
            given = (None, *given[1:])
        self._given: dict[str, Any] = dict(zip(_RULE_KEYS, (rule, *given), strict=True))
        self.rule = self._chosen({})
        self._models.fits.extend(
            fit_model(model, name, runner, probe, proxy_tokenizer if i else tokenizer)
            for i, (model, name) in enumerate(named)
        )
        self.fits = self._models.fits

    def __repr__(self) -> str:
        models = [
            f"{name}={class_name(model)} ({fit.kind})"
            for (model, name), fit in zip(self._models.named, self._models.fits, strict=True)
        ]
        return f"{type(self).__name__}({', '.join(models)}, rule={self.rule!r})"

    @classmethod
    @keywords_of(
        __init__,
        "base",
        "proxy",
        "tokenizer",
        "proxy_tokenizer",
        "anti",
        "adapter",
        also=LoadingOptions.__annotations__,
    )
    def from_pretrained(
        cls,
        base: str,
        proxy: str,
        *,
        anti: str | None = None,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        proxy_loading: LoadingOptions | None = None,
        **options: Unpack[_Options],
    ) -> KnapsackDeferral:
        """Load two models and their tokenizers (safetensors or GGUF) and pair them.

        Args:
            base, proxy, anti: folders, ``.gguf`` files or hub names.
            dtype: dtype of the weights; ``"auto"`` keeps the files'.
            device: where the models go; None leaves them on the CPU.
            proxy_loading: loading options of proxy and anti that differ from the base's.
            options: ``device_map``, ``attn_implementation``, ``quantization_config``, ``revision``
                and the other :class:`~tta_ext.decoding.runtime.loading.LoadingOptions` go to
                transformers, the rest to the constructor.

        Raises:
            TypeError, ValueError: as :func:`~tta_ext.decoding.runtime.loading.load_model` and the
                constructor.
        """
        given: dict[str, Any] = dict(options)
        own: Any = {k: given.pop(k) for k in LoadingOptions.__annotations__ if k in given}
        theirs: Any = {**own, **(proxy_loading or {})}
        named = (("base", base, own), ("proxy", proxy, theirs), ("anti", anti, theirs))
        models = {
            name: load_model(path, dtype=dtype, device=device, **loading)
            for name, path, loading in named
            if path is not None
        }
        return cls(
            models["base"],
            models["proxy"],
            load_tokenizer(base, **own),
            proxy_tokenizer=load_tokenizer(proxy, **theirs),
            anti=models.get("anti"),
            **given,
        )

    # ---- public calls ------------------------------------------------------------------------

    @keywords_of(Request, *_OWN, also=GenerationOptions.__annotations__)
    def generate(
        self,
        prompts: Any = None,
        *,
        batch_size: int | None = None,
        streamer: Any = None,
        progress: Callable[[int], None] | None = None,
        **options: Unpack[GenerationOptions],
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
            top_k, top_p, min_p: cut both models' distributions before the rule looks at them: keep
                the k most probable tokens; the smallest set with this mass; tokens with this share
                of the highest probability. After ``logits_processor``, in this order, at the rule's
                ``temperature``, as in transformers. For ``"implicit_reward"``, the base's alone.
            seed: an int, or a ``torch.Generator`` that supplies one; None takes one from torch's
                default generator.
            sequence: 32-bit ids of the answers' random streams, one for each answer; default
                0, 1, ... The same seed and id give an answer the same random numbers in any batch.
            num_return_sequences: answers for each prompt; its prompt is run once.
            rule, param, critical, temperature, rule_temperature: in place of the constructor's.
            speculative, num_assistant_tokens, draft: in place of the constructor's;
                ``speculative=0`` turns drafts off.
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
            padded_context: with ``input_ids``, processors and criteria see them as they are,
                padding included, and every row at each call, as in transformers' own ``generate``.
            pad_token_id: what stands behind answers that have ended, where processors, criteria and
                streamers see several; default: the tokenizer's, or an end of answer.
            errors: a row whose logits have NaN or +inf, or nothing finite, has no token.
                ``"raise"`` stops with a ``ValueError`` that names prompt, position and model;
                ``"finish"`` ends that answer alone, with ``finish`` ``"error"`` and the sentence in
                :attr:`Generation.errors`.
            answer_budget: share, 0 to 1, that the proxy may write at most of what
                ``answer_spending`` says; where it is spent the base writes alone, whatever the rule
                says. None: no bound.
            answer_spending: ``"greedy"`` (None too): the share of ``max_new_tokens``, first come,
                first served; ``"running"``: the share of every beginning of the answer.
            batch_size: prompts in a batch at most; None takes all at once.
            streamer: an object with ``put`` and ``end``, such as transformers'
                ``TextIteratorStreamer``; gets the prompts' ids, then each step's.
            progress: called with the number of finished answers whenever it changes.

        Raises:
            TypeError, ValueError: one sentence with the offending value and what is accepted.
        """
        request = self.request(prompts, **options)
        if streamer is not None:
            check_streamer(streamer)
            if batch_size is not None and batch_size < len(request.base) // request.repeats:
                raise ValueError("a streamer takes one batch; leave batch_size out")
        parts: list[Generation] = []
        done = 0

        def report(finished: int) -> None:
            assert progress is not None
            progress(done + finished)

        for batch in request.batches(batch_size):
            loop = request.start(
                batch,
                events=streamer is not None,
                progress=None if progress is None else report,
            )
            if streamer is None:
                loop.run()
            else:
                request.feed(streamer, loop, batch.base)
            parts.append(request.result(batch, loop))
            done += len(parts[-1])
        if streamer is not None:
            streamer.end()
        return Generation.concatenate(parts)

    @keywords_of(Request, *_OWN, also=GenerationOptions.__annotations__)
    def stream(
        self,
        prompts: Any = None,
        *,
        batch_size: int | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Iterator[StreamEvent]:
        """Answer prompts, yielding each token as it comes; arguments as :meth:`generate`."""
        request = self.request(prompts, **options)
        for batch in request.batches(batch_size):
            yield from request.stream(request.start(batch, events=True), batch.first)

    @keywords_of(Request, *_OWN, *_PROMPTS, also=_TURN)
    def chat(self, system: str | None = None, **options: Unpack[GenerationOptions]) -> Chat:
        """A conversation that keeps both models' caches between turns; see :class:`Chat`."""
        return Chat(self.request, system, **options)

    def request(self, prompts: Any = None, **options: Unpack[GenerationOptions]) -> Request:
        """A call's arguments, checked: what :meth:`generate` runs, for loops of one's own."""
        given: dict[str, Any] = dict(options)
        unknown = given.keys() - GenerationOptions.__annotations__.keys()
        if unknown:
            raise TypeError(f"generate() got an unexpected argument {min(unknown)!r}")
        rule = self._chosen({key: given.pop(key) for key in _RULE_KEYS if key in given})
        length = _either(given.pop("speculative", None), given.pop("num_assistant_tokens", None))
        if length is None:
            length = self.speculative
        given["draft"] = given.get("draft") or self.draft
        return Request(self._models, rule, self._memories, prompts, speculative=length, **given)

    def _chosen(self, changes: dict[str, Any]) -> Rule | ImplicitReward:
        """The constructor's rule with a call's changes."""
        changes = {key: value for key, value in changes.items() if value is not None}
        rule, models = changes.get("rule"), self._models
        if isinstance(rule, Rule):
            if len(changes) > 1:
                raise ValueError(_BOTH)
            changes = dict(zip(_RULE_KEYS, (rule.name, rule.param, rule.critical), strict=False))
            changes |= {"temperature": rule.temperature, "rule_temperature": rule.rule_temperature}
        elif rule is not None and _is_argmax(rule):
            changes.setdefault("param", None)
        merged = self._given | changes
        name, param = merged["rule"], merged["param"]
        if not isinstance(param, Tensor) and hasattr(param, "tolist"):
            param = param.tolist()  # of NumPy
        experts, antis = len(models.proxies), len(models.anti)
        if name == IMPLICIT_REWARD:
            if antis and antis != experts:
                raise ValueError(
                    f"anti has {antis} models, expected one for each of {experts} experts"
                )
            for key, unused in (("critical", "exclude"), ("rule_temperature", None)):
                if merged[key] != unused:
                    raise ValueError(f"{key} is {merged[key]!r}, which rule {name!r} does not use")
            mixture = ImplicitReward.of(param, experts, merged["temperature"])
            return replace(mixture, param=mixture.param.to(device_of(models.base)))
        if experts != 1 or antis:
            raise ValueError(
                f"rule is {name!r}, which takes one proxy and no anti; got {experts} and {antis}"
            )
        if isinstance(param, Tensor):
            param = param.flatten().tolist()  # each is checked
        return Rule(name, param, *(merged[key] for key in _RULE_KEYS[2:]))


def _is_argmax(rule: str) -> bool:
    return rule != IMPLICIT_REWARD and rule_code(rule) == ARGMAX


def _either(speculative: int | str | None, assistant: int | str | None) -> int | str | None:
    """The draft length under one of its two names."""
    if speculative is not None and assistant is not None:
        raise ValueError("speculative and num_assistant_tokens are one argument; pass one of them")
    return assistant if speculative is None else speculative
