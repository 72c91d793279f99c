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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class OpSpec:
    """One operator: its arguments, its outputs and how to allocate them."""

    name: str
    arguments: str
    outputs: tuple[str, ...]
    allocate: Callable[..., Outputs]
    # Outputs that `X.out` adds to instead of overwriting.
    accumulated: tuple[str, ...] = ()

    @property
    def functional_schema(self) -> str:
        single = len(self.outputs) == 1
        returns = "Tensor" if single else f"({', '.join(f'Tensor {o}' for o in self.outputs)})"
        return f"{self.name}({self.arguments}) -> {returns}"

    @property
    def out_schema(self) -> str:
        outs = ", ".join(f"Tensor({chr(97 + i)}!) {o}" for i, o in enumerate(self.outputs))
        return f"{self.name}.out({self.arguments}, *, {outs}) -> ()"


def _new(like: Tensor, shape: Any, dtype: torch.dtype) -> Tensor:
    return like.new_empty(shape, dtype=dtype)


def _mask(base_logits: Tensor, *_: Any) -> Outputs:
    b = base_logits.shape[0]
    return (
        _new(base_logits, base_logits.shape, torch.bool),
        _new(base_logits, b, torch.int64),
        _new(base_logits, b, torch.float32),
    )


def _probs(base_logits: Tensor, *_: Any) -> Outputs:
    return (_new(base_logits, base_logits.shape, torch.float32),)


def _stats(base_logits: Tensor, *_: Any) -> Outputs:
    b = base_logits.shape[0]
    return (
        _new(base_logits, b, torch.float64),
        _new(base_logits, b, torch.int64),
        _new(base_logits, b, torch.float32),
        _new(base_logits, b, torch.float64),
    )


def _proposal(base_logits: Tensor, *_: Any) -> Outputs:
    b = base_logits.shape[0]
    return _new(base_logits, b, torch.int64), _new(base_logits, b, torch.bool)


def _verified(base_logits: Tensor, *_: Any) -> Outputs:
    b, positions = base_logits.shape[0], base_logits.shape[1]
    return (
        _new(base_logits, b, torch.int64),
        _new(base_logits, b, torch.int64),
        _new(base_logits, b, torch.bool),
        _new(base_logits, (b, positions), torch.float64),
    )


def _token(logits: Tensor, *_: Any) -> Outputs:
    return (_new(logits, logits.shape[0], torch.int64),)


def _knapsack(profit: Tensor, *_: Any) -> Outputs:
    b = profit.shape[0]
    return (
        _new(profit, profit.shape, torch.bool),
        _new(profit, b, torch.float64),
        _new(profit, b, torch.float64),
        _new(profit, b, torch.int64),
        _new(profit, b, torch.float64),
    )


def _perturbed(hidden: Tensor, *_: Any) -> Outputs:
    # `dot` is accumulated into, so it starts from zeros.
    return (
        _new(hidden, hidden.shape, hidden.dtype),
        hidden.new_zeros(hidden.shape[0], dtype=torch.float32),
    )


def _weights(reward: Tensor, *_: Any) -> Outputs:
    return (
        _new(reward, reward.shape, torch.float32),
        _new(reward, reward.shape[0], torch.float32),
    )


def _like_float32(mean: Tensor, *_: Any) -> Outputs:
    return (_new(mean, mean.shape, torch.float32),)


def _like_int64(counter: Tensor, *_: Any) -> Outputs:
    return (_new(counter, counter.shape, torch.int64),)


def _normal(n: Any, seed: Tensor, *_: Any) -> Outputs:
    return (_new(seed, (n,), torch.float32),)


OPS: dict[str, OpSpec] = {
    spec.name: spec
    for spec in (
        OpSpec(
            "deferral_mask",
            f"Tensor base_logits, Tensor? proxy_logits, {RULE}, bool check",
            ("mask", "critical_index", "fraction"),
            _mask,
        ),
        OpSpec(
            "deferral_probs",
            f"Tensor base_logits, Tensor proxy_logits, {RULE}, bool check",
            ("out",),
            _probs,
        ),
        OpSpec(
            "deferral_stats",
            f"Tensor base_logits, Tensor? proxy_logits, {RULE}, bool check",
            ("deferred_mass", "critical_index", "cut_logit", "used"),
            _stats,
        ),
        OpSpec(
            "deferral_propose",
            f"Tensor base_logits, {RULE}, {KEY}, bool check",
            ("token", "deferred"),
            _proposal,
        ),
        OpSpec(
            "deferral_sample",
            f"Tensor base_logits, Tensor proxy_logits, {RULE}, {KEY}, bool check",
            ("token", "deferred"),
            _proposal,
        ),
        OpSpec(
            "deferral_verify",
            "Tensor base_logits, Tensor proxy_logits, Tensor draft, Tensor draft_length, "
            f"{RULE}, {KEY}, bool return_mass, bool check",
            ("accepted", "token", "deferred", "mass"),
            _verified,
        ),
        OpSpec(
            "implicit_reward_probs",
            "Tensor base_logits, Tensor expert_logits, Tensor? anti_logits, Tensor beta, "
            "float temperature, bool check",
            ("out",),
            _probs,
        ),
        OpSpec(
            "implicit_reward_sample",
            "Tensor base_logits, Tensor expert_logits, Tensor? anti_logits, Tensor beta, "
            f"float temperature, {KEY}, bool check",
            ("out",),
            _token,
        ),
        OpSpec(
            "categorical_sample",
            f"Tensor logits, float temperature, {KEY}, int stream, SymInt draw, bool check",
            ("out",),
            _token,
        ),
        OpSpec(
            "greedy_knapsack",
            "Tensor profit, Tensor weight, Tensor capacity, bool check",
            ("selected", "used", "value", "critical_index", "upper_bound"),
            _knapsack,
        ),
        OpSpec(
            "prelogit_perturb",
            "Tensor hidden, Tensor mean, Tensor step, Tensor row, Tensor sequence, "
            "Tensor rollout, SymInt iteration, float sigma, Tensor seed, bool check",
            ("out", "dot"),
            _perturbed,
            accumulated=("dot",),
        ),
        OpSpec(
            "importance_weights",
            "Tensor reward, Tensor dot, Tensor norm2, float lam, float alpha, float sigma, "
            "bool check",
            ("weights", "ess"),
            _weights,
        ),
        OpSpec(
            "control_update",
            "Tensor mean, Tensor weights, Tensor? length, Tensor seed, Tensor sequence, "
            "SymInt iteration, float sigma, SymInt start, SymInt stop, bool partial, bool check",
            ("out",),
            _like_float32,
        ),
        OpSpec(
            "control_merge",
            "Tensor mean, Tensor partials, float sigma",
            ("out",),
            _like_float32,
        ),
        OpSpec("philox", "Tensor counter, Tensor key", ("out",), _like_int64),
        OpSpec(
            "normal",
            "SymInt n, Tensor seed, SymInt step, SymInt sequence, SymInt iteration, SymInt rollout",
            ("out",),
            _normal,
        ),
    )
}

# Only a compiled library has these: which instruction set it uses (-1 asks, 0 scalar, 1 AVX2,
# 2 AVX-512 force, limited to what the machine has), and which schemas it was written for
# (native_version in the CPU library, cuda_version in the CUDA library).
NATIVE_ONLY = ("cpu_isa(int level) -> int", "native_version() -> int", "cuda_version() -> int")


def _functional(spec: OpSpec) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        outputs = spec.allocate(*args)
        out_overload = getattr(torch.ops.tta_ext, spec.name).out
        out_overload(*args, **dict(zip(spec.outputs, outputs, strict=True)))
        return outputs[0] if len(outputs) == 1 else outputs

    return run


def _functional_fake(spec: OpSpec) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        outputs = spec.allocate(*args)
        return outputs[0] if len(outputs) == 1 else outputs

    return run


def _out(spec: OpSpec) -> Callable[..., None]:
    def run(*args: Any, **outputs: Tensor) -> None:
        from tta_ext.ops import _dispatch

        _dispatch.run_without_kernel(spec, args, outputs)

    return run


def _out_fake(*args: Any, **outputs: Tensor) -> None:
    return None


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
    packets = [getattr(torch.ops.tta_ext, name) for name in OPS]
    return [packet.default for packet in packets] + [packet.out for packet in packets]


def _define() -> torch.library.Library:
    library = torch.library.Library(NAMESPACE, "DEF")
    # Inductor may otherwise hand over tensors whose vocabulary dimension is not unit-stride.
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    for schema in NATIVE_ONLY:
        library.define(schema)
    for spec in OPS.values():
        library.define(spec.functional_schema, tags=tags)
        library.define(spec.out_schema, tags=tags)
        library.impl(spec.name, _functional(spec), "CompositeExplicitAutograd")
        library.impl(f"{spec.name}.out", _out(spec), "CompositeExplicitAutograd")
        qualified = f"{NAMESPACE}::{spec.name}"
        torch.library.register_fake(qualified, _functional_fake(spec), lib=library)
        torch.library.register_fake(f"{qualified}.out", _out_fake, lib=library)
        torch.library.register_autograd(
            qualified, _backward(spec), setup_context=_setup_context, lib=library
        )
    return library


# Kept alive for the life of the process: dropping it would remove the operators.
LIBRARY = _define()
