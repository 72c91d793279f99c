"""AISP's Fisher guard and the second-order divergence meter, against dense matrices."""

from __future__ import annotations

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


def dense(rollouts: Rollouts, common: bool) -> tuple[Tensor, float, float]:
    """F u, u . F u / 2 and the exact divergence of the laws that u moves, all in float64."""
    model, noise = rollouts.prompts.model, rollouts.noise
    assert noise is not None
    weight = model.get_output_embeddings().weight.double()
    u = noise.mean[0].double()
    fisher, half, exact = torch.zeros_like(u), 0.0, 0.0
    ids = list(rollouts.prompts.prompts[0])
    for step, token in enumerate(rollouts.rows.tokens[0]):
        row = step + common
        if row < u.shape[0]:
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
            p = (logits / TEMPERATURE).softmax(-1)
            matrix = weight.T @ (p.diag() - p.outer(p)) @ weight / TEMPERATURE**2
            here = u[row] + u[0] if common else u[row]
            moved = ((logits + weight @ here) / TEMPERATURE).log_softmax(-1)
            for part in {row, 0} if common else {row}:
                fisher[part] += matrix @ here
            half += float(here @ matrix @ here) / 2
            exact += float((moved.exp() * (moved - p.log())).sum())
        ids.append(token)
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


def test_pull_is_cut_at_the_nearest_point() -> None:
    g = torch.Generator().manual_seed(2)
    root = torch.randn(3, 3, generator=g)
    u = torch.randn(2, 1, 3, generator=g)
    fisher, scale = u @ (root @ root.T), torch.tensor([0.5])
    small = pull_back(u, fisher, scale, 1e-3)
    torch.testing.assert_close(small, 0.25e-3 * fisher)
    far = u - pull_back(u, fisher, scale, 1e9)
    torch.testing.assert_close((far * fisher).sum((1, 2)), torch.zeros(2), rtol=0, atol=1e-4)
    assert not pull_back(torch.zeros_like(u), torch.zeros_like(u), scale, 1.0).any()


def test_what_a_guard_needs() -> None:
    with pytest.raises(ValueError, match="guard is 'kl', expected one of fisher"):
        make_aisp(guard="kl")
    with pytest.raises(ValueError, match=r"guard_lam is 0\.5 without a guard"):
        make_aisp(guard_lam=0.5)
    with pytest.raises(ValueError, match="guard needs a measured divergence"):
        make_aisp(guard="fisher", kl_rollouts=0)
