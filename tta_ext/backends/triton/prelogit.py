"""Noise on pre-logits, the weights of rollouts, and the update of the noise's mean.

Noise is made where it is needed. Sums over rollouts are pairwise trees: 16 rollouts at once in a
block, then the binary counter of their sums.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from tta_ext import rng
from tta_ext.backends.triton import numerics as num
from tta_ext.backends.triton.launch import bits, jit, launch, number, operator, outside, per_row
from tta_ext.backends.triton.rows import groups_of, part, tiles_of

NOISE = tl.constexpr(rng.NOISE)


@triton.jit
def store_rounded(at, x, mask):
    """Store float32 as the pointer's type; bfloat16 rounded here, to nearest even."""
    if at.dtype.element_ty == tl.bfloat16:
        u = x.to(tl.uint32, bitcast=True)
        half = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
        half = tl.where(x != x, (u >> 16) | 0x40, half)
        tl.store(at, half.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(at, x.to(at.dtype.element_ty), mask=mask)


@jit
def perturb_rows(hidden, hidden_stride, mean, prompts, horizon, dim, step, prompt, sequence,
                 rollout, strides, iteration, sigma, seed, out, dot,
                 NOISY: tl.constexpr):  # fmt: skip
    """hidden + u + sigma eps, and u . eps in the canonical order, a lane adding by fma."""
    row = tl.program_id(0).to(tl.int64)
    t = num.integer(step, row * strides[0])
    inside = (t >= 0) & (t < horizon)
    p = tl.minimum(tl.maximum(num.integer(prompt, row * strides[1]), 0), prompts - 1)
    u_row = mean + (p * horizon + tl.where(inside, t, 0)) * dim
    word = num.word3(NOISE, iteration.to(tl.int64), num.integer(rollout, row * strides[3]))
    key, who = num.integer(seed, 0), num.integer(sequence, row * strides[2])
    total = tl.zeros((), tl.float64)
    for tile in range(tiles_of(dim)):
        lanes = tl.zeros((num.LANES,), tl.float32)
        for g in range(groups_of(dim)):
            begin = tile * num.TILE + g * num.LANES
            block = (begin // 4 + tl.arange(0, 32)).to(tl.int64)
            eps = num.normals(key, block, t, who, word)
            j = begin + tl.arange(0, num.LANES)
            x = tl.load(hidden + row * hidden_stride + j, mask=j < dim, other=0.0)
            u = tl.load(u_row + j, mask=j < dim, other=0.0)
            lanes = tl.fma(u, eps, lanes)
            v = u
            if NOISY:
                v = u + sigma * eps
            moved = (x.to(tl.float32) + v).to(tl.float32)
            if inside:
                store_rounded(out + row * dim + j, moved, j < dim)
            else:
                tl.store(out + row * dim + j, x, mask=j < dim)
        total = total + tl.sum(num.fold(lanes[None, :], 1), 0).to(tl.float64)
    if inside:
        tl.store(dot + row, tl.load(dot + row) + total.to(tl.float32))


@operator
def prelogit_perturb(
    hidden: Tensor, mean: Tensor, step: Tensor, row: Tensor, sequence: Tensor, rollout: Tensor,
    iteration: int, sigma: float, seed: Tensor, check: bool, *, out: Tensor, dot: Tensor,
) -> Callable[[], Tensor]:  # fmt: skip
    prompts, horizon, dim = mean.shape
    launch(
        perturb_rows, hidden.shape[0], hidden, hidden.stride(0), mean.contiguous(), prompts,
        horizon, dim, *per_row(step, row, sequence, rollout), iteration, sigma, number(seed), out,
        dot, NOISY=sigma != 0,
    )  # fmt: skip
    return lambda: outside(row, prompts)


# ---- importance_weights --------------------------------------------------------------------------


@triton.jit
def is_finite(x):
    return (x - x) == 0.0


@triton.constexpr_function
def log2(n):
    return n.bit_length() - 1


@triton.jit
def tree_of(x, COUNT: tl.constexpr):
    return tl.sum(num.tree(x[None, :, None], 1, log2(COUNT), 1))


@jit
def weight_rows(reward, dot, norm2, strides, count, inv_lambda, slack, cost, weights, ess,
                HARD: tl.constexpr, COUNT: tl.constexpr):  # fmt: skip
    """softmax(s) over the rollouts and the effective sample size; NaN for an unusable row."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, COUNT)
    there = j < count
    r = tl.load(reward + row * strides[0] + j, mask=there, other=-num.INFINITY)
    d = tl.load(dot + row * strides[1] + j, mask=there, other=0.0)
    n = tl.load(norm2 + row * strides[2] + j, mask=there, other=0.0)
    usable = (is_finite(r) | (r == -num.INFINITY)) & is_finite(d) & is_finite(n)
    best = tl.max(tl.where(r > -num.INFINITY, r, -num.INFINITY), 0)
    bad = (tl.max(tl.where(usable, 0, 1), 0) > 0) | (best == -num.INFINITY)
    if HARD:
        first = tl.min(tl.where(r == best, j, COUNT), 0)
        w = tl.where(j == first, 1.0, 0.0)
        size = 1.0
    else:  # s in float64, one rounding an operation, in this order
        gain = (r.to(tl.float64) - best.to(tl.float64)) * num.double(inv_lambda, 0)
        s = (gain - num.double(slack, 0) * d.to(tl.float64)) - num.double(cost, 0) * n.to(
            tl.float64
        )
        top = tl.max(tl.where((s > -num.INFINITY) & there, s, -num.INFINITY), 0)
        undefined = tl.max(tl.where((s != s) & there, 1, 0), 0) > 0
        bad = bad | undefined | ((top - top) != 0.0)
        w = tl.where(there, num.exp((s - top).to(tl.float32)), 0.0)
        w = (w.to(tl.float64) / tree_of(w.to(tl.float64), COUNT)).to(tl.float32)
        square = w.to(tl.float64) * w.to(tl.float64)
        size = (1.0 / tree_of(square, COUNT)).to(tl.float32)
    tl.store(weights + row * count + j, tl.where(bad, float("nan"), w), mask=there)
    tl.store(ess + row, tl.where(bad, float("nan"), size))


@operator
def importance_weights(
    reward: Tensor, dot: Tensor, norm2: Tensor, lam: float, alpha: float, sigma: float,
    check: bool, *, weights: Tensor, ess: Tensor,
) -> Callable[[], Tensor]:  # fmt: skip
    rows, count = reward.shape
    padded = triton.next_power_of_2(max(count, 1))
    slack = 0.0 if sigma == 0 else (1.0 - alpha) / sigma
    numbers = bits(1.0 / lam if lam else 0.0), bits(slack), bits(0.5 * slack * slack)
    given = [
        values if values.stride(-1) == 1 or count == 1 else values.contiguous()
        for values in (reward, dot, norm2)
    ]
    launch(
        weight_rows, rows, *given, tuple(values.stride(0) for values in given), count, *numbers,
        weights, ess, HARD=lam == 0, COUNT=padded, num_warps=min(max(padded // 256, 4), 16),
    )  # fmt: skip
    return lambda: torch.isnan(ess)


# ---- control_update, control_merge ---------------------------------------------------------------

ROLLOUTS = tl.constexpr(16)  # at once
STACK = tl.constexpr(16)  # levels of the counter above them


@jit
def update_blocks(mean, weights, length, rollouts, seed, sequence, strides, iteration, sigma,
                  horizon, dim, start, stop, out, PARTIAL: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """u + sigma sum_i w_i eps^i for one block of dimensions of one step, or the bare sum."""
    row, block = part(tl.cdiv(dim, BLOCK))
    prompt, t = row // horizon, row % horizon
    begin = block * BLOCK
    counter = (begin // 4 + tl.arange(0, BLOCK // 4)).to(tl.int64)[None, :]
    key, who = num.integer(seed, 0), num.integer(sequence, prompt * strides[0])
    finite = tl.full((), 1, tl.int32)
    for one in range(rollouts):
        weight = tl.load(weights + prompt * rollouts + one)
        finite = tl.where(is_finite(weight), finite, 0)
    stack = tl.zeros((STACK, BLOCK), tl.float32)
    level = tl.arange(0, STACK)[:, None]
    end = tl.minimum(stop, rollouts)
    count = tl.full((), 0, tl.int32)
    for first in range(start, end, ROLLOUTS):
        i = first + tl.arange(0, ROLLOUTS)
        w = tl.load(weights + prompt * rollouts + i, mask=i < end, other=0.0)
        if length is not None:
            last = tl.load(length + prompt * rollouts + i, mask=i < end, other=0)
            w = tl.where(t < last, w, 0.0)
        word = num.word3(NOISE, iteration.to(tl.int64), i[:, None].to(tl.int64))
        eps = num.normals(key, counter + word * 0, t, who, word)
        leaf = tl.where(w[:, None] == 0.0, 0.0, w[:, None] * eps)
        x = tl.reshape(num.tree(tl.reshape(leaf, (1, ROLLOUTS, BLOCK)), 1, 4, BLOCK), (BLOCK,))
        stack = num.push(stack, level, count, x)
        count += 1
    total = num.gather_up(stack, level, count) + 0.0
    j = begin + tl.arange(0, BLOCK)
    if not PARTIAL:
        u = tl.load(mean + row * dim + j, mask=j < dim, other=0.0)
        total = tl.where(sigma == 0.0, u, u + sigma * total)
        finite = tl.where(sigma == 0.0, 1, finite)
    tl.store(out + row * dim + j, tl.where(finite == 1, total, float("nan")), mask=j < dim)


@operator
def control_update(
    mean: Tensor, weights: Tensor, length: Tensor | None, seed: Tensor, sequence: Tensor,
    iteration: int, sigma: float, start: int, stop: int, partial: bool, check: bool, *,
    out: Tensor,
) -> Callable[[], Tensor]:  # fmt: skip
    prompts, horizon, dim = mean.shape
    block = min(max(triton.next_power_of_2(dim), 16), 128)
    launch(
        update_blocks, prompts * horizon * -(-dim // block), mean.contiguous(),
        weights.contiguous(), None if length is None else length.contiguous(), weights.shape[1],
        number(seed), *per_row(sequence), iteration, sigma, horizon, dim, start, stop, out,
        PARTIAL=partial, BLOCK=block,
    )  # fmt: skip
    return lambda: ~torch.isfinite(weights)


@jit
def merge_blocks(mean, partials, shards, size, sigma, out, BLOCK: tl.constexpr):
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    stack = tl.zeros((STACK, BLOCK), tl.float32)
    level = tl.arange(0, STACK)[:, None]
    count = tl.full((), 0, tl.int32)
    for shard in range(shards):
        x = tl.load(partials + shard * size.to(tl.int64) + j, mask=j < size, other=0.0)
        stack = num.push(stack, level, count, x)
        count += 1
    total = num.gather_up(stack, level, count) + 0.0
    u = tl.load(mean + j, mask=j < size, other=0.0)
    tl.store(out + j, tl.where(sigma == 0.0, u, u + sigma * total), mask=j < size)


def control_merge(mean: Tensor, partials: Tensor, sigma: float, *, out: Tensor) -> None:
    block, size = 128, mean.numel()
    launch(
        merge_blocks, -(-size // block), mean.contiguous(), partials.contiguous(),
        partials.shape[0], size, sigma, out, BLOCK=block,
    )  # fmt: skip
