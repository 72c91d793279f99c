"""What all reference operators share: argument groups, row checks, weights, the greedy prefix."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor

from tta_ext import rng
from tta_ext.backends.reference.philox import blocks

Returned = TypeVar("Returned")

# exp is taken as 0 below ln(2**-126), so no weight is subnormal.
_LOG_TINY = -87.33654475055310898657


def invalid_rows(logits: Tensor) -> Tensor:
    """True for rows ``[..., V]`` that hold NaN or +inf, or nothing but -inf."""
    bad = torch.isnan(logits) | (logits == torch.inf)
    return bad.any(-1) | ~torch.isfinite(logits).any(-1)


def checked(invalid: Tensor, check: bool, describe: Callable[[int], str]) -> Tensor:
    """The same flags; with ``check`` the first is a ``ValueError`` with its description."""
    if check and (rows := torch.nonzero(invalid)).numel():
        raise ValueError(describe(int(rows[0, 0])))
    return invalid


def check_logits(
    name: str, logits: Tensor, check: bool, read: Tensor | None = None, at: str = ""
) -> Tensor:
    """Which rows ``[B]`` are unusable, among those that are read; raises if ``check``."""
    invalid = invalid_rows(logits) if read is None else invalid_rows(logits) & read
    complaint = f"{at} of {name} has NaN or +inf, or no finite value"
    return checked(invalid, check, lambda row: f"row {row}{complaint}")


def check_indices(name: str, values: Tensor, stop: int, check: bool) -> None:
    """``ValueError`` unless all integers lie in ``[0, stop)``; nothing without ``check``."""
    flat = values.reshape(-1)
    less = rng.WORD - stop
    limit = str(stop) if stop < 1 << 31 else f"2**32 - {less}" if less else "2**32"
    checked(
        (flat < 0) | (flat >= stop),
        check,
        lambda i: f"{name}[{i}] is {int(flat[i])}, expected 0 <= {name} < {limit}",
    )


class RuleArguments(NamedTuple):
    """A deferral rule: the arguments that :data:`tta_ext.schemas.RULE` names."""

    param: Tensor
    code: int
    critical: int
    temperature: float
    rule_temperature: float


class KeyArguments(NamedTuple):
    """Whose random numbers are drawn: the arguments that :data:`tta_ext.schemas.KEY` names."""

    seed: Tensor
    position: Tensor
    sequence: Tensor
    iteration: int
    rollout: Tensor
    do_sample: bool

    def check(self, check: bool) -> None:
        """Position and sequence must fit the counter's 32-bit words, the rollout its 16 bits."""
        check_indices("position", self.position, rng.WORD, check)
        check_indices("sequence", self.sequence, rng.WORD, check)
        check_indices("rollout", self.rollout, rng.ROLLOUTS, check)

    def uniform(self, like: Tensor, stream: int, draw: int = 0) -> Tensor:
        """One uniform a row of ``like``, float64, a multiple of 2**-32 in [0, 1)."""
        c0 = torch.full((like.shape[0],), draw, dtype=torch.int64, device=like.device)
        c3 = torch.as_tensor(rng.stream_word(stream, self.iteration, self.rollout.reshape(-1)))
        block = blocks(self.seed, c0, self.position.reshape(-1), self.sequence.reshape(-1), c3)
        return block[:, 0].to(torch.float64) * 2.0**-32


def flat(function: Callable[..., Returned]) -> Callable[..., Returned]:
    """An operator in the arguments of its schema, where ``function`` takes groups of them whole.

    A parameter that is annotated as a named tuple takes as many arguments as that has fields.
    """
    kinds = [kind for name, kind in get_type_hints(function).items() if name != "return"]

    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> Returned:
        rest, given = iter(args), []
        for kind in kinds:
            if hasattr(kind, "_fields"):
                given.append(kind(*itertools.islice(rest, len(kind._fields))))
            else:
                given += itertools.islice(rest, 1)
        return function(*given, **options)

    return run


def inverse_temperature(temperature: float) -> float:
    """1/T rounded to float32, the factor that every backend uses."""
    return torch.tensor(1.0 / temperature, dtype=torch.float32).item()


class Softmax(NamedTuple):
    """A softmax before and after division by its sum."""

    weight: Tensor  # [B, V] float64: exp((logit - max) / T), rounded to the compute dtype
    total: Tensor  # [B, 1] float64: their sum
    prob: Tensor  # [B, V] float64: weight / total, rounded to the compute dtype


def softmax(logits: Tensor, temperature: float, compute_dtype: torch.dtype) -> Softmax:
    """Exponentials in the compute dtype, sums and quotients in float64."""
    x = logits.to(compute_dtype)
    x = (x - x.amax(-1, keepdim=True)) * inverse_temperature(temperature)
    weight = torch.where(x < _LOG_TINY, 0.0, torch.exp(x)).to(torch.float64)
    total = weight.sum(-1, keepdim=True)
    return Softmax(weight, total, (weight / total).to(compute_dtype).to(torch.float64))


def usable(logits: Tensor, invalid: Tensor) -> Tensor:
    """The logits with zeros in the invalid rows, so that no NaN gets into the arithmetic."""
    return torch.where(invalid.unsqueeze(-1), torch.zeros((), dtype=logits.dtype), logits)


def argmax(values: Tensor) -> Tensor:
    """Index of the maximum of each row, the lowest index among equals."""
    is_max = values == values.amax(-1, keepdim=True)
    return is_max.to(torch.uint8).argmax(-1)


def draw(weight: Tensor, u: Tensor) -> Tensor:
    """Inverse CDF: the first index whose cumulative weight is greater than ``u`` times the sum."""
    cumulative = weight.to(torch.float64).cumsum(-1)
    target = u.to(torch.float64).unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def pick(values: Tensor, index: Tensor) -> Tensor:
    """``values[row, index[row]]``."""
    return values.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def ascending_key(logits: Tensor) -> Tensor:
    """Integers in the order of the logits as float32, with -0 equal to +0."""
    bits = (logits.to(torch.float32) + 0.0).view(torch.int32).to(torch.int64)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _largest(low: Tensor, high: Tensor, allowed: Callable[[Tensor], Tensor]) -> Tensor:
    """Per row the largest allowed integer in [low, high]; low is allowed, and it is monotone."""
    steps = int((high - low).max()).bit_length() if low.numel() else 0
    for _ in range(steps):
        middle = low + (high - low + 1) // 2
        ok = allowed(middle)
        low = torch.where(ok, middle, low)
        high = torch.where(ok, high, middle - 1)
    return low


class Prefix(NamedTuple):
    """The items that fit, taken in order until the first that does not."""

    taken: Tensor  # [B, V] bool
    critical: Tensor  # [B] int64: the first item not taken, -1 if there is none
    used: Tensor  # [B] float64: weight of the taken items


def greedy_prefix(key: Tensor, item: Tensor, weight: Tensor, capacity: Tensor) -> Prefix:
    """Take items in ascending order of (key, index) while their running weight fits.

    An item is taken iff the weight of all items at or before it is at most the capacity. Nothing is
    sorted: the running weight is monotone along the order, so the last item taken is found by
    bisection, first over the keys, then over the indices of the key where the cut falls. Each step
    is one masked sum.

    Args:
        key: int64 ``[B, V]``, order of the items.
        item: bool ``[B, V]``, what takes part at all.
        weight: float64 ``[B, V]``, not negative.
        capacity: float64 ``[B, 1]``.
    """
    index = torch.arange(key.shape[-1], device=key.device).expand_as(key)

    def running_weight(inside: Tensor) -> Tensor:
        return torch.where(inside & item, weight, 0.0).sum(-1, keepdim=True)

    def fits(inside: Tensor) -> Tensor:
        return running_weight(inside) <= capacity

    # All items with key <= full fit together, and those of the next key do not all fit.
    full = _largest(
        key.amin(-1, keepdim=True) - 1, key.amax(-1, keepdim=True), lambda k: fits(key <= k)
    )
    after = torch.where(item & (key > full), key, torch.iinfo(torch.int64).max)
    cut = after.amin(-1, keepdim=True)
    last = _largest(
        torch.full_like(cut, -1),
        torch.full_like(cut, key.shape[-1] - 1),
        lambda i: fits((key <= full) | ((key == cut) & (index <= i))),
    )
    taken = item & ((key <= full) | ((key == cut) & (index <= last)))
    left = item & (key == cut) & (index > last)
    critical = torch.where(left.any(-1), left.to(torch.uint8).argmax(-1), -1)
    return Prefix(taken, critical, running_weight(taken).squeeze(-1))
