"""Deferral as a decoding method of transformers: ``generate(custom_generate=tta_ext.hf.kad)``.

The base model's own ``generate`` prepares inputs, logits processors and stopping criteria as ever;
:func:`kad` replaces its token loop. For text, chat templates, traces and conversations use
:class:`tta_ext.KnapsackDeferral`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput, TemperatureLogitsWarper

from tta_ext.decoding import KnapsackDeferral
from tta_ext.decoding.runtime.attention import check_model
from tta_ext.decoding.runtime.compat import passed_cache

__all__ = ["kad"]

log = logging.getLogger("tta_ext")


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
    token_streamer: Any = None,
    lazy: bool = True,
    speculative: int | str | None = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """The token loop for ``model.generate(..., custom_generate=tta_ext.hf.kad, proxy_model=...)``.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs: what
            ``generate`` hands over. Of the configuration, sampling, temperature, processors,
            end-of-sequence and padding ids, lengths and ``return_dict_in_generate`` count.
        proxy_model: the aligned model that takes over rejected tokens.
        anti_model, rule, param, critical, rule_temperature: as in
            :class:`tta_ext.KnapsackDeferral`; the temperature is ``generate``'s.
            ``cache_implementation`` and an empty ``cache`` of any kind (``past_key_values`` before
            transformers 5.24) are accepted, but both models' keys are kept in the loop's own cache,
            which rolls rows back one by one: the cache that was passed stays empty, and a warning
            says so.
        seed, sequence, lazy, speculative: as in :meth:`tta_ext.KnapsackDeferral.generate`; one
            value of ``param`` and one sequence id for each row.
        proxy_input_ids, proxy_attention_mask: what the proxy reads instead of ``input_ids``.
        base_tokenizer, proxy_tokenizer: needed if the models have different numbers of logits.
        token_streamer: gets each step's tokens (transformers does not pass ``streamer`` on to
            custom loops). For stop strings pass ``StopStringCriteria`` in ``stopping_criteria``.

    Returns:
        int64 ``[rows, columns]`` as ``generate`` returns it, or a ``GenerateDecoderOnlyOutput``
        with ``sequences``.

    Raises:
        TypeError, ValueError: one sentence with the offending value and what is accepted.

    Example:
        >>> base.generate(**inputs, custom_generate=tta_ext.hf.kad, proxy_model=proxy, seed=0)
    """
    if proxy_model is None:
        raise ValueError("proxy_model is missing; pass the aligned model to generate()")
    if input_ids.shape[1] == 0:
        raise ValueError("input_ids has no tokens; inputs_embeds are not supported here")
    check_model(model, "base")
    config = generation_config
    _check_cache(model_kwargs, config.cache_implementation)
    temperature, processors = _split_temperature(logits_processor)
    if not config.do_sample:
        temperature = 1.0
    ends = _ids(config.eos_token_id)
    owner = KnapsackDeferral(
        model,
        proxy_model,
        base_tokenizer,
        proxy_tokenizer=proxy_tokenizer,
        anti=anti_model,
        rule=rule,
        param=param,
        critical=critical,
        temperature=temperature,
        rule_temperature=rule_temperature,
    )
    result = owner.generate(
        input_ids=input_ids,
        attention_mask=model_kwargs.get("attention_mask"),
        proxy_input_ids=proxy_input_ids,
        proxy_attention_mask=proxy_attention_mask,
        padded_context=True,
        max_new_tokens=config.max_length - input_ids.shape[1],
        do_sample=config.do_sample,
        seed=seed,
        sequence=sequence,
        eos_token_id=ends,
        logits_processor=processors,
        stopping_criteria=_own_criteria(stopping_criteria),
        streamer=token_streamer,
        lazy=lazy,
        speculative=speculative,
    )
    pad_id = next(iter(_ids(config.pad_token_id) + ends), 0)  # the same as generate's
    answers = pad_sequence(
        [input_ids.new_tensor(tokens) for tokens in result.tokens],
        batch_first=True,
        padding_value=pad_id,
    )
    sequences = torch.cat((input_ids, answers), dim=1)
    if config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]
    return sequences


def _ids(value: int | Sequence[int] | Tensor | None) -> list[int]:
    """Token ids as a configuration may hold them."""
    return [] if value is None else torch.as_tensor(value).flatten().tolist()


def _check_cache(model_kwargs: Mapping[str, Any], implementation: str | None) -> None:
    """Refuse a cache with tokens in it, and say that another one is not used."""
    name, cache, passed = passed_cache(model_kwargs)
    if cache is not None and cache.get_seq_length():
        raise ValueError(
            f"{name} already holds tokens; tta_ext.KnapsackDeferral.chat keeps caches between turns"
        )
    if passed:
        what = f"{name} ({type(cache).__name__})"
    elif implementation not in (None, "dynamic"):
        what = f"cache_implementation={implementation!r}"
    else:
        return
    log.warning(
        f"{what} is not used: rows advance by different numbers of tokens, "
        "for which tta_ext keeps a cache of its own"
    )


def _split_temperature(processors: Any) -> tuple[float, LogitsProcessorList]:
    """The temperature, which belongs to the rule, and the other processors."""
    temperature, others = 1.0, LogitsProcessorList()
    for processor in processors or ():
        if isinstance(processor, TemperatureLogitsWarper):
            temperature *= float(processor.temperature)
        else:
            others.append(processor)
    return temperature, others


def _own_criteria(criteria: Any) -> StoppingCriteriaList:
    """The criteria that the loop does not check itself."""
    return StoppingCriteriaList(
        c for c in criteria or () if not isinstance(c, (EosTokenCriteria, MaxLengthCriteria))
    )
