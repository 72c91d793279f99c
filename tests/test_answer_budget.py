"""A budget over whole answers: its bound, its law, and that drafts and batches change nothing."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from models import NEW, answer, base_model, next_logits, proxy_model, ragged_prompts
from test_speculative import answer as drafted_answer
from test_speculative import check_equal, many_prompts

from tta_ext import ops, rng
from tta_ext.decoding import KnapsackDeferral
from tta_ext.decoding.deferral.options import AnswerBudget

RULES = [("threshold", 0.05), ("knapsack", 0.6), ("confidence_bet", 0.0), ("optimal", -0.3)]
WAYS = ["greedy", "running"]


@pytest.fixture(scope="module")
def kad() -> KnapsackDeferral:
    return KnapsackDeferral(base_model(), proxy_model())


def test_a_budget_in_numbers() -> None:
    greedy, running = AnswerBudget(0.29, False), AnswerBudget(0.25, True)
    assert greedy.allows(28, 30, 100)  # 29 of 100, although 0.29 * 100 is less in floats
    assert not greedy.allows(29, 30, 100)
    allowed = [written for written in range(12) if running.allows(1, written, 100)]
    assert allowed == [7, 8, 9, 10, 11]  # the second of the proxy is the eighth token or later
    for share, may in ((0.0, False), (1.0, True)):
        assert all(
            AnswerBudget(share, way).allows(n, n, 12) is may
            for way in (True, False)
            for n in (0, 5)
        )


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("rule", "param"), RULES)
def test_bound_and_limits(
    kad: KnapsackDeferral, rule: str, param: float, way: str, do_sample: bool
) -> None:
    keys: dict[str, Any] = {"rule": rule, "param": param, "do_sample": do_sample}
    free = answer(kad, **keys)
    assert free.stats.deferred_tokens > 0
    for share in (0.0, 0.2, 0.5, 1.0):
        bounded = answer(kad, **keys, answer_budget=share, answer_spending=way)
        for flags in bounded.deferred:
            for written in range(1, len(flags) + 1) if way == "running" else [NEW]:
                assert sum(flags[:written]) <= share * written + 1e-9
        if share == 1.0:
            check_equal(bounded, free)
        if share == 0.0:
            alone = answer(kad, rule="threshold", param=0.0, do_sample=do_sample)
            assert bounded.tokens == alone.tokens
            assert not bounded.stats.deferred_tokens


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("rule", "param"), RULES)
@torch.inference_mode()
def test_law_token_by_token(kad: KnapsackDeferral, rule: str, param: float, way: str) -> None:
    """Where the budget lasts the rule's draw, elsewhere the base's, both under the same keys."""
    budget = AnswerBudget(0.3, way == "running")
    found = answer(kad, rule=rule, param=param, answer_budget=0.3, answer_spending=way)
    for row, prompt in enumerate(ragged_prompts()):
        tokens, spent = list(prompt), 0
        for written, (token, flag) in enumerate(
            zip(found.tokens[row], found.deferred[row], strict=True)
        ):
            key: dict[str, Any] = {"seed": found.seed, "position": len(tokens), "sequence": row}
            base, proxy = next_logits(kad.base, tokens), next_logits(kad.proxies[0], tokens)
            if budget.allows(spent, written, NEW):
                drawn = ops.deferral_sample(base, proxy, rule=rule, param=param, **key)
                want = int(drawn.token), bool(drawn.deferred)
            else:
                want = int(ops.categorical_sample(base, stream=rng.BASE, **key)), False
            assert (token, flag) == want
            spent += flag
            tokens.append(token)
    assert found.stats.deferred_tokens > 0


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize(("rule", "param"), RULES)
def test_drafts_and_batches_change_nothing(rule: str, param: float, do_sample: bool) -> None:
    chosen = {"rule": rule, "param": param}
    for way, share in (("greedy", 0.2), ("running", 0.4)):
        keys: dict[str, Any] = {
            "do_sample": do_sample, "answer_budget": share, "answer_spending": way
        }  # fmt: skip
        plain = drafted_answer(chosen, many_prompts(), **keys)
        for length, draft in itertools.product((1, 4), ("proxy", "base", "lookup")):
            drafted = drafted_answer(
                chosen, many_prompts(), **keys, speculative=length, draft=draft
            )
            check_equal(drafted, plain)
        alone = drafted_answer(chosen, many_prompts()[2:3], sequence=[2], **keys)
        assert alone.tokens[0] == plain.tokens[2]
        assert alone.deferred[0] == plain.deferred[2]


def test_what_a_budget_refuses(kad: KnapsackDeferral) -> None:
    with pytest.raises(ValueError, match=r"answer_budget is 1\.5, expected a share from 0 to 1"):
        answer(kad, answer_budget=1.5)
    with pytest.raises(ValueError, match="answer_spending is 'late', expected one of greedy"):
        answer(kad, answer_budget=0.5, answer_spending="late")
    with pytest.raises(ValueError, match="answer_spending is 'greedy' without an answer_budget"):
        answer(kad, answer_spending="greedy")
    with pytest.raises(ValueError, match="'implicit_reward' has no answer_budget"):
        answer(kad, rule="implicit_reward", param=1.0, answer_budget=0.5)
