"""Measured times of the CUDA operators beside the predicted ones. Needs a GPU and triton.

    python -m benchmarks.gpu_times [--json PATH] [--batch B ...] [--vocab V ...] [--dim D ...]

Every operator is called through ``tta_ext.ops`` inside a CUDA graph (triton's
``do_bench_cudagraph``: median of many replays, after warming up), so what Python costs is left
out, as it is in a captured decoding step. Inputs of up to the size of L2 are read from L2 on
replay: such lines can beat the prediction, which reads them from DRAM. Two of roofline.py's
constants are measured beside what it assumes: what a kernel costs that does nothing, and the
bandwidth that a copy gets.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tta_ext
from tta_ext import ops

from . import roofline

Call = Callable[[], Any]
SEED = 11


@dataclass(frozen=True)
class Measured:
    """A call of an operator: what roofline.py calls it, and the shape."""

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
        positions, drafted = roofline.DRAFT + 1, roofline.DRAFT
        bases, proxies = logits(batch, positions), logits(batch, positions)
        length = torch.full((batch,), drafted, device=device)
        random = torch.randint(vocab, (batch, drafted), generator=generator).to(device)

        def verify(base: Tensor, proxy: Tensor, draft: Tensor, return_mass: bool) -> Call:
            more = {**some, **key, "return_mass": return_mass}
            return lambda: ops.deferral_verify(base, proxy, draft, length, **more)

        yield "deferral_verify unrelated", verify(bases, proxies, random, False)
        # A few tokens with most of the mass, more or less the same of both models.
        favourites = torch.randint(vocab, (batch, positions, 8), generator=generator).to(device)
        likely = (18 + torch.randn(favourites.shape, generator=generator)).to(device)
        likely_bases, likely_proxies = (
            rows.scatter(-1, favourites, (likely + 0.3 * torch.randn_like(likely)).to(dtype))
            for rows in (bases, proxies)
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
    n, steps = roofline.ROLLOUTS, roofline.STEPS
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
    partials = torch.randn(roofline.SHARDS, prompts, steps, dim, generator=generator).to(device)
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
    reward, dot, norm2 = torch.rand(3, prompts, roofline.ROLLOUTS, generator=generator).to(device)
    return lambda: ops.importance_weights(
        reward, dot, norm2, lam=0.3, alpha=0.9, sigma=0.5, check=False
    )


def calls(
    batches: Sequence[int], vocabularies: Sequence[int], dimensions: Sequence[int], device: str
) -> Iterator[Measured]:
    """All calls, inputs made one shape at a time."""
    for name in roofline.SIZES:
        dtype = getattr(torch, name)
        for batch in batches:
            for vocab in vocabularies:
                for op, call in logits_calls(batch, vocab, dtype, device):
                    yield Measured(op, name, batch, vocab, call)
            if dtype == torch.float32:
                n = roofline.ROLLOUTS
                yield Measured("importance_weights", name, batch, n, rollouts_call(batch, device))
            for dim in dimensions:
                for op, rows, call in dimensional_calls(batch, dim, dtype, device):
                    yield Measured(op, name, rows, dim, call)


def known(gpu: str) -> roofline.Gpu | None:
    """The GPU of that name, where the model knows it: parts in SXM form only."""
    if re.search("pcie|nvl|40GB", gpu, re.IGNORECASE):
        return None
    names = re.split("[ -]", gpu)
    return next((found for key, found in roofline.GPUS.items() if key in names), None)


def predicted(gpu: roofline.Gpu | None) -> dict[tuple[str, str, int, int], roofline.Prediction]:
    """The predictions for a GPU."""
    return {
        (p.op, p.dtype, p.rows, p.columns): p
        for p in roofline.recorded()
        if gpu and p.gpu == gpu.name
    }


def constants(bench: Callable[..., float]) -> dict[str, float]:
    """What roofline.py assumes, measured: microseconds of a kernel of one element, bytes/s."""
    one = torch.zeros(1, device="cuda")
    source = torch.zeros(1 << 28, device="cuda")
    target = torch.empty_like(source)
    copy = 1e-3 * bench(lambda: target.copy_(source), return_mode="median")
    return {
        "kernel_us": 1e3 * bench(lambda: one.add_(1.0), return_mode="median"),
        "copy_bytes_per_s": 2 * source.nbytes / copy,
    }


def measure(arguments: argparse.Namespace) -> int:
    """The table, and the file."""
    try:
        from triton.testing import do_bench_cudagraph
    except ImportError:
        print("gpu_times: nothing was measured, triton is not installed (pip install triton)")
        return 1
    gpu = torch.cuda.get_device_name()
    model = known(gpu)
    expected = predicted(model)
    if model is None:
        print(f"gpu_times: there is no prediction for {gpu}; measuring all the same")
    else:
        print(f"gpu_times: predictions are those for {model.name}")
    found = constants(do_bench_cudagraph)
    assumed = f" (assumed {1e-9 * model.efficiency * model.dram:.0f})" if model else ""
    print(
        f"{gpu}: a kernel of one element {found['kernel_us']:.2f} us (assumed "
        f"{1e6 * roofline.FIRST_LAUNCH:.2f}, after another {1e6 * roofline.NEXT_LAUNCH:.2f}), "
        f"a copy {1e-9 * found['copy_bytes_per_s']:.0f} GB/s{assumed}"
    )
    rows = []
    print(f"{gpu}: times in us")
    print(
        f"{'operator':27}{'dtype':10}{'rows':>6}{'columns':>9}{'measured':>10}{'predicted':>11}"
        f"{'ratio':>8}{'GB/s':>8}"
    )
    for case in calls(arguments.batch, arguments.vocab, arguments.dim, "cuda"):
        time = 1e3 * do_bench_cudagraph(case.call, return_mode="median")
        p = expected.get((case.op, case.dtype, case.rows, case.columns))
        line = {"op": case.op, "dtype": case.dtype, "rows": case.rows, "columns": case.columns,
                "measured_us": round(time, 2), "predicted_us": p.time if p else None}  # fmt: skip
        rows.append(line)
        beside = f"{p.time:>11.2f}{time / p.time:>8.2f}{1e-3 * p.bytes / time:>8.0f}" if p else ""
        print(
            f"{case.op:27}{case.dtype:10}{case.rows:>6}{case.columns:>9}{time:>10.2f}{beside}",
            flush=True,
        )
    record = {
        "gpu": gpu,
        "torch": torch.__version__,
        "tta_ext": tta_ext.__version__,
        "constants": found,
        "rows": rows,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--batch", type=int, nargs="+", default=roofline.BATCHES)
    parser.add_argument("--vocab", type=int, nargs="+", default=roofline.VOCABULARIES)
    parser.add_argument("--dim", type=int, nargs="+", default=roofline.DIMENSIONS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_times: skipped, torch sees no CUDA device")
        return 0
    served, reason = ops._dispatch.serves("categorical_sample", "cuda")
    if served != "cuda":
        print(f"gpu_times: the CUDA library does not serve the operators: {reason}")
        return 1
    return measure(arguments)


if __name__ == "__main__":
    sys.exit(main())
