"""Comparison of a provider's result with float64, before it is timed.

Ours and the reference must meet the tight bounds; the eager chains and torch.compile compute in
float32 with long running sums and get the loose ones. Random draws of torch's own generator cannot
be predicted, so for those only the possibility of the token is checked.
"""

from __future__ import annotations

import torch
from torch import Tensor

TIGHT = ("ours", "reference")
TIGHT_BOUND = 1e-5
LOOSE_BOUND = 1e-3
ROWS = 4
FULL_CHECK = 1 << 22


def rows_to_check(batch: int, vocab: int) -> Tensor:
    """All rows of small cases; first, last and two between of large ones (float64 is slow)."""
    if batch * vocab <= FULL_CHECK or batch <= ROWS:
        return torch.arange(batch)
    return torch.linspace(0, batch - 1, ROWS).round().long()


def _bound(provider: str) -> float:
    return TIGHT_BOUND if provider in TIGHT else LOOSE_BOUND


def distribution(provider: str, got: Tensor, want: Tensor) -> str:
    """Total variation between two distributions over the vocabulary."""
    distance = float((got.double() - want.double()).abs().sum(-1).max()) / 2
    bound = _bound(provider)
    return "" if distance <= bound else f"total variation {distance:.1e} from float64 > {bound}"


def mask(provider: str, got: Tensor, want: Tensor, p: Tensor) -> str:
    """Probability mass of the tokens on which two masks differ."""
    mass = float(torch.where(got != want, p, 0.0).sum(-1).max())
    bound = _bound(provider)
    return "" if mass <= bound else f"masks differ on a mass of {mass:.1e} > {bound}"


def values(provider: str, got: Tensor, want: Tensor) -> str:
    """Relative error of numbers of order one."""
    error = float(
        ((got.double() - want.double()).abs() / want.double().abs().clamp(min=1e-3)).max()
    )
    bound = _bound(provider)
    return "" if error <= bound else f"relative error {error:.1e} > {bound}"


def tokens(provider: str, got: Tensor, want: Tensor, probs: Tensor) -> str:
    """The same tokens as the float64 reference; possible ones for draws of another generator."""
    if provider in TIGHT:
        wrong = int((got != want).sum())
        return "" if wrong == 0 else f"{wrong} of {want.numel()} tokens differ from float64"
    possible = probs.gather(-1, got.unsqueeze(-1)) > 0
    return "" if bool(possible.all()) else "drew a token of probability zero"


def equal(got: Tensor, want: Tensor) -> str:
    """The very same elements."""
    wrong = int((got != want).sum())
    return "" if wrong == 0 else f"{wrong} of {want.numel()} elements differ from float64"
