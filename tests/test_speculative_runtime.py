"""Speculative decoding: the law of the plain loop, whatever is drafted, kept and rolled back."""

from __future__ import annotations

import itertools
import logging
import random
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from models import (
    VOCABULARY,
    base_model,
    greedy,
    make_model,
    make_tokenizer,
    next_logits,
    proxy_model,
    ragged_prompts,
)
from test_sampling import chi_square

from tta_ext import ops
from tta_ext.decoding import DecodeStats, Generation, KnapsackDeferral
from tta_ext.decoding.deferral.draft_length import FixedLength
from tta_ext.decoding.runtime.runner import Runner

NEW = 12
RULES: list[dict[str, Any]] = [
    {"rule": "knapsack", "param": 0.4},
    {"rule": "knapsack", "param": 0.4, "critical": "split"},
    {"rule": "knapsack", "param": 0.3, "critical": "include", "rule_temperature": 0.6},
    {"rule": "threshold", "param": 0.3, "temperature": 1.3},
    {"rule": "confidence_bet", "param": 0.1},
    {"rule": "nudging", "param": 0.6},
    {"rule": "relative", "param": 0.2},
    {"rule": "argmax", "param": None},
    {"rule": "proxy_below", "param": -0.2},
    {"rule": "proxy_above", "param": -0.1},
]


def rule_name(rule: dict[str, Any]) -> str:
    return "-".join(str(value) for value in rule.values())


@cache
def near_models(kind: str = "llama") -> tuple[Any, Any]:
    """A base and a proxy close to it, so that drafts stand for a while and then fail."""
    base, proxy = make_model(kind, seed=0), make_model(kind, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in proxy.parameters():
            if parameter.dim() > 1:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return base, proxy


@cache
def kad() -> KnapsackDeferral:
    return KnapsackDeferral(*near_models())


def answer(prompts: Any = None, owner: Any = None, **options: Any) -> Generation:
    defaults: dict[str, Any] = {"max_new_tokens": NEW, "seed": 3, "eos_token_id": []}
    owner = kad() if owner is None else owner
    return owner.generate(ragged_prompts() if prompts is None else prompts, **(defaults | options))


def many_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    lengths = torch.randint(1, 20, (16,), generator=generator).tolist()
    return [torch.randint(4, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


# ---- the law -----------------------------------------------------------------------------------

DEPTH, SYMBOLS, DRAWS = 4, 4, 6000


@cache
def small_pair() -> KnapsackDeferral:
    """Four tokens, laws that are neither flat nor certain."""
    options: dict[str, Any] = {"vocabulary": SYMBOLS, "hidden_size": 16, "intermediate_size": 16}
    models = [make_model(seed=seed, **options) for seed in (3, 4, 5)]
    with torch.no_grad():
        for model in models:
            model.lm_head.weight.mul_(2.0)
    pair = KnapsackDeferral(models[0], models[1])
    pair.extra = models[2]
    return pair


def token_law(prefix: list[int], rule: dict[str, Any]) -> torch.Tensor:
    """Law of (token, source), float64 ``[2 V]``: the base's tokens, then the proxy's."""
    base, proxy = (
        next_logits(model, prefix) for model in (small_pair().base, small_pair().proxies[0])
    )
    found = ops.deferral_mask(base, proxy, **rule)
    mu = found.mask[0].double()
    if int(found.critical) >= 0 and rule.get("critical") == "split":
        mu[int(found.critical)] = float(found.fraction)
    temperature = rule.get("temperature", 1.0)
    p = torch.softmax(base[0].double() / temperature, -1)
    q = torch.softmax(proxy[0].double() / temperature, -1)
    return torch.cat(((1 - mu) * p, q * (mu * p).sum()))


def enumerate_law(prompt: list[int], one: Any, symbols: int, end: int | None) -> dict[Any, float]:
    """Probability of every answer of at most DEPTH tokens, by the definition."""
    level: dict[tuple[int, ...], float] = {(): 1.0}
    done: dict[tuple[int, ...], float] = {}
    laws: dict[tuple[int, ...], list[float]] = {}
    for _ in range(DEPTH):
        deeper = {}
        for words, weight in level.items():
            tokens = tuple(word % symbols for word in words)
            if tokens not in laws:
                laws[tokens] = one([*prompt, *tokens]).tolist()
            for word, probability in enumerate(laws[tokens]):
                kept = done if word % symbols == end else deeper
                kept[(*words, word)] = weight * probability
        level = deeper
    return done | level


def check_law(result: Generation, law: dict[Any, float], symbols: int) -> None:
    cells = {words: i for i, words in enumerate(law)}
    drawn = [
        cells[tuple(t + symbols * d for t, d in zip(tokens, deferred, strict=True))]
        for tokens, deferred in zip(result.tokens, result.deferred, strict=True)
    ]
    weights = torch.tensor(list(law.values()), dtype=torch.float64).clamp_min(0)
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-5)
    weights[weights < 1e-9] = 1e-12  # rounding: nothing is counted as impossible
    assert chi_square(torch.tensor(drawn), weights) > 1e-4


@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_answers_and_sources_have_the_law_of_plain_decoding(rule: dict[str, Any]) -> None:
    prompt = [3, 1]
    law = enumerate_law(prompt, lambda prefix: token_law(prefix, rule), SYMBOLS, None)
    options: dict[str, Any] = {"max_new_tokens": DEPTH, "num_return_sequences": DRAWS} | rule
    result = answer([prompt], small_pair(), speculative=2, **options)
    check_law(result, law, SYMBOLS)
    assert result.stats.accepted_tokens > 0


@pytest.mark.parametrize("rule", [RULES[0], RULES[4]], ids=rule_name)
def test_an_end_inside_a_draft_keeps_the_law(rule: dict[str, Any]) -> None:
    prompt, end = [1], 2
    law = enumerate_law(prompt, lambda prefix: token_law(prefix, rule), SYMBOLS, end)
    options: dict[str, Any] = {"max_new_tokens": DEPTH, "num_return_sequences": DRAWS} | rule
    result = answer([prompt], small_pair(), speculative=3, eos_token_id=end, **options)
    check_law(result, law, SYMBOLS)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_implicit_reward_keeps_its_law(temperature: float) -> None:
    small = small_pair()
    pair = KnapsackDeferral(
        small.base, small.proxies, rule="implicit_reward", param=0.8, anti=small.extra
    )

    def one(prefix: list[int]) -> torch.Tensor:
        logits = [
            next_logits(m, prefix).double() for m in (small.base, *small.proxies, small.extra)
        ]
        tilted = logits[0] + 0.8 * (logits[1].log_softmax(-1) - logits[2].log_softmax(-1))
        return torch.softmax(tilted[0] / temperature, -1)

    law = enumerate_law([2, 3], one, SYMBOLS, None)
    result = answer(
        [[2, 3]], pair, speculative=2, temperature=temperature, max_new_tokens=DEPTH,
        num_return_sequences=DRAWS,
    )  # fmt: skip
    check_law(result, law, SYMBOLS)
    assert not any(map(any, result.deferred))


@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_a_draft_token_stands_at_least_with_the_deferred_mass(rule: dict[str, Any]) -> None:
    prompt = [3, 1, 2]
    law = token_law(prompt, rule)
    proxy = next_logits(small_pair().proxies[0], prompt)[0].double()
    q = torch.softmax(proxy / rule.get("temperature", 1.0), -1)
    expected = float(torch.minimum(q, law[:SYMBOLS] + law[SYMBOLS:]).sum())
    mass = float(law[SYMBOLS:].sum())
    result = answer(
        [prompt], small_pair(), speculative=1, max_new_tokens=2, num_return_sequences=DRAWS, **rule
    )
    stats = result.stats
    # The first round of every answer drafts one token; later ones have no room to.
    assert stats.judged_tokens == DRAWS
    error = (expected * (1 - expected) / DRAWS) ** 0.5 + 1e-9
    assert abs(stats.acceptance_rate - expected) < 5 * error
    assert stats.acceptance_rate > mass - 5 * error


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule", [{"rule": "threshold", "param": 0.4}, {"rule": "confidence_bet", "param": 0.2}]
)
def test_the_shipped_pair_writes_what_it_writes_without_drafts(rule: dict[str, Any]) -> None:
    """First tokens and their sources agree within sampling error, over all prompts together."""
    from scipy import stats

    from tta_ext.demo.pair import demo_pair
    from tta_ext.demo.task import evaluation_problems

    shipped = demo_pair()
    pair = KnapsackDeferral(shipped.base, shipped.proxy, shipped.tokenizer)
    prompts = [problem.prompt for problem in evaluation_problems(6)]
    count, seen = 400, 6
    runs = [
        pair.generate(
            prompts, max_new_tokens=seen + 1, num_return_sequences=count, seed=seed, batch_size=60,
            speculative=k, **rule,
        )
        for seed, k in ((0, 0), (1, 4))
    ]  # fmt: skip
    # The first tokens one by one, then all together: few cells where little differs, and all of it.
    for first in (1, 2, 3, seen):
        statistic, freedom = 0.0, 0
        for start in range(0, len(prompts) * count, count):
            tables: list[dict[Any, int]] = [{}, {}]
            for table, run in zip(tables, runs, strict=True):
                for row in range(start, start + count):
                    key = tuple(run.tokens[row][:first]), tuple(run.deferred[row][:first])
                    table[key] = table.get(key, 0) + 1
            keys = sorted(set(tables[0]) | set(tables[1]))
            counts = np.array([[t.get(k, 0) for k in keys] for t in tables], dtype=float)
            common = counts.sum(0) >= 10
            merged = np.column_stack([counts[:, common], counts[:, ~common].sum(1)])
            merged = merged[:, merged.sum(0) > 0]
            if merged.shape[1] > 1:
                found = stats.chi2_contingency(merged, correction=False)
                statistic, freedom = statistic + found.statistic, freedom + found.dof
        assert freedom > 0
        assert stats.chi2.sf(statistic, freedom) > 1e-4, first


# ---- token for token ---------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 4, 20])
@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_greedy_equals_the_plain_loop(rule: dict[str, Any], length: int) -> None:
    plain = answer(do_sample=False, **rule)
    drafted = answer(do_sample=False, speculative=length, **rule)
    assert drafted.tokens == plain.tokens
    assert drafted.deferred == plain.deferred
    assert drafted.finish == plain.finish


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("rule", [RULES[0], RULES[3], RULES[4]], ids=rule_name)
def test_a_batch_equals_single_runs(rule: dict[str, Any], do_sample: bool) -> None:
    prompts = many_prompts()
    ends = [answer(prompts, speculative=4, **rule).tokens[i][4] for i in (0, 5, 9)]
    options = {"eos_token_id": ends, "do_sample": do_sample, "speculative": 4} | rule
    whole = answer(prompts, **options)
    for row, prompt in enumerate(prompts):
        alone = answer([prompt], sequence=[row], **options)
        assert alone.tokens[0] == whole.tokens[row]
        assert alone.deferred[0] == whole.deferred[row]
        assert alone.finish[0] == whole.finish[row]
    assert len(set(map(len, whole.tokens))) > 1
    assert set(whole.finish) == {"eos", "length"}


@pytest.mark.parametrize("kind", ["mistral", "qwen2-sliding", "gemma3", "chunked", "mla"])
def test_sliding_windows_and_other_attention_roll_back(kind: str) -> None:
    owner = KnapsackDeferral(*near_models(kind), rule="knapsack", param=0.4)
    plain = answer(None, owner, do_sample=False, max_new_tokens=20)
    drafted = answer(None, owner, do_sample=False, max_new_tokens=20, speculative=3)
    assert drafted.tokens == plain.tokens
    assert drafted.stats.accepted_lengths[0] > 0
    assert sum(drafted.stats.accepted_lengths[1:]) > 0


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_a_window_shorter_than_the_text(kind: str) -> None:
    """transformers' own decoding, whose sliding cache forgets, says the same of the base alone."""
    base, proxy = near_models(kind)
    owner = KnapsackDeferral(base, proxy, rule="threshold", param=0.0)
    prompts = ragged_prompts()
    assert max(map(len, prompts)) > base.config.sliding_window
    drafted = answer(prompts, owner, do_sample=False, max_new_tokens=24, speculative=4)
    assert drafted.stats.accepted_tokens > 0
    assert drafted.tokens == [greedy(base, prompt, 24) for prompt in prompts]


def test_implicit_reward_greedy_equals_the_plain_loop() -> None:
    base, expert = near_models()
    owner = KnapsackDeferral(
        base, [expert, proxy_model()], rule="implicit_reward", param=[0.5, 0.2],
        anti=[base_model(), make_model(seed=2)],
    )  # fmt: skip
    plain = answer(None, owner, do_sample=False)
    drafted = answer(None, owner, do_sample=False, speculative=3)
    assert drafted.tokens == plain.tokens
    assert drafted.stats.accepted_tokens > 0
    whole = answer(None, owner, speculative=3)
    one = answer([ragged_prompts()[3]], owner, speculative=3, sequence=[3])
    assert one.tokens[0] == whole.tokens[3]


def test_a_parameter_for_each_row_and_several_answers() -> None:
    params = [0.0, 0.3, 1.0, 0.6, 0.1]
    for do_sample in (True, False):
        options: dict[str, Any] = {"rule": "knapsack", "do_sample": do_sample, "speculative": 3}
        result = answer(param=params, **options)
        for row, param in enumerate(params):
            alone = answer([ragged_prompts()[row]], param=param, sequence=[row], **options)
            assert alone.tokens[0] == result.tokens[row]
            assert alone.deferred[0] == result.deferred[row]
    prompts = ragged_prompts()[:2]
    several = answer(prompts, num_return_sequences=3, rule="knapsack", param=0.5, speculative=3)
    repeated = answer([p for p in prompts for _ in range(3)], rule="knapsack", param=0.5,
                      speculative=3)  # fmt: skip
    assert several.tokens == repeated.tokens
    assert len({tuple(t) for t in several.tokens[:3]}) == 3


def test_rules_that_never_or_always_defer() -> None:
    never = answer(rule="threshold", param=0.0, speculative=3)
    assert not any(map(any, never.deferred))
    always = answer(rule="knapsack", param=1.0, speculative=3)
    assert all(map(all, always.deferred))
    assert always.stats.acceptance_rate == 1.0
    assert always.stats.tokens_per_base_forward == NEW / 3
    assert always.stats.accepted_lengths == [0, 0, 0, 15]


# ---- ends, streams, processors -----------------------------------------------------------------


def test_ends_inside_drafts_cut_answers() -> None:
    free = answer(rule="knapsack", param=0.7, speculative=5)
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
    options: dict[str, Any] = {"max_new_tokens": 24, "speculative": 5}
    free = answer("hello", owner, **options)
    for start in range(2, 9):
        stop = free.text[start : start + 2]
        result = answer("hello", owner, stop_strings=stop, **options)
        assert result.finish == ["stop"]
        assert result.text == free.text[: free.text.index(stop)]
        assert free.tokens[0][: len(result.tokens[0])] == result.tokens[0]


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_the_limit_is_kept(limit: int) -> None:
    result = answer(rule="knapsack", param=0.8, speculative=5, max_new_tokens=limit)
    assert list(map(len, result.tokens)) == [limit] * 5
    assert result.finish == ["length"] * 5


def test_streams_and_streamers() -> None:
    owner = KnapsackDeferral(*near_models(), make_tokenizer(), rule="knapsack", param=0.5)
    prompts = ["hi", "hello there", "x"]
    options: dict[str, Any] = {"max_new_tokens": 12, "seed": 5, "speculative": 4}
    whole = owner.generate(prompts, **options)
    tokens: list[list[int]] = [[], [], []]
    texts, finish = ["", "", ""], ["", "", ""]
    for event in owner.stream(prompts, batch_size=2, **options):
        assert not finish[event.row]
        tokens[event.row].append(event.token)
        texts[event.row] += event.text
        finish[event.row] = event.finish or ""
    assert (tokens, texts, finish) == (whole.tokens, whole.texts, whole.finish)

    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(owner.tokenizer, skip_prompt=True, skip_special_tokens=True)
    result = answer("hello", owner, streamer=streamer, speculative=4)
    assert "".join(streamer) == result.text


def test_conversations_keep_their_caches() -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    owner = KnapsackDeferral(*near_models(), make_tokenizer(template=template), rule="knapsack",
                             param=0.5)  # fmt: skip
    options: dict[str, Any] = {"max_new_tokens": 9, "seed": 0, "do_sample": False}
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
    for rule in (RULES[0], RULES[4]):
        options: dict[str, Any] = {"logits_processor": processors} | rule
        plain = answer(do_sample=False, **options)
        drafted = answer(do_sample=False, speculative=3, **options)
        assert drafted.tokens == plain.tokens
        sampled = answer(speculative=3, **options)
        assert sampled.stats.accepted_tokens > 0
        for row, prompt in enumerate(ragged_prompts()):
            whole = [prompt[-1], *sampled.tokens[row]]
            assert all((a - b) % 2 for a, b in itertools.pairwise(whole))
            alone = answer([prompt], sequence=[row], speculative=3, **options)
            assert alone.tokens[0] == sampled.tokens[row]


def test_stopping_criteria() -> None:
    def long_enough(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 12)

    result = answer(stopping_criteria=[long_enough], rule="knapsack", param=0.7, speculative=4)
    expected = [max(1, min(NEW, 12 - len(p))) for p in ragged_prompts()]
    assert [len(t) for t in result.tokens] == expected
    assert result.finish == ["length" if n == NEW else "stop" for n in expected]


@pytest.mark.parametrize("trace", [True, "lazy"])
@pytest.mark.parametrize("rule", [RULES[0], RULES[4]], ids=rule_name)
def test_traces(rule: dict[str, Any], trace: bool | str) -> None:
    untraced = answer(speculative=3, **rule)
    result = answer(speculative=3, trace=trace, **rule)
    assert result.tokens == untraced.tokens
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
    expected = answer([prompt], rule="knapsack", param=0.5, speculative=4)
    assert out[0, len(prompt) :].tolist() == expected.tokens[0]


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    from tta_ext.cli.app import run

    command = ["generate", "--seed", "3", "--max-new-tokens", "6", "--rule", "knapsack"]
    assert run([*command, "--speculative", "3", "2 + 3 ="]) == 0
    assert capsys.readouterr().out
    assert run([*command, "--speculative", "auto", "2 + 3 ="]) == 0
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
        ("JambaConfig", _ATTENTION | {"num_experts": 2}, "keeps a recurrent state"),
        ("Lfm2Config", _ATTENTION | {"layer_types": ["conv", "full_attention"]}, "'conv'"),
        ("MiniMaxConfig", _ATTENTION | {"num_local_experts": 2}, "'linear_attention'"),
    ],
)
def test_models_that_cannot_roll_back_are_refused(
    name: str, options: dict[str, Any], reason: str
) -> None:
    import transformers

    import tta_ext

    config = getattr(transformers, name)(**_TINY, **options)
    model = transformers.AutoModelForCausalLM.from_config(config)
    message = rf"{reason}.* can neither lag behind nor be rolled back"
    with pytest.raises(ValueError, match=message):
        KnapsackDeferral(model, model, speculative=3)
    with pytest.raises(ValueError, match=message):
        model.generate(
            torch.tensor([[5, 6]]), custom_generate=tta_ext.hf.kad, proxy_model=model,
            max_new_tokens=4, pad_token_id=2, eos_token_id=None, speculative=3,
        )  # fmt: skip


@pytest.mark.parametrize("value", ["fast", -1, 65, 2.5, True])
def test_bad_lengths_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"speculative is .* expected None, 'auto' or"):
        answer(speculative=value)
    with pytest.raises(ValueError, match="speculative is"):
        KnapsackDeferral(*near_models(), speculative=value)


def test_broken_logits_name_their_row() -> None:
    model = make_model(seed=8)
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    for pair in ((model, proxy_model()), (base_model(), model)):
        with pytest.raises(ValueError, match="row 0"):
            answer(None, KnapsackDeferral(*pair, probe=False), speculative=3)


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
    assert parts.accepted_lengths == stats.accepted_lengths
    plain = answer(None, owner, speculative=0).stats
    assert plain.tokens_per_base_forward == 1.0
    assert plain.accepted_lengths == []
    total = plain + stats
    assert total.accepted_lengths == stats.accepted_lengths
    assert total.row_steps == plain.row_steps + stats.row_steps
    assert DecodeStats().acceptance_rate == DecodeStats().tokens_per_base_forward == 0.0


def test_auto_decodes_and_says_when_it_stops(caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"rule": "knapsack", "param": 0.5, "max_new_tokens": 40}
    plain = answer(do_sample=False, **options)
    with caplog.at_level(logging.WARNING, logger="tta_ext"):
        drafted = answer(do_sample=False, speculative="auto", **options)
    assert drafted.tokens == plain.tokens
    assert drafted.deferred == plain.deferred
    # A proxy as large as its base: whether it pays hangs on the machine.
    note = drafted.stats.speculation
    assert not note or note.startswith("no draft was tried") or note in caplog.text
    assert answer(speculative="auto", rule="confidence_bet", param=0.1).stats.tokens == 5 * NEW


def test_plain_steps_and_rounds_may_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are two tokens behind, a proxy that lags: everything still adds up."""
    draw = random.Random(4)

    def plan(self: Any, rows: Any, room: Any) -> list[int] | None:
        if draw.random() < 0.5:
            return None
        return [min(draw.randrange(4), most) for most in room]

    monkeypatch.setattr(FixedLength, "plan", plan)
    for rule in (RULES[0], RULES[4], RULES[7]):
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 30} | rule
        plain = answer(**options)
        for _ in range(3):
            mixed = answer(speculative=4, **options)
            assert mixed.tokens == plain.tokens
            assert mixed.deferred == plain.deferred
