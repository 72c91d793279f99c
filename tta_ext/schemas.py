"""Every operator of tta_ext: schema, fake kernel, autograd rule and fallback.

Each operator ``X`` exists twice. ``tta_ext::X`` allocates its outputs and calls ``tta_ext::X.out``,
which takes them as keyword arguments, writes them and returns nothing. Compiled libraries register
``X.out`` alone, under the key of their device (CPU, CUDA). What this module registers is the
functional form and, for devices without a compiled kernel, an ``X.out`` that runs the reference
backend after one attempt to load the compiled library; so all operators exist without a compiler.

Outputs never require grad: a choice of tokens has no derivative. The autograd rule says so with
``mark_non_differentiable``, which is what ``torch.library.opcheck`` wants to see.

Scalars that may change from step to step (seed, position, sequence, step, ...) are int64 tensors
or ``SymInt``, so that a compiled graph is not specialised on them. Tensors of one element may live
on the CPU whatever the device of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["NAMESPACE", "NATIVE_VERSION", "OPS", "OpSpec", "overloads"]

NAMESPACE = "tta_ext"

# What the version operator of a compiled library must return; a change of any schema or meaning
# of an argument increases it.
NATIVE_VERSION = 1

RULE = "Tensor param, int rule, int critical, float temperature, float rule_temperature"
KEY = (
    "Tensor seed, Tensor position, Tensor sequence, SymInt iteration, Tensor rollout, "
    "bool do_sample"
)
MIXED = (
    "Tensor base_logits, Tensor expert_logits, Tensor? anti_logits, Tensor beta, float temperature"
)


class Output(NamedTuple):
    """An output of an operator, in terms of the operator's first tensor."""

    name: str
    dtype: torch.dtype | None  # None: that of the first tensor
    dims: int | None = None  # its shape: so many leading dimensions of the first tensor, or all
    in_place: tuple[str, ...] = ()  # arguments whose very memory it may take


class OpSpec:
    """One operator: its arguments and its outputs, contiguous tensors on one device.

    Attributes:
        accumulated: outputs that ``X.out`` adds to instead of overwriting; ``X`` starts them from
            zeros.
        inputs, outputs: names of all arguments, and of the tensors that are written.
        functional, out: the overloads.
        run: ``out`` without torch's Python wrapper, which costs a tenth of a small call.
    """

    functional: Any
    out: Any
    run: Callable[..., Any]

    def __init__(
        self, name: str, arguments: str, *results: Output, accumulated: tuple[str, ...] = ()
    ) -> None:
        self.name, self.arguments, self.results = name, arguments, results
        self.accumulated = accumulated
        self.outputs = tuple(output.name for output in results)
        self.inputs = tuple(argument.split()[-1] for argument in arguments.split(","))
        # Where every output has a value a row: their dtypes, for the short way through `allocate`.
        short = not accumulated and all(dims == 1 and dtype for _, dtype, dims, _ in results)
        self._row_dtypes = [output.dtype for output in results] if short else None

    @property
    def functional_schema(self) -> str:
        single = len(self.results) == 1
        returns = "Tensor" if single else f"({', '.join(f'Tensor {o}' for o in self.outputs)})"
        return f"{self.name}({self.arguments}) -> {returns}"

    @property
    def out_schema(self) -> str:
        outs = ", ".join(f"Tensor({chr(97 + i)}!) {o}" for i, o in enumerate(self.outputs))
        return f"{self.name}.out({self.arguments}, *, {outs}) -> ()"

    def allocate(self, *args: Any) -> tuple[Tensor, ...]:
        """New tensors for the outputs of a call."""
        like = args[0]
        if isinstance(like, Tensor):
            shape: tuple[int, ...] = like.shape
            if not shape:
                raise ValueError(f"{self.inputs[0]} has no dimension, expected at least one")
            if self._row_dtypes is not None:
                rows, new = shape[0], like.new_empty
                return tuple([new(rows, dtype=dtype) for dtype in self._row_dtypes])
        else:  # a number of elements, and then a tensor
            shape, like = (like,), args[1]
            if not isinstance(like, Tensor):  # torch lets None through where a tensor belongs
                name = self.inputs[0 if args[0] is None else 1]
                raise TypeError(f"{name} is None, expected a tensor")
        new, accumulated = like.new_empty, self.accumulated
        return tuple(
            [
                # Sizes one by one: torch takes three times as long over a torch.Size.
                (like.new_zeros if name in accumulated else new)(
                    *shape[:dims], dtype=dtype or like.dtype
                )
                for name, dtype, dims, _ in self.results
            ]
        )


_PROPOSAL = (Output("token", torch.int64, 1), Output("deferred", torch.bool, 1))
_FLOAT32 = Output("out", torch.float32)
_TOKEN = Output("out", torch.int64, 1)

_SPECS = (
    OpSpec(
        "deferral_mask",
        f"Tensor base_logits, Tensor? proxy_logits, {RULE}, bool check",
        Output("mask", torch.bool),
        Output("critical_index", torch.int64, 1),
        Output("fraction", torch.float32, 1),
    ),
    OpSpec(
        "deferral_probs",
        f"Tensor base_logits, Tensor proxy_logits, {RULE}, bool check",
        _FLOAT32._replace(in_place=("base_logits", "proxy_logits")),
    ),
    OpSpec(
        "deferral_stats",
        f"Tensor base_logits, Tensor? proxy_logits, {RULE}, bool check",
        Output("deferred_mass", torch.float64, 1),
        Output("critical_index", torch.int64, 1),
        Output("cut_logit", torch.float32, 1),
        Output("used", torch.float64, 1),
    ),
    OpSpec("deferral_propose", f"Tensor base_logits, {RULE}, {KEY}, bool check", *_PROPOSAL),
    OpSpec(
        "deferral_sample",
        f"Tensor base_logits, Tensor proxy_logits, {RULE}, {KEY}, bool check",
        *_PROPOSAL,
    ),
    OpSpec(
        "deferral_verify",
        "Tensor base_logits, Tensor proxy_logits, Tensor draft, Tensor draft_length, "
        f"{RULE}, {KEY}, bool return_mass, bool check",
        Output("accepted", torch.int64, 1),
        *_PROPOSAL,
        Output("mass", torch.float64, 2),
    ),
    OpSpec(
        "implicit_reward_probs",
        f"{MIXED}, bool check",
        _FLOAT32._replace(in_place=("base_logits",)),
    ),
    OpSpec("implicit_reward_sample", f"{MIXED}, {KEY}, bool check", _TOKEN),
    OpSpec(
        "categorical_sample",
        f"Tensor logits, float temperature, {KEY}, int stream, SymInt draw, bool check",
        _TOKEN,
    ),
    OpSpec(
        "greedy_knapsack",
        "Tensor profit, Tensor weight, Tensor capacity, bool check",
        Output("selected", torch.bool),
        Output("used", torch.float64, 1),
        Output("value", torch.float64, 1),
        Output("critical_index", torch.int64, 1),
        Output("upper_bound", torch.float64, 1),
    ),
    OpSpec(
        "prelogit_perturb",
        "Tensor hidden, Tensor mean, Tensor step, Tensor row, Tensor sequence, "
        "Tensor rollout, SymInt iteration, float sigma, Tensor seed, bool check",
        Output("out", None, in_place=("hidden",)),
        Output("dot", torch.float32, 1),
        accumulated=("dot",),
    ),
    OpSpec(
        "importance_weights",
        "Tensor reward, Tensor dot, Tensor norm2, float lam, float alpha, float sigma, bool check",
        Output("weights", torch.float32, in_place=("reward", "dot", "norm2")),
        Output("ess", torch.float32, 1),
    ),
    OpSpec(
        "control_update",
        "Tensor mean, Tensor weights, Tensor? length, Tensor seed, Tensor sequence, "
        "SymInt iteration, float sigma, SymInt start, SymInt stop, bool partial, bool check",
        _FLOAT32._replace(in_place=("mean",)),
    ),
    OpSpec(
        "control_merge",
        "Tensor mean, Tensor partials, float sigma",
        _FLOAT32._replace(in_place=("mean", "partials")),
    ),
    OpSpec(
        "philox",
        "Tensor counter, Tensor key",
        Output("out", torch.int64, in_place=("counter",)),
    ),
    OpSpec(
        "normal",
        "SymInt n, Tensor seed, SymInt step, SymInt sequence, SymInt iteration, SymInt rollout",
        _FLOAT32,
    ),
)
OPS = {spec.name: spec for spec in _SPECS}

# Only a compiled library has these: which instruction set it uses (-1 asks, 0 scalar, 1 AVX2,
# 2 AVX-512 force, limited to what the machine has), and which schemas it was written for
# (native_version in the CPU library, cuda_version in the CUDA library).
NATIVE_ONLY = ("cpu_isa(int level) -> int", "native_version() -> int", "cuda_version() -> int")


def refuse_overlap(spec: OpSpec, args: Sequence[Any], outputs: Sequence[Tensor]) -> None:
    """``ValueError`` if an output shares memory with an argument or with another output, other than
    exactly in place of an argument that its entry in the table names.

    The kernels check the same (csrc/bind/stable.h); this is for backends written in Python.
    """
    seen = [(n, x) for n, x in zip(spec.inputs, args, strict=True) if isinstance(x, Tensor)]
    spans = [(name, *_span(x), x.is_contiguous()) for name, x in seen if x.numel()]
    for (name, _, _, in_place), x in zip(spec.results, outputs, strict=True):
        if x.is_meta or not x.numel():
            continue
        begin, end = _span(x)
        for other, first, last, dense in spans:
            exact = dense and (begin, end) == (first, last) and other in in_place
            if begin < last and first < end and not exact:
                raise ValueError(f"{name} shares memory with {other}, expected memory of its own")
        spans.append((name, begin, end, True))


def _span(x: Tensor) -> tuple[int, int]:
    """Addresses of a tensor's first byte and of the one after its last, whatever lies between."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def check_dense(name: str, tensor: Tensor) -> None:
    """Raise for a sparse, nested or otherwise packed tensor."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        kind = (
            "nested"
            if tensor.is_nested
            else "quantized"
            if tensor.is_quantized
            else f"of layout {tensor.layout}"
        )
        raise TypeError(f"{name} is {kind}, expected a plain tensor, such as .to_dense() returns")


def refuse_foreign(spec: OpSpec, args: Sequence[Any], outputs: dict[str, Tensor]) -> None:
    """Raise for a tensor that is packed or elsewhere: torch brings a call of such to the fallback,
    though a kernel is registered.
    """
    named = [*zip(spec.inputs, args, strict=True), *outputs.items()]
    for name, x in named:
        if isinstance(x, Tensor):
            check_dense(name, x)
    device = next(iter(outputs.values())).device
    _refuse_devices(spec, args, device)
    for name, output in outputs.items():
        if output.device != device:
            raise ValueError(f"{name} is on {output.device}, expected {device}")


def _refuse_devices(spec: OpSpec, args: Sequence[Any], device: torch.device) -> None:
    """``ValueError`` for a tensor elsewhere: nothing may pass for computed that was not."""
    for name, x in zip(spec.inputs, args, strict=True):
        if isinstance(x, Tensor) and x.device != device and not (x.is_cpu and x.numel() == 1):
            raise ValueError(f"{name} is on {x.device}, expected {device}")


# What a caller of ``X.out`` owes to autograd is done under this key, above all backends, and not
# again for tensors that nobody else has seen.
below_autograd = torch._C._AutoDispatchBelowADInplaceOrView


def _functional(spec: OpSpec, fake: bool) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        outputs = spec.allocate(*args)
        if fake:
            _refuse_devices(spec, args, outputs[0].device)
        else:
            with below_autograd():
                spec.out(*args, **dict(zip(spec.outputs, outputs, strict=True)))
        return outputs[0] if len(outputs) == 1 else outputs

    return run


def refuse_grad(name: str, output: Tensor) -> None:
    """``ValueError`` for a tensor to write whose gradient would not know of it."""
    if output.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires grad, which nothing written here has; pass {name}.detach(), or call "
            "under torch.no_grad()"
        )


def _written(spec: OpSpec) -> Callable[..., None]:
    """``X.out`` for whoever holds its outputs: autograd shall see that they change."""

    def run(*args: Any, **outputs: Tensor) -> None:
        for name, output in outputs.items():
            refuse_grad(name, output)
        torch._C._increment_version(outputs.values())
        with below_autograd():
            spec.out(*args, **outputs)

    return run


def _unset(spec: OpSpec, args: Sequence[Any], outputs: dict[str, Tensor]) -> None:
    raise RuntimeError("tta_ext.dispatch has not been imported")


# What runs ``X.out`` where no compiled kernel is registered; tta_ext.dispatch puts it here.
fallback: Callable[[OpSpec, Sequence[Any], dict[str, Tensor]], None] = _unset


def _out(spec: OpSpec) -> Callable[..., None]:
    def run(*args: Any, **outputs: Tensor) -> None:
        fallback(spec, args, outputs)

    return run


def _out_fake(spec: OpSpec) -> Callable[..., None]:
    def run(*args: Any, **outputs: Tensor) -> None:
        device = next(iter(outputs.values())).device
        _refuse_devices(spec, args, device)
        for name, output in outputs.items():
            if output.device != device:
                raise ValueError(f"{name} is on {output.device}, expected {device}")

    return run


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))


def _backward(spec: OpSpec) -> Callable[..., Any]:
    count = spec.arguments.count(",") + 1

    def run(ctx: Any, *grads: Any) -> Any:
        return (None,) * count

    return run


def overloads() -> list[Any]:
    """All overloads with a schema that works without a compiled library."""
    return [spec.functional for spec in OPS.values()] + [spec.out for spec in OPS.values()]


def _define() -> torch.library.Library:
    library = torch.library.Library(NAMESPACE, "DEF")
    # Inductor may otherwise hand over tensors whose vocabulary dimension is not unit-stride.
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    for schema in NATIVE_ONLY:
        library.define(schema)
    for spec in OPS.values():
        library.define(spec.functional_schema, tags=tags)
        library.define(spec.out_schema, tags=tags)
        library.impl(spec.name, _functional(spec, fake=False), "CompositeExplicitAutograd")
        library.impl(f"{spec.name}.out", _out(spec), "CompositeExplicitAutograd")
        packet = getattr(torch.ops.tta_ext, spec.name)
        spec.functional, spec.out = packet.default, packet.out
        spec.run = getattr(packet.out, "_op", packet.out)
        qualified = f"{NAMESPACE}::{spec.name}"
        torch.library.register_fake(qualified, _functional(spec, fake=True), lib=library)
        torch.library.register_fake(f"{qualified}.out", _out_fake(spec), lib=library)
        library.impl(f"{spec.name}.out", _written(spec), "ADInplaceOrView")
        torch.library.register_autograd(
            qualified, _backward(spec), setup_context=_setup_context, lib=library
        )
    return library


# Kept alive for the life of the process: dropping it would remove the operators.
LIBRARY = _define()
