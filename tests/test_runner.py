"""One model: rows of different length in its cache, models that are refused, the probe."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from models import (
    ARCHITECTURES,
    NEW,
    VOCABULARY,
    base_model,
    greedy,
    make_model,
    next_logits,
    ragged_prompts,
)

from tta_ext.decoding import KnapsackDeferral
from tta_ext.decoding.runtime.attention import check_model, ragged_refusal
from tta_ext.decoding.runtime.fit import fit_model
from tta_ext.decoding.runtime.runner import Runner

# ---- the ragged cache under one model ----------------------------------------------------------


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_rows_of_different_length_decode_as_alone(kind: str) -> None:
    model, prompts = make_model(kind), ragged_prompts()
    expected = [greedy(model, prompt, NEW) for prompt in prompts]
    fit_model(model, "base")
    with torch.inference_mode():
        runner = Runner(model, prompts, room=NEW, vocabulary=VOCABULARY)
        runner.prefill()
        found: list[list[int]] = [[] for _ in prompts]
        for _ in range(NEW):
            token = runner.step().argmax(-1)
            runner.append(token.tolist(), token)
            for row, one in enumerate(token.tolist()):
                found[row].append(one)
    assert found == expected


@pytest.mark.parametrize("kind", ["llama", "qwen2-sliding", "gemma3", "chunked"])
def test_rows_may_lag_leave_and_outgrow_the_buffers(kind: str) -> None:
    model, prompts = make_model(kind), ragged_prompts()
    expected = [greedy(model, prompt, 16) for prompt in prompts]
    random.seed(5)
    with torch.inference_mode():
        runner = Runner(model, prompts, room=16, vocabulary=VOCABULARY)
        runner.cache.capacity = 4  # must grow several times
        rows, warm, seen = list(range(len(prompts))), False, 0
        for step in range(16):
            asked = [i for i in range(len(rows)) if random.random() < 0.4]
            if step == 9:
                runner.keep([0, 2, 3])
                rows, asked = [rows[0], rows[2], rows[3]], [0, 1]
            if asked:
                if not warm:
                    runner.prefill()
                    warm = True
                token = runner.catch_up(asked).argmax(-1).tolist()
                assert token == [expected[rows[i]][step] for i in asked]
                seen += len(asked)
            runner.append([expected[row][step] for row in rows])
    assert seen > 10


def test_equal_prompts_are_run_once() -> None:
    prompts = ragged_prompts()
    with torch.inference_mode():
        runner = Runner(base_model(), prompts, room=1, vocabulary=VOCABULARY)
        runner.prefill()
    assert runner.tokens_run == 8 + 2 + 13  # all but the last tokens, the equal prompt once


def test_reload_keeps_the_common_prefix() -> None:
    with torch.inference_mode():
        runner = Runner(base_model(), [[5, 6, 7, 8]], room=4, vocabulary=VOCABULARY)
        runner.prefill()
        runner.step()
        before = runner.tokens_run
        runner.reload([[5, 6, 9, 9, 9]], room=4)
        logits = runner.catch_up()
    assert runner.tokens_run - before == 3
    torch.testing.assert_close(logits, next_logits(base_model(), [5, 6, 9, 9, 9]))


def _configured(name: str, **options: Any) -> Any:
    import transformers

    config = getattr(transformers, name)(vocab_size=VOCABULARY, **options)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("BloomConfig", {"hidden_size": 16, "n_layer": 1, "n_head": 2}, "takes no position_ids"),
        (
            "GPTNeoConfig",
            {"hidden_size": 16, "num_layers": 1, "num_heads": 2,
             "attention_types": [[["local"], 1]]},
            "longest row",
        ),
        ("MambaConfig", {"hidden_size": 16, "num_hidden_layers": 1}, "recurrent state"),
    ],
)  # fmt: skip
def test_models_that_cannot_lag_have_a_reason(name: str, options: dict, reason: str) -> None:
    found = ragged_refusal(_configured(name, **options))
    assert found is not None
    assert reason in found


def test_other_models_are_refused() -> None:
    import transformers

    config = base_model().config
    with pytest.raises(ValueError, match="no language-model head"):
        check_model(transformers.AutoModel.from_config(config), "proxy")
    t5 = transformers.T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="encoder-decoder"):
        check_model(transformers.T5ForConditionalGeneration(t5), "base")
    with pytest.raises(TypeError, match="base is a str"):
        check_model("gpt2", "base")


def test_the_probe_finds_attention_that_ignores_its_mask() -> None:
    model = make_model(seed=4)
    forward = model.model.forward

    def deaf(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        if attention_mask is not None:
            attention_mask = torch.zeros_like(attention_mask)
        return forward(*args, attention_mask=attention_mask, **kwargs)

    model.model.forward = deaf
    with pytest.raises(ValueError, match="gives other logits"):
        KnapsackDeferral(base_model(), model, runner="ragged")
    assert "proxy=LlamaForCausalLM (lockstep)" in repr(KnapsackDeferral(base_model(), model))
