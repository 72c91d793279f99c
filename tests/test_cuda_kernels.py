"""The CUDA kernels against the CPU kernels, bit for bit, without a GPU (tests/simt.py).

A case is a call of an operator drawn from its number alone: sizes, dtypes, strides, alignments,
rules, temperatures, bad rows. The plain build goes through many, the hook build through fewer with
all its checks, in random orders of threads and blocks, the sanitizers in a process of their own.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import simt
import torch
from conftest import skip_or_fail
from torch import Tensor

from tta_ext import rules, schemas
from tta_ext.build.library import source_root

pytestmark = pytest.mark.usefixtures("native")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Around a warp's 128 elements, a tile's 4096, and rows of many tiles; with wide loads and without.
SMALL = (1, 2, 3, 31, 127, 128, 129, 517, 1000)
MEDIUM = (4095, 4096, 4097, 8192, 8200, 9001, 12289)
RAGGED = (4097, 8200, 9001)
LARGE = (32000, 50257, 128256, 151936)
BAD = (float("nan"), float("inf"), None)  # None: a row of only -inf


class Draw:
    """Arguments of one call, from the numbers of a seeded generator."""

    def __init__(self, op: str, number: int, sizes: tuple[int, ...]) -> None:
        self.rng = np.random.default_rng([zlib.crc32(op.encode()), number])
        self.sizes = sizes
        # Most calls check nothing, as on a GPU; with check both devices must raise the same.
        self.check = bool(self.chance(0.3))
        self.spoil = self.chance(0.15)

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def one_of(self, values: Any) -> Any:
        return values[int(self.rng.integers(len(values)))]

    def below(self, n: int) -> int:
        return int(self.rng.integers(n))

    def tensor(self, values: Any, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(np.asarray(values)).to(dtype)

    def batch(self, most: int = 4) -> int:
        return self.one_of((0, 1, 1, 2, 3, most))

    def placed(self, x: Tensor) -> Tensor:
        """The same numbers with other strides and alignments."""
        if x.dim() < 2 or self.chance(0.4):
            return x
        left, right = self.below(9), self.below(9)
        wide = torch.full((*x.shape[:-1], left + x.shape[-1] + right), torch.nan, dtype=x.dtype)
        view = wide[..., left : left + x.shape[-1]]
        view.copy_(x)
        return view

    def logits(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Language-model-like rows, ties, impossible tokens, peaks; now and then a bad row."""
        dtype = dtype or self.one_of(DTYPES)
        x = self.rng.normal(size=shape).astype(np.float32) * 2.5
        kind = self.one_of(("model", "ties", "impossible", "peaked", "flat"))
        if kind == "ties":
            x = np.round(x * 2) / 2
        elif kind == "impossible":
            gone = self.rng.random(shape) < 0.4
            gone[..., self.below(shape[-1])] = False
            x[gone] = -np.inf
        elif kind == "peaked":
            x *= 12
        elif kind == "flat":
            x[...] = 1.5
        elif x.size:
            top = self.rng.integers(shape[-1], size=4)
            x[..., top] = np.float32([14, 13, 12, 10])
        if self.spoil and x.size and self.chance(0.5):
            row = x.reshape(-1, shape[-1])[self.below(x.size // shape[-1])]
            bad = self.one_of(BAD)
            if bad is None:
                row[:] = -np.inf
            else:
                row[self.below(row.size)] = bad
        return self.placed(torch.empty(shape, dtype=dtype).copy_(torch.from_numpy(x)))

    def per_row(self, batch: int, limit: int) -> Tensor:
        """A number, a number in device memory, or one a row."""
        shape = self.one_of(((), (1,), (batch,)))
        return self.tensor(self.rng.integers(limit, size=shape), torch.int64)

    def seed(self) -> Tensor:
        bits = self.rng.integers(-(2**63), 2**63 - 1, size=self.one_of(((), (1,))))
        return self.tensor(bits, torch.int64)

    def temperature(self) -> float:
        return self.one_of((1.0, 1.0, 0.7, 1.3, 0.05, 20.0))

    def rule(self, batch: int, *, p_only: bool = False, rows: int = 0) -> tuple[Any, ...]:
        """param, rule, critical, temperature, rule_temperature."""
        name = self.one_of(cases.P_ONLY if p_only else rules.RULE_NAMES)
        if self.chance(0.3):
            name = "knapsack"
        choices = [p for p in cases.PARAMS[name] if p is not None] or [0.0]
        shapes = [(), (1,), (batch,)] + [(rows,)] * (rows > 0)
        shape = self.one_of(shapes)
        param = self.rng.choice(choices, size=shape)
        if name == "knapsack" and self.chance(0.5):
            param = self.rng.random(size=shape)
        t = self.temperature()
        return (
            self.tensor(param, torch.float64),
            rules.rule_code(name),
            self.below(3),
            t,
            t if self.chance(0.6) else self.temperature(),
        )

    def key(self, batch: int) -> tuple[Any, ...]:
        """seed, position, sequence, iteration, rollout, do_sample."""
        return (
            self.seed(),
            self.per_row(batch, 2**32),
            self.per_row(batch, 2**32),
            self.below(2**12),
            self.per_row(batch, 2**16),
            not self.chance(0.2),
        )


def _pair(d: Draw) -> tuple[int, Tensor, Tensor]:
    b, v = d.batch(), d.one_of(d.sizes)
    return b, d.logits(b, v), d.logits(b, v)


def deferral_mask(d: Draw) -> tuple[Any, ...]:
    b, base, proxy = _pair(d)
    p_only = d.chance(0.5)
    lazy = p_only and d.chance(0.8)
    return base, None if lazy else proxy, *d.rule(b, p_only=p_only), d.check


def deferral_probs(d: Draw) -> tuple[Any, ...]:
    b, base, proxy = _pair(d)
    return base, proxy, *d.rule(b), d.check


def deferral_propose(d: Draw) -> tuple[Any, ...]:
    b, base, _ = _pair(d)
    return base, *d.rule(b, p_only=True), *d.key(b), d.check


def deferral_sample(d: Draw) -> tuple[Any, ...]:
    b, base, proxy = _pair(d)
    return base, proxy, *d.rule(b), *d.key(b), d.check


def deferral_verify(d: Draw) -> tuple[Any, ...]:
    b, v, k = d.batch(3), d.one_of(d.sizes), d.one_of((0, 1, 2, 4))
    rows = k + 1 if d.chance(0.6) or k == 0 else k
    base = d.logits(b, k + 1, v)
    # A proxy that is like the base accepts often, so that later positions are reached.
    proxy = d.logits(b, rows, v, dtype=base.dtype)
    if d.chance(0.6):
        proxy = d.placed((base[:, :rows].float() + 0.3 * torch.tanh(proxy.float())).to(base.dtype))
    tops = proxy[:, :k].float().nan_to_num(-1e30).argmax(-1).numpy()
    draft = np.where(d.rng.random((b, k)) < 0.6, tops, d.rng.integers(v, size=(b, k)))
    lengths = d.rng.integers(k + 1, size=b) if d.chance(0.5) else np.full(b, k)
    drafts, draft_length = d.tensor(draft, torch.int64), d.tensor(lengths, torch.int64)
    if d.chance(0.3):
        drafts = drafts.t().contiguous().t()
    rule = d.rule(b, rows=b * (k + 1))
    return base, proxy, drafts, draft_length, *rule, *d.key(b), d.chance(0.5), d.check


def _mixture(d: Draw) -> tuple[int, tuple[Any, ...]]:
    b, v, e = d.batch(3), d.one_of(d.sizes), d.one_of((1, 1, 2, 3))
    beta = d.tensor(d.rng.normal(size=e), torch.float32)
    anti = d.logits(e, b, v) if d.chance(0.6) else None
    return b, (d.logits(b, v), d.logits(e, b, v), anti, beta, d.temperature())


def implicit_reward_probs(d: Draw) -> tuple[Any, ...]:
    return *_mixture(d)[1], d.check


def implicit_reward_sample(d: Draw) -> tuple[Any, ...]:
    b, models = _mixture(d)
    return *models, *d.key(b), d.check


def categorical_sample(d: Draw) -> tuple[Any, ...]:
    b = d.batch()
    logits = d.logits(b, d.one_of(d.sizes))
    return logits, d.temperature(), *d.key(b), d.below(10), d.below(2**32), d.check


def greedy_knapsack(d: Draw) -> tuple[Any, ...]:
    b, v = d.batch(), d.one_of(d.sizes)
    profit, weight = (d.rng.random((b, v)).astype(np.float32) for _ in range(2))
    if d.chance(0.4):  # ties of density
        profit, weight = np.ceil(profit * 4), np.ceil(weight * 3) / 4
    weight[d.rng.random((b, v)) < 0.1] = 0
    if d.spoil and profit.size:
        d.one_of((profit, weight)).reshape(-1)[d.below(profit.size)] = d.one_of((-1.0, np.nan))
    shape = d.one_of(((), (1,), (b,)))
    capacity = d.rng.random(shape) * d.one_of((0.0, 0.01, 0.3, 1.5)) * v
    return (
        d.placed(torch.from_numpy(profit)),
        d.placed(torch.from_numpy(weight)),
        d.tensor(capacity, torch.float64),
        d.check,
    )


def prelogit_perturb(d: Draw) -> tuple[Any, ...]:
    n, p, tau = d.one_of((0, 1, 2, 5)), d.one_of((1, 2)), d.one_of((1, 3))
    dim = d.one_of(d.sizes)
    hidden = d.rng.normal(size=(n, dim)).astype(np.float32)
    mean = d.rng.normal(size=(p, tau, dim)).astype(np.float32)
    return (
        d.placed(torch.from_numpy(hidden).to(d.one_of(DTYPES))),
        torch.from_numpy(mean),
        d.per_row(n, tau + 1),
        d.per_row(n, p),
        d.per_row(n, 2**32),
        d.per_row(n, 2**16),
        d.below(2**12),
        d.one_of((0.5, 0.5, 0.0, 1e-3)),
        d.seed(),
        d.check,
    )


def importance_weights(d: Draw) -> tuple[Any, ...]:
    p, n = d.one_of((0, 1, 3)), d.one_of((1, 2, 5, 32, 100, 1000))
    x = d.rng.normal(size=(3, p, n)).astype(np.float32)
    if d.spoil and x.size:
        x[d.below(3), d.below(p), d.below(n)] = d.one_of((np.nan, np.inf, -np.inf))
    reward, dot, norm2 = (d.placed(torch.from_numpy(y.copy())) for y in x)
    lam = d.one_of((0.0, 0.3, 5.0))
    return reward, dot, norm2.abs(), lam, d.one_of((0.0, 0.9, 1.0)), d.one_of((0.0, 0.5)), d.check


def control_update(d: Draw) -> tuple[Any, ...]:
    p, tau, dim = d.one_of((1, 2)), d.one_of((1, 3)), min(d.one_of(d.sizes), 1000)
    n = d.one_of((1, 2, 7, 8, 33, 70))
    mean = torch.from_numpy(d.rng.normal(size=(p, tau, dim)).astype(np.float32))
    weights = d.rng.random((p, n)).astype(np.float32)
    weights[d.rng.random((p, n)) < 0.3] = 0
    if d.spoil:
        weights[d.below(p), d.below(n)] = d.one_of((np.nan, np.inf))
    length = d.tensor(d.rng.integers(tau + 1, size=(p, n)), torch.int64)
    size = 1 << (n - 1).bit_length()
    shards = d.one_of((1, 1, 2))
    shard = max(1, size // shards)
    start = shard * d.below(max(1, n // shard))
    partial = shard < size
    return (
        mean,
        torch.from_numpy(weights),
        length if d.chance(0.6) else None,
        d.seed(),
        d.per_row(p, 2**32),
        d.below(2**12),
        d.one_of((0.5, 0.5, 0.0)),
        start,
        start + shard,
        partial,
        d.check,
    )


def control_merge(d: Draw) -> tuple[Any, ...]:
    shape = (d.one_of((1, 2)), d.one_of((1, 3)), min(d.one_of(d.sizes), 5000))
    shards = d.one_of((1, 2, 4, 8))
    mean, partials = (
        torch.from_numpy(d.rng.normal(size=s).astype(np.float32)) for s in (shape, (shards, *shape))
    )
    return mean, partials, d.one_of((0.5, 0.0))


def philox(d: Draw) -> tuple[Any, ...]:
    words = d.rng.integers(2**32, size=(d.one_of((0, 1, 5, 700)), 4))
    return d.tensor(words, torch.int64), d.tensor(d.rng.integers(2**32, size=2), torch.int64)


def normal(d: Draw) -> tuple[Any, ...]:
    n = d.one_of((0, *d.sizes))
    return n, d.seed(), d.below(2**32), d.below(2**32), d.below(2**12), d.below(2**16)


ARGUMENTS: dict[str, Callable[[Draw], tuple[Any, ...]]] = {
    "deferral_mask": deferral_mask,
    "deferral_probs": deferral_probs,
    "deferral_stats": deferral_mask,
    "deferral_propose": deferral_propose,
    "deferral_sample": deferral_sample,
    "deferral_verify": deferral_verify,
    "implicit_reward_probs": implicit_reward_probs,
    "implicit_reward_sample": implicit_reward_sample,
    "categorical_sample": categorical_sample,
    "greedy_knapsack": greedy_knapsack,
    "prelogit_perturb": prelogit_perturb,
    "importance_weights": importance_weights,
    "control_update": control_update,
    "control_merge": control_merge,
    "philox": philox,
    "normal": normal,
}


def run(call: Callable[..., Any], *args: Any) -> tuple[Tensor, ...] | str:
    """The outputs as a tuple, or the first line of the error without its place in the source."""
    try:
        out = call(*args)
    except RuntimeError as error:
        return re.sub(r"^\w+, \S+:\d+, ", "", str(error).splitlines()[0])
    return out if isinstance(out, tuple) else (out,)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtypes, shapes and bits; a NaN has no bits of its own."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    nan = a.isnan()
    if not torch.equal(nan, b.isnan()):
        return False
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a[~nan].view(integer), b[~nan].view(integer))


def compare(kernels: simt.Kernels, op: str, args: tuple[Any, ...], label: str) -> None:
    want = run(getattr(torch.ops.tta_ext, op), *args)
    got = run(kernels, op, *args)
    if isinstance(want, str) or isinstance(got, str):
        assert got == want, f"{label}: {got!r}, on the CPU {want!r}"
        return
    for name, g, w in zip(schemas.OPS[op].outputs, got, want, strict=True):
        if same_bits(g, w):
            continue
        at = (g != w).nonzero()[:4].tolist()
        raise AssertionError(
            f"{label}: {name} differs at {at}: {[(g[tuple(i)], w[tuple(i)]) for i in at]}; "
            f"arguments {describe(args)}"
        )


def describe(args: tuple[Any, ...]) -> str:
    """Sizes, and the numbers of small tensors."""
    words = []
    for x in args:
        if not isinstance(x, Tensor):
            words.append(repr(x))
        elif x.numel() <= 4:
            words.append(f"{x.tolist()}")
        else:
            words.append(f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}")
    return ", ".join(words)


# The build that the sanitizers' process asks for instead of the two of the ordinary tests.
MODE = os.environ.get("TTA_EXT_TEST_SIMT", "")


def kernels_of(mode: str) -> simt.Kernels:
    reason = simt.missing()
    if reason:
        skip_or_fail("simt", reason)
    if MODE and mode != MODE:
        pytest.skip(f"TTA_EXT_TEST_SIMT={MODE}")
    return simt.kernels(mode)


@pytest.mark.parametrize("op", sorted(ARGUMENTS))
def test_bits_equal_the_cpu(op: str) -> None:
    kernels = kernels_of("plain")
    for number in range(150):
        kernels.configure(seed=number // 2 % 4)  # odd: blocks take as many tiles as they may
        sizes = SMALL if number % 2 else MEDIUM
        compare(kernels, op, ARGUMENTS[op](Draw(op, number, sizes)), f"{op} case {number}")


@pytest.mark.parametrize("op", sorted(set(ARGUMENTS) - {"control_update", "philox"}))
def test_bits_equal_the_cpu_on_large_rows(op: str) -> None:
    kernels = kernels_of("plain")
    kernels.configure(seed=5)
    for number in range(1000, 1008):
        args = ARGUMENTS[op](Draw(op, number, (LARGE[number % 4],)))
        compare(kernels, op, args, f"{op} case {number}")


@pytest.mark.parametrize("op", ["deferral_mask", "deferral_stats"])
def test_budgets_of_about_one_unlikely_token(op: str) -> None:
    """Its mass is far below an ulp of what the likely tokens' bands hold."""
    kernels = kernels_of("plain")
    grid = itertools.product(DTYPES, (8200, 12289), (15.0, 20.0, 21.9), (0.9, 0.999, 1.001, 1.1))
    for number, (dtype, vocab, depth, part) in enumerate(grid):
        base = torch.zeros(2, vocab, dtype=dtype)
        base[:, vocab // 2] = -depth
        budget = part * torch.softmax(base[0].double(), -1).min()
        rule = rules.rule_code("knapsack"), number % 3, 1.0, 1.0
        kernels.configure(seed=number % 2)
        compare(kernels, op, (base, None, budget, *rule, False), f"{op} case {number}")


@pytest.mark.parametrize("op", sorted(ARGUMENTS))
def test_every_access_is_in_bounds_and_ordered(op: str) -> None:
    kernels = kernels_of("hooks")
    for number in range(2000, 2060):
        kernels.configure(seed=number % 4, preempt=(0.0, 0.02, 0.2)[number // 4 % 3])
        sizes = SMALL if number % 3 else RAGGED
        compare(kernels, op, ARGUMENTS[op](Draw(op, number, sizes)), f"{op} case {number}")


@pytest.mark.parametrize("op", sorted(ARGUMENTS))
def test_sanitizer_cases(op: str) -> None:
    """Run by test_sanitizers_are_clean in a process with AddressSanitizer."""
    if not MODE:
        pytest.skip("no process with sanitizers: TTA_EXT_TEST_SIMT is not set")
    kernels = kernels_of("asan")
    for number in range(3000, 3030):
        kernels.configure(seed=number % 3)
        sizes = SMALL if number % 2 else RAGGED
        compare(kernels, op, ARGUMENTS[op](Draw(op, number, sizes)), f"{op} case {number}")


def test_sanitizers_are_clean() -> None:
    reason = simt.missing()
    environment = None if reason else simt.asan_environment()
    if environment is None:
        skip_or_fail("simt", reason or "g++ has no sanitizer libraries")
    simt.build_kernels("asan", "tta_ext_simt_asan")
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-k"]
    done = subprocess.run(
        [*command, "test_sanitizer_cases", str(Path(__file__))],
        env={**environment, "TTA_EXT_TEST_SIMT": "asan"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    report = done.stdout[-3000:] + done.stderr[-3000:]
    assert done.returncode == 0 and f"{len(ARGUMENTS)} passed" in done.stdout, report


@dataclass(frozen=True)
class Bug:
    """A bug of one translation unit: what is replaced in a file of csrc/cuda as this unit alone
    sees it, in the first ``places`` of it (0: everywhere), and what comparing a call of ``op`` with
    the CPU's reports.
    """

    unit: str
    op: str
    file: str
    old: str
    new: str
    report: str
    places: int = 0


BARRIER = r"__syncthreads\(\);"
SHARED = "SIMT: (race|uninitialised): .* shared"
BUGS = (
    Bug(
        "sampling",
        "categorical_sample",
        "block.cuh",
        r"__threadfence\(\);",
        ";",
        "SIMT: race: .* global",
        1,
    ),
    Bug("deferral", "deferral_sample", "tile.cuh", BARRIER, ";", SHARED),
    Bug(
        "verify",
        "deferral_verify",
        "tile.cuh",
        r"< tile\.count",
        "<= tile.count",
        "SIMT: out of bounds: read",
    ),
    Bug("knapsack", "greedy_knapsack", "knapsack.cu", BARRIER, ";", SHARED),
    Bug("control", "control_update", "control.cu", r"__syncwarp\(\);", ";", SHARED),
    Bug("prelogit", "normal", "noise.cuh", r"left > 3", "left >= 3", "SIMT: out of bounds: write"),
    # The weights of nodes are read without a barrier.
    Bug(
        "verify",
        "deferral_verify",
        "masked_sum.cuh",
        r"(?s)(\bweigh_nodes\(.*?)__syncwarp\(\);",
        r"\1;",
        SHARED,
        1,
    ),
    # Nodes with elements a little above the cut are forgotten.
    Bug(
        "deferral",
        "deferral_stats",
        "masked_sum.cuh",
        r"m\[c\] >= end",
        "m[c] >= end + 1.0f",
        "deferred_mass differs",
    ),
)


def plant(bug: Bug, tree: Path) -> Path:
    """The tree, with the bug's translation unit and the file that the bug is in."""
    source = source_root() / "cuda"
    (tree / "cuda").mkdir()
    for name in {f"{bug.unit}.cu", bug.file}:
        text = (source / name).read_text()
        if name == bug.file:
            text, found = re.subn(bug.old, bug.new, text, count=bug.places)
            assert found, f"{name} no longer holds {bug.old}: plant another bug"
        (tree / "cuda" / name).write_text(text)
    return tree


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[Bug, simt.Kernels]:
    """The hook build that has a bug; there are many in a build, each in a unit of its own."""
    kernels_of("hooks")  # or skip
    builds: list[dict[str, Bug]] = []
    for bug in BUGS:
        free = next((build for build in builds if bug.unit not in build), None)
        if free is None:
            builds.append({bug.unit: bug})
        else:
            free[bug.unit] = bug
    kernels: dict[Bug, simt.Kernels] = {}
    for i, build in enumerate(builds):
        trees = {f"{u}.cu": plant(bug, tmp_path_factory.mktemp(u)) for u, bug in build.items()}
        planted = simt.changed_kernels(f"tta_ext_simt_planted_{i}", trees)
        kernels |= dict.fromkeys(build.values(), planted)
    return kernels


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.op}-{bug.file}")
def test_bugs_planted_in_the_kernels_are_found(bug: Bug, planted: dict[Bug, simt.Kernels]) -> None:
    kernels, reports = planted[bug], set()
    for number in range(40):
        kernels.configure(seed=number % 4)
        try:
            compare(kernels, bug.op, ARGUMENTS[bug.op](Draw(bug.op, number, MEDIUM)), "planted")
        except AssertionError as error:
            report = str(error).splitlines()[0]
            if re.match(f"planted: '?{bug.report}", report):
                return
            reports.add(report)
    pytest.fail(f"not found in 40 calls: {sorted(reports)}")


def test_every_operator_is_compared() -> None:
    assert set(ARGUMENTS) == set(schemas.OPS)
