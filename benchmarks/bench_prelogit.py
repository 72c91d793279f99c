"""prelogit_perturb, importance_weights, control_update and control_merge: one iteration of AISP.

Rows are rollouts and columns the dimensions of the hidden state. The eager chain is ``randn``, add
and a matrix-vector product while rollouts run, with the noise kept for an ``einsum`` over them when
the rewards are known; ours makes the noise twice and keeps nothing.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tta_ext import ops
from tta_ext.backends import reference

from . import checks, eager
from .grid import Grid, compiled
from .harness import Case

DIMENSIONS = (576, 4096)
STEPS = 32
SIGMA, LAMBDA, ALPHA, ITERATION = 0.5, 0.3, 0.9, 1
SHARDS = 4
CHECKED_STEPS = 2


@dataclass
class Iteration:
    """Inputs and outputs of one iteration over n rollouts of one prompt."""

    hidden: Tensor
    mean: Tensor
    weights: Tensor
    seed: Tensor
    row: Tensor
    sequence: Tensor
    rollout: Tensor
    steps: list[Tensor]
    dot: Tensor
    out: Tensor
    new_mean: Tensor

    @staticmethod
    def make(rollouts: int, dimensions: int, dtype: torch.dtype, seed: int) -> Iteration:
        g = torch.Generator().manual_seed(seed)
        hidden = torch.randn(rollouts, dimensions, generator=g).to(dtype)
        mean = torch.randn(1, STEPS, dimensions, generator=g) * 0.1
        return Iteration(
            hidden=hidden,
            mean=mean,
            weights=torch.softmax(torch.randn(1, rollouts, generator=g), -1),
            seed=torch.tensor(seed),
            row=torch.tensor(0),
            sequence=torch.tensor(3),
            rollout=torch.arange(rollouts),
            steps=[torch.tensor(step) for step in range(STEPS)],
            dot=torch.zeros(rollouts),
            out=torch.zeros_like(hidden),
            new_mean=torch.zeros_like(mean),
        )

    def perturb(self, step: Tensor) -> Tensor:
        return ops.prelogit_perturb(
            self.hidden,
            self.mean,
            step=step,
            row=self.row,
            sequence=self.sequence,
            rollout=self.rollout,
            iteration=ITERATION,
            sigma=SIGMA,
            seed=self.seed,
            dot=self.dot,
            out=self.out,
        )

    def perturb_all(self) -> Tensor:
        self.dot.zero_()
        for step in self.steps:
            self.perturb(step)
        return self.dot

    def update(self) -> Tensor:
        return ops.control_update(
            self.mean,
            self.weights,
            sigma=SIGMA,
            seed=self.seed,
            iteration=ITERATION,
            sequence=self.sequence,
            out=self.new_mean,
        )

    def by_reference(self, step: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return reference.prelogit_perturb(
            self.hidden, self.mean, step, self.row, self.sequence, self.rollout, ITERATION, SIGMA,
            self.seed, True, compute_dtype=dtype,
        )  # fmt: skip

    def update_by_reference(self, steps: int, dtype: torch.dtype) -> Tensor:
        return reference.control_update(
            self.mean[:, :steps], self.weights, None, self.seed, self.sequence, ITERATION, SIGMA, 0,
            1 << (len(self.rollout) - 1).bit_length(), False, True, compute_dtype=dtype,
        )  # fmt: skip


def cases(grid: Grid) -> Iterator[Case]:
    """Rollouts are the grid's batches; the vocabulary plays no part."""
    for dimensions in DIMENSIONS:
        for rollouts in grid.batches:
            for name in grid.dtypes:
                yield _perturb(grid, getattr(torch, name), rollouts, dimensions)
            yield _update(grid, rollouts, dimensions)
            yield _merge(grid, rollouts, dimensions)
    for rollouts in grid.batches:
        yield _weights(grid, rollouts)


def _perturb(grid: Grid, dtype: torch.dtype, rollouts: int, dimensions: int) -> Case:
    it = Iteration.make(rollouts, dimensions, dtype, grid.seed)
    step, u = it.steps[1], it.mean[0, 1]
    want, want_dot = it.by_reference(step, torch.float64)
    eps = torch.empty(rollouts, dimensions)

    def ours() -> tuple[Tensor, Tensor]:
        it.dot.zero_()
        return it.perturb(step), it.dot

    def check(name: str, got: tuple[Tensor, Tensor]) -> str:
        if name in checks.TIGHT:
            scale = (u.double().square().sum() * dimensions).sqrt()
            wrong = float((got[1].double() - want_dot).abs().max() / scale)
            rounding = 2 * torch.finfo(dtype).eps
            if not torch.allclose(got[0].double(), want.double(), rtol=rounding, atol=1e-5):
                return "hidden differs from float64"
            return "" if wrong < checks.TIGHT_BOUND else f"dot off by {wrong:.1e}"
        noise = (got[0].double() - it.hidden.double() - u.double()) / SIGMA
        off = abs(float(noise.std()) - 1)
        return "" if off < 6 / noise.numel() ** 0.5 + 0.01 else f"noise of variance {off:.2f} off"

    size = it.hidden.element_size()
    return Case(
        "prelogit_perturb",
        "one step",
        dtype,
        rollouts,
        dimensions,
        rollouts * dimensions * 2 * size + 4 * dimensions,
        "d (s + s) a row, 4 d of u",
        grid.select(
            rollouts * dimensions,
            eager=lambda: eager.prelogit_perturb(it.hidden, u, SIGMA, eps),
            compiled=lambda: compiled(eager.prelogit_perturb)(it.hidden, u, SIGMA, eps),
            reference=lambda: it.by_reference(step, torch.float32),
            ours=ours,
        ),
        check,
        lambda: torch.softmax(it.hidden, -1),
    )


def _update(grid: Grid, rollouts: int, dimensions: int) -> Case:
    it = Iteration.make(rollouts, dimensions, torch.float32, grid.seed)
    want = it.update_by_reference(CHECKED_STEPS, torch.float64)
    eps = torch.randn(STEPS, rollouts, dimensions)
    exact = it.mean + SIGMA * torch.einsum("n,tnd->td", it.weights[0].double(), eps.double())

    def check(name: str, got: Tensor) -> str:
        if name in checks.TIGHT:
            return _close(name, got[:, :CHECKED_STEPS], want)
        return _close(name, got, exact)

    return Case(
        "control_update",
        f"{STEPS} steps",
        torch.float32,
        rollouts,
        dimensions,
        8 * STEPS * dimensions,
        "8 tau d",
        grid.select(
            rollouts * dimensions * STEPS,
            eager=lambda: eager.control_update(it.mean, it.weights[0], eps, SIGMA),
            compiled=lambda: compiled(eager.control_update)(it.mean, it.weights[0], eps, SIGMA),
            reference=lambda: it.update_by_reference(STEPS, torch.float32),
            ours=it.update,
        ),
        check,
        lambda: torch.softmax(it.hidden, -1),
    )


def _merge(grid: Grid, rollouts: int, dimensions: int) -> Case:
    mean = torch.randn(1, STEPS, dimensions)
    partials = torch.randn(SHARDS, *mean.shape)
    want = mean.double() + SIGMA * partials.double().sum(0)
    out = torch.empty_like(mean)
    return Case(
        "control_merge",
        f"{SHARDS} shards, {STEPS} steps",
        torch.float32,
        rollouts,
        dimensions,
        4 * (SHARDS + 2) * STEPS * dimensions,
        "4 (S + 2) tau d",
        grid.select(
            partials.numel(),
            eager=lambda: mean + SIGMA * partials.sum(0),
            compiled=None,
            reference=lambda: reference.control_merge(mean, partials, SIGMA),
            ours=lambda: ops.control_merge(mean, partials, SIGMA, out=out),
        ),
        lambda name, got: _close(name, got, want),
        lambda: torch.softmax(mean[0], -1),
    )


def _weights(grid: Grid, rollouts: int) -> Case:
    reward, dot, norm2 = torch.randn(3, 1, rollouts).unbind(0)
    norm2 = norm2.abs()
    arguments: dict[str, Any] = {"lam": LAMBDA, "alpha": ALPHA, "sigma": SIGMA}
    want = eager.importance_weights(reward.double(), dot.double(), norm2.double(), **arguments)
    out = ops.importance_weights(reward, dot, norm2, **arguments)
    return Case(
        "importance_weights",
        "",
        torch.float32,
        1,
        rollouts,
        16 * rollouts,
        "16 n",
        grid.select(
            rollouts,
            eager=lambda: eager.importance_weights(reward, dot, norm2, **arguments)[0],
            compiled=lambda: compiled(eager.importance_weights)(reward, dot, norm2, **arguments)[0],
            reference=lambda: reference.importance_weights(
                reward, dot, norm2, LAMBDA, ALPHA, SIGMA, True
            )[0],
            ours=lambda: ops.importance_weights(reward, dot, norm2, **arguments, out=out).w,
        ),
        lambda name, got: checks.distribution(name, got, want[0]),
        lambda: torch.softmax(reward, -1),
    )


def _close(provider: str, got: Tensor, want: Tensor) -> str:
    error = float((got.double() - want).abs().max())
    bound = checks.TIGHT_BOUND if provider in checks.TIGHT else checks.LOOSE_BOUND
    return "" if error <= bound else f"off by {error:.1e} from float64"


def iteration_runs(it: Iteration) -> dict[str, Callable[[], Any]]:
    """One step of the perturbation, another in each call, and the update of all steps."""
    rollouts, dimensions = it.hidden.shape
    eps = torch.zeros(STEPS, rollouts, dimensions)
    dot = torch.zeros(rollouts)
    turn, eager_turn = itertools.cycle(it.steps), itertools.cycle(range(STEPS))

    def eager_perturb() -> None:
        step = next(eager_turn)
        dot.add_(eager.prelogit_perturb(it.hidden, it.mean[0, step], SIGMA, eps[step])[1])

    return {
        "eager perturb": eager_perturb,
        "eager update": lambda: eager.control_update(it.mean, it.weights[0], eps, SIGMA),
        "perturb": lambda: it.perturb(next(turn)),
        "update": it.update,
    }


def extra_memory(rollouts: int, dimensions: int) -> int | None:
    """Peak resident bytes that one iteration of ours adds to its inputs and outputs.

    Outputs are made and filled before. Measured in a fork, whose high-water mark starts at what is
    resident; None where there are no
    forks or no such mark.
    """
    if not hasattr(os, "fork") or not os.path.exists("/proc/self/status"):
        return None
    small = Iteration.make(2, dimensions, torch.float32, 0)
    it = Iteration.make(rollouts, dimensions, torch.float32, 0)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        for each in (small, it):
            before = _high_water()  # at last with the code loaded
            each.perturb_all()
            each.update()
        os.write(write, str(_high_water() - before).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return int(text)


def _high_water() -> int:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
