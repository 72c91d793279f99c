"""Validation and conversion of the arguments of public operators.

The functions run before every call of a decoding loop, so numbers are checked once and kept as
tensors, and tensors are looked at through attributes alone: nothing here reads their values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tta_ext import rng, rules
from tta_ext.rules import Rule
from tta_ext.schemas import OpSpec, check_dense, refuse_grad

LOGIT_DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))
MAX_VOCABULARY = 1 << 20
_FLOAT32_MAX = torch.finfo(torch.float32).max

RuleArguments = tuple[Tensor, int, int, float, float]
KeyArguments = tuple[Tensor, Tensor, Tensor, int, Tensor, bool]

_compiling = torch.compiler.is_compiling


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}, {value.dtype}, on {value.device}"
    return repr(value)


def check_logits(
    name: str, logits: Tensor, dims: int, form: str, *, unit_stride: bool = True
) -> None:
    """Raise unless ``logits`` has an accepted dtype, shape and layout."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} is {type(logits).__name__}, expected a tensor {form}")
    if logits.dtype not in LOGIT_DTYPES:
        raise TypeError(
            f"{name} has dtype {logits.dtype}, expected torch.float32, torch.float16 or "
            "torch.bfloat16"
        )
    try:
        shape, packed = logits.shape, logits.is_contiguous()
    except RuntimeError:  # no strides, so no plain tensor
        packed = False
    if not packed:
        check_dense(name, logits)
        shape = logits.shape
    if len(shape) != dims:
        raise ValueError(f"{name} has shape {list(shape)}, expected {form}")
    if not 1 <= shape[-1] <= MAX_VOCABULARY:
        raise ValueError(
            f"{name} has a last dimension of {shape[-1]}, expected 1 to {MAX_VOCABULARY}"
        )
    if unit_stride and not packed and logits.stride(-1) != 1 and shape[-1] != 1 and logits.numel():
        raise ValueError(
            f"{name} has stride {logits.stride(-1)} over its last dimension, expected 1; "
            "call .contiguous() on it"
        )


def check_same(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Raise unless two tensors share shape and device."""
    if tensor.shape != like.shape:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, expected that of {like_name}, "
            f"{list(like.shape)}"
        )
    if tensor.device != like.device:
        raise ValueError(
            f"{name} is on {tensor.device}, expected the device of {like_name}, {like.device}"
        )


def check_alike(name: str, logits: Tensor, like_name: str, like: Tensor, form: str) -> None:
    """Raise unless logits pass :func:`check_logits` and are of the shape and device of others."""
    if (  # what most calls need
        type(logits) is not Tensor
        or logits.layout is not torch.strided
        or logits.dtype not in LOGIT_DTYPES
        or logits.shape != like.shape
        or logits.device != like.device
        or not logits.is_contiguous()
    ):
        check_logits(name, logits, like.dim(), form)
        check_same(name, logits, like_name, like)


def check_matrices(form: str, *, unit_stride: bool = True, **matrices: Tensor) -> None:
    """Raise unless all are float32 of two dimensions, with the first one's shape and device."""
    like_name, like = next(iter(matrices.items()))
    for name, values in matrices.items():
        check_logits(name, values, 2, form, unit_stride=unit_stride)
        check_kind(name, values, torch.float32, values.device)
        check_same(name, values, like_name, like)


def check_kind(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Raise unless a value is a plain tensor of this dtype and device."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is {_describe(tensor)}, expected a tensor of dtype {dtype}")
    check_dense(name, tensor)
    if tensor.dtype is not dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected {dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}")


def check_tensor(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int], device: torch.device
) -> None:
    """Raise unless a tensor has exactly this dtype, shape and device."""
    check_kind(name, tensor, dtype, device)
    if tensor.shape != torch.Size(shape):
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")


def one_or_each(
    name: str,
    values: Tensor,
    dtype: torch.dtype,
    count: int,
    device: torch.device,
    positions: int | None = None,
) -> Tensor:
    """The tensor itself, a column as a row; raises unless it has one element, one a row or one a
    row and position.
    """
    if values.dtype is not dtype:
        raise TypeError(f"{name} has dtype {values.dtype}, expected {dtype}")
    shape = values.shape
    if shape not in ((count,), (count, 1), (count, positions)) and values.numel() != 1:
        more = "" if positions is None else f" or [{count}, {positions}]"
        raise ValueError(f"{name} has shape {list(shape)}, expected one element or [{count}]{more}")
    if values.device != device and not (values.is_cpu and values.numel() == 1):
        raise ValueError(f"{name} is on {values.device}, expected {device}")
    return values.squeeze(1) if shape == (count, 1) else values


def check_flag(check: bool | None, tensor: Tensor, left: bool = False) -> bool:
    """Whether rows are checked: by default on the CPU, where it costs no synchronisation."""
    if check is None:
        return left or (tensor.is_cpu and not _compiling())
    return bool(check)


class _Kept(dict[Any, Tensor]):
    """Tensors made once for their key; nobody writes to them, and no compiled graph sees them.

    One made while a fake or another tensor mode is active is not a plain one and is not kept.
    """

    def __init__(self, make: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.make = make

    def __missing__(self, key: Any) -> Tensor:
        with torch.inference_mode(False):
            tensor = self.make(key)
        if type(tensor) is Tensor:
            if len(self) >= _CACHE_LIMIT:
                self.clear()
            self[key] = tensor
        return tensor


_CACHE_LIMIT = 4096
_integers = _Kept(lambda value: torch.tensor(value, dtype=torch.int64, device="cpu"))
_doubles = _Kept(lambda value: torch.tensor(value, dtype=torch.float64, device="cpu"))
_ranges = _Kept(lambda key: torch.arange(key[0], dtype=torch.int64, device=key[1]))
# Of numbers as they are given, checked.
_seeds = _Kept(lambda seed: _integers[rng.as_seed(seed)])
_rollouts = _Kept(lambda rollout: _integers[rng.check_rollout(rollout)])


def _integer(value: int) -> Tensor:
    if _compiling():
        return torch.scalar_tensor(value, dtype=torch.int64, device="cpu")
    return _integers[value]


def double(value: float) -> Tensor:
    """A 0-dim float64 CPU tensor; do not write to it."""
    if _compiling():
        return torch.scalar_tensor(value, dtype=torch.float64, device="cpu")
    return _doubles[value]


def number(name: str, value: float, high: float = _FLOAT32_MAX) -> float:
    """A number from 0 to ``high`` as a float; its own largest is that of float32, as in kernels."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        raise TypeError(f"{name} is {value!r}, expected a number")
    if not 0.0 <= value <= high:
        wanted = f"0 <= {name} <= {high:g}" if high < _FLOAT32_MAX else "a finite number >= 0"
        raise ValueError(f"{name} is {value!r}, expected {wanted}")
    return float(value)


def index_tensor(name: str, value: int | Tensor, count: int, device: torch.device) -> Tensor:
    """Indices of 32 bits as int64: one for all rows, or one a row."""
    if isinstance(value, Tensor):
        return one_or_each(name, value, torch.int64, count, device)
    if type(value) is int and 0 <= value < rng.WORD and not _compiling():
        return _integers[value]  # what most calls need
    if not rng.is_int(value):
        raise TypeError(f"{name} is {value!r}, expected an int or an int64 tensor")
    return _integer(rng.check_word(name, value))


def sequence_tensor(value: int | Tensor | None, count: int, device: torch.device) -> Tensor:
    """Sequence ids; row numbers where the caller gives none."""
    if value is not None:
        return index_tensor("sequence", value, count, device)
    if _compiling():
        return torch.arange(count, dtype=torch.int64, device=device)
    return _ranges[count, device]


def rollout_tensor(value: int | Tensor, count: int, device: torch.device) -> Tensor:
    """Rollout numbers of 16 bits."""
    if not isinstance(value, Tensor) and rng.is_int(value):
        rng.check_rollout(value)
    return index_tensor("rollout", value, count, device)


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The seed as one int64 element."""
    if isinstance(seed, Tensor):
        check_kind("seed", seed, torch.int64, seed.device if seed.is_cpu else device)
        if seed.numel() != 1:
            raise ValueError(f"seed has shape {list(seed.shape)}, expected one element")
        return seed
    if isinstance(seed, torch.Generator):
        raise TypeError("seed is a torch.Generator, expected tta_ext.rng.seed_from_generator of it")
    if seed is None or not rng.is_int(seed):
        raise TypeError(f"seed is {seed!r}, expected an int or an int64 tensor")
    return _integer(rng.as_seed(seed))


def key_arguments(
    like: Tensor,
    seed: int | Tensor | None,
    position: int | Tensor | None,
    sequence: int | Tensor | None,
    iteration: int,
    rollout: int | Tensor,
    do_sample: bool,
    left: bool = False,
) -> KeyArguments:
    """The arguments that name random numbers, as the operators take them.

    ``left``: to the kernel are left the dtypes and numbers of elements of tensors, which tell the
    shape of one with a dimension.
    """
    if seed is None or position is None:
        if do_sample:
            missing = "seed" if seed is None else "position"
            raise TypeError(f"{missing} is None, expected an int or an int64 tensor to draw with")
        seed = 0 if seed is None else seed
        position = 0 if position is None else position
    if type(iteration) is not int or not 0 <= iteration < rng.ITERATIONS:
        rng.check_iteration(iteration)
    plain = left or not _compiling()  # what most calls need is found without another call
    return (
        _seeds[seed]
        if plain and type(seed) is int
        else seed
        if left and type(seed) is Tensor
        else seed_tensor(seed, like.device),
        _integers[position]
        if plain and type(position) is int and 0 <= position < rng.WORD
        else position
        if left and type(position) is Tensor and position.dim() < 2
        else index_tensor("position", position, like.shape[0], like.device),
        _ranges[like.shape[0], like.device]
        if plain and sequence is None
        else sequence
        if left and type(sequence) is Tensor and sequence.dim() < 2
        else _integers[sequence]
        if plain and type(sequence) is int and 0 <= sequence < rng.WORD
        else sequence_tensor(sequence, like.shape[0], like.device),
        iteration,
        _rollouts[rollout]
        if plain and type(rollout) is int
        else rollout_tensor(rollout, like.shape[0], like.device),
        bool(do_sample),
    )


def _refuse_beside_rule(
    param: object, critical: object, temperature: object, rule_temperature: object
) -> None:
    given = {
        "param": param is not None,
        "critical": critical != "exclude",
        "temperature": temperature != 1.0,
        "rule_temperature": rule_temperature is not None,
    }
    names = ", ".join(name for name, there in given.items() if there)
    raise TypeError(f"rule is a Rule, which holds {names} already; expected none beside it")


def _param_tensor(param: float | Tensor | None, like: Tensor, positions: int | None) -> Tensor:
    """A checked parameter as float64: one for all rows, or one a row or position."""
    if param is None:
        return double(0.0)
    if not isinstance(param, Tensor):
        return double(param)
    return one_or_each("param", param, torch.float64, like.shape[0], like.device, positions)


# What rule_arguments made of plain numbers: a decoding loop asks the same every step.
_rules: dict[tuple[object, ...], RuleArguments] = {}


def rule_arguments(
    like: Tensor,
    rule: str | Rule,
    param: float | Tensor | None,
    critical: str,
    temperature: float,
    rule_temperature: float | None,
    positions: int | None = None,
) -> RuleArguments:
    """The arguments of a deferral rule, as the operators take them.

    ``positions`` is the number of positions a row where a parameter for each of them is accepted.
    """
    if isinstance(rule, Rule):
        if (
            param is not None
            or rule_temperature is not None
            or critical != "exclude"
            or temperature != 1.0
        ):
            _refuse_beside_rule(param, critical, temperature, rule_temperature)
        return _param_tensor(rule.param, like, positions), *rule.codes
    key = rule, param, critical, temperature, rule_temperature
    plain = type(param) is float and not _compiling()
    if plain:
        try:
            made = _rules.get(key)
        except TypeError:  # something unhashable: let the checks name it
            made = None
        if made is not None:
            return made
    value, codes = rules.check_rule(*key)
    made = _param_tensor(value, like, positions), *codes
    if plain and type(made[0]) is Tensor:
        if len(_rules) >= _CACHE_LIMIT:
            _rules.clear()
        _rules[key] = made
    return made


def refuse_proxy_rule(name: str, rule: str | Rule, code: int) -> None:
    """Raise for a rule that needs the proxy's probabilities where there are none."""
    if code in rules.NEEDS_PROXY:
        given = rule.name if isinstance(rule, Rule) else rule
        raise ValueError(
            f"rule is {given!r}, which needs proxy_logits; {name} accepts "
            + ", ".join(n for i, n in enumerate(rules.RULE_NAMES) if i not in rules.NEEDS_PROXY)
        )


def check_output(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int], device: torch.device
) -> None:
    """Raise unless a tensor may be written: contiguous, this dtype, shape and device, no grad."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}, expected a tensor")
    check_dense(name, tensor)
    if tensor.dtype is not dtype or tensor.shape != shape or tensor.device != device:
        raise ValueError(
            f"{name} is {_describe(tensor)}, expected shape {list(shape)}, {dtype}, on {device}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous, expected a contiguous tensor")
    refuse_grad(name, tensor)


def outputs(
    op: OpSpec,
    out: Tensor | Sequence[Tensor] | None,
    like: Tensor,
    fields: tuple[str, ...] = (),
    shape: tuple[int, ...] | None = None,
    left: bool = False,
) -> Sequence[Tensor] | None:
    """``out`` as :func:`~tta_ext.dispatch.invoke` takes it, checked against the op's table.

    Args:
        like: the operator's first tensor.
        fields: what the public result calls its outputs, where there are several.
        shape: in place of that of ``like``.
        left: to the kernel are left dtypes, strides and numbers of elements.
    """
    if out is None:
        return None
    found: Any = out if fields else (out,)
    results = op.results
    if len(found) != len(results):
        raise ValueError(
            f"out has {len(found)} tensors, expected {len(results)}: {', '.join(fields)}"
        )
    for tensor, (name, dtype, dims, _) in zip(found, results):  # noqa: B905
        if (
            left
            and type(tensor) is Tensor
            and not tensor.requires_grad
            and (tensor.dim() == 1 if dims == 1 else tensor.shape == (shape or like.shape))
        ):
            continue
        whole, device = like.shape if shape is None else shape, like.device
        wanted = (whole[0],) if dims == 1 else whole if dims is None else whole[:dims]
        if (  # what most calls need, without another call
            type(tensor) is not Tensor
            or tensor.dtype is not dtype
            or tensor.shape != wanted
            or tensor.device != device
            or not tensor.is_contiguous()
            or tensor.requires_grad
        ):
            given = f"out.{fields[op.outputs.index(name)]}" if fields else "out"
            check_output(given, tensor, dtype or like.dtype, wanted, device)
    return found
