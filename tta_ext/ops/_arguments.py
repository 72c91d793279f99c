"""Validation and conversion of the arguments of public operators.

The functions run before every call of a decoding loop, so numbers are checked once and kept as
tensors, and tensors are looked at through attributes alone: nothing here reads their values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from tta_ext import rng, rules

LOGIT_DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))
MAX_VOCABULARY = 1 << 20

_FLOAT32_MAX = 3.4028234663852886e38
_FLOAT32_TINY = 1.1754943508222875e-38

RuleArguments = tuple[Tensor, int, int, float, float]
KeyArguments = tuple[Tensor, Tensor, Tensor, int, Tensor, bool]

_compiling = torch.compiler.is_compiling


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}, {value.dtype}, on {value.device}"
    return repr(value)


def check_logits(name: str, logits: Tensor, dims: int, form: str) -> None:
    """Raise unless ``logits`` has an accepted dtype, shape and layout."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} is {type(logits).__name__}, expected a tensor {form}")
    if logits.dtype not in LOGIT_DTYPES:
        raise TypeError(
            f"{name} has dtype {logits.dtype}, expected torch.float32, torch.float16 or "
            "torch.bfloat16"
        )
    shape = logits.shape
    if len(shape) != dims:
        raise ValueError(f"{name} has shape {list(shape)}, expected {form}")
    if not 1 <= shape[-1] <= MAX_VOCABULARY:
        raise ValueError(
            f"{name} has a last dimension of {shape[-1]}, expected 1 to {MAX_VOCABULARY}"
        )
    if logits.stride(-1) != 1 and shape[-1] != 1:
        raise ValueError(
            f"{name} has stride {logits.stride(-1)} over its last dimension, expected 1; "
            "call .contiguous() on it"
        )


def plain_matrix(logits: Tensor) -> bool:
    """Whether logits surely pass ``check_logits(..., dims=2)``: a few attribute reads."""
    return (
        type(logits) is Tensor
        and logits.dim() == 2
        and logits.dtype in LOGIT_DTYPES
        and logits.is_contiguous()
        and 0 < logits.shape[1] <= MAX_VOCABULARY
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


def check_tensor(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int], device: torch.device
) -> None:
    """Raise unless a tensor has exactly this dtype, shape and device."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is {_describe(tensor)}, expected a tensor of dtype {dtype}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected {dtype}")
    if tensor.shape != torch.Size(shape):
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}")


def check_flag(check: bool | None, tensor: Tensor) -> bool:
    """Whether rows are checked: by default on the CPU, where it costs no synchronisation."""
    if check is None:
        return tensor.is_cpu and not _compiling()
    return bool(check)


# Numbers as tensors. A tensor made while a fake or another tensor mode is active is not a plain
# one and must not be kept for later calls.
_integers: dict[int, Tensor] = {}
_doubles: dict[float, Tensor] = {}
_ranges: dict[tuple[int, torch.device], Tensor] = {}
# Seeds and rollouts that have passed their checks, by the number as it was given.
_seeds: dict[int, Tensor] = {}
_rollouts: dict[int, Tensor] = {}
_CACHE_LIMIT = 4096


def _keep(cache: dict[Any, Tensor], key: Any, tensor: Tensor) -> Tensor:
    if type(tensor) is Tensor:
        if len(cache) >= _CACHE_LIMIT:
            cache.clear()
        cache[key] = tensor
    return tensor


def integer(value: int) -> Tensor:
    """A 0-dim int64 CPU tensor; do not write to it."""
    if _compiling():
        return torch.scalar_tensor(value, dtype=torch.int64, device="cpu")
    cached = _integers.get(value)
    if cached is None:
        with torch.inference_mode(False):
            cached = _keep(_integers, value, torch.tensor(value, dtype=torch.int64, device="cpu"))
    return cached


def double(value: float) -> Tensor:
    """A 0-dim float64 CPU tensor; do not write to it."""
    if _compiling():
        return torch.scalar_tensor(value, dtype=torch.float64, device="cpu")
    cached = _doubles.get(value)
    if cached is None:
        with torch.inference_mode(False):
            cached = _keep(_doubles, value, torch.tensor(value, dtype=torch.float64, device="cpu"))
    return cached


def _arange(count: int, device: torch.device) -> Tensor:
    if _compiling():
        return torch.arange(count, dtype=torch.int64, device=device)
    cached = _ranges.get((count, device))
    if cached is None:
        with torch.inference_mode(False):
            made = torch.arange(count, dtype=torch.int64, device=device)
            cached = _keep(_ranges, (count, device), made)
    return cached


def is_int(value: object) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def index_tensor(name: str, value: int | Tensor, count: int, device: torch.device) -> Tensor:
    """Indices of 32 bits as int64: one for all rows, or one a row."""
    if isinstance(value, Tensor):
        if value.dtype is not torch.int64:
            raise TypeError(f"{name} has dtype {value.dtype}, expected torch.int64")
        size = value.numel()
        if size != 1 and (size != count or value.dim() != 1):
            raise ValueError(
                f"{name} has shape {list(value.shape)}, expected one element or [{count}]"
            )
        if value.device != device and (size != 1 or not value.is_cpu):
            raise ValueError(f"{name} is on {value.device}, expected {device}")
        return value
    if not is_int(value):
        raise TypeError(f"{name} is {value!r}, expected an int or an int64 tensor")
    if not 0 <= value < rng.WORD:
        rng.check_word(name, value)
    return integer(value)


def _plain_index(value: object, count: int) -> TypeGuard[Tensor]:
    """Whether a tensor surely passes :func:`index_tensor` beside CPU logits."""
    return (
        type(value) is Tensor
        and value.is_cpu
        and value.dtype is torch.int64
        and value.numel() == count
        and value.dim() == 1
    )


def sequence_tensor(value: int | Tensor | None, count: int, device: torch.device) -> Tensor:
    """Sequence ids; row numbers where the caller gives none."""
    if value is None:
        return _arange(count, device)
    return index_tensor("sequence", value, count, device)


def rollout_tensor(value: int | Tensor, count: int, device: torch.device) -> Tensor:
    """Rollout numbers of 16 bits."""
    if not isinstance(value, Tensor) and is_int(value) and not 0 <= value < rng.ROLLOUTS:
        rng.check_rollout(value)
    made = index_tensor("rollout", value, count, device)
    return made if isinstance(value, Tensor) or _compiling() else _keep(_rollouts, value, made)


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The seed as one int64 element."""
    if isinstance(seed, Tensor):
        if seed.dtype is not torch.int64:
            raise TypeError(f"seed has dtype {seed.dtype}, expected torch.int64")
        if seed.numel() != 1:
            raise ValueError(f"seed has shape {list(seed.shape)}, expected one element")
        if seed.device != device and not seed.is_cpu:
            raise ValueError(f"seed is on {seed.device}, expected {device}")
        return seed
    if isinstance(seed, torch.Generator):
        raise TypeError("seed is a torch.Generator, expected tta_ext.rng.seed_from_generator of it")
    if seed is None or not is_int(seed):
        raise TypeError(f"seed is {seed!r}, expected an int or an int64 tensor")
    made = integer(rng.as_seed(seed))
    return made if _compiling() else _keep(_seeds, seed, made)


def key_arguments(
    like: Tensor,
    seed: int | Tensor | None,
    position: int | Tensor | None,
    sequence: int | Tensor | None,
    iteration: int,
    rollout: int | Tensor,
    do_sample: bool,
) -> KeyArguments:
    """The arguments that name random numbers, as the operators take them."""
    count, device, on_cpu = like.shape[0], like.device, like.is_cpu
    if seed is None or position is None:
        if do_sample:
            missing = "seed" if seed is None else "position"
            raise TypeError(f"{missing} is None, expected an int or an int64 tensor to draw with")
        seed = 0 if seed is None else seed
        position = 0 if position is None else position
    if not 0 <= iteration < rng.ITERATIONS:
        rng.check_iteration(iteration)
    plain = on_cpu and not _compiling()
    known_seed = _seeds.get(seed) if plain and type(seed) is int else None
    known_rollout = _rollouts.get(rollout) if plain and type(rollout) is int else None
    return (
        seed_tensor(seed, device) if known_seed is None else known_seed,
        position
        if on_cpu and _plain_index(position, count)
        else index_tensor("position", position, count, device),
        sequence
        if on_cpu and _plain_index(sequence, count)
        else sequence_tensor(sequence, count, device),
        iteration,
        rollout_tensor(rollout, count, device) if known_rollout is None else known_rollout,
        bool(do_sample),
    )


def check_temperature(name: str, value: float) -> float:
    """A temperature whose inverse is a normal float32."""
    try:
        inverse = 1.0 / value
    except (ZeroDivisionError, TypeError):
        inverse = math.nan
    if not _FLOAT32_TINY <= inverse <= _FLOAT32_MAX:
        raise ValueError(
            f"{name} is {value!r}, expected a positive finite number between 2.94e-39 and 8.5e37"
        )
    return float(value)


def _rule_numbers(
    rule: str,
    param: float | None,
    critical: str,
    temperature: float,
    rule_temperature: float | None,
) -> tuple[float, int, int, float, float]:
    code = rules.rule_code(rule)
    critical_code = rules.critical_code(critical)
    temperature = check_temperature("temperature", temperature)
    if rule_temperature is None:
        rule_temperature = temperature
    else:
        rule_temperature = check_temperature("rule_temperature", rule_temperature)
    if param is None:
        if code != rules.ARGMAX:
            raise ValueError(f"param is None, expected a number for rule {rule!r}")
        param = 0.0
    elif code == rules.ARGMAX:
        raise ValueError(f"param is {param!r}, expected None for rule 'argmax'")
    if isinstance(param, bool) or not isinstance(param, (int, float, torch.SymFloat)):
        raise TypeError(f"param is {param!r}, expected a number or a float64 tensor")
    if code == rules.KNAPSACK and not param >= 0:
        raise ValueError(f"param is {param!r}, expected a budget >= 0 for rule 'knapsack'")
    if param != param:
        raise ValueError(f"param is {param!r}, expected a number for rule {rule!r}")
    return float(param), code, critical_code, temperature, rule_temperature


def rule_arguments(
    like: Tensor,
    rule: str,
    param: float | Tensor | None,
    critical: str,
    temperature: float,
    rule_temperature: float | None,
    positions: int | None = None,
) -> RuleArguments:
    """The arguments of a deferral rule, as the operators take them.

    ``positions`` is the number of positions a row where a parameter for each of them is accepted.
    """
    count = like.shape[0]
    if isinstance(param, Tensor):
        code = rules.rule_code(rule)
        if code == rules.ARGMAX:
            raise ValueError("param is a tensor, expected None for rule 'argmax'")
        if param.dtype is not torch.float64:
            raise TypeError(f"param has dtype {param.dtype}, expected torch.float64")
        size = param.numel()
        accepted = (count,) if positions is None else (count, positions)
        if size != 1 and param.shape not in ((count,), accepted):
            more = "" if positions is None else f" or [{count}, {positions}]"
            raise ValueError(
                f"param has shape {list(param.shape)}, expected one element or [{count}]{more}"
            )
        if param.device != like.device and (size != 1 or not param.is_cpu):
            raise ValueError(f"param is on {param.device}, expected {like.device}")
        number, tensor = 1.0, param
    else:
        number, tensor = param, None  # type: ignore[assignment]
    numbers = _rule_numbers(rule, number, critical, temperature, rule_temperature)
    if tensor is None:
        tensor = double(numbers[0])
    return tensor, numbers[1], numbers[2], numbers[3], numbers[4]


# What rule_arguments made of plain numbers; of no use to a compiler, which wants to see them made.
_rules: dict[tuple[object, ...], RuleArguments] = {}


def quick_rule_arguments(
    like: Tensor,
    rule: str,
    param: float | Tensor | None,
    critical: str,
    temperature: float,
    rule_temperature: float | None,
) -> RuleArguments:
    """:func:`rule_arguments`, remembered for numbers: a decoding loop asks the same every step."""
    if type(param) is not float or _compiling():
        return rule_arguments(like, rule, param, critical, temperature, rule_temperature)
    key = rule, param, critical, temperature, rule_temperature
    try:
        made = _rules.get(key)
    except TypeError:  # something unhashable: let the checks name it
        made = None
    if made is None:
        made = rule_arguments(like, *key)
        if type(made[0]) is Tensor:
            if len(_rules) >= _CACHE_LIMIT:
                _rules.clear()
            _rules[key] = made
    return made


def refuse_proxy_rule(name: str, rule: str, code: int) -> None:
    """Raise for a rule that needs the proxy's probabilities where there are none."""
    if code in rules.NEEDS_PROXY:
        raise ValueError(
            f"rule is {rule!r}, which needs proxy_logits; {name} accepts "
            + ", ".join(n for i, n in enumerate(rules.RULE_NAMES) if i not in rules.NEEDS_PROXY)
        )


def check_outputs(
    out: Sequence[Tensor],
    names: tuple[str, ...],
    expected: Sequence[tuple[torch.dtype, Sequence[int]]],
    device: torch.device,
) -> Sequence[Tensor]:
    """Raise unless ``out`` holds contiguous tensors of the expected dtypes and shapes."""
    if len(out) != len(names):
        raise ValueError(f"out has {len(out)} tensors, expected {len(names)}: {', '.join(names)}")
    for tensor, name, (dtype, shape) in zip(out, names, expected):  # noqa: B905
        if not isinstance(tensor, Tensor):
            raise TypeError(f"out.{name} is {type(tensor).__name__}, expected a tensor")
        if tensor.dtype is not dtype or tensor.shape != shape or tensor.device != device:
            raise ValueError(
                f"out.{name} is {_describe(tensor)}, expected shape {list(shape)}, {dtype}, "
                f"on {device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"out.{name} is not contiguous, expected a contiguous tensor")
    return out


def check_output(
    out: Tensor, dtype: torch.dtype, shape: Sequence[int], device: torch.device
) -> tuple[Tensor]:
    """The same for an operator with a single output."""
    if not isinstance(out, Tensor):
        raise TypeError(f"out is {type(out).__name__}, expected a tensor")
    if out.dtype is not dtype or out.shape != torch.Size(shape) or out.device != device:
        raise ValueError(
            f"out is {_describe(out)}, expected shape {list(shape)}, {dtype}, on {device}"
        )
    if not out.is_contiguous():
        raise ValueError("out is not contiguous, expected a contiguous tensor")
    return (out,)
