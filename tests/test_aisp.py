"""AISP: its definition step by step, its limits bit for bit, a known optimum, guards."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import VOCABULARY, base_model, make_model, make_tokenizer, ragged_prompts
from searches import PROMPTS, SMALL, make_aisp, tokens_of, vowels
from torch import Tensor

from tta_ext import ops
from tta_ext.decoding import BestOfN
from tta_ext.decoding.runtime.fit import fit_model
from tta_ext.decoding.runtime.vocabulary import Vocabulary
from tta_ext.decoding.search.aisp import AISPSearch
from tta_ext.decoding.search.engine import RolloutJob
from tta_ext.decoding.search.rollouts import PromptCache, Rollouts
from tta_ext.decoding.search.sampling import Noise, Sampling

# ---- the definition --------------------------------------------------------------------------


def by_hand(
    model: Any, prompt: list[int], new: int, u: Tensor, sigma: float, rollout: int
) -> tuple[list[int], float, float]:
    """One greedy rollout without cache or hook: tokens, sum of u . eps, KL to the base."""
    head = model.get_output_embeddings()
    body = model.model if hasattr(model, "model") else model.transformer
    cap = getattr(model.config, "final_logit_softcapping", None)

    def logits(z: Tensor) -> Tensor:
        out = head(z)
        return out if cap is None else cap * torch.tanh(out / cap)

    tokens, dot, kl = [], 0.0, 0.0
    for step in range(new):
        z = body(input_ids=torch.tensor([prompt + tokens]), use_cache=False)[0][:, -1]
        noisy = z
        if step < u.shape[0]:
            eps = ops.normal(
                z.shape[1], seed=5, step=step, sequence=9, iteration=2, rollout=rollout
            )
            noisy = z + (u[step] + sigma * eps)
            dot += float((u[step] * eps).sum())
        log_p, log_q = logits(noisy).log_softmax(-1), logits(z).log_softmax(-1)
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        tokens.append(int(log_p.argmax()))
    return tokens, dot, kl


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
@torch.inference_mode()
def test_rollouts_are_the_definition(kind: str) -> None:
    extra = {"final_logit_softcapping": 3.0} if kind == "gemma2" else {}
    model = make_model(kind, **extra)
    prompt, window, new = ragged_prompts()[0], 4, 7
    dimensions = model.get_output_embeddings().weight.shape[1]
    u = torch.randn(1, window, dimensions, generator=torch.Generator().manual_seed(0)) * 0.3
    cache = PromptCache(model, [prompt], [9], Vocabulary(VOCABULARY), fit_model(model, "model"), 16)
    rollouts = Rollouts(
        cache,
        [(0, i) for i in range(3)],
        sampling=Sampling("greedy", max_new_tokens=new),
        seed=torch.tensor([5]),
        iteration=2,
        noise=Noise(u, 0.5),
        metered=2,
    )
    while not rollouts.done:
        rollouts.step()
    for i in range(3):
        tokens, dot, kl = by_hand(model, prompt, new, u[0], 0.5, i)
        assert rollouts.rows.tokens[i] == tokens
        assert float(rollouts.dot[i]) == pytest.approx(dot, rel=1e-4, abs=1e-4)
        if i < 2:
            assert rollouts.kl[i] == pytest.approx(kl, rel=1e-3, abs=1e-4)
    assert set(rollouts.kl) == {0, 1}
    assert rollouts.rows.finish == ["length"] * 3
    assert len({tuple(tokens) for tokens in rollouts.rows.tokens}) > 1


@pytest.mark.parametrize("coherence", [0.36, 1.0])
@torch.inference_mode()
def test_coherent_noise_is_its_definition(coherence: float) -> None:
    """Each step gets row 0's noise and its own, with variances that add up to sigma's."""
    model, prompt, window = base_model(), ragged_prompts()[0], 4
    own, common = 0.5 * math.sqrt(1 - coherence), 0.5 * math.sqrt(coherence)
    u = torch.randn(1, 1 + window, 32, generator=torch.Generator().manual_seed(0)) * 0.3
    cache = PromptCache(model, [prompt], [9], Vocabulary(VOCABULARY), fit_model(model, "model"), 16)
    rollouts = Rollouts(
        cache,
        [(0, i) for i in range(3)],
        sampling=Sampling("greedy", max_new_tokens=6),
        seed=torch.tensor([5]),
        iteration=2,
        noise=Noise(u, own, common),
    )
    while not rollouts.done:
        rollouts.step()
    for i in range(3):
        eps = torch.stack(
            [
                ops.normal(32, seed=5, step=row, sequence=9, iteration=2, rollout=i)
                for row in range(1 + window)
            ]
        )
        tokens: list[int] = []
        for step in range(6):
            z = model.model(input_ids=torch.tensor([prompt + tokens]), use_cache=False)[0][:, -1]
            if step < window:
                z = z + u[0, 0] + common * eps[0] + u[0, 1 + step] + own * eps[1 + step]
            tokens.append(int(model.lm_head(z).argmax()))
        assert rollouts.rows.tokens[i] == tokens
        dots = (u[0] * eps).sum(-1)
        assert float(rollouts.common_dot[i]) == pytest.approx(float(dots[0]), rel=1e-4, abs=1e-4)
        assert float(rollouts.dot[i]) == pytest.approx(float(dots[1:].sum()), rel=1e-4, abs=1e-4)


def test_the_update_is_the_ops_and_can_be_sharded() -> None:
    search = make_aisp(n=6, lam=0.05).start(PROMPTS, seed=3)
    search.step()
    rewards = torch.tensor([[one.reward for one in row] for row in search.candidates])
    length = torch.tensor([[len(one.tokens) for one in row] for row in search.candidates])
    zero = torch.zeros(3, 6)
    weights = ops.importance_weights(rewards, zero, zero, lam=0.05, alpha=1.0, sigma=0.4)
    u = torch.zeros_like(search.mean)
    shared = {"sigma": 0.4, "seed": 3, "iteration": 0, "length": length}
    assert torch.equal(search.mean, ops.control_update(u, weights.w, **shared))
    for size in (2, 4):
        parts = [
            ops.control_update(u, weights.w, rollouts=(start, start + size), **shared)
            for start in range(0, 8, size)
        ]
        assert torch.equal(search.mean, ops.control_merge(u, torch.stack(parts), 0.4))
    for p, curve in enumerate(search.curves):
        assert curve[0].ess == pytest.approx(float(weights.ess[p]))


def test_the_cost_of_moving_away_uses_each_rollouts_own_steps() -> None:
    """With alpha < 1 the second update must be the paper's formula over min(tau, length) steps."""
    aisp = make_aisp(n=5, lam=0.1, alpha=0.5, window=4, eos_token_id=list(range(40)))
    search = aisp.start(["hello there"], seed=1)
    search.step()
    u = search.mean.clone()
    search.step()
    second = search.candidates[0][5:]
    assert len({len(one.tokens) for one in second}) > 1
    scores, eps = [], []
    for i, one in enumerate(second):
        steps = min(4, len(one.tokens))
        noise = torch.zeros(4, u.shape[2], dtype=torch.float64)
        for t in range(steps):
            noise[t] = ops.normal(u.shape[2], seed=1, step=t, sequence=0, iteration=1, rollout=i)
        dot = float((u[0].double() * noise).sum())
        norm2 = float(u[0, :steps].double().square().sum())
        scores.append(one.reward / 0.1 - 0.5 / 0.4 * dot - 0.25 / (2 * 0.16) * norm2)
        eps.append(noise)
    w = torch.softmax(torch.tensor(scores, dtype=torch.float64), 0)
    want = u[0].double() + 0.4 * sum(a * b for a, b in zip(w, eps, strict=True))
    assert torch.allclose(search.mean[0].double(), want, atol=1e-5)


def test_coherent_update_is_importance_sampling_over_all_parts() -> None:
    """Weights from the likelihood ratio of both parts; each row moves by its own noise."""
    aisp = make_aisp(
        n=5, lam=0.1, alpha=0.5, window=4, coherence=0.36, eos_token_id=list(range(40))
    )
    search = aisp.start(["hello there"], seed=1)
    search.step()
    u = search.mean[0].double()
    search.step()
    second = search.candidates[0][5:]
    assert len({len(one.tokens) for one in second}) > 1
    scale = torch.tensor([0.4 * 0.6] + [0.4 * 0.8] * 4, dtype=torch.float64)
    scores, noise = [], []
    for i, one in enumerate(second):
        rows = 1 + min(4, len(one.tokens))
        eps = torch.zeros(5, u.shape[1], dtype=torch.float64)
        for row in range(rows):
            eps[row] = ops.normal(u.shape[1], seed=1, step=row, iteration=1, rollout=i)
        # (1 - alpha) u . eps / sigma and its square, part by part.
        shift = 0.5 * u[:rows] / scale[:rows, None]
        cost = float((shift * eps[:rows]).sum()) + 0.5 * float(shift.square().sum())
        scores.append(one.reward / 0.1 - cost)
        noise.append(scale[:, None] * eps)
    w = torch.softmax(torch.tensor(scores, dtype=torch.float64), 0)
    want = u + sum(a * b for a, b in zip(w, noise, strict=True))
    assert torch.allclose(search.mean[0].double(), want, atol=1e-5)
    record = search.curves[0][1]
    bound = float((u.square().sum(-1) / (2 * scale.square())).sum())
    assert record.kl_bound == pytest.approx(bound, rel=1e-5)
    assert record.ess == pytest.approx(float(1 / w.square().sum()), rel=1e-4)
    # The result has one u a step: that of the sum of both parts.
    mean = search.result().mean
    assert torch.equal(mean[0], search.mean[0, 1:] + search.mean[0, :1])


# ---- limits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("restriction", [{}, {"top_k": 5}, {"top_p": 0.7, "temperature": 1.4}])
def test_sigma_zero_is_best_of_n(restriction: dict[str, Any]) -> None:
    options = SMALL | {"eos_token_id": [7, 8, 9, 20], "decoding": "sample"} | restriction
    coherence = 0.5 if restriction else 0.0
    aisp = make_aisp(sigma=0.0, coherence=coherence, **options).generate(PROMPTS, seed=11)
    best = BestOfN(base_model(), vowels, make_tokenizer(), n=12, group=4, **options)
    plain = best.generate(PROMPTS, seed=11)
    assert tokens_of(aisp) == tokens_of(plain)
    assert aisp.rewards == plain.rewards
    assert aisp.best == plain.best
    assert [(one.iteration, one.rollout) for one in plain.candidates[0]] == [
        (j // 4, j % 4) for j in range(12)
    ]
    assert aisp.mean is not None
    assert not aisp.mean.any()
    assert all(record.kl == 0.0 for record in aisp.curves[0])


def test_lam_zero_takes_the_winner_of_best_of_n() -> None:
    search = make_aisp(n=8, lam=0.0, iterations=1).start(PROMPTS, seed=4)
    search.step()
    result = search.result()
    for p, row in enumerate(result.rewards):
        # Best-of-n over the same rollouts: the highest reward, the first of equals.
        winner = row.index(max(row))
        assert result.best[p] == result.candidates[p][winner]
        assert result.curves[p][0].ess == 1.0
        eps = torch.stack(
            [ops.normal(32, seed=4, step=t, sequence=p, rollout=winner) for t in range(8)]
        )
        # One-hot weights: u is the noise of the winner.
        assert torch.equal(search.mean[p], 0.4 * eps)
    assert replayed(search) == [one.tokens for one in result.best]
    shared = make_aisp(n=8, lam=0.0, iterations=1, coherence=0.5).start(PROMPTS, seed=4)
    shared.step()
    assert replayed(shared) == [one.tokens for one in shared.result().best]


def replayed(search: AISPSearch) -> list[list[int]]:
    """Each prompt's answer under u alone."""
    cells = [(p, 0) for p in range(len(search.prompts))]
    job = RolloutJob(cells, 0, Noise(search.result().mean, 0.0))
    return search.engine.roll(job, lambda cell, tokens: None).tokens


def test_noise_after_the_end_of_a_rollout_does_not_count() -> None:
    search = make_aisp(n=8, lam=0.0, iterations=1, eos_token_id=list(range(45))).start(
        PROMPTS, seed=4
    )
    search.step()
    ended = 0
    for p, best in enumerate(search.result().best):
        steps = len(best.tokens)
        ended += steps < 8
        assert search.mean[p, :steps].abs().sum(-1).min() > 0
        assert not search.mean[p, steps:].any()
    assert ended


# ---- a known optimum -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_linear_reward_converges_within_the_monte_carlo_error(seed: int) -> None:
    """For r(v) = g . v and alpha = 0 the target is N(sigma^2 g / lam, sigma^2).

    At that mean all weights are equal, so the next iterate is off by the mean of n draws of noise:
    a squared error of sigma^2 / n a dimension.
    """
    n, tau, d, sigma, lam, rounds = 4096, 4, 16, 0.5, 0.7, 6
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(tau, d, generator=generator)
    g *= 1.5 * lam / (sigma * g.norm())
    optimum = sigma**2 * g / lam
    u = torch.zeros(1, tau, d)
    errors = []
    for k in range(rounds):
        v = torch.zeros(n, tau, d)
        dot = torch.zeros(n)
        for t in range(tau):
            v[:, t] = ops.prelogit_perturb(
                torch.zeros(n, d), u, step=t, row=0, sequence=0, rollout=torch.arange(n),
                iteration=k, sigma=sigma, seed=seed, dot=dot,
            )  # fmt: skip
        reward = (v * g).sum((1, 2))[None]
        norm2 = u.square().sum().expand(1, n).contiguous()
        w = ops.importance_weights(reward, dot[None], norm2, lam=lam, alpha=0.0, sigma=sigma)
        u = ops.control_update(u, w.w, sigma=sigma, seed=seed, iteration=k)
        errors.append(float((u[0] - optimum).square().sum()))
    predicted = sigma**2 * tau * d / n
    # The first round starts with an effective sample size of n / exp(1.5^2).
    assert errors[0] < 4 * predicted * math.exp(1.5**2)
    assert float(w.ess) > 0.98 * n
    late = sum(errors[3:]) / len(errors[3:])
    # Three rounds of 64 dimensions: chi-square, standard error 10 %.
    assert 0.6 * predicted < late < 1.5 * predicted


# ---- what it buys, and guards ----------------------------------------------------------------


@pytest.mark.parametrize("coherence", [0.0, 0.5, 1.0])
def test_mean_reward_rises(coherence: float) -> None:
    aisp = make_aisp(n=16, iterations=10, sigma=0.3, lam=0.1, step_size=0.7, coherence=coherence)
    result = aisp.generate([f"prompt {i}" for i in range(8)], seed=0)
    first = sum(curve[0].mean for curve in result.curves) / 8
    last = sum(curve[-1].mean for curve in result.curves) / 8
    assert last > 1.3 * first
    for curve, rewards in zip(result.curves, result.rewards, strict=True):
        assert [c.best for c in curve] == [max(rewards[: 16 * (k + 1)]) for k in range(10)]
        assert [c.samples for c in curve] == [16 * (k + 1) for k in range(10)]
        assert curve[0].norm == 0.0
        if not coherence:
            assert curve[3].kl_bound == pytest.approx(curve[3].norm ** 2 / (2 * 0.09))
        assert curve[0].kl > 0
    timing = result.timing
    assert timing.total > timing.model > 0
    assert timing.other > 0


def test_norm_cap() -> None:
    free = make_aisp().generate(PROMPTS, seed=0)
    capped = make_aisp(norm_cap=1.0).generate(PROMPTS, seed=0)
    assert float(free.mean.norm(dim=(1, 2)).min()) > 1.0
    assert torch.allclose(capped.mean.norm(dim=(1, 2)), torch.ones(3), atol=1e-5)
    assert capped.curves[0][1].norm == pytest.approx(1.0, abs=1e-5)


def test_kl_budget_pulls_u_back() -> None:
    free = make_aisp(iterations=5, sigma=0.8).start(PROMPTS, seed=0)
    bound = make_aisp(iterations=5, sigma=0.8, kl_budget=0.5).start(PROMPTS, seed=0)
    free.step()
    bound.step()
    for p in range(3):
        measured = bound.curves[p][0].kl
        assert measured == free.curves[p][0].kl > 0.5
        want = free.mean[p] * math.sqrt(0.5 / measured)
        assert torch.allclose(bound.mean[p], want, rtol=1e-5)


def test_default_bound_is_nats_a_token() -> None:
    """Two a token of the answers that were measured, of four, as if asked for."""
    default = make_aisp(iterations=5, sigma=3.0).start(PROMPTS, seed=0)
    free = make_aisp(iterations=5, sigma=3.0, kl_budget=math.inf).start(PROMPTS, seed=0)
    default.step()
    free.step()
    over = 0
    for p in range(3):
        tokens = [len(one.tokens) for one in default.candidates[p]]
        assert len(tokens) == default.settings.metered == 4
        measured, budget = free.curves[p][0].kl, 2.0 * sum(tokens) / 4
        over += measured > budget
        want = free.mean[p] * min(1.0, math.sqrt(budget / measured))
        assert torch.allclose(default.mean[p], want, rtol=1e-5)
    assert over
    few = make_aisp(n=2).start(PROMPTS, seed=0)
    few.step()
    assert few.settings.metered == 2
    assert make_aisp(kl_rollouts=0).start(PROMPTS, seed=0).settings.metered == 0


def test_collapse_halves_u() -> None:
    """A tiny sigma makes all answers the same; then u shrinks, otherwise it is left alone."""
    free = make_aisp(iterations=1, sigma=1e-4).start(PROMPTS, seed=0)
    watched = make_aisp(iterations=1, sigma=1e-4, distinct_low=0.5).start(PROMPTS, seed=0)
    lively = make_aisp(iterations=1, sigma=2.0, distinct_low=0.5).start(PROMPTS, seed=0)
    for search in (free, watched, lively):
        search.step()
    assert [curve[0].distinct for curve in watched.curves] == [1, 1, 1]
    assert torch.equal(watched.mean, 0.5 * free.mean)
    assert min(curve[0].distinct for curve in lively.curves) >= 2
    loose = make_aisp(iterations=1, sigma=2.0).start(PROMPTS, seed=0)
    loose.step()
    assert torch.equal(lively.mean, loose.mean)


def test_early_stops() -> None:
    reached = make_aisp(reward_target=0.0).generate(PROMPTS, seed=0)
    assert reached.stopped == ["reward"] * 3
    assert reached.samples == [4] * 3
    single = make_aisp(lam=0.0, ess_low=1.5).generate(PROMPTS, seed=0)
    assert single.stopped == ["ess"] * 3
    equal = make_aisp(reward=lambda p, r: [1.0] * len(r), lam=0.1, ess_high=3.5)
    assert equal.generate("hello", seed=0).stopped == ["ess"]
    late = make_aisp(max_seconds=1e-9).generate(PROMPTS, seed=0)
    assert late.stopped == ["seconds"] * 3
    assert late.samples == [4] * 3
    assert make_aisp().generate("x", seed=0).stopped == ["iterations"]

    def only_first(prompts: list[Any], responses: list[str]) -> list[float]:
        return [float(prompt == PROMPTS[0]) for prompt in prompts]

    mixed = make_aisp(reward=only_first, reward_target=1.0).generate(PROMPTS, seed=0)
    assert mixed.stopped == ["reward", "iterations", "iterations"]
    assert mixed.samples == [4, 12, 12]
    alone = make_aisp(reward=only_first, reward_target=1.0).generate(
        [PROMPTS[1]], seed=0, sequence=[1]
    )
    assert tokens_of(alone)[0] == tokens_of(mixed)[1]


def test_equal_rewards_and_ruled_out_answers_are_harmless() -> None:
    for value in (0.0, -math.inf):
        result = make_aisp(reward=lambda p, r, v=value: [v] * len(r)).generate(PROMPTS, seed=0)
        assert torch.isfinite(result.mean).all()
        assert result.best[0].reward == value
        still = make_aisp(reward=lambda p, r, v=value: [v] * len(r), baseline=True)
        assert float(still.generate(PROMPTS, seed=0).mean.abs().max()) < 1e-6

    def some(prompts: list[Any], responses: list[str]) -> list[float]:
        return [-math.inf if i % 2 else 0.5 for i in range(len(responses))]

    for unit, lam in (("std", 0.3), ("ess", 2.0), ("absolute", 0.1)):
        result = make_aisp(reward=some, lam=lam, lam_unit=unit).generate("x", seed=0)
        assert torch.isfinite(result.mean).all()
