// One vocabulary of vector operations for scalar, AVX2 and AVX-512 code.
//
// Included once per instruction set, inside the region that cpu/foreach_isa.h opens (hence no
// include guard): it defines, in namespace tta::TTA_ISA,
//   F  kWidth float32,  I  kWidth int32,  M  a mask of kWidth lanes,  D  kWidth float64.
// Every operation is one IEEE operation per lane, rounded to nearest even; fma is fused and nothing
// else is. A kernel written with them therefore gives the same bits on every instruction set.
// NaN rules are those of x86: max(a, b) = a > b ? a : b, so a NaN in `a` is dropped.

namespace tta {
namespace TTA_ISA {

#if TTA_ISA_LEVEL == 2

constexpr int kWidth = 16;
struct F {
  __m512 v;
};
struct I {
  __m512i v;
};
struct M {
  __mmask16 v;
};
struct D {
  __m512d lo, hi;
};

TTA_INLINE F load(const float* p) { return {_mm512_loadu_ps(p)}; }
TTA_INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
TTA_INLINE F load_half(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
TTA_INLINE F load_bfloat16(const uint16_t* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
}
// Rounded to nearest even; a NaN is quietened.
TTA_INLINE void store_half(uint16_t* p, F a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
TTA_INLINE void store_bfloat16(uint16_t* p, F a) {
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x00400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i kept = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(kept));
}
TTA_INLINE F set1(float a) { return {_mm512_set1_ps(a)}; }
TTA_INLINE I set1i(int32_t a) { return {_mm512_set1_epi32(a)}; }
TTA_INLINE I iota() {
  return {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
}
TTA_INLINE F add(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
TTA_INLINE F sub(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
TTA_INLINE F mul(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
TTA_INLINE F div(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
TTA_INLINE F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
TTA_INLINE F sqrt(F a) { return {_mm512_sqrt_ps(a.v)}; }
TTA_INLINE F negate(F a) {
  const __m512i sign = _mm512_set1_epi32(-0x7fffffff - 1);
  return {_mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a.v), sign))};
}
TTA_INLINE F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
TTA_INLINE F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
TTA_INLINE I bits(F a) { return {_mm512_castps_si512(a.v)}; }
TTA_INLINE F from_bits(I a) { return {_mm512_castsi512_ps(a.v)}; }
TTA_INLINE F to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
TTA_INLINE I add(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
TTA_INLINE I sub(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
TTA_INLINE I min(I a, I b) { return {_mm512_min_epi32(a.v, b.v)}; }  // signed
TTA_INLINE I bit_and(I a, I b) { return {_mm512_and_si512(a.v, b.v)}; }
TTA_INLINE I bit_or(I a, I b) { return {_mm512_or_si512(a.v, b.v)}; }
TTA_INLINE I bit_xor(I a, I b) { return {_mm512_xor_si512(a.v, b.v)}; }
template <int N>
TTA_INLINE I shift_left(I a) {
  return {_mm512_slli_epi32(a.v, N)};
}
template <int N>
TTA_INLINE I shift_right(I a) {  // logical
  return {_mm512_srli_epi32(a.v, N)};
}
TTA_INLINE M less(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
TTA_INLINE M less_equal(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
TTA_INLINE M equal(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
TTA_INLINE M equal(I a, I b) { return {_mm512_cmpeq_epi32_mask(a.v, b.v)}; }
TTA_INLINE M less(I a, I b) { return {_mm512_cmplt_epi32_mask(a.v, b.v)}; }
TTA_INLINE M has_bit(I a, I bit) {
  return {_mm512_test_epi32_mask(a.v, bit.v)};
}  // bit: a power of two
TTA_INLINE M mask_and(M a, M b) { return {static_cast<__mmask16>(a.v & b.v)}; }
TTA_INLINE M mask_or(M a, M b) { return {static_cast<__mmask16>(a.v | b.v)}; }
TTA_INLINE M mask_not(M a) { return {static_cast<__mmask16>(~a.v)}; }
TTA_INLINE F keep(M m, F a) { return {_mm512_maskz_mov_ps(m.v, a.v)}; }  // a where m, else +0
TTA_INLINE I keep(M m, I a) { return {_mm512_maskz_mov_epi32(m.v, a.v)}; }
// +0 where m, else a.
TTA_INLINE F drop(M m, F a) { return {_mm512_maskz_mov_ps(static_cast<__mmask16>(~m.v), a.v)}; }
TTA_INLINE F select(M m, F a, F b) { return {_mm512_mask_mov_ps(b.v, m.v, a.v)}; }
TTA_INLINE I select(M m, I a, I b) { return {_mm512_mask_mov_epi32(b.v, m.v, a.v)}; }
TTA_INLINE uint32_t lanes(M m) { return m.v; }  // bit i = lane i
TTA_INLINE float reduce_max(F a) { return _mm512_reduce_max_ps(a.v); }
TTA_INLINE D widen(F a) {
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(a.v)),
          _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1)))};
}
TTA_INLINE F narrow(D a) {
  return {_mm512_castpd_ps(
      _mm512_insertf64x4(_mm512_castpd256_pd512(_mm256_castps_pd(_mm512_cvtpd_ps(a.lo))),
                         _mm256_castps_pd(_mm512_cvtpd_ps(a.hi)), 1))};
}
// widen(load(p)) and store(p, narrow(a)), half by half.
TTA_INLINE D load_wide(const float* p) {
  return {_mm512_cvtps_pd(_mm256_loadu_ps(p)), _mm512_cvtps_pd(_mm256_loadu_ps(p + 8))};
}
// The same with 0 where `m` is set.
TTA_INLINE D load_wide_unless(M m, const float* p) {
  const auto in = static_cast<__mmask16>(~m.v);
  return {_mm512_maskz_cvtps_pd(static_cast<__mmask8>(in), _mm256_loadu_ps(p)),
          _mm512_maskz_cvtps_pd(static_cast<__mmask8>(in >> 8), _mm256_loadu_ps(p + 8))};
}
TTA_INLINE void store_narrow(float* p, D a) {
  _mm256_storeu_ps(p, _mm512_cvtpd_ps(a.lo));
  _mm256_storeu_ps(p + 8, _mm512_cvtpd_ps(a.hi));
}
TTA_INLINE D set1d(double a) { return {_mm512_set1_pd(a), _mm512_set1_pd(a)}; }
TTA_INLINE D add(D a, D b) { return {_mm512_add_pd(a.lo, b.lo), _mm512_add_pd(a.hi, b.hi)}; }
TTA_INLINE D sub(D a, D b) { return {_mm512_sub_pd(a.lo, b.lo), _mm512_sub_pd(a.hi, b.hi)}; }
TTA_INLINE D mul(D a, D b) { return {_mm512_mul_pd(a.lo, b.lo), _mm512_mul_pd(a.hi, b.hi)}; }
TTA_INLINE D div(D a, D b) { return {_mm512_div_pd(a.lo, b.lo), _mm512_div_pd(a.hi, b.hi)}; }
TTA_INLINE D fma(D a, D b, D c) {
  return {_mm512_fmadd_pd(a.lo, b.lo, c.lo), _mm512_fmadd_pd(a.hi, b.hi, c.hi)};
}
TTA_INLINE D max(D a, D b) { return {_mm512_max_pd(a.lo, b.lo), _mm512_max_pd(a.hi, b.hi)}; }
TTA_INLINE M less(D a, D b) {
  const uint32_t lo = _mm512_cmp_pd_mask(a.lo, b.lo, _CMP_LT_OQ);
  const uint32_t hi = _mm512_cmp_pd_mask(a.hi, b.hi, _CMP_LT_OQ);
  return {static_cast<__mmask16>(lo | (hi << 8))};
}
TTA_INLINE M equal(D a, D b) {
  const uint32_t lo = _mm512_cmp_pd_mask(a.lo, b.lo, _CMP_EQ_OQ);
  const uint32_t hi = _mm512_cmp_pd_mask(a.hi, b.hi, _CMP_EQ_OQ);
  return {static_cast<__mmask16>(lo | (hi << 8))};
}
TTA_INLINE D keep(M m, D a) {
  return {_mm512_maskz_mov_pd(static_cast<__mmask8>(m.v), a.lo),
          _mm512_maskz_mov_pd(static_cast<__mmask8>(m.v >> 8), a.hi)};
}
TTA_INLINE void store(double* p, D a) {
  _mm512_storeu_pd(p, a.lo);
  _mm512_storeu_pd(p + 8, a.hi);
}
// Writes the lanes of `a` named by `m` to consecutive addresses; may touch kWidth floats at p.
TTA_INLINE void compress_store(float* p, M m, F a) {
  _mm512_storeu_ps(p, _mm512_maskz_compress_ps(m.v, a.v));
}
TTA_INLINE void compress_store(int32_t* p, M m, I a) {
  _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(m.v, a.v));
}
// The same of kFew lanes at most, by a store that seldom crosses a line of the cache.
constexpr int kFew = 4;
TTA_INLINE void compress_store_few(float* p, M m, F a) {
  _mm_storeu_ps(p, _mm512_castps512_ps128(_mm512_maskz_compress_ps(m.v, a.v)));
}
TTA_INLINE void compress_store_few(int32_t* p, M m, I a) {
  const __m512i packed = _mm512_maskz_compress_epi32(m.v, a.v);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_castsi512_si128(packed));
}
// (a * b) as 64 bits: high and low words.
TTA_INLINE void multiply_wide(I a, I b, I* high, I* low) {
  const __m512i even = _mm512_mul_epu32(a.v, b.v);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), b.v);
  high->v = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xAAAA, odd);
  low->v = _mm512_mask_mov_epi32(even, 0xAAAA, _mm512_slli_epi64(odd, 32));
}
TTA_INLINE I load_i(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
TTA_INLINE void store(int32_t* p, I a) { _mm512_storeu_si512(p, a.v); }

// A byte, 0 or 1, of each of kBools lanes: of kBools / kWidth masks.
constexpr int kBools = 16;
TTA_INLINE void store_bools(bool* p, const M* m) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_maskz_set1_epi8(m->v, 1));
}

#elif TTA_ISA_LEVEL == 1

constexpr int kWidth = 8;
struct F {
  __m256 v;
};
struct I {
  __m256i v;
};
struct M {
  __m256 v;
};
struct D {
  __m256d lo, hi;
};

TTA_INLINE F load(const float* p) { return {_mm256_loadu_ps(p)}; }
TTA_INLINE void store(float* p, F a) { _mm256_storeu_ps(p, a.v); }
TTA_INLINE F load_half(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
TTA_INLINE F load_bfloat16(const uint16_t* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16))};
}
TTA_INLINE void store_half(uint16_t* p, F a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
TTA_INLINE void store_bfloat16(uint16_t* p, F a) {
  const __m256i u = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x00400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i kept = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(kept, kept), 0xD8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
TTA_INLINE F set1(float a) { return {_mm256_set1_ps(a)}; }
TTA_INLINE I set1i(int32_t a) { return {_mm256_set1_epi32(a)}; }
TTA_INLINE I iota() { return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)}; }
TTA_INLINE F add(F a, F b) { return {_mm256_add_ps(a.v, b.v)}; }
TTA_INLINE F sub(F a, F b) { return {_mm256_sub_ps(a.v, b.v)}; }
TTA_INLINE F mul(F a, F b) { return {_mm256_mul_ps(a.v, b.v)}; }
TTA_INLINE F div(F a, F b) { return {_mm256_div_ps(a.v, b.v)}; }
TTA_INLINE F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
TTA_INLINE F sqrt(F a) { return {_mm256_sqrt_ps(a.v)}; }
TTA_INLINE F negate(F a) { return {_mm256_xor_ps(a.v, _mm256_set1_ps(-0.0f))}; }
TTA_INLINE F max(F a, F b) { return {_mm256_max_ps(a.v, b.v)}; }
TTA_INLINE F min(F a, F b) { return {_mm256_min_ps(a.v, b.v)}; }
TTA_INLINE I bits(F a) { return {_mm256_castps_si256(a.v)}; }
TTA_INLINE F from_bits(I a) { return {_mm256_castsi256_ps(a.v)}; }
TTA_INLINE F to_float(I a) { return {_mm256_cvtepi32_ps(a.v)}; }
TTA_INLINE I add(I a, I b) { return {_mm256_add_epi32(a.v, b.v)}; }
TTA_INLINE I sub(I a, I b) { return {_mm256_sub_epi32(a.v, b.v)}; }
TTA_INLINE I min(I a, I b) { return {_mm256_min_epi32(a.v, b.v)}; }
TTA_INLINE I bit_and(I a, I b) { return {_mm256_and_si256(a.v, b.v)}; }
TTA_INLINE I bit_or(I a, I b) { return {_mm256_or_si256(a.v, b.v)}; }
TTA_INLINE I bit_xor(I a, I b) { return {_mm256_xor_si256(a.v, b.v)}; }
template <int N>
TTA_INLINE I shift_left(I a) {
  return {_mm256_slli_epi32(a.v, N)};
}
template <int N>
TTA_INLINE I shift_right(I a) {
  return {_mm256_srli_epi32(a.v, N)};
}
TTA_INLINE M less(F a, F b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
TTA_INLINE M less_equal(F a, F b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
TTA_INLINE M equal(F a, F b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
TTA_INLINE M equal(I a, I b) { return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(a.v, b.v))}; }
TTA_INLINE M less(I a, I b) { return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(b.v, a.v))}; }
TTA_INLINE M has_bit(I a, I bit) {
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(a.v, bit.v), bit.v))};
}
TTA_INLINE M mask_and(M a, M b) { return {_mm256_and_ps(a.v, b.v)}; }
TTA_INLINE M mask_or(M a, M b) { return {_mm256_or_ps(a.v, b.v)}; }
TTA_INLINE M mask_not(M a) {
  return {_mm256_xor_ps(a.v, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))};
}
TTA_INLINE F keep(M m, F a) { return {_mm256_and_ps(m.v, a.v)}; }
TTA_INLINE I keep(M m, I a) { return {_mm256_and_si256(_mm256_castps_si256(m.v), a.v)}; }
TTA_INLINE F drop(M m, F a) { return {_mm256_andnot_ps(m.v, a.v)}; }
TTA_INLINE F select(M m, F a, F b) { return {_mm256_blendv_ps(b.v, a.v, m.v)}; }
TTA_INLINE I select(M m, I a, I b) {
  return {_mm256_blendv_epi8(b.v, a.v, _mm256_castps_si256(m.v))};
}
TTA_INLINE uint32_t lanes(M m) { return static_cast<uint32_t>(_mm256_movemask_ps(m.v)); }
TTA_INLINE float reduce_max(F a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  x = _mm_max_ss(x, _mm_shuffle_ps(x, x, 1));
  return _mm_cvtss_f32(x);
}
TTA_INLINE D widen(F a) {
  return {_mm256_cvtps_pd(_mm256_castps256_ps128(a.v)),
          _mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1))};
}
TTA_INLINE F narrow(D a) {
  return {_mm256_insertf128_ps(_mm256_castps128_ps256(_mm256_cvtpd_ps(a.lo)), _mm256_cvtpd_ps(a.hi),
                               1)};
}
// widen(load(p)) and store(p, narrow(a)), half by half: halves of registers wait for one another.
TTA_INLINE D load_wide(const float* p) {
  return {_mm256_cvtps_pd(_mm_loadu_ps(p)), _mm256_cvtps_pd(_mm_loadu_ps(p + 4))};
}
TTA_INLINE D load_wide_unless(M m, const float* p) { return widen(drop(m, load(p))); }
TTA_INLINE void store_narrow(float* p, D a) {
  _mm_storeu_ps(p, _mm256_cvtpd_ps(a.lo));
  _mm_storeu_ps(p + 4, _mm256_cvtpd_ps(a.hi));
}
TTA_INLINE D set1d(double a) { return {_mm256_set1_pd(a), _mm256_set1_pd(a)}; }
TTA_INLINE D add(D a, D b) { return {_mm256_add_pd(a.lo, b.lo), _mm256_add_pd(a.hi, b.hi)}; }
TTA_INLINE D sub(D a, D b) { return {_mm256_sub_pd(a.lo, b.lo), _mm256_sub_pd(a.hi, b.hi)}; }
TTA_INLINE D mul(D a, D b) { return {_mm256_mul_pd(a.lo, b.lo), _mm256_mul_pd(a.hi, b.hi)}; }
TTA_INLINE D div(D a, D b) { return {_mm256_div_pd(a.lo, b.lo), _mm256_div_pd(a.hi, b.hi)}; }
TTA_INLINE D fma(D a, D b, D c) {
  return {_mm256_fmadd_pd(a.lo, b.lo, c.lo), _mm256_fmadd_pd(a.hi, b.hi, c.hi)};
}
TTA_INLINE D max(D a, D b) { return {_mm256_max_pd(a.lo, b.lo), _mm256_max_pd(a.hi, b.hi)}; }
// The float-shaped mask that two double-shaped masks stand for.
TTA_INLINE M pack_mask(__m256d lo, __m256d hi) {
  const __m256 both = _mm256_shuffle_ps(_mm256_castpd_ps(lo), _mm256_castpd_ps(hi), 0x88);
  return {_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(both), 0xD8))};
}
TTA_INLINE M less(D a, D b) {
  return pack_mask(_mm256_cmp_pd(a.lo, b.lo, _CMP_LT_OQ), _mm256_cmp_pd(a.hi, b.hi, _CMP_LT_OQ));
}
TTA_INLINE M equal(D a, D b) {
  return pack_mask(_mm256_cmp_pd(a.lo, b.lo, _CMP_EQ_OQ), _mm256_cmp_pd(a.hi, b.hi, _CMP_EQ_OQ));
}
TTA_INLINE D keep(M m, D a) {
  const __m256i wide_lo = _mm256_cvtepi32_epi64(_mm_castps_si128(_mm256_castps256_ps128(m.v)));
  const __m256i wide_hi = _mm256_cvtepi32_epi64(_mm_castps_si128(_mm256_extractf128_ps(m.v, 1)));
  return {_mm256_and_pd(_mm256_castsi256_pd(wide_lo), a.lo),
          _mm256_and_pd(_mm256_castsi256_pd(wide_hi), a.hi)};
}
TTA_INLINE void store(double* p, D a) {
  _mm256_storeu_pd(p, a.lo);
  _mm256_storeu_pd(p + 4, a.hi);
}
// For each mask, the numbers of its lanes, a byte each, lowest first.
struct LaneOrder {
  uint64_t of[256];
};
constexpr LaneOrder lane_order() {
  LaneOrder order{};
  for (uint32_t mask = 0; mask < 256; ++mask) {
    int at = 0;
    for (uint64_t lane = 0; lane < 8; ++lane)
      if ((mask >> lane) & 1u) order.of[mask] |= lane << (8 * at++);
  }
  return order;
}
static constexpr LaneOrder kLaneOrder = lane_order();
TTA_INLINE __m256i compressed(M m, __m256i a) {
  const auto* order = reinterpret_cast<const __m128i*>(kLaneOrder.of + lanes(m));
  return _mm256_permutevar8x32_epi32(a, _mm256_cvtepu8_epi32(_mm_loadl_epi64(order)));
}
TTA_INLINE void compress_store(float* p, M m, F a) {
  _mm256_storeu_ps(p, _mm256_castsi256_ps(compressed(m, _mm256_castps_si256(a.v))));
}
TTA_INLINE void compress_store(int32_t* p, M m, I a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), compressed(m, a.v));
}
constexpr int kFew = 4;
TTA_INLINE void compress_store_few(float* p, M m, F a) {
  const __m256i packed = compressed(m, _mm256_castps_si256(a.v));
  _mm_storeu_ps(p, _mm_castsi128_ps(_mm256_castsi256_si128(packed)));
}
TTA_INLINE void compress_store_few(int32_t* p, M m, I a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(compressed(m, a.v)));
}
TTA_INLINE void multiply_wide(I a, I b, I* high, I* low) {
  const __m256i even = _mm256_mul_epu32(a.v, b.v);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a.v, 32), b.v);
  high->v = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  low->v = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}
TTA_INLINE I load_i(const int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
TTA_INLINE void store(int32_t* p, I a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }

// A byte, 0 or 1, of each of kBools lanes: of kBools / kWidth masks.
constexpr int kBools = 32;
TTA_INLINE void store_bools(bool* p, const M* m) {
  __m256i v[4];
  for (int k = 0; k < 4; ++k) v[k] = _mm256_castps_si256(m[k].v);
  // Packing goes by 128-bit halves.
  const __m256i packed =
      _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(
      reinterpret_cast<__m256i*>(p),
      _mm256_and_si256(_mm256_permutevar8x32_epi32(packed, order), _mm256_set1_epi8(1)));
}

#else  // scalar: any C++17 compiler and architecture, and one thread of a CUDA kernel

constexpr int kWidth = 1;
struct F {
  float v;
};
struct I {
  uint32_t v;
};
struct M {
  bool v;
};
struct D {
  double v;
};

TTA_INLINE float scalar_from_bits(uint32_t u) {
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}
TTA_INLINE uint32_t scalar_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  return u;
}
// The square root of x, correctly rounded, by an approximation of its inverse that is at most eight
// units in its last place off; x from 2^-100 to 2^100. csrc/testing/math_test.cpp takes them all.
TTA_INLINE float sqrt_by(float x, float inverse) {
  float root = mul_rn(x, inverse), half = mul_rn(0.5f, inverse);
  const float error = fma_rn(-root, half, 0.5f);
  root = fma_rn(root, error, root);
  half = fma_rn(half, error, half);
  return fma_rn(fma_rn(-root, root, x), half, root);
}
TTA_INLINE F load(const float* p) { return {*p}; }
TTA_INLINE void store(float* p, F a) { *p = a.v; }
TTA_INLINE F load_half(const uint16_t* p) { return {half_to_float(*p)}; }
TTA_INLINE F load_bfloat16(const uint16_t* p) {
  return {scalar_from_bits(static_cast<uint32_t>(*p) << 16)};
}
TTA_INLINE void store_half(uint16_t* p, F a) { *p = float_to_half(a.v); }
TTA_INLINE void store_bfloat16(uint16_t* p, F a) { *p = float_to_bfloat16(a.v); }
TTA_INLINE F set1(float a) { return {a}; }
TTA_INLINE I set1i(int32_t a) { return {static_cast<uint32_t>(a)}; }
TTA_INLINE I iota() { return {0}; }
TTA_INLINE F add(F a, F b) { return {add_rn(a.v, b.v)}; }
TTA_INLINE F sub(F a, F b) { return {sub_rn(a.v, b.v)}; }
TTA_INLINE F mul(F a, F b) { return {mul_rn(a.v, b.v)}; }
TTA_INLINE F div(F a, F b) { return {div_rn(a.v, b.v)}; }
TTA_INLINE F fma(F a, F b, F c) { return {fma_rn(a.v, b.v, c.v)}; }
#if defined(__CUDA_ARCH__)
TTA_INLINE F sqrt(F a) {  // 2^-100 to 2^100; nvcc's own looks whether a is anything else
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(a.v));
  return {sqrt_by(a.v, inverse)};
}
#else
TTA_INLINE F sqrt(F a) { return {sqrt_rn(a.v)}; }
#endif
TTA_INLINE F negate(F a) { return {-a.v}; }
TTA_INLINE F max(F a, F b) { return {a.v > b.v ? a.v : b.v}; }
TTA_INLINE F min(F a, F b) { return {a.v < b.v ? a.v : b.v}; }
TTA_INLINE I bits(F a) { return {scalar_bits(a.v)}; }
TTA_INLINE F from_bits(I a) { return {scalar_from_bits(a.v)}; }
TTA_INLINE F to_float(I a) { return {static_cast<float>(static_cast<int32_t>(a.v))}; }
TTA_INLINE I add(I a, I b) { return {a.v + b.v}; }
TTA_INLINE I sub(I a, I b) { return {a.v - b.v}; }
TTA_INLINE I min(I a, I b) { return static_cast<int32_t>(a.v) < static_cast<int32_t>(b.v) ? a : b; }
TTA_INLINE I bit_and(I a, I b) { return {a.v & b.v}; }
TTA_INLINE I bit_or(I a, I b) { return {a.v | b.v}; }
TTA_INLINE I bit_xor(I a, I b) { return {a.v ^ b.v}; }
template <int N>
TTA_INLINE I shift_left(I a) {
  return {a.v << N};
}
template <int N>
TTA_INLINE I shift_right(I a) {
  return {a.v >> N};
}
TTA_INLINE M less(F a, F b) { return {a.v < b.v}; }
TTA_INLINE M less_equal(F a, F b) { return {a.v <= b.v}; }
TTA_INLINE M equal(F a, F b) { return {a.v == b.v}; }
TTA_INLINE M equal(I a, I b) { return {a.v == b.v}; }
TTA_INLINE M less(I a, I b) { return {static_cast<int32_t>(a.v) < static_cast<int32_t>(b.v)}; }
#if defined(__CUDA_ARCH__)
TTA_INLINE M has_bit(I a, I bit) {
  uint32_t both;  // of a & nvcc makes a shift, a mask and a comparison
  asm("and.b32 %0, %1, %2;" : "=r"(both) : "r"(a.v), "r"(bit.v));
  return {both != 0};
}
#else
TTA_INLINE M has_bit(I a, I bit) { return {(a.v & bit.v) != 0}; }
#endif
TTA_INLINE M mask_and(M a, M b) { return {a.v && b.v}; }
TTA_INLINE M mask_or(M a, M b) { return {a.v || b.v}; }
TTA_INLINE M mask_not(M a) { return {!a.v}; }
TTA_INLINE F keep(M m, F a) { return {m.v ? a.v : 0.0f}; }
TTA_INLINE I keep(M m, I a) { return {m.v ? a.v : 0u}; }
TTA_INLINE F drop(M m, F a) { return {m.v ? 0.0f : a.v}; }
TTA_INLINE F select(M m, F a, F b) { return {m.v ? a.v : b.v}; }
TTA_INLINE I select(M m, I a, I b) { return {m.v ? a.v : b.v}; }
TTA_INLINE uint32_t lanes(M m) { return m.v ? 1u : 0u; }
TTA_INLINE float reduce_max(F a) { return a.v; }
TTA_INLINE D widen(F a) { return {static_cast<double>(a.v)}; }
TTA_INLINE F narrow(D a) { return {static_cast<float>(a.v)}; }
TTA_INLINE D load_wide(const float* p) { return widen(load(p)); }
TTA_INLINE D load_wide_unless(M m, const float* p) { return widen(drop(m, load(p))); }
TTA_INLINE void store_narrow(float* p, D a) { store(p, narrow(a)); }
TTA_INLINE D set1d(double a) { return {a}; }
TTA_INLINE D add(D a, D b) { return {add_rn(a.v, b.v)}; }
TTA_INLINE D sub(D a, D b) { return {sub_rn(a.v, b.v)}; }
TTA_INLINE D mul(D a, D b) { return {mul_rn(a.v, b.v)}; }
TTA_INLINE D div(D a, D b) { return {div_rn(a.v, b.v)}; }
TTA_INLINE D fma(D a, D b, D c) { return {fma_rn(a.v, b.v, c.v)}; }
TTA_INLINE D max(D a, D b) { return {a.v > b.v ? a.v : b.v}; }
TTA_INLINE M less(D a, D b) { return {a.v < b.v}; }
TTA_INLINE M equal(D a, D b) { return {a.v == b.v}; }
TTA_INLINE D keep(M m, D a) { return {m.v ? a.v : 0.0}; }
TTA_INLINE void store(double* p, D a) { *p = a.v; }
TTA_INLINE void compress_store(float* p, M m, F a) {
  if (m.v) *p = a.v;
}
TTA_INLINE void compress_store(int32_t* p, M m, I a) {
  if (m.v) *p = static_cast<int32_t>(a.v);
}
constexpr int kFew = 1;
TTA_INLINE void compress_store_few(float* p, M m, F a) { compress_store(p, m, a); }
TTA_INLINE void compress_store_few(int32_t* p, M m, I a) { compress_store(p, m, a); }
TTA_INLINE void multiply_wide(I a, I b, I* high, I* low) {
  const uint64_t product = static_cast<uint64_t>(a.v) * b.v;
  high->v = static_cast<uint32_t>(product >> 32);
  low->v = static_cast<uint32_t>(product);
}
TTA_INLINE I load_i(const int32_t* p) { return {static_cast<uint32_t>(*p)}; }
TTA_INLINE void store(int32_t* p, I a) { *p = static_cast<int32_t>(a.v); }

constexpr int kBools = 1;
TTA_INLINE void store_bools(bool* p, const M* m) { *p = m->v; }

#endif

}  // namespace TTA_ISA
}  // namespace tta
