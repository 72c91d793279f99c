"""The greedy 0-1 knapsack for any profits and weights."""

from __future__ import annotations

import torch
from torch import Tensor

from tta_ext.backends.reference import _common as common


def _check_items(name: str, values: Tensor, check: bool) -> Tensor:
    return common.checked(
        (~torch.isfinite(values) | (values < 0)).any(-1),
        check,
        lambda row: f"row {row} of {name} has a negative, infinite or NaN value",
    )


def greedy_knapsack(
    profit: Tensor, weight: Tensor, capacity: Tensor, check: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Selection ``[B, V]``; used weight, value, critical item and Dantzig bound ``[B]``.

    Items are taken by falling density profit / weight (ties: lowest index) until the first that no
    longer fits. Weightless items are always taken; items heavier than the capacity never.
    """
    batch = profit.shape[0]
    invalid = _check_items("profit", profit, check) | _check_items("weight", weight, check)
    room = capacity.to(device=profit.device, dtype=torch.float64).reshape(-1).expand(batch)
    invalid = invalid | common.checked(
        torch.isnan(room) | (room < 0),
        check,
        lambda i: f"capacity[{i}] is {float(room[i])}, expected a capacity >= 0",
    )
    room = torch.where(invalid, 0.0, room).unsqueeze(-1)
    profits = torch.where(invalid.unsqueeze(-1), 0.0, profit.to(torch.float64))
    weights = torch.where(invalid.unsqueeze(-1), 0.0, weight.to(torch.float64))

    free = weights == 0
    item = ~free & (weights <= room)
    density = torch.where(item, profits / weights, 0.0)
    # The bits of a positive double grow with its value.
    key = torch.where(item, -density.view(torch.int64), 0)
    prefix = common.greedy_prefix(key, item, weights, room)
    selected = free | prefix.taken
    value = torch.where(selected, profits, 0.0).sum(-1)

    at = prefix.critical.clamp(min=0)
    gap = (room.squeeze(-1) - prefix.used) * common.pick(profits, at) / common.pick(weights, at)
    bound = torch.where(prefix.critical >= 0, value + gap, value)
    return (
        selected & ~invalid.unsqueeze(-1),
        torch.where(invalid, torch.nan, prefix.used),
        torch.where(invalid, torch.nan, value),
        torch.where(invalid, -2, prefix.critical),
        torch.where(invalid, torch.nan, bound),
    )
