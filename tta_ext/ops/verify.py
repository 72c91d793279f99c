"""Speculative verification of a draft by the proxy against the law of a deferral rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tta_ext import rng, rules
from tta_ext.dispatch import invoke
from tta_ext.ops import _arguments as args
from tta_ext.ops._documentation import documented
from tta_ext.rules import Rule
from tta_ext.schemas import OPS

__all__ = ["Verified", "deferral_verify"]


class Verified(NamedTuple):
    """What remains of a draft.

    Attributes:
        accepted: int64 ``[B]``, draft tokens accepted.
        token: int64 ``[B]``, the token after them; -1 where it is the caller's to draw from q, or
            the row is invalid.
        deferred: bool ``[B]``, that token is the proxy's.
        mass: float64 ``[B, K+1]``: deferred mass D of the positions read, -1 for those that
            were not read or not asked for, NaN for an invalid row.
    """

    accepted: Tensor
    token: Tensor
    deferred: Tensor
    mass: Tensor


_VERIFY = OPS["deferral_verify"]


@documented
def deferral_verify(
    base_logits: Tensor,
    proxy_logits: Tensor,
    draft: Tensor,
    draft_length: Tensor,
    *,
    rule: str | Rule,
    param: float | Tensor | None = None,
    critical: str = "exclude",
    temperature: float = 1.0,
    rule_temperature: float | None = None,
    seed: int | Tensor | None = None,
    position: int | Tensor | None = None,
    sequence: int | Tensor | None = None,
    iteration: int = 0,
    rollout: int | Tensor = 0,
    do_sample: bool = True,
    return_mass: bool = True,
    check: bool | None = None,
    out: Sequence[Tensor] | None = None,
) -> Verified:
    """Accept the longest prefix of a draft that keeps the output's law pi, and add one token.

    Draft tokens x_1..x_K were drawn from q (same logits bits and temperature as given here). x_k is
    accepted if ``r < pi_k(x_k) / q_k(x_k)`` with r uniform in [0, 1) (stream VERIFY); after the
    first rejection the next token is drawn from ``max(pi - q, 0) = max((1 - mu) p - (1 - D) q, 0)``
    (stream RESIDUAL), the kept mass 1 - D summed directly; if all are accepted it is drawn from pi
    (streams BONUS, SPLIT and PROXY). The output is distributed as without a draft. A token is
    accepted with probability at least D. Conventions: q(x) = 0 is rejected; D = 1 or a residual
    that is empty in floating point accepts.

    With ``do_sample=False`` x_k is accepted if it is argmax pi_k, else argmax pi_k is emitted.
    ``param`` may also have one value a position, ``[B, K+1]``. ``position`` is that of the first
    draft token; the k-th draws with ``position + k``.

    Args:
        base_logits: ``[B, K+1, V]``, float32, float16 or bfloat16, unit stride over V.
        proxy_logits: ``[B, K, V]`` or ``[B, K+1, V]``. With K positions the token after a fully
            accepted draft of length K is -1 with ``deferred`` where the base model's draw is
            rejected: the caller draws it from q (stream PROXY). Rules that need q want K+1.
        draft: int64 ``[B, K]``; entries at and after a row's length are not read.
        draft_length: int64 ``[B]``, 0 to K.
        {rule}
        {key}
        return_mass: compute D of every position reached; otherwise ``mass`` is -1 and D is summed
            only where the decision hangs on it.
        check: raise for invalid rows among the positions reached (default on the CPU); otherwise
            the row ends there with token -1.
        out: a :class:`Verified` (or tuple) of contiguous tensors to write.

    Returns:
        {Verified}

    Errors: as in :mod:`tta_ext.ops.deferral`.

    Bytes moved: ``(2 a + 1) V s`` to ``(2 a + 2) V s`` a row with a accepted tokens.

    Source: speculative sampling (arXiv:2211.17192, 2302.01318) applied to the mixture pi.

    Example:
        >>> base, proxy = torch.zeros(1, 3, 8), torch.zeros(1, 3, 8)
        >>> draft, length = torch.tensor([[5, 2]]), torch.tensor([2])
        >>> deferral_verify(
        ...     base, proxy, draft, length, rule="threshold", param=0.0, seed=0, position=0
        ... ).accepted
        tensor([2])
    """
    form = "[B, K+1, V]"
    args.check_logits("base_logits", base_logits, 3, form)
    args.check_logits("proxy_logits", proxy_logits, 3, "[B, K, V] or [B, K+1, V]")
    rows, positions, vocabulary = base_logits.shape
    if positions < 1:
        raise ValueError(f"base_logits has shape {list(base_logits.shape)}, expected {form}")
    shape = proxy_logits.shape
    if shape[0] != rows or shape[2] != vocabulary or shape[1] not in (positions - 1, positions):
        raise ValueError(
            f"proxy_logits has shape {list(shape)}, expected [{rows}, {positions - 1} or "
            f"{positions}, {vocabulary}]"
        )
    if proxy_logits.device != base_logits.device:
        raise ValueError(
            f"proxy_logits is on {proxy_logits.device}, expected the device of base_logits, "
            f"{base_logits.device}"
        )
    base, proxy = base_logits, proxy_logits
    args.check_tensor("draft", draft, torch.int64, (rows, positions - 1), base.device)
    args.check_kind("draft_length", draft_length, torch.int64, base.device)
    if draft_length.shape == (rows, 1):
        draft_length = draft_length.squeeze(1)
    args.check_tensor("draft_length", draft_length, torch.int64, (rows,), base.device)
    numbers = args.rule_arguments(
        base, rule, param, critical, temperature, rule_temperature, positions
    )
    if numbers[1] in rules.NEEDS_PROXY and shape[1] != positions:
        raise ValueError(
            f"proxy_logits has {shape[1]} positions, expected {positions} for rule {rule!r}, "
            "which needs the proxy at every position"
        )
    key = args.key_arguments(base, seed, position, sequence, iteration, rollout, do_sample)
    if isinstance(position, int) and position + positions > rng.WORD:
        raise ValueError(
            f"position is {position}, expected 0 <= position < 2**32 - {positions - 1}: the k-th "
            "draft draws with position + k"
        )
    outs = args.outputs(_VERIFY, out, base, Verified._fields)
    flag = args.check_flag(check, base)
    arguments = (base, proxy, draft, draft_length, *numbers, *key, bool(return_mass), flag)
    return Verified(*invoke(_VERIFY, arguments, outs))
