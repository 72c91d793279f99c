"""Deferral operators: a base model proposes tokens, a rule leaves some of them to a proxy.

With base probabilities p = softmax(base_logits / T), proxy probabilities q and a rejection
probability mu(v) that the rule sets, the next token has the law

    pi(v) = (1 - mu(v)) p(v) + q(v) D,      D = sum_w mu(w) p(w).

:mod:`tta_ext.rules` lists the rules. What all operators here share:

**Logits** are float32, float16 or bfloat16 of shape ``[B, V]``, ``1 <= V <= 2**20``, any ``B``, any
row stride, unit stride over V; they are widened to float32 in registers. Base and proxy have the
same shape and device; their dtypes may differ. -inf marks an impossible token. Arguments with one
value a row or position have any stride, outputs are contiguous.

**check**: a row with NaN, +inf or nothing but -inf raises ``ValueError`` naming the row with
``check=True`` (default on the CPU); with ``check=False`` (default elsewhere and in compiled graphs:
no synchronisation) its token is -1, its masses NaN, its critical item -2 and its mask empty.

**Errors**: ``TypeError`` for a wrong dtype or a missing argument, ``ValueError`` for a wrong shape,
device, layout, range or rule; one sentence with the value and what is accepted.

**Numerics**: sums over V have one order, whatever the vector width, the threads and the batch; the
native kernels give the same bits on every instruction set (docs/numerics.md). The gradient
of all outputs is undefined; they never require grad.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from tta_ext.dispatch import invoke
from tta_ext.ops import _arguments as args
from tta_ext.ops._documentation import documented
from tta_ext.ops._left import is_left_to_kernel, rechecks
from tta_ext.rules import Rule
from tta_ext.schemas import OPS

__all__ = [
    "Mask",
    "Proposal",
    "Stats",
    "deferral_mask",
    "deferral_probs",
    "deferral_propose",
    "deferral_sample",
    "deferral_stats",
]


class Mask(NamedTuple):
    """Which tokens are deferred.

    Attributes:
        mask: bool ``[B, V]``, tokens deferred for certain.
        critical: int64 ``[B]``, index of the first item the knapsack does not take (what becomes of
            it, the *argument* ``critical`` says); -1 if there is none, as for all other rules; -2
            for an invalid row.
        fraction: float32 ``[B]``, how much of the critical item is deferred: 0 (exclude), 1
            (include) or what fills the budget (split).
    """

    mask: Tensor
    critical: Tensor
    fraction: Tensor


class Proposal(NamedTuple):
    """A token a row and whether the base model's choice was rejected.

    Attributes:
        token: int64 ``[B]``, -1 for an invalid row.
        deferred: bool ``[B]``.
    """

    token: Tensor
    deferred: Tensor


class Stats(NamedTuple):
    """Where the cut lies, for traces.

    Attributes:
        deferred_mass: float64 ``[B]``, D at ``temperature``.
        critical: int64 ``[B]`` as in :class:`Mask`.
        cut_logit: float32 ``[B]``, for the knapsack the logit of the critical item, otherwise the
            lowest logit that is kept; +inf if there is no such item.
        used: float64 ``[B]``, mass of the deferred tokens at ``rule_temperature``.
    """

    deferred_mass: Tensor
    critical: Tensor
    cut_logit: Tensor
    used: Tensor


_MASK = OPS["deferral_mask"]
_PROBS = OPS["deferral_probs"]
_STATS = OPS["deferral_stats"]
_PROPOSE = OPS["deferral_propose"]
_SAMPLE = OPS["deferral_sample"]

_MATRIX = "[B, V]"
_RECHECK = {
    op: rechecks(_MATRIX, fields)
    for op, fields in (
        (_MASK, Mask._fields),
        (_PROBS, ()),
        (_STATS, Stats._fields),
        (_PROPOSE, Proposal._fields),
        (_SAMPLE, Proposal._fields),
    )
}


def _one(base_logits: Tensor) -> bool:
    """Whether the logits are left to the kernel; otherwise they are checked here."""
    left = is_left_to_kernel(base_logits)
    if not left:
        args.check_logits("base_logits", base_logits, 2, _MATRIX)
    return left


def _pair(base_logits: Tensor, proxy_logits: Tensor) -> bool:
    """The same of two."""
    left = proxy_logits is not None and is_left_to_kernel(base_logits, proxy_logits)
    if not left:
        args.check_logits("base_logits", base_logits, 2, _MATRIX)
        args.check_alike("proxy_logits", proxy_logits, "base_logits", base_logits, _MATRIX)
    return left


@documented
def deferral_mask(
    base_logits: Tensor,
    proxy_logits: Tensor | None = None,
    *,
    rule: str | Rule,
    param: float | Tensor | None = None,
    critical: str = "exclude",
    temperature: float = 1.0,
    rule_temperature: float | None = None,
    check: bool | None = None,
    out: Sequence[Tensor] | None = None,
) -> Mask:
    """Which tokens a rule defers: ``mask = mu == 1``.

    The knapsack takes items (weight p(v), profit -p(v) log p(v)) in ascending order of logit, ties
    in ascending order of id, while their running weight stays at or below the budget; weightless
    items are always taken.

    Args:
        base_logits: ``[B, V]``.
        proxy_logits: ``[B, V]``; needed by ``confidence_bet``, ``proxy_below``, ``proxy_above`` and
            ``optimal``, not read by the other rules.
        {rule}
        {check} its mask is empty, its critical item -2 and its fraction NaN.
        out: a :class:`Mask` (or tuple) of contiguous tensors to write.

    Returns:
        {Mask}

    Bytes moved: ``B V (s + 1)`` with s bytes a logit (``2 s`` for rules that need q).

    Source: arXiv:2510.27017, primal and dual approximation; arXiv:2604.16146.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, -1.0, -1.0]])
        >>> deferral_mask(logits, rule="knapsack", param=0.1).mask
        tensor([[False, False,  True,  True]])
    """
    left = _one(base_logits) if proxy_logits is None else _pair(base_logits, proxy_logits)
    numbers = args.rule_arguments(base_logits, rule, param, critical, temperature, rule_temperature)
    if proxy_logits is None:
        args.refuse_proxy_rule("a call without them", rule, numbers[1])
    outs = args.outputs(_MASK, out, base_logits, Mask._fields, left=left)
    arguments = (base_logits, proxy_logits, *numbers, args.check_flag(check, base_logits, left))
    result = invoke(_MASK, arguments, outs, _RECHECK[_MASK] if left else None)
    return result if type(result) is Mask else Mask(*result)


@documented
def deferral_probs(
    base_logits: Tensor,
    proxy_logits: Tensor,
    *,
    rule: str | Rule,
    param: float | Tensor | None = None,
    critical: str = "exclude",
    temperature: float = 1.0,
    rule_temperature: float | None = None,
    check: bool | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The law of the next token, ``pi = (1 - mu) p + D q``, float32 ``[B, V]``.

    Args:
        base_logits, proxy_logits: ``[B, V]``; both are read whatever the rule.
        {rule}
        {check} it is NaN.
        out: contiguous float32 ``[B, V]`` to write.

    Bytes moved: ``B V (2 s + 4)`` with s bytes a logit.

    Example:
        >>> base, proxy = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])
        >>> deferral_probs(base, proxy, rule="argmax")
        tensor([[0.7438, 0.2562]])
    """
    left = _pair(base_logits, proxy_logits)
    numbers = args.rule_arguments(base_logits, rule, param, critical, temperature, rule_temperature)
    outs = args.outputs(_PROBS, out, base_logits, left=left)
    arguments = (base_logits, proxy_logits, *numbers, args.check_flag(check, base_logits, left))
    return invoke(_PROBS, arguments, outs, _RECHECK[_PROBS] if left else None)[0]


@documented
def deferral_stats(
    base_logits: Tensor,
    proxy_logits: Tensor | None = None,
    *,
    rule: str | Rule,
    param: float | Tensor | None = None,
    critical: str = "exclude",
    temperature: float = 1.0,
    rule_temperature: float | None = None,
    check: bool | None = None,
    out: Sequence[Tensor] | None = None,
) -> Stats:
    """Deferred mass and place of the cut of every row; for traces, as it needs the whole cut.

    Args:
        base_logits: ``[B, V]``.
        proxy_logits: ``[B, V]``, for the rules that need it.
        {rule}
        {check} its critical item is -2 and its numbers are NaN.
        out: a :class:`Stats` (or tuple) of contiguous tensors to write.

    Returns:
        {Stats}

    Bytes moved: ``B V s`` with s bytes a logit (``2 s`` for rules that need q).

    Example:
        >>> deferral_stats(torch.zeros(1, 4), rule="knapsack", param=0.5).critical
        tensor([2])
    """
    left = _one(base_logits) if proxy_logits is None else _pair(base_logits, proxy_logits)
    numbers = args.rule_arguments(base_logits, rule, param, critical, temperature, rule_temperature)
    if proxy_logits is None:
        args.refuse_proxy_rule("a call without them", rule, numbers[1])
    outs = args.outputs(_STATS, out, base_logits, Stats._fields, left=left)
    arguments = (base_logits, proxy_logits, *numbers, args.check_flag(check, base_logits, left))
    result = invoke(_STATS, arguments, outs, _RECHECK[_STATS] if left else None)
    return result if type(result) is Stats else Stats(*result)


@documented
def deferral_propose(
    base_logits: Tensor,
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
    check: bool | None = None,
    out: Sequence[Tensor] | None = None,
) -> Proposal:
    """The base model's half of :func:`deferral_sample`, for rules that look at p alone.

    Draws v ~ p (stream BASE) and rejects it with probability mu(v) (stream SPLIT where mu is a
    fraction). Rows with ``deferred`` need the proxy: drawing their token with
    ``categorical_sample(proxy_logits, stream=PROXY)`` and the same key equals
    :func:`deferral_sample` bit for bit. A deferred row's token is the rejected v.

    With ``do_sample=False`` the token is the best one kept; ``deferred`` says that its lead over
    the next best is not greater than D, so that q can change argmax pi: call
    ``deferral_sample(..., do_sample=False)`` on those rows.

    Args:
        base_logits: ``[B, V]``.
        {rule}
        {key}
        {check} its token is -1.
        out: a :class:`Proposal` (or tuple) of contiguous tensors to write: int64 and bool ``[B]``.

    Bytes moved: ``B V s`` with s bytes a logit.

    Example:
        >>> deferral_propose(
        ...     torch.tensor([[9.0, 0.0]]), rule="threshold", param=0.5, seed=0, position=0
        ... )
        Proposal(token=tensor([0]), deferred=tensor([False]))
    """
    left = _one(base_logits)
    numbers = args.rule_arguments(base_logits, rule, param, critical, temperature, rule_temperature)
    args.refuse_proxy_rule("deferral_propose", rule, numbers[1])
    key = args.key_arguments(
        base_logits, seed, position, sequence, iteration, rollout, do_sample, left
    )
    outs = args.outputs(_PROPOSE, out, base_logits, Proposal._fields, left=left)
    arguments = (base_logits, *numbers, *key, args.check_flag(check, base_logits, left))
    result = invoke(_PROPOSE, arguments, outs, _RECHECK[_PROPOSE] if left else None)
    return result if type(result) is Proposal else Proposal(*result)


@documented
def deferral_sample(
    base_logits: Tensor,
    proxy_logits: Tensor,
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
    check: bool | None = None,
    out: Sequence[Tensor] | None = None,
) -> Proposal:
    """A token of law pi: draw v ~ p, reject it with probability mu(v), replace it by one from q.

    Args:
        base_logits, proxy_logits: ``[B, V]``. Where the rule looks at p alone and tokens are drawn,
            a proxy row is read (and checked) only if the base model's token is rejected.
        {rule}
        {key} Streams: BASE, SPLIT and PROXY.
        {check} its token is -1.
        out: a :class:`Proposal` (or tuple) of contiguous tensors to write: int64 and bool ``[B]``.

    Returns:
        The token, and whether the base model's draw was rejected; with ``do_sample=False`` argmax
        pi, and whether ``mu(token) == 1``.

    Bytes moved: ``B V s`` for kept rows, ``2 B V s`` for rejected ones, with s bytes a logit; the
    parts of a row whose masked sum is in doubt are read twice.

    Example:
        >>> base, proxy = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 9.0]])
        >>> deferral_sample(base, proxy, rule="nudging", param=1.1, seed=0, position=0)
        Proposal(token=tensor([1]), deferred=tensor([True]))
    """
    left = _pair(base_logits, proxy_logits)
    numbers = args.rule_arguments(base_logits, rule, param, critical, temperature, rule_temperature)
    key = args.key_arguments(
        base_logits, seed, position, sequence, iteration, rollout, do_sample, left
    )
    outs = args.outputs(_SAMPLE, out, base_logits, Proposal._fields, left=left)
    flag = args.check_flag(check, base_logits, left)
    arguments = (base_logits, proxy_logits, *numbers, *key, flag)
    result = invoke(_SAMPLE, arguments, outs, _RECHECK[_SAMPLE] if left else None)
    return result if type(result) is Proposal else Proposal(*result)
