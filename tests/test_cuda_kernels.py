"""The CUDA kernels against the CPU kernels, bit for bit, without a GPU (tests/simt.py).

A case is a call of an operator drawn from its number alone: sizes, dtypes, strides, alignments,
rules, temperatures, bad rows. The plain build goes through many, the hook build through fewer with
all its checks, in random orders of threads and blocks, the sanitizers in a process of their own.
"""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import simt
import torch
from conftest import skip_or_fail
from draws import ARGUMENTS, DTYPES, LARGE, MEDIUM, RAGGED, SMALL, Draw
from torch import Tensor

from tta_ext import rules, schemas
from tta_ext.build import cuda
from tta_ext.build.library import source_root

pytestmark = pytest.mark.usefixtures("native")


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


def kernels_of(mode: str) -> simt.Kernels:
    reason = simt.missing()
    if reason:
        skip_or_fail("simt", reason)
    return simt.kernels(mode)


def calls(few: int, many: int) -> pytest.MarkDecorator:
    """How many are drawn; the many by the slow tests."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])


@calls(64, 400)
@pytest.mark.parametrize("op", sorted(ARGUMENTS))
def test_bits_equal_the_cpu(op: str, count: int) -> None:
    kernels = kernels_of("plain")
    for number in range(count):
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


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> simt.Kernels:
    """The kernels as all variants of the library have them."""
    if reason := simt.missing():
        skip_or_fail("simt", reason)
    tree, source = tmp_path_factory.mktemp("variants"), source_root() / "cuda"
    shutil.copytree(source, tree / "cuda")
    names = [flag.removeprefix("-D") for flag in cuda.VARIANTS.values()]
    changed = "deferral.cu", "sampling.cu", "verify.cu"  # who divides
    for name in changed:
        text = "".join(f"#define {define}\n" for define in names) + (source / name).read_text()
        (tree / "cuda" / name).write_text(text)
    return simt.changed_kernels("tta_ext_simt_variants", dict.fromkeys(changed, tree), "plain")


VARIED = ("categorical_sample", "implicit_reward_probs", "deferral_")


@pytest.mark.parametrize("op", sorted(op for op in ARGUMENTS if op.startswith(VARIED)))
def test_variants_have_the_same_bits(variants: simt.Kernels, op: str) -> None:
    """Kernels of one dtype each, and probabilities divided in float32 (tta_ext.build.cuda)."""
    for number in range(3000, 3030):
        variants.configure(seed=number % 4)
        sizes = SMALL if number % 2 else MEDIUM
        compare(variants, op, ARGUMENTS[op](Draw(op, number, sizes)), f"{op} case {number}")


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_float_division_where_it_is_hard(variants: simt.Kernels, temperature: float) -> None:
    """Probabilities down to the smallest floats, and of equal logits, whose sum is exact."""
    spread = torch.linspace(-110 * temperature, 0, 8200)
    base = torch.stack([spread, torch.zeros(8200), (spread * 7).sin()])
    rule = rules.rule_code("nudging"), 0, temperature, temperature
    param = torch.tensor([0.0], dtype=torch.float64)
    compare(variants, "deferral_probs", (base, base, param, *rule, False), f"T = {temperature}")


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


DENSE: dict[str, Callable[[Tensor], Tensor]] = {
    "constant": torch.zeros_like,
    "plateaus": lambda x: (x > 0.3).float(),
    "signed zeros": lambda x: torch.where(x > 0, 0.0, -0.0),
    "ulps": lambda x: 10 + 1e-6 * (2 * x).round(),
    "continuous": lambda x: 0.005 * x,
    "geometric": lambda x: torch.exp2(-(20 * x).abs().round()),
    "huge": lambda x: 5e37 * x,
    "deep": lambda x: torch.cat([0.01 * x[:, 1:], torch.full((2, 1), 87.0)], 1),
}


@pytest.mark.parametrize("shape", DENSE)
def test_brackets_of_thousands(shape: str) -> None:
    """More elements between two bands than are listed, and capacities at the edge of one of them
    or below what approximate masses can tell.
    """
    kernels = kernels_of("plain")
    random = torch.Generator().manual_seed(5)
    grid = itertools.product(
        (8200, 16384), (1.0, 0.7), (0.3, 1 - 1e-7, 1.0, 1 + 1e-6, 1e-20, 1e-36)
    )
    for number, (vocab, temperature, part) in enumerate(grid):
        base = DENSE[shape](torch.randn(2, vocab, generator=random))
        base = base.to(DTYPES[number % 5 % 3 if shape != "huge" else 0])
        sums = torch.softmax(base.double() / temperature, -1).sort().values.cumsum(-1)
        budget = part * sums[:, vocab // 2 + number]
        rule = rules.rule_code("knapsack"), number % 3, temperature, temperature
        for op in ("deferral_mask", "deferral_stats"):
            kernels.configure(seed=number % 4)
            compare(kernels, op, (base, None, budget, *rule, False), f"{op} case {number}")


@calls(24, 120)
@pytest.mark.parametrize("op", sorted(ARGUMENTS))
def test_every_access_is_in_bounds_and_ordered(op: str, count: int) -> None:
    kernels = kernels_of("hooks")
    for number in range(2000, 2000 + count):
        kernels.configure(seed=number % 4, preempt=(0.0, 0.02, 0.2)[number // 4 % 3])
        sizes = SMALL if number % 3 else RAGGED
        compare(kernels, op, ARGUMENTS[op](Draw(op, number, sizes)), f"{op} case {number}")


SANITIZED = """
import sys
sys.path.insert(0, sys.argv[1])
import simt, torch
from draws import ARGUMENTS, RAGGED, SMALL, Draw
from test_cuda_kernels import compare
torch.set_num_threads(1)
kernels = simt.kernels(sys.argv[2])
for op in sorted(ARGUMENTS):
    for number in range(3000, 3030):
        kernels.configure(seed=number % 3)
        sizes = SMALL if number % 2 else RAGGED
        compare(kernels, op, ARGUMENTS[op](Draw(op, number, sizes)), f"{op} case {number}")
    print(op)
"""


@pytest.mark.slow  # instrumented kernels compile for minutes
def test_sanitizers_are_clean() -> None:
    """In a process that was started with AddressSanitizer."""
    reason = simt.missing()
    environment = None if reason else simt.asan_environment()
    if environment is None:
        skip_or_fail("simt", reason or "g++ has no sanitizer libraries")
    simt.build_kernels("asan", "tta_ext_simt_asan")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SANITIZED, str(Path(__file__).parent), "asan"],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    report = done.stdout[-3000:] + done.stderr[-3000:]
    assert done.returncode == 0 and done.stdout.split() == sorted(ARGUMENTS), report


@dataclass(frozen=True)
class Forgotten:
    """A call of ``function`` in a file of csrc/cuda that is left out, the first one after
    ``after`` or each one, and what comparing calls of ``op`` with the CPU's then reports.
    """

    op: str
    file: str
    function: str
    report: str
    after: str | None = None

    def options(self) -> dict[str, Any]:
        text, line = (source_root() / "cuda" / self.file).read_text(), 0
        found = re.search(rf"(?s){self.after or ''}.*?\b{self.function}\(", text)
        assert found, f"{self.file} no longer calls {self.function} there: leave out another one"
        if self.after is not None:
            line = text.count("\n", 0, found.end()) + 1
        return {"forget": self.function, "forget_in": f"cuda/{self.file}", "forget_at": line}


SHARED = "SIMT: (race|uninitialised): .* shared"
FORGOTTEN = (
    Forgotten("categorical_sample", "block.cuh", "__threadfence", "SIMT: race: .* global", ""),
    Forgotten("deferral_sample", "tile.cuh", "__syncthreads", SHARED),
    Forgotten("greedy_knapsack", "knapsack.cu", "__syncthreads", SHARED),
    Forgotten("control_update", "control.cu", "__syncwarp", SHARED),
    # The weights of nodes are read without a barrier.
    Forgotten("deferral_verify", "masked_sum.cuh", "__syncwarp", SHARED, r"\bweigh_nodes\("),
)


def found_in_some_call(kernels: simt.Kernels, op: str, report: str, **options: Any) -> None:
    reports = set()
    for number in range(40):
        kernels.configure(seed=number % 4, **options)
        try:
            compare(kernels, op, ARGUMENTS[op](Draw(op, number, MEDIUM)), "planted")
        except AssertionError as error:
            line = str(error).splitlines()[0]
            if re.match(f"planted: '?{report}", line):
                return
            reports.add(line)
    pytest.fail(f"not found in 40 calls: {sorted(reports)}")


@pytest.mark.parametrize("bug", FORGOTTEN, ids=lambda bug: f"{bug.op}-{bug.file}")
def test_forgotten_synchronisation_is_found(bug: Forgotten) -> None:
    found_in_some_call(kernels_of("hooks"), bug.op, bug.report, **bug.options())


@dataclass(frozen=True)
class Bug:
    """A bug of one translation unit: what is replaced in a file of csrc/cuda as this unit alone
    sees it, and what comparing calls of ``op`` with the CPU's reports.
    """

    unit: str
    op: str
    file: str
    old: str
    new: str
    report: str


BUGS = (
    Bug(
        "sampling",
        "categorical_sample",
        "tile.cuh",
        "< tile.count",
        "<= tile.count",
        "SIMT: out of bounds: read",
    ),
    Bug("prelogit", "normal", "noise.cuh", "left > 3", "left >= 3", "SIMT: out of bounds: write"),
    # Nodes with elements a little above the cut are forgotten.
    Bug(
        "deferral",
        "deferral_stats",
        "masked_sum.cuh",
        "m[c] >= end",
        "m[c] >= end + 1.0f",
        "deferred_mass differs",
    ),
)


def plant(bug: Bug, tree: Path) -> Path:
    """The tree, with the bug's translation unit and the file that the bug is in."""
    (tree / "cuda").mkdir()
    for name in (f"{bug.unit}.cu", bug.file):
        text = (source_root() / "cuda" / name).read_text()
        if name == bug.file:
            assert bug.old in text, f"{name} no longer holds {bug.old}: plant another bug"
            text = text.replace(bug.old, bug.new)
        (tree / "cuda" / name).write_text(text)
    return tree


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> simt.Kernels:
    """The hook build with every bug, each in a unit of its own."""
    kernels_of("hooks")  # or skip
    trees = {f"{bug.unit}.cu": plant(bug, tmp_path_factory.mktemp(bug.unit)) for bug in BUGS}
    return simt.changed_kernels("tta_ext_simt_planted", trees)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.op}-{bug.file}")
def test_bugs_planted_in_the_kernels_are_found(bug: Bug, planted: simt.Kernels) -> None:
    found_in_some_call(planted, bug.op, bug.report)


def test_every_operator_is_compared() -> None:
    assert set(ARGUMENTS) == set(schemas.OPS)
