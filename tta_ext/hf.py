"""Decoding methods of transformers: ``generate(custom_generate=tta_ext.hf.kad)``, or ``hf.aisp``.

The base model's own ``generate`` prepares inputs, logits processors and stopping criteria as ever;
these functions replace its token loop. What becomes of every option is in
:mod:`tta_ext.decoding.runtime.generate_options`: it is honoured, or refused in a sentence. For
text, chat templates, traces and conversations use :class:`tta_ext.KnapsackDeferral` and
:class:`tta_ext.AdaptiveImportanceSampling`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    MaxLengthCriteria,
    StopStringCriteria,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import GenerateDecoderOnlyOutput, TemperatureLogitsWarper

from tta_ext.decoding import KnapsackDeferral
from tta_ext.decoding.rewards import Reward
from tta_ext.decoding.runtime.attention import check_model
from tta_ext.decoding.runtime.compat import holds_tokens, kept_by_generate, passed_cache
from tta_ext.decoding.runtime.generate_options import CONFIG, check_processors, refuse
from tta_ext.decoding.runtime.models import logit_count
from tta_ext.decoding.runtime.processors import AtTemperature
from tta_ext.decoding.runtime.prompts import text_of, unpad
from tta_ext.decoding.runtime.signatures import keywords_of
from tta_ext.decoding.runtime.streaming import check_streamer
from tta_ext.decoding.search.aisp import AdaptiveImportanceSampling, AISPSettings

__all__ = ["MethodOutput", "aisp", "kad"]

log = logging.getLogger("tta_ext")

# Settings of a search that generate() has its own options for.
_GENERATES = ("max_new_tokens", "decoding", "temperature", "top_k", "top_p", "eos_token_id")


@dataclass
class MethodOutput(GenerateDecoderOnlyOutput):
    """What ``return_dict_in_generate`` gives.

    Attributes:
        sequences: int64 ``[rows, columns]``.
        result: the method's own account: a :class:`~tta_ext.decoding.Generation` (sources,
            statistics) or a :class:`~tta_ext.decoding.SearchResult` (rewards, curves).
    """

    result: Any = None


def kad(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    *,
    proxy_model: Any = None,
    anti_model: Any = None,
    rule: str = "threshold",
    param: float | Tensor | Sequence[float] | None = 0.4,
    critical: str = "exclude",
    rule_temperature: float | None = None,
    seed: int | torch.Generator | None = None,
    sequence: Sequence[int] | Tensor | None = None,
    proxy_input_ids: Tensor | None = None,
    proxy_attention_mask: Tensor | None = None,
    base_tokenizer: Any = None,
    proxy_tokenizer: Any = None,
    stop_strings: str | Sequence[str] | None = None,
    token_streamer: Any = None,
    lazy: bool = True,
    speculative: int | str | None = None,
    num_assistant_tokens: int | str | None = None,
    runner: str | None = None,
    **model_kwargs: Any,
) -> Tensor | MethodOutput:
    """The token loop for ``model.generate(..., custom_generate=tta_ext.hf.kad, proxy_model=...)``.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs: what
            ``generate`` hands over; see
            :mod:`~tta_ext.decoding.runtime.generate_options`.
        proxy_model: the aligned model that takes over rejected tokens.
        anti_model, rule, param, critical, rule_temperature, runner: as in
            :class:`tta_ext.KnapsackDeferral`; the temperature is ``generate``'s, and warpers such
            as ``top_p`` cut both models' distributions at that temperature.
            ``cache_implementation`` and an empty ``cache`` of any kind (``past_key_values`` before
            transformers 5.24) are accepted, but both models' keys are kept in the loop's own cache,
            which rolls rows back one by one: the cache that was passed stays empty, and a warning
            says so.
        seed, sequence, lazy, speculative: as in :meth:`tta_ext.KnapsackDeferral.generate`;
            ``param`` may have a value for each prompt or row, ``sequence`` an id for each row.
        proxy_input_ids, proxy_attention_mask: what the proxy reads instead of ``input_ids``, a row
            for each prompt, or for each answer.
        base_tokenizer, proxy_tokenizer: needed for stop strings, and if the models have different
            numbers of logits. (``generate`` does not hand its ``tokenizer`` to custom loops.)
        stop_strings: strings that end an answer, which keeps them.
        token_streamer: gets prompts and each step's tokens; ``streamer`` is the same.
        num_assistant_tokens: transformers' name for ``speculative``.

    Returns:
        int64 ``[rows, columns]`` as ``generate`` returns it, or with ``return_dict_in_generate`` a
        :class:`MethodOutput`. An answer that a criterion ends is padded from there on, also where
        there is no end-of-sequence id.

    Raises:
        TypeError, ValueError: one sentence with the offending value and what is accepted.

    Example:
        >>> base.generate(**inputs, custom_generate=tta_ext.hf.kad, proxy_model=proxy, seed=0)
    """
    call = _Call("kad", model, input_ids, generation_config, stopping_criteria, model_kwargs)
    if proxy_model is None:
        raise ValueError("proxy_model is missing; pass the aligned model to generate()")
    config, criteria = call.config, call.criteria
    models = [model]
    for more in (proxy_model, anti_model):
        models += more if isinstance(more, (list, tuple)) else [] if more is None else [more]
    for one in models:
        check_model(one, "base" if one is model else "proxy")
    if base_tokenizer is None and proxy_tokenizer is None:
        sizes = [logit_count(one) for one in models]
        if len(set(sizes)) > 1:
            raise ValueError(
                f"base has {sizes[0]} logits and proxy {next(n for n in sizes if n != sizes[0])}, "
                "and without a tokenizer padding cannot be told from tokens; pass base_tokenizer="
            )
    if stop_strings is not None:
        if base_tokenizer is None:
            raise ValueError("stop_strings need a tokenizer; pass base_tokenizer=")
        strings = stop_strings if isinstance(stop_strings, str) else list(stop_strings)
        criteria = [*criteria, StopStringCriteria(base_tokenizer, strings)]
    if num_assistant_tokens is None and CONFIG["num_assistant_tokens"].is_set(
        config.num_assistant_tokens
    ):
        num_assistant_tokens = config.num_assistant_tokens
    streamer = call.kept.get("streamer")
    if streamer is not None and token_streamer is not None:
        raise ValueError("streamer and token_streamer are one argument; pass one of them")
    temperature, processors = _split_temperature(list(logits_processor or ()))
    # A prompt is run once for all of its answers, unless the proxy reads another for each.
    rows, repeats = len(input_ids), config.num_return_sequences or 1
    if proxy_input_ids is not None and len(proxy_input_ids) == rows:
        repeats = 1
    mask = call.model_kwargs.get("attention_mask")
    with _modes_kept(models):
        owner = KnapsackDeferral(
            model,
            proxy_model,
            base_tokenizer,
            proxy_tokenizer=proxy_tokenizer,
            anti=anti_model,
            rule=rule,
            param=param,
            critical=critical,
            temperature=temperature if config.do_sample else 1.0,
            rule_temperature=rule_temperature,
            runner=runner,
        )
        result = owner.generate(
            input_ids=input_ids[::repeats],
            attention_mask=None if mask is None else mask[::repeats],
            proxy_input_ids=proxy_input_ids,
            proxy_attention_mask=proxy_attention_mask,
            padded_context=True,
            pad_token_id=call.pad,
            max_new_tokens=call.room,
            do_sample=bool(config.do_sample),
            num_return_sequences=repeats,
            seed=seed,
            sequence=sequence,
            eos_token_id=call.ends,
            logits_processor=processors,
            stopping_criteria=criteria,
            streamer=token_streamer if streamer is None else _Answers(streamer),
            lazy=lazy,
            speculative=speculative,
            num_assistant_tokens=num_assistant_tokens,
        )
    return call.output(result.tokens, result)


@keywords_of(AISPSettings, *_GENERATES)
def aisp(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    *,
    reward: Reward | None = None,
    base_tokenizer: Any = None,
    reward_prompts: Sequence[Any] | None = None,
    seed: int | torch.Generator | None = None,
    sequence: Sequence[int] | None = None,
    runner: str | None = None,
    **options: Any,
) -> Tensor | MethodOutput:
    """The loop for ``model.generate(..., custom_generate=tta_ext.hf.aisp, reward=...)``.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config: what ``generate``
            hands over; see :mod:`~tta_ext.decoding.runtime.generate_options`. ``do_sample`` says
            whether tokens are drawn under the noise or the most probable ones are taken.
        reward: ``(prompts, responses) -> floats``, see :mod:`tta_ext.decoding.rewards`.
        base_tokenizer: makes text for the reward; without it, it gets token ids. (``generate`` does
            not hand its ``tokenizer`` to custom loops.)
        reward_prompts: the prompts that the reward gets, one for each row; default: their text, or
            their ids without a tokenizer.
        seed, sequence: as in :meth:`tta_ext.AdaptiveImportanceSampling.generate`.
        runner: as in :class:`tta_ext.AdaptiveImportanceSampling`.
        options: fields of :class:`~tta_ext.decoding.search.aisp_settings.AISPSettings` that
            ``generate`` has no option for, and inputs of the model.

    Returns:
        The best answer to each prompt, as ``generate`` returns it, or with
        ``return_dict_in_generate`` a :class:`MethodOutput`.

    Raises:
        TypeError, ValueError: one sentence with the offending value and what is accepted.

    Example:
        >>> base.generate(**inputs, custom_generate=tta_ext.hf.aisp, reward=reward,
        ...               base_tokenizer=tokenizer, n=16, iterations=8, max_new_tokens=32)
    """
    names = {one.name for one in fields(AISPSettings)}
    settings = {name: options.pop(name) for name in names if name in options}
    call = _Call("aisp", model, input_ids, generation_config, stopping_criteria, options)
    if reward is None:
        raise ValueError("reward is missing; pass (prompts, responses) -> floats to generate()")
    check_processors(call.criteria, "aisp")
    if call.criteria:
        raise ValueError("stopping_criteria are not used by hf.aisp: pass stop_strings=")
    settings |= _distribution(logits_processor or ())
    prompts = unpad(input_ids, call.model_kwargs.get("attention_mask"))
    if reward_prompts is None and base_tokenizer is not None:
        reward_prompts = [text_of(base_tokenizer, ids) for ids in prompts]
    with _modes_kept([model]):
        method = AdaptiveImportanceSampling(model, reward, base_tokenizer, runner=runner)
        search = method.start(
            prompts,
            seed=seed,
            sequence=sequence,
            max_new_tokens=call.room,
            decoding="sample" if call.config.do_sample else "greedy",
            eos_token_id=call.ends,
            **settings,
        )
        if reward_prompts is not None:
            if len(reward_prompts) != len(prompts):
                raise ValueError(
                    f"reward_prompts has {len(reward_prompts)} prompts, expected {len(prompts)}"
                )
            search.prompts[:] = reward_prompts  # the list that the scorer has too
        search.run()
    result = search.result()
    return call.output([best.tokens for best in result.best], result)


class _Call:
    """What ``generate`` hands over, checked.

    Attributes:
        config: its configuration.
        kept: what only its frame knows.
        ends, room, pad: ids that end an answer, tokens that it may have, what stands behind it.
        criteria: stopping criteria besides ends and lengths.
    """

    def __init__(
        self,
        method: str,
        model: Any,
        input_ids: Tensor,
        config: Any,
        criteria: Any,
        model_kwargs: dict[str, Any],
    ) -> None:
        self.input_ids, self.config, self.model_kwargs = input_ids, config, model_kwargs
        self.kept = kept_by_generate()
        fields_of = vars(GenerationConfig()).keys()
        given = {key: value for key, value in vars(config).items() if key in fields_of}
        cache_name, cache, passed = passed_cache(model_kwargs)
        check_model(model, "base")
        warned = refuse({**given, **self.kept, **model_kwargs}, method)
        if input_ids.shape[1] == 0:
            raise ValueError("input_ids has no tokens; inputs_embeds are not supported here")
        if holds_tokens(cache):
            raise ValueError(
                f"{cache_name} already holds tokens; tta_ext.KnapsackDeferral.chat keeps caches "
                "between turns"
            )
        if passed:
            warned = [f"{cache_name} ({type(cache).__name__})", *warned]
        for what in warned:
            log.warning(
                f"{what} is not used: rows advance by different numbers of tokens, "
                "for which tta_ext keeps a cache of its own"
            )
        _check_positions(model_kwargs)
        self.criteria, lengths, ends = [], [], None
        for one in criteria or ():
            if type(one) is MaxLengthCriteria:
                lengths.append(int(one.max_length))
            elif type(one) is EosTokenCriteria:
                ends = _ids(one.eos_token_id) + (ends or [])
            else:
                self.criteria.append(one)
        self.ends = _ids(config.eos_token_id) if criteria is None else ends or []
        # The first token comes whatever the length, as in transformers.
        self.room = max(1, min(lengths or [config.max_length]) - input_ids.shape[1])
        pads = _ids(config.pad_token_id) + _ids(config.eos_token_id)
        self.pad = next(iter(pads), 0)  # the same as generate's

    def output(self, tokens: Sequence[Sequence[int]], result: Any) -> Tensor | MethodOutput:
        """Prompts and answers as ``generate`` returns them."""
        answers = pad_sequence(
            [self.input_ids.new_tensor(row) for row in tokens],
            batch_first=True,
            padding_value=self.pad,
        )
        sequences = torch.cat((self.input_ids, answers), dim=1)
        if self.config.return_dict_in_generate:
            return MethodOutput(sequences=sequences, result=result)  # type: ignore[arg-type]
        return sequences


class _Answers:
    """A streamer that has the prompts already, from ``generate`` itself."""

    def __init__(self, streamer: Any) -> None:
        check_streamer(streamer)
        self.streamer, self.first = streamer, True

    def put(self, value: Tensor) -> None:
        if not self.first:
            self.streamer.put(value)
        self.first = False

    def end(self) -> None:
        self.streamer.end()


def _ids(value: int | Sequence[int] | Tensor | None) -> list[int]:
    """Token ids as a configuration may hold them."""
    return [] if value is None else torch.as_tensor(value).flatten().tolist()


def _check_positions(model_kwargs: Mapping[str, Any]) -> None:
    """Positions count from 0 over what is no padding, as ``generate`` makes them."""
    positions, mask = model_kwargs.get("position_ids"), model_kwargs.get("attention_mask")
    if positions is None:
        return
    if mask is None:
        expected = torch.arange(positions.shape[-1], device=positions.device).expand_as(positions)
    else:
        expected = (mask.long().cumsum(-1) - 1).clamp(min=0)
    kept = torch.ones_like(expected) if mask is None else mask
    if positions.shape[-1] != expected.shape[-1] or not bool(
        ((positions == expected) | (kept == 0)).all()
    ):
        raise ValueError("position_ids cannot be used here: positions count from 0 in each row")


def _split_temperature(processors: list[Any]) -> tuple[float, list[Any]]:
    """The temperature, which belongs to the rule, and the processors without it.

    Those behind it see the scores at that temperature.
    """
    for place, one in enumerate(processors):
        if isinstance(one, TemperatureLogitsWarper):
            temperature = float(one.temperature)
            more, behind = _split_temperature(processors[place + 1 :])
            wrapped: list[LogitsProcessor] = [AtTemperature(temperature, behind)] if behind else []
            return temperature * more, processors[:place] + wrapped
    return 1.0, processors


def _distribution(processors: Sequence[Any]) -> dict[str, Any]:
    """Settings of a search from ``generate``'s warpers; it takes no other processors."""
    found: dict[str, Any] = {}
    for one in processors:
        if type(one) is TemperatureLogitsWarper:
            found["temperature"] = float(one.temperature)
        elif type(one) is TopKLogitsWarper:
            found["top_k"] = one.top_k
        elif type(one) is TopPLogitsWarper:
            found["top_p"] = one.top_p
        else:
            raise ValueError(
                f"{type(one).__name__} cannot be used with hf.aisp: rollouts take no logits "
                "processors besides temperature, top_k and top_p"
            )
    return found


@contextmanager
def _modes_kept(models: Sequence[Any]) -> Iterator[None]:
    """Gives modules that were in training mode back as they were."""
    training = [part for model in models for part in model.modules() if part.training]
    try:
        yield
    finally:
        for part in training:
            part.training = True
