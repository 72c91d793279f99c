"""Every option of the installed ``generate``: honoured as transformers does, or refused in words.

Names come from the installed package, so a new one fails here until somebody decides. "Honoured" is
shown on a rule that never defers: the tokens are those of plain ``generate``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import EOS, PAD, VOCABULARY, make_model, make_tokenizer, proxy_model, ragged_prompts
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import logits_process, stopping_criteria, streamers

import tta_ext
from tta_ext.decoding.runtime import generate_options as table
from tta_ext.decoding.runtime.compat import kept_by_generate

NEW = 8
# Rules under which the base writes every token: the proxy not asked, asked for all, with drafts.
NEVER: list[dict[str, Any]] = [
    {"rule": "threshold", "param": 0.0},
    {"rule": "knapsack", "param": 0.0, "speculative": 3},
    {"rule": "confidence_bet", "param": 2.0},
]


@cache
def base() -> Any:
    """A base with several ends, so that rows leave at different steps."""
    model = make_model(seed=0)
    model.generation_config.eos_token_id = [EOS, 20, 33, 47, 60, 71]
    return model


@cache
def batch() -> dict[str, torch.Tensor]:
    prompts = ragged_prompts()
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), PAD)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def plain(**options: Any) -> torch.Tensor:
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD} | options
    return base().generate(**(batch() | {k: options.pop(k) for k in batch() if k in options}),
                           **options)  # fmt: skip


def kad(**options: Any) -> torch.Tensor:
    return plain(custom_generate=tta_ext.hf.kad, proxy_model=proxy_model(), seed=0, **options)


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


class Seen(transformers.LogitsProcessor):
    """Writes down which tokens are left; at the end of the list."""

    def __init__(self) -> None:
        self.kept: list[torch.Tensor] = []

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.kept.append(torch.isfinite(scores))
        return scores


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


# ---- stopping criteria -----------------------------------------------------------------------


class Limits(transformers.StoppingCriteria):
    """A limit for each row of the call."""

    def __init__(self, limits: list[int]) -> None:
        self.limits = torch.tensor(limits)

    def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        assert scores is None  # as in transformers without output_scores
        return ids.shape[1] >= self.limits


@pytest.mark.parametrize("never", NEVER)
@pytest.mark.parametrize(
    "name", sorted(name for name, one in table.CRITERIA.items() if not one.kad)
)
def test_criteria(name: str, never: dict[str, Any]) -> None:
    tokenizer = make_tokenizer()
    width = batch()["input_ids"].shape[1]
    makers: dict[str, Callable[[], Any]] = {
        "StoppingCriteria": lambda: Limits([width + 2, width + 5, width + 1, width + 9, width + 3]),
        "MaxLengthCriteria": lambda: transformers.MaxLengthCriteria(width + 3),
        "EosTokenCriteria": lambda: transformers.EosTokenCriteria([*range(30, 60)]),
        "MaxTimeCriteria": lambda: transformers.MaxTimeCriteria(1e-9),
        "StopStringCriteria": lambda: transformers.StopStringCriteria(
            tokenizer, [tokenizer.decode(int(plain()[2, width + 2]))]
        ),
    }
    made = makers[name]
    expected = plain(stopping_criteria=[made()])
    assert expected.shape != plain().shape or not torch.equal(expected, plain())
    assert torch.equal(kad(stopping_criteria=[made()], **never), expected)


def test_criteria_longer_than_the_configuration() -> None:
    """The caller's takes the place of generate's own."""
    width = batch()["input_ids"].shape[1]
    options: dict[str, Any] = {"eos_token_id": None}
    for limit in (width + NEW + 4, width - 3):
        own = [transformers.MaxLengthCriteria(limit)]
        expected = plain(stopping_criteria=own, **options)
        assert torch.equal(kad(stopping_criteria=own, **options, **NEVER[0]), expected)


def test_stop_strings_with_the_tokenizer() -> None:
    tokenizer = make_tokenizer()
    width = batch()["input_ids"].shape[1]
    # With a tokenizer, ids that are no token are never drawn.
    none = {"suppress_tokens": [*range(len(tokenizer), VOCABULARY)]}
    strings = [tokenizer.decode(int(plain(**none)[1, width + 1]))]
    expected = plain(stop_strings=strings, tokenizer=tokenizer, **none)
    assert not torch.equal(expected, plain(**none))
    out = kad(stop_strings=strings, base_tokenizer=tokenizer, **none, **NEVER[0])
    assert torch.equal(out, expected)
    with pytest.raises(ValueError, match="stop_strings need a tokenizer; pass base_tokenizer="):
        kad(stop_strings=strings)


# ---- arguments -------------------------------------------------------------------------------


class Sink(transformers.generation.BaseStreamer):
    def __init__(self) -> None:
        self.puts: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.puts.append(value.tolist())

    def end(self) -> None:
        self.puts.append("end")


def test_streamer() -> None:
    """Transformers keeps it from custom loops; it is found all the same."""
    ids = {"input_ids": torch.tensor([ragged_prompts()[0]]), "attention_mask": None}
    expected, found = Sink(), Sink()
    plain(streamer=expected, **ids)
    kad(streamer=found, **ids, **NEVER[0])
    assert found.puts == expected.puts
    tokenizer = make_tokenizer()
    text = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True)
    out = kad(streamer=text, **ids, **NEVER[0])
    answer = out[0, len(ragged_prompts()[0]) :]
    assert "".join(text) == tokenizer.decode(answer)
    with pytest.raises(ValueError, match="one argument"):
        kad(streamer=Sink(), token_streamer=Sink(), **ids)


def test_streamers_of_one_row_refuse_several() -> None:
    """Whatever the lengths of the prompts, and however small the batches."""
    pair = tta_ext.KnapsackDeferral(base(), proxy_model(), make_tokenizer())
    for prompts in ([[5], [6]], [[5], [6, 7]]):
        streamer = transformers.TextIteratorStreamer(make_tokenizer())
        with pytest.raises(ValueError, match="only supports batch size 1"):
            pair.generate(prompts, streamer=streamer, seed=0, max_new_tokens=2)
        with pytest.raises(ValueError, match="a streamer takes one batch"):
            pair.generate(prompts, streamer=streamer, seed=0, batch_size=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("assistant_model", proxy_model()),
        ("negative_prompt_ids", torch.tensor([[5]])),
        ("synced_gpus", True),
        ("inputs_embeds", torch.zeros(5, 14, 32)),
    ],
)
def test_arguments_that_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"generate's {name}.* cannot be used"):
        kad(**{name: value})


def test_other_inputs_of_a_model() -> None:
    with pytest.raises(ValueError, match=r"pixel_values cannot be used .*only token ids"):
        table.refuse({"pixel_values": torch.zeros(1)}, "kad")
    wrong = torch.arange(14).expand(5, 14) + 3
    with pytest.raises(ValueError, match="position_ids cannot be used"):
        kad(position_ids=wrong)
    right = (batch()["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    assert torch.equal(kad(position_ids=right, **NEVER[0]), kad(**NEVER[0]))
    soft = torch.zeros(1, 3, 32)
    with pytest.raises(ValueError, match="inputs_embeds"):
        base().generate(
            inputs_embeds=soft, custom_generate=tta_ext.hf.kad, proxy_model=proxy_model()
        )


def test_nothing_is_kept_outside_of_generate() -> None:
    assert kept_by_generate() == {}


def test_drafts_by_transformers_name() -> None:
    def drafted(**options: Any) -> int:
        options |= {"return_dict_in_generate": True, "rule": "knapsack", "param": 0.4}
        return int(kad(do_sample=True, **options).result.stats.draft_tokens)  # type: ignore[attr-defined]

    assert drafted() == 0
    assert drafted(num_assistant_tokens=3) > 0
    assert drafted(generation_config=GenerationConfig(num_assistant_tokens=3)) > 0
    with pytest.raises(ValueError, match="are one argument"):
        drafted(num_assistant_tokens=3, speculative=3)


def test_proxy_prompts_of_several_answers() -> None:
    theirs = torch.randint(4, 90, (5, 3), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"num_return_sequences": 3, "do_sample": True, "param": 1.0}
    out = kad(proxy_input_ids=theirs, **options)
    assert len(out) == 15
    each = kad(proxy_input_ids=theirs.repeat_interleave(3, dim=0), **options)
    assert torch.equal(out, each)


def test_modes_are_given_back() -> None:
    model = make_model(seed=0)
    model.train()
    model.model.layers[0].eval()
    model.generate(torch.tensor([[5, 6]]), custom_generate=tta_ext.hf.kad, max_new_tokens=2,
                   proxy_model=proxy_model(), pad_token_id=PAD)  # fmt: skip
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].training


def test_sizes_without_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="pass base_tokenizer="):
        base().generate(
            torch.tensor([[5]]), custom_generate=tta_ext.hf.kad,
            proxy_model=make_model(vocabulary=300), max_new_tokens=2,
        )  # fmt: skip


# ---- the direct interface --------------------------------------------------------------------


@pytest.mark.parametrize(
    "cut", [{"top_k": 3}, {"top_p": 0.4}, {"min_p": 0.2}, {"top_k": 9, "top_p": 0.8, "min_p": 0.1}]
)
def test_cuts_of_both_models(cut: dict[str, Any]) -> None:
    """What is left of each model is what transformers leaves of it."""
    prompt, temperature = ragged_prompts()[0], 0.7
    for rule, model in (({"param": 0.0}, base()), ({"param": 1.0}, proxy_model())):
        with torch.inference_mode():
            scores = model(torch.tensor([prompt])).logits[:, -1]
        config = GenerationConfig(do_sample=True, temperature=temperature, **({"top_k": 0} | cut))
        list_of = model._get_logits_processor(
            model._prepare_generation_config(config)[0], 1, device="cpu"
        )
        kept = torch.isfinite(list_of(torch.tensor([prompt]), scores.clone()))[0].nonzero()
        pair = tta_ext.KnapsackDeferral(base(), proxy_model(), temperature=temperature)
        out = pair.generate([prompt], num_return_sequences=300, max_new_tokens=1, seed=0,
                            rule="knapsack", **rule, **cut)  # fmt: skip
        drawn = {row[0] for row in out.tokens}
        assert drawn <= set(kept.flatten().tolist())
        assert len(drawn) > 1


def test_cuts_are_checked() -> None:
    pair = tta_ext.KnapsackDeferral(base(), proxy_model())
    for cut in ({"top_k": 0}, {"top_k": 2.5}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": -0.1}):
        with pytest.raises(ValueError, match=f"{min(cut)} is"):
            pair.generate([[5]], **cut)
    with pytest.raises(ValueError, match="top_p goes with do_sample=True"):
        pair.generate([[5]], top_p=0.5, do_sample=False)


# ---- hf.aisp ---------------------------------------------------------------------------------


def distinct(prompts: list[Any], answers: list[Any]) -> list[float]:
    return [float(len(set(answer))) for answer in answers]


def aisp(**options: Any) -> Any:
    return plain(custom_generate=tta_ext.hf.aisp, reward=distinct, seed=1, n=4, iterations=2,
                 **options)  # fmt: skip


def test_aisp_is_the_search() -> None:
    method = tta_ext.AdaptiveImportanceSampling(base(), distinct, n=4, iterations=2)
    ends = [EOS, 20, 33, 47, 60, 71]
    for options, settings in (
        ({}, {"decoding": "greedy"}),
        (
            {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.9, "sigma": 0.2},
            {"decoding": "sample", "temperature": 0.7, "top_k": 9, "top_p": 0.9, "sigma": 0.2},
        ),
    ):
        expected = method.generate(
            ragged_prompts(), seed=1, max_new_tokens=NEW, eos_token_id=ends, **settings
        )
        out = aisp(return_dict_in_generate=True, **options)
        width = batch()["input_ids"].shape[1]
        for row, best in zip(out.sequences[:, width:].tolist(), expected.best, strict=True):
            assert row == best.tokens + [PAD] * (len(row) - len(best.tokens))
        assert out.result.rewards == expected.rewards
        assert torch.equal(aisp(**options), out.sequences)


def test_aisp_without_noise_or_choice_is_generate() -> None:
    assert torch.equal(aisp(sigma=0.0), plain())


def test_prompts_of_aisp_rewards() -> None:
    seen: list[Any] = []

    def reward(prompts: list[Any], answers: list[Any]) -> list[float]:
        seen.append((prompts[0], answers[0]))
        return [0.0] * len(answers)

    ids = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": None}
    options: dict[str, Any] = {"custom_generate": tta_ext.hf.aisp, "reward": reward, "n": 2,
                               "iterations": 1, **ids}  # fmt: skip
    tokenizer = make_tokenizer()
    plain(**options)
    plain(base_tokenizer=tokenizer, **options)
    plain(base_tokenizer=tokenizer, reward_prompts=["what was asked"], **options)
    assert [prompt for prompt, _ in seen] == [
        [5, 6, 7], tokenizer.decode([5, 6, 7]), "what was asked",
    ]  # fmt: skip
    assert [type(answer) for _, answer in seen] == [list, str, str]
    with pytest.raises(ValueError, match="reward_prompts has 2 prompts, expected 1"):
        plain(reward_prompts=["a", "b"], **options)


def test_what_aisp_refuses() -> None:
    with pytest.raises(ValueError, match="reward is missing"):
        plain(custom_generate=tta_ext.hf.aisp)
    for options, message in (
        ({"repetition_penalty": 1.5}, "repetition_penalty .*rollouts take no logits processors"),
        ({"max_time": 3.0}, "pass max_seconds="),
        ({"num_return_sequences": 2, "do_sample": True}, "one answer a prompt"),
        ({"logits_processor": [Seen()]}, "Seen cannot be used"),
        ({"stopping_criteria": [Limits([1] * 5)]}, "stopping_criteria are not used"),
        ({"streamer": Sink()}, "no token until all is done"),
        ({"stop_strings": "a"}, "stop_strings need a tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            aisp(**options)
