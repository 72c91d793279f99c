"""``model.generate(custom_generate=tta_ext.hf.kad)``."""

from __future__ import annotations

from typing import Any

import generates
import pytest
import torch
from models import PAD, base_model, greedy, make_model, make_tokenizer, proxy_model, ragged_prompts

import tta_ext
from tta_ext.decoding import KnapsackDeferral
from tta_ext.decoding.runtime.compat import cache_argument

NEW = 8


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    return generates.batch()


def generate(batch: dict[str, torch.Tensor], **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "proxy_model": proxy_model(),
        "max_new_tokens": NEW,
        "pad_token_id": PAD,
        "eos_token_id": None,
        "do_sample": True,
        "top_k": 0,  # the configuration's default is 50
        "seed": 3,
    }
    return base_model().generate(**batch, custom_generate=tta_ext.hf.kad, **(defaults | options))


def own(**options: Any) -> list[list[int]]:
    kad = KnapsackDeferral(base_model(), proxy_model())
    defaults: dict[str, Any] = {"max_new_tokens": NEW, "seed": 3, "eos_token_id": []}
    return kad.generate(ragged_prompts(), **(defaults | options)).tokens


def test_same_tokens_as_the_loop(batch: dict[str, torch.Tensor]) -> None:
    out = generate(batch, rule="knapsack", param=0.4)
    width = batch["input_ids"].shape[1]
    assert torch.equal(out[:, :width], batch["input_ids"])
    assert out[:, width:].tolist() == own(rule="knapsack", param=0.4)


def test_greedy_and_one_prompt(batch: dict[str, torch.Tensor]) -> None:
    out = generate(batch, rule="threshold", param=0.0, do_sample=False)
    width = batch["input_ids"].shape[1]
    expected = [greedy(base_model(), prompt, NEW) for prompt in ragged_prompts()]
    assert out[:, width:].tolist() == expected
    prompt = torch.tensor([ragged_prompts()[0]])
    one = generate({"input_ids": prompt}, rule="knapsack", param=1.0, do_sample=False)
    assert one[0, prompt.shape[1] :].tolist() == greedy(proxy_model(), prompt[0].tolist(), NEW)


def test_temperature_belongs_to_the_rule(batch: dict[str, torch.Tensor]) -> None:
    width = batch["input_ids"].shape[1]
    options = {"rule": "knapsack", "param": 0.4, "rule_temperature": 1.3}
    out = generate(batch, temperature=0.6, **options)
    assert out[:, width:].tolist() == own(temperature=0.6, **options)


def test_processors_of_the_configuration(batch: dict[str, torch.Tensor]) -> None:
    width = batch["input_ids"].shape[1]
    banned = list(range(4, 90))
    out = generate(
        batch, rule="knapsack", param=0.5, suppress_tokens=banned, top_k=3, min_new_tokens=NEW,
    )  # fmt: skip
    new = out[:, width:]
    assert not set(new.flatten().tolist()) & set(banned)
    assert new.shape[1] == NEW


def test_ends_and_padding(batch: dict[str, torch.Tensor]) -> None:
    width = batch["input_ids"].shape[1]
    free = own(rule="knapsack", param=0.4)
    ends = [free[0][2], free[1][4]]
    out = generate(batch, rule="knapsack", param=0.4, eos_token_id=ends)
    for row, tokens in enumerate(own(rule="knapsack", param=0.4, eos_token_id=ends)):
        assert out[row, width:].tolist() == tokens + [PAD] * (out.shape[1] - width - len(tokens))


def test_several_sequences_dict_and_streamer(batch: dict[str, torch.Tensor]) -> None:
    out = generate(
        batch, num_return_sequences=2, return_dict_in_generate=True, rule="knapsack", param=0.4
    )
    assert out.sequences.shape == (10, batch["input_ids"].shape[1] + NEW)
    puts: list[Any] = []

    class Sink:
        def put(self, value: torch.Tensor) -> None:
            puts.append(value.tolist())

        def end(self) -> None:
            puts.append("end")

    prompt = {"input_ids": torch.tensor([ragged_prompts()[0]])}
    one = generate(prompt, token_streamer=Sink())
    assert puts[0] == prompt["input_ids"].tolist()
    assert [p[0] for p in puts[1:-1]] == one[0, prompt["input_ids"].shape[1] :].tolist()
    assert puts[-1] == "end"


def test_stop_string_criteria() -> None:
    from transformers import StopStringCriteria

    tokenizer = make_tokenizer()
    prompt = {"input_ids": torch.tensor([tokenizer("hello")["input_ids"]])}
    free = generate(prompt, max_new_tokens=16)
    text = tokenizer.decode(free[0, 5:])
    stop = StopStringCriteria(tokenizer, [text[4:6]])
    cut = generate(prompt, max_new_tokens=16, stopping_criteria=[stop])
    assert cut.shape[1] < free.shape[1]
    assert torch.equal(cut[0], free[0, : cut.shape[1]])


def test_other_prompts_for_the_proxy(batch: dict[str, torch.Tensor]) -> None:
    prompt = torch.tensor([ragged_prompts()[0]])
    other = torch.tensor([[9, 8, 7]])
    out = generate(
        {"input_ids": prompt}, proxy_input_ids=other, rule="knapsack", param=1.0, do_sample=False
    )
    assert out[0, prompt.shape[1] :].tolist() == greedy(proxy_model(), [9, 8, 7], NEW)


def test_implicit_reward(batch: dict[str, torch.Tensor]) -> None:
    anti = make_model(seed=2)
    out = generate(batch, rule="implicit_reward", param=0.5, anti_model=anti)
    assert generate(batch, rule="implicit_reward", anti_model=anti, top_k=5).shape == out.shape
    kad = KnapsackDeferral(
        base_model(), proxy_model(), rule="implicit_reward", param=0.5, anti=anti
    )
    expected = kad.generate(ragged_prompts(), max_new_tokens=NEW, seed=3, eos_token_id=[])
    assert out[:, batch["input_ids"].shape[1] :].tolist() == expected.tokens


@pytest.mark.parametrize("speculative", [None, 3])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_caches_of_transformers(
    kind: str, speculative: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Any kind may be named or passed; the loop keeps its own, and says so."""
    from transformers import DynamicCache, StaticCache

    base, proxy = make_model(kind, seed=0), make_model(kind, seed=1)
    prompt = torch.tensor([ragged_prompts()[3]])
    options: dict[str, Any] = {
        "custom_generate": tta_ext.hf.kad, "proxy_model": proxy, "rule": "knapsack", "param": 0.4,
        "max_new_tokens": 16, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None,
    }  # fmt: skip
    expected = base.generate(prompt, **options)
    assert not caplog.records
    options["speculative"] = speculative
    for name in ("dynamic", "static", "offloaded", "offloaded_static"):
        caplog.clear()
        out = base.generate(prompt, cache_implementation=name, **options)
        assert torch.equal(out, expected)
        warned = f"cache_implementation='{name}' is not used: rows advance by different numbers"
        assert (warned in caplog.text) == (name != "dynamic")
    name = cache_argument(base)
    for cache in (StaticCache(config=base.config, max_cache_len=64), DynamicCache()):
        caplog.clear()
        out = base.generate(prompt, **{name: cache}, **options)
        assert torch.equal(out, expected)
        assert f"{name} ({type(cache).__name__}) is not used" in caplog.text
        assert int(cache.get_seq_length()) == 0


def test_errors(batch: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="proxy_model is missing"):
        generate(batch, proxy_model=None)
    with pytest.raises(ValueError, match="rule is 'best'"):
        generate(batch, rule="best")
    wide = make_model(vocabulary=300)
    with pytest.raises(ValueError, match="and proxy 300"):
        generate(batch, proxy_model=wide)
    from transformers import DynamicCache

    filled: dict[str, Any] = {cache_argument(base_model()): DynamicCache()}
    base_model()(batch["input_ids"][:1, :4], **filled)
    with pytest.raises(ValueError, match=f"{min(filled)} already holds tokens"):
        generate({"input_ids": batch["input_ids"][:1]}, **filled)
