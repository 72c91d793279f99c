"""Arguments as users of transformers, NumPy and pandas have them: accepted, or refused in words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from models import base_model, make_tokenizer, proxy_model
from transformers import BatchEncoding

from tta_ext.decoding import BestOfN, KnapsackDeferral
from tta_ext.decoding.runtime.prompts import normalise_prompts

TEXTS = ["hello", "ab"]
OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "seed": 0}


@pytest.fixture(scope="module")
def kad() -> KnapsackDeferral:
    return KnapsackDeferral(base_model(), proxy_model(), make_tokenizer(), param=0.4)


@pytest.fixture(scope="module")
def search() -> BestOfN:
    def reward(prompts: list[Any], answers: list[Any]) -> list[float]:
        return [float(len(answer)) for answer in answers]

    return BestOfN(base_model(), reward, make_tokenizer(), n=2)


class Column:
    """A column of a table: values behind ``__iter__``, and nothing of a list."""

    def __init__(self, values: list[Any]) -> None:
        self.values = values

    def __iter__(self) -> Any:
        return iter(self.values)


def test_several_prompts_in_any_container(kad: KnapsackDeferral, search: BestOfN) -> None:
    ids = [kad.tokenizer(text)["input_ids"] for text in TEXTS]
    expected = kad.generate(TEXTS, **OPTIONS).tokens
    best = [one.tokens for one in search.generate(TEXTS, **OPTIONS).best]
    for prompts in (
        tuple(TEXTS), np.array(TEXTS), Column(TEXTS), dict.fromkeys(TEXTS).keys(), ids, tuple(ids),
        [np.array(row) for row in ids], [torch.tensor(row) for row in ids],
        [[np.int64(i) for i in row] for row in ids], [range(row[0], row[0] + 1) for row in ids],
        BatchEncoding({"input_ids": ids}), Column([np.array(row) for row in ids]),
    ):  # fmt: skip
        if isinstance(prompts, list) and isinstance(prompts[0], range):
            assert normalise_prompts(prompts) == [[row[0]] for row in ids]
            continue
        assert kad.generate(prompts, **OPTIONS).tokens == expected
        assert [one.tokens for one in search.generate(prompts, **OPTIONS).best] == best
    assert kad.generate((text for text in TEXTS), **OPTIONS).tokens == expected


def test_what_a_tokenizer_returns(kad: KnapsackDeferral) -> None:
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    expected = kad.generate(TEXTS, **OPTIONS).tokens
    for options in (
        {}, {"padding": True}, {"padding": True, "return_tensors": "np"},
        {"padding": True, "return_tensors": "pt"},
    ):  # fmt: skip
        found = tokenizer(TEXTS, return_token_type_ids=False, **options)
        assert kad.generate(**found, **OPTIONS).tokens == expected
        assert kad.generate(found, **OPTIONS).tokens == expected
    one = torch.tensor(tokenizer("hello")["input_ids"])
    for ids in (one, one[None], one.numpy(), one.to(torch.int32), one.tolist()):
        assert kad.generate(input_ids=ids, **OPTIONS).tokens == expected[:1]
        assert kad.generate(ids, **OPTIONS).tokens == expected[:1]
    mask = torch.tensor([[False, True, True]])
    masked = kad.generate(input_ids=torch.tensor([[9, 8, 7]]), attention_mask=mask, **OPTIONS)
    assert masked.prompt_tokens == [[8, 7]]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (b"hello", "prompts is bytes"),
        ([b"hello"], "prompt 0 is bytes"),
        ([None], "prompt 0 is NoneType"),
        (["a", float("nan")], "prompt 1 is a float"),
        (["a", 5], "prompt 1 is a int"),
        ([True, False], "prompt 0 is a bool"),
        ([5, True], "prompts has a bool among its ids"),
        ([[5, 6.0]], "prompt 0 has a float among its ids"),
        ([[5, "a"]], "prompt 0 has a str among its ids"),
        ([torch.tensor([1.5])], "prompt 0 has a Tensor among its ids"),
        (torch.tensor([1.5]), "torch.float32 Tensor, expected integers"),
        (torch.tensor([True]), "torch.bool Tensor, expected integers"),
        (np.array([1.5]), "prompt 0 is a float64"),
        ({"role": "user", "content": "a"}, "prompts is a dict, expected a string"),
        ([[{"role": "user", "content": "a"}, "b"]], "prompt 0 mixes messages"),
        (5, "prompts is a int, expected a string"),
    ],
)
def test_prompts_that_are_none(
    prompts: Any, message: str, kad: KnapsackDeferral, search: BestOfN
) -> None:
    for method in (kad, search):
        with pytest.raises(TypeError, match=message):
            method.generate(prompts, **OPTIONS)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"max_new_tokens": 4.0}, TypeError, "max_new_tokens is 4.0, expected an integer"),
        ({"max_new_tokens": "4"}, TypeError, "max_new_tokens is '4', expected an integer"),
        ({"max_new_tokens": True}, TypeError, "max_new_tokens is True, expected an integer"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens is 0, expected at least 1"),
        ({"seed": 1.7}, TypeError, "seed is 1.7, expected an integer"),
        ({"seed": "1"}, TypeError, "seed is '1', expected an integer"),
        ({"sequence": [0.5]}, TypeError, "sequence has a float among its ids"),
        ({"sequence": 5}, TypeError, "sequence is a int, expected integers"),
        ({"eos_token_id": "2"}, TypeError, "eos_token_id is a str, expected integers"),
        ({"eos_token_id": True}, TypeError, "eos_token_id is a bool, expected integers"),
        ({"eos_token_id": 2.0}, TypeError, "eos_token_id is a float, expected integers"),
        ({"eos_token_id": [2.5]}, TypeError, "eos_token_id has a float among its ids"),
        ({"eos_token_id": [None]}, TypeError, "eos_token_id has NoneType among its ids"),
        ({"stop_strings": 5}, TypeError, "stop_strings is 5, expected a string or several"),
        ({"stop_strings": ""}, ValueError, "stop_strings is '', expected strings that are not"),
        ({"stop_strings": ["a", 3]}, ValueError, "stop_strings is "),
    ],
)
def test_options_of_a_wrong_type(
    options: dict[str, Any], kind: Any, message: str, kad: KnapsackDeferral, search: BestOfN
) -> None:
    for method in (kad, search):
        with pytest.raises(kind, match=message):
            method.generate("hello", **(OPTIONS | options))


def test_options_of_other_libraries(kad: KnapsackDeferral, search: BestOfN) -> None:
    expected = kad.generate("hello", **OPTIONS).tokens
    same = {"seed": np.int64(0), "max_new_tokens": np.int32(4), "param": np.float64(0.4)}
    for name, value in (*same.items(), ("stop_strings", []), ("stop_strings", ())):
        assert kad.generate("hello", **(OPTIONS | {name: value})).tokens == expected
    (first, *_), *_ = expected
    for ends in (first, np.int64(first), torch.tensor(first), [first], np.array([first]), {first}):
        assert kad.generate("hello", eos_token_id=ends, **OPTIONS).tokens == [[first]]
        assert len(search.generate("hello", eos_token_id=ends, **OPTIONS)) == 1
    with pytest.raises(TypeError, match=r"pad_token_id is '0'"):
        kad.generate("hello", pad_token_id="0", **OPTIONS)
    with pytest.raises(TypeError, match=r"num_return_sequences is 1\.5"):
        kad.generate("hello", num_return_sequences=1.5, **OPTIONS)
    with pytest.raises(TypeError, match=r"batch_size is 1\.5"):
        kad.generate("hello", batch_size=1.5, **OPTIONS)
    with pytest.raises(TypeError, match="logits_processor has a int"):
        kad.generate("hello", logits_processor=[3], **OPTIONS)


@pytest.mark.parametrize("setting", [{"n": 2.5}, {"n": "2"}, {"n": True}, {"temperature": "1"},
                                     {"top_k": 1.5}, {"max_seconds": "3"}])  # fmt: skip
def test_settings_of_a_wrong_type(setting: dict[str, Any], search: BestOfN) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{min(setting)} is "):
        search.generate("hello", **setting)


def test_paths_in_the_place_of_models() -> None:
    with pytest.raises(TypeError, match=r"base is 'some/model'.* KnapsackDeferral\.from"):
        KnapsackDeferral("some/model", "other/model")
    with pytest.raises(TypeError, match=r"proxy is 'other/model'.*from_pretrained"):
        KnapsackDeferral(base_model(), "other/model")
    with pytest.raises(TypeError, match=r"model is 'some/model'.* BestOfN\.from_pretrained"):
        BestOfN("some/model", lambda p, r: [0.0])


def test_results_are_sequences(kad: KnapsackDeferral, search: BestOfN) -> None:
    both = kad.generate(TEXTS, num_return_sequences=2, **OPTIONS)
    assert [one.text for one in both] == both.texts
    assert both[-1].tokens == both.tokens[-1:]
    assert both[1:3].texts == both.texts[1:3]
    with pytest.raises(IndexError):
        both[4]
    found = search.generate(TEXTS, **OPTIONS)
    assert [one.text for one in found] == found.texts
    assert found[1].rewards == found.rewards[1:]
    for thing in (both, found):
        assert len(repr(thing)) < 200
    assert repr(both).startswith("<Generation: 4 answers, 16 tokens, seed 0; first '")
    assert "rule=" in repr(kad)
    assert "threshold" in repr(kad)
    assert repr(search).startswith("BestOfN(LlamaForCausalLM (ragged), BestOfNSettings(")


def test_errors_of_some_answers(kad: KnapsackDeferral) -> None:
    def spoil(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill((ids[:, :1] == 9), float("nan"))

    result = kad.generate([[5], [9]], logits_processor=[spoil], errors="finish", **OPTIONS)
    assert result.errors.keys() == {1}
    assert result[1].errors == {0: result.errors[1]}
    assert result[0].errors == {}
