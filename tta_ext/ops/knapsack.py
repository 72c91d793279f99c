"""The greedy 0-1 knapsack for any profits and weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tta_ext import rules
from tta_ext.dispatch import invoke
from tta_ext.ops import _arguments as args
from tta_ext.ops._documentation import documented
from tta_ext.schemas import OPS

__all__ = ["Knapsack", "greedy_knapsack"]


class Knapsack(NamedTuple):
    """A greedy selection.

    Attributes:
        selected: bool ``[B, V]``.
        used: float64 ``[B]``, weight of the selected items, at most the capacity.
        value: float64 ``[B]``, their profit.
        critical: int64 ``[B]``, index of the first item in greedy order that was not taken; -1 if
            there is none, -2 for an invalid row.
        upper_bound: float64 ``[B]``, Dantzig's bound: no selection is worth more.
    """

    selected: Tensor
    used: Tensor
    value: Tensor
    critical: Tensor
    upper_bound: Tensor


_KNAPSACK = OPS["greedy_knapsack"]


@documented
def greedy_knapsack(
    profit: Tensor,
    weight: Tensor,
    capacity: float | Tensor,
    *,
    check: bool | None = None,
    out: Sequence[Tensor] | None = None,
) -> Knapsack:
    """Take items by falling density ``profit / weight`` until the first that does not fit.

    Weightless items are always taken, items heavier than the capacity left out beforehand; then the
    better of the selection and the critical item alone is worth at least half of the optimum. The
    density is a float64 quotient, ties go to the lowest index, the running weight is a float64 sum
    of one fixed order, and an item is taken iff the running weight with it is at most the capacity.
    Nothing is sorted.

    Dantzig's bound is ``value + (capacity - used) * profit_c / weight_c`` with the critical item c.

    Args:
        profit: float32 ``[B, V]``, finite and not negative, unit stride over V.
        weight: float32 ``[B, V]``, likewise.
        capacity: a float, or float64 with one element or ``[B]``; not negative, may be inf.
        check: raise ``ValueError`` for rows with negative, infinite or NaN items (default on the
            CPU); otherwise nothing is selected there and the numbers are NaN.
        out: a :class:`Knapsack` (or tuple) of contiguous tensors to write.

    Returns:
        {Knapsack}

    Errors: ``TypeError`` for other dtypes, ``ValueError`` for shapes, devices, layout, capacity.

    Bytes moved: at least ``9 B V``; each refinement of the cut reads part of the items again.

    Source: Dantzig, "Discrete-variable extremum problems", Operations Research 5 (1957).

    Example:
        >>> profit, weight = torch.tensor([[6.0, 5.0, 4.0]]), torch.tensor([[2.0, 2.0, 3.0]])
        >>> greedy_knapsack(profit, weight, 4.5).selected
        tensor([[ True,  True, False]])
    """
    args.check_matrices("[B, V]", profit=profit, weight=weight)
    if isinstance(capacity, Tensor):
        limit = args.one_or_each(
            "capacity", capacity, torch.float64, profit.shape[0], profit.device
        )
    else:
        if isinstance(capacity, bool) or not isinstance(capacity, (int, float, torch.SymFloat)):
            raise TypeError(f"capacity is {capacity!r}, expected a number or a float64 tensor")
        if not capacity >= 0:
            raise ValueError(f"capacity is {capacity!r}, expected a capacity >= 0")
        limit = args.double(rules.as_float("capacity", capacity))
    outs = args.outputs(_KNAPSACK, out, profit, Knapsack._fields)
    arguments = (profit, weight, limit, args.check_flag(check, profit))
    return Knapsack(*invoke(_KNAPSACK, arguments, outs))
