"""What happened at each token, for people and for JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from tta_ext import ops
from tta_ext.rules import Rule

__all__ = ["TokenChoice", "TokenTrace", "trace_step"]

# Most probable tokens of each model that a trace keeps.
TOP = 5


@dataclass(frozen=True)
class TokenChoice:
    """A token that might have been written.

    Attributes:
        token: the id.
        p: the base's probability of it at ``temperature``.
        q: the proxy's; None where the proxy was not run.
        mu: probability with which the rule rejects it, 0 or 1 but for the knapsack's split item.
    """

    token: int
    p: float
    q: float | None
    mu: float


@dataclass
class TokenTrace:
    """One token's account. All probabilities at ``temperature`` unless it is said otherwise.

    Attributes:
        token: the id.
        source: ``"base"`` or ``"proxy"``.
        p: the base's probability of the token.
        q: the proxy's; None where the proxy was not run.
        deferred_mass: probability that the base's draw at this position would be rejected.
        critical: id of the critical item, the first that the knapsack had no room for; None if the
            rule has none.
        used: mass of the deferred set at the rule's own temperature.
        cut: the base's probability, at the rule's own temperature, of the critical item (knapsack)
            or of the least likely token that is kept (other rules); None if there is no such token.
        candidates: the most probable tokens of the base, then those of the proxy where it was run
            (without the base's), in falling order of their model's probability.
    """

    token: int
    source: str
    p: float
    q: float | None
    deferred_mass: float
    critical: int | None
    used: float
    cut: float | None = None
    candidates: list[TokenChoice] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


def _probabilities(logits: Tensor, temperature: float) -> Tensor:
    # To the CPU at once: a trace reads single numbers.
    return torch.softmax(logits.float() / temperature, dim=-1).cpu()


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
    q_rows = proxy_logits if rule.needs_proxy else None
    stats = ops.deferral_stats(base_logits, q_rows, rule=rule, check=False)
    deferred_set = ops.deferral_mask(base_logits, q_rows, rule=rule, check=False)
    mask, critical, fraction = (one.cpu() for one in deferred_set)
    at = rule.codes[3]  # the rule's own temperature
    cut = (stats.cut_logit / at - torch.logsumexp(base_logits.float() / at, dim=-1)).exp().tolist()
    p = _probabilities(base_logits, rule.temperature)
    rows = range(len(p)) if rows_with_proxy is None else rows_with_proxy
    q: dict[int, Tensor] = {}
    if proxy_logits is not None:
        q = dict(zip(rows, _probabilities(proxy_logits, rule.temperature), strict=True))
    traces = []
    for row, (one_token, from_proxy) in enumerate(zip(token.tolist(), deferred, strict=True)):
        laws = [p[row]] + ([q[row]] if row in q else [])
        best = [law.topk(min(TOP, law.numel())).indices.tolist() for law in laws]
        item = int(critical[row])
        used = float(stats.used[row])
        traces.append(
            TokenTrace(
                token=one_token,
                source="proxy" if from_proxy else "base",
                p=float(p[row, one_token]),
                q=float(q[row][one_token]) if row in q else None,
                deferred_mass=float(stats.deferred_mass[row]),
                critical=item if item >= 0 else None,
                used=used if math.isfinite(used) else float("nan"),
                cut=cut[row] if math.isfinite(cut[row]) else None,
                candidates=[
                    TokenChoice(
                        one,
                        float(p[row, one]),
                        float(q[row][one]) if row in q else None,
                        float(fraction[row]) if one == item else float(mask[row, one]),
                    )
                    for one in dict.fromkeys(one for ids in best for one in ids)
                ],
            )
        )
    return traces
