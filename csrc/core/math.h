// exp, log and the Gaussian pair as polynomials of explicit fma / add / mul: the project's one
// arithmetic. Included once per instruction set (no include guard), on top of core/vec.h; a CUDA
// translation unit supplies the same operations on plain floats.
//
// Coefficients are minimax fits (Remez exchange) rounded to float32.
// Accuracy and monotonicity are checked over every float by csrc/testing/math_test.cpp.

namespace tta {
namespace TTA_ISA {

// e^x for x <= 0 (any x for which the result is normal). Monotone over all floats, exp(-inf) = 0,
// 0 below ln 2^-126 (no subnormal is ever produced), NaN stays NaN. At most 1 ulp off.
// x = n ln 2 + r by the 1.5 * 2^23 trick, whose low bits then hold n + 127, the field of 2^n.
//
// N vectors at a time, step by step: the chain of one exponential is about 60 cycles long, and a
// processor looks only a few dozen instructions ahead.
template <int N>
TTA_INLINE void exp_pack(F* x) {
  const F magic = set1(0x1.8p23f + 127.0f);  // 127: the exponent's bias
  F shifted[N], p[N];
  for (int k = 0; k < N; ++k) shifted[k] = fma(x[k], set1(0x1.715476p+0f), magic);
  F n[N], r[N];
  for (int k = 0; k < N; ++k) n[k] = sub(shifted[k], magic);
  for (int k = 0; k < N; ++k) r[k] = fma(n[k], set1(-0x1.62e000p-1f), x[k]);
  for (int k = 0; k < N; ++k) r[k] = fma(n[k], set1(-0x1.0bfbe8p-15f), r[k]);
  for (int k = 0; k < N; ++k) p[k] = fma(set1(0x1.6a2256p-10f), r[k], set1(0x1.123b02p-7f));
  for (int k = 0; k < N; ++k) p[k] = fma(p[k], r[k], set1(0x1.5558f8p-5f));
  for (int k = 0; k < N; ++k) p[k] = fma(p[k], r[k], set1(0x1.555490p-3f));
  for (int k = 0; k < N; ++k) p[k] = fma(p[k], r[k], set1(0x1.fffffcp-2f));
  for (int k = 0; k < N; ++k) p[k] = fma(p[k], r[k], set1(1.0f));
  for (int k = 0; k < N; ++k) p[k] = fma(p[k], r[k], set1(1.0f));
  for (int k = 0; k < N; ++k) {
    // A product, not a sum of bits, so that a NaN stays one whatever its payload; exact.
    const F scaled = mul(p[k], from_bits(shift_left<23>(bits(shifted[k]))));
    x[k] = keep(mask_not(less(x[k], set1(-0x1.5d589ep+6f))), scaled);
  }
}

TTA_INLINE F exp(F x) {
  exp_pack<1>(&x);
  return x;
}

// Natural logarithm of a positive normal float. x = 2^k (1 + f), sqrt(1/2) <= 1 + f < sqrt(2).
TTA_INLINE F log(F x) {
  const I offset = sub(bits(x), set1i(0x3f3504f3));  // bits of sqrt(1/2)
  const F k = to_float(shift_right_signed<23>(offset));
  const I mantissa = add(bit_and(offset, set1i(0x007fffff)), set1i(0x3f3504f3));
  const F f = sub(from_bits(mantissa), set1(1.0f));
  F p = set1(0x1.1b42d0p-4f);
  p = fma(p, f, set1(-0x1.e2e99cp-4f));
  p = fma(p, f, set1(0x1.e6508ep-4f));
  p = fma(p, f, set1(-0x1.fb432ep-4f));
  p = fma(p, f, set1(0x1.2332c2p-3f));
  p = fma(p, f, set1(-0x1.5562e4p-3f));
  p = fma(p, f, set1(0x1.99a546p-3f));
  p = fma(p, f, set1(-0x1.ffffeep-3f));
  p = fma(p, f, set1(0x1.555546p-2f));
  const F f2 = mul(f, f);
  F tail = mul(mul(f2, f), p);
  tail = fma(k, set1(0x1.0bfbe8p-15f), tail);
  tail = fma(f2, set1(-0.5f), tail);
  return fma(k, set1(0x1.62e000p-1f), add(f, tail));
}

// Box-Muller: two 32-bit words -> two independent standard normals.
// u1 = (2 (a >> 9) + 1) 2^-24 in (0, 1), u2 likewise from b; radius = sqrt(-2 ln u1), angle 2 pi
// u2. The angle is reduced to a quadrant and an exact remainder in [-1/2, 1/2] before any rounding.
TTA_INLINE void normal_pair(I a, I b, F* cosine, F* sine) {
  const F unit = set1(0x1p-24f);
  const F u1 = mul(to_float(bit_or(shift_left<1>(shift_right<9>(a)), set1i(1))), unit);
  const F radius = sqrt(mul(set1(-2.0f), log(u1)));
  // 4 u2 = quadrant + f with |f| <= 1/2, all exact: m = 2 (b >> 9) + 1 counts steps of 2^-24.
  const I m = bit_or(shift_left<1>(shift_right<9>(b)), set1i(1));
  const I quadrant = shift_right<22>(add(m, set1i(1 << 21)));
  const F f = mul(to_float(sub(m, shift_left<22>(quadrant))), set1(0x1p-22f));
  const F z = mul(f, f);
  F s = set1(0x1.4bc820p-13f);
  s = fma(s, z, set1(-0x1.32ca9cp-8f));
  s = fma(s, z, set1(0x1.466bbap-4f));
  s = fma(s, z, set1(-0x1.4abbcep-1f));
  s = fma(s, z, set1(0x1.921fb6p+0f));
  s = mul(s, f);
  F c = set1(0x1.d9f6eep-11f);
  c = fma(c, z, set1(-0x1.55c662p-6f));
  c = fma(c, z, set1(0x1.03c1dep-2f));
  c = fma(c, z, set1(-0x1.3bd3ccp+0f));
  c = fma(c, z, set1(1.0f));
  // Quadrant q: (cos, sin) = (c, s), (-s, c), (-c, -s), (s, -c).
  const M swap = equal(bit_and(quadrant, set1i(1)), set1i(1));
  const I cos_sign = shift_left<30>(bit_and(add(quadrant, set1i(1)), set1i(2)));
  const I sin_sign = shift_left<30>(bit_and(quadrant, set1i(2)));
  const F cos_part = from_bits(bit_xor(bits(select(swap, s, c)), cos_sign));
  const F sin_part = from_bits(bit_xor(bits(select(swap, c, s)), sin_sign));
  *cosine = mul(radius, cos_part);
  *sine = mul(radius, sin_part);
}

}  // namespace TTA_ISA
}  // namespace tta
