"""Drawn tokens follow the law they are drawn from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, grid, rows, rule_cases, rule_id
from oracle import assert_drawn, softmax64, uniform
from scipy import stats
from torch import Tensor

from tta_ext import ops, rng

DRAWS = 20000


def chi_square(tokens: Tensor, law: Tensor) -> float:
    """p-value of Pearson's test; tokens of small expectation share a bin."""
    counts = torch.bincount(tokens, minlength=len(law)).double()
    expected = law.double() / law.double().sum() * len(tokens)
    assert (counts[expected == 0] == 0).all(), "an impossible token was drawn"
    rare = expected < 8
    observed = torch.cat((counts[~rare], counts[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    keep = expected > 0
    if int(keep.sum()) < 2:
        return 1.0
    observed, expected = observed[keep], expected[keep]
    return float(stats.chisquare(observed.numpy(), expected.numpy()).pvalue)


def small_models() -> tuple[Tensor, Tensor]:
    base = torch.tensor([[2.0, 1.5, 1.5, 0.0, -1.0, -1.0, -3.0, -torch.inf]])
    proxy = torch.tensor([[-1.0, 2.0, 0.0, -torch.inf, 1.0, 2.5, 0.0, 1.0]])
    return base, proxy


@pytest.mark.parametrize("kwargs", list(rule_cases()), ids=rule_id)
def test_deferral_sample_follows_pi(kwargs: dict[str, Any], backend: str) -> None:
    base, proxy = small_models()
    law = ops.deferral_probs(base, proxy, **kwargs)[0]
    got = ops.deferral_sample(
        base.expand(DRAWS, -1).contiguous(),
        proxy.expand(DRAWS, -1).contiguous(),
        seed=42,
        position=torch.arange(DRAWS),
        sequence=0,
        **kwargs,
    )
    assert chi_square(got.token, law) > 1e-4
    mass = float(ops.deferral_stats(base, proxy, **kwargs).deferred_mass)
    rate = float(got.deferred.double().mean())
    assert abs(rate - mass) <= 4.5 * (mass * (1 - mass) / DRAWS) ** 0.5 + 1e-9


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_categorical_follows_softmax(temperature: float, backend: str) -> None:
    base, _ = small_models()
    tokens = ops.categorical_sample(
        base.expand(DRAWS, -1),
        seed=1,
        position=0,
        sequence=torch.arange(DRAWS),
        temperature=temperature,
    )
    assert chi_square(tokens, softmax64(base, temperature)[0]) > 1e-4


@pytest.mark.parametrize("case", [c for c in grid() if c.batch], ids=str)
def test_categorical_inverts_the_cdf(case: Case, backend: str) -> None:
    logits = rows(case)
    law = softmax64(logits)
    for position in (0, 1):
        tokens = ops.categorical_sample(logits, seed=4, position=position, draw=3)
        for b in range(0, case.batch, 7):
            u = uniform(4, position, b, rng.BASE, draw=3)
            assert_drawn(int(tokens[b]), law[b], u)
    best = ops.categorical_sample(logits, do_sample=False)
    top = (logits == logits.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1)
    assert torch.equal(best, top)


def test_names_of_the_draws(backend: str) -> None:
    """Each index changes the draw, and nothing else does."""
    logits = torch.zeros(1, 1 << 16)

    def token(**kwargs: Any) -> int:
        return int(ops.categorical_sample(logits, **{"seed": 1, "position": 2, **kwargs}))

    plain = token()
    assert plain == token(sequence=0) == token(sequence=torch.tensor([0]))
    assert plain == token(position=torch.tensor(2)) == token(seed=torch.tensor([1]))
    others = [
        token(seed=2),
        token(position=3),
        token(sequence=1),
        token(iteration=1),
        token(rollout=1),
        token(stream=rng.USER),
        token(draw=1),
    ]
    assert plain not in others
    assert len(set(others)) == len(others)


def test_sequence_defaults_to_the_row_number(backend: str) -> None:
    logits = torch.zeros(5, 1 << 12)
    default = ops.categorical_sample(logits, seed=1, position=2)
    explicit = ops.categorical_sample(logits, seed=1, position=2, sequence=torch.arange(5))
    assert torch.equal(default, explicit)
    assert len(set(default.tolist())) > 1


def test_out_is_written(backend: str) -> None:
    base, proxy = small_models()
    token = torch.full((1,), 99)
    same = ops.categorical_sample(base, seed=1, position=2, out=token)
    assert same is token
    assert int(token) == int(ops.categorical_sample(base, seed=1, position=2))
    out = ops.Proposal(torch.full((1,), 99), torch.zeros(1, dtype=torch.bool))
    got = ops.deferral_sample(base, proxy, rule="threshold", param=0.3, seed=1, position=2, out=out)
    assert got.token is out.token
    assert int(out.token) != 99


def test_extreme_uniforms_stay_inside(backend: str) -> None:
    """Leading and trailing impossible tokens are never drawn, in any of many draws."""
    logits = torch.full((4096, 9000), -torch.inf)
    logits[:, 4100:4104] = 0.0
    tokens = ops.categorical_sample(logits[:512], seed=3, position=torch.arange(512))
    assert ((tokens >= 4100) & (tokens < 4104)).all()
