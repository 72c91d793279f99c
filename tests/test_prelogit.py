"""Noise on pre-logits, weights of rollouts, update of the mean: against einsum formulas."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DTYPES, generator
from torch import Tensor

import tta_ext
from tta_ext import ops
from tta_ext.backends import reference
from tta_ext.backends.reference.philox import noise

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


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({4: torch.int32, 2: torch.int16}[x.element_size()])


@pytest.mark.parametrize("d", [1, 6, 130, 4100])
def test_perturbation_adds_the_numbers_of_normal(d: int, isa: str) -> None:
    zero = torch.zeros(1, 3, d)
    name: dict[str, Any] = {"sequence": 2**32 - 1, "iteration": 4095, "rollout": 65535}
    got = ops.prelogit_perturb(torch.zeros(1, d), zero, step=2, row=0, sigma=1.0, seed=-4, **name)
    assert torch.equal(got[0], ops.normal(d, seed=-4, step=2, **name))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_results_round_to_nearest_even(dtype: torch.dtype, isa: str) -> None:
    """u alone, in every exponent and with all kinds of low bits, cast to hidden's dtype."""
    d = 1 << 16
    raw = torch.randint(-(2**31), 2**31, (4, d), generator=generator(8)).to(torch.int32)
    raw[2] &= -0x1000  # ties of float16 and bfloat16, more often than chance would make them
    raw[3] &= -0x8000
    mean = raw.view(torch.float32)[None].contiguous()
    hidden = torch.zeros(4, d, dtype=dtype)
    got = perturb(hidden, mean, torch.arange(4), row=0, sequence=1, rollout=0, sigma=0.0)
    want = (mean[0] + 0.0).to(dtype)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(bits(got)[~got.isnan()], bits(want)[~want.isnan()])


@pytest.mark.parametrize("d", [5, 128, 4096, 9001])
def test_dot_is_accurate_and_accumulates(d: int, isa: str) -> None:
    mean = torch.randn(1, 1, d, generator=generator(d))
    rollout = torch.arange(3)
    arguments: dict[str, Any] = {"row": 0, "sequence": 4, "rollout": rollout}
    first = torch.zeros(3)
    perturb(torch.zeros(3, d), mean, 0, dot=first, **arguments)
    for i in range(3):
        eps = reference.normal(
            d, torch.tensor(SEED), 0, 4, ITERATION, i, compute_dtype=torch.float64
        )
        terms = mean[0, 0].double() * eps
        # 32 additions a lane and the fold, and the ulps of eps.
        assert abs(first[i] - terms.sum()) <= 2.0**-20 * terms.abs().sum()
    dot = torch.tensor([1.5, -2.0, 1e6])
    want = dot + first
    perturb(torch.zeros(3, d), mean, 0, dot=dot, **arguments)
    assert torch.equal(dot, want)


@pytest.mark.parametrize(("n", "d", "tau"), [(37, 70, 3), (1024, 9, 2), (40000, 4, 1)])
def test_many_rollouts(n: int, d: int, tau: int, native: None) -> None:
    """Against float64: not a power of two, a full tree, nearly as many as there can be."""
    mean = torch.randn(1, tau, d, generator=generator(n))
    weights = torch.softmax(torch.randn(1, n, generator=generator(n + 1)), -1)
    weights[:, 5::3] = 0.0
    length = torch.arange(n).reshape(1, n) % (tau + 1)
    common: dict[str, Any] = {"sigma": SIGMA, "iteration": ITERATION, "length": length}
    got = ops.control_update(mean, weights, seed=SEED, sequence=3, **common)
    shape = (n, tau)
    eps = noise(
        d,
        torch.tensor(SEED),
        torch.arange(tau).expand(shape),
        torch.full(shape, 3),
        ITERATION,
        torch.arange(n)[:, None].expand(shape),
        torch.float64,
    )
    eps = eps * (torch.arange(tau) < length[0, :, None])[..., None]
    want = mean[0].double() + SIGMA * torch.einsum("n,ntd->td", weights[0].double(), eps)
    torch.testing.assert_close(got[0].double(), want, rtol=1e-6, atol=1e-6)


def sparse_case(n: int = 37, d: int = 301) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Zero, tiny and subnormal weights, rollouts of all lengths, a step that none reaches."""
    mean = torch.randn(P, TAU, d, generator=generator(1))
    mean[:, -1] = -0.0
    weights = torch.rand(P, n, generator=generator(2))
    weights[torch.rand(P, n, generator=generator(3)) < 0.5] = 0.0
    weights[0, 7:9], weights[1, 4] = 1e-42, 1e-30
    length = torch.randint(0, TAU, (P, n), generator=generator(4))
    return mean, weights, {"length": length}


def test_update_has_one_value(isa: str) -> None:
    """Instruction sets, threads, shards, batches, flush-to-zero: the same bits."""
    mean, weights, lengths = sparse_case()
    want = update(mean, weights, **lengths)
    level = torch.ops.tta_ext.cpu_isa(-1)
    torch.ops.tta_ext.cpu_isa(0)
    scalar = update(mean, weights, **lengths)
    torch.ops.tta_ext.cpu_isa(level)
    assert torch.equal(bits(scalar), bits(want))
    torch.set_num_threads(2)
    assert torch.equal(bits(update(mean, weights, **lengths)), bits(want))
    torch.set_num_threads(1)
    for size in (64, 32, 16, 8, 4, 2, 1):
        parts = [
            update(mean, weights, rollouts=(s, s + size), **lengths) for s in range(0, 64, size)
        ]
        assert torch.equal(bits(ops.control_merge(mean, torch.stack(parts), SIGMA)), bits(want))
    for p in range(P):
        alone = update(
            mean[p : p + 1].contiguous(),
            weights[p : p + 1],
            sequence=int(SEQUENCE[p]),
            length=lengths["length"][p : p + 1],
        )
        assert torch.equal(bits(alone[0]), bits(want[p]))
    if torch.set_flush_denormal(True):
        try:
            flushed = update(mean, weights, **lengths)
        finally:
            torch.set_flush_denormal(False)
        assert torch.equal(bits(flushed), bits(want))


def test_weight_zero_is_no_rollout(backend: str) -> None:
    """Zeros at the end, in between or everywhere change nothing."""
    mean = control()
    weights = torch.zeros(P, 9)
    assert torch.equal(update(mean, weights), mean)
    weights[:, 2] = 0.25
    assert torch.equal(update(mean, weights), update(mean, weights[:, :3].contiguous()))
    ended = torch.full((P, 9), TAU)
    ended[:, 3:] = 0
    dense = torch.where(torch.arange(9) == 2, 0.25, torch.where(torch.arange(9) < 3, 0.0, 0.9))
    assert torch.equal(update(mean, dense.repeat(P, 1), length=ended), update(mean, weights))


def test_weights_have_one_value(isa: str) -> None:
    g = generator(6)
    for n in (1, 3, 16, 33, 1000):
        reward, dot = torch.randn(2, n, generator=g), torch.randn(2, n, generator=g)
        norm2 = torch.rand(2, n, generator=g)
        reward[1, n // 2] = -torch.inf if n > 1 else 0.0
        arguments: dict[str, Any] = {"lam": 0.01, "alpha": 0.7, "sigma": SIGMA}
        got = ops.importance_weights(reward, dot, norm2, **arguments)
        level = torch.ops.tta_ext.cpu_isa(-1)
        torch.ops.tta_ext.cpu_isa(0)
        scalar = ops.importance_weights(reward, dot, norm2, **arguments)
        torch.ops.tta_ext.cpu_isa(level)
        assert torch.equal(bits(got.w), bits(scalar.w))
        assert torch.equal(bits(got.ess), bits(scalar.ess))
        single = ops.importance_weights(reward[1:], dot[1:], norm2[1:], **arguments)
        assert torch.equal(bits(single.w[0]), bits(got.w[1]))
        # Scores in float64, one exp in float32: relative error of ulps, times the exponent's.
        slack = (1 - 0.7) / SIGMA
        score = (reward.double() - reward.double().amax(-1, keepdim=True)) / 0.01
        score = score - slack * dot.double() - slack**2 / 2 * norm2.double()
        score = score - score.amax(-1, keepdim=True)
        want = torch.softmax(score, -1)
        bound = (4 + score.abs()) * 2.0**-24 * want
        bound = torch.where(score < -86, 2e-38, bound)
        assert ((got.w.double() - want).abs() <= bound).all()


def test_lambda_near_zero(backend: str) -> None:
    """However small, lambda divides the weight among equal rewards; only 0 takes the first."""
    reward = torch.tensor([[2.0, 5.0, 5.0, 1.0]])
    zero = torch.zeros(1, 4)
    tiny = ops.importance_weights(reward, zero, zero, lam=1e-30, alpha=1.0, sigma=SIGMA)
    assert tiny.w.tolist() == [[0.0, 0.5, 0.5, 0.0]]
    assert tiny.ess.tolist() == [2.0]


SHARD = """
import sys, torch
from tta_ext import ops
torch.set_num_threads(1)
case = torch.load(sys.argv[1])
rank = int(sys.argv[2])
shards = {
    size: ops.control_update(**case, rollouts=(rank * size, rank * size + size))
    for size in (32, 16) if rank * size < 64
}
torch.save(shards, sys.argv[3])
"""


def test_shards_of_other_processes_merge_to_the_same_bits(native: None, tmp_path: Path) -> None:
    """37 rollouts over 2 and over 4 processes."""
    mean, weights, lengths = sparse_case()
    case = {
        "mean": mean,
        "weights": weights,
        "sigma": SIGMA,
        "seed": SEED,
        "iteration": ITERATION,
        "sequence": SEQUENCE,
        **lengths,
    }
    torch.save(case, tmp_path / "case.pt")
    paths = [tmp_path / f"{rank}.pt" for rank in range(4)]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", SHARD, str(tmp_path / "case.pt"), str(rank), str(path)]
        )
        for rank, path in enumerate(paths)
    ]
    assert [worker.wait() for worker in workers] == [0] * 4
    found = [torch.load(path) for path in paths]
    whole = update(mean, weights, **lengths)
    for size, count in ((32, 2), (16, 4)):
        parts = torch.stack([found[rank][size] for rank in range(count)])
        assert torch.equal(bits(ops.control_merge(mean, parts, SIGMA)), bits(whole))
