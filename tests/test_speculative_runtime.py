"""Speculative decoding: ends, streams, processors, traces, statistics, refusals."""

from __future__ import annotations

import itertools
import logging
from functools import cache
from typing import Any

import pytest
import torch
from models import (
    VOCABULARY,
    base_model,
    make_model,
    make_tokenizer,
    near_models,
    next_logits,
    proxy_model,
    ragged_prompts,
)

from tta_ext.decoding import DecodeStats, Generation, KnapsackDeferral
from tta_ext.decoding.deferral.options import DRAFTS
from tta_ext.decoding.runtime.runner import Runner

NEW = 12
LAZY: dict[str, Any] = {"rule": "knapsack", "param": 0.4}
DENSE: dict[str, Any] = {"rule": "confidence_bet", "param": 0.1}


@cache
def kad() -> KnapsackDeferral:
    return KnapsackDeferral(*near_models())


def answer(prompts: Any = None, owner: Any = None, **options: Any) -> Generation:
    defaults: dict[str, Any] = {"max_new_tokens": NEW, "seed": 3, "eos_token_id": []}
    owner = kad() if owner is None else owner
    return owner.generate(ragged_prompts() if prompts is None else prompts, **(defaults | options))


# ---- ends, streams, processors -----------------------------------------------------------------


def test_ends_inside_drafts_cut_answers() -> None:
    free = answer(rule="knapsack", param=0.7)
    ends = sorted({free.tokens[0][1], free.tokens[3][3], free.tokens[4][6]})
    result = answer(rule="knapsack", param=0.7, speculative=5, eos_token_id=ends)
    cut = []
    for tokens in free.tokens:
        at = next((i for i, token in enumerate(tokens) if token in ends), None)
        cut.append(tokens if at is None else tokens[: at + 1])
    assert result.tokens == cut
    assert [len(d) for d in result.deferred] == list(map(len, cut))
    assert result.stats.tokens == sum(map(len, cut))


def test_stop_strings_inside_drafts() -> None:
    owner = KnapsackDeferral(*near_models(), make_tokenizer(), rule="knapsack", param=0.7)
    options: dict[str, Any] = {"max_new_tokens": 24}
    free = answer("hello", owner, **options)
    for start in range(2, 9):
        stop = free.text[start : start + 2]
        plain = answer("hello", owner, stop_strings=stop, **options)
        result = answer("hello", owner, stop_strings=stop, speculative=5, **options)
        assert result.finish == ["stop"]
        assert result.text == free.text[: free.text.index(stop)]
        assert result.tokens == plain.tokens


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_the_limit_is_kept(limit: int) -> None:
    result = answer(rule="knapsack", param=0.8, speculative=5, max_new_tokens=limit)
    plain = answer(rule="knapsack", param=0.8, max_new_tokens=limit)
    assert result.tokens == plain.tokens
    assert list(map(len, result.tokens)) == [limit] * 5
    assert result.finish == ["length"] * 5


def test_streams_and_streamers() -> None:
    owner = KnapsackDeferral(*near_models(), make_tokenizer(), rule="knapsack", param=0.5)
    prompts = ["hi", "hello there", "x"]
    options: dict[str, Any] = {"max_new_tokens": 12, "seed": 5}
    whole = owner.generate(prompts, **options)
    tokens: list[list[int]] = [[], [], []]
    texts, finish = ["", "", ""], ["", "", ""]
    for event in owner.stream(prompts, batch_size=2, speculative=4, **options):
        assert not finish[event.row]
        tokens[event.row].append(event.token)
        texts[event.row] += event.text
        finish[event.row] = event.finish or ""
    assert (tokens, texts, finish) == (whole.tokens, whole.texts, whole.finish)

    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(owner.tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer("hello", owner, streamer=streamer, speculative=4)
    assert "".join(streamer) == answer("hello", owner).text


@pytest.mark.parametrize("do_sample", [True, False])
def test_conversations_keep_their_caches(do_sample: bool) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    owner = KnapsackDeferral(*near_models(), make_tokenizer(template=template), rule="knapsack",
                             param=0.5)  # fmt: skip
    options: dict[str, Any] = {"max_new_tokens": 9, "seed": 0, "do_sample": do_sample}
    plain, drafted = owner.chat(**options), owner.chat(**options, speculative=3)
    for text in ("hi", "and then?", "why"):
        assert drafted.send(text) == plain.send(text)
    assert drafted.last is not None
    assert plain.last is not None
    # Only the turn's own tokens are fed, besides the answer's and its drafts.
    assert drafted.last.stats.base_tokens < plain.last.stats.base_tokens + 40


def test_logits_processors_see_each_position_of_a_draft() -> None:
    from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

    def alternate(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Only even ids after an odd one, and the other way round."""
        wrong = (torch.arange(VOCABULARY)[None] - input_ids[:, -1:]) % 2 == 0
        return scores.masked_fill(wrong, float("-inf"))

    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3), alternate])
    prompts = [prompt * 2 for prompt in ragged_prompts()]
    for rule, do_sample, draft in itertools.product((LAZY, DENSE), (True, False), DRAFTS):
        options: dict[str, Any] = {
            "logits_processor": processors, "do_sample": do_sample, "max_new_tokens": 24,
        } | rule  # fmt: skip
        plain = answer(prompts, **options)
        drafted = answer(prompts, speculative=3, draft=draft, **options)
        assert drafted.tokens == plain.tokens
        assert drafted.deferred == plain.deferred
        assert drafted.stats.draft_tokens > 0
        for prompt, tokens in zip(prompts, drafted.tokens, strict=True):
            assert all((a - b) % 2 for a, b in itertools.pairwise([prompt[-1], *tokens]))


def test_stopping_criteria() -> None:
    def long_enough(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 12)

    options: dict[str, Any] = {"stopping_criteria": [long_enough], "rule": "knapsack", "param": 0.7}
    result = answer(speculative=4, **options)
    assert result.tokens == answer(**options).tokens
    expected = [max(1, min(NEW, 12 - len(p))) for p in ragged_prompts()]
    assert [len(t) for t in result.tokens] == expected
    assert result.finish == ["length" if n == NEW else "stop" for n in expected]


@pytest.mark.parametrize("trace", [True, "lazy"])
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("rule", [LAZY, DENSE], ids=["lazy", "dense"])
def test_traces(rule: dict[str, Any], draft: str, trace: bool | str) -> None:
    result = answer(speculative=3, draft=draft, trace=trace, **rule)
    assert result.tokens == answer(**rule).tokens
    assert result.trace is not None
    base, proxy = near_models()
    for row, prompt in enumerate(ragged_prompts()[:3]):
        assert len(result.trace[row]) == NEW
        tokens = list(prompt)
        for one, deferred in zip(result.trace[row], result.deferred[row], strict=True):
            p = torch.softmax(next_logits(base, tokens), -1)[0, one.token]
            q = torch.softmax(next_logits(proxy, tokens), -1)[0, one.token]
            assert one.p == pytest.approx(float(p), rel=1e-3, abs=1e-7)
            assert one.source == ("proxy" if deferred else "base")
            if one.q is None:
                assert trace == "lazy"
                assert not deferred
            else:
                assert one.q == pytest.approx(float(q), rel=1e-3, abs=1e-7)
            tokens.append(one.token)


def test_hf_and_padding_match_the_library() -> None:
    import tta_ext

    base, proxy = near_models()
    prompt = ragged_prompts()[0]
    out = base.generate(
        torch.tensor([prompt]), custom_generate=tta_ext.hf.kad, proxy_model=proxy, seed=3,
        rule="knapsack", param=0.5, max_new_tokens=NEW, do_sample=True, top_k=0, pad_token_id=2,
        eos_token_id=None, speculative=4,
    )  # fmt: skip
    expected = answer([prompt], rule="knapsack", param=0.5)
    assert out[0, len(prompt) :].tolist() == expected.tokens[0]


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    from tta_ext.cli.app import run

    command = ["generate", "--seed", "3", "--max-new-tokens", "6", "--rule", "knapsack"]
    assert run([*command, "--speculative", "3", "2 + 3 ="]) == 0
    assert capsys.readouterr().out
    assert run([*command, "--speculative", "auto", "--draft", "lookup", "2 + 3 ="]) == 0
    assert run([*command, "--draft", "lookup", "2 + 3 ="]) != 0
    assert run([*command, "--speculative", "fast", "2 + 3 ="]) != 0
    assert "speculative is 'fast', expected None, 'auto' or" in " ".join(
        capsys.readouterr().err.split()
    )


# ---- the runner --------------------------------------------------------------------------------


def test_a_runner_scores_drafts_and_takes_them_back() -> None:
    model, prompts = make_model(), ragged_prompts()
    drafts = [[5, 6, 7], [], [8], [9, 10], [11]]
    with torch.inference_mode():
        runner = Runner(model, prompts, room=8, vocabulary=VOCABULARY)
        runner.cache.capacity = 4
        runner.prefill()
        logits = runner.score(drafts)
        assert logits.shape == (5, 4, VOCABULARY)
        pairs = list(zip(prompts, drafts, strict=True))
        kept = [len(prompt) + len(draft) // 2 for prompt, draft in pairs]
        for row, (prompt, draft) in enumerate(pairs):
            for k in range(len(draft) + 1):
                alone = next_logits(model, prompt + draft[:k])[0]
                torch.testing.assert_close(logits[row, k], alone, rtol=1e-3, atol=1e-3)
        runner.rollback(kept, [[20 + row] for row in range(5)])
        after = runner.step()
        for row, (prompt, draft) in enumerate(pairs):
            tokens = prompt + draft[: len(draft) // 2] + [20 + row]
            assert runner.tokens(row) == tokens
            torch.testing.assert_close(after[row], next_logits(model, tokens)[0], rtol=1e-3,
                                       atol=1e-3)  # fmt: skip


_TINY: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2}
_ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("MambaConfig", {}, "keeps a recurrent state instead of keys and values"),
        ("RwkvConfig", {}, "keeps a recurrent state instead of keys and values"),
        (
            "JambaConfig",
            _ATTENTION | {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
            "keeps a recurrent state",
        ),
        ("Lfm2Config", _ATTENTION | {"layer_types": ["conv", "full_attention"]}, "'conv'"),
        ("MiniMaxConfig", _ATTENTION | {"num_local_experts": 2}, "'linear_attention'"),
    ],
)
def test_models_that_cannot_roll_back_draft_nothing(
    name: str, options: dict[str, Any], reason: str
) -> None:
    import transformers

    import tta_ext

    config = getattr(transformers, name)(**_TINY, **options)
    model = transformers.AutoModelForCausalLM.from_config(config)
    message = rf"{reason}.* can neither lag behind nor be rolled back"
    with pytest.raises(ValueError, match=message):
        KnapsackDeferral(model, model, speculative=3, runner="ragged")
    kad = KnapsackDeferral(model, model, speculative=3)
    found = answer(None, kad)
    assert found.stats.speculation.startswith(f"nothing is drafted: base ({type(model).__name__})")
    assert found.tokens == answer(None, kad, speculative=0).tokens
    ids = torch.tensor([[5, 6]])
    given: dict[str, Any] = {"max_new_tokens": 4, "pad_token_id": 2, "eos_token_id": None}
    tokens = model.generate(
        ids, custom_generate=tta_ext.hf.kad, proxy_model=model, speculative=3, param=0.0, **given
    )
    assert tokens.tolist() == model.generate(ids, do_sample=False, **given).tolist()


@pytest.mark.parametrize("value", ["fast", -1, 65, 2.5, True])
def test_bad_lengths_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"speculative is .* expected None, 'auto' or"):
        answer(speculative=value)
    with pytest.raises(ValueError, match="speculative is"):
        KnapsackDeferral(*near_models(), speculative=value)


def test_broken_logits_are_named_as_in_the_plain_loop() -> None:
    model = make_model(seed=8)
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    for pair, name in (((model, proxy_model()), "base"), ((base_model(), model), "proxy")):
        owner = KnapsackDeferral(*pair, rule="knapsack", param=0.3, probe=False)
        with pytest.raises(ValueError, match=f"the logits of {name} for prompt") as plain:
            answer(None, owner)
        for length, draft in itertools.product((3, "auto"), DRAFTS):
            with pytest.raises(ValueError, match="have NaN") as drafted:
                answer(None, owner, speculative=length, draft=draft)
            assert str(drafted.value) == str(plain.value)


# ---- statistics, automatic lengths -------------------------------------------------------------


def test_statistics() -> None:
    owner = KnapsackDeferral(*near_models(), rule="knapsack", param=0.6, speculative=3)
    result = answer(None, owner)
    stats = result.stats
    assert stats.tokens == 5 * NEW
    assert 0 < stats.accepted_tokens <= stats.judged_tokens <= stats.draft_tokens
    assert stats.accepted_tokens == sum(i * n for i, n in enumerate(stats.accepted_lengths))
    assert 1 < stats.tokens_per_base_forward <= 4
    assert stats.base_calls == stats.steps + 1
    assert 0 < stats.base_seconds < stats.seconds
    assert 0 < stats.proxy_seconds < stats.seconds
    assert set(stats.as_dict()) >= {"acceptance_rate", "accepted_lengths"}
    parts = answer(None, owner, batch_size=2).stats
    assert parts.tokens == stats.tokens
    # Which guess drafts is learnt from the answers of a batch.
    assert parts.accepted_tokens == sum(i * n for i, n in enumerate(parts.accepted_lengths))
    plain = answer(None, owner, speculative=0).stats
    assert plain.tokens_per_base_forward == 1.0
    assert plain.accepted_lengths == []
    total = plain + stats
    assert total.accepted_lengths == stats.accepted_lengths
    assert total.row_steps == plain.row_steps + stats.row_steps
    assert DecodeStats().acceptance_rate == DecodeStats().tokens_per_base_forward == 0.0


def test_auto_decodes_and_says_when_it_pauses(caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"rule": "knapsack", "param": 0.5, "max_new_tokens": 40}
    plain = answer(**options)
    owner = KnapsackDeferral(*near_models())
    with caplog.at_level(logging.WARNING, logger="tta_ext"):
        for _ in range(2):
            drafted = answer(None, owner, speculative="auto", **options)
            assert drafted.tokens == plain.tokens
            assert drafted.deferred == plain.deferred
            assert drafted.stats.draft_tokens > 0 or drafted.stats.steps == 40
    # A proxy as large as its base: whether it pays hangs on the machine.
    assert not drafted.stats.speculation or "speculative decoding pauses" in caplog.text
