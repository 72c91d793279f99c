// exp, log and the Gaussian pair as polynomials of explicit fma / add / mul: the project's one
// arithmetic. Included once per instruction set (no include guard), on top of core/vec.h; a CUDA
// translation unit supplies the same operations on plain floats.
//
// Coefficients are minimax fits (Remez exchange) rounded to float32.
// Accuracy and monotonicity are checked over every float by csrc/testing/math_test.cpp.

namespace tta {
namespace TTA_ISA {

// 2^n e^r = e^x: p = e^r, and the integer n in the low bits of `shifted` where `magic` is 1.5 *
// 2^23 plus an even number (a tie would round to another n then; n is the same for an odd one
// because no float is a tie).
//
// N vectors at a time, step by step: the chain of one exponential is about 60 cycles long, and a
// processor looks only a few dozen instructions ahead.
template <int N>
TTA_INLINE void exp_parts(const F* x, F magic, F* shifted, F* p) {
  for (int k = 0; k < N; ++k) shifted[k] = fma(x[k], set1(0x1.715476p+0f), magic);
  F n[N], r[N];
  for (int k = 0; k < N; ++k) n[k] = sub(shifted[k], magic);
  for (int k = 0; k < N; ++k) r[k] = fma(n[k], set1(-0x1.62e000p-1f), x[k]);
  for (int k = 0; k < N; ++k) r[k] = fma(n[k], set1(-0x1.0bfbe8p-15f), r[k]);
  for (int k = 0; k < N; ++k) p[k] = fma(set1(0x1.6a2256p-10f), r[k], set1(0x1.123b02p-7f));
  for (int k = 0; k < N; ++k) p[k] = fma(p[k], r[k], set1(0x1.5558f8p-5f));
  for (int k = 0; k < N; ++k) p[k] = fma(p[k], r[k], set1(0x1.555490p-3f));
  for (int k = 0; k < N; ++k) p[k] = fma(p[k], r[k], set1(0x1.fffffcp-2f));
  // 1 + (r + r^2 p), not 1 + r (1 + r p): there an ulp more in the inner sum takes more from the
  // result, for r < 0, than the next r adds.
  for (int k = 0; k < N; ++k) p[k] = add(fma(p[k], mul(r[k], r[k]), r[k]), set1(1.0f));
}

// e^x for x <= 0 (any x for which the result is normal). Monotone over all floats, exp(-inf) = 0,
// 0 below ln 2^-126 (no subnormal is ever produced), NaN stays NaN. At most 1.02 ulp off.
// x = n ln 2 + r by the 1.5 * 2^23 trick, whose low bits then hold n + 127, the field of 2^n; or n,
// where no x is NaN: then bits are added, and the product is saved.
template <int N, bool kNaN = true>
TTA_INLINE void exp_pack(F* x) {
  F shifted[N], p[N];
  exp_parts<N>(x, set1(0x1.8p23f + (kNaN ? 127.0f : 0.0f)), shifted, p);
  for (int k = 0; k < N; ++k) {
    // A product, not a sum of bits, so that a NaN stays one whatever its payload; exact.
    const I exponent = shift_left<23>(bits(shifted[k]));
    const F scaled = kNaN ? mul(p[k], from_bits(exponent)) : from_bits(add(bits(p[k]), exponent));
    x[k] = drop(less(x[k], set1(-0x1.5d589ep+6f)), scaled);
  }
}

// The same for kExpTermLow <= x <= 0 and a sum that takes subnormals for 0: where exp is 0, this is
// a subnormal, because n = -126 and p < 1 there. Three operations fewer.
constexpr float kExpTermLow = -87.5f;
template <int N>
TTA_INLINE void exp_term_pack(F* x) {
  F shifted[N], p[N];
  exp_parts<N>(x, set1(0x1.8p23f), shifted, p);
  for (int k = 0; k < N; ++k) x[k] = from_bits(add(bits(p[k]), shift_left<23>(bits(shifted[k]))));
}

TTA_INLINE F exp(F x) {
  exp_pack<1>(&x);
  return x;
}

// kTimes ln x for positive normal x; kTimes is plus or minus a power of two, which changes no
// rounding. x = 2^k (1 + f) with sqrt(1/2) <= 1 + f < sqrt(2); k stands in the exponent's place, as
// k 2^23.
template <int N, int kTimes = 1>
TTA_INLINE void log_pack(F* x) {
  constexpr float kOf = kTimes, kOfExponent = kTimes * 0x1p-23f;
  F k[N], f[N], p[N];
  for (int i = 0; i < N; ++i) {
    const I offset = sub(bits(x[i]), set1i(0x3f3504f3));  // sqrt(1/2)
    const I exponent = bit_and(offset, set1i(-0x00800000));
    k[i] = to_float(exponent);
    f[i] = sub(from_bits(sub(bits(x[i]), exponent)), set1(1.0f));
  }
  for (int i = 0; i < N; ++i)
    p[i] = fma(set1(kOf * 0x1.1b42d0p-4f), f[i], set1(kOf * -0x1.e2e99cp-4f));
  for (int i = 0; i < N; ++i) p[i] = fma(p[i], f[i], set1(kOf * 0x1.e6508ep-4f));
  for (int i = 0; i < N; ++i) p[i] = fma(p[i], f[i], set1(kOf * -0x1.fb432ep-4f));
  for (int i = 0; i < N; ++i) p[i] = fma(p[i], f[i], set1(kOf * 0x1.2332c2p-3f));
  for (int i = 0; i < N; ++i) p[i] = fma(p[i], f[i], set1(kOf * -0x1.5562e4p-3f));
  for (int i = 0; i < N; ++i) p[i] = fma(p[i], f[i], set1(kOf * 0x1.99a546p-3f));
  for (int i = 0; i < N; ++i) p[i] = fma(p[i], f[i], set1(kOf * -0x1.ffffeep-3f));
  for (int i = 0; i < N; ++i) p[i] = fma(p[i], f[i], set1(kOf * 0x1.555546p-2f));
  for (int i = 0; i < N; ++i) {
    const F f2 = mul(f[i], f[i]);
    F tail = mul(mul(f2, f[i]), p[i]);
    tail = fma(k[i], set1(kOfExponent * 0x1.0bfbe8p-15f), tail);
    tail = fma(f2, set1(kOf * -0.5f), tail);
    tail = kTimes == 1 ? add(f[i], tail) : fma(f[i], set1(kOf), tail);
    x[i] = fma(k[i], set1(kOfExponent * 0x1.62e000p-1f), tail);
  }
}

TTA_INLINE F log(F x) {
  log_pack<1>(&x);
  return x;
}

// Box-Muller: two 32-bit words -> two independent standard normals, N vectors of them at a time.
// u1 = (2 (a >> 9) + 1) 2^-24 in (0, 1), u2 likewise from b; radius = sqrt(-2 ln u1), angle 2 pi
// u2. The angle is reduced to a quadrant and an exact remainder in [-1/2, 1/2] before any rounding:
// u2 2^32, with an eighth of a turn added, has the quadrant in its top two bits and the remainder
// plus 1/2 in those below. Numbers between 0 and 1 come as the fraction of a float between 1 and 2.
template <int N>
TTA_INLINE void normal_pack(const I* a, const I* b, F* cosine, F* sine) {
  F radius[N], f[N], z[N], s[N], c[N];
  I turn[N];
  for (int i = 0; i < N; ++i) {
    const I one = set1i(0x3f800000);
    radius[i] = sub(from_bits(add(shift_right<9>(a[i]), one)), set1(1.0f - 0x1p-24f));  // u1
    turn[i] = add(b[i], set1i(1 << 29));
    const I fraction = shift_right<7>(bit_and(turn[i], set1i(0x3ffffe00)));
    f[i] = sub(from_bits(add(fraction, one)), set1(1.5f - 0x1p-22f));
    z[i] = mul(f[i], f[i]);
  }
  log_pack<N, -2>(radius);
  for (int i = 0; i < N; ++i) s[i] = fma(set1(0x1.4bc820p-13f), z[i], set1(-0x1.32ca9cp-8f));
  for (int i = 0; i < N; ++i) c[i] = fma(set1(0x1.d9f6eep-11f), z[i], set1(-0x1.55c662p-6f));
  for (int i = 0; i < N; ++i) s[i] = fma(s[i], z[i], set1(0x1.466bbap-4f));
  for (int i = 0; i < N; ++i) c[i] = fma(c[i], z[i], set1(0x1.03c1dep-2f));
  for (int i = 0; i < N; ++i) s[i] = fma(s[i], z[i], set1(-0x1.4abbcep-1f));
  for (int i = 0; i < N; ++i) c[i] = fma(c[i], z[i], set1(-0x1.3bd3ccp+0f));
  for (int i = 0; i < N; ++i) s[i] = fma(s[i], z[i], set1(0x1.921fb6p+0f));
  for (int i = 0; i < N; ++i) c[i] = fma(c[i], z[i], set1(1.0f));
  for (int i = 0; i < N; ++i) {
    s[i] = mul(s[i], f[i]);
    // Quadrant q, the top bits of turn: (cos, sin) = (c, s), (-s, c), (-c, -s), (s, -c).
    const I sign = set1i(-0x7fffffff - 1);
    const I half_turn = bit_and(turn[i], sign);
    radius[i] = from_bits(bit_xor(bits(sqrt(radius[i])), half_turn));
    const M swap = has_bit(turn[i], set1i(1 << 30));
    cosine[i] = mul(radius[i], select(swap, negate(s[i]), c[i]));
    sine[i] = mul(radius[i], select(swap, c[i], s[i]));
  }
}

TTA_INLINE void normal_pair(I a, I b, F* cosine, F* sine) { normal_pack<1>(&a, &b, cosine, sine); }

}  // namespace TTA_ISA
}  // namespace tta
