"""Speculative decoding writes what the plain loop writes, token for token."""

from __future__ import annotations

import itertools
import random
from functools import cache
from typing import Any

import pytest
import torch
from models import (
    VOCABULARY,
    greedy,
    in_double,
    make_model,
    near_models,
    ragged_prompts,
)

from tta_ext.decoding import DecodeStats, Generation, KnapsackDeferral
from tta_ext.decoding.deferral.draft_length import FixedLength
from tta_ext.decoding.deferral.lookup import Lookup
from tta_ext.demo.pair import demo_pair
from tta_ext.demo.task import evaluation_problems

NEW = 18
LENGTHS = (1, 3, 8, "auto")
OTHERS = ("base", "lookup")  # who may draft besides the proxy
RULES: list[dict[str, Any]] = [
    {"rule": "knapsack", "param": 0.4},
    {"rule": "knapsack", "param": 0.4, "critical": "split"},
    {"rule": "knapsack", "param": 0.3, "critical": "include", "rule_temperature": 0.6},
    {"rule": "threshold", "param": 0.03, "temperature": 1.3},
    {"rule": "confidence_bet", "param": 0.1},
    {"rule": "nudging", "param": 0.1},
    {"rule": "relative", "param": 0.05},
    {"rule": "argmax", "param": None},
    {"rule": "proxy_below", "param": -0.2},
    {"rule": "proxy_above", "param": -0.1},
    {"rule": "relative_ratio", "param": 0.4},
    {"rule": "optimal", "param": -0.2, "rule_temperature": 0.8},
    {"rule": "implicit_reward", "param": 0.8},
    {"rule": "implicit_reward", "param": [0.5, 0.3], "temperature": 0.7},
]


def rule_name(rule: dict[str, Any]) -> str:
    return "-".join(str(value) for value in rule.values())


@cache
def owner_of(several: bool, tilted: bool) -> KnapsackDeferral:
    """Near models; for implicit reward with anti-experts, for ``several`` betas with two each."""
    base, proxy = near_models()
    if not tilted:
        return KnapsackDeferral(base, proxy)
    others = [in_double(make_model(seed=seed)) for seed in (1, 2, 3)]
    experts, anti = ([proxy, others[0]], others[1:]) if several else ([proxy], others[1:2])
    return KnapsackDeferral(base, experts, rule="implicit_reward", param=0.5, anti=anti)


def answer(rule: dict[str, Any], prompts: Any = None, **options: Any) -> Generation:
    owner = owner_of(isinstance(rule["param"], list), rule["rule"] == "implicit_reward")
    keys: dict[str, Any] = {"max_new_tokens": NEW, "seed": 3, "eos_token_id": []}
    return owner.generate(ragged_prompts() if prompts is None else prompts, **keys | rule | options)


def many_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    lengths = torch.randint(5, 17, (16,), generator=generator).tolist()
    return [torch.randint(4, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def check_equal(drafted: Generation, plain: Generation) -> None:
    assert drafted.tokens == plain.tokens
    assert drafted.deferred == plain.deferred
    assert drafted.finish == plain.finish


# ---- every rule ----------------------------------------------------------------------------------


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_tokens_sources_and_ends_are_the_plain_loops(rule: dict[str, Any], do_sample: bool) -> None:
    prompts, total = many_prompts(), DecodeStats()
    keys: dict[str, Any] = {"do_sample": do_sample}
    free = answer(rule, prompts, **keys)
    keys["eos_token_id"] = [free.tokens[row][6 + row % 5] for row in (0, 5, 9)]
    plain = answer(rule, prompts, **keys)
    assert len(set(map(len, plain.tokens))) > 2
    assert "eos" in plain.finish
    turn = 2 * RULES.index(rule) + do_sample
    ways = [(LENGTHS[turn % 4], "proxy"), (LENGTHS[(turn + 1) % 4], "proxy")]
    ways += [(4, other) for other in OTHERS]
    for length, draft in ways:
        drafted = answer(rule, prompts, speculative=length, draft=draft, **keys)
        check_equal(drafted, plain)
        total += drafted.stats
    length, draft = ways[turn // 4 % 4]
    alone = answer(rule, prompts[2:3], sequence=[2], speculative=length, draft=draft, **keys)
    assert alone.tokens[0] == plain.tokens[2]
    assert alone.deferred[0] == plain.deferred[2]
    assert alone.finish[0] == plain.finish[2]
    assert 0 < total.accepted_tokens < total.judged_tokens


@cache
def shipped() -> KnapsackDeferral:
    """The shipped pair in double."""
    base, proxy, tokenizer = demo_pair()
    return KnapsackDeferral(in_double(base), in_double(proxy), tokenizer)


def check_shipped(answers: int, tokens: int, first: int) -> None:
    """So many answers at least, by turns one alone and 48 together, from a turn (even) on.

    Two turns for each rule, way of choosing and length; drafts of the proxy and of another one.
    """
    settings = [(r, s, k) for r in RULES[:-1] for s in (True, False) for k in LENGTHS]
    random.Random(0).shuffle(settings)
    problems = [problem.prompt for problem in evaluation_problems(200)]
    totals = {draft: DecodeStats() for draft in ("proxy", *OTHERS)}
    done, turn = 0, first
    while done < answers:
        rule, do_sample, length = settings[turn // 2 % len(settings)]
        prompts = [problems[(8 * turn + i) % len(problems)] for i in range(8 if turn % 2 else 1)]
        options: dict[str, Any] = {
            "max_new_tokens": tokens, "seed": turn, "do_sample": do_sample,
            "num_return_sequences": 6 if turn % 2 else 1,
        } | rule  # fmt: skip
        plain = shipped().generate(prompts, **options)
        for draft in ("proxy", OTHERS[turn // 2 % 2]):
            drafted = shipped().generate(prompts, speculative=length, draft=draft, **options)
            assert drafted.texts == plain.texts, (rule, do_sample, length, draft)
            check_equal(drafted, plain)
            totals[draft] += drafted.stats
        done, turn = done + len(plain), turn + 1
    for total in totals.values():
        assert 0 < total.accepted_tokens < total.judged_tokens


def test_five_hundred_answers_of_the_shipped_pair() -> None:
    check_shipped(500, 6, 0)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_five_thousand_answers_of_the_shipped_pair(part: int) -> None:
    """Their 220 turns have every setting, alone and in a batch."""
    check_shipped(500, 32, 22 * part)


# ---- rolling back --------------------------------------------------------------------------------


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("kind", ["mistral", "qwen2-sliding", "gemma3", "chunked", "mla"])
def test_sliding_windows_and_other_attention_roll_back(kind: str, do_sample: bool) -> None:
    owner = KnapsackDeferral(*near_models(kind), rule="knapsack", param=0.4)
    options: dict[str, Any] = {
        "max_new_tokens": 20, "seed": 3, "eos_token_id": [], "do_sample": do_sample,
    }  # fmt: skip
    plain = owner.generate(ragged_prompts(), **options)
    drafted = owner.generate(ragged_prompts(), speculative=3, **options)
    check_equal(drafted, plain)
    assert drafted.stats.accepted_lengths[0] > 0
    assert sum(drafted.stats.accepted_lengths[1:]) > 0


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_a_window_shorter_than_the_text(kind: str) -> None:
    """transformers' own decoding, whose sliding cache forgets, says the same of the base alone."""
    base, proxy = near_models(kind)
    owner = KnapsackDeferral(base, proxy, rule="threshold", param=0.0)
    prompts = ragged_prompts()
    assert max(map(len, prompts)) > base.config.sliding_window
    drafted = owner.generate(
        prompts, do_sample=False, max_new_tokens=NEW, eos_token_id=[], speculative=4
    )
    assert drafted.stats.accepted_tokens > 0
    assert drafted.tokens == [greedy(base, prompt, NEW) for prompt in prompts]


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("draft", ["proxy", *OTHERS])
@pytest.mark.parametrize("rule", [RULES[i] for i in (0, 4, 6, 7, 11)], ids=rule_name)
def test_plain_steps_and_rounds_may_alternate(
    rule: dict[str, Any], draft: str, do_sample: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are two tokens behind, a proxy that lags, no draft in some rows: all adds up."""
    draw = random.Random(4)

    def plan(self: Any, room: Any) -> list[int] | None:
        if draw.random() < 0.4:
            return None
        return [min(draw.randrange(4), most) for most in room]

    monkeypatch.setattr(FixedLength, "plan", plan)
    plain = answer(rule, do_sample=do_sample)
    texts = [a + b for a, b in zip(ragged_prompts(), plain.tokens, strict=True)]

    def guess(self: Any, tokens: list[int], length: int) -> list[int]:
        """What the plain loop writes, with mistakes: random texts seldom repeat themselves."""
        end = len(tokens)
        (rest, *_) = [text[end : end + length] for text in texts if text[:end] == tokens]
        return [token if draw.random() < 0.8 else 5 for token in rest]

    monkeypatch.setattr(Lookup, "guess", guess)
    total = DecodeStats()
    for _ in range(2):
        mixed = answer(rule, do_sample=do_sample, speculative=4, draft=draft)
        check_equal(mixed, plain)
        total += mixed.stats
    assert 0 < total.accepted_tokens < total.judged_tokens


# ---- rows and parameters -------------------------------------------------------------------------


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("rule", ["knapsack", "relative"])
def test_a_parameter_for_each_row(rule: str, do_sample: bool) -> None:
    params = [0.0, 0.3, 1.0, 0.6, 0.1]
    options: dict[str, Any] = {"do_sample": do_sample}
    plain = answer({"rule": rule, "param": torch.tensor(params)}, **options)
    check_equal(
        answer({"rule": rule, "param": torch.tensor(params)}, speculative=3, **options), plain
    )
    for row, param in enumerate(params):
        alone = answer({"rule": rule, "param": param}, [ragged_prompts()[row]], sequence=[row],
                       speculative=3, **options)  # fmt: skip
        assert alone.tokens[0] == plain.tokens[row]
        assert alone.deferred[0] == plain.deferred[row]


def test_several_answers_of_a_prompt() -> None:
    prompts = ragged_prompts()[:2]
    plain = answer(RULES[0], prompts, num_return_sequences=3)
    several = answer(RULES[0], prompts, num_return_sequences=3, speculative=3)
    check_equal(several, plain)
    repeated = answer(RULES[0], [p for p in prompts for _ in range(3)], speculative=3)
    assert several.tokens == repeated.tokens
    assert len({tuple(t) for t in several.tokens[:3]}) == 3


def test_rules_that_never_or_always_defer() -> None:
    never = answer({"rule": "threshold", "param": 0.0}, speculative=3)
    assert not any(map(any, never.deferred))
    always = answer({"rule": "knapsack", "param": 1.0}, speculative=3, max_new_tokens=80)
    assert all(map(all, always.deferred))
    # The plain loop emits each token that the proxy draws, which is found out in some rounds.
    assert always.stats.acceptance_rate > 0.9
    assert always.stats.tokens_per_base_forward > 3.5


@pytest.mark.parametrize("rule", [RULES[0], RULES[6], RULES[10]], ids=rule_name)
def test_a_lazy_proxy_or_a_dense_one_drafts_the_same(rule: dict[str, Any]) -> None:
    plain = answer(rule)
    for lazy, draft in itertools.product((True, False), ("proxy", *OTHERS)):
        check_equal(answer(rule, lazy=lazy, speculative=3, draft=draft), plain)


# ---- who drafts ----------------------------------------------------------------------------------


def test_a_lookup_copies_what_followed_the_longest_repetition() -> None:
    lookup = Lookup()
    text = [1, 2, 3, 4, 5, 6, 2, 3]
    assert lookup.guess(text, 3) == [4, 5, 6]
    assert lookup.guess([*text, 9], 3) == []
    # Of two places the one with more in common, of equals the latest.
    assert Lookup().guess([7, 1, 2, 8, 5, 1, 2, 9, 7, 1, 2], 1) == [8]
    assert Lookup().guess([1, 2, 8, 1, 2, 9, 1, 2], 1) == [9]
    # A repetition that reaches the end goes on; a single token is no repetition.
    assert Lookup().guess([5, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]
    assert Lookup().guess([3, 3], 4) == []
    assert Lookup().guess([3, 3, 3], 4) == [3, 3, 3, 3]
    # Told of a text bit by bit or at once, it says the same.
    draw = random.Random(0)
    grown, whole = Lookup(), [draw.randrange(3) for _ in range(200)]
    for end in range(1, 200, 7):
        assert grown.guess(whole[:end], 6) == Lookup().guess(whole[:end], 6)


def test_a_lookup_needs_no_second_model() -> None:
    """A rule that never defers and a text that repeats itself: the proxy never runs."""
    prompt = [5, 6, 7, 8, 9] * 4
    rule: dict[str, Any] = {"rule": "threshold", "param": 0.0}
    options: dict[str, Any] = {"max_new_tokens": 60, "do_sample": False}
    plain = answer(rule, [prompt], **options)
    drafted = answer(rule, [prompt], speculative=5, draft="lookup", **options)
    check_equal(drafted, plain)
    assert drafted.stats.accepted_tokens > 0
    assert drafted.stats.base_calls < plain.stats.base_calls
    assert drafted.stats.proxy_calls == 0


@pytest.mark.parametrize("rule", [RULES[4], RULES[10]], ids=rule_name)
def test_a_slow_proxy_reads_the_drafts_of_the_base(rule: dict[str, Any]) -> None:
    plain = answer(rule, do_sample=False)
    drafted = answer(rule, do_sample=False, speculative=4, draft="base")
    check_equal(drafted, plain)
    assert drafted.stats.proxy_calls < 0.8 * plain.stats.proxy_calls


def test_who_drafts_is_said_with_a_length_and_by_name() -> None:
    with pytest.raises(ValueError, match="draft is 'lookup' without a length: pass speculative=K"):
        answer(RULES[0], draft="lookup")
    with pytest.raises(ValueError, match="draft is 'me', expected None or one of proxy, base"):
        answer(RULES[0], draft="me", speculative=3)
    with pytest.raises(ValueError, match="draft is 'me'"):
        KnapsackDeferral(*near_models(), draft="me")
    owner = KnapsackDeferral(*near_models(), rule="knapsack", speculative=3, draft="lookup")
    keys: dict[str, Any] = {"max_new_tokens": 4, "seed": 3, "eos_token_id": []}
    plain = owner.generate([[5, 6, 7]], speculative=0, **keys)
    check_equal(owner.generate([[5, 6, 7]], **keys), plain)
    assert owner.generate([[5, 6, 7]], draft="proxy", **keys).stats.draft_tokens > 0
