"""Every option of the installed ``generate``: honoured as transformers does, or refused in words.

Names come from the installed package, so a new one fails here until somebody decides. "Honoured" is
shown on a rule that never defers: the tokens are those of plain ``generate``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from generates import NEVER, NEW, Seen, base, batch, kad, plain
from models import EOS, PAD, VOCABULARY
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import logits_process, stopping_criteria, streamers

from tta_ext.decoding.runtime import generate_options as table


def classes(module: Any, parent: str) -> Iterator[type]:
    kind = getattr(module, parent)
    for name, found in vars(module).items():
        if isinstance(found, type) and issubclass(found, kind) and not name.startswith("_"):
            yield found


# ---- the tables are complete -----------------------------------------------------------------


def test_every_field_of_the_configuration() -> None:
    names = set(vars(GenerationConfig()))
    assert names - table.CONFIG.keys() == set()


def test_every_argument_of_generate() -> None:
    names = set(inspect.signature(GenerationMixin.generate).parameters)
    assert names - table.ARGUMENTS.keys() == {"self", "kwargs"}


@pytest.mark.parametrize(
    ("module", "parent", "known"),
    [
        (logits_process, "LogitsProcessor", table.PROCESSORS),
        (stopping_criteria, "StoppingCriteria", table.CRITERIA),
        (streamers, "BaseStreamer", table.STREAMERS),
    ],
)
def test_every_class(module: Any, parent: str, known: dict[str, Any]) -> None:
    names = {one.__name__ for one in classes(module, parent)}
    assert names - known.keys() == set()
    if transformers.__version__ >= "5.23":  # older ones have fewer
        assert known.keys() - names == set()


def test_the_page_says_the_same() -> None:
    """``python -c 'from tta_ext.decoding.runtime.generate_options import page; print(page())'``."""
    text = (Path(__file__).parent.parent / "docs" / "transformers.md").read_text(encoding="utf-8")
    assert table.page() in text


# ---- fields of the configuration -------------------------------------------------------------

LONG = 40
# For each that changes tokens, a value that does; the others are shown elsewhere.
VALUES: dict[str, Any] = {
    "max_length": 17,
    "max_new_tokens": 5,
    "min_length": 18,
    "min_new_tokens": 6,
    "eos_token_id": [33, 50],
    "pad_token_id": 9,
    "temperature": 0.4,
    "top_k": 3,
    "top_p": 0.3,
    "min_p": 0.2,
    "top_h": 0.4,
    "typical_p": 0.3,
    "epsilon_cutoff": 0.05,
    "eta_cutoff": 0.1,
    "repetition_penalty": 1.7,
    "encoder_repetition_penalty": 1.6,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "bad_words_ids": [[i] for i in range(4, 80)],
    "renormalize_logits": True,
    "forced_bos_token_id": 11,
    "forced_eos_token_id": 33,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": (2, 1.9),
    "suppress_tokens": [*range(4, 70)],
    "begin_suppress_tokens": [*range(4, 100)],
    "sequence_bias": [[[i], -30.0] for i in range(20, 90)],
    "watermarking_config": {"bias": 9.0, "seeding_scheme": "lefthash"},
    "num_return_sequences": 1,
    "max_time": 1000.0,
    "use_cache": False,
    "cache_implementation": "dynamic",
    "disable_compile": True,
    "early_stopping": True,
    "length_penalty": 2.0,
    "bos_token_id": 5,
    "decoder_start_token_id": 5,
}
WARPERS = {"temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff",
           "eta_cutoff"}  # fmt: skip


@pytest.mark.parametrize("name", sorted(VALUES.keys() - WARPERS))
@pytest.mark.parametrize("never", range(len(NEVER)))
def test_honoured_fields(name: str, never: int) -> None:
    """Greedy, over a left-padded batch whose rows end at different steps."""
    options: dict[str, Any] = {name: VALUES[name]}
    if name in ("max_length", "min_length"):
        options["max_new_tokens"] = None if name == "max_length" else NEW
    if name == "watermarking_config":
        options[name] = transformers.WatermarkingConfig(**VALUES[name])
    expected = plain(**options)
    assert torch.equal(kad(**options, **NEVER[never]), expected)


@pytest.mark.parametrize("name", sorted(WARPERS))
def test_warpers_cut_at_the_temperature(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the first token: what is left of the base is what transformers leaves."""
    options = {"temperature": 0.4, "top_k": 0, "do_sample": True, "max_new_tokens": 1}
    options |= {name: VALUES[name]}
    seen = Seen()
    add = GenerationMixin._get_logits_processor

    def last(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = add(self, *args, **kwargs)
        found.append(seen)
        return found

    monkeypatch.setattr(GenerationMixin, "_get_logits_processor", last)
    plain(**options)
    (expected,) = seen.kept
    seen.kept.clear()
    kad(**options, rule="threshold", param=0.0)
    assert torch.equal(seen.kept[0], expected)
    assert name == "temperature" or not expected.all()


def test_fields_are_shown_or_refused() -> None:
    """Nothing in the table is merely claimed."""
    special = {"_from_model_config", "transformers_version", "do_sample",
               "return_dict_in_generate", "num_assistant_tokens"}  # fmt: skip
    for name, option in table.CONFIG.items():
        unused = name in ("num_beam_groups", "diversity_penalty")
        assert option.kad or option.warn or unused or name in VALUES or name in special, name


REFUSED: dict[str, Any] = {
    "num_beams": 3,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "constraints": [object()],
    "force_words_ids": [[5]],
    "guidance_scale": 1.5,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "prompt_lookup_num_tokens": 3,
    "max_matching_ngram_size": 2,
    "assistant_early_exit": 1,
    "assistant_lookbehind": 3,
    "target_lookbehind": 3,
    "assistant_confidence_threshold": 0.9,
    "assistant_ensemble_weight": 0.5,
    "num_assistant_tokens_schedule": "heuristic",
    "speculation_type": "dflash",
    "use_mtp": True,
    "is_assistant": True,
    "continuous_batching_config": object(),
    "token_healing": True,
    "stop_strings": ["a"],
}


def test_refusals_are_complete() -> None:
    assert {name for name, option in table.CONFIG.items() if option.kad} == REFUSED.keys()


@pytest.mark.parametrize("method", ["kad", "aisp"])
@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_fields(name: str, method: str) -> None:
    with pytest.raises(ValueError, match=rf"generate's {name} .*cannot be used with hf\.{method}"):
        table.refuse({name: REFUSED[name]}, method)


@pytest.mark.parametrize(
    "name",
    ["num_beams", "guidance_scale", "output_scores", "output_logits", "prompt_lookup_num_tokens",
     "assistant_confidence_threshold", "output_attentions"],
)  # fmt: skip
def test_refused_in_generate(name: str) -> None:
    with pytest.raises(ValueError, match=f"generate's {name}"):
        kad(return_dict_in_generate=True, **{name: REFUSED[name]})


def test_defaults_ask_for_nothing() -> None:
    """What generate() fills in of its own is never refused."""
    table.refuse(GenerationMixin._prepare_generation_config(base(), None)[0].to_dict(), "kad")


# ---- processors ------------------------------------------------------------------------------


class ByRow(transformers.LogitsProcessor):
    """A bias for each row of the call, and nothing that a row could be told from."""

    def __init__(self, rows: int) -> None:
        self.bias = torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(2)) * 6

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + self.bias[:, : scores.shape[1]]


@pytest.mark.parametrize("never", NEVER)
def test_processors_with_something_for_each_row(never: dict[str, Any]) -> None:
    rows = len(batch()["input_ids"])
    for make in (
        lambda: ByRow(rows),
        lambda: transformers.RepetitionPenaltyLogitsProcessor(
            1.9, prompt_ignore_length=torch.arange(rows)
        ),
        lambda: transformers.RepetitionPenaltyLogitsProcessor(1.9, prompt_ignore_length=14),
        lambda: transformers.PrefixConstrainedLogitsProcessor(
            lambda row, ids: [20 + 2 * row, 21 + 2 * row, 50], 1
        ),
    ):
        expected = plain(logits_processor=[make()])
        assert torch.equal(kad(logits_processor=[make()], **never), expected)


@pytest.mark.parametrize("rule", [{"param": 0.0}, {"param": 0.4}, {"param": 0.4, "speculative": 3}])
def test_prefix_constraints_keep_their_row(rule: dict[str, Any]) -> None:
    """When others have ended or are not asked; answers are asked for several times."""

    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        return [33] if row == 0 and len(ids) >= 16 else [40 + row]

    # Until 5.23 transformers numbers answers, since then prompts.
    told: set[int] = set()
    more: dict[str, Any] = {"num_return_sequences": 2, "do_sample": True}
    plain(prefix_allowed_tokens_fn=lambda row, ids: told.add(row) or [50], **more)
    out = kad(prefix_allowed_tokens_fn=allowed, **more, **rule)
    width = batch()["input_ids"].shape[1]
    for answer, tokens in enumerate(out[:, width:].tolist()):
        row = answer * len(told) // len(out)
        assert set(tokens) <= ({40, 33, PAD} if row == 0 else {40 + row, PAD})
        assert tokens[0] == 40 + row


def test_stateful_processors_are_refused() -> None:
    """Those that answer otherwise when asked again: drafts and two models ask again."""
    config = transformers.SynthIDTextWatermarkingConfig(ngram_len=3, keys=[1, 2, 3])
    with pytest.raises(ValueError, match="SynthIDTextWatermarkLogitsProcessor cannot be used"):
        kad(watermarking_config=config)
    guidance = transformers.UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, base())
    with pytest.raises(ValueError, match=r"UnbatchedClassifierFree.* cannot be used"):
        kad(logits_processor=[guidance])


PLAIN: dict[str, Callable[[], Any]] = {
    "EpsilonLogitsWarper": lambda: transformers.EpsilonLogitsWarper(0.01),
    "EtaLogitsWarper": lambda: transformers.EtaLogitsWarper(0.01),
    "ExponentialDecayLengthPenalty": lambda: transformers.ExponentialDecayLengthPenalty(
        (1, 1.5), [EOS], 2
    ),
    "ForcedBOSTokenLogitsProcessor": lambda: transformers.ForcedBOSTokenLogitsProcessor(5),
    "ForcedEOSTokenLogitsProcessor": lambda: transformers.ForcedEOSTokenLogitsProcessor(7, 5),
    "InfNanRemoveLogitsProcessor": transformers.InfNanRemoveLogitsProcessor,
    "LogitNormalization": transformers.LogitNormalization,
    "MinLengthLogitsProcessor": lambda: transformers.MinLengthLogitsProcessor(9, EOS),
    "MinNewTokensLengthLogitsProcessor": lambda: transformers.MinNewTokensLengthLogitsProcessor(
        5, 4, EOS
    ),
    "MinPLogitsWarper": lambda: transformers.MinPLogitsWarper(0.1),
    "NoBadWordsLogitsProcessor": lambda: transformers.NoBadWordsLogitsProcessor([[5], [6, 7]]),
    "NoRepeatNGramLogitsProcessor": lambda: transformers.NoRepeatNGramLogitsProcessor(1),
    "SequenceBiasLogitsProcessor": lambda: transformers.SequenceBiasLogitsProcessor([[[5], 2.0]]),
    "SuppressTokensAtBeginLogitsProcessor": lambda: (
        transformers.SuppressTokensAtBeginLogitsProcessor([5], 6)
    ),
    "SuppressTokensLogitsProcessor": lambda: transformers.SuppressTokensLogitsProcessor([5, 6]),
    "TemperatureLogitsWarper": lambda: transformers.TemperatureLogitsWarper(0.5),
    "TopHLogitsWarper": lambda: logits_process.TopHLogitsWarper(0.4),
    "TopKLogitsWarper": lambda: transformers.TopKLogitsWarper(5),
    "TopPLogitsWarper": lambda: transformers.TopPLogitsWarper(0.5),
    "TypicalLogitsWarper": lambda: transformers.TypicalLogitsWarper(0.5),
    "WatermarkLogitsProcessor": lambda: transformers.WatermarkLogitsProcessor(VOCABULARY, "cpu"),
}


def test_rows_of_a_processor_that_is_said_to_look_at_rows_alone() -> None:
    """Some rows give what all rows give, and asking twice gives the same."""
    named = {name for name, option in table.PROCESSORS.items() if option.by_row}
    assert named == PLAIN.keys()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, VOCABULARY, (5, 6), generator=generator)
    scores = torch.randn(5, VOCABULARY, generator=generator) * 3
    for name, make in PLAIN.items():
        one = make()
        whole = one(ids, scores.clone())
        assert torch.equal(one(ids, scores.clone()), whole), name
        for rows in ([3], [0, 4]):
            torch.testing.assert_close(one(ids[rows], scores[rows].clone()), whole[rows])
