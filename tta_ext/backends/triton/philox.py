"""Philox4x32-10 and the normals made from it."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from tta_ext import rng
from tta_ext.backends.triton.launch import jit, launch, number
from tta_ext.backends.triton.numerics import integer, normals, philox4x32, word3

_BLOCK = 256  # counters a program


@jit
def philox_kernel(counter, key_low, key_high, out, count, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at, inside = counter + 4 * i, i < count
    c0 = tl.load(at, mask=inside, other=0).to(tl.uint32)
    c1 = tl.load(at + 1, mask=inside, other=0).to(tl.uint32)
    c2 = tl.load(at + 2, mask=inside, other=0).to(tl.uint32)
    c3 = tl.load(at + 3, mask=inside, other=0).to(tl.uint32)
    low, high = integer(key_low, 0).to(tl.uint32), integer(key_high, 0).to(tl.uint32)
    x0, x1, x2, x3 = philox4x32(c0, c1, c2, c3, low, high)
    at = out + 4 * i
    tl.store(at, x0.to(tl.int64), mask=inside)
    tl.store(at + 1, x1.to(tl.int64), mask=inside)
    tl.store(at + 2, x2.to(tl.int64), mask=inside)
    tl.store(at + 3, x3.to(tl.int64), mask=inside)


@jit
def normal_kernel(seed, step, sequence, iteration, rollout, out, count, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    word = word3(NOISE, iteration.to(tl.int64), rollout.to(tl.int64))
    eps = normals(
        integer(seed, 0),
        program * BLOCK + tl.arange(0, BLOCK),
        step.to(tl.int64),
        sequence.to(tl.int64),
        word,
    )
    j = program * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    tl.store(out + j, eps, mask=j < count)


NOISE = tl.constexpr(rng.NOISE)


def philox(counter: Tensor, key: Tensor, *, out: Tensor) -> None:
    count = counter.numel() // 4
    low, high = number(key[:1]), number(key[1:])
    launch(philox_kernel, -(-count // _BLOCK), out, counter.contiguous(), low, high, out, count,
           BLOCK=_BLOCK)  # fmt: skip


def normal(
    n: int, seed: Tensor, step: int, sequence: int, iteration: int, rollout: int, *, out: Tensor
) -> None:
    launch(normal_kernel, -(-n // (4 * _BLOCK)), out, number(seed), step, sequence, iteration,
           rollout, out, n, BLOCK=_BLOCK)  # fmt: skip
