"""What happened at each token, for people and for JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tta_ext import ops
from tta_ext.rules import Rule

__all__ = ["TokenTrace", "trace_step"]


@dataclass
class TokenTrace:
    """One token's account. All probabilities at ``temperature``.

    Attributes:
        token: the id.
        source: ``"base"`` or ``"proxy"``.
        p: the base's probability of the token.
        q: the proxy's; None where the proxy was not run.
        deferred_mass: probability that the base's draw at this position would be rejected.
        critical: id of the critical item, the first that the knapsack had no room for; None if the
            rule has none.
        used: mass of the deferred set at the rule's own temperature.
    """

    token: int
    source: str
    p: float
    q: float | None
    deferred_mass: float
    critical: int | None
    used: float

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


def _chosen(logits: Tensor, token: Tensor, temperature: float) -> list[float]:
    log_p = torch.log_softmax(logits.float() / temperature, dim=-1)
    return log_p.gather(1, token[:, None])[:, 0].exp().tolist()


def trace_step(
    base_logits: Tensor,
    proxy_logits: Tensor | None,
    rows_with_proxy: Sequence[int] | None,
    token: Tensor,
    deferred: Sequence[bool],
    rule: Rule,
) -> list[TokenTrace]:
    """Account for one step of some rows; a row whose logits make no law gets NaN.

    Args:
        base_logits: ``[rows, V]``.
        proxy_logits: ``[rows or len(rows_with_proxy), V]``, or None if the proxy was not run; a
            rule that looks at ``q`` needs all rows.
        rows_with_proxy: the rows that ``proxy_logits`` belong to; None for all.
        token: int64 ``[rows]``, the tokens emitted.
        deferred: their sources.
        rule: the rule for these rows.
    """
    temperature = rule.temperature
    q_rows = proxy_logits if rule.needs_proxy else None
    stats = ops.deferral_stats(base_logits, q_rows, rule=rule, check=False)
    p = _chosen(base_logits, token, temperature)
    q: list[float | None] = [None] * len(p)
    if proxy_logits is not None:
        rows = list(range(len(p))) if rows_with_proxy is None else list(rows_with_proxy)
        for row, value in zip(rows, _chosen(proxy_logits, token[rows], temperature), strict=True):
            q[row] = value
    return [
        TokenTrace(
            token=one_token,
            source="proxy" if from_proxy else "base",
            p=one_p,
            q=one_q,
            deferred_mass=mass,
            critical=critical if critical >= 0 else None,
            used=used if math.isfinite(used) else float("nan"),
        )
        for one_token, from_proxy, one_p, one_q, mass, critical, used in zip(
            token.tolist(),
            deferred,
            p,
            q,
            stats.deferred_mass.tolist(),
            stats.critical.tolist(),
            stats.used.tolist(),
            strict=True,
        )
    ]
