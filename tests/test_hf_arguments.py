"""Criteria, streamers and other arguments under ``hf.kad``; cuts of both models; ``hf.aisp``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from generates import NEVER, NEW, Seen, base, batch, kad, plain
from models import EOS, PAD, VOCABULARY, make_model, make_tokenizer, proxy_model, ragged_prompts
from transformers import GenerationConfig

import tta_ext
from tta_ext.decoding.runtime import generate_options as table
from tta_ext.decoding.runtime.compat import kept_by_generate

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
