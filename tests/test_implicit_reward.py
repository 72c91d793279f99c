"""Weighted sums of log-probabilities of several models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import CONTENTS, DTYPES, Case, rows
from oracle import assert_drawn, assert_probabilities, softmax64, uniform
from torch import Tensor

from tta_ext import ops, rng


def models(case: Case, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    base = rows(case, 0)
    stack = [rows(case, 1 + e) for e in range(2 * experts)]
    return base, torch.stack(stack[:experts]), torch.stack(stack[experts:])


def oracle(
    base: Tensor, experts: Tensor, antis: Tensor | None, beta: Tensor, temperature: float
) -> Tensor:
    score = base.double().log_softmax(-1)
    for e in range(len(beta)):
        term = experts[e].double().log_softmax(-1)
        if antis is not None:
            term = term - antis[e].double().log_softmax(-1)
        score = score + beta[e].double() * term
    return softmax64(score, temperature)


def cases() -> Iterator[Case]:
    for i, dtype in enumerate(DTYPES):
        for batch, vocabulary in ((3, 127), (1, 5000), (0, 127), (64, 33)):
            content = CONTENTS[:2][i % 2]
            yield Case(batch, vocabulary, dtype, ("contiguous", "strided")[i % 2], content)


@pytest.mark.parametrize("case", list(cases()), ids=str)
@pytest.mark.parametrize("experts", [1, 3])
def test_law_follows_the_oracle(case: Case, experts: int, backend: str) -> None:
    base, plus, minus = models(case, experts)
    beta = torch.tensor([1.0, -0.5, 0.25])[:experts]
    for antis in (minus, None):
        for temperature in (1.0, 0.7):
            want = oracle(base, plus, antis, beta, temperature)
            got = ops.implicit_reward_probs(base, plus, antis, beta, temperature=temperature)
            # The sum of float32 logits rounds at the size of its largest term.
            top = max(float(t.abs().max()) if t.numel() else 0.0 for t in (base, plus, minus))
            assert_probabilities(got, want, spread=8.0 + top)


def test_sampling_follows_the_law(backend: str) -> None:
    case = Case(64, 127, torch.float32, "contiguous", "model")
    base, plus, minus = models(case, 2)
    beta = torch.tensor([0.8, 0.3])
    law = oracle(base, plus, minus, beta, 0.9)
    for position in range(3):
        tokens = ops.implicit_reward_sample(
            base, plus, minus, beta, temperature=0.9, seed=6, position=position
        )
        for b in range(64):
            assert_drawn(int(tokens[b]), law[b], uniform(6, position, b, rng.BASE))
    best = ops.implicit_reward_sample(base, plus, minus, beta, do_sample=False)
    probs = ops.implicit_reward_probs(base, plus, minus, beta)
    assert torch.equal(probs.gather(1, best[:, None])[:, 0], probs.amax(-1))


def test_special_cases_are_the_models_themselves(backend: str) -> None:
    case = Case(8, 127, torch.float32, "contiguous", "model")
    base, plus, _ = models(case, 1)
    plain = ops.implicit_reward_probs(base, plus, plus.clone(), 1.0)
    assert_probabilities(plain, softmax64(base))
    off = ops.implicit_reward_probs(base, plus, None, 0.0)
    assert_probabilities(off, softmax64(base))
    tuned = ops.implicit_reward_probs(base, plus, base[None], [1.0])
    assert_probabilities(tuned, softmax64(plus[0]), spread=20.0)
    key = {"seed": 5, "position": 1}
    assert torch.equal(
        ops.implicit_reward_sample(base, plus, None, 0.0, **key),
        ops.categorical_sample(base, **key),
    )


def test_impossible_tokens(backend: str) -> None:
    inf = torch.inf
    base = torch.tensor([[0.0, -inf, 0.0, 0.0, 0.0]])
    plus = torch.tensor([[[0.0, 5.0, -inf, -inf, 1.0]]])
    minus = torch.tensor([[[0.0, -inf, -inf, 0.0, 0.0]]])
    got = ops.implicit_reward_probs(base, plus, minus, 1.0)
    # base rules out 1; both agree on 2; the expert alone rules out 3.
    want = torch.tensor([[1.0, 0.0, 1.0, 0.0, float(torch.e)]])
    torch.testing.assert_close(got, want / want.sum())
    flipped = ops.implicit_reward_probs(base, minus, plus, -1.0)
    torch.testing.assert_close(flipped, want / want.sum())
    off = ops.implicit_reward_probs(base, plus, minus, 0.0)
    torch.testing.assert_close(off, softmax64(base).float())
    for experts, antis, beta in ((plus, minus, -1.0), (minus, plus, 1.0)):
        with pytest.raises(ValueError, match="row 0 of the combined scores is undefined"):
            ops.implicit_reward_probs(base, experts, antis, beta)
        bad = ops.implicit_reward_probs(base, experts, antis, beta, check=False)
        assert bad.isnan().all()
        token = ops.implicit_reward_sample(
            base, experts, antis, beta, seed=0, position=0, check=False
        )
        assert token.tolist() == [-1]


@pytest.mark.parametrize("silent", ["expert_logits", "anti_logits"])
def test_a_model_without_a_token_is_refused(silent: str, backend: str) -> None:
    """Though its partner hides it: of a token that both rule out a pair says nothing."""
    inf = torch.inf
    base = torch.zeros(2, 300)
    some = torch.full((2, 2, 300), -inf)
    some[:, 0] = 0.0
    some[0, 1, 299] = 1.0
    none = some.clone()
    none[1, 1] = -inf
    base[1, 299] = -inf
    some[1, 1, 299] = 1.0  # the base rules it out, whatever sign it has
    pair = (none, some) if silent == "expert_logits" else (some, none)
    with pytest.raises(ValueError, match=rf"row 1 of {silent}\[1\] has .*no finite value"):
        ops.implicit_reward_probs(base, *pair, [1.0, 0.5])
    bad = ops.implicit_reward_probs(base, *pair, [1.0, 0.5], check=False)
    assert bad.isnan().all(-1).tolist() == [False, True]
    off = ops.implicit_reward_probs(base, *pair, [1.0, 0.0])  # not read
    torch.testing.assert_close(off, softmax64(base).float())


def test_several_experts_add_up(backend: str) -> None:
    case = Case(4, 127, torch.float32, "contiguous", "model")
    base, plus, minus = models(case, 2)
    both = ops.implicit_reward_probs(base, plus, minus, [0.5, 0.25])
    one = base + 0.5 * (plus[0] - minus[0])
    chained = ops.implicit_reward_probs(one, plus[1:], minus[1:], [0.25])
    torch.testing.assert_close(both, chained, rtol=1e-4, atol=1e-9)
