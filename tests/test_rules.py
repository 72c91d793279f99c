"""Rule: one frozen object in place of five keywords, checked once."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import P_ONLY, rule_cases, rule_id
from torch import Tensor

from tta_ext import ops, rules
from tta_ext.rules import Rule

BASE, PROXY = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(4)) * 3
KEY: dict[str, Any] = {"seed": 5, "position": torch.tensor([3, 1, 4])}

CALLS: dict[str, Callable[..., Any]] = {
    "mask": lambda **rule: ops.deferral_mask(BASE, PROXY, **rule),
    "probs": lambda **rule: (ops.deferral_probs(BASE, PROXY, **rule),),
    "stats": lambda **rule: ops.deferral_stats(BASE, PROXY, **rule),
    "propose": lambda **rule: ops.deferral_propose(BASE, **rule, **KEY),
    "sample": lambda **rule: ops.deferral_sample(BASE, PROXY, **rule, **KEY),
    "verify": lambda **rule: ops.deferral_verify(
        BASE[:, None].repeat(1, 3, 1),
        PROXY[:, None].repeat(1, 3, 1),
        torch.tensor([[1, 2], [3, 4], [5, 6]]),
        torch.tensor([2, 1, 0]),
        **rule,
        **KEY,
    ),
}


def _made(kwargs: dict[str, Any]) -> Rule:
    rest = dict(kwargs)
    return Rule(rest.pop("rule"), **rest)


def _same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kwargs", list(rule_cases()), ids=rule_id)
@pytest.mark.parametrize("op", CALLS)
def test_a_rule_is_its_keywords(op: str, kwargs: dict[str, Any]) -> None:
    if op == "propose" and kwargs["rule"] not in P_ONLY:
        with pytest.raises(ValueError, match=f"rule is '{kwargs['rule']}', which needs proxy"):
            CALLS[op](rule=_made(kwargs))
        return
    _same(CALLS[op](rule=_made(kwargs)), CALLS[op](**kwargs))


@pytest.mark.parametrize("op", CALLS)
def test_nothing_beside_a_rule(op: str) -> None:
    beside = {"param": 0.3, "critical": "split", "temperature": 0.5, "rule_temperature": 1.0}
    for name, value in beside.items():
        with pytest.raises(TypeError, match=f"rule is a Rule, which holds {name} already"):
            CALLS[op](rule=Rule(), **{name: value})


def test_a_rule_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = Rule("knapsack", 0.25, "split", rule_temperature=0.5)
    want = CALLS["sample"](rule=rule)
    monkeypatch.setattr(rules, "check_rule", None)
    _same(CALLS["sample"](rule=rule), want)
    _same(CALLS["sample"](rule=rule.select(torch.tensor([0, 1, 2]))), want)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "name": ({"name": "greedy"}, ValueError, "rule is 'greedy', expected one of knapsack"),
    "mixture": ({"name": rules.IMPLICIT_REWARD}, ValueError, "rule is 'implicit_reward', expected"),
    "critical": ({"critical": "drop"}, ValueError, "critical is 'drop', expected one of exclude"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature is 0.0, expected a positive"),
    "rule temperature": (
        {"rule_temperature": float("inf")},
        ValueError,
        "rule_temperature is inf, expected a positive",
    ),
    "budget": (
        {"name": "knapsack", "param": -0.1},
        ValueError,
        "param is -0.1, expected a budget >= 0 for rule 'knapsack'",
    ),
    "budgets": (
        {"name": "knapsack", "param": [0.1, -0.2]},
        ValueError,
        "param is -0.2, expected a budget >= 0 for rule 'knapsack'",
    ),
    "NaN": ({"param": float("nan")}, ValueError, "param is nan, expected a number for rule"),
    "no param": ({"param": None}, ValueError, "param is None, expected a number for rule"),
    "argmax": ({"name": "argmax"}, ValueError, "param is 0.4, expected None for rule 'argmax'"),
    "argmax tensor": (
        {"name": "argmax", "param": torch.zeros(1)},
        ValueError,
        "param is a tensor, expected None for rule 'argmax'",
    ),
    "text": ({"param": "0.4"}, TypeError, "param is '0.4', expected a number or a float64 tensor"),
    "float32": (
        {"param": torch.zeros(2)},
        TypeError,
        "param has dtype torch.float32, expected torch.float64",
    ),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_wrong_rules_are_not_made(case: tuple[dict[str, Any], type[Exception], str]) -> None:
    kwargs, kind, text = case
    with pytest.raises(kind, match=re.escape(text)):
        Rule(**kwargs)
    fine = Rule("threshold", 0.4)
    with pytest.raises(kind, match=re.escape(text)):
        fine.replace(**kwargs)


def test_values() -> None:
    rule = Rule("primal", 1, "split", 0.5)
    assert (rule.name, rule.param, rule.needs_proxy) == ("knapsack", 1.0, False)
    assert rule.codes == (rules.KNAPSACK, rules.SPLIT, 0.5, 0.5)
    assert rule.replace(temperature=2.0).codes[2:] == (2.0, 2.0)
    assert Rule("max_q_minus", -0.1).needs_proxy
    assert Rule("argmax", None).param is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.param = 0.5  # type: ignore[misc]


def test_equality() -> None:
    rows = Rule(param=[0.1, 0.2])
    for rule in (Rule(), rows, Rule("argmax", None)):
        for other in (copy.deepcopy(rule), pickle.loads(pickle.dumps(rule)), rule.replace()):
            assert other == rule
            assert hash(other) == hash(rule)
    assert Rule() == Rule("dual", rule_temperature=1.0)
    for other in (Rule(param=0.5), Rule("nudging"), Rule(temperature=2.0), rows, "threshold"):
        assert Rule() != other
    assert rows != Rule(param=[0.1, 0.3])


def test_params_by_row() -> None:
    rule = Rule("threshold", [0.1, 0.5, 0.9])
    assert isinstance(rule.param, Tensor)
    assert rule.param.dtype is torch.float64
    whole = ops.deferral_mask(BASE, rule=rule).mask
    for index in (slice(1, 3), torch.tensor([2, 0]), torch.tensor([True, False, True])):
        assert torch.equal(ops.deferral_mask(BASE[index], rule=rule.select(index)).mask,
                           whole[index])  # fmt: skip
    for row in (0, -1):
        one = ops.deferral_mask(BASE[row][None], rule=rule.select(row)).mask
        assert torch.equal(one[0], whole[row])
    assert Rule().select(0) == Rule()
    with pytest.raises(ValueError, match=r"param has shape \[3\], expected one element or \[2\]"):
        ops.deferral_mask(BASE[:2], rule=rule)


def test_compiled() -> None:
    """A rule as an argument, from outside, and made inside."""
    torch._dynamo.reset()
    outside = Rule("threshold", [0.1, 0.5, 0.9])

    def run(base: Tensor, rule: Rule) -> tuple[Tensor, ...]:
        return (
            *ops.deferral_propose(base, rule=rule, seed=3, position=1),
            *ops.deferral_mask(base, rule=outside),
            *ops.deferral_mask(base, rule=Rule("nudging", 0.3)),
        )

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for rule in (Rule("knapsack", 0.3, "split"), outside):
        _same(compiled(BASE, rule), run(BASE, rule))
