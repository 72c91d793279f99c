"""Arguments as users of transformers, NumPy and pandas have them: accepted, or refused in words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from models import base_model, make_tokenizer, proxy_model
from transformers import BatchEncoding, MaxTimeCriteria, TemperatureLogitsWarper, TextStreamer

from tta_ext.decoding import BestOfN, KnapsackDeferral
from tta_ext.decoding.runtime.prompts import PromptList, normalise_prompts

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
        ({"a", "b"}, "prompts is a set, which has no order"),
        (memoryview(b"hello"), "prompts is bytes"),
        (torch.zeros(1, 3, dtype=torch.long, device="meta"), "is a sparse or meta tensor"),
        (torch.ones(1, 3, dtype=torch.long).to_sparse(), "is a sparse or meta tensor"),
        ([{"role": "user", "content": "a"}, 5], "prompt 0 mixes messages"),
        ([{"content": "a"}], "prompt 0 has a message whose role is None"),
        ([{"role": 5, "content": "a"}], "prompt 0 has a message whose role is 5"),
        ([{"role": "user"}], "prompt 0 has a message whose content is None"),
        ([{"role": "user", "content": ["a"]}], "prompt 0 has a message whose content is"),
        (PromptList([5]), "prompt 0 is a int, expected text"),
        (PromptList([{"role": "user", "content": "a"}]), "prompt 0 is a dict, expected text"),
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
        ({"seed": True}, TypeError, "seed is True, expected an integer"),
        ({"sequence": [2**32]}, ValueError, "sequence is 4294967296, expected 0 <= sequence"),
        ({"sequence": [-1]}, ValueError, "sequence is -1, expected 0 <= sequence"),
        ({"top_p": "x"}, ValueError, "top_p is 'x', expected"),
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
    for name, value in (("do_sample", "no"), ("do_sample", None), ("lazy", 1)):
        with pytest.raises(TypeError, match=f"{name} is {value!r}, expected True or False"):
            kad.generate("hello", **(OPTIONS | {name: value}))
    assert kad.generate("hello", do_sample=np.bool_(True), **OPTIONS).tokens == expected
    with pytest.raises(TypeError, match=r"pad_token_id is '0'"):
        kad.generate("hello", pad_token_id="0", **OPTIONS)
    with pytest.raises(TypeError, match=r"num_return_sequences is 1\.5"):
        kad.generate("hello", num_return_sequences=1.5, **OPTIONS)
    with pytest.raises(TypeError, match=r"batch_size is 1\.5"):
        kad.generate("hello", batch_size=1.5, **OPTIONS)
    assert kad.generate("hello", top_k=np.int64(200), top_p=np.float32(1), **OPTIONS).tokens == (
        expected
    )


def test_text_is_text(kad: KnapsackDeferral, search: BestOfN) -> None:
    half = "a\ud800b"
    for method in (kad, search):
        for prompts in (half, ["a", half], [{"role": "user", "content": half}]):
            with pytest.raises(ValueError, match=r"has half a character, '\\ud800', which is no"):
                method.generate(prompts, **OPTIONS)
    chat = kad.chat(**OPTIONS)
    for text in (None, 5, b"a", {"a": 1}):
        with pytest.raises(TypeError, match="has a message whose content is"):
            chat.send(text)  # type: ignore[arg-type]


class Halved:
    """Hands back scores of fewer tokens."""

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores[:, :3]


def test_what_the_loop_calls(kad: KnapsackDeferral) -> None:
    """Processors, criteria and streamers: of the right kind, returning what they should."""
    expected = kad.generate("hello", **OPTIONS).tokens
    assert kad.generate("hello", logits_processor=[lambda i, s: s.double()], **OPTIONS).tokens == (
        expected
    )
    for options, message in (
        ({"logits_processor": [3]}, "logits_processor has a int, expected callables"),
        ({"logits_processor": TemperatureLogitsWarper}, "logits_processor has the class Temper"),
        ({"stopping_criteria": [MaxTimeCriteria]}, "stopping_criteria has the class MaxTimeCri"),
        ({"logits_processor": Halved()}, r"Halved returned \[1, 3\], expected scores \[1, 100\]"),
        ({"logits_processor": lambda i, s: None}, "function returned NoneType, expected scores"),
        ({"streamer": 5}, "streamer is 5, expected an object with put and end"),
        ({"streamer": TextStreamer}, "expected an object with put and end"),
    ):
        with pytest.raises(TypeError, match=message):
            kad.generate("hello", **options, **OPTIONS)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a tokenizer is a str, expected a tokenizer of"):
        KnapsackDeferral(base_model(), proxy_model(), "some/model")
    shown: list[Any] = []
    streamer = SimpleNamespace(put=shown.append, end=lambda: shown.append("end"))
    assert kad.generate([], streamer=streamer, **OPTIONS).tokens == []
    assert shown == ["end"]


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
