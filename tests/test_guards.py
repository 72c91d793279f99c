"""AISP's Fisher guard and the second-order divergence meter, against dense matrices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import VOCABULARY, base_model, ragged_prompts
from searches import PROMPTS, make_aisp, tokens_of
from torch import Tensor

from tta_ext.decoding.runtime.fit import fit_model
from tta_ext.decoding.runtime.vocabulary import Vocabulary
from tta_ext.decoding.search.guards import pull_back
from tta_ext.decoding.search.rollouts import PromptCache, Rollouts
from tta_ext.decoding.search.sampling import Noise, Sampling

TEMPERATURE = 0.8


def rolled(u: Tensor, sigma: float, common: float, new: int) -> Rollouts:
    model = base_model()
    prompt = ragged_prompts()[0]
    cache = PromptCache(model, [prompt], [9], Vocabulary(VOCABULARY), fit_model(model, "model"), 16)
    rollouts = Rollouts(
        cache,
        [(0, 0)],
        sampling=Sampling(temperature=TEMPERATURE, max_new_tokens=new),
        seed=torch.tensor([5]),
        noise=Noise(u, sigma, common),
        metered=1,
        fisher=True,
    )
    while not rollouts.done:
        rollouts.step()
    return rollouts


def step_matrices(rollouts: Rollouts, common: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """F and u of each step at which u does something, float64."""
    noise = rollouts.noise
    assert noise is not None
    weight = rollouts.prompts.model.get_output_embeddings().weight.double()
    u = noise.mean[0].double()
    for step, logits in enumerate(base_logits(rollouts)):
        row = step + common
        if row < u.shape[0]:
            p = (logits / TEMPERATURE).softmax(-1)
            matrix = weight.T @ (p.diag() - p.outer(p)) @ weight / TEMPERATURE**2
            yield matrix, u[row] + u[0] if common else u[row]


def base_logits(rollouts: Rollouts) -> Iterator[Tensor]:
    ids = list(rollouts.prompts.prompts[0])
    for token in rollouts.rows.tokens[0]:
        yield rollouts.prompts.model(input_ids=torch.tensor([ids])).logits[0, -1].double()
        ids.append(token)


def dense(rollouts: Rollouts, common: bool) -> tuple[Tensor, float, float]:
    """F u, u . F u / 2 and the exact divergence of the laws that u moves, all in float64."""
    assert rollouts.noise is not None
    weight = rollouts.prompts.model.get_output_embeddings().weight.double()
    fisher, half, exact = torch.zeros_like(rollouts.noise.mean[0]).double(), 0.0, 0.0
    laws = zip(step_matrices(rollouts, common), base_logits(rollouts), strict=False)
    for row, ((matrix, here), logits) in enumerate(laws, start=int(common)):
        p = (logits / TEMPERATURE).softmax(-1)
        moved = ((logits + weight @ here) / TEMPERATURE).log_softmax(-1)
        for part in {row, 0} if common else {row}:
            fisher[part] += matrix @ here
        half += float(here @ matrix @ here) / 2
        exact += float((moved.exp() * (moved - p.log())).sum())
    return fisher, half, exact


@pytest.mark.parametrize("common", [False, True])
@torch.inference_mode()
def test_fisher_is_the_dense_matrix(common: bool) -> None:
    d = base_model().get_output_embeddings().weight.shape[1]
    u = torch.randn(1, 4 + common, d, generator=torch.Generator().manual_seed(0)) * 0.3
    rollouts = rolled(u, 0.2, 0.1 if common else 0.0, 6)
    fisher, half, _ = dense(rollouts, common)
    torch.testing.assert_close(rollouts.fisher[0].double(), fisher, rtol=1e-4, atol=1e-6)
    assert rollouts.kl_fisher[0] == pytest.approx(half, rel=1e-4)
    assert half > 0.0


@torch.inference_mode()
def test_meter_is_the_divergence_where_u_is_small() -> None:
    d = base_model().get_output_embeddings().weight.shape[1]
    direction = torch.randn(1, 5, d, generator=torch.Generator().manual_seed(1))
    errors = []
    for size in (0.02, 0.01):
        rollouts = rolled(direction * size, 1e-6, 0.0, 5)
        _, _, exact = dense(rollouts, False)
        errors.append(abs(rollouts.kl_fisher[0] / exact - 1.0))
    assert errors[1] < 0.02
    assert errors[1] < errors[0]  # what is left is of higher order in u


@pytest.mark.parametrize("options", [{}, {"coherence": 1.0, "step_size": 0.5}, {"batch_size": 3}])
def test_a_guard_of_no_weight_is_none(options: dict[str, Any]) -> None:
    plain = make_aisp(**options).generate(PROMPTS, seed=3)
    guarded = make_aisp(guard="fisher", guard_lam=0.0, **options).generate(PROMPTS, seed=3)
    assert tokens_of(plain) == tokens_of(guarded)
    assert [[r.kl_fisher for r in c] for c in plain.curves] == [
        [r.kl_fisher for r in c] for c in guarded.curves
    ]
    if plain.mean is not None and guarded.mean is not None:
        assert torch.equal(plain.mean, guarded.mean)


@pytest.mark.parametrize("coherence", [0.0, 1.0])
def test_the_guard_lowers_the_divergence(coherence: float) -> None:
    """After one update from the same rollouts: u is the unguarded one less the pull."""
    last = {}
    for lam in (0.0, 1.0, 1e6):
        aisp = make_aisp(guard="fisher", guard_lam=lam, coherence=coherence, iterations=6, sigma=1)
        curves = aisp.generate(PROMPTS, seed=3).curves
        assert all(curve[0].kl_fisher == 0.0 for curve in curves)  # u was 0
        last[lam] = sum(record.kl_fisher or 0.0 for curve in curves for record in curve[2:])
    assert last[1e6] < last[1.0] < last[0.0]


@pytest.mark.parametrize("common", [False, True])
@torch.inference_mode()
def test_bend_is_that_of_the_dense_matrices(common: bool) -> None:
    d = base_model().get_output_embeddings().weight.shape[1]
    u = torch.randn(1, 4 + common, d, generator=torch.Generator().manual_seed(3)) * 0.3
    rollouts = rolled(u, 0.2, 0.1 if common else 0.0, 6)
    expected = torch.zeros(3, dtype=torch.float64)
    for matrix, here in step_matrices(rollouts, common):
        f = matrix @ here
        expected += torch.stack([f @ f, f @ matrix @ f, torch.ones((), dtype=torch.float64)])
    assert expected[2] == 4
    torch.testing.assert_close(rollouts.bend[0], expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("coherence", [0.0, 1.0])
def test_pull_ends_at_the_lowest_divergence(coherence: float) -> None:
    """Of an uneven F, the same at three steps, along F u; a small pull is the whole step."""
    sigma, count = 0.5, 3
    matrix = torch.diag(torch.tensor([1.0, 0.02, 0.001], dtype=torch.float64))
    u = torch.tensor([1.0, -5.0, 40.0], dtype=torch.float64)
    f = matrix @ u
    bend = torch.stack([f @ f, f @ matrix @ f, torch.ones((), dtype=torch.float64)]) * count
    whole = sigma**2 * f * (count if coherence else 1)
    small = pull_back(whole.float()[None, None], bend[None], sigma, coherence, 1e-3)
    torch.testing.assert_close(small, 1e-3 * whole.float()[None, None])
    far = pull_back(whole.float()[None, None], bend[None], sigma, coherence, 1e9)[0, 0].double()
    assert abs(float((u - far) @ matrix @ f)) < 1e-6 * float(f @ f)
    assert (u - far) @ matrix @ (u - far) < 0.7 * (u @ f)
    nothing = torch.zeros(1, 1, 3), torch.zeros(1, 3)
    assert not pull_back(*nothing, sigma, coherence, 1.0).any()


def test_what_a_guard_needs() -> None:
    with pytest.raises(ValueError, match="guard is 'kl', expected one of fisher"):
        make_aisp(guard="kl")
    with pytest.raises(ValueError, match=r"guard_lam is 0\.5 without a guard"):
        make_aisp(guard_lam=0.5)
    with pytest.raises(ValueError, match="guard needs a measured divergence"):
        make_aisp(guard="fisher", kl_rollouts=0)
