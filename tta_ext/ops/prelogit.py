"""Gaussian noise on pre-logits: perturbation, importance weights of rollouts, update of the mean.

Adaptive importance sampling on pre-logits (AISP, arXiv:2510.26219). For prompt P, iteration k,
rollout i and step t < tau the input z_t of the LM head becomes ``z_t + v_t``,

    v_t = u_t + sigma eps_t,   eps ~ N(0, I_d),

and after the rewards are known the mean moves by ``u_t <- u_t + sigma sum_i w_i eps_t^i``. eps is a
function of seed, step, sequence, iteration and rollout (:mod:`tta_ext.rng`): it is never stored, so
memory is O(tau d) whatever the number of rollouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tta_ext import rng
from tta_ext.dispatch import invoke
from tta_ext.ops import _arguments as args
from tta_ext.schemas import OPS

__all__ = [
    "Weights",
    "control_merge",
    "control_update",
    "importance_weights",
    "prelogit_perturb",
]


class Weights(NamedTuple):
    """Importance of the rollouts.

    Attributes:
        w: float32 ``[P, n]``, each row sums to 1.
        ess: float32 ``[P]``, effective sample size ``1 / sum w**2``, 1 to n.
    """

    w: Tensor
    ess: Tensor


_PERTURB = OPS["prelogit_perturb"]
_WEIGHTS = OPS["importance_weights"]
_UPDATE = OPS["control_update"]
_MERGE = OPS["control_merge"]


def _check_mean(mean: Tensor, device: torch.device | None = None) -> None:
    if not isinstance(mean, Tensor):
        raise TypeError(f"mean is {type(mean).__name__}, expected a tensor [P, tau, d]")
    args.check_kind("mean", mean, torch.float32, mean.device if device is None else device)
    if mean.dim() != 3:
        raise ValueError(f"mean has shape {list(mean.shape)}, expected [P, tau, d]")


def prelogit_perturb(
    hidden: Tensor,
    mean: Tensor,
    *,
    step: int | Tensor,
    row: int | Tensor,
    sequence: int | Tensor,
    rollout: int | Tensor,
    iteration: int,
    sigma: float,
    seed: int | Tensor,
    dot: Tensor | None = None,
    check: bool | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """hidden + u + sigma eps for N rollouts at their current step; adds u . eps to ``dot``.

    Args:
        hidden: float32, float16 or bfloat16 ``[N, d]``, unit stride over d.
        mean: u, float32 ``[P, tau, d]``; contiguous, or it is copied.
        step: int, or int64 with one element or ``[N]``. Rollouts at a step >= tau pass unchanged.
        row: the prompt of each rollout, 0 to P-1; int, or int64 with one element or ``[N]``.
        sequence: sequence id of each rollout's prompt, likewise.
        rollout: number of each rollout, likewise, ``0 <= rollout < 65536``.
        iteration: ``0 <= iteration < 4096``.
        sigma: standard deviation of the noise, >= 0.
        seed: int, or int64 tensor of one element.
        dot: float32 ``[N]``, contiguous; the sum over d of u eps is added to it in place.
        check: raise ``ValueError`` for indices out of range (default on the CPU). Nothing looks for
            NaN and inf: those of hidden pass into the result, those of mean into ``dot`` as well.
        out: contiguous tensor like hidden to write; may be hidden itself.

    Returns:
        ``[N, d]`` in hidden's dtype; computed in float32 and rounded once.

    Errors: ``TypeError`` for dtypes, ``ValueError`` for shapes, devices, layout and ranges.

    Bytes moved: ``N d (2 s + 4)`` with s bytes an element.

    Example:
        >>> z, u = torch.zeros(2, 4), torch.ones(1, 3, 4)
        >>> prelogit_perturb(
        ...     z, u, step=0, row=0, sequence=0, rollout=torch.tensor([0, 1]), iteration=0,
        ...     sigma=0.0, seed=7,
        ... )
        tensor([[1., 1., 1., 1.],
                [1., 1., 1., 1.]])
    """
    args.check_logits("hidden", hidden, 2, "[N, d]")
    (count, dimensions), device = hidden.shape, hidden.device
    _check_mean(mean, device)
    if mean.shape[2] != dimensions:
        raise ValueError(
            f"mean has shape {list(mean.shape)}, expected [P, tau, {dimensions}] as hidden has "
            f"shape {list(hidden.shape)}"
        )
    if mean.shape[0] == 0 or mean.shape[1] == 0:
        raise ValueError(f"mean has shape {list(mean.shape)}, expected P >= 1 and tau >= 1")
    rng.check_iteration(iteration)
    indices = (
        args.index_tensor("step", step, count, device),
        args.index_tensor("row", row, count, device),
        args.index_tensor("sequence", sequence, count, device),
        args.rollout_tensor(rollout, count, device),
    )
    if not isinstance(row, Tensor) and not row < mean.shape[0]:
        raise ValueError(f"row is {row}, expected 0 <= row < {mean.shape[0]}")
    outs = None
    if out is not None or dot is not None:
        if dot is None:
            dot = hidden.new_zeros(count, dtype=torch.float32)
        else:
            args.check_kind("dot", dot, torch.float32, device)
            args.check_output("dot", dot, torch.float32, (count,), device)
        if out is None:
            out = hidden.new_empty(hidden.shape)
        else:
            args.check_output("out", out, hidden.dtype, hidden.shape, device)
        outs = out, dot
    key, flag = args.seed_tensor(seed, device), args.check_flag(check, hidden)
    arguments = (hidden, mean, *indices, iteration, args.number("sigma", sigma), key, flag)
    return invoke(_PERTURB, arguments, outs)[0]


def importance_weights(
    reward: Tensor,
    dot: Tensor,
    norm2: Tensor,
    *,
    lam: float,
    alpha: float,
    sigma: float,
    check: bool | None = None,
    out: Sequence[Tensor] | None = None,
) -> Weights:
    """Weights w = softmax(s) of n rollouts of P prompts and their effective sample size.

        s_i = (r_i - max r) / lambda - (1 - alpha) / sigma * dot_i
              - (1 - alpha)**2 / (2 sigma**2) * norm2_i

    with ``dot_i = sum_t u_t . eps_t^i`` and ``norm2_i = sum_t |u_t|**2`` over the rollout's steps.
    lambda = 0 puts all weight on the highest reward, ties to the lowest index; sigma = 0 drops the
    cost terms.

    Args:
        reward: float32 ``[P, n]``; -inf gives weight 0.
        dot, norm2: float32 ``[P, n]``, finite.
        lam: temperature of the reward, >= 0.
        alpha: 0 to 1; 1 leaves the cost of moving away from the base model out.
        sigma: standard deviation of the noise, >= 0.
        check: raise ``ValueError`` for rows with NaN or +inf (default on the CPU); otherwise those
            rows are NaN.
        out: a :class:`Weights` (or tuple) of contiguous tensors to write.

    Errors: ``TypeError`` for dtypes, ``ValueError`` for shapes, devices, layout and ranges.

    Bytes moved: ``16 P n``.

    Source: arXiv:2510.26219, in the form that holds for responses of different length.

    Example:
        >>> reward, zero = torch.tensor([[1.0, 3.0, 2.0]]), torch.zeros(1, 3)
        >>> importance_weights(reward, zero, zero, lam=0.0, alpha=1.0, sigma=0.5).w
        tensor([[0., 1., 0.]])
    """
    args.check_matrices("[P, n]", unit_stride=False, reward=reward, dot=dot, norm2=norm2)
    numbers = args.number("lam", lam), args.number("alpha", alpha, 1.0), args.number("sigma", sigma)
    outs = args.outputs(_WEIGHTS, out, reward, Weights._fields)
    arguments = (reward, dot, norm2, *numbers, args.check_flag(check, reward))
    return Weights(*invoke(_WEIGHTS, arguments, outs))


def _subtree(rollouts: tuple[int, int] | None, count: int) -> tuple[int, int, bool]:
    """First and last rollout of an aligned subtree of the padded tree."""
    padded = 1 << max(count - 1, 0).bit_length()
    if rollouts is None:
        return 0, padded, False
    start, stop = rollouts
    if not (rng.is_int(start) and rng.is_int(stop)):
        raise TypeError(f"rollouts is {rollouts!r}, expected two ints (start, stop)")
    size = stop - start
    if not (0 <= start < stop <= padded and size & (size - 1) == 0 and start % size == 0):
        raise ValueError(
            f"rollouts is {(start, stop)}, expected (start, stop) with 0 <= start < stop <= "
            f"{padded}, stop - start a power of two and start a multiple of it"
        )
    return start, stop, True


def control_update(
    mean: Tensor,
    weights: Tensor,
    *,
    sigma: float,
    seed: int | Tensor,
    iteration: int,
    sequence: int | Tensor | None = None,
    length: Tensor | None = None,
    rollouts: tuple[int, int] | None = None,
    check: bool | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """u + sigma sum_i w_i eps^i, with the noise made anew; float32 ``[P, tau, d]``.

    The sum over rollouts is a pairwise tree over the rollout index, padded to a power of two with
    nothing. Parts of it can therefore be computed elsewhere: ``rollouts=(start, stop)``, an aligned
    subtree, returns the bare partial sum, and :func:`control_merge` finishes with the same bits.

    Args:
        mean: u, float32 ``[P, tau, d]``; contiguous, or it is copied.
        weights: float32 ``[P, n]``, finite; column i is rollout i.
        sigma: standard deviation of the noise, >= 0; 0 returns u.
        seed, iteration: those of the perturbation.
        sequence: sequence id of each prompt, int or int64 with one element or ``[P]``; default: the
            row number.
        length: int64 ``[P, n]``; eps counts as 0 from this step on.
        rollouts: the subtree to sum; default: all, and the result is the new mean.
        check: raise ``ValueError`` for weights that are not finite and ids out of range (default on
            the CPU).
        out: contiguous float32 ``[P, tau, d]`` to write; may be ``mean`` itself.

    Errors: ``TypeError`` for dtypes, ``ValueError`` for shapes, devices, layout and ranges.

    Bytes moved: ``8 P tau d``; the work is the generation of ``P n tau d`` normals.

    Source: arXiv:2510.26219.

    Example:
        >>> u = torch.zeros(1, 2, 4)
        >>> v = control_update(u, torch.tensor([[1.0]]), sigma=2.0, seed=7, iteration=0)
        >>> torch.equal(v[0, 1], 2.0 * tta_ext.ops.normal(4, seed=7, step=1))
        True
    """
    _check_mean(mean)
    prompts, device = mean.shape[0], mean.device
    args.check_kind("weights", weights, torch.float32, device)
    if weights.dim() != 2 or weights.shape[0] != prompts or weights.shape[1] < 1:
        raise ValueError(f"weights has shape {list(weights.shape)}, expected [{prompts}, n]")
    count = weights.shape[1]
    if count > rng.ROLLOUTS:
        raise ValueError(f"weights has {count} rollouts, expected at most {rng.ROLLOUTS}")
    if length is not None:
        args.check_tensor("length", length, torch.int64, (prompts, count), device)
    rng.check_iteration(iteration)
    part = _subtree(rollouts, count)
    outs = args.outputs(_UPDATE, out, mean)
    key, ids = args.seed_tensor(seed, device), args.sequence_tensor(sequence, prompts, device)
    noise = (key, ids, iteration, args.number("sigma", sigma))
    arguments = (mean, weights, length, *noise, *part, args.check_flag(check, mean))
    return invoke(_UPDATE, arguments, outs)[0]


def control_merge(
    mean: Tensor, partials: Tensor, sigma: float, *, out: Tensor | None = None
) -> Tensor:
    """u + sigma times the tree sum of partial sums of :func:`control_update`.

    Args:
        mean: u, float32 ``[P, tau, d]``; contiguous, or it is copied.
        partials: float32 ``[S, P, tau, d]``, S a power of two: the sums of the S equal
            subtrees that cover the padded rollouts, in order.
        sigma: that of the update.
        out: contiguous float32 ``[P, tau, d]`` to write.

    Errors: ``TypeError`` for dtypes, ``ValueError`` for shapes, devices and layout.

    Bytes moved: ``4 (S + 2) P tau d``.

    Example:
        >>> u = torch.zeros(1, 1, 4)
        >>> w = torch.full((1, 4), 0.25)
        >>> parts = [
        ...     control_update(u, w, sigma=1.0, seed=3, iteration=0, rollouts=r)
        ...     for r in ((0, 2), (2, 4))
        ... ]
        >>> whole = control_update(u, w, sigma=1.0, seed=3, iteration=0)
        >>> torch.equal(control_merge(u, torch.stack(parts), 1.0), whole)
        True
    """
    _check_mean(mean)
    if not isinstance(partials, Tensor):
        raise TypeError(f"partials is {type(partials).__name__}, expected a tensor [S, P, tau, d]")
    shards = partials.shape[0] if partials.dim() else 0
    if shards < 1 or shards & (shards - 1):
        raise ValueError(
            f"partials has shape {list(partials.shape)}, expected [S, P, tau, d] with S a power "
            "of two"
        )
    args.check_tensor("partials", partials, torch.float32, (shards, *mean.shape), mean.device)
    outs = args.outputs(_MERGE, out, mean)
    return invoke(_MERGE, (mean, partials, args.number("sigma", sigma)), outs)[0]
