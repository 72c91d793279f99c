"""Noise on pre-logits, the weights of rollouts, and the update of the noise's mean.

Noise is made where it is needed. Sums over rollouts are pairwise trees: up to 256 of them at once,
then the sums of these.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tta_ext.backends.triton import numerics as num
from tta_ext.backends.triton.launch import Invalid, jit, launch, number, operator, per_row


@triton.jit
def rounded(x, at):
    """float32 in the type of a pointer; bfloat16 to nearest even, as no interpreter has it."""
    if at.dtype.element_ty == tl.bfloat16:
        u = x.to(tl.uint32, bitcast=True)
        half = tl.where(x != x, (u >> 16) | 0x40, (u + 0x7FFF + ((u >> 16) & 1)) >> 16)
        y = half.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(at.dtype.element_ty)
    return y


@jit
def perturb_rows(hidden, hidden_stride, mean, prompts, horizon, dim, step, prompt, sequence,
                 rollout, strides, iteration, sigma, seed, out, dot):  # fmt: skip
    """hidden + u + sigma eps, and u . eps in the canonical order, a lane adding by fma."""
    row = tl.program_id(0).to(tl.int64)
    t = num.number(step, row * strides[0])
    inside = (t >= 0) & (t < horizon)
    p = tl.minimum(tl.maximum(num.number(prompt, row * strides[1]), 0), prompts - 1)
    u_row = mean + (p * horizon + tl.where(inside, t, 0)) * dim
    key, who = num.number(seed, 0), num.number(sequence, row * strides[2])
    which = num.number(rollout, row * strides[3])
    total = tl.zeros((1,), tl.float64)
    for tile in range(0, dim, num.TILE):
        lanes = tl.zeros((1, num.LANES), tl.float32)
        for begin in range(tile, tl.minimum(tile + num.TILE, dim), num.LANES):
            block = (begin // 4 + tl.arange(0, 32)).to(tl.int64)
            eps = num.normals(key, block, t, who, iteration, which)
            j = begin + tl.arange(0, num.LANES)
            x = tl.load(hidden + row * hidden_stride + j, mask=j < dim, other=0.0)
            u = tl.load(u_row + j, mask=j < dim, other=0.0)
            lanes = tl.fma(u, eps, lanes)
            v = tl.where(sigma == 0.0, u, u + sigma * eps)
            moved = rounded((x.to(tl.float32) + v).to(tl.float32), out)
            tl.store(out + row * dim + j, tl.where(inside, moved, x), mask=j < dim)
        total = total + num.fold(lanes).to(tl.float64)
    if inside:
        tl.store(dot + row, tl.load(dot + row) + tl.sum(total, 0).to(tl.float32))


@operator
def prelogit_perturb(hidden: Tensor, mean: Tensor, step: Tensor, row: Tensor, sequence: Tensor,
                     rollout: Tensor, iteration: int, sigma: float, seed: Tensor, *, out: Tensor,
                     dot: Tensor) -> Invalid:  # fmt: skip
    prompts, horizon, dim = mean.shape
    places = per_row(step, row, sequence, rollout)
    launch(perturb_rows, len(hidden), hidden, hidden.stride(0), mean.contiguous(), prompts, horizon,
           dim, *places, iteration, sigma, number(seed), out, dot)  # fmt: skip
    return lambda: (row < 0) | (row >= prompts)


@jit
def weight_rows(reward, dot, norm2, count, inv_lambda, slack, cost, weights, ess,
                HARD: tl.constexpr, COUNT: tl.constexpr):  # fmt: skip
    """softmax(s) over the rollouts and the effective sample size; NaN for an unusable row."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, COUNT)
    there, at = j < count, row * count + j
    r = tl.load(reward + at, mask=there, other=-num.INFINITY).to(tl.float64)
    d = tl.load(dot + at, mask=there, other=0.0).to(tl.float64)
    n = tl.load(norm2 + at, mask=there, other=0.0).to(tl.float64)
    usable = ((r < num.INFINITY) | (r == -num.INFINITY)) & (d - d == 0.0) & (n - n == 0.0)
    best = tl.max(tl.where(r > -num.INFINITY, r, -num.INFINITY), 0)
    bad = (tl.max(tl.where(usable, 0, 1), 0) > 0) | (best == -num.INFINITY)
    if HARD:
        w = tl.where(j == tl.min(tl.where(r == best, j, COUNT), 0), 1.0, 0.0)
        size = 1.0
    else:  # s in float64, one rounding an operation, in this order
        gain = (r - best) * num.number(inv_lambda, 0, tl.float64)
        s = gain - num.number(slack, 0, tl.float64) * d - num.number(cost, 0, tl.float64) * n
        top = tl.max(tl.where((s > -num.INFINITY) & there, s, -num.INFINITY), 0)
        undefined = tl.max(tl.where((s != s) & there, 1, 0), 0) > 0
        bad = bad | undefined | (top - top != 0.0)
        w = tl.where(there, num.exp((s - top).to(tl.float32)), 0.0).to(tl.float64)
        w = (w / num.tree(w[:, None])).to(tl.float32)
        square = w.to(tl.float64) * w.to(tl.float64)
        size = tl.sum(1.0 / num.tree(square[:, None]), 0).to(tl.float32)
    tl.store(weights + at, tl.where(bad, num.NAN, w), mask=there)
    tl.store(ess + row, tl.where(bad, num.NAN, size))


@operator
def importance_weights(reward: Tensor, dot: Tensor, norm2: Tensor, lam: float, alpha: float,
                       sigma: float, *, weights: Tensor, ess: Tensor) -> None:  # fmt: skip
    rows, count = reward.shape
    padded = triton.next_power_of_2(max(count, 1))
    slack = 0.0 if sigma == 0 else (1.0 - alpha) / sigma
    values = (1.0 / lam if lam else 0.0, slack, 0.5 * slack * slack)
    numbers = [number(torch.tensor([x], dtype=torch.float64)) for x in values]
    given = (x.contiguous() for x in (reward, dot, norm2))
    launch(weight_rows, rows, *given, count, *numbers, weights, ess, HARD=lam == 0, COUNT=padded,
           num_warps=min(max(padded // 256, 4), 16))  # fmt: skip


@jit
def update_blocks(weights, usable, length, rollouts, seed, sequence, strides, iteration, horizon,
                  dim, cells, start, stop, partials, LEAVES: tl.constexpr,
                  N: tl.constexpr):  # fmt: skip
    """sum_i w_i eps^i over some rollouts, an aligned subtree, of N dimensions of one step."""
    blocks = tl.cdiv(dim, N)
    place, begin = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * N
    row, part = place % cells, place // cells
    prompt, t = row // horizon, row % horizon
    i = start + part * LEAVES + tl.arange(0, LEAVES)
    w = tl.load(weights + prompt * rollouts + i, mask=i < stop, other=0.0)
    if length is not None:
        last = tl.load(length + prompt * rollouts + i, mask=i < stop, other=0)
        w = tl.where(t < last, w, 0.0)
    key, who = num.number(seed, 0), num.number(sequence, prompt * strides[0])
    counter = (begin // 4 + tl.arange(0, N // 4)).to(tl.int64)[None, :] + i[:, None] * 0
    eps = num.normals(key, counter, t, who, iteration, i[:, None])
    total = num.tree(tl.where(w[:, None] == 0.0, 0.0, w[:, None] * eps))
    total = tl.where(tl.load(usable + prompt), total, num.NAN)
    j = begin + tl.arange(0, N)
    tl.store(partials + place * dim + j, total, mask=j < dim)


@jit
def merge_blocks(mean, partials, size, sigma, out, SHARDS: tl.constexpr, N: tl.constexpr):
    """The tree sum of partial sums or, given a mean, u + sigma times that; a sum is never -0."""
    j = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    i = tl.arange(0, SHARDS).to(tl.int64)[:, None]
    total = tl.load(partials + i * size + j[None, :], mask=(j < size)[None, :], other=0.0)
    total = num.tree(total) + 0.0
    if mean is not None:
        u = tl.load(mean + j, mask=j < size, other=0.0)
        total = tl.where(sigma == 0.0, u, u + sigma * total)
    tl.store(out + j, total, mask=j < size)


def _merge(mean: Tensor | None, partials: Tensor, sigma: float, out: Tensor) -> None:
    """Launch merge_blocks of ``[S, ...]``, S a power of two."""
    shards, size = len(partials), out.numel()
    block = max(4096 // shards, 1)
    mean = None if mean is None else mean.contiguous()
    launch(merge_blocks, -(-size // block), mean, partials.contiguous(), size, sigma, out,
           SHARDS=shards, N=block)  # fmt: skip


@operator
def control_update(mean: Tensor, weights: Tensor, length: Tensor | None, seed: Tensor,
                   sequence: Tensor, iteration: int, sigma: float, start: int, stop: int,
                   partial: bool, *, out: Tensor) -> Invalid:  # fmt: skip
    (prompts, horizon, dim), rollouts = mean.shape, weights.shape[1]
    stop, length = min(stop, rollouts), None if length is None else length.contiguous()
    padded = triton.next_power_of_2(max(stop - start, 1))
    leaves, cells = min(padded, 256), prompts * horizon
    block = max(min(4096 // leaves, triton.next_power_of_2(dim)), 16)
    usable = torch.isfinite(weights).all(-1)
    partials = mean.new_empty(padded // leaves, cells, dim)
    programs = len(partials) * cells * -(-dim // block)
    launch(update_blocks, programs, weights.contiguous(), usable, length, rollouts, number(seed),
           *per_row(sequence), iteration, horizon, dim, cells, start, stop, partials,
           LEAVES=leaves, N=block)  # fmt: skip
    _merge(None if partial else mean, partials, sigma, out)
    return lambda: ~usable


@operator
def control_merge(mean: Tensor, partials: Tensor, sigma: float, *, out: Tensor) -> None:
    _merge(mean, partials, sigma, out)
