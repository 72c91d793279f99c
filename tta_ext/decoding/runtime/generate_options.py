"""What becomes of each option of transformers' ``generate`` in a loop that replaces its own.

A table for each kind of thing: arguments of ``generate``, fields of its configuration, logits
processors, stopping criteria, streamers. A name is honoured (the same as in transformers where the
rule never defers) or refused, with the reason. ``tests/test_hf_options.py`` goes through the
installed transformers and fails on a name that is in none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "ARGUMENTS",
    "CONFIG",
    "CRITERIA",
    "PROCESSORS",
    "STREAMERS",
    "Option",
    "check_processors",
    "kind_of",
    "page",
    "refuse",
]


@dataclass(frozen=True)
class Option:
    """What becomes of one name.

    Attributes:
        kad: "" if ``hf.kad`` honours it, else why it is refused.
        aisp: the same of ``hf.aisp``; None: as ``kad``.
        unset: values that ask for nothing.
        warn: accepted, but without effect, and a warning says so; tokens do not depend on it.
        by_row: of a processor: its result for a row depends on that row alone, so any rows may be
            processed together. Others see every row of the call, as in transformers.
    """

    kad: str = ""
    aisp: str | None = None
    unset: tuple[Any, ...] = (None, False)
    warn: bool = False
    by_row: bool = False

    def why(self, method: str) -> str:
        """Why a method refuses it; "" if it does not."""
        return self.kad if method == "kad" or self.aisp is None else self.aisp

    def is_set(self, value: Any) -> bool:
        """Whether a value asks for something."""
        plain = isinstance(value, (bool, int, float, str, type(None)))
        return not (plain and value in self.unset)


def _refused(why: str, *unset: Any, aisp: str | None = None) -> Option:
    return Option(why, aisp, (None, False, *unset))


def _assisted(*unset: Any, more: str = "") -> Option:
    why = f"drafts come from proxy_model, with speculative= or num_assistant_tokens={more}"
    return _refused(why, *unset, aisp="a search has no drafts")


_NO_PROCESSORS = "rollouts take no logits processors"
_HONOURED = Option()
_WARNED = Option(warn=True)
# Honoured by hf.kad through transformers' own logits processor.
_PROCESSED = Option("", _NO_PROCESSORS)
_BEAMS = _HONOURED  # of beam search, which is refused; without beams transformers ignores it too
_ENCODER = _HONOURED  # of encoder-decoders, which are refused
_CRITERION = "rollouts take no stopping criteria"

CONFIG: dict[str, Option] = {
    "_from_model_config": _HONOURED,
    "transformers_version": _HONOURED,
    # Lengths and ends.
    "max_length": _HONOURED,
    "max_new_tokens": _HONOURED,
    "min_length": Option("", _NO_PROCESSORS, (None, 0)),
    "min_new_tokens": Option("", _NO_PROCESSORS, (None, 0)),
    "max_time": Option("", "pass max_seconds=, which no iteration starts after"),
    "stop_strings": _refused(
        "in a configuration its tokenizer is kept from custom loops; pass stop_strings= and "
        "base_tokenizer= to generate"
    ),
    "eos_token_id": _HONOURED,
    "pad_token_id": _HONOURED,
    "bos_token_id": _HONOURED,
    "decoder_start_token_id": _ENCODER,
    # Modes.
    "do_sample": _HONOURED,
    "num_return_sequences": Option("", "a search has one answer a prompt", (None, 1)),
    "num_beams": _refused("there is no beam search here", 1),
    "early_stopping": _BEAMS,
    "length_penalty": _BEAMS,
    "num_beam_groups": _BEAMS,
    "diversity_penalty": _BEAMS,
    "constraints": _refused("it needs beam search"),
    "force_words_ids": _refused("it needs beam search"),
    "penalty_alpha": _refused("it is another decoding method", 0.0),
    "dola_layers": _refused("it is another decoding method"),
    "use_mtp": _assisted(),
    "is_assistant": _refused("it makes the model another one's assistant"),
    "num_assistant_tokens": Option("", "a search has no drafts", (None, 20)),
    "num_assistant_tokens_schedule": _assisted("constant", more="'auto'"),
    "assistant_confidence_threshold": _assisted(0.4, 0.0),
    "prompt_lookup_num_tokens": _assisted(),
    "max_matching_ngram_size": _assisted(),
    "assistant_early_exit": _assisted(),
    "assistant_lookbehind": _assisted(10),
    "target_lookbehind": _assisted(10),
    "assistant_ensemble_weight": _assisted(),
    "speculation_type": _assisted(),
    # The distribution.
    "temperature": _HONOURED,
    "top_k": _HONOURED,
    "top_p": _HONOURED,
    "min_p": _PROCESSED,
    "top_h": _PROCESSED,
    "typical_p": Option("", _NO_PROCESSORS, (None, 1.0)),
    "epsilon_cutoff": Option("", _NO_PROCESSORS, (None, 0.0)),
    "eta_cutoff": Option("", _NO_PROCESSORS, (None, 0.0)),
    "repetition_penalty": Option("", _NO_PROCESSORS, (None, 1.0)),
    "encoder_repetition_penalty": Option("", _NO_PROCESSORS, (None, 1.0)),
    "no_repeat_ngram_size": Option("", _NO_PROCESSORS, (None, 0)),
    "encoder_no_repeat_ngram_size": Option("", _NO_PROCESSORS, (None, 0)),
    "bad_words_ids": _PROCESSED,
    "renormalize_logits": _PROCESSED,
    "forced_bos_token_id": _PROCESSED,
    "forced_eos_token_id": _PROCESSED,
    "remove_invalid_values": _PROCESSED,
    "exponential_decay_length_penalty": _PROCESSED,
    "suppress_tokens": _PROCESSED,
    "begin_suppress_tokens": _PROCESSED,
    "sequence_bias": _PROCESSED,
    "watermarking_config": _PROCESSED,
    "token_healing": _refused("its tokenizer is kept from custom loops; heal the prompt before"),
    "guidance_scale": _refused(
        "its processor runs the model itself and keeps a state that drafts and the other model's "
        "logits would spoil",
        1,
        1.0,
        aisp=_NO_PROCESSORS,
    ),
    # What comes back.
    "return_dict_in_generate": _HONOURED,
    "output_attentions": _refused("no attentions are kept; run the model over the sequences"),
    "output_hidden_states": _refused("no hidden states are kept; run the model over the sequences"),
    "output_scores": _refused(
        "a token comes from two models' scores; KnapsackDeferral.generate(trace=True) keeps them",
        aisp="an answer is one of many rollouts, whose scores are not kept",
    ),
    "output_logits": _refused(
        "a token comes from two models' logits; KnapsackDeferral.generate(trace=True) keeps them",
        aisp="an answer is one of many rollouts, whose logits are not kept",
    ),
    # Caches and speed, which change no token.
    "use_cache": Option(unset=(None, True), warn=True),
    "cache_implementation": Option(unset=(None, "dynamic"), warn=True),
    "cache_config": _WARNED,
    "max_cache_len": _WARNED,
    "prefill_chunk_size": _WARNED,
    "low_memory": _WARNED,
    "compile_config": _WARNED,
    "disable_compile": _HONOURED,
    "continuous_batching_config": _refused("continuous batching is another loop"),
}

ARGUMENTS: dict[str, Option] = {
    "inputs": _HONOURED,
    "generation_config": _HONOURED,
    "logits_processor": _PROCESSED,
    "stopping_criteria": Option("", _CRITERION),
    "prefix_allowed_tokens_fn": _PROCESSED,
    "custom_generate": _HONOURED,
    "streamer": Option("", "a search has no token until all is done"),
    "synced_gpus": _refused("ranks would wait for each other for ever; run them separately"),
    "assistant_model": _assisted(),
    "negative_prompt_ids": _refused("guidance_scale is refused"),
    "negative_prompt_attention_mask": _refused("guidance_scale is refused"),
    # What the loop gets beside: inputs of the model.
    "attention_mask": _HONOURED,
    "position_ids": _HONOURED,
    "logits_to_keep": _HONOURED,
    # Caches that generate makes, by the names that models have for them.
    "past_key_values": _HONOURED,
    "cache": _HONOURED,
    "cache_params": _HONOURED,
    "inputs_embeds": _refused(
        "two models read the prompt, and embeddings belong to one", aisp="prompts are token ids"
    ),
}

# Of the classes that transformers.generation shows; those for other kinds of model are refused.
_ROW = Option("", _NO_PROCESSORS, by_row=True)
_ALL = Option("", _NO_PROCESSORS)
_AUDIO = _refused("it belongs to speech models")
PROCESSORS: dict[str, Option] = {
    "AlternatingCodebooksLogitsProcessor": _AUDIO,
    "BarkEosPrioritizerLogitsProcessor": _AUDIO,
    "ClassifierFreeGuidanceLogitsProcessor": _refused("it wants two rows of logits for each row"),
    "DiaClassifierFreeGuidanceLogitsProcessor": _AUDIO,
    "DiaEOSChannelFilterLogitsProcessor": _AUDIO,
    "DiaEOSDelayPatternLogitsProcessor": _AUDIO,
    "EncoderNoRepeatNGramLogitsProcessor": _ALL,
    "EncoderRepetitionPenaltyLogitsProcessor": _ALL,
    "EpsilonLogitsWarper": _ROW,
    "EtaLogitsWarper": _ROW,
    "ExponentialDecayLengthPenalty": _ROW,
    "ForcedBOSTokenLogitsProcessor": _ROW,
    "ForcedEOSTokenLogitsProcessor": _ROW,
    "InfNanRemoveLogitsProcessor": _ROW,
    "LogitNormalization": _ROW,
    "LogitsProcessor": _ALL,
    "MinLengthLogitsProcessor": _ROW,
    "MinNewTokensLengthLogitsProcessor": _ROW,
    "MinPLogitsWarper": _ROW,
    "NoBadWordsLogitsProcessor": _ROW,
    "NoRepeatNGramLogitsProcessor": _ROW,
    "PrefixConstrainedLogitsProcessor": _ALL,
    "RepetitionPenaltyLogitsProcessor": _ALL,
    "SequenceBiasLogitsProcessor": _ROW,
    "SuppressTokensAtBeginLogitsProcessor": _ROW,
    "SuppressTokensLogitsProcessor": _ROW,
    "SynthIDTextWatermarkLogitsProcessor": _refused(
        "it counts its calls, which drafts and the other model's logits would spoil; "
        "WatermarkingConfig has none",
        aisp=_NO_PROCESSORS,
    ),
    "TemperatureLogitsWarper": _ROW,
    "TopHLogitsWarper": _ROW,
    "TopKLogitsWarper": _ROW,
    "TopPLogitsWarper": _ROW,
    "TypicalLogitsWarper": _ROW,
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": CONFIG["guidance_scale"],
    "WatermarkLogitsProcessor": _ROW,
    "WhisperNoSpeechDetection": _AUDIO,
    "WhisperTimeStampLogitsProcessor": _AUDIO,
}

_STOPS = Option("", _CRITERION)
CRITERIA: dict[str, Option] = {
    "ConfidenceCriteria": _refused("it belongs to an assistant model"),
    "EosTokenCriteria": _HONOURED,
    "MaxLengthCriteria": _HONOURED,
    "MaxTimeCriteria": _STOPS,
    "StopStringCriteria": _STOPS,
    "StoppingCriteria": _STOPS,
}

_STREAMS = ARGUMENTS["streamer"]
STREAMERS: dict[str, Option] = {
    "AsyncTextIteratorStreamer": _STREAMS,
    "BaseStreamer": _STREAMS,
    "TextDiffusionStreamer": _refused("it shows drafts of diffusion models"),
    "TextIteratorStreamer": _STREAMS,
    "TextStreamer": _STREAMS,
}


def kind_of(table: Mapping[str, Option], thing: Any) -> Option | None:
    """The entry of an object's class, if it is exactly one of transformers."""
    kind = type(thing)
    return table.get(kind.__name__) if kind.__module__.startswith("transformers.") else None


def check_processors(processors: Any, method: str = "kad") -> None:
    """``ValueError`` for a logits processor, criterion or streamer that a method refuses."""
    for one in processors or ():
        for table in (PROCESSORS, CRITERIA, STREAMERS):
            option = kind_of(table, one)
            if option is not None and (why := option.why(method)):
                raise ValueError(f"{type(one).__name__} cannot be used here: {why}")


def refuse(given: Mapping[str, Any], method: str) -> list[str]:
    """Go through what ``generate`` was given.

    Args:
        given: arguments and fields of the configuration, with their values.
        method: ``"kad"`` or ``"aisp"``.

    Returns:
        Names that are set and have no effect, to be warned about.

    Raises:
        ValueError: the first that is refused, with the reason. An argument that is in no table is
            an input of the base model, which the other model would not get.
    """
    warned = []
    unknown = Option("only token ids reach the models")
    for name, value in given.items():
        option = CONFIG.get(name) or ARGUMENTS.get(name) or unknown
        if not option.is_set(value):
            continue
        if why := option.why(method):
            shown = f" ({value!r})" if isinstance(value, (bool, int, float, str)) else ""
            raise ValueError(f"generate's {name}{shown} cannot be used with hf.{method}: {why}")
        if option.warn:
            warned.append(f"{name}={value!r}")
    return warned


def page() -> str:
    """The tables as Markdown, for ``docs/transformers.md``."""
    tables = {
        "Field of the configuration": CONFIG,
        "Argument": ARGUMENTS,
        "Logits processor": PROCESSORS,
        "Stopping criterion": CRITERIA,
        "Streamer": STREAMERS,
    }
    lines = []
    for title, table in tables.items():
        lines += [f"| {title} | `hf.kad` | `hf.aisp` |", "|---|---|---|"]
        for name, option in sorted(table.items()):
            shown = ["no effect, with a warning" if option.warn else option.why(method) or "yes"
                     for method in ("kad", "aisp")]  # fmt: skip
            if not name.startswith("_"):
                lines.append(f"| `{name}` | {shown[0]} | {shown[1]} |")
        lines.append("")
    return "\n".join(lines)
