// CUDA C++ for g++ -DTTA_SIMT: what a kernel of csrc/cuda may use, executed by runtime.cpp with one
// fiber a thread and one block after another. Written from the CUDA programming guide's description
// of each function; a function that is missing here is a compile error, never a silent stand-in.
//
// Three builds share these lines: plain (fast: thread orders, barriers, warp operations and results
// are checked), -fsanitize=address,undefined, and the hook build: kernels compiled with
// -fsanitize=thread -DTTA_SIMT_HOOKS, whose every access to memory calls into shadow.cpp.
//
// Shared memory comes from TTA_SHARED, TTA_SHARED_ARRAY and TTA_DYNAMIC_SHARED alone, launches from
// TTA_LAUNCH: __shared__ and <<<>>> cannot be expressed in C++.
#pragma once

#include <cassert>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "types.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#ifndef __restrict__
#define __restrict__ __restrict
#endif

// Functions of the layer must not be seen by the hooks. GCC inlines such a function into an
// instrumented kernel only if its attributes agree, so in the hook build it stays a call.
#if defined(TTA_SIMT_HOOKS)
#define TTA_SIMT_LAYER __attribute__((no_sanitize_thread, noinline)) inline
#else
#define TTA_SIMT_LAYER inline
#endif
// Accesses made for the kernel belong to the kernel: they are inlined and seen.
#define TTA_SIMT_KERNEL inline __attribute__((always_inline))

namespace simt {

struct Thread {
  uint3 index;
  unsigned linear, lane, warp;
};

// Of the thread that runs now; `current` is null on the host.
extern Thread* current;
extern uint3 block_index;
extern dim3 grid_size, block_size;

TTA_SIMT_LAYER uint3 thread_index() { return current->index; }
TTA_SIMT_LAYER uint3 this_block() { return block_index; }
TTA_SIMT_LAYER dim3 this_grid() { return grid_size; }
TTA_SIMT_LAYER dim3 this_block_size() { return block_size; }

// Where the source text calls a synchronising function.
struct Site {
  const char* function;
  const char* file;
  int line;
};

[[noreturn]] void fail_at(const char* what, const char* file, int line);
[[noreturn]] void misaligned(const void* address, size_t bytes, const char* function);

enum class Vote { kNone, kOr, kAnd, kCount };
int block_barrier(Vote vote, int predicate, Site site);

// One operation of the lanes of `mask`. kSync orders memory among them; kShuffle returns the value
// of lane `source`; kBallot the lanes whose value is not 0; the others a reduction over the mask.
enum class WarpOp { kSync, kShuffle, kBallot, kAdd, kMinS, kMaxS, kMinU, kMaxU, kAnd, kOr, kXor };
uint64_t warp_operation(WarpOp op, unsigned mask, uint64_t value, unsigned source, Site site);

// Before an atomic's load and store; `pc` is the caller's return address.
void atomic_access(void* address, size_t bytes, void* pc);
// Before a load through the non-coherent cache.
void constant_access(const void* address, size_t bytes);
void fence(bool whole_device, Site site);

void* shared_object(const void* site, size_t bytes, size_t alignment, const char* name);
void* dynamic_shared(size_t alignment);

using Invoke = void (*)(const void* closure);
void launch_block_grid(const char* name, const void* kernel, dim3 grid, dim3 block, size_t bytes,
                       Invoke invoke, const void* closure, size_t closure_bytes);
cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value);

template <class T>
TTA_SIMT_KERNEL uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_arithmetic<T>::value, "a number of at most 64 bits");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
TTA_SIMT_KERNEL T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// `source` is a lane of the caller's segment or, beyond its end, the caller itself.
template <class T>
TTA_SIMT_LAYER T shuffle(unsigned mask, T value, int source, bool inside, Site site) {
  const unsigned lane = inside ? static_cast<unsigned>(source) : current->lane;
  return from_bits<T>(warp_operation(WarpOp::kShuffle, mask, to_bits(value), lane, site));
}

TTA_SIMT_LAYER int lane_id() { return static_cast<int>(current->lane); }

// The read-modify-write itself happens between two switches, so it is atomic.
template <class T, class Update>
__attribute__((no_sanitize_thread, noinline)) T atomic(T* address, Update update) {
  atomic_access(address, sizeof(T), __builtin_return_address(0));
  const T old = *address;
  *address = update(old);
  return old;
}

template <class T>
TTA_SIMT_KERNEL void check_alignment(const T* address, const char* function) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) misaligned(address, sizeof(T), function);
}

// Parameters are passed by value, as a launch does: every thread gets its own copy.
template <class... P, class... A>
void launch(const char* name, dim3 grid, dim3 block, size_t bytes, cudaStream_t,
            void (*kernel)(P...), A&&... arguments) {
  static_assert(sizeof...(P) == sizeof...(A), "the kernel takes another number of arguments");
  static_assert(!(std::is_reference<P>::value || ...), "kernel parameters are values");
  struct Closure {
    void (*kernel)(P...);
    std::tuple<std::remove_cv_t<P>...> arguments;
  };
  const Closure closure{kernel, std::tuple<std::remove_cv_t<P>...>(std::forward<A>(arguments)...)};
  static_assert(sizeof closure <= 4096, "kernel parameters take at most 4 KiB");
  launch_block_grid(
      name, reinterpret_cast<const void*>(kernel), grid, block, bytes,
      [](const void* data) {
        const Closure& c = *static_cast<const Closure*>(data);
        std::apply(c.kernel, c.arguments);
      },
      &closure, sizeof closure);
}

}  // namespace simt

#define TTA_SHARED(type, name)      \
  static char tta_simt_at_##name;   \
  type& name = *static_cast<type*>( \
      ::simt::shared_object(&tta_simt_at_##name, sizeof(type), alignof(type), #name))
#define TTA_SHARED_ARRAY(type, name, count)                                \
  static char tta_simt_at_##name;                                          \
  type(&name)[count] = *static_cast<type(*)[count]>(::simt::shared_object( \
      &tta_simt_at_##name, sizeof(type) * static_cast<size_t>(count), alignof(type), #name))
#define TTA_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(::simt::dynamic_shared(alignof(type)))
#define TTA_LAUNCH(kernel, grid, block, bytes, stream, ...) \
  ::simt::launch(#kernel, (grid), (block), (bytes), (stream), kernel, ##__VA_ARGS__)

#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::this_block())
#define blockDim (::simt::this_block_size())
#define gridDim (::simt::this_grid())
constexpr int warpSize = 32;

#undef assert
#define assert(condition) \
  ((condition) ? (void)0 : ::simt::fail_at("assert(" #condition ")", __FILE__, __LINE__))
#define __trap() ::simt::fail_at("__trap()", __FILE__, __LINE__)

template <class... P>
inline cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute,
                                        int value) {
  return ::simt::set_attribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

// Synchronisation. The last two parameters are the place of the call.
#define TTA_SIMT_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define TTA_SIMT_SITE \
  ::simt::Site { __func__, file, line }

TTA_SIMT_LAYER void __syncthreads(TTA_SIMT_PLACE) {
  ::simt::block_barrier(::simt::Vote::kNone, 0, TTA_SIMT_SITE);
}
TTA_SIMT_LAYER int __syncthreads_or(int predicate, TTA_SIMT_PLACE) {
  return ::simt::block_barrier(::simt::Vote::kOr, predicate, TTA_SIMT_SITE);
}
TTA_SIMT_LAYER int __syncthreads_and(int predicate, TTA_SIMT_PLACE) {
  return ::simt::block_barrier(::simt::Vote::kAnd, predicate, TTA_SIMT_SITE);
}
TTA_SIMT_LAYER int __syncthreads_count(int predicate, TTA_SIMT_PLACE) {
  return ::simt::block_barrier(::simt::Vote::kCount, predicate, TTA_SIMT_SITE);
}
TTA_SIMT_LAYER void __syncwarp(unsigned mask = 0xffffffffu, TTA_SIMT_PLACE) {
  ::simt::warp_operation(::simt::WarpOp::kSync, mask, 0, 0, TTA_SIMT_SITE);
}
TTA_SIMT_LAYER void __threadfence(TTA_SIMT_PLACE) { ::simt::fence(true, TTA_SIMT_SITE); }
TTA_SIMT_LAYER void __threadfence_block(TTA_SIMT_PLACE) { ::simt::fence(false, TTA_SIMT_SITE); }

// Shuffles within segments of `width` lanes, a power of two.
template <class T>
TTA_SIMT_LAYER T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize,
                             TTA_SIMT_PLACE) {
  const int segment = ::simt::lane_id() & ~(width - 1);
  return ::simt::shuffle(mask, value, segment | (lane & (width - 1)), true, TTA_SIMT_SITE);
}
template <class T>
TTA_SIMT_LAYER T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                                TTA_SIMT_PLACE) {
  const int source = ::simt::lane_id() - static_cast<int>(delta);
  const bool inside = source >= (::simt::lane_id() & ~(width - 1));
  return ::simt::shuffle(mask, value, source, inside, TTA_SIMT_SITE);
}
template <class T>
TTA_SIMT_LAYER T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                                  TTA_SIMT_PLACE) {
  const int source = ::simt::lane_id() + static_cast<int>(delta);
  const bool inside = source < (::simt::lane_id() & ~(width - 1)) + width;
  return ::simt::shuffle(mask, value, source, inside, TTA_SIMT_SITE);
}
template <class T>
TTA_SIMT_LAYER T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize,
                                 TTA_SIMT_PLACE) {
  const int source = ::simt::lane_id() ^ lanes;
  const bool inside = source < (::simt::lane_id() & ~(width - 1)) + width;
  return ::simt::shuffle(mask, value, source, inside, TTA_SIMT_SITE);
}

TTA_SIMT_LAYER unsigned __ballot_sync(unsigned mask, int predicate, TTA_SIMT_PLACE) {
  return static_cast<unsigned>(
      ::simt::warp_operation(::simt::WarpOp::kBallot, mask, predicate != 0, 0, TTA_SIMT_SITE));
}
TTA_SIMT_LAYER int __any_sync(unsigned mask, int predicate, TTA_SIMT_PLACE) {
  return ::simt::warp_operation(::simt::WarpOp::kBallot, mask, predicate != 0, 0, TTA_SIMT_SITE) !=
         0;
}
TTA_SIMT_LAYER int __all_sync(unsigned mask, int predicate, TTA_SIMT_PLACE) {
  return ::simt::warp_operation(::simt::WarpOp::kBallot, mask, predicate != 0, 0, TTA_SIMT_SITE) ==
         mask;
}
// The programming model promises no more than the caller itself.
TTA_SIMT_LAYER unsigned __activemask() { return 1u << ::simt::lane_id(); }

#define TTA_SIMT_REDUCE(name, T, op)                                                               \
  TTA_SIMT_LAYER T name(unsigned mask, T value, TTA_SIMT_PLACE) {                                  \
    return static_cast<T>(::simt::warp_operation(::simt::WarpOp::op, mask,                         \
                                                 static_cast<uint64_t>(value), 0, TTA_SIMT_SITE)); \
  }
TTA_SIMT_REDUCE(__reduce_add_sync, unsigned, kAdd)
TTA_SIMT_REDUCE(__reduce_add_sync, int, kAdd)
TTA_SIMT_REDUCE(__reduce_min_sync, unsigned, kMinU)
TTA_SIMT_REDUCE(__reduce_min_sync, int, kMinS)
TTA_SIMT_REDUCE(__reduce_max_sync, unsigned, kMaxU)
TTA_SIMT_REDUCE(__reduce_max_sync, int, kMaxS)
TTA_SIMT_REDUCE(__reduce_and_sync, unsigned, kAnd)
TTA_SIMT_REDUCE(__reduce_or_sync, unsigned, kOr)
TTA_SIMT_REDUCE(__reduce_xor_sync, unsigned, kXor)
#undef TTA_SIMT_REDUCE

// Atomics, for CUDA's integer types. None for floats: their order of addition is not determined.
#define TTA_SIMT_ATOMIC(name, T, expression)                                      \
  TTA_SIMT_KERNEL T name(T* address, T value) {                                   \
    return ::simt::atomic(address, [value](T old) -> T { return (expression); }); \
  }
TTA_SIMT_ATOMIC(atomicAdd, int, static_cast<int>(static_cast<unsigned>(old) + value))
TTA_SIMT_ATOMIC(atomicAdd, unsigned, old + value)
TTA_SIMT_ATOMIC(atomicAdd, unsigned long long, old + value)
TTA_SIMT_ATOMIC(atomicSub, unsigned, old - value)
TTA_SIMT_ATOMIC(atomicMin, int, value < old ? value : old)
TTA_SIMT_ATOMIC(atomicMin, unsigned, value < old ? value : old)
TTA_SIMT_ATOMIC(atomicMin, long long, value < old ? value : old)
TTA_SIMT_ATOMIC(atomicMin, unsigned long long, value < old ? value : old)
TTA_SIMT_ATOMIC(atomicMax, int, old < value ? value : old)
TTA_SIMT_ATOMIC(atomicMax, unsigned, old < value ? value : old)
TTA_SIMT_ATOMIC(atomicMax, long long, old < value ? value : old)
TTA_SIMT_ATOMIC(atomicMax, unsigned long long, old < value ? value : old)
TTA_SIMT_ATOMIC(atomicExch, int, (static_cast<void>(old), value))
TTA_SIMT_ATOMIC(atomicExch, unsigned, (static_cast<void>(old), value))
TTA_SIMT_ATOMIC(atomicExch, unsigned long long, (static_cast<void>(old), value))
TTA_SIMT_ATOMIC(atomicAnd, int, old& value)
TTA_SIMT_ATOMIC(atomicAnd, unsigned, old& value)
TTA_SIMT_ATOMIC(atomicAnd, unsigned long long, old& value)
TTA_SIMT_ATOMIC(atomicOr, int, old | value)
TTA_SIMT_ATOMIC(atomicOr, unsigned, old | value)
TTA_SIMT_ATOMIC(atomicOr, unsigned long long, old | value)
TTA_SIMT_ATOMIC(atomicXor, unsigned, old ^ value)
TTA_SIMT_ATOMIC(atomicInc, unsigned, old >= value ? 0 : old + 1)
TTA_SIMT_ATOMIC(atomicDec, unsigned, old == 0 || old > value ? value : old - 1)
#undef TTA_SIMT_ATOMIC
#define TTA_SIMT_COMPARE(T)                                                                       \
  TTA_SIMT_KERNEL T atomicCAS(T* address, T compare, T value) {                                   \
    return ::simt::atomic(address,                                                                \
                          [compare, value](T old) -> T { return old == compare ? value : old; }); \
  }
TTA_SIMT_COMPARE(int)
TTA_SIMT_COMPARE(unsigned)
TTA_SIMT_COMPARE(unsigned long long)
#undef TTA_SIMT_COMPARE

// Loads and stores with a cache hint. __ldg reads through the non-coherent cache, which a kernel
// may use only for memory it does not write.
template <class T>
TTA_SIMT_KERNEL T __ldg(const T* address) {
  ::simt::check_alignment(address, "__ldg");
#if defined(TTA_SIMT_HOOKS)
  ::simt::constant_access(address, sizeof(T));
#endif
  return *address;
}
template <class T>
TTA_SIMT_KERNEL T __ldcg(const T* address) {
  ::simt::check_alignment(address, "__ldcg");
  return *address;
}
template <class T>
TTA_SIMT_KERNEL T __ldcs(const T* address) {
  ::simt::check_alignment(address, "__ldcs");
  return *address;
}
template <class T>
TTA_SIMT_KERNEL void __stcg(T* address, T value) {
  ::simt::check_alignment(address, "__stcg");
  *address = value;
}
template <class T>
TTA_SIMT_KERNEL void __stcs(T* address, T value) {
  ::simt::check_alignment(address, "__stcs");
  *address = value;
}

// Bits.
TTA_SIMT_KERNEL int __popc(unsigned x) { return __builtin_popcount(x); }
TTA_SIMT_KERNEL int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
TTA_SIMT_KERNEL int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
TTA_SIMT_KERNEL int __clzll(long long x) {
  return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64;
}
TTA_SIMT_KERNEL int __ffs(int x) { return __builtin_ffs(x); }
TTA_SIMT_KERNEL int __ffsll(long long x) { return __builtin_ffsll(x); }
TTA_SIMT_KERNEL unsigned __brev(unsigned x) {
  x = (x >> 1 & 0x55555555u) | (x & 0x55555555u) << 1;
  x = (x >> 2 & 0x33333333u) | (x & 0x33333333u) << 2;
  x = (x >> 4 & 0x0f0f0f0fu) | (x & 0x0f0f0f0fu) << 4;
  return __builtin_bswap32(x);
}
TTA_SIMT_KERNEL unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
TTA_SIMT_KERNEL unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((static_cast<uint64_t>(high) << 32 | low) << (shift & 31)) >> 32);
}
TTA_SIMT_KERNEL unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
TTA_SIMT_KERNEL float __int_as_float(int x) {
  return ::simt::from_bits<float>(static_cast<unsigned>(x));
}
TTA_SIMT_KERNEL float __uint_as_float(unsigned x) { return ::simt::from_bits<float>(x); }
TTA_SIMT_KERNEL int __float_as_int(float x) { return static_cast<int>(::simt::to_bits(x)); }
TTA_SIMT_KERNEL unsigned __float_as_uint(float x) {
  return static_cast<unsigned>(::simt::to_bits(x));
}
TTA_SIMT_KERNEL long long __double_as_longlong(double x) {
  return static_cast<long long>(::simt::to_bits(x));
}
TTA_SIMT_KERNEL double __longlong_as_double(long long x) {
  return ::simt::from_bits<double>(static_cast<uint64_t>(x));
}

// Arithmetic rounded to nearest, which is what the host's is (-ffp-contract=off).
TTA_SIMT_KERNEL float __fadd_rn(float a, float b) { return a + b; }
TTA_SIMT_KERNEL float __fsub_rn(float a, float b) { return a - b; }
TTA_SIMT_KERNEL float __fmul_rn(float a, float b) { return a * b; }
TTA_SIMT_KERNEL float __fdiv_rn(float a, float b) { return a / b; }
TTA_SIMT_KERNEL float __frcp_rn(float a) { return 1.0f / a; }
TTA_SIMT_KERNEL float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
TTA_SIMT_KERNEL float __fsqrt_rn(float a) { return std::sqrt(a); }
TTA_SIMT_KERNEL double __dadd_rn(double a, double b) { return a + b; }
TTA_SIMT_KERNEL double __dsub_rn(double a, double b) { return a - b; }
TTA_SIMT_KERNEL double __dmul_rn(double a, double b) { return a * b; }
TTA_SIMT_KERNEL double __ddiv_rn(double a, double b) { return a / b; }
TTA_SIMT_KERNEL double __drcp_rn(double a) { return 1.0 / a; }
TTA_SIMT_KERNEL double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
TTA_SIMT_KERNEL double __dsqrt_rn(double a) { return std::sqrt(a); }
TTA_SIMT_KERNEL float __double2float_rn(double x) { return static_cast<float>(x); }
TTA_SIMT_KERNEL float __int2float_rn(int x) { return static_cast<float>(x); }
TTA_SIMT_KERNEL float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
TTA_SIMT_KERNEL float __ll2float_rn(long long x) { return static_cast<float>(x); }
TTA_SIMT_KERNEL double __int2double_rn(int x) { return x; }
TTA_SIMT_KERNEL double __uint2double_rn(unsigned x) { return x; }
TTA_SIMT_KERNEL double __ll2double_rn(long long x) { return static_cast<double>(x); }

// CUDA's min and max, in the global namespace.
#define TTA_SIMT_MINMAX(T)                                  \
  TTA_SIMT_KERNEL T min(T a, T b) { return b < a ? b : a; } \
  TTA_SIMT_KERNEL T max(T a, T b) { return a < b ? b : a; }
TTA_SIMT_MINMAX(int)
TTA_SIMT_MINMAX(unsigned)
TTA_SIMT_MINMAX(long)
TTA_SIMT_MINMAX(unsigned long)
TTA_SIMT_MINMAX(long long)
TTA_SIMT_MINMAX(unsigned long long)
#undef TTA_SIMT_MINMAX
TTA_SIMT_KERNEL float min(float a, float b) { return std::fmin(a, b); }
TTA_SIMT_KERNEL float max(float a, float b) { return std::fmax(a, b); }
TTA_SIMT_KERNEL double min(double a, double b) { return std::fmin(a, b); }
TTA_SIMT_KERNEL double max(double a, double b) { return std::fmax(a, b); }
