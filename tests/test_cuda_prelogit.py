"""csrc/cuda/{prelogit,control,philox}.cu, run by the SIMT layer: the bits of the CPU kernels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import simt
import torch
from cases import DTYPES, generator
from conftest import skip_or_fail
from torch import Tensor

SIGMA = 0.37


@dataclass(frozen=True)
class Schedule:
    """A build of the kernels, and how their threads take turns."""

    mode: str
    seed: int = 0
    preempt: float = 0.0

    def __str__(self) -> str:
        return f"{self.mode}-{self.seed}"


SCHEDULES = (
    Schedule("plain"),
    Schedule("plain", 5),
    Schedule("hooks", 1),
    Schedule("hooks", 2, 0.01),
)


class Kernels:
    """Operators by the CUDA kernels and by the CPU kernels, compared."""

    def __init__(self, schedule: Schedule) -> None:
        self.layer = simt.kernels(schedule.mode)
        self.layer.configure(seed=schedule.seed, preempt=schedule.preempt)
        self.checked = schedule.mode == "hooks"

    def check(self, name: str, *args: Any) -> list[Tensor]:
        """The outputs, the same bits by both."""
        want = getattr(torch.ops.tta_ext, name)(*args)
        found = self.layer(name, *args)
        assert_same((want,) if isinstance(want, Tensor) else want, found)
        return list(found)

    def check_out(self, name: str, args: tuple[Any, ...], outputs: dict[str, Tensor]) -> None:
        """The same for outputs that hold something, or are inputs too."""
        copies = {label: x.clone() for label, x in outputs.items()}
        own = {id(x): copies[label] for label, x in outputs.items()}
        swapped = tuple(own.get(id(x), x) for x in args)
        getattr(torch.ops.tta_ext, name).out(*swapped, **copies)
        read = [x for x in args if isinstance(x, Tensor) and id(x) not in own]
        for tensors, writable in ((read, False), (outputs.values(), True)):
            for x in tensors:
                size = x.numel() * x.element_size()
                self.layer.add_buffer(x.data_ptr(), size, writable, "argument")
        getattr(self.layer.ops, name).out(*args, **outputs)
        self.layer.clear_buffers()
        assert_same(copies.values(), outputs.values())


def assert_same(want: Iterable[Tensor], found: Iterable[Tensor]) -> None:
    """The same bits, where all NaNs are one."""
    for a, b in zip(want, found, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if a.is_floating_point():
            assert torch.equal(a.isnan(), b.isnan())
            raw = {2: torch.int16, 4: torch.int32}[a.element_size()]
            a, b = (x.contiguous().view(raw).masked_fill(x.isnan(), 0) for x in (a, b))
        assert torch.equal(a, b), f"{int((a != b).sum())} of {a.numel()} differ"


@pytest.fixture(params=SCHEDULES, ids=str)
def kernels(request: pytest.FixtureRequest, native: None) -> Kernels:
    reason = simt.missing()
    if reason:
        skip_or_fail("simt", reason)
    return Kernels(request.param)


def index(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def number(value: int) -> Tensor:
    """A value that the host knows; index(value) lies in device memory."""
    return torch.tensor(value, dtype=torch.int64)


def shifted(x: Tensor, by: int = 1) -> Tensor:
    """A copy whose start is not aligned to four elements."""
    base = torch.zeros(x.numel() + by, dtype=x.dtype)
    base[by:] = x.reshape(-1)
    return base[by:].view(x.shape)


def awkward(*shape: int, seed: int) -> Tensor:
    """Normals with zeros of both signs and subnormal numbers among them."""
    x = torch.randn(*shape, generator=generator(seed))
    flat = x.view(-1)
    flat[3::53], flat[5::61], flat[7::71] = 0.0, -0.0, -1e-40
    return x


# ---- prelogit_perturb, normal, philox ------------------------------------------------------------

P, TAU = 2, 3
STEP, ROW = index(1, 0, TAU, 2, -1), index(1, 0, 0, 1, 1)
SEQUENCE, ROLLOUT = index(7, 2**32 - 1, 0, 1, 5), index(0, 65535, 3, 9, 1)


def perturb_arguments(hidden: Tensor, mean: Tensor, sigma: float = SIGMA) -> tuple[Any, ...]:
    n = len(hidden)
    per_row = (STEP[:n], ROW[:n], SEQUENCE[:n], ROLLOUT[:n])
    return (hidden, mean, *per_row, 4095, sigma, index(-(2**62) - 5), False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 3, 4, 127, 130, 256, 1028, 4096, 4100, 8190, 8192])
def test_perturb(d: int, dtype: torch.dtype, kernels: Kernels) -> None:
    n = 5 if d < 1000 else 2
    mean = awkward(P, TAU, d, seed=d)
    wide = awkward(n, d + 4, seed=d + 1).to(dtype)
    hidden = wide[:, :d].contiguous()
    kernels.check("prelogit_perturb", *perturb_arguments(hidden, mean))
    if d > 300 and kernels.checked:
        return
    kernels.check("prelogit_perturb", *perturb_arguments(hidden, mean, 0.0))
    kernels.check("prelogit_perturb", *perturb_arguments(wide[:, :d], mean))
    kernels.check("prelogit_perturb", *perturb_arguments(wide[:, 1 : d + 1], mean))
    kernels.check("prelogit_perturb", *perturb_arguments(hidden, shifted(mean)))


def test_perturb_by_numbers_of_the_host(kernels: Kernels) -> None:
    hidden, mean = torch.randn(3, 40, generator=generator(1)), awkward(P, TAU, 40, seed=2)
    numbers = (number(2), number(1), number(2**32 - 1))
    kernels.check(
        "prelogit_perturb", hidden, mean, *numbers, index(4, 5, 6), 3, SIGMA, number(-3), True
    )
    kernels.check(
        "prelogit_perturb", hidden[:0], mean, *numbers, number(4), 3, SIGMA, number(-3), True
    )


@pytest.mark.parametrize("d", [37, 4100])
def test_perturb_adds_to_dot_and_may_write_hidden(d: int, kernels: Kernels) -> None:
    hidden, mean = torch.randn(3, d, generator=generator(1)), awkward(P, TAU, d, seed=2)
    dot = torch.tensor([1.5, -0.0, 1e6])
    args = perturb_arguments(hidden, mean)
    kernels.check_out("prelogit_perturb", args, {"out": hidden, "dot": dot})
    assert dot[0] != 1.5
    assert dot[2] == 1e6  # beyond the horizon


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_perturb_rounds_to_nearest_even(dtype: torch.dtype, kernels: Kernels) -> None:
    """u alone, in every exponent and with all kinds of low bits, cast to hidden's dtype."""
    raw = torch.randint(-(2**31), 2**31, (1, 3, 1024), generator=generator(8)).to(torch.int32)
    raw[:, 1] &= -0x1000  # ties of float16 and bfloat16, more often than chance would make them
    raw[:, 2] &= -0x8000
    hidden = torch.zeros(3, 1024, dtype=dtype)
    kernels.check(
        "prelogit_perturb",
        hidden,
        raw.view(torch.float32),
        index(0, 1, 2),
        number(0),
        number(1),
        number(0),
        0,
        0.0,
        number(5),
        False,
    )


@pytest.mark.parametrize("n", [0, 1, 4, 1023, 4099])
def test_normal_and_philox(n: int, kernels: Kernels) -> None:
    kernels.check("normal", n, index(-7), 2**32 - 1, 3, 4095, 65535)
    kernels.check("normal", n, number(2**40), 0, 0, 0, 0)
    words = torch.randint(-(2**40), 2**40, (n, 4), generator=generator(n))
    kernels.check("philox", words, index(2**40 + 77, -1))
    kernels.check("philox", shifted(words), index(-1, 2**32))


# ---- importance_weights --------------------------------------------------------------------------

SCALES = ((0.7, 0.9, SIGMA), (0.0, 0.5, SIGMA), (0.01, 0.0, 0.0), (5e-324, 1.0, 1.0))
REWARDS = ("random", "impossible", "ties", "zeros", "nan", "inf", "none", "dot", "norm2")


def weights_case(n: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    g = generator(n)
    reward, dot = torch.randn(3, n, generator=g), torch.randn(3, n, generator=g)
    norm2 = torch.rand(3, n, generator=g)
    if kind == "impossible":
        reward[:, 1::3] = -torch.inf
    elif kind == "ties":
        reward = reward.round()
    elif kind == "zeros":
        reward = torch.where(reward > 1, -1.0, reward.sign() * 0.0)
    elif kind in ("nan", "inf"):
        reward[1, n // 2] = float(kind)
        dot[2, 0] = torch.nan
    elif kind == "none":
        reward[2] = -torch.inf
    elif kind == "dot":
        dot[1, -1], norm2[1, 0] = torch.inf, torch.nan
    elif kind == "norm2":
        norm2[0, n // 2] = -torch.inf
    return reward, dot, norm2


@pytest.mark.parametrize("kind", REWARDS)
@pytest.mark.parametrize("n", [1, 2, 5, 32, 33, 256, 700, 3000])
def test_weights(n: int, kind: str, kernels: Kernels) -> None:
    if n > 300 and kernels.checked and kind != "random":
        return
    case = weights_case(n, kind)
    for scales in SCALES:
        kernels.check("importance_weights", *case, *scales, False)
    strided = tuple(torch.cat([x, x], 1)[:, :n] for x in case)
    kernels.check("importance_weights", *strided, 0.7, 0.9, SIGMA, False)


def test_weights_of_the_most_rollouts(kernels: Kernels) -> None:
    if not kernels.checked:
        case = weights_case(1 << 16, "random")
        kernels.check("importance_weights", *case, 0.5, 0.9, SIGMA, True)


# A grid has 65535 lines of blocks, one for a row or a prompt; more of them take further launches.
MANY = 65535 + 3


def many(op: str) -> tuple[Any, ...]:
    """Arguments for more rows or prompts than a grid has lines."""
    ids, x = torch.arange(MANY), torch.randn(MANY, 1, generator=generator(MANY))
    if op == "prelogit_perturb":
        per_row = (ids % (TAU + 1), ids % P, ids, ids % 65536)
        return (x, awkward(P, TAU, 1, seed=3), *per_row, 3, SIGMA, number(5), False)
    if op == "importance_weights":
        return (x, x, x.abs(), 0.0, 0.9, SIGMA, False)
    return (x[:, :, None].contiguous(), x, None, number(5), ids, 3, SIGMA, 0, 1, False, False)


@pytest.mark.parametrize(
    "op",
    [
        "prelogit_perturb",
        "control_update",
        pytest.param("importance_weights", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kernels", SCHEDULES[:1], indirect=True, ids=str)
def test_more_rows_than_a_grid_has_lines(op: str, kernels: Kernels) -> None:
    kernels.check(op, *many(op))


@pytest.mark.parametrize("kind", ["nan", "inf", "none", "dot", "norm2"])
def test_bad_rows_of_the_weights_have_one_name(kind: str, kernels: Kernels) -> None:
    args = (*weights_case(9, kind), 0.7, 0.9, SIGMA, True)
    names = []
    for run in (torch.ops.tta_ext.importance_weights, partial(kernels.layer, "importance_weights")):
        with pytest.raises(RuntimeError, match="invalid row") as error:
            run(*args)
        names.append(str(error.value).partition("invalid row")[2].splitlines()[0])
    assert names[0] == names[1]


# ---- control_update, control_merge ---------------------------------------------------------------


def update_case(p: int, tau: int, d: int, n: int, zeros: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, weights and lengths: zero, subnormal and negative weights, rollouts of all lengths."""
    g = generator(1000 * n + d)
    weights = torch.randn(p, n, generator=g)
    weights[:, 5::7] = 1e-42
    weights[torch.rand(p, n, generator=g) < zeros] = 0.0
    length = torch.randint(0, tau + 2, (p, n), generator=g)
    return awkward(p, tau, d, seed=n), weights, length


def padded(n: int) -> int:
    return 1 << (n - 1).bit_length()


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 31, 32, 33, 100, 257])
def test_update(n: int, kernels: Kernels) -> None:
    for d in (1, 4, 130, 260):
        if n > 40 and d > 4 and kernels.checked:
            continue
        for zeros in (0.0, 0.5, 0.97):
            mean, weights, length = update_case(2, 3, d, n, zeros)
            tail = (index(99), index(2**32 - 1, 3), 4095, SIGMA, 0, padded(n), False, True)
            kernels.check("control_update", mean, weights, length, *tail)
            kernels.check("control_update", mean, weights, None, *tail)
        kernels.check("control_update", shifted(mean), weights, None, *tail)


@pytest.mark.parametrize("n", [1, 6, 37, 300])
def test_shards(n: int, kernels: Kernels) -> None:
    """Every aligned range of at least a sixteenth, those behind the last rollout included."""
    mean, weights, length = update_case(2, 2, 6, n, 0.3)
    size = 2 * padded(n)
    while size >= 1 and size >= padded(n) // 16:
        parts = []
        for start in range(0, 2 * padded(n), size):
            tail = (number(-2), index(0, 9), 0, SIGMA, start, start + size, True, True)
            parts += kernels.check("control_update", mean, weights, length, *tail)
        kernels.check("control_merge", mean, torch.stack(parts), SIGMA)
        size //= 2


@pytest.mark.parametrize(("tau", "n"), [(1, 5000), (1, 65536), (2200, 9)])
def test_update_of_many(tau: int, n: int, kernels: Kernels) -> None:
    """Many rollouts: a deep tree. Many tasks: a warp has all rollouts of its own."""
    if kernels.checked:
        n, tau = min(n, 2500), min(tau, 1200)
    mean, weights, length = update_case(1, tau, 4, n, 0.6)
    tail = (number(4), number(1), 7, SIGMA, 0, padded(n), False, True)
    kernels.check("control_update", mean, weights, length, *tail)


def test_update_at_the_limits(kernels: Kernels) -> None:
    mean, weights, _ = update_case(2, 3, 37, 12, 0.0)
    tail = (index(99), index(1, 2), 0, SIGMA, 0, 16, False, False)
    one_hot = torch.zeros(2, 12)
    one_hot[0, 11] = one_hot[1, 4] = 1.0
    kernels.check("control_update", mean, one_hot, None, *tail)
    (same,) = kernels.check("control_update", mean, torch.zeros(2, 12), None, *tail)
    assert torch.equal(same, mean)
    no_noise = (*tail[:3], 0.0, *tail[4:])
    kernels.check("control_update", mean, weights, None, *no_noise)
    kernels.check("control_update", mean, weights, None, *no_noise[:-2], True, False)
    weights[1, 7] = torch.nan
    (bad,) = kernels.check("control_update", mean, weights, None, *tail)
    assert bad[1].isnan().all()
    assert not bad[0].isnan().any()
    huge = torch.full((2, 12), 3e38)
    kernels.check("control_update", mean, huge, None, *tail)
    args = (mean, one_hot, None, *tail)
    kernels.check_out("control_update", args, {"out": mean})


@pytest.mark.parametrize("shards", [1, 2, 4, 8, 16, 64, 256])
def test_merge(shards: int, kernels: Kernels) -> None:
    for d in (1, 4, 300):
        mean = awkward(1, 2, d, seed=d)
        partials = awkward(shards, 1, 2, d, seed=shards)
        kernels.check("control_merge", mean, partials, SIGMA)
        kernels.check("control_merge", shifted(mean), partials, SIGMA)
        kernels.check("control_merge", mean, partials, 0.0)
