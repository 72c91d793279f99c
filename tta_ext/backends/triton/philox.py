"""Philox4x32-10 and the normals made from it: a program 256 counters."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from tta_ext.backends.triton import numerics as num
from tta_ext.backends.triton.launch import jit, launch, number, operator

BLOCK = tl.constexpr(256)


@jit
def philox_kernel(counter, key_low, key_high, out, count):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = 4 * i[:, None] + tl.arange(0, 4)[None, :]
    inside = (i < count)[:, None]
    word = tl.load(counter + at, mask=inside, other=0).to(tl.uint32)
    even, odd = tl.split(tl.reshape(word, (BLOCK, 2, 2)))
    (c0, c2), (c1, c3) = tl.split(even), tl.split(odd)
    low, high = num.number(key_low, 0).to(tl.uint32), num.number(key_high, 0).to(tl.uint32)
    c0, c1, c2, c3 = num.philox4x32(c0, c1, c2, c3, low, high)
    word = tl.interleave(tl.interleave(c0, c2), tl.interleave(c1, c3))
    tl.store(out + at, tl.reshape(word, (BLOCK, 4)).to(tl.int64), mask=inside)


@operator
def philox(counter: Tensor, key: Tensor, *, out: Tensor) -> None:
    count = counter.numel() // 4
    launch(philox_kernel, -(-count // BLOCK.value), counter.contiguous(), number(key[:1]),
           number(key[1:]), out, count)  # fmt: skip


@jit
def normal_kernel(out, seed, step, sequence, iteration, rollout, count):
    program = tl.program_id(0).to(tl.int64)
    block = program * BLOCK + tl.arange(0, BLOCK)
    eps = num.normals(num.number(seed, 0), block, step, sequence, iteration, rollout)
    j = program * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    tl.store(out + j, eps, mask=j < count)


@operator
def normal(n: int, seed: Tensor, step: int, sequence: int, iteration: int, rollout: int, *,
           out: Tensor) -> None:  # fmt: skip
    launch(normal_kernel, -(-n // (4 * BLOCK.value)), out, number(seed), step, sequence,
           iteration, rollout, n)  # fmt: skip
