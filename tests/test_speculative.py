"""Speculative decoding writes what the plain loop writes, token for token."""

from __future__ import annotations

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
from tta_ext.demo.pair import demo_pair
from tta_ext.demo.task import evaluation_problems

NEW = 18
LENGTHS = (1, 3, 8, "auto")
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
    for length in LENGTHS:
        drafted = answer(rule, prompts, speculative=length, **keys)
        check_equal(drafted, plain)
        total += drafted.stats
        alone = answer(rule, prompts[2:3], sequence=[2], speculative=length, **keys)
        assert alone.tokens[0] == plain.tokens[2]
        assert alone.deferred[0] == plain.deferred[2]
        assert alone.finish[0] == plain.finish[2]
    assert 0 < total.accepted_tokens < total.judged_tokens


@cache
def shipped() -> KnapsackDeferral:
    """The shipped pair in double."""
    base, proxy, tokenizer = demo_pair()
    return KnapsackDeferral(in_double(base), in_double(proxy), tokenizer)


def check_shipped(answers: int, tokens: int, seed: int) -> None:
    """So many answers at least, by turns one alone and 48 together, over rules and lengths."""
    settings = [(r, s, k) for r in RULES[:11] for s in (True, False) for k in LENGTHS]
    random.Random(seed).shuffle(settings)
    problems = [problem.prompt for problem in evaluation_problems(200)]
    done, turn, total = 0, 0, DecodeStats()
    while done < answers:
        rule, do_sample, length = settings[turn % len(settings)]
        prompts = [problems[(8 * turn + i) % len(problems)] for i in range(8 if turn % 2 else 1)]
        options: dict[str, Any] = {
            "max_new_tokens": tokens, "seed": seed + turn, "do_sample": do_sample,
            "num_return_sequences": 6 if turn % 2 else 1,
        } | rule  # fmt: skip
        plain = shipped().generate(prompts, **options)
        drafted = shipped().generate(prompts, speculative=length, **options)
        assert drafted.texts == plain.texts, (rule, do_sample, length)
        check_equal(drafted, plain)
        done, turn, total = done + len(plain), turn + 1, total + drafted.stats
    assert 0 < total.accepted_tokens < total.judged_tokens


def test_five_hundred_answers_of_the_shipped_pair() -> None:
    check_shipped(500, 6, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_five_thousand_answers_of_the_shipped_pair(seed: int) -> None:
    check_shipped(500, 48, 1000 * (seed + 1))


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
@pytest.mark.parametrize("rule", [RULES[i] for i in (0, 4, 6, 7, 11)], ids=rule_name)
def test_plain_steps_and_rounds_may_alternate(
    rule: dict[str, Any], do_sample: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are two tokens behind, a proxy that lags, no draft in some rows: all adds up."""
    draw = random.Random(4)

    def plan(self: Any, room: Any) -> list[int] | None:
        if draw.random() < 0.4:
            return None
        return [min(draw.randrange(4), most) for most in room]

    monkeypatch.setattr(FixedLength, "plan", plan)
    plain = answer(rule, do_sample=do_sample)
    total = DecodeStats()
    for _ in range(3):
        mixed = answer(rule, do_sample=do_sample, speculative=4)
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
    always = answer({"rule": "knapsack", "param": 1.0}, speculative=3, max_new_tokens=12)
    assert all(map(all, always.deferred))
    # The plain loop would emit each of these drafts.
    assert always.stats.acceptance_rate == 1.0
    assert always.stats.tokens_per_base_forward == 4.0
    assert always.stats.accepted_lengths == [0, 0, 0, 15]


@pytest.mark.parametrize("rule", [RULES[0], RULES[6], RULES[10]], ids=rule_name)
def test_a_lazy_proxy_or_a_dense_one_drafts_the_same(rule: dict[str, Any]) -> None:
    plain = answer(rule)
    for lazy in (True, False):
        check_equal(answer(rule, lazy=lazy, speculative=3), plain)
