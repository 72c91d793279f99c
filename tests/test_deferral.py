"""Deferral operators against float64 oracles, and the properties that define them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    CRITICALS,
    P_ONLY,
    PARAMS,
    Case,
    full_grid,
    generator,
    grid,
    rows,
    rule_cases,
    rule_id,
)
from oracle import (
    EDGE,
    Screen64,
    assert_drawn,
    assert_probabilities,
    greedy_order,
    mixture64,
    screen64,
    softmax64,
    uniform,
)
from torch import Tensor

import tta_ext
from tta_ext import ops, rng

rules_of_the_grid = list(rule_cases())
every_rule = pytest.mark.parametrize("kwargs", rules_of_the_grid, ids=rule_id)


def two_models(case: Case) -> tuple[Tensor, Tensor]:
    return rows(case, 0), rows(case, 1)


def affordable(case: Case, backend: str) -> bool:
    """The reference bisects over dense tensors: a few large rows of it are enough."""
    return backend != "reference" or case.batch * case.vocabulary <= 3 * 32000


def picked(case: Case, backend: str) -> list[dict[str, Any]]:
    """All rules on small inputs; in turn on large ones and for the slow reference."""
    if backend == "cpu" and case.vocabulary <= 127:
        return rules_of_the_grid
    return in_turn(hash((case.batch, case.vocabulary)))


def in_turn(turn: int) -> list[dict[str, Any]]:
    return rules_of_the_grid[turn % 4 :: 4]


def check_operators(base: Tensor, proxy: Tensor, kwargs: dict[str, Any]) -> None:
    """Masks, and what follows from them, of any number of rows."""
    got, want = ops.deferral_mask(base, proxy, **kwargs), screen64(base, proxy, kwargs)
    check_masks(base, kwargs, got, want)
    if len(base):
        check_laws(base, proxy, kwargs, got, want)


def check_masks(base: Tensor, kwargs: dict[str, Any], got: ops.Mask, want: Screen64) -> None:
    wrong = (got.mask != want.mask) & want.certain
    assert not wrong.any(), f"{int(wrong.sum())} certain tokens decided wrongly"
    if kwargs["rule"] != "knapsack":
        assert (got.critical == -1).all()
        assert (got.fraction == 0).all()
        return
    for b in range(base.shape[0]):
        order = greedy_order(base[b])
        taken = got.mask[b][order]
        count = int(taken.sum())
        # A prefix of the order and nothing else, whatever happens on the edge.
        assert taken[:count].all()
        included = int(kwargs.get("critical") == "include" and got.critical[b] >= 0)
        first_left = order[count - included] if count - included < len(order) else -1
        assert got.critical[b] == first_left


def check_laws(
    base: Tensor, proxy: Tensor, kwargs: dict[str, Any], mask: ops.Mask, want: Screen64
) -> None:
    temperature = kwargs.get("temperature", 1.0)
    same = (mask.mask == want.mask).all(-1) & (mask.critical == want.critical)
    mu = want.mu
    law = mixture64(base, proxy, mu, temperature)
    got = ops.deferral_probs(base, proxy, **kwargs)
    # What is left of a split item is a difference of masses: its error is absolute.
    slack = 1e-7 if kwargs.get("critical") == "split" else 1e-37
    assert_probabilities(got[same], law[same], max(1.0, 1.0 / temperature), slack)
    assert torch.allclose(got.double().sum(-1), torch.ones(len(got)).double(), atol=1e-5)

    stats = ops.deferral_stats(base, proxy, **kwargs)
    p = softmax64(base, temperature)
    torch.testing.assert_close(
        stats.deferred_mass[same], (mu * p).sum(-1)[same], rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(stats.used[same], (mu * want.p).sum(-1)[same], rtol=1e-5, atol=1e-6)
    assert torch.equal(stats.critical, mask.critical)
    if kwargs["rule"] == "knapsack":
        at = base.float().gather(1, mask.critical.clamp(min=0)[:, None])[:, 0]
        cut = torch.where(mask.critical >= 0, at, torch.inf)
    else:
        cut = torch.where(mask.mask, torch.inf, base.float()).amin(-1)
    assert torch.equal(stats.cut_logit, cut)


@pytest.mark.parametrize("case", list(grid()), ids=str)
def test_masks_and_laws_follow_the_oracle(case: Case, backend: str) -> None:
    if not affordable(case, backend):
        pytest.skip("large for the reference")
    base, proxy = two_models(case)
    for kwargs in picked(case, backend):
        check_operators(base, proxy, kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(full_grid()), ids=str)
def test_full_grid(case: Case, native: None) -> None:
    base, proxy = two_models(case)
    with tta_ext.use_backend("cpu"):
        for kwargs in rules_of_the_grid:
            check_operators(base, proxy, kwargs)


def check_tokens(base: Tensor, proxy: Tensor, kwargs: dict[str, Any]) -> None:
    temperature = kwargs.get("temperature", 1.0)
    screen = screen64(base, proxy, kwargs)
    p, q = softmax64(base, temperature), softmax64(proxy, temperature)
    for position in range(3):
        got = ops.deferral_sample(base, proxy, seed=9, position=position, **kwargs)
        for b in range(base.shape[0]):
            token = int(got.token[b])
            stream = rng.PROXY if got.deferred[b] else rng.BASE
            law = q[b] if got.deferred[b] else p[b]
            assert_drawn(token, law, uniform(9, position, b, stream))
            mu = float(screen.mu[b, token])
            if not got.deferred[b] and bool(screen.certain[b, token]):
                split = uniform(9, position, b, rng.SPLIT)
                assert mu < 1.0 and (mu == 0 or split >= mu - 1e-4)


few_rows = [case for case in grid() if case.batch in (1, 3)]


@pytest.mark.parametrize(("turn", "case"), list(enumerate(few_rows[::3])), ids=str)
def test_tokens_follow_the_oracle(turn: int, case: Case, backend: str) -> None:
    if not affordable(case, backend):
        pytest.skip("large for the reference")
    base, proxy = two_models(case)
    for kwargs in in_turn(turn + turn // 4):
        check_tokens(base, proxy, kwargs)


@every_rule
def test_native_and_reference_agree(kwargs: dict[str, Any], native: None) -> None:
    """Same tokens and masks, apart from edges; on these fixed inputs there are none."""
    for content in ("model", "ties", "impossible", "peaked"):
        base, proxy = two_models(Case(16, 500, torch.float32, "contiguous", content))
        key = {"seed": 3, "position": torch.arange(16)}
        results = []
        for name in ("reference", "cpu"):
            with tta_ext.use_backend(name):
                results.append(
                    (
                        *ops.deferral_sample(base, proxy, **kwargs, **key),
                        *ops.deferral_sample(base, proxy, **kwargs, do_sample=False),
                        *ops.deferral_mask(base, proxy, **kwargs)[:2],
                    )
                )
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("rule", P_ONLY)
@pytest.mark.parametrize("critical", CRITICALS)
def test_propose_then_proxy_equals_sample(rule: str, critical: str, backend: str) -> None:
    base, proxy = two_models(Case(64, 127, torch.float32, "contiguous", "ties"))
    param = PARAMS[rule][-1] if rule != "knapsack" else 0.3
    key: dict[str, Any] = {"seed": -5, "position": torch.arange(64) + 7, "sequence": 3}
    kwargs: dict[str, Any] = {"rule": rule, "param": param, "critical": critical}
    for temperature in (1.0, 0.6):
        kwargs["temperature"] = temperature
        proposal = ops.deferral_propose(base, **kwargs, **key)
        replacement = ops.categorical_sample(
            proxy, stream=rng.PROXY, temperature=temperature, **key
        )
        whole = ops.deferral_sample(base, proxy, **kwargs, **key)
        assert torch.equal(proposal.deferred, whole.deferred)
        assert torch.equal(torch.where(proposal.deferred, replacement, proposal.token), whole.token)

        greedy = ops.deferral_propose(base, **kwargs, do_sample=False)
        best = ops.deferral_sample(base, proxy, **kwargs, do_sample=False)
        assert torch.equal(greedy.token[~greedy.deferred], best.token[~greedy.deferred])
        assert not best.deferred[~greedy.deferred].any()


@every_rule
def test_greedy_choice_is_argmax_of_the_law(kwargs: dict[str, Any], backend: str) -> None:
    for content in ("model", "ties", "impossible"):
        base, proxy = two_models(Case(64, 127, torch.float32, "contiguous", content))
        law = ops.deferral_probs(base, proxy, **kwargs)
        best = ops.deferral_sample(base, proxy, do_sample=False, **kwargs)
        top = (law == law.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1)
        assert torch.equal(best.token, top)
        mask = ops.deferral_mask(base, proxy, **kwargs)
        full = mask.mask.gather(1, best.token[:, None])[:, 0]
        full |= (mask.critical == best.token) & (mask.fraction == 1)
        assert torch.equal(best.deferred, full)


def test_rule_temperature_reaches_the_rule_alone(backend: str) -> None:
    base, proxy = two_models(Case(8, 127, torch.float32, "contiguous", "model"))
    for rule, param in (("knapsack", 0.3), ("threshold", 0.2), ("confidence_bet", 0.1)):
        hot = ops.deferral_mask(base, proxy, rule=rule, param=param, temperature=1.7)
        mixed = ops.deferral_mask(
            base, proxy, rule=rule, param=param, temperature=0.4, rule_temperature=1.7
        )
        assert torch.equal(hot.mask, mixed.mask)
        want = mixture64(base, proxy, hot.mask.double(), 0.4)
        got = ops.deferral_probs(
            base, proxy, rule=rule, param=param, temperature=0.4, rule_temperature=1.7
        )
        assert_probabilities(got, want, spread=2.5)


def test_param_per_row(backend: str) -> None:
    base, proxy = two_models(Case(16, 127, torch.float32, "contiguous", "model"))
    for rule in ("knapsack", "threshold", "confidence_bet"):
        params = torch.linspace(0.0, 1.0, 16, dtype=torch.float64)
        whole = ops.deferral_mask(base, proxy, rule=rule, param=params)
        for b in range(16):
            one = ops.deferral_mask(
                base[b : b + 1], proxy[b : b + 1], rule=rule, param=float(params[b])
            )
            assert torch.equal(whole.mask[b : b + 1], one.mask)


# Properties of the knapsack, on random rows.


def random_rows(seed: int, batch: int = 24, vocabulary: int = 301) -> Tensor:
    g = generator(seed)
    base = torch.randn(batch, vocabulary, generator=g)
    base *= torch.rand(batch, 1, generator=g) * 8
    base[::3] = base[::3].bfloat16().float()
    base[1::4, :50] = -torch.inf
    return base


@pytest.mark.parametrize("seed", range(4))
def test_mass_stays_within_the_budget_and_is_maximal(seed: int, backend: str) -> None:
    base = random_rows(seed)
    p = softmax64(base)
    budgets = torch.rand(len(base), dtype=torch.float64, generator=generator(seed + 50))
    got = ops.deferral_mask(base, rule="knapsack", param=budgets)
    mass = (p * got.mask).sum(-1)
    assert (mass <= budgets * (1 + 1e-6) + 1e-9).all()
    stats = ops.deferral_stats(base, rule="knapsack", param=budgets)
    assert (stats.used <= budgets * (1 + 2.0**-50)).all()
    with_critical = mass + p.gather(1, got.critical.clamp(min=0)[:, None])[:, 0]
    assert (with_critical[got.critical >= 0] > (budgets * (1 - 1e-6))[got.critical >= 0]).all()
    assert got.mask[got.critical < 0].all()


@pytest.mark.parametrize("seed", range(4))
def test_masks_grow_with_the_budget(seed: int, backend: str) -> None:
    base = random_rows(seed, batch=4)
    before = torch.zeros_like(base, dtype=torch.bool)
    for budget in torch.linspace(0, 1.2, 25).tolist():
        mask = ops.deferral_mask(base, rule="knapsack", param=budget).mask
        assert (mask | ~before).all()
        before = mask
    assert before.all()


def test_ends_of_the_budget(backend: str) -> None:
    base = random_rows(3)
    everything = ops.deferral_mask(base, rule="knapsack", param=1.0)
    assert everything.mask.all()
    assert (everything.critical == -1).all()
    nothing = ops.deferral_mask(base, rule="knapsack", param=0.0)
    assert torch.equal(nothing.mask, nothing.mask & (softmax64(base) < 1e-30))
    assert nothing.mask[base == -torch.inf].all()
    huge = ops.deferral_mask(base, rule="knapsack", param=float("inf"))
    assert huge.mask.all()


@pytest.mark.parametrize("critical", CRITICALS)
def test_policies_for_the_critical_item(critical: str, backend: str) -> None:
    base = random_rows(5)
    proxy = random_rows(6)
    plain = ops.deferral_mask(base, rule="knapsack", param=0.4)
    got = ops.deferral_mask(base, rule="knapsack", param=0.4, critical=critical)
    stats = ops.deferral_stats(base, rule="knapsack", param=0.4, critical=critical)
    assert torch.equal(got.critical, plain.critical)
    exists = got.critical >= 0
    difference = got.mask ^ plain.mask
    if critical == "include":
        assert torch.equal(difference.sum(-1), exists.long())
        assert difference.gather(1, got.critical.clamp(min=0)[:, None])[exists].all()
        assert torch.equal(got.fraction, exists.float())
    else:
        assert not difference.any()
    if critical == "exclude":
        assert (got.fraction == 0).all()
    if critical == "split":
        assert ((got.fraction >= 0) & (got.fraction <= 1)).all()
        expected = torch.full_like(stats.deferred_mass, 0.4)
        torch.testing.assert_close(stats.deferred_mass, expected, rtol=1e-6, atol=0)
        law = ops.deferral_probs(base, proxy, rule="knapsack", param=0.4, critical="split")
        torch.testing.assert_close(
            law.double().sum(-1), torch.ones(len(law)).double(), rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("rule", sorted(PARAMS))
def test_permuted_vocabulary(rule: str, backend: str) -> None:
    """Without ties, the ids mean nothing."""
    g = generator(8)
    base, proxy = torch.randn(6, 200, generator=g), torch.randn(6, 200, generator=g)
    order = torch.randperm(200, generator=g)
    kwargs: dict[str, Any] = {"rule": rule, "param": PARAMS[rule][-1]}
    if rule == "knapsack":
        kwargs["param"] = 0.37
    mask = ops.deferral_mask(base, proxy, **kwargs).mask
    shuffled = ops.deferral_mask(
        base[:, order].contiguous(), proxy[:, order].contiguous(), **kwargs
    ).mask
    assert torch.equal(mask[:, order], shuffled)


def test_ties_go_to_the_lowest_id(backend: str) -> None:
    base = torch.zeros(1, 10)
    got = ops.deferral_mask(base, rule="knapsack", param=0.45)
    assert got.mask[0].tolist() == [True] * 4 + [False] * 6
    assert int(got.critical) == 4
    base[0, 7] = -0.0
    assert torch.equal(ops.deferral_mask(base, rule="knapsack", param=0.45).mask, got.mask)
    best = ops.deferral_sample(base, base.clone(), rule="threshold", param=0.0, do_sample=False)
    assert int(best.token) == 0


@pytest.mark.parametrize("rule", ["knapsack", "threshold"])
def test_greedy_ties_are_those_of_probabilities(rule: str, backend: str) -> None:
    """The lowest id wins where logits differ but their float32 probabilities do not, D = 0 too."""
    base = torch.tensor([[-3.0, 0.0, 1e-9, -1.0], [1e-9, 0.0, -1.0, 2e-9], [0.0, 1.0, 2.0, -1.0]])
    kwargs: dict[str, Any] = {"rule": rule, "param": 0.0, "do_sample": False}
    law = ops.deferral_probs(base, base, rule=rule, param=0.0)
    assert (law == law.amax(-1, keepdim=True)).sum(-1).tolist() == [2, 3, 1]
    best = ops.deferral_sample(base, base, **kwargs)
    assert best.token.tolist() == [1, 0, 2]
    proposal = ops.deferral_propose(base, **kwargs)
    assert proposal.deferred.tolist() == [True, True, False]  # no lead without asking q
    assert int(proposal.token[2]) == 2


def test_unread_proxy_rows_may_hold_anything(backend: str) -> None:
    """A proxy row is looked at only where the base model's token was rejected."""
    base, proxy = two_models(Case(64, 127, torch.float32, "contiguous", "model"))
    kwargs: dict[str, Any] = {
        "rule": "knapsack",
        "param": 0.3,
        "seed": 1,
        "position": torch.arange(64),
    }
    clean = ops.deferral_sample(base, proxy, **kwargs)
    assert clean.deferred.any()
    assert not clean.deferred.all()
    proxy[~clean.deferred] = torch.nan
    again = ops.deferral_sample(base, proxy, **kwargs)
    assert torch.equal(again.token, clean.token)
    proxy[int(clean.deferred.nonzero()[0])] = torch.nan
    with pytest.raises(ValueError, match="of proxy_logits has NaN"):
        ops.deferral_sample(base, proxy, **kwargs)


def test_mixed_dtypes_are_widened(backend: str) -> None:
    base, proxy = two_models(Case(3, 127, torch.bfloat16, "contiguous", "model"))
    kwargs: dict[str, Any] = {"rule": "confidence_bet", "param": 0.1}
    got = ops.deferral_probs(base, proxy.float(), **kwargs)
    assert torch.equal(got, ops.deferral_probs(base.float(), proxy.float(), **kwargs))


def test_float64_reference_is_the_oracle() -> None:
    from tta_ext.backends import reference

    base, proxy = two_models(Case(16, 127, torch.float32, "contiguous", "model"))
    code = (torch.tensor([0.3], dtype=torch.float64), 0, 2, 0.8, 1.2)
    got = reference.deferral_probs(base, proxy, *code, True, compute_dtype=torch.float64)
    kwargs = {"rule": "knapsack", "param": 0.3, "critical": "split", "rule_temperature": 1.2}
    want = mixture64(base, proxy, screen64(base, proxy, kwargs).mu, 0.8)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-300)


def test_edge_is_narrow() -> None:
    """The oracles exempt few tokens, so the tests above mean something."""
    base, proxy = two_models(Case(3, 32000, torch.float32, "contiguous", "model"))
    for kwargs in rules_of_the_grid:
        if kwargs["rule"] == "knapsack" and 0 < kwargs["param"] < 1:
            assert screen64(base, proxy, kwargs).certain.double().mean() > 0.99
    assert EDGE < 1e-6
