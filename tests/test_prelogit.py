"""Noise on pre-logits, weights of rollouts, update of the mean: against einsum formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DTYPES, generator
from torch import Tensor

import tta_ext
from tta_ext import ops
from tta_ext.backends import reference

P, N, TAU, D = 2, 6, 5, 23
SEED, SIGMA, ITERATION = 12, 0.37, 3
SEQUENCE = torch.tensor([11, 2**32 - 1])


def noise64() -> Tensor:
    """eps[P, N, TAU, D] in float64."""
    eps = torch.zeros(P, N, TAU, D, dtype=torch.float64)
    for p in range(P):
        for i in range(N):
            for t in range(TAU):
                eps[p, i, t] = reference.normal(
                    D,
                    torch.tensor(SEED),
                    t,
                    int(SEQUENCE[p]),
                    ITERATION,
                    i,
                    compute_dtype=torch.float64,
                )
    return eps


def control(seed: int = 0) -> Tensor:
    return torch.randn(P, TAU, D, generator=generator(seed)) * 0.5


ROW = torch.arange(P * N) // N
ROLLOUT = torch.arange(P * N) % N


def perturb(hidden: Tensor, mean: Tensor, step: int | Tensor, **kwargs: Any) -> Tensor:
    arguments: dict[str, Any] = {
        "row": ROW,
        "sequence": SEQUENCE[ROW],
        "rollout": ROLLOUT,
        "iteration": ITERATION,
        "sigma": SIGMA,
        "seed": SEED,
        **kwargs,
    }
    return ops.prelogit_perturb(hidden, mean, step=step, **arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_perturbation_and_dot(dtype: torch.dtype, backend: str) -> None:
    mean, eps = control(), noise64()
    dot = torch.zeros(P * N)
    for t in range(TAU):
        hidden = torch.randn(P * N, D, generator=generator(t)).to(dtype)
        got = perturb(hidden, mean, t, dot=dot)
        v = mean[:, None, t].double() + SIGMA * eps[:, :, t]
        want = hidden.double() + v.reshape(P * N, D)
        assert got.dtype == dtype
        tolerance = {torch.float32: 3e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=2e-6)
    want = torch.einsum("ptd,pntd->pn", mean.double(), eps).reshape(-1)
    torch.testing.assert_close(dot.double(), want, rtol=1e-5, atol=1e-5)


def test_steps_beyond_the_horizon_pass_unchanged(backend: str) -> None:
    hidden = torch.randn(P * N, D, generator=generator(3))
    hidden[0, 0] = -0.0
    step = torch.arange(P * N) + TAU - 3
    dot = torch.full((P * N,), 7.0)
    got = perturb(hidden, control(), step, dot=dot)
    passed = step >= TAU
    assert torch.equal(got[passed].view(torch.int32), hidden[passed].view(torch.int32))
    assert (dot[passed] == 7.0).all()
    assert (got[~passed] != hidden[~passed]).any(-1).all()
    assert (dot[~passed] != 7.0).all()


def test_no_noise_is_no_change(backend: str) -> None:
    hidden = torch.randn(P * N, D, generator=generator(3))
    zero = torch.zeros(P, TAU, D)
    assert torch.equal(perturb(hidden, zero, 1, sigma=0.0), hidden)
    mean = control()
    assert torch.equal(perturb(hidden, mean, 1, sigma=0.0), hidden + mean[ROW, 1])


def test_scalars_broadcast_and_out_may_be_hidden(backend: str) -> None:
    hidden = torch.randn(4, D, generator=generator(5))
    mean = control()
    wide = perturb(
        hidden,
        mean,
        torch.full((4,), 2),
        row=torch.ones(4, dtype=torch.int64),
        sequence=torch.full((4,), 9),
        rollout=torch.arange(4),
    )
    narrow = perturb(hidden, mean, 2, row=1, sequence=9, rollout=torch.arange(4))
    assert torch.equal(wide, narrow)
    same = perturb(hidden, mean, 2, row=1, sequence=9, rollout=torch.arange(4), out=hidden)
    assert same is hidden
    assert torch.equal(hidden, wide)


def test_strided_hidden(backend: str) -> None:
    wide = torch.randn(P * N, D + 9, generator=generator(5))
    inner = wide[:, 3 : 3 + D]
    assert torch.equal(perturb(inner, control(), 1), perturb(inner.contiguous(), control(), 1))


@pytest.mark.parametrize("lam", [0.05, 0.7])
@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
def test_weights(lam: float, alpha: float, backend: str) -> None:
    g = generator(1)
    for n in (1, 5, 32, 1000):
        reward, dot = torch.randn(3, n, generator=g), torch.randn(3, n, generator=g)
        norm2 = torch.rand(3, n, generator=g) * 4
        got = ops.importance_weights(reward, dot, norm2, lam=lam, alpha=alpha, sigma=SIGMA)
        slack = (1 - alpha) / SIGMA
        score = (reward.double() - reward.double().amax(-1, keepdim=True)) / lam
        score = score - slack * dot.double() - slack**2 / 2 * norm2.double()
        want = torch.softmax(score, -1)
        torch.testing.assert_close(got.w.double(), want, rtol=1e-4, atol=1e-30)
        torch.testing.assert_close(got.ess.double(), 1 / want.square().sum(-1), rtol=1e-4, atol=0)
        assert (got.ess >= 1 - 1e-5).all()
        assert (got.ess <= n * (1 + 1e-5)).all()


def test_paper_form_for_equal_lengths(backend: str) -> None:
    """softmax(r / lambda - (1 - alpha) / sigma^2 sum u.v), with v = u + sigma eps."""
    g = generator(2)
    reward, dot = torch.randn(2, 8, generator=g), torch.randn(2, 8, generator=g)
    norm2 = torch.full((2, 8), 1.7)
    alpha, lam = 0.8, 0.5
    got = ops.importance_weights(reward, dot, norm2, lam=lam, alpha=alpha, sigma=SIGMA)
    u_v = norm2 + SIGMA * dot
    want = torch.softmax((reward / lam - (1 - alpha) / SIGMA**2 * u_v).double(), -1)
    torch.testing.assert_close(got.w.double(), want, rtol=1e-4, atol=1e-12)


def test_limits_of_the_weights(backend: str) -> None:
    reward = torch.tensor([[1.0, 3.0, 3.0, -torch.inf], [2.0, 0.0, -1.0, 2.0]])
    dot, norm2 = torch.randn(2, 4, generator=generator(1)), torch.rand(2, 4)
    sharp = ops.importance_weights(reward, dot, norm2, lam=0.0, alpha=0.5, sigma=SIGMA)
    assert sharp.w.tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    assert sharp.ess.tolist() == [1, 1]
    soft = ops.importance_weights(reward, dot, norm2, lam=1.0, alpha=0.5, sigma=0.0)
    torch.testing.assert_close(soft.w, torch.softmax(reward, -1))
    assert soft.w[0, 3] == 0


def test_bad_rows_of_the_weights(backend: str) -> None:
    good = torch.zeros(3, 4)
    for name, value, text in (
        ("reward", torch.nan, "row 1 of reward has NaN or"),
        ("reward", torch.inf, "row 1 of reward has NaN or"),
        ("dot", torch.inf, "row 1 of dot has NaN or inf"),
        ("norm2", torch.nan, "row 1 of norm2 has NaN or inf"),
    ):
        tensors = {"reward": good.clone(), "dot": good.clone(), "norm2": good.clone()}
        tensors[name][1, 2] = value
        with pytest.raises(ValueError, match=text):
            ops.importance_weights(**tensors, lam=1.0, alpha=0.5, sigma=1.0)
        got = ops.importance_weights(**tensors, lam=1.0, alpha=0.5, sigma=1.0, check=False)
        assert got.w[1].isnan().all()
        assert got.ess[1].isnan()
        assert torch.equal(got.w[::2], torch.full((2, 4), 0.25))


def update(mean: Tensor, weights: Tensor, **kwargs: Any) -> Tensor:
    arguments = {
        "sigma": SIGMA,
        "seed": SEED,
        "iteration": ITERATION,
        "sequence": SEQUENCE,
        **kwargs,
    }
    return ops.control_update(mean, weights, **arguments)


def test_update(backend: str) -> None:
    mean, eps = control(), noise64()
    weights = torch.softmax(torch.randn(P, N, generator=generator(9)), -1)
    got = update(mean, weights)
    want = mean.double() + SIGMA * torch.einsum("pn,pntd->ptd", weights.double(), eps)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-6)

    length = torch.arange(P * N).reshape(P, N) % (TAU + 2)
    inside = torch.arange(TAU) < length[..., None]
    got = update(mean, weights, length=length)
    want = mean.double() + SIGMA * torch.einsum(
        "pn,pntd->ptd", weights.double(), eps * inside[..., None]
    )
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 13])
def test_shards_merge_to_the_same_bits(n: int, backend: str) -> None:
    mean = control()
    weights = torch.softmax(torch.randn(P, n, generator=generator(n)), -1)
    whole = update(mean, weights)
    padded = 1 << (n - 1).bit_length()
    size = padded
    while size >= 1:
        parts = [update(mean, weights, rollouts=(s, s + size)) for s in range(0, padded, size)]
        merged = ops.control_merge(mean, torch.stack(parts), SIGMA)
        assert torch.equal(merged, whole)
        size //= 2


def test_one_hot_weights_move_the_mean_to_that_rollout(backend: str) -> None:
    """With lambda = 0 the new mean is v of the winner, to the rounding of one addition."""
    mean = control()
    weights = torch.zeros(P, N)
    weights[0, 4] = weights[1, 1] = 1.0
    got = update(mean, weights)
    for p, i in ((0, 4), (1, 1)):
        for t in range(TAU):
            v = ops.prelogit_perturb(
                torch.zeros(1, D),
                mean,
                step=t,
                row=p,
                sequence=int(SEQUENCE[p]),
                rollout=i,
                iteration=ITERATION,
                sigma=SIGMA,
                seed=SEED,
            )
            assert torch.equal(got[p, t], v[0])


def test_sigma_zero_leaves_the_mean(backend: str) -> None:
    mean = control()
    mean[0, 0, 0] = -0.0
    weights = torch.full((P, N), 1.0 / N)
    got = update(mean, weights, sigma=0.0)
    assert torch.equal(got.view(torch.int32), mean.view(torch.int32))


def test_prompts_do_not_depend_on_the_batch(backend: str) -> None:
    mean = control()
    weights = torch.softmax(torch.randn(P, N, generator=generator(4)), -1)
    whole = update(mean, weights)
    for p in range(P):
        alone = update(mean[p : p + 1].contiguous(), weights[p : p + 1], sequence=int(SEQUENCE[p]))
        assert torch.equal(alone[0], whole[p])


def test_native_equals_reference_within_ulps(native: None) -> None:
    results = []
    for name in ("reference", "cpu"):
        with tta_ext.use_backend(name):
            dot = torch.zeros(P * N)
            hidden = perturb(torch.zeros(P * N, D), control(), 2, dot=dot)
            weights = torch.softmax(torch.randn(P, N, generator=generator(4)), -1)
            results.append((hidden, dot, update(control(), weights)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6)
