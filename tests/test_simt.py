"""The SIMT layer that runs the CUDA kernels without a GPU: it must find planted bugs, and nothing
in correct kernels, in any order of threads and blocks. Its kernels: csrc/testing/simt/selftest.cu.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simt
from conftest import skip_or_fail

# (seed, probability of a preemption): ascending, descending and random orders.
ORDERS = ((0, 0.0), (1, 0.0), (2, 0.0), (3, 0.05), (4, 0.5))
SIZE = 1000  # not a multiple of the block


@pytest.fixture(params=["plain", "hooks"])
def layer(request: pytest.FixtureRequest) -> simt.Selftest:
    reason = simt.missing()
    if reason:
        skip_or_fail("simt", reason)
    return simt.selftest(request.param)


@pytest.fixture
def hooks() -> simt.Selftest:
    reason = simt.missing()
    if reason:
        skip_or_fail("simt", reason)
    return simt.selftest("hooks")


def arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).integers(1, 10, size=SIZE).astype(np.float32)
    return x, np.full(4096, np.nan, np.float32), np.zeros(4096, np.uint32)


def report(layer: simt.Selftest, kernel: str, bug: int, *, seed: int, preempt: float = 0.0) -> str:
    """The report of the first fault, or ""."""
    layer.configure(seed=seed, preempt=preempt, step_limit=300_000)
    try:
        layer.run(kernel, *arrays(), bug)
    except RuntimeError as error:
        return str(error)
    return ""


# What each planted bug must report, in every order: by the plain build too, or by hooks alone.
# Where several faults can come first, any of them will do.
PLAIN = {
    ("sum", 4): "divergent barrier|race",
    ("sum", 10): "barrier: .*exit",
    ("warp", 1): "warp operation: .*exit",
    ("warp", 2): "warp operation: .*mask",
    ("warp", 3): "outside its mask",
    ("warp", 4): "divergent warp operation: .*selftest.cu:[0-9]+ .*selftest.cu:[0-9]+",
    ("warp", 5): "deadlock: .*__shfl_xor_sync.*__syncthreads",
    ("copy", 1): "misaligned: __ldg",
    ("stop", 1): r"assertion: assert\(input",
    ("stop", 2): "assertion: __trap.*thread 3$",
    ("stop", 3): "endless loop",
    ("stop", 5): "launch: 50004 bytes of static",
    ("stop", 6): "divergent barrier",
    ("stop", 8): "launch: grid of 0",
    ("stop", 9): "launch: block of 1025",
    ("stop", 10): "launch: 51200 bytes of dynamic .*cudaFuncSetAttribute",
    ("stop", 11): "out of bounds: cudaMemsetAsync .* output",
}
HOOKS = {
    ("sum", 1): "uninitialised: read of shared partial",
    ("sum", 2): "race|uninitialised",
    ("sum", 3): "race: .* shared partial .*selftest.cu:[0-9]+ against block [0-9]+ thread",
    ("sum", 5): "race: .* shared partial",
    ("sum", 6): r"out of bounds: read .* shared partial \+ 512 of 512 bytes",
    ("sum", 11): r"out of bounds: read .*selftest.cu:[0-9]+, at input \+ 4000 of 4000 bytes",
    ("sum", 12): r"read-only: write to input \+ 0 at csrc/testing/simt/selftest.cu",
    ("sum", 13): "race: write after write on global output",
    ("last_block", 1): r"race: read after write on global output .* against block",
    ("last_block", 2): r"race: read after write on global output .* against block",
    ("last_block", 3): "race: .* global words",
    ("last_block", 4): "race: read after write on global output",
    ("last_block", 5): "race: read after write on global output",
    ("last_block", 6): "race: __ldg of output .*not coherent",
    ("warp_memory", 1): "race: .* shared dynamic|uninitialised",
    ("warp_memory", 2): "race: .* shared dynamic|uninitialised",
    ("warp_memory", 3): "race: .* shared dynamic|uninitialised",
    ("warp_memory", 4): "race: .* shared dynamic|uninitialised",
    ("warp_memory", 5): "out of bounds: write .* dynamic shared memory",
    ("copy", 2): "misaligned: read of 16 bytes at csrc/testing/simt/selftest.cu:[0-9]+",
    ("same_value", 1): "race: write after write on global output",
    ("same_value", 2): "race: write after write on shared flag",
    ("same_value", 3): r"out of bounds: write of 4 bytes .* shared flag \+ 4 of 4 bytes",
    ("handshake", 1): "race: read after write on shared gift",
    ("stop", 4): "endless loop: .*selftest.cu",
    ("stop", 7): "out of bounds: .* local variable of thread 0",
}


def check_found(layer: simt.Selftest, planted: dict[tuple[str, int], str]) -> None:
    for (kernel, bug), expected in planted.items():
        for seed, preempt in ORDERS:
            found = report(layer, kernel, bug, seed=seed, preempt=preempt)
            assert re.search(expected, found), (kernel, bug, seed, found)


def test_planted_bugs_are_found(layer: simt.Selftest) -> None:
    check_found(layer, PLAIN)


def test_planted_memory_bugs_are_found_by_hooks(hooks: simt.Selftest) -> None:
    check_found(hooks, HOOKS)


def test_a_check_that_is_off_is_silent(hooks: simt.Selftest) -> None:
    """So the reports above come from the check they name."""
    for option, kernel, bug in (
        ("races", "last_block", 1),
        ("bounds", "sum", 6),
        ("uninitialised", "sum", 1),
    ):
        assert report(hooks, kernel, bug, seed=0)
        hooks.configure(seed=0, **{option: False})
        hooks.run(kernel, *arrays(), bug)


def test_an_error_does_not_stick(layer: simt.Selftest) -> None:
    assert report(layer, "stop", 2, seed=0)
    assert not report(layer, "sum", 0, seed=0)


def expected_sum() -> np.ndarray:
    x = arrays()[0]
    parts = [x[i : i + 128] for i in range(0, SIZE, 128)]
    return np.array([[part.sum(), part.size] for part in parts], np.float32).ravel()


def expected_last_block() -> np.ndarray:
    sums = expected_sum()[::2]
    return np.concatenate([[sums.sum()], sums])


def expected_warp() -> np.ndarray:
    return np.repeat(arrays()[0][:64].reshape(2, 32).sum(1), 32)


def expected_warp_memory() -> np.ndarray:
    return np.roll(arrays()[0][:64].reshape(2, 32), -1, axis=1).ravel()


CORRECT: dict[str, Callable[[], np.ndarray]] = {
    "sum": expected_sum,
    "last_block": expected_last_block,
    "warp": expected_warp,
    "warp_memory": expected_warp_memory,
    "copy": lambda: arrays()[0][: SIZE - 8],
    "same_value": lambda: np.array([1, 7, 7, 7]),
    "handshake": lambda: np.array([5]),
    "stop": lambda: np.ones(64),
    "functions": lambda: np.ones(64),
}


@pytest.mark.parametrize("kernel", sorted(CORRECT))
def test_correct_kernels_are_clean_in_every_order(layer: simt.Selftest, kernel: str) -> None:
    want = CORRECT[kernel]()
    for seed, preempt in ORDERS:
        layer.configure(seed=seed, preempt=preempt)
        x, y, words = arrays()
        layer.run(kernel, x, y, words, 0)
        np.testing.assert_array_equal(y[: want.size], want)
        assert np.isnan(y[want.size :]).all()
        if kernel == "last_block":
            assert words[0] == 0  # the counter is ready for the next launch


def test_every_kernel_has_a_test(layer: simt.Selftest) -> None:
    assert set(layer.names()) == {*CORRECT, "order", "work"}


def test_orders(layer: simt.Selftest) -> None:
    """Ascending, descending, and as many random ones as there are seeds."""

    def order(seed: int) -> np.ndarray:
        layer.configure(seed=seed)
        _, y, words = arrays()
        layer.run("order", np.zeros(1, np.float32), y, words, 0)
        return y[:256].astype(int)

    up = np.arange(256)
    np.testing.assert_array_equal(order(0), up)
    np.testing.assert_array_equal(order(1), up[::-1])
    random = [order(seed) for seed in (2, 3, 4)]
    for one in random:
        np.testing.assert_array_equal(np.sort(one), up)
        assert (one.reshape(4, 64) // 64 == one.reshape(4, 64)[:, :1] // 64).all()
    assert len({tuple(one) for one in (up, *random)}) == 4
    np.testing.assert_array_equal(order(2), random[0])


def test_preemption_interleaves(hooks: simt.Selftest) -> None:
    hooks.configure(seed=2, preempt=0.0)
    hooks.statistics()
    hooks.run("sum", *arrays(), 0)
    calm = hooks.statistics()
    hooks.configure(seed=2, preempt=0.5)
    hooks.run("sum", *arrays(), 0)
    wild = hooks.statistics()
    assert wild["accesses"] == calm["accesses"]
    assert wild["switches"] > calm["switches"] + 0.4 * calm["accesses"]
    assert wild["barriers"] == calm["barriers"] == 8 * 17
    assert calm["max_threads"] == 128 and calm["blocks"] == 8 and calm["launches"] == 1


def test_functions(layer: simt.Selftest) -> None:
    """Warp operations, votes, reductions and bit functions against NumPy."""
    layer.configure(seed=3)
    x, y, words = arrays()
    layer.run("functions", x, y, words, 0)
    got = iter(words.reshape(64, 64))
    t = np.arange(64)
    lane, base = t % 32, t - t % 32
    u = (t * 2654435761 % 2**32).astype(np.uint32)
    s = u.view(np.int32)
    half = lane // 16

    def same(want: np.ndarray) -> None:
        found = next(got)
        want = np.asarray(want)
        want = want.view(np.uint32) if want.dtype.itemsize == 4 else want.astype(np.uint32)
        np.testing.assert_array_equal(found, np.broadcast_to(want, 64))

    def grouped(values: np.ndarray, fold: Callable[..., np.ndarray], width: int) -> np.ndarray:
        return np.repeat(fold(values.reshape(-1, width), axis=1), width)

    same(u[base + 5])
    same(u[t - t % 8 + (t + 3) % 8])
    same(u[np.where(lane >= 3, t - 3, t)])
    same(u[np.where(t % 8 >= 1, t - 1, t)])
    same(u[np.where(lane + 5 < 32, t + 5, t)])
    same(u[np.where(t % 16 + 2 < 16, t + 2, t)])
    same(u[base + (lane ^ 21)])
    # Of another segment of 8, which may be read only below the own one's end.
    same(u[np.where((lane ^ 9) < lane - lane % 8 + 8, base + (lane ^ 9), t)])
    ballot = grouped((s > 0) * (1 << lane), np.sum, 32)
    same(ballot)
    same(ballot & np.where(half == 0, 0xFFFF, 0xFFFF0000))
    same(np.ones(64, np.uint32))
    same((t < 32).astype(np.uint32))
    same(grouped(u.astype(np.uint64), np.sum, 32) % 2**32)
    same(grouped(u, np.min, 16))
    same(grouped(s, np.min, 16))
    same(grouped(u, np.max, 32))
    same(grouped(s, np.max, 32))
    same(np.uint32(1))
    same(np.uint32(0))
    same(np.uint32((s > 0).sum()))
    same(np.array([int(v).bit_count() for v in u], np.uint32))
    same(np.array([32 - int(v).bit_length() for v in u], np.uint32))
    same(np.array([(int(v) & -int(v)).bit_length() for v in u], np.uint32))
    same(np.array([int(f"{v:032b}"[::-1], 2) for v in u], np.uint32))
    same(np.array([int(v) * 3000000019 >> 32 for v in u], np.uint32))
    same(np.array([64 - int(v).bit_length() for v in u], np.uint32))
    same(np.array([(int(v) * 4294967297 % 2**64).bit_count() for v in u], np.uint32))
    z = x[:64]
    same((z.astype(np.float64) ** 2 - 1).astype(np.float32))
    same(np.float32(1) / z)
    same(np.sqrt(z))
    same((np.minimum(u, 7) + np.maximum(t, 9)).astype(np.uint32))
    same(np.uint32(0))
    assert words[64 * 41 : 64 * 41 + 2].view(np.int64)[0] == -5
    np.testing.assert_array_equal(words[64 * 42 :][:10], [9, 10, 15, 20, 20, 6, 0, 1, 13, 5])


# Without this package, and so without torch: a process under ASan imports slowly.
ASAN_SCRIPT = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import simt
layer = simt.Selftest(pathlib.Path(sys.argv[2]))
x = np.arange(1000, dtype=np.float32) + 1
for kernel, bug in ((name, int(bug)) for name, bug in (word.split(":") for word in sys.argv[3:])):
    for seed in (0, 1, 2):
        layer.configure(seed=seed)
        layer.run(kernel, x.copy(), np.zeros(4096, np.float32), np.zeros(4096, np.uint32), bug)
print("clean")
"""


@pytest.fixture(scope="module")
def asan() -> Callable[..., subprocess.CompletedProcess[str]]:
    reason = simt.missing()
    environment = None if reason else simt.asan_environment()
    if environment is None:
        skip_or_fail("simt", reason or "g++ has no sanitizer libraries")
    here, path = Path(__file__).parent, simt.build_selftest("asan")

    def run(*kernels: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", ASAN_SCRIPT, str(here), str(path), *kernels],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def test_sanitizers_are_clean_on_correct_kernels(
    asan: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = asan(*(f"{kernel}:0" for kernel in CORRECT))
    assert done.returncode == 0 and done.stdout.strip() == "clean", done.stderr


@pytest.mark.parametrize(
    ("planted", "expected"),
    [
        ("sum:6", "index 128 out of bounds"),
        ("same_value:3", "AddressSanitizer: use-after-poison"),
        ("sum:11", "AddressSanitizer: heap-buffer-overflow"),
        ("warp_memory:5", "AddressSanitizer: heap-buffer-overflow"),
        ("copy:2", "misaligned address"),
    ],
)
def test_sanitizers_find_planted_bugs(
    asan: Callable[..., subprocess.CompletedProcess[str]], planted: str, expected: str
) -> None:
    done = asan(planted)
    assert done.returncode != 0 and expected in done.stderr, done.stderr
