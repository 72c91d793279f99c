// Gaussian noise of the kNoise stream, kWidth counters at a time, never stored.
// Counter c0 = dimension / 4 gives dimensions 4 c0 .. 4 c0 + 3. Included once per instruction set.

namespace tta {
namespace TTA_ISA {

struct NoiseKey {
  uint32_t k0, k1;      // the seed
  uint32_t c1, c2, c3;  // step, sequence, tag | iteration | rollout
};

// Four vectors of normals: lane i of out[w] is dimension 4 (block + i) + w.
TTA_INLINE void noise_blocks(const NoiseKey& key, uint32_t block, F* out) {
  I c0 = add(set1i(static_cast<int32_t>(block)), iota());
  I c1 = set1i(static_cast<int32_t>(key.c1)), c2 = set1i(static_cast<int32_t>(key.c2)),
    c3 = set1i(static_cast<int32_t>(key.c3));
  const I m0 = set1i(static_cast<int32_t>(kPhiloxM0)), m1 = set1i(static_cast<int32_t>(kPhiloxM1));
  uint32_t k0 = key.k0, k1 = key.k1;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    I h0, l0, h1, l1;
    multiply_wide(c0, m0, &h0, &l0);
    multiply_wide(c2, m1, &h1, &l1);
    c0 = bit_xor(bit_xor(h1, c1), set1i(static_cast<int32_t>(k0)));
    c2 = bit_xor(bit_xor(h0, c3), set1i(static_cast<int32_t>(k1)));
    c1 = l1;
    c3 = l0;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  normal_pair(c0, c1, out, out + 1);
  normal_pair(c2, c3, out + 2, out + 3);
}

// In order of dimension: kWidth vectors of noise become 4 kWidth consecutive floats.
TTA_INLINE void store_interleaved(const F* block, float* out) {
#if TTA_ISA_LEVEL == 2
  // 4x4 transposes inside 128-bit lanes, then the lanes in order.
  const __m512 a = _mm512_unpacklo_ps(block[0].v, block[1].v);  // 0 1 of dims 0,1 per lane
  const __m512 b = _mm512_unpackhi_ps(block[0].v, block[1].v);
  const __m512 c = _mm512_unpacklo_ps(block[2].v, block[3].v);
  const __m512 d = _mm512_unpackhi_ps(block[2].v, block[3].v);
  const __m512d r0 = _mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(c));
  const __m512d r1 = _mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(c));
  const __m512d r2 = _mm512_unpacklo_pd(_mm512_castps_pd(b), _mm512_castps_pd(d));
  const __m512d r3 = _mm512_unpackhi_pd(_mm512_castps_pd(b), _mm512_castps_pd(d));
  // r_i holds blocks i, 4 + i, 8 + i, 12 + i in its 128-bit lanes.
  const __m512d s0 = _mm512_shuffle_f64x2(r0, r1, 0x44);  // 0 4 | 1 5
  const __m512d s1 = _mm512_shuffle_f64x2(r2, r3, 0x44);  // 2 6 | 3 7
  const __m512d s2 = _mm512_shuffle_f64x2(r0, r1, 0xEE);  // 8 12 | 9 13
  const __m512d s3 = _mm512_shuffle_f64x2(r2, r3, 0xEE);  // 10 14 | 11 15
  double* p = reinterpret_cast<double*>(out);
  _mm512_storeu_pd(p, _mm512_shuffle_f64x2(s0, s1, 0x88));
  _mm512_storeu_pd(p + 8, _mm512_shuffle_f64x2(s0, s1, 0xDD));
  _mm512_storeu_pd(p + 16, _mm512_shuffle_f64x2(s2, s3, 0x88));
  _mm512_storeu_pd(p + 24, _mm512_shuffle_f64x2(s2, s3, 0xDD));
#elif TTA_ISA_LEVEL == 1
  const __m256 a = _mm256_unpacklo_ps(block[0].v, block[1].v);
  const __m256 b = _mm256_unpackhi_ps(block[0].v, block[1].v);
  const __m256 c = _mm256_unpacklo_ps(block[2].v, block[3].v);
  const __m256 d = _mm256_unpackhi_ps(block[2].v, block[3].v);
  const __m256 r0 = _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(c)));
  const __m256 r1 = _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(c)));
  const __m256 r2 = _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(b), _mm256_castps_pd(d)));
  const __m256 r3 = _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(b), _mm256_castps_pd(d)));
  _mm256_storeu_ps(out, _mm256_permute2f128_ps(r0, r1, 0x20));
  _mm256_storeu_ps(out + 8, _mm256_permute2f128_ps(r2, r3, 0x20));
  _mm256_storeu_ps(out + 16, _mm256_permute2f128_ps(r0, r1, 0x31));
  _mm256_storeu_ps(out + 24, _mm256_permute2f128_ps(r2, r3, 0x31));
#else
  for (int w = 0; w < 4; ++w) out[w] = block[w].v;
#endif
}

// Dimensions [begin, end) of one step of one rollout into out[0 ..]; begin is a multiple of 4.
static void noise_range(const NoiseKey& key, int64_t begin, int64_t end, float* out) {
  F block[4];
  constexpr int kStep = 4 * kWidth;
  int64_t d = begin;
  for (; d + kStep <= end; d += kStep) {
    noise_blocks(key, static_cast<uint32_t>(d / 4), block);
    store_interleaved(block, out + (d - begin));
  }
  if (d < end) {
    float tail[kStep];
    noise_blocks(key, static_cast<uint32_t>(d / 4), block);
    store_interleaved(block, tail);
    std::memcpy(out + (d - begin), tail, static_cast<size_t>(end - d) * sizeof(float));
  }
}

}  // namespace TTA_ISA
}  // namespace tta
