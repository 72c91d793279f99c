"""CUDA operators through PyTorch: every call gives the bits of the CPU call, and errors its words.

Runs on a GPU, and (slowly) on a fake device that executes the kernels' PTX, which has none of
torch's own kernels: tensors are made on the CPU, copied, and compared on the CPU.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from cases import DTYPES, generator, operator_arguments, operator_outputs
from conftest import skip_or_fail
from test_bits import FAMILIES, inputs, spread
from torch import Tensor

import tta_ext
from tta_ext import dispatch, ops, schemas
from tta_ext.schemas import OPS

pytestmark = [pytest.mark.requires_cuda, pytest.mark.usefixtures("native")]

# The fake device captures no graphs and runs about 1e8 instructions a second.
FAKE = "PTXEMU_PTX" in os.environ
VOCABULARIES = (1, 37, 4096, 9001) if FAKE else (1, 37, 4096, 20011, 128256)

names = pytest.mark.parametrize("name", sorted(OPS))

#: Arguments of one element that may stay on the CPU beside CUDA tensors.
FREE = {"seed", "param", "position", "sequence", "rollout", "capacity", "step", "row", "key"}


@pytest.fixture(autouse=True)
def _library(_cuda_requirement: None) -> None:
    reason = dispatch.native_status("cuda")
    if reason:
        skip_or_fail("cuda", f"no CUDA library: {reason}")


def on_device(tensor: Tensor) -> Tensor:
    """A copy on the device with the same strides and offset, the gaps between rows included."""
    storage = tensor.untyped_storage()
    count = len(storage) // tensor.element_size()
    whole = tensor.detach().as_strided((count,), (1,), 0).to("cuda")
    return whole.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def moved(name: str, arguments: Sequence[Any], free: bool) -> list[Any]:
    """The arguments of an operator on the device; small ones stay on the CPU if ``free``."""
    schema = getattr(torch.ops.tta_ext, name).default._schema

    def stays(argument: Any, value: Tensor) -> bool:
        return free and argument.name in FREE and (value.numel() == 1 or argument.name == "key")

    return [
        on_device(value) if isinstance(value, Tensor) and not stays(argument, value) else value
        for argument, value in zip(schema.arguments, arguments, strict=True)
    ]


def assert_same(want: Tensor, found: Tensor, what: str) -> None:
    """The same bits; all NaNs count as one."""
    found = found.cpu()
    assert (want.dtype, want.shape) == (found.dtype, found.shape), what
    if want.is_floating_point():
        missing = want.isnan()
        assert torch.equal(missing, found.isnan()), what
        raw = {2: torch.int16, 4: torch.int32, 8: torch.int64}[want.element_size()]
        want, found = (t.contiguous().view(raw).masked_fill(missing, 0) for t in (want, found))
    assert torch.equal(want, found), (
        f"{what}: {int((want != found).sum())} of {want.numel()} differ"
    )


class Mirror:
    """Repeats CPU calls of operators on the device and compares what they write."""

    def __init__(self) -> None:
        self.calls = 0

    def wrapped(self, op: dispatch.Op) -> Callable[..., None]:
        original = op.out

        def run(*args: Any, **outputs: Tensor) -> None:
            free = self.calls % 2 == 0
            there = moved(op.name, args, free)
            written = {name: t.clone().to("cuda") for name, t in outputs.items()}
            original(*args, **outputs)
            getattr(torch.ops.tta_ext, op.name).out(*there, **written)
            for name, want in outputs.items():
                assert_same(want, written[name], f"{op.name}.{name} of {list(want.shape)}")
            self.calls += 1

        return run


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    """Every call of a public operator on CPU tensors is repeated on the device."""
    made = Mirror()
    modules = {getattr(ops, name).__module__ for name in ops.__all__}
    for module in modules:
        for value in vars(__import__(module, fromlist=["_"])).values():
            if isinstance(value, dispatch.Op):
                monkeypatch.setattr(value, "out", made.wrapped(value))
    with tta_ext.use_backend("cpu"):
        yield made
    assert made.calls, "nothing was compared"


# ---------------------------------------------------------------------------- every operator


def test_every_operator_has_a_kernel() -> None:
    assert [name for name in OPS if not dispatch.has_kernel(name, "cuda")] == []
    assert torch.ops.tta_ext.cuda_version() == schemas.NATIVE_VERSION


@names
@pytest.mark.parametrize("free", [True, False], ids=["host-scalars", "device-scalars"])
@pytest.mark.parametrize("check", [True, False], ids=["check", "no-check"])
def test_operator(name: str, check: bool, free: bool) -> None:
    arguments = list(operator_arguments(name))
    if "bool check" in OPS[name].arguments:
        arguments[-1] = check
    elif check:
        pytest.skip("the operator has no check")
    outputs = operator_outputs(name, tuple(arguments))
    written = {key: t.to("cuda") for key, t in outputs.items()}
    getattr(torch.ops.tta_ext, name).out(*arguments, **outputs)
    getattr(torch.ops.tta_ext, name).out(*moved(name, arguments, free), **written)
    for key, want in outputs.items():
        assert_same(want, written[key], key)


@names
def test_empty_batch(name: str) -> None:
    if name in ("philox", "normal", "importance_weights", "control_merge", "control_update"):
        pytest.skip("rows of these are no batch of logits")
    arguments = [
        value[:0]
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == 3
        else value[:, :0]
        if isinstance(value, Tensor) and value.dim() == 3 and value.shape[1] == 3 and "impl" in name
        else value
        for value in operator_arguments(name)
    ]
    outputs = {key: t.to("cuda") for key, t in operator_outputs(name, tuple(arguments)).items()}
    getattr(torch.ops.tta_ext, name).out(*moved(name, arguments, True), **outputs)


# ---------------------------------------------------------------------------- the case grid


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_family(mirror: Mirror, family: str, vocabulary: int, dtype: torch.dtype) -> None:
    turn = VOCABULARIES.index(vocabulary) + DTYPES.index(dtype)
    content = ("model", "ties", "impossible", "peaked")[turn % 4]
    batch = 2 if vocabulary > 4096 else 3
    FAMILIES[family](*inputs(vocabulary, dtype, content, batch=batch))


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize(("offset", "dtype"), list(zip((1, 3, 3), DTYPES, strict=True)))
def test_strides(mirror: Mirror, family: str, offset: int, dtype: torch.dtype) -> None:
    """Rows that start at any element, further apart than they are long."""
    base, proxy, ids = inputs(4099, dtype, "ties", batch=2)
    FAMILIES[family](spread(base, offset), spread(proxy, offset + 1), ids)


def prelogit_outputs(dtype: torch.dtype, dim: int, rows: int, n: int) -> None:
    g = generator(dim + rows)
    prompts, tau = 2, 3
    mean = torch.randn(prompts, tau, dim, generator=g)
    ids = torch.arange(rows)
    hidden = torch.randn(rows, dim, generator=g).to(dtype)
    common: dict[str, Any] = {"iteration": 2, "sigma": 0.7, "seed": -9}
    per_row = {"row": ids % prompts, "sequence": ids // 2, "rollout": ids % n}
    dot = torch.randn(rows, generator=g)
    ops.prelogit_perturb(hidden, mean, step=ids % tau, dot=dot, **per_row, **common)
    ops.prelogit_perturb(hidden, mean, step=1, **per_row, **common)
    reward, norm2 = (torch.randn(prompts, n, generator=g) for _ in range(2))
    for lam in (0.3, 0.0):
        weights, _ = ops.importance_weights(
            reward, reward * 0.1, norm2.abs(), lam=lam, alpha=0.9, sigma=0.7
        )
    update: dict[str, Any] = {**common, "sequence": torch.arange(prompts)}
    ops.control_update(mean, weights, **update)
    length = torch.randint(0, tau + 1, (prompts, n), generator=g)
    half = 1 << max(0, (n - 1).bit_length() - 1)
    parts = [
        ops.control_update(mean, weights, length=length, rollouts=(a, a + half), **update)
        for a in (0, half)
        if a < n
    ]
    if len(parts) == 2:
        ops.control_merge(mean, torch.stack(parts), 0.7)
    ops.normal(dim, seed=5, step=7, sequence=3, iteration=2, rollout=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("dim", "rows", "n"), [(1, 1, 1), (6, 5, 3), (576, 4, 8), (4101, 2, 33)])
def test_prelogit(mirror: Mirror, dtype: torch.dtype, dim: int, rows: int, n: int) -> None:
    prelogit_outputs(dtype, dim, rows, n)


def test_philox(mirror: Mirror) -> None:
    counter = torch.randint(-(2**31), 2**32, (1031, 4), generator=generator(3))
    ops.philox(counter, torch.tensor([0xFFFFFFFF, 5]))


# ---------------------------------------------------------------------------- bad input


KEY: dict[str, Any] = {"seed": 1, "position": 0, "sequence": 0}


def bad_rows(value: float) -> Tensor:
    logits = torch.randn(4, 5000, generator=generator(1))
    logits[1] = value
    logits[3, 4999] = torch.nan
    return logits


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_bad_rows_are_named(value: float) -> None:
    """The first one, in the words of the CPU; without check token -1, and nothing waits."""
    good, bad = torch.randn(4, 5000, generator=generator(2)), bad_rows(value)
    for base, proxy in ((bad, good), (good, bad), (bad, bad)):
        on_gpu = base.to("cuda"), proxy.to("cuda")
        with pytest.raises(ValueError) as want:
            ops.deferral_mask(base, proxy, check=True, rule="confidence_bet", param=0.1)
        with pytest.raises(ValueError) as found:
            ops.deferral_mask(*on_gpu, check=True, rule="confidence_bet", param=0.1)
        assert str(found.value) == str(want.value)
    tokens = ops.categorical_sample(bad.to("cuda"), check=False, **KEY).cpu()
    assert (tokens == -1).tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("call", "numbers"),
    [
        (
            lambda x, i: ops.categorical_sample(x, seed=1, position=i, sequence=0, check=True),
            torch.tensor([4, 3, -1, 0]),
        ),
        (
            lambda x, i: ops.deferral_mask(x, rule="knapsack", param=i, check=True),
            torch.tensor([0.1, -0.5, 0.2, -1.0], dtype=torch.float64),
        ),
        (
            lambda x, i: ops.greedy_knapsack(x, x, i, check=True),
            torch.tensor([0.1, 0.3, 0.2, torch.nan], dtype=torch.float64),
        ),
    ],
    ids=["position", "param", "capacity"],
)
def test_bad_numbers_are_named(call: Callable[[Tensor, Tensor], Any], numbers: Tensor) -> None:
    x = torch.rand(4, 50, generator=generator(2))
    with pytest.raises(ValueError) as want:
        call(x, numbers)
    with pytest.raises(ValueError) as found:
        call(x.to("cuda"), numbers.to("cuda"))
    assert str(found.value) == str(want.value)


def test_other_devices_are_refused() -> None:
    """At the level of torch.ops, behind the checks of the public functions."""
    arguments = list(operator_arguments("deferral_sample"))
    outputs = operator_outputs("deferral_sample", tuple(arguments))
    written = {key: t.to("cuda") for key, t in outputs.items()}
    there = moved("deferral_sample", arguments, False)
    out = torch.ops.tta_ext.deferral_sample.out
    with pytest.raises(RuntimeError, match="base_logits is not on a CUDA device"):
        out(arguments[0], *there[1:], **written)
    with pytest.raises(RuntimeError, match="proxy_logits is on another device than cuda:0"):
        out(there[0], arguments[1], *there[2:], **written)
    with pytest.raises(RuntimeError, match="token is on another device than cuda:0"):
        out(*there, **outputs)


# ---------------------------------------------------------------------------- streams and graphs


def test_another_stream() -> None:
    """Counters and scratch memory belong to the stream."""
    x = torch.randn(3, 9001, generator=generator(4))
    want = ops.categorical_sample(x, **KEY)
    there = x.to("cuda")
    torch.cuda.synchronize()
    for _ in range(3):
        with torch.cuda.stream(torch.cuda.Stream()):
            found = ops.categorical_sample(there, **KEY)
        torch.cuda.synchronize()
        assert torch.equal(found.cpu(), want)


def test_more_streams_than_are_remembered() -> None:
    """Of streams that the caller makes and ends, as a server may for each request."""
    runtime = torch.cuda.cudart()
    x = torch.randn(3, 37, generator=generator(4))
    want, there = ops.categorical_sample(x, **KEY), x.to("cuda")
    torch.cuda.synchronize()
    for _ in range(300):
        handle = ctypes.c_void_p()
        assert int(runtime.cudaStreamCreate(ctypes.addressof(handle))) == 0
        with torch.cuda.stream(torch.cuda.ExternalStream(handle.value)):
            found = ops.categorical_sample(there, **KEY)
        torch.cuda.synchronize()
        assert torch.equal(found.cpu(), want)
        assert int(runtime.cudaStreamDestroy(handle.value)) == 0


needs_graphs = pytest.mark.skipif(FAKE, reason="the fake device captures no graphs")

#: Rows of many tiles, whose blocks hand over through counters and scratch memory.
WIDTHS = {37: 20011, 6: 4101}


class Graph:
    """A captured call of an operator, whose tensors get other contents between replays."""

    def __init__(self, name: str, pool: Any = None, **changes: Any) -> None:
        self.name = name
        labels = [argument.split()[1] for argument in OPS[name].arguments.split(", ")]
        self.arguments = [
            False if label == "check" else changes.get(label, self.widened(value, place))
            for place, (label, value) in enumerate(
                zip(labels, operator_arguments(name), strict=True)
            )
        ]
        self.outputs = operator_outputs(name, tuple(self.arguments))
        self.there = moved(name, self.arguments, False)
        self.written = {key: t.to("cuda") for key, t in self.outputs.items()}
        self.call()  # what is made once shall not be made while capturing
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.call()

    @staticmethod
    def widened(value: Any, seed: int) -> Any:
        """Logits, weights and hidden rows with the lengths of :data:`WIDTHS`."""
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[-1] not in WIDTHS:
            return value
        shape = (*value.shape[:-1], WIDTHS[value.shape[-1]])
        return torch.rand(shape, generator=generator(seed)).mul_(4)

    def call(self) -> None:
        getattr(torch.ops.tta_ext, self.name).out(*self.there, **self.written)

    def check(self, turn: int) -> None:
        """New contents in the captured tensors, a replay, and the bits of the CPU."""
        for place, (old, there) in enumerate(zip(self.arguments, self.there, strict=True)):
            if not isinstance(old, Tensor):
                continue
            if old.numel() > 1:
                changed = old.roll(turn) if old.dim() == 1 else old.roll(1009 * turn, -1)
            else:
                changed = old + (0.01 if old.is_floating_point() else 1) * turn
            self.arguments[place] = changed
            there.copy_(changed)
        for key, there in self.written.items():
            there.copy_(self.outputs[key])
        getattr(torch.ops.tta_ext, self.name).out(*self.arguments, **self.outputs)
        self.graph.replay()
        for key, want in self.outputs.items():
            assert_same(want, self.written[key], f"{self.name}.{key} of replay {turn}")


#: Each operator, and calls that take another way: a copy instead of a kernel, no draws.
CAPTURED: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in sorted(OPS)),
    *((name, {"sigma": 0.0}) for name in ("control_merge", "control_update")),
    *((name, {"do_sample": False}) for name in ("deferral_propose", "deferral_sample")),
    *((name, {"do_sample": False}) for name in ("deferral_verify", "implicit_reward_sample")),
]


@needs_graphs
@pytest.mark.parametrize(
    ("name", "changes"), CAPTURED, ids=["-".join((name, *changes)) for name, changes in CAPTURED]
)
def test_graph(name: str, changes: dict[str, Any]) -> None:
    """Captured once, replayed with other numbers in the same tensors."""
    graph = Graph(name, **changes)
    for turn in range(4):
        graph.check(turn)


@needs_graphs
@pytest.mark.parametrize(
    ("first", "second"),
    [("deferral_verify", "greedy_knapsack"), ("categorical_sample", "deferral_mask")],
)
def test_graphs_of_one_pool(first: str, second: str) -> None:
    """Scratch memory and counters of one may lie where the other's did; calls go on between."""
    pool = torch.cuda.graph_pool_handle()
    graphs = [Graph(name, pool) for name in (first, second, first)]
    for turn in range(3):
        for graph in (*graphs, *reversed(graphs)):
            graph.check(turn)
            graph.call()


@needs_graphs
def test_graph_refuses_check() -> None:
    x = torch.randn(3, 37, generator=generator(4)).to("cuda")
    with (
        pytest.raises(RuntimeError, match="pass check=False"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        ops.categorical_sample(x, check=True, **KEY)
