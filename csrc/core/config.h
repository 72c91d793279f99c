// Portability macros shared by every translation unit of tta_ext, host and device.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define TTA_HOST_DEVICE __host__ __device__
#else
#define TTA_HOST_DEVICE
#endif

#if defined(__CUDACC__)
#define TTA_INLINE TTA_HOST_DEVICE __forceinline__
#elif defined(__GNUC__) || defined(__clang__)
#define TTA_INLINE TTA_HOST_DEVICE inline __attribute__((always_inline))
#else
#define TTA_INLINE TTA_HOST_DEVICE inline
#endif

// -DTTA_X86_64=0 builds the scalar kernels alone.
#ifndef TTA_X86_64
#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define TTA_X86_64 1
#else
#define TTA_X86_64 0
#endif
#endif

#if defined(__GNUC__) || defined(__clang__)
#define TTA_NOINLINE __attribute__((noinline))
#define TTA_LIKELY(x) __builtin_expect(!!(x), 1)
#define TTA_UNLIKELY(x) __builtin_expect(!!(x), 0)
#else
#define TTA_NOINLINE
#define TTA_LIKELY(x) (x)
#define TTA_UNLIKELY(x) (x)
#endif
