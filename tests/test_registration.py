"""Operators as PyTorch sees them: schemas, opcheck, fake kernels, compile, export, import cost."""

from __future__ import annotations

import doctest
import importlib
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from cases import operator_arguments, operator_outputs
from torch._subclasses.fake_tensor import FakeTensorMode

import tta_ext
from tta_ext import dispatch, ops, schemas
from tta_ext.schemas import OPS

RULE = "Tensor param, int rule, int critical, float temperature, float rule_temperature"
KEY = (
    "Tensor seed, Tensor position, Tensor sequence, SymInt iteration, Tensor rollout, "
    "bool do_sample"
)
MODELS = "Tensor base_logits, Tensor expert_logits, Tensor? anti_logits, Tensor beta"

# Compiled libraries are built against these: whoever changes one increases NATIVE_VERSION.
FROZEN_VERSION = 1
FROZEN = {
    "deferral_mask": (
        f"(Tensor base_logits, Tensor? proxy_logits, {RULE}, bool check) -> "
        "(Tensor mask, Tensor critical_index, Tensor fraction)"
    ),
    "deferral_probs": (f"(Tensor base_logits, Tensor proxy_logits, {RULE}, bool check) -> Tensor"),
    "deferral_stats": (
        f"(Tensor base_logits, Tensor? proxy_logits, {RULE}, bool check) -> "
        "(Tensor deferred_mass, Tensor critical_index, Tensor cut_logit, Tensor used)"
    ),
    "deferral_propose": (
        f"(Tensor base_logits, {RULE}, {KEY}, bool check) -> (Tensor token, Tensor deferred)"
    ),
    "deferral_sample": (
        f"(Tensor base_logits, Tensor proxy_logits, {RULE}, {KEY}, bool check) -> "
        "(Tensor token, Tensor deferred)"
    ),
    "deferral_verify": (
        "(Tensor base_logits, Tensor proxy_logits, Tensor draft, Tensor draft_length, "
        f"{RULE}, {KEY}, bool return_mass, bool check) -> "
        "(Tensor accepted, Tensor token, Tensor deferred, Tensor mass)"
    ),
    "implicit_reward_probs": f"({MODELS}, float temperature, bool check) -> Tensor",
    "implicit_reward_sample": f"({MODELS}, float temperature, {KEY}, bool check) -> Tensor",
    "categorical_sample": (
        f"(Tensor logits, float temperature, {KEY}, int stream, SymInt draw, bool check) -> Tensor"
    ),
    "greedy_knapsack": (
        "(Tensor profit, Tensor weight, Tensor capacity, bool check) -> (Tensor selected, "
        "Tensor used, Tensor value, Tensor critical_index, Tensor upper_bound)"
    ),
    "prelogit_perturb": (
        "(Tensor hidden, Tensor mean, Tensor step, Tensor row, Tensor sequence, Tensor rollout, "
        "SymInt iteration, float sigma, Tensor seed, bool check) -> (Tensor out, Tensor dot)"
    ),
    "importance_weights": (
        "(Tensor reward, Tensor dot, Tensor norm2, float lam, float alpha, float sigma, "
        "bool check) -> (Tensor weights, Tensor ess)"
    ),
    "control_update": (
        "(Tensor mean, Tensor weights, Tensor? length, Tensor seed, Tensor sequence, "
        "SymInt iteration, float sigma, SymInt start, SymInt stop, bool partial, bool check) -> "
        "Tensor"
    ),
    "control_merge": "(Tensor mean, Tensor partials, float sigma) -> Tensor",
    "philox": "(Tensor counter, Tensor key) -> Tensor",
    "normal": (
        "(SymInt n, Tensor seed, SymInt step, SymInt sequence, SymInt iteration, "
        "SymInt rollout) -> Tensor"
    ),
}

names = pytest.mark.parametrize("name", sorted(OPS))


def test_schemas_are_frozen() -> None:
    found = {
        name: str(getattr(torch.ops.tta_ext, name).default._schema).partition(name)[2]
        for name in OPS
    }
    assert found == FROZEN
    assert schemas.NATIVE_VERSION == FROZEN_VERSION


@names
def test_out_schema_mirrors_functional(name: str) -> None:
    functional = getattr(torch.ops.tta_ext, name).default._schema
    out = getattr(torch.ops.tta_ext, name).out._schema
    shared = len(functional.arguments)
    inputs = [(a.name, str(a.type)) for a in out.arguments[:shared]]
    assert inputs == [(a.name, str(a.type)) for a in functional.arguments]
    extra = out.arguments[shared:]
    assert tuple(a.name for a in extra) == OPS[name].outputs
    assert all(a.kwarg_only and a.alias_info.is_write for a in extra)
    assert not out.returns


@names
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("overload", ["default", "out"])
def test_opcheck(name: str, overload: str, requires_grad: bool) -> None:
    arguments = operator_arguments(name, requires_grad=requires_grad)
    kwargs = operator_outputs(name, arguments) if overload == "out" else {}
    found = torch.library.opcheck(
        getattr(getattr(torch.ops.tta_ext, name), overload), arguments, kwargs
    )
    assert set(found.values()) == {"SUCCESS"}


@names
def test_outputs_never_require_grad(name: str) -> None:
    arguments = operator_arguments(name, requires_grad=True)
    result = getattr(torch.ops.tta_ext, name)(*arguments)
    results = result if isinstance(result, tuple) else (result,)
    outputs = operator_outputs(name, arguments)
    getattr(torch.ops.tta_ext, name).out(*arguments, **outputs)
    assert not any(t.requires_grad for t in (*results, *outputs.values()))
    for one, other in zip(results, outputs.values(), strict=True):
        assert torch.equal(one, other)


@names
def test_fake_matches_real(name: str) -> None:
    arguments = operator_arguments(name)
    real = getattr(torch.ops.tta_ext, name)(*arguments)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        fake = getattr(torch.ops.tta_ext, name)(*fakes)
    reals = real if isinstance(real, tuple) else (real,)
    for one, other in zip(reals, fake if isinstance(fake, tuple) else (fake,), strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


Call = tuple[Any, ...]


def _sample(seed: int, position: int, iteration: int, rollout: int) -> Call:
    base, proxy = torch.linspace(0, 3, 50)[None], torch.linspace(2, 0, 50)[None]
    return ops.deferral_sample(
        base,
        proxy,
        rule="knapsack",
        param=0.3,
        seed=seed,
        position=position,
        iteration=iteration,
        rollout=rollout,
    )


def _perturb(step: int, row: int, iteration: int, rollout: int) -> Call:
    hidden, mean = torch.zeros(2, 8), torch.ones(12, 20, 8)
    noise = ops.normal(8, seed=3, step=step, rollout=rollout)
    perturbed = ops.prelogit_perturb(
        hidden,
        mean,
        step=step,
        row=row,
        sequence=0,
        rollout=rollout,
        iteration=iteration,
        sigma=0.5,
        seed=1,
    )
    return noise, perturbed


def _count_graphs() -> tuple[list[torch.fx.GraphModule], Any]:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    return graphs, backend


@pytest.mark.parametrize("function", [_sample, _perturb])
@pytest.mark.parametrize("values", [range(12), range(1000, 4000, 250)], ids=["from zero", "large"])
def test_twelve_values_make_at_most_two_graphs(function: Any, values: range) -> None:
    torch._dynamo.reset()
    graphs, backend = _count_graphs()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for i, value in enumerate(values):
        arguments = (value, i, value, value + 7)
        _assert_same(compiled(*arguments), function(*arguments))
    assert len(graphs) <= 2


def test_seed_tensors_make_one_graph() -> None:
    torch._dynamo.reset()
    graphs, backend = _count_graphs()

    def run(seed: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        return ops.categorical_sample(torch.zeros(2, 999), seed=seed, position=position)

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for i in range(12):
        arguments = (torch.tensor(i), torch.tensor([i, i + 1]))
        assert torch.equal(compiled(*arguments), run(*arguments))
    assert len(graphs) == 1


def _everything(base: torch.Tensor, proxy: torch.Tensor, step: int) -> tuple[torch.Tensor, ...]:
    """One call of every public operator."""
    key: dict[str, Any] = {"seed": 5, "position": step}
    rule: dict[str, Any] = {"rule": "knapsack", "param": 0.3, "critical": "split"}
    b = base.shape[0]
    draft = proxy.argmax(-1, keepdim=True).expand(b, 2)
    lengths = draft.new_full((b,), 2)
    cube = torch.stack((base, base, base), 1)
    mean = torch.stack((base[:, :8], proxy[:, :8]), 1).contiguous()
    rollout = torch.arange(b)
    zeros = torch.zeros(b, b)
    weights = ops.importance_weights(zeros, zeros, zeros, lam=1.0, alpha=1.0, sigma=0.5)
    new = ops.control_update(mean, weights.w, sigma=0.5, seed=5, iteration=1)
    return (
        *ops.deferral_mask(base, **rule),
        ops.deferral_probs(base, proxy, **rule),
        *ops.deferral_stats(base, **rule),
        *ops.deferral_propose(base, **rule, **key),
        *ops.deferral_sample(base, proxy, **rule, **key),
        *ops.deferral_verify(cube, cube, draft, lengths, **rule, **key),
        ops.implicit_reward_probs(base, proxy[None], None, torch.ones(1)),
        ops.implicit_reward_sample(base, proxy[None], None, torch.ones(1), **key),
        ops.categorical_sample(base, **key),
        *ops.greedy_knapsack(base.abs(), proxy.abs(), 3.0),
        ops.prelogit_perturb(
            base[:, :8],
            mean,
            step=0,
            row=rollout,
            sequence=0,
            rollout=rollout,
            iteration=1,
            sigma=0.5,
            seed=5,
        ),
        new,
        ops.control_merge(mean, new[None].contiguous(), 0.5),
        ops.philox(torch.arange(8).reshape(2, 4), torch.arange(2)),
        ops.normal(10, seed=5, step=1),
    )


def _assert_same(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> None:
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_every_operator_compiles_without_graph_break(backend: str) -> None:
    if backend == "inductor":
        pytest.importorskip("torch._inductor")
    torch._dynamo.reset()
    base, proxy = torch.randn(3, 40), torch.randn(3, 40)
    compiled = torch.compile(_everything, fullgraph=True, backend=backend)
    _assert_same(compiled(base, proxy, 4), _everything(base, proxy, 4))


def test_out_form_compiles() -> None:
    torch._dynamo.reset()

    def run(base: torch.Tensor, proxy: torch.Tensor, out: ops.Proposal) -> torch.Tensor:
        ops.deferral_sample(base, proxy, rule="threshold", param=0.3, seed=1, position=2, out=out)
        return out.token + 0

    base, proxy = torch.randn(3, 40), torch.randn(3, 40)
    out = ops.Proposal(torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.bool))
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(base, proxy, out)
    want = ops.deferral_sample(base, proxy, rule="threshold", param=0.3, seed=1, position=2)
    assert torch.equal(got, want.token)
    assert torch.equal(out.deferred, want.deferred)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    class Step(torch.nn.Module):
        def forward(
            self, base: torch.Tensor, proxy: torch.Tensor, position: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return tuple(
                ops.deferral_sample(
                    base, proxy, rule="knapsack", param=0.3, seed=7, position=position
                )
            )

    base, proxy, position = torch.randn(2, 30), torch.randn(2, 30), torch.tensor([3, 4])
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        Step(),
        (base, proxy, position),
        dynamic_shapes=({0: batch}, {0: batch}, {0: batch}),
        strict=strict,
    )
    for rows in (2, 5):
        inputs = (torch.randn(rows, 30), torch.randn(rows, 30), torch.arange(rows))
        _assert_same(program.module()(*inputs), Step()(*inputs))


@pytest.mark.parametrize(
    "module",
    ["deferral", "implicit_reward", "knapsack", "philox", "prelogit", "sampling", "verify"],
)
def test_examples_in_docstrings(module: str) -> None:
    found = doctest.testmod(
        importlib.import_module(f"tta_ext.ops.{module}"),
        extraglobs={"torch": torch, "tta_ext": tta_ext},
    )
    assert found.attempted > 0
    assert found.failed == 0


def test_use_backend_refuses_what_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"expected one of reference, cpu, cuda, triton$"):
        tta_ext.use_backend("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="'cuda' is not available: torch finds no CUDA"):
            tta_ext.use_backend("cuda").__enter__()


def test_blocks_may_be_left_in_any_order(native: None) -> None:
    """As by two threads."""
    first, second = tta_ext.use_backend("reference"), tta_ext.use_backend("cpu")
    first.__enter__()
    second.__enter__()
    assert dispatch._forced == "cpu"
    first.__exit__(None, None, None)
    assert dispatch._forced == "cpu"
    with first, first:
        assert dispatch._forced == "reference"
    second.__exit__(None, None, None)
    assert dispatch._forced is None


def test_forcing_the_native_backend_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch._status, "cpu", "no compiler; apt install g++ mends it")
    with pytest.raises(RuntimeError, match="'cpu' is not available: no compiler; apt install"):
        tta_ext.use_backend("cpu").__enter__()


def test_a_library_of_another_version_is_off_for_its_device_alone(
    monkeypatch: pytest.MonkeyPatch, native: None
) -> None:
    """Its kernels are registered, so the operators walk around them, and around no others."""
    by_reference = []
    run = dispatch.reference
    monkeypatch.setattr(dispatch, "reference", lambda name: by_reference.append(name) or run(name))
    monkeypatch.setattr(dispatch, "_stale", set())
    counter, key = torch.zeros(1, 4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    want = ops.philox(counter, key)
    for device, calls in (("CUDA", []), ("CPU", ["philox"])):
        with pytest.warns(UserWarning, match=f"native {device} operators are off: .* version -1"):
            assert "reinstall tta_ext" in dispatch._check_version(-1, "/library.so", device)
        assert torch.equal(ops.philox(counter, key), want)
        assert by_reference == calls


def test_without_a_native_library_the_reference_serves() -> None:
    """In another process, as kernels cannot be taken back; it warns once and works."""
    program = (
        "import warnings, torch, tta_ext\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(2):\n"
        "        got = tta_ext.ops.deferral_sample(\n"
        "            torch.zeros(1, 9), torch.zeros(1, 9), rule='knapsack', param=0.5,\n"
        "            seed=1, position=2)\n"
        "named = [w for w in caught if 'reference' in str(w.message)]\n"
        "assert len(named) <= 1, named\n"
        "print(int(got.token), bool(got.deferred))\n"
    )
    environment = {**os.environ, "TTA_EXT_NATIVE": "0"}
    found = subprocess.check_output([sys.executable, "-c", program], text=True, env=environment)
    logits = torch.zeros(1, 9)
    want = ops.deferral_sample(logits, logits, rule="knapsack", param=0.5, seed=1, position=2)
    assert found.split() == [str(int(want.token)), str(bool(want.deferred))]


def test_import_is_lean_and_the_environment_chooses_the_instruction_set(native: None) -> None:
    """Torch and a few small modules; nothing of CUDA, nothing that only a part needs."""
    program = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import tta_ext\n"
        "print(*(set(sys.modules) - before))\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not tta_ext.dispatch.native_status()\n"
        "print(torch.ops.tta_ext.cpu_isa(-1))\n"
    )
    environment = {**os.environ, "TTA_EXT_CPU_ISA": "scalar"}
    found = subprocess.check_output([sys.executable, "-c", program], text=True, env=environment)
    *new, level = found.split()
    packages = {name.partition(".")[0] for name in new}
    assert not packages & {"transformers", "triton", "typer", "rich", "safetensors", "scipy"}
    assert not set(new) & {"tta_ext.build", "tta_ext.decoding"}
    assert level == "0"
