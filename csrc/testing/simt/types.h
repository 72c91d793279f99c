// The CUDA types and host calls that the kernels use, for the SIMT layer: vector types with CUDA's
// alignment, and a runtime whose one stream is synchronous.
#pragma once

#include <cstddef>
#include <cstdint>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define TTA_SIMT_VECTOR2(T, name, alignment) \
  struct alignas(alignment) name {           \
    T x, y;                                  \
  };                                         \
  inline name make_##name(T x, T y) { return {x, y}; }
#define TTA_SIMT_VECTOR4(T, name, alignment) \
  struct alignas(alignment) name {           \
    T x, y, z, w;                            \
  };                                         \
  inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }

TTA_SIMT_VECTOR2(float, float2, 8)
TTA_SIMT_VECTOR4(float, float4, 16)
TTA_SIMT_VECTOR2(double, double2, 16)
TTA_SIMT_VECTOR2(int, int2, 8)
TTA_SIMT_VECTOR4(int, int4, 16)
TTA_SIMT_VECTOR2(unsigned, uint2, 8)
TTA_SIMT_VECTOR4(unsigned, uint4, 16)
TTA_SIMT_VECTOR2(unsigned short, ushort2, 4)
TTA_SIMT_VECTOR4(unsigned short, ushort4, 8)
TTA_SIMT_VECTOR4(unsigned char, uchar4, 4)
TTA_SIMT_VECTOR2(long long, longlong2, 16)
TTA_SIMT_VECTOR2(unsigned long long, ulonglong2, 16)

#undef TTA_SIMT_VECTOR2
#undef TTA_SIMT_VECTOR4

struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaMemcpyKind {
  cudaMemcpyHostToHost = 0,
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost = 2,
  cudaMemcpyDeviceToDevice = 3,
  cudaMemcpyDefault = 4,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};

// An error stays until simt::clear_error().
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorString(cudaError_t error);
// Both check the range against the registered buffers where there are any.
cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t stream = nullptr);
cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr);
