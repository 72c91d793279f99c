"""Weights of rollouts and the update of their mean: against formulas, and one value always."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import generator
from conftest import forks
from rollouts import (
    ITERATION,
    SEED,
    SEQUENCE,
    SIGMA,
    TAU,
    D,
    N,
    P,
    bits,
    control,
    noise64,
    perturb,
)
from torch import Tensor

import tta_ext
from tta_ext import ops
from tta_ext.backends.reference.philox import noise


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


def share(process: int, case: dict[str, Any], folder: Path) -> None:
    """Of 37 rollouts the shares of one of two processes."""
    torch.set_num_threads(1)
    key = {name: case[name] for name in ("sigma", "seed", "iteration")}
    for count in (1, 2, 4):
        size = 64 // count
        for start in range(process * size, 64, 2 * size):
            part = ops.control_update(**case, rollouts=(start, start + size))
            rows = torch.arange(37)[start : start + size]
            dot = torch.zeros(len(rows))
            for step in range(5):
                ops.prelogit_perturb(
                    torch.zeros(len(rows), 301), case["mean"], step=step, row=1, sequence=9,
                    rollout=rows, dot=dot, **key,
                )  # fmt: skip
            torch.save((part, dot), folder / f"{count}-{start // size}.pt")


@forks
def test_processes_share_the_rollouts(native: None, tmp_path: Path) -> None:
    """37 rollouts in 1, 2 and 4 shares, taken by turns: the same u . eps and the same update."""
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
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=share, args=(i, case, tmp_path)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    whole, dots = update(mean, weights, **lengths), []
    for count in (1, 2, 4):
        found = [torch.load(tmp_path / f"{count}-{i}.pt") for i in range(count)]
        merged = ops.control_merge(mean, torch.stack([part for part, _ in found]), SIGMA)
        assert torch.equal(bits(merged), bits(whole))
        dots.append(torch.cat([dot for _, dot in found]))
    assert dots[0].all()
    for dot in dots[1:]:
        assert torch.equal(bits(dot), bits(dots[0]))
