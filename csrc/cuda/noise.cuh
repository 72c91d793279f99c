// Gaussian noise of the kNoise stream in registers: one Philox block is the four normals of
// dimensions 4 c0 .. 4 c0 + 3, and they are one thread's work.
//
// Products of counter words that a caller's loop leaves alone are plain arithmetic on invariant
// values, which the compiler moves out of the loop: with c3 the only word that changes 16 of the 20
// wide multiplications remain, with c0 18.
#pragma once

#include "cuda/device.cuh"

namespace tta {
namespace cuda {

// One step of one sequence: what all its blocks of counters share.
struct NoiseStream {
  uint32_t step, sequence;  // c1, c2
  uint32_t k0[kPhiloxRounds], k1[kPhiloxRounds];
};

// A number that the compiler keeps in a register: it would rather add it up again in every loop.
TTA_INLINE uint32_t in_register(uint32_t x) {
#if defined(__CUDA_ARCH__)
  asm("" : "+r"(x));
#endif
  return x;
}

TTA_INLINE NoiseStream noise_stream(const Seed& seed, uint32_t step, uint32_t sequence) {
  const uint64_t bits = seed_bits(seed);
  NoiseStream stream;
  stream.step = step;
  stream.sequence = sequence;
#pragma unroll
  for (uint32_t round = 0; round < kPhiloxRounds; ++round) {
    stream.k0[round] = in_register(static_cast<uint32_t>(bits) + round * kPhiloxW0);
    stream.k1[round] = in_register(static_cast<uint32_t>(bits >> 32) + round * kPhiloxW1);
  }
  return stream;
}

struct Wide {
  uint32_t low, high;
};

// One instruction. Given a 64-bit product and its shift, as in philox4x32, nvcc goes on in 64 bits
// and pays for it; given two halves, it may take them for two products.
TTA_INLINE Wide multiply(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  Wide product;
  asm("{\n\t.reg .b64 both;\n\tmul.wide.u32 both, %2, %3;\n\tmov.b64 {%0, %1}, both;\n\t}"
      : "=r"(product.low), "=r"(product.high)
      : "r"(a), "r"(b));
  return product;
#else
  const uint64_t product = static_cast<uint64_t>(a) * b;
  return {static_cast<uint32_t>(product), static_cast<uint32_t>(product >> 32)};
#endif
}

// The normals of dimensions 4 block .. 4 block + 3; word3 = counter_word3(kNoise, ...).
TTA_INLINE float4 noise(const NoiseStream& stream, uint32_t block, uint32_t word3) {
  uint32_t x0 = block, x1 = stream.step, x2 = stream.sequence, x3 = word3;
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const Wide p0 = multiply(kPhiloxM0, x0), p1 = multiply(kPhiloxM1, x2);
    x0 = p1.high ^ x1 ^ stream.k0[round];
    x1 = p1.low;
    x2 = p0.high ^ x3 ^ stream.k1[round];
    x3 = p0.low;
  }
  const device::I a[2] = {{x0}, {x2}}, b[2] = {{x1}, {x3}};
  device::F cosine[2], sine[2];
  device::normal_pack<2>(a, b, cosine, sine);
  return make_float4(cosine[0].v, sine[0].v, cosine[1].v, sine[1].v);
}

// ---- four consecutive floats -------------------------------------------------------------------

TTA_INLINE float add(float a, float b) { return add_rn(a, b); }
TTA_INLINE float mul(float a, float b) { return mul_rn(a, b); }
TTA_INLINE float4 add(float4 a, float4 b) {
  return make_float4(add_rn(a.x, b.x), add_rn(a.y, b.y), add_rn(a.z, b.z), add_rn(a.w, b.w));
}
TTA_INLINE float4 mul(float a, float4 b) {
  return make_float4(mul_rn(a, b.x), mul_rn(a, b.y), mul_rn(a, b.z), mul_rn(a, b.w));
}
// x everywhere, as float or float4.
template <class T>
TTA_INLINE T same(float x);
template <>
TTA_INLINE float same<float>(float x) {
  return x;
}
template <>
TTA_INLINE float4 same<float4>(float x) {
  return make_float4(x, x, x, x);
}

TTA_INLINE bool aligned(const void* p, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

// The floats at p[0 .. 3], 0 from p[left] on. kWhole: there are always four, aligned.
template <bool kWhole>
__device__ __forceinline__ float4 load4(const float* p, int64_t left) {
  if constexpr (kWhole) {
    return *reinterpret_cast<const float4*>(p);
  } else {
    return make_float4(left > 0 ? p[0] : 0.0f, left > 1 ? p[1] : 0.0f, left > 2 ? p[2] : 0.0f,
                       left > 3 ? p[3] : 0.0f);
  }
}

// __stcg, because nvcc cuts a plain assignment to global memory into four.
template <bool kWhole>
__device__ __forceinline__ void store4(float* p, int64_t left, float4 x) {
  if constexpr (kWhole) {
    __stcg(reinterpret_cast<float4*>(p), x);
  } else {
    if (left > 0) p[0] = x.x;
    if (left > 1) p[1] = x.y;
    if (left > 2) p[2] = x.z;
    if (left > 3) p[3] = x.w;
  }
}

}  // namespace cuda
}  // namespace tta
