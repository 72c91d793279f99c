"""Measured times of the CUDA operators. Needs a GPU and triton.

    python -m benchmarks.gpu_times [--output PATH] [--batch B ...] [--vocab V ...] [--dim D ...]

Every operator is called through ``tta_ext.ops`` inside a CUDA graph (triton's
``do_bench_cudagraph``: median of many replays, after warming up), so what Python costs is left
out, as it is in a captured decoding step. Inputs of up to the size of L2 are read from L2 on
replay. The first two lines are yardsticks: a kernel that does nothing, and a copy of 1 GiB.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tta_ext import dispatch, ops

from . import harness

Call = Callable[[], Any]
SEED = 11
DTYPES = ("float32", "bfloat16")
BATCHES = (1, 8, 64)
VOCABULARIES = (32000, 128256, 256000)
DIMENSIONS = (2048, 4096, 8192)
ROLLOUTS, STEPS, DRAFT, SHARDS = 32, 32, 4, 8


@dataclass(frozen=True)
class Measured:
    """A call of an operator, and the shape."""

    op: str
    dtype: str
    rows: int
    columns: int
    call: Call


def logits_calls(
    batch: int, vocab: int, dtype: torch.dtype, device: str
) -> Iterator[tuple[str, Call]]:
    """The operators over logits, in the cases of csrc/testing/cuda/common_cases.cpp."""
    generator = torch.Generator().manual_seed(SEED)

    def logits(*shape: int) -> torch.Tensor:
        return (3 * torch.randn(*shape, vocab, generator=generator)).to(dtype).to(device)

    base, proxy, anti = logits(batch), logits(batch), logits(1, batch)
    key: dict[str, Any] = {
        "seed": torch.tensor(SEED, device=device),
        "position": torch.arange(batch, device=device),
        "sequence": torch.arange(batch, device=device),
        "check": False,
    }
    beta = torch.tensor([0.5], device=device)
    plain: dict[str, Any] = {"check": False}

    def rule(name: str, param: float) -> dict[str, Any]:
        return {"rule": name, "param": param}

    greedy = {**key, "do_sample": False}
    keep, defer, some = (rule("threshold", p) for p in (0.0, 1.5, 0.001))
    knapsack, small = (rule("knapsack", p) for p in (0.4, 1e-6))
    yield "categorical_sample", lambda: ops.categorical_sample(base, **key)
    yield "deferral_propose", lambda: ops.deferral_propose(base, **keep, **key)
    yield "deferral_propose greedy", lambda: ops.deferral_propose(base, **keep, **greedy)
    yield "deferral_sample", lambda: ops.deferral_sample(base, proxy, **keep, **key)
    yield "deferral_sample greedy", lambda: ops.deferral_sample(base, proxy, **keep, **greedy)
    yield "deferral_sample deferred", lambda: ops.deferral_sample(base, proxy, **defer, **key)
    yield "deferral_propose knapsack", lambda: ops.deferral_propose(base, **small, **key)
    yield "deferral_mask", lambda: ops.deferral_mask(base, **some, **plain)
    yield "deferral_mask knapsack", lambda: ops.deferral_mask(base, **knapsack, **plain)
    yield "deferral_probs", lambda: ops.deferral_probs(base, proxy, **some, **plain)
    yield "deferral_stats", lambda: ops.deferral_stats(base, **some, **plain)
    expert = proxy.unsqueeze(0)
    yield "implicit_reward", lambda: ops.implicit_reward_sample(base, expert, anti, beta, **key)
    yield (
        "implicit_reward_probs",
        lambda: ops.implicit_reward_probs(base, expert, anti, beta, **plain),
    )
    if dtype == torch.float32:
        profit = torch.rand(batch, vocab, generator=generator).to(device)
        weight = torch.rand(batch, vocab, generator=generator).to(device)
        capacity = 0.2 * vocab
        yield "greedy_knapsack", lambda: ops.greedy_knapsack(profit, weight, capacity, **plain)
    if batch * vocab <= 1 << 23:  # 10 rows of each of the batch
        positions, drafted = DRAFT + 1, DRAFT
        bases, proxies = logits(batch, positions), logits(batch, positions)
        length = torch.full((batch,), drafted, device=device)
        random = torch.randint(vocab, (batch, drafted), generator=generator).to(device)

        def verify(base: Tensor, proxy: Tensor, draft: Tensor, return_mass: bool) -> Call:
            more = {**some, **key, "return_mass": return_mass}
            return lambda: ops.deferral_verify(base, proxy, draft, length, **more)

        yield "deferral_verify unrelated", verify(bases, proxies, random, False)
        # A few tokens with most of the mass, more or less the same of both models.
        favourites = torch.randint(vocab, (batch, positions, 8), generator=generator).to(device)
        shape = favourites.shape
        likely = 18 + torch.randn(shape, generator=generator)
        likely_bases, likely_proxies = (
            rows.scatter(-1, favourites, (likely + noise).to(dtype).to(device))
            for rows in (bases, proxies)
            for noise in (0.3 * torch.randn(shape, generator=generator),)
        )
        draws = [
            ops.categorical_sample(likely_proxies[:, k].contiguous(), **{**key, "position": k})
            for k in range(drafted)
        ]
        draft = torch.stack(draws, 1)
        yield "deferral_verify", verify(likely_bases, likely_proxies, draft, False)
        yield "deferral_verify mass", verify(likely_bases, likely_proxies, draft, True)


def dimensional_calls(
    prompts: int, dim: int, dtype: torch.dtype, device: str
) -> Iterator[tuple[str, int, Call]]:
    """The operators over pre-logits: name, rows, call."""
    n, steps = ROLLOUTS, STEPS
    generator = torch.Generator().manual_seed(SEED)
    hidden = torch.randn(prompts * n, dim, generator=generator).to(dtype).to(device)
    mean = torch.randn(prompts, steps, dim, generator=generator).to(device)
    dot = torch.zeros(prompts * n, device=device)
    row = torch.arange(prompts, device=device).repeat_interleave(n)
    rollout = torch.arange(n, device=device).repeat(prompts)
    seed = torch.tensor(SEED, device=device)
    noise: dict[str, Any] = {"iteration": 0, "sigma": 0.5, "seed": seed, "check": False}
    yield (
        "prelogit_perturb",
        prompts * n,
        lambda: ops.prelogit_perturb(
            hidden, mean, step=0, row=row, sequence=row, rollout=rollout, dot=dot, **noise
        ),
    )
    if dtype != torch.float32:
        return
    weights = torch.rand(prompts, n, generator=generator).to(device)
    sequence = torch.arange(prompts, device=device)
    partials = torch.randn(SHARDS, prompts, steps, dim, generator=generator).to(device)
    rows = prompts * steps
    counter = torch.arange(4 * rows * dim, device=device).view(-1, 4)
    words = torch.tensor([SEED, 0], device=device)
    yield (
        "control_update",
        rows,
        lambda: ops.control_update(mean, weights, sequence=sequence, **noise),
    )
    yield "control_merge", rows, lambda: ops.control_merge(mean, partials, 0.5)
    yield "normal", rows, lambda: ops.normal(rows * dim, seed=seed)
    yield "philox", rows, lambda: ops.philox(counter, words)


def rollouts_call(prompts: int, device: str) -> Call:
    """The weights of the rollouts of each prompt."""
    generator = torch.Generator().manual_seed(SEED)
    reward, dot, norm2 = torch.rand(3, prompts, ROLLOUTS, generator=generator).to(device)
    return lambda: ops.importance_weights(
        reward, dot, norm2, lam=0.3, alpha=0.9, sigma=0.5, check=False
    )


def calls(
    batches: Sequence[int], vocabularies: Sequence[int], dimensions: Sequence[int], device: str
) -> Iterator[Measured]:
    """All calls, inputs made one shape at a time."""
    for name in DTYPES:
        dtype = getattr(torch, name)
        for batch in batches:
            for vocab in vocabularies:
                for op, call in logits_calls(batch, vocab, dtype, device):
                    yield Measured(op, name, batch, vocab, call)
            if dtype == torch.float32:
                n = ROLLOUTS
                yield Measured("importance_weights", name, batch, n, rollouts_call(batch, device))
            for dim in dimensions:
                for op, rows, call in dimensional_calls(batch, dim, dtype, device):
                    yield Measured(op, name, rows, dim, call)


def measure(arguments: argparse.Namespace) -> int:
    """The table, and the file."""
    try:
        from triton.testing import do_bench_cudagraph
    except ImportError:
        print("gpu_times: nothing was measured, triton is not installed (pip install triton)")
        return 1
    one = torch.zeros(1, device="cuda")
    source = torch.zeros(1 << 28, device="cuda")
    target = torch.empty_like(source)
    yardsticks = (
        Measured("add, 1 element", "float32", 1, 1, lambda: one.add_(1.0)),
        Measured("copy", "float32", 1, source.numel(), lambda: target.copy_(source)),
    )
    cases = calls(arguments.batch, arguments.vocab, arguments.dim, "cuda")
    rows = []
    for case in itertools.chain(yardsticks, cases):
        us = 1e3 * do_bench_cudagraph(case.call, return_mode="median")
        rows.append((case.op, case.dtype, str(case.rows), str(case.columns), f"{us:.2f}"))
        print(*rows[-1], flush=True)
    harness.report(
        ["python", "-m", "benchmarks.gpu_times", *sys.argv[1:]],
        harness.table(("op", "dtype", "rows", "columns", "us"), rows),
        arguments.output,
    )
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--vocab", type=int, nargs="+", default=VOCABULARIES)
    parser.add_argument("--dim", type=int, nargs="+", default=DIMENSIONS)
    arguments = parser.parse_args()
    harness.check_files(arguments.output)
    if not torch.cuda.is_available():
        print("gpu_times: skipped, torch sees no CUDA device")
        return 0
    served, reason = dispatch.serves("categorical_sample", "cuda")
    if served != "cuda":
        print(f"gpu_times: the CUDA library does not serve the operators: {reason}")
        return 1
    return measure(arguments)


if __name__ == "__main__":
    sys.exit(main())
