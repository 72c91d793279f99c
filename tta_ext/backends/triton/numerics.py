"""The one arithmetic of ``csrc/core`` as Triton functions: exp, log, normals, Philox, sums.

Every function is a sequence of explicit fma, add and mul (kernels are compiled without
contraction), and every sum is added in the order that ``csrc/core/order.h`` describes: 128 lanes a
tile of 4096, a fixed fold, tiles from left to right in float64. So the bits are the CPU's.
"""

from __future__ import annotations

import triton
import triton.language as tl


def _hex(text: str) -> tl.constexpr:
    return tl.constexpr(float.fromhex(text))


TILE = tl.constexpr(4096)
LANES = tl.constexpr(128)
GROUPS = tl.constexpr(32)  # of 128 lanes in a tile
MAX_TILES = tl.constexpr(256)
INFINITY = tl.constexpr(float("inf"))
NO_LIMIT = tl.constexpr(2**40)  # beyond every token id

_LOG2_E = _hex("0x1.715476p+0")
_MAGIC = tl.constexpr(1.5 * 2**23 + 127)
_LN2_HIGH, _LN2_LOW = _hex("0x1.62e000p-1"), _hex("0x1.0bfbe8p-15")
_MINUS_LN2_HIGH, _MINUS_LN2_LOW = _hex("-0x1.62e000p-1"), _hex("-0x1.0bfbe8p-15")
_EXP_LOW = _hex("-0x1.5d589ep+6")  # ln 2^-126
_E6, _E5, _E4 = _hex("0x1.6a2256p-10"), _hex("0x1.123b02p-7"), _hex("0x1.5558f8p-5")
_E3, _E2 = _hex("0x1.555490p-3"), _hex("0x1.fffffcp-2")


@triton.jit
def exp(x):
    """exp_pack of core/math.h: monotone, 0 below ln 2^-126, NaN stays NaN."""
    shifted = tl.fma(x, _LOG2_E, _MAGIC)
    n = shifted - _MAGIC
    r = tl.fma(n, _MINUS_LN2_LOW, tl.fma(n, _MINUS_LN2_HIGH, x))
    p = tl.fma(r, _E6, _E5)
    p = tl.fma(p, r, _E4)
    p = tl.fma(p, r, _E3)
    p = tl.fma(p, r, _E2)
    p = tl.fma(p, r * r, r) + 1.0
    scale = (shifted.to(tl.uint32, bitcast=True) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < _EXP_LOW, 0.0, p * scale)


# Those of log times -2, which rounds nothing.
_L = [float.fromhex(c) for c in (
    "0x1.1b42d0p-4 -0x1.e2e99cp-4 0x1.e6508ep-4 -0x1.fb432ep-4 0x1.2332c2p-3 -0x1.5562e4p-3 "
    "0x1.99a546p-3 -0x1.ffffeep-3 0x1.555546p-2").split()]  # fmt: skip
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8 = (tl.constexpr(-2 * c) for c in _L)
_K_HIGH = tl.constexpr(-2 * 2.0**-23 * _LN2_HIGH.value)
_K_LOW = tl.constexpr(-2 * 2.0**-23 * _LN2_LOW.value)


@triton.jit
def minus_two_log(x):
    """log_pack<N, -2> of core/math.h, for positive normal x."""
    offset = x.to(tl.int32, bitcast=True) - 0x3F3504F3
    exponent = offset & -0x00800000
    k = exponent.to(tl.float32)
    f = (x.to(tl.int32, bitcast=True) - exponent).to(tl.float32, bitcast=True) - 1.0
    p = tl.fma(f, _L0, _L1)
    p = tl.fma(p, f, _L2)
    p = tl.fma(p, f, _L3)
    p = tl.fma(p, f, _L4)
    p = tl.fma(p, f, _L5)
    p = tl.fma(p, f, _L6)
    p = tl.fma(p, f, _L7)
    p = tl.fma(p, f, _L8)
    f2 = f * f
    tail = f2 * f * p
    tail = tl.fma(k, _K_LOW, tail)
    tail = tl.fma(f2, 1.0, tail)
    tail = tl.fma(f, -2.0, tail)
    return tl.fma(k, _K_HIGH, tail)


_ONE_LESS = tl.constexpr(1.0 - 2.0**-24)
_HALF_MORE = tl.constexpr(1.5 - 2.0**-22)
_S3, _S2 = _hex("0x1.4bc820p-13"), _hex("-0x1.32ca9cp-8")
_S1, _S0, _SF = _hex("0x1.466bbap-4"), _hex("-0x1.4abbcep-1"), _hex("0x1.921fb6p+0")
_C3, _C2 = _hex("0x1.d9f6eep-11"), _hex("-0x1.55c662p-6")
_C1, _C0 = _hex("0x1.03c1dep-2"), _hex("-0x1.3bd3ccp+0")


@triton.jit
def normal_pair(a, b):
    """normal_pack of core/math.h: two words -> two standard normals, by Box-Muller."""
    u = ((a >> 9) + 0x3F800000).to(tl.float32, bitcast=True) - _ONE_LESS
    turn = b + 0x20000000
    fraction = (turn & 0x3FFFFE00) >> 7
    f = (fraction + 0x3F800000).to(tl.float32, bitcast=True) - _HALF_MORE
    z = f * f
    s = tl.fma(tl.fma(z, _S3, _S2), z, _S1)
    c = tl.fma(tl.fma(z, _C3, _C2), z, _C1)
    s = tl.fma(tl.fma(s, z, _S0), z, _SF) * f
    c = tl.fma(tl.fma(c, z, _C0), z, 1.0)
    radius = tl.sqrt_rn(minus_two_log(u)).to(tl.uint32, bitcast=True) ^ (turn & 0x80000000)
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
def integer(x, index):
    """``x[index]`` as int64, of a pointer, or the number itself."""
    if x.dtype.is_ptr():
        return tl.load(x + index)
    return x.to(tl.int64)


@triton.jit
def double(x, index):
    """The same of float64; a number comes as its bits (Triton passes floats as float32)."""
    if x.dtype.is_ptr():
        return tl.load(x + index)
    return x.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def word3(tag, iteration, rollout):
    return (rollout & 0xFFFF) | (iteration << 16) | (tag << 28)


@triton.jit
def uniform(seed, draw, position, sequence, word):
    """philox_uniform of core/philox.h; all arguments int64."""
    word0, _, _, _ = philox4x32(
        draw.to(tl.uint32),
        position.to(tl.uint32),
        sequence.to(tl.uint32),
        word.to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )
    return word0.to(tl.float64) * 2.0**-32


@triton.jit
def normals(seed, block, step, sequence, word):
    """The 4 n dimensions of counters ``block`` [..., n], in order of dimension."""
    zero = (block * 0).to(tl.uint32)
    a0, b0, a1, b1 = philox4x32(
        block.to(tl.uint32),
        zero + step.to(tl.uint32),
        zero + sequence.to(tl.uint32),
        zero + word.to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )
    cosine0, sine0 = normal_pair(a0, b0)
    cosine1, sine1 = normal_pair(a1, b1)
    return tl.interleave(tl.interleave(cosine0, cosine1), tl.interleave(sine0, sine1))


# ---- sums in the canonical order ----------------------------------------------------------------


@triton.jit
def fold(lanes, ROWS: tl.constexpr):
    """[ROWS, 128] -> [ROWS]: l + 64, l + 32, ... l + 1. A sum of two has one order."""
    for k in tl.static_range(7):
        lanes = tl.sum(tl.reshape(lanes, (ROWS, 2, 64 >> k)), 1)
    return tl.reshape(lanes, (ROWS,))


@triton.jit
def tree(x, LEADING: tl.constexpr, LEVELS: tl.constexpr, TRAILING: tl.constexpr):
    """[LEADING, 2^LEVELS, TRAILING] -> [LEADING, TRAILING]: neighbours first, a pairwise tree."""
    for k in tl.static_range(LEVELS):
        x = tl.reshape(x, (LEADING, 1 << (LEVELS - 1 - k), 2, TRAILING))
        x = tl.sum(x, 2)
    return tl.reshape(x, (LEADING, TRAILING))


@triton.jit
def push(stack, level, count, x):
    """The binary counter of a pairwise sum: tree number ``count`` joins those that wait.

    ``stack`` [LEVELS, n] holds a finished subtree a level; ``level`` [LEVELS, 1] numbers them.
    """
    carry = count * 0
    while ((count >> carry) & 1) == 1:
        x = tl.sum(tl.where(level == carry, stack, 0.0), 0) + x
        carry += 1
    return tl.where(level == carry, x[None, :], stack)


@triton.jit
def gather_up(stack, level, count):
    """The sum of the subtrees that wait after ``count`` trees, right to left."""
    x = tl.sum(tl.zeros_like(stack), 0)
    carry = count * 0
    while (count >> carry) > 0:
        if ((count >> carry) & 1) == 1:
            x = tl.sum(tl.where(level == carry, stack, 0.0), 0) + x
        carry += 1
    return x


# ---- the order of a vocabulary ------------------------------------------------------------------


@triton.jit
def ordered_bits(x):
    """int64, monotone in a float32; -0 is +0."""
    i = x.to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(i < 0, -0x80000000 - i, i)


@triton.jit
def from_ordered_bits(i):
    i = tl.where(i < 0, -0x80000000 - i, i)
    return i.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def admits(cut_x, cut_id, x, index):
    """Whether (x, index) stands before the cut: by logit, then by id."""
    return (x < cut_x) | ((x == cut_x) & (index < cut_id))


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
