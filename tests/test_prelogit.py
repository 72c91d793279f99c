"""Noise on pre-logits: against float64, its exact roundings, in every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DTYPES, generator
from rollouts import (
    ITERATION,
    ROW,
    SEED,
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

from tta_ext import ops
from tta_ext.backends import reference


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
