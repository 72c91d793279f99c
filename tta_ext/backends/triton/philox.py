"""Philox4x32-10 and the normals made from it."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from tta_ext import rng
from tta_ext.backends.triton.launch import jit, launch, number
from tta_ext.backends.triton.numerics import integer, normals, philox4x32, word3

_BLOCK = 256  # counters a program
NOISE = tl.constexpr(rng.NOISE)


@jit
def philox_kernel(counter, key_low, key_high, out, count, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = 4 * i[:, None] + tl.arange(0, 4)[None, :]
    inside = (i < count)[:, None]
    word = tl.load(counter + at, mask=inside, other=0).to(tl.uint32)
    even, odd = tl.split(tl.reshape(word, (BLOCK, 2, 2)))
    (c0, c2), (c1, c3) = tl.split(even), tl.split(odd)
    low, high = integer(key_low, 0).to(tl.uint32), integer(key_high, 0).to(tl.uint32)
    c0, c1, c2, c3 = philox4x32(c0, c1, c2, c3, low, high)
    word = tl.interleave(tl.interleave(c0, c2), tl.interleave(c1, c3))
    tl.store(out + at, tl.reshape(word, (BLOCK, 4)).to(tl.int64), mask=inside)


def philox(counter: Tensor, key: Tensor, *, out: Tensor) -> None:
    count = counter.numel() // 4
    launch(philox_kernel, -(-count // _BLOCK), counter.contiguous(), number(key[:1]),
           number(key[1:]), out, count, BLOCK=_BLOCK)  # fmt: skip


@jit
def normal_kernel(out, seed, step, sequence, iteration, rollout, count, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    word = word3(NOISE, iteration.to(tl.int64), rollout.to(tl.int64))
    block = program * BLOCK + tl.arange(0, BLOCK)
    eps = normals(integer(seed, 0), block, step.to(tl.int64), sequence.to(tl.int64), word)
    j = program * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    tl.store(out + j, eps, mask=j < count)


def normal(
    n: int, seed: Tensor, step: int, sequence: int, iteration: int, rollout: int, *, out: Tensor
) -> None:
    launch(normal_kernel, -(-n // (4 * _BLOCK)), out, number(seed), step, sequence, iteration,
           rollout, n, BLOCK=_BLOCK)  # fmt: skip
