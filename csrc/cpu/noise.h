// Gaussian noise of the kNoise stream, made where it is needed and never stored.
// Counter c0 = dimension / 4 gives dimensions 4 c0 .. 4 c0 + 3. Included once per instruction set.
//
// The ten rounds of Philox are chains of dependent multiplications, and Box-Muller is a chain of
// fused multiply-adds: kNoisePack vectors of counters go through them together, step by step, so
// that the processor has that many independent chains to work on; and the rounds of the next ones
// run beside the polynomials of these. For GCC to mix the two it must schedule before it allocates
// registers, hence the pragma at the head of the files that include this one.

namespace tta {
namespace TTA_ISA {

// ---- 32-bit words in 64-bit lanes --------------------------------------------------------------
//
// Multiplication is 32 x 32 -> 64 bits on every second 32-bit lane, so the words of kWidth counters
// live in two vectors, even counters and odd ones. Only the low half of a 64-bit lane counts; the
// high half may hold anything, which saves all masking between rounds.

#if TTA_ISA_LEVEL == 2

struct Words {
  __m512i even, odd;
};
TTA_INLINE Words spread(I a) { return {a.v, _mm512_shuffle_epi32(a.v, _MM_PERM_DDBB)}; }
TTA_INLINE Words multiply(Words a, I m) {
  return {_mm512_mul_epu32(a.even, m.v), _mm512_mul_epu32(a.odd, m.v)};
}
TTA_INLINE Words high(Words a) {  // by shuffles: shifts are slower or wanted elsewhere
  return {_mm512_srli_epi64(a.even, 32), _mm512_srli_epi64(a.odd, 32)};
}
TTA_INLINE Words bit_xor(Words a, Words b) {
  return {_mm512_xor_si512(a.even, b.even), _mm512_xor_si512(a.odd, b.odd)};
}
TTA_INLINE Words bit_xor(Words a, I b) {
  return {_mm512_xor_si512(a.even, b.v), _mm512_xor_si512(a.odd, b.v)};
}
TTA_INLINE I gather_low(Words a) {
  return {_mm512_mask_shuffle_epi32(a.even, 0xAAAA, a.odd, _MM_PERM_CCAA)};
}
TTA_INLINE I gather_high(Words a) {
  return {_mm512_mask_shuffle_epi32(a.odd, 0x5555, a.even, _MM_PERM_DDBB)};
}

#elif TTA_ISA_LEVEL == 1

struct Words {
  __m256i even, odd;
};
TTA_INLINE Words spread(I a) { return {a.v, _mm256_srli_epi64(a.v, 32)}; }
TTA_INLINE Words multiply(Words a, I m) {
  return {_mm256_mul_epu32(a.even, m.v), _mm256_mul_epu32(a.odd, m.v)};
}
TTA_INLINE Words high(Words a) {
  return {_mm256_srli_epi64(a.even, 32), _mm256_srli_epi64(a.odd, 32)};
}
TTA_INLINE Words bit_xor(Words a, Words b) {
  return {_mm256_xor_si256(a.even, b.even), _mm256_xor_si256(a.odd, b.odd)};
}
TTA_INLINE Words bit_xor(Words a, I b) {
  return {_mm256_xor_si256(a.even, b.v), _mm256_xor_si256(a.odd, b.v)};
}
TTA_INLINE I gather_low(Words a) {
  return {_mm256_blend_epi32(a.even, _mm256_slli_epi64(a.odd, 32), 0xAA)};
}
TTA_INLINE I gather_high(Words a) {
  return {_mm256_blend_epi32(_mm256_srli_epi64(a.even, 32), a.odd, 0xAA)};
}

#else

struct Words {
  uint64_t v;
};
TTA_INLINE Words spread(I a) { return {a.v}; }
TTA_INLINE Words multiply(Words a, I m) { return {uint64_t{static_cast<uint32_t>(a.v)} * m.v}; }
TTA_INLINE Words high(Words a) { return {a.v >> 32}; }
TTA_INLINE Words bit_xor(Words a, Words b) { return {a.v ^ b.v}; }
TTA_INLINE Words bit_xor(Words a, I b) { return {a.v ^ b.v}; }
TTA_INLINE I gather_low(Words a) { return {static_cast<uint32_t>(a.v)}; }
TTA_INLINE I gather_high(Words a) { return {static_cast<uint32_t>(a.v >> 32)}; }

#endif

TTA_INLINE I set1u(uint32_t a) { return set1i(static_cast<int32_t>(a)); }

// ---- streams -----------------------------------------------------------------------------------

// The round keys of a seed.
struct NoiseKey {
  explicit NoiseKey(uint64_t seed) {
    uint32_t a = static_cast<uint32_t>(seed), b = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      k0[round] = a;
      k1[round] = b;
      a += kPhiloxW0;
      b += kPhiloxW1;
    }
  }
  uint32_t k0[kPhiloxRounds], k1[kPhiloxRounds];
};

// One step of one sequence. Counter words c1 and c2 are the same for all its blocks and rollouts,
// so half of the first three rounds is done here, once: a word that is still the same everywhere
// after a round is a number, and the others are the xor of a vector and such a number.
struct NoiseStream {
  NoiseStream(const NoiseKey& key, uint32_t c1, uint32_t c2) {
    const uint64_t p1 = uint64_t{kPhiloxM1} * c2;
    const uint32_t x0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key.k0[0];
    const uint64_t q0 = uint64_t{kPhiloxM0} * x0;
    x2 = key.k1[0];
    y0 = static_cast<uint32_t>(p1) ^ key.k0[1];
    y2 = static_cast<uint32_t>(q0 >> 32) ^ key.k1[1];
    z2 = static_cast<uint32_t>(q0) ^ key.k1[2];
  }
  // To be given c3 = tag | iteration | rollout as philox_pack wants it.
  uint32_t rollout(uint32_t c3) const { return x2 ^ c3; }
  uint32_t x2, y0, y2, z2;  // words 2, 0, 2, 2 after the first, second, second, third round
};

// Which counter a lane works on, relative to the first: chosen so that in_order needs no exchange
// between 128-bit lanes.
TTA_INLINE I counter_lanes() {
#if TTA_ISA_LEVEL == 2
  return {_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)};
#elif TTA_ISA_LEVEL == 1
  return {_mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7)};
#else
  return {0};
#endif
}

constexpr int kBlock = 4 * kWidth;                 // dimensions of one vector of counters
constexpr int kNoisePack = TTA_ISA_LEVEL ? 2 : 1;  // vectors of counters that go together
constexpr int kNoiseStep = kNoisePack * kBlock;

// The words of N vectors of counters, block[n] + counter_lanes() of the rollout that
// NoiseStream::rollout made rollout[n] of: words 0 and 2 in a[2 n] and a[2 n + 1], 1 and 3 in b.
template <int N>
TTA_INLINE void philox_pack(const NoiseKey& key, const NoiseStream& stream, const uint32_t* rollout,
                            const uint32_t* block, I* a, I* b) {
  const I m0 = set1u(kPhiloxM0), m1 = set1u(kPhiloxM1);
  Words c0[N], c1[N], c2[N], c3[N];
  for (int n = 0; n < N; ++n) {
    c3[n] = multiply(spread(add(set1u(block[n]), counter_lanes())), m0);
    c2[n] = bit_xor(high(c3[n]), set1u(rollout[n]));
  }
  for (int n = 0; n < N; ++n) {
    c1[n] = multiply(c2[n], m1);
    c0[n] = bit_xor(high(c1[n]), set1u(stream.y0));
    c2[n] = bit_xor(c3[n], set1u(stream.y2));
  }
  for (int n = 0; n < N; ++n) {
    const Words p0 = multiply(c0[n], m0), p1 = multiply(c2[n], m1);
    c0[n] = bit_xor(bit_xor(high(p1), c1[n]), set1u(key.k0[2]));
    c2[n] = bit_xor(high(p0), set1u(stream.z2));
    c1[n] = p1;
    c3[n] = p0;
  }
  for (int round = 3; round < kPhiloxRounds - 1; ++round) {
    const I k0 = set1u(key.k0[round]), k1 = set1u(key.k1[round]);
    for (int n = 0; n < N; ++n) {
      const Words p0 = multiply(c0[n], m0), p1 = multiply(c2[n], m1);
      c0[n] = bit_xor(bit_xor(high(p1), c1[n]), k0);
      c2[n] = bit_xor(bit_xor(high(p0), c3[n]), k1);
      c1[n] = p1;
      c3[n] = p0;
    }
  }
  const I k0 = set1u(key.k0[kPhiloxRounds - 1]), k1 = set1u(key.k1[kPhiloxRounds - 1]);
  for (int n = 0; n < N; ++n) {
    const Words p0 = multiply(c0[n], m0), p1 = multiply(c2[n], m1);
    a[2 * n] = bit_xor(bit_xor(gather_high(p1), gather_low(c1[n])), k0);
    b[2 * n] = gather_low(p1);
    a[2 * n + 1] = bit_xor(bit_xor(gather_high(p0), gather_low(c3[n])), k1);
    b[2 * n + 1] = gather_low(p0);
  }
}

// Their normals: out[4 n + w] belongs to word w of vector n.
template <int N>
TTA_INLINE void normal_words(const I* a, const I* b, F* out) {
  F cosine[2 * N], sine[2 * N];
  normal_pack<2 * N>(a, b, cosine, sine);
  for (int n = 0; n < 2 * N; ++n) {
    out[2 * n] = cosine[n];
    out[2 * n + 1] = sine[n];
  }
}

// Four vectors as normal_words leaves them -> kBlock consecutive dimensions.
TTA_INLINE void in_order(F* x) {
#if TTA_ISA_LEVEL == 2
  const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(x[0].v, x[1].v));
  const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(x[0].v, x[1].v));
  const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(x[2].v, x[3].v));
  const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(x[2].v, x[3].v));
  x[0].v = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
  x[1].v = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
  x[2].v = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
  x[3].v = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
#elif TTA_ISA_LEVEL == 1
  const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(x[0].v, x[1].v));
  const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(x[0].v, x[1].v));
  const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(x[2].v, x[3].v));
  const __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(x[2].v, x[3].v));
  x[0].v = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
  x[1].v = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
  x[2].v = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
  x[3].v = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
#else
  (void)x;  // one counter: its four words are four dimensions
#endif
}

// One step of normals, in order of dimension.
TTA_INLINE void store_normals(const I* a, const I* b, float* out) {
  F eps[4 * kNoisePack];
  normal_words<kNoisePack>(a, b, eps);
  for (int n = 0; n < kNoisePack; ++n) in_order(eps + 4 * n);
  for (int k = 0; k < 4 * kNoisePack; ++k) store(out + k * kWidth, eps[k]);
}

// Dimensions [begin, begin + count) in order; begin is a multiple of 4, count of kNoiseStep and not
// 0. The words of a step are made between the normals of the step before it: two chains of work
// that do not wait for each other. Not inlined: it is longer than what its callers do with the
// numbers, and costs them one store and one load a vector, in L1.
TTA_NOINLINE static void noise_steps(const NoiseKey& key, const NoiseStream& stream,
                                     uint32_t rollout, int64_t begin, int64_t count, float* out) {
  uint32_t rollouts[kNoisePack], block[kNoisePack];
  for (int n = 0; n < kNoisePack; ++n) {
    rollouts[n] = rollout;
    block[n] = static_cast<uint32_t>(begin / 4) + static_cast<uint32_t>(n * kWidth);
  }
  I a[2 * kNoisePack], b[2 * kNoisePack];
  philox_pack<kNoisePack>(key, stream, rollouts, block, a, b);
  const float* last = out + count - kNoiseStep;
  for (; out != last; out += kNoiseStep) {
    I next_a[2 * kNoisePack], next_b[2 * kNoisePack];
    for (int n = 0; n < kNoisePack; ++n) block[n] += kNoisePack * kWidth;
    philox_pack<kNoisePack>(key, stream, rollouts, block, next_a, next_b);
    store_normals(a, b, out);
    for (int k = 0; k < 2 * kNoisePack; ++k) {
      a[k] = next_a[k];
      b[k] = next_b[k];
    }
  }
  store_normals(a, b, out);
}

// Dimensions [begin, end) into out[0 ..]; begin is a multiple of 4.
static void noise_range(const NoiseKey& key, const NoiseStream& stream, uint32_t rollout,
                        int64_t begin, int64_t end, float* out) {
  const int64_t whole = (end - begin) / kNoiseStep * kNoiseStep;
  if (whole) noise_steps(key, stream, rollout, begin, whole, out);
  if (begin + whole < end) {
    float tail[kNoiseStep];
    noise_steps(key, stream, rollout, begin + whole, kNoiseStep, tail);
    std::memcpy(out + whole, tail, static_cast<size_t>(end - begin - whole) * sizeof(float));
  }
}

}  // namespace TTA_ISA
}  // namespace tta
