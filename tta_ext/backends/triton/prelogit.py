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
from tta_ext.backends.triton.law import tiles_of
from tta_ext.backends.triton.rows import groups_of


@triton.jit
def rounded(x, at):
    """float32 in the type of a pointer; bfloat16 to nearest even, as no interpreter has it."""
    if at.dtype.element_ty == tl.bfloat16:
        u = x.to(tl.uint32, bitcast=True)
        half = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
        half = tl.where(x != x, (u >> 16) | 0x40, half).to(tl.uint16)
        y = half.to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(at.dtype.element_ty)
    return y


@jit
def perturb_rows(hidden, hidden_stride, mean, prompts, horizon, dim, step, prompt, sequence,
                 rollout, strides, iteration, sigma, seed, out, dot,
                 NOISY: tl.constexpr):  # fmt: skip
    """hidden + u + sigma eps, and u . eps in the canonical order, a lane adding by fma."""
    row = tl.program_id(0).to(tl.int64)
    t = num.number(step, row * strides[0])
    inside = (t >= 0) & (t < horizon)
    p = tl.minimum(tl.maximum(num.number(prompt, row * strides[1]), 0), prompts - 1)
    u_row = mean + (p * horizon + tl.where(inside, t, 0)) * dim
    word = num.word3(rng.NOISE, iteration.to(tl.int64), num.number(rollout, row * strides[3]))
    key, who = num.number(seed, 0), num.number(sequence, row * strides[2])
    total = tl.zeros((1,), tl.float64)
    for tile in range(tiles_of(dim)):
        lanes = tl.zeros((1, num.LANES), tl.float32)
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
            moved = rounded((x.to(tl.float32) + v).to(tl.float32), out)
            tl.store(out + row * dim + j, tl.where(inside, moved, x), mask=j < dim)
        total = total + num.fold(lanes, 1).to(tl.float64)
    if inside:
        tl.store(dot + row, tl.load(dot + row) + tl.sum(total, 0).to(tl.float32))


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
    return tl.sum(num.tree(x[:, None], log2(COUNT), 1), 0)


@jit
def weight_rows(reward, dot, norm2, strides, count, inv_lambda, slack, cost, weights, ess,
                HARD: tl.constexpr, COUNT: tl.constexpr):  # fmt: skip
    """softmax(s) over the rollouts and the effective sample size; NaN for an unusable row."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, COUNT)
    there = j < count
    r = tl.load(reward + row * strides[0] + j, mask=there, other=-num.INFINITY).to(tl.float64)
    d = tl.load(dot + row * strides[1] + j, mask=there, other=0.0).to(tl.float64)
    n = tl.load(norm2 + row * strides[2] + j, mask=there, other=0.0).to(tl.float64)
    usable = (is_finite(r) | (r == -num.INFINITY)) & is_finite(d) & is_finite(n)
    best = tl.max(tl.where(r > -num.INFINITY, r, -num.INFINITY), 0)
    bad = (tl.max(tl.where(usable, 0, 1), 0) > 0) | (best == -num.INFINITY)
    if HARD:
        w = tl.where(j == tl.min(tl.where(r == best, j, COUNT), 0), 1.0, 0.0)
        size = 1.0
    else:  # s in float64, one rounding an operation, in this order
        gain = (r - best) * num.double(inv_lambda, 0) - num.double(slack, 0) * d
        s = gain - num.double(cost, 0) * n
        top = tl.max(tl.where((s > -num.INFINITY) & there, s, -num.INFINITY), 0)
        undefined = tl.max(tl.where((s != s) & there, 1, 0), 0) > 0
        bad = bad | undefined | (is_finite(top) == 0)
        w = tl.where(there, num.exp((s - top).to(tl.float32)), 0.0).to(tl.float64)
        w = (w / tree_of(w, COUNT)).to(tl.float32)
        square = w.to(tl.float64) * w.to(tl.float64)
        size = (1.0 / tree_of(square, COUNT)).to(tl.float32)
    tl.store(weights + row * count + j, tl.where(bad, num.NAN, w), mask=there)
    tl.store(ess + row, tl.where(bad, num.NAN, size))


@operator
def importance_weights(
    reward: Tensor, dot: Tensor, norm2: Tensor, lam: float, alpha: float, sigma: float,
    check: bool, *, weights: Tensor, ess: Tensor,
) -> Callable[[], Tensor]:  # fmt: skip
    rows, count = reward.shape
    padded = triton.next_power_of_2(max(count, 1))
    slack = 0.0 if sigma == 0 else (1.0 - alpha) / sigma
    numbers = bits(1.0 / lam if lam else 0.0), bits(slack), bits(0.5 * slack * slack)
    given = [x if x.stride(-1) == 1 or count == 1 else x.contiguous() for x in (reward, dot, norm2)]
    launch(
        weight_rows, rows, *given, tuple(x.stride(0) for x in given), count, *numbers, weights,
        ess, HARD=lam == 0, COUNT=padded, num_warps=min(max(padded // 256, 4), 16),
    )  # fmt: skip
    return lambda: torch.isnan(ess)


# ---- control_update, control_merge ---------------------------------------------------------------

LEAVES = tl.constexpr(16)  # of the tree, at once
LEVELS = tl.constexpr(16)  # of the counter above them
BLOCK = tl.constexpr(128)  # dimensions a program


@jit
def update_blocks(mean, weights, usable, length, rollouts, seed, sequence, strides, iteration,
                  sigma, horizon, dim, start, stop, out, PARTIAL: tl.constexpr):  # fmt: skip
    """u + sigma sum_i w_i eps^i for one block of dimensions of one step, or the bare sum."""
    blocks = tl.cdiv(dim, BLOCK)
    row, begin = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK
    prompt, t = row // horizon, row % horizon
    counter = (begin // 4 + tl.arange(0, BLOCK // 4)).to(tl.int64)[None, :]
    key, who = num.number(seed, 0), num.number(sequence, prompt * strides[0])
    stack = tl.zeros((LEVELS, BLOCK), tl.float32)
    level = tl.arange(0, LEVELS)[:, None]
    count = tl.full((), 0, tl.int32)
    for first in range(start, stop, LEAVES):
        i = first + tl.arange(0, LEAVES)
        w = tl.load(weights + prompt * rollouts + i, mask=i < stop, other=0.0)
        if length is not None:
            last = tl.load(length + prompt * rollouts + i, mask=i < stop, other=0)
            w = tl.where(t < last, w, 0.0)
        word = num.word3(rng.NOISE, iteration.to(tl.int64), i[:, None].to(tl.int64))
        eps = num.normals(key, counter + word * 0, t, who, word)
        leaf = tl.where(w[:, None] == 0.0, 0.0, w[:, None] * eps)
        stack = num.push(stack, level, count, num.tree(leaf, 4, BLOCK))
        count += 1
    total = num.counted(stack, level, count)
    j = begin + tl.arange(0, BLOCK)
    finite = tl.load(usable + prompt)
    if not PARTIAL:
        u = tl.load(mean + row * dim + j, mask=j < dim, other=0.0)
        total = tl.where(sigma == 0.0, u, u + sigma * total)
        finite = finite | (sigma == 0.0)
    tl.store(out + row * dim + j, tl.where(finite, total, num.NAN), mask=j < dim)


@operator
def control_update(
    mean: Tensor, weights: Tensor, length: Tensor | None, seed: Tensor, sequence: Tensor,
    iteration: int, sigma: float, start: int, stop: int, partial: bool, check: bool, *,
    out: Tensor,
) -> Callable[[], Tensor]:  # fmt: skip
    prompts, horizon, dim = mean.shape
    usable = torch.isfinite(weights).all(-1)
    launch(
        update_blocks, prompts * horizon * -(-dim // BLOCK.value), mean.contiguous(),
        weights.contiguous(), usable, None if length is None else length.contiguous(),
        weights.shape[1], number(seed), *per_row(sequence), iteration, sigma, horizon, dim, start,
        min(stop, weights.shape[1]), out, PARTIAL=partial,
    )  # fmt: skip
    return lambda: ~usable


@jit
def merge_blocks(mean, partials, size, sigma, out, SHARDS: tl.constexpr, N: tl.constexpr):
    """u + sigma times the tree sum of the partial sums."""
    j = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    at = tl.arange(0, SHARDS).to(tl.int64)[:, None] * size + j[None, :]
    total = num.tree(tl.load(partials + at, mask=(j < size)[None, :], other=0.0), log2(SHARDS), N)
    u = tl.load(mean + j, mask=j < size, other=0.0)
    tl.store(out + j, tl.where(sigma == 0.0, u, u + sigma * (total + 0.0)), mask=j < size)


def control_merge(mean: Tensor, partials: Tensor, sigma: float, *, out: Tensor) -> None:
    shards, size = partials.shape[0], mean.numel()
    block = max(4096 // shards, 1)
    launch(merge_blocks, -(-size // block), mean.contiguous(), partials.contiguous(), size, sigma,
           out, SHARDS=shards, N=block)  # fmt: skip
