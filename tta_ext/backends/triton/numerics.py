"""The one arithmetic of ``csrc/core`` as Triton functions: exp, log, normals, Philox, sums.

Every function is a sequence of explicit fma, add and mul (kernels are compiled without
contraction), and every sum is added in the order that ``csrc/core/order.h`` describes: 128 lanes a
tile of 4096, a fixed fold, tiles from left to right in float64. So the bits are the CPU's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tta_ext import rng

TILE = tl.constexpr(4096)
LANES = tl.constexpr(128)
MAX_TILES = tl.constexpr(256)
INFINITY = tl.constexpr(float("inf"))
NAN = tl.constexpr(float("nan"))


def _floats(text: str, factor: float = 1.0) -> tl.constexpr:
    numbers = tuple(factor * float.fromhex(word) for word in text.split())
    return tl.constexpr(numbers if len(numbers) > 1 else numbers[0])


@triton.jit
def polynomial(x, C: tl.constexpr, DEGREE: tl.constexpr):
    """Horner's rule, the highest power's coefficient first."""
    p = tl.fma(x, C[0], C[1])
    for k in tl.static_range(2, DEGREE + 1):
        p = tl.fma(p, x, C[k])
    return p


_LOG2_E, _LN2_HIGH = _floats("0x1.715476p+0"), _floats("0x1.62e000p-1")
_LN2_LOW, _EXP_LOW = _floats("0x1.0bfbe8p-15"), _floats("-0x1.5d589ep+6")  # ln 2^-126
_MAGIC = tl.constexpr(1.5 * 2**23 + 127)
_EXP = _floats("0x1.6a2256p-10 0x1.123b02p-7 0x1.5558f8p-5 0x1.555490p-3 0x1.fffffcp-2")


@triton.jit
def exp(x):
    """exp_pack of core/math.h: monotone, 0 below ln 2^-126, NaN stays NaN."""
    shifted = tl.fma(x, _LOG2_E, _MAGIC)
    n = shifted - _MAGIC
    r = tl.fma(n, -_LN2_LOW, tl.fma(n, -_LN2_HIGH, x))
    p = tl.fma(polynomial(r, _EXP, 4), r * r, r) + 1.0
    scale = (shifted.to(tl.uint32, bitcast=True) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < _EXP_LOW, 0.0, p * scale)


# The coefficients of log times -2, which rounds nothing.
_LOG = _floats(
    "0x1.1b42d0p-4 -0x1.e2e99cp-4 0x1.e6508ep-4 -0x1.fb432ep-4 0x1.2332c2p-3 -0x1.5562e4p-3 "
    "0x1.99a546p-3 -0x1.ffffeep-3 0x1.555546p-2",
    -2.0,
)
_K = tl.constexpr(-(2.0**-22))
_ONE_LESS, _HALF_MORE = tl.constexpr(1.0 - 2.0**-24), tl.constexpr(1.5 - 2.0**-22)
_SINE = _floats("0x1.4bc820p-13 -0x1.32ca9cp-8 0x1.466bbap-4 -0x1.4abbcep-1 0x1.921fb6p+0")
_COSINE = _floats("0x1.d9f6eep-11 -0x1.55c662p-6 0x1.03c1dep-2 -0x1.3bd3ccp+0 0x1p+0")


@triton.jit
def normal_pair(a, b):
    """normal_pack of core/math.h: two words -> two standard normals, by Box-Muller."""
    # log_pack<N, -2> of a uniform.
    u = ((a >> 9) + 0x3F800000).to(tl.float32, bitcast=True) - _ONE_LESS
    exponent = (u.to(tl.int32, bitcast=True) - 0x3F3504F3) & -0x00800000
    k = exponent.to(tl.float32)
    f = (u.to(tl.int32, bitcast=True) - exponent).to(tl.float32, bitcast=True) - 1.0
    f2 = f * f
    tail = f2 + tl.fma(k, _K * _LN2_LOW, f2 * f * polynomial(f, _LOG, 8))
    square = tl.fma(k, _K * _LN2_HIGH, tl.fma(f, -2.0, tail))
    # The angle: a quadrant, and what is left of it.
    turn = b + 0x20000000
    fraction = (turn & 0x3FFFFE00) >> 7
    f = (fraction + 0x3F800000).to(tl.float32, bitcast=True) - _HALF_MORE
    s, c = polynomial(f * f, _SINE, 4) * f, polynomial(f * f, _COSINE, 4)
    radius = tl.sqrt_rn(square).to(tl.uint32, bitcast=True) ^ (turn & 0x80000000)
    radius = radius.to(tl.float32, bitcast=True)
    swap = (turn & 0x40000000) != 0
    return radius * tl.where(swap, -s, c), radius * tl.where(swap, c, s)


# ---- the random stream --------------------------------------------------------------------------


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 on uint32 words."""
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2511F53)
        low0 = c0 * 0xD2511F53
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        low1 = c2 * 0xCD9E8D57
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def number(x, index, TYPE: tl.constexpr = tl.int64):
    """``x[index]`` of a pointer, int64 or float64, or an integer of the number's bits."""
    if x.dtype.is_ptr():
        return tl.load(x + index)
    return x.to(tl.int64).to(TYPE, bitcast=True)


@triton.jit
def block_of(seed, c0, c1, c2, tag, iteration, rollout):
    """The four words of a counter (rng.py has the map), whose rollout, int64, sets the shape."""
    zero = rollout * 0
    c0, c1, c2 = (zero + c0).to(tl.uint32), (zero + c1).to(tl.uint32), (zero + c2).to(tl.uint32)
    c3 = (rollout & 0xFFFF) | ((zero + iteration) << 16) | ((zero + tag) << 28)
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    return philox4x32(c0, c1, c2, c3.to(tl.uint32), low, high)


@triton.jit
def normals(seed, block, step, sequence, iteration, rollout):
    """The 4 n dimensions of counters ``block`` [..., n], in order of dimension."""
    rollout = block * 0 + rollout
    a0, b0, a1, b1 = block_of(seed, block, step, sequence, rng.NOISE, iteration, rollout)
    cosine0, sine0 = normal_pair(a0, b0)
    cosine1, sine1 = normal_pair(a1, b1)
    return tl.interleave(tl.interleave(cosine0, cosine1), tl.interleave(sine0, sine1))


# ---- sums in the canonical order ----------------------------------------------------------------


@triton.jit
def fold(lanes):
    """[n, 128] -> [n]: l + 64, l + 32, ... l + 1. A sum of two has one order."""
    n: tl.constexpr = lanes.shape[0]
    for k in tl.static_range(7):
        lanes = tl.sum(tl.reshape(lanes, (n, 2, 64 >> k)), 1)
    return tl.reshape(lanes, (n,))


@triton.jit
def tree(x):
    """[2^k, n] -> [n]: neighbours first, a pairwise tree."""
    leaves: tl.constexpr = x.shape[0]
    n: tl.constexpr = x.shape[1]
    for k in tl.static_range(31):
        if leaves >> k > 1:
            x = tl.sum(tl.reshape(x, (leaves >> (k + 1), 2, n)), 1)
    return tl.reshape(x, (n,))


# ---- the order of a vocabulary ------------------------------------------------------------------

ID_BITS, ID_MASK = tl.constexpr(20), tl.constexpr(2**20 - 1)  # V <= 2^20


@triton.jit
def order(x, index):
    """A token's place by logit, then by id: an int64 with the id in its low bits; -0 is +0."""
    i = x.to(tl.int32, bitcast=True).to(tl.int64)
    return (tl.where(i < 0, -0x80000000 - i, i) << ID_BITS) + index


@triton.jit
def find_in_tile(weight, scale, before, target):
    """find_in_tile of cpu/row.h: the first element whose scaled prefix passes the target.

    Weights <= 1 are rounded to multiples of 2^-40, so their sums are exact in any order.
    """
    index = tl.arange(0, TILE)
    quantum = (weight.to(tl.float64) + 6144.0) - 6144.0
    prefix = tl.cumsum(quantum, 0)
    first = tl.min(tl.where(before + prefix * scale > target, index, TILE), 0)
    last = tl.max(tl.where(quantum != 0.0, index, 0), 0)
    return tl.where(first < TILE, first, last)
