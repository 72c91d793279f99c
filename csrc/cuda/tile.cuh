// One tile of a row and the block that works on it: 128 threads, 32 elements each. (A tile a warp,
// where blocks have several: statistics.cuh, read.cuh.)
//
// Thread map. Where the row is aligned to four elements, warp w owns the groups 8 w .. 8 w + 7 of
// 128 elements and lane l the elements 4 l .. 4 l + 3 of each: loads of 16 bytes (8 for 16-bit
// types), 512 (256) consecutive bytes a warp. Elsewhere thread i owns the elements i + 128 k, read
// one by one, still consecutive over a warp. Either way every byte is read once, and weights go
// through shared memory by element index, so the sum does not know which map was used.
// 32 elements a thread rather than 16: what a thread does once a tile (addresses, reductions,
// barriers) is then 3 instructions an element instead of 6, beside the 13 of the exponential.
//
// The canonical sum: the 32 weights of each of the 128 virtual lanes are added in order by one
// warp, four virtual lanes a thread (16-byte shared loads without bank conflicts), then folded by
// shuffles: l + 64 is 16 threads away, l + 4 one thread, l + 2 and l + 1 within the thread. Which
// warp differs from tile to tile, so that the four schedulers of a multiprocessor share the work.
#pragma once

#include <type_traits>

#include "cuda/block.cuh"
#include "cuda/intrinsics.cuh"

namespace tta {
namespace cuda {

constexpr int kPerThread = kTile / kThreads;
constexpr int kGroups = kTile / kLanes;
constexpr int kNodes = kLanes / 2;  // see fold
constexpr int kGroupsOfWarp = kGroups / kWarps;
static_assert(kPerThread == 4 * kGroupsOfWarp, "a thread owns four elements of each group");

struct Tile {
  int count;    // elements of the row in this tile
  int first;    // where this thread's elements are
  bool vector;  // in fours
  __device__ __forceinline__ int at(int i) const {
    return first + (vector ? i / 4 * kLanes + i % 4 : i * kThreads);
  }
};

__device__ __forceinline__ int element_bytes(int dtype) { return dtype == kFloat32 ? 4 : 2; }

// use(Type<...>()), whose `value` is the dtype that is known only now.
template <int kType>
using Type = std::integral_constant<int, kType>;
template <class Use>
__device__ __forceinline__ auto of_type(int dtype, const Use& use) {
  if (dtype == kFloat32) return use(Type<kFloat32>());
  return dtype == kFloat16 ? use(Type<kFloat16>()) : use(Type<kBFloat16>());
}

template <int kType>
__device__ __forceinline__ float widened(uint16_t raw) {
  return kType == kFloat16 ? half_to_float(raw) : bfloat16_to_float(raw);
}

template <int kType>
__device__ __forceinline__ float read_one(const char* data, int64_t j) {
  if constexpr (kType == kFloat32)
    return __ldg(reinterpret_cast<const float*>(data) + j);
  else
    return widened<kType>(__ldg(reinterpret_cast<const unsigned short*>(data) + j));
}

__device__ __forceinline__ float read_one(const char* data, int dtype, int64_t j) {
  if (dtype == kFloat32) return read_one<kFloat32>(data, j);
  return dtype == kFloat16 ? read_one<kFloat16>(data, j) : read_one<kBFloat16>(data, j);
}

template <int kType>
__device__ __forceinline__ void read_four(const char* data, int64_t j, float* x) {
  if constexpr (kType == kFloat32) {
    const float4 v = __ldg(reinterpret_cast<const float4*>(data + j * 4));
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  } else {
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(data + j * 2));
    x[0] = widened<kType>(static_cast<uint16_t>(v.x & 0xffffu));
    x[1] = widened<kType>(static_cast<uint16_t>(v.x >> 16));
    x[2] = widened<kType>(static_cast<uint16_t>(v.y & 0xffffu));
    x[3] = widened<kType>(static_cast<uint16_t>(v.y >> 16));
  }
}

// A thread's elements i .. i + 3 of a tile that starts at `data`.
template <int kType>
__device__ __forceinline__ void read_part(const char* data, const Tile& tile, int i, float* x) {
  if (tile.vector && tile.at(i) + 4 <= tile.count) return read_four<kType>(data, tile.at(i), x);
#pragma unroll
  for (int k = 0; k < 4; ++k)
    x[k] = tile.at(i + k) < tile.count ? read_one<kType>(data, tile.at(i + k)) : -kInfinity;
}

__device__ __forceinline__ void read_part(const char* data, int dtype, const Tile& tile, int i,
                                          float* x) {
  if (dtype == kFloat32)
    read_part<kFloat32>(data, tile, i, x);
  else if (dtype == kFloat16)
    read_part<kFloat16>(data, tile, i, x);
  else
    read_part<kBFloat16>(data, tile, i, x);
}

// Where a thread's elements are, for a row whose start is aligned to four elements or not.
__device__ __forceinline__ void place(Tile* tile, int64_t vocab, int t, bool vector) {
  const int left = static_cast<int>(vocab) - t * kTile;  // V <= 2^20
  tile->count = left < kTile ? left : kTile;
  tile->vector = vector;
  tile->first =
      vector ? warp_id() * (kGroupsOfWarp * kLanes) + lane_id() * 4 : static_cast<int>(threadIdx.x);
}

__device__ __forceinline__ bool aligned_to_four(const char* row, int dtype) {
  const unsigned low = static_cast<unsigned>(reinterpret_cast<uintptr_t>(row));
  return low % (4u * static_cast<unsigned>(element_bytes(dtype))) == 0;
}

// One row of stored logits.
struct Row {
  const char* data;
  int dtype;
  int64_t vocab;

  __device__ __forceinline__ Row(const Logits& x, int64_t b, int64_t k)
      : data(static_cast<const char*>(x.data) +
             (b * x.batch_stride + k * x.row_stride) * element_bytes(x.dtype)),
        dtype(x.dtype),
        vocab(x.vocab) {}

  __device__ __forceinline__ Tile map(int t) const {
    Tile tile;
    place(&tile, vocab, t, aligned_to_four(data, dtype));
    return tile;
  }
  __device__ __forceinline__ const char* begin(int t) const {
    return data + static_cast<unsigned>(t) * static_cast<unsigned>(kTile * element_bytes(dtype));
  }
  __device__ __forceinline__ float at(int64_t v) const { return read_one(data, dtype, v); }
};

// ---- the canonical sum -------------------------------------------------------------------------

__device__ __forceinline__ float exp_of(float x) { return device::exp({x}).v; }

// exp((x - reference) / T) of four elements; four chains of dependent operations side by side.
__device__ __forceinline__ void weigh_four(const float* x, float reference, float inv_temperature,
                                           float* w) {
  device::F y[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) y[k].v = mul_rn(sub_rn(x[k], reference), inv_temperature);
  device::exp_pack<4>(y);
#pragma unroll
  for (int k = 0; k < 4; ++k) w[k] = y[k].v;
}

// Puts four of a thread's weights, elements i .. i + 3, where the sum looks for them.
__device__ __forceinline__ void put_four(const Tile& tile, int i, const float* w, float* weights) {
  if (tile.vector) {
    *reinterpret_cast<float4*>(weights + tile.at(i)) = make_float4(w[0], w[1], w[2], w[3]);
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k) weights[tile.at(i + k)] = w[k];
  }
}

// A thread that has an addend of two sums keeps one and gives away the other, so that no thread
// adds what another one adds as well.
template <class T>
__device__ __forceinline__ T given(T keep, T give, int n) {
  return add_rn(keep, __shfl_xor_sync(kFullWarp, give, n));
}

// The first additions' sums, of virtual lanes l and l + 64: a lane has this one and the next.
__device__ __forceinline__ int first_node() { return lane_id() % 16 * 4 + lane_id() / 16 * 2; }

// The 64 nodes to one number, in the first thread of the warp.
template <class T>
__device__ __forceinline__ T fold_nodes(T first, T next) {
  const bool odd = lane_id() & 8;
  T sum = given(odd ? next : first, odd ? first : next, 8);
#pragma unroll
  for (int n = 4; n >= 1; n /= 2) sum = given(sum, sum, n);
  sum = given(sum, sum, 16);  // virtual lanes 0 and 2, 1 and 3
  return given(sum, sum, 8);
}

// The 128 lanes to one number, in the first thread of the warp. `nodes`: where they are kept; of
// floats alone.
template <class T>
__device__ __forceinline__ T fold(const T* lane, T* nodes = nullptr) {
  const bool upper = lane_id() & 16;
  const T first = given(upper ? lane[2] : lane[0], upper ? lane[0] : lane[2], 16);
  const T next = given(upper ? lane[3] : lane[1], upper ? lane[1] : lane[3], 16);
  if constexpr (std::is_same_v<T, float>)
    if (nodes) *reinterpret_cast<float2*>(nodes + first_node()) = make_float2(first, next);
  return fold_nodes(first, next);
}

// The warp that adds up a tile for its block.
__device__ __forceinline__ int summing_warp(int t) { return t % kWarps; }

// The canonical sum of a tile's stored values, in the first thread of the one warp that calls it,
// after a barrier. add(sum, value): a sum with another value in it, as values are to count.
template <class T, class Add>
__device__ __forceinline__ T canonical_sum_by(const Add& add, const float* values, int count,
                                              T* nodes = nullptr) {
  T lane[4] = {T(0), T(0), T(0), T(0)};
  const int groups = (count + kLanes - 1) / kLanes;
#pragma unroll 4
  for (int g = 0; g < groups; ++g) {
    const float4 x = *reinterpret_cast<const float4*>(values + g * kLanes + lane_id() * 4);
    lane[0] = add(lane[0], x.x);
    lane[1] = add(lane[1], x.y);
    lane[2] = add(lane[2], x.z);
    lane[3] = add(lane[3], x.w);
  }
  return fold(lane, nodes);
}

// The same of weights; kTerms: of terms_of_four.
template <bool kTerms = false>
__device__ __forceinline__ float canonical_sum(const float* weights, int count,
                                               float* nodes = nullptr) {
  const auto add = [](float sum, float w) { return kTerms ? add_flush(sum, w) : add_rn(sum, w); };
  return canonical_sum_by<float>(add, weights, count, nodes);
}

// weigh_four as terms of a canonical sum or a draw: subnormal where the exponential is 0. For
// elements without NaN, none above the reference and, without kClamp, none whose exponent is less
// than kExpTermLow.
template <bool kUnitTemperature, bool kClamp = true>
__device__ __forceinline__ void terms_of_four(const float* x, float reference,
                                              float inv_temperature, float* w) {
  device::F y[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    y[k].v = sub_rn(x[k], reference);
    if (!kUnitTemperature) y[k].v = mul_rn(y[k].v, inv_temperature);
    if (kClamp) y[k].v = fmaxf(y[k].v, device::kExpTermLow);
  }
  device::exp_term_pack<4>(y);
#pragma unroll
  for (int k = 0; k < 4; ++k) w[k] = y[k].v;
}

// ---- tiles in registers ------------------------------------------------------------------------

// Numbers 0 and 1 of a pair of 16-bit numbers.
template <int kType>
__device__ __forceinline__ void widen(uint32_t pair, float* x) {
  if constexpr (kType == kFloat16) {
    x[0] = half_to_float(static_cast<uint16_t>(pair & 0xffffu));
    x[1] = half_to_float(static_cast<uint16_t>(pair >> 16));
  } else {
    x[0] = device::scalar_from_bits(pair << 16);
    x[1] = device::scalar_from_bits(pair & 0xffff0000u);
  }
}

// Eight 16-bit neighbours, 16 bytes: where nothing asks for virtual lanes.
constexpr int kWide = 8;
__device__ __forceinline__ uint4 wide_at(const char* data, int j) {
  return __ldg(reinterpret_cast<const uint4*>(data) + j / kWide);
}
template <int kType>
__device__ __forceinline__ void widen(const uint4& wide, float* x) {
  widen<kType>(wide.x, x);
  widen<kType>(wide.y, x + 2);
  widen<kType>(wide.z, x + 4);
  widen<kType>(wide.w, x + 6);
}

// The largest of eight without NaN is one of these two.
template <int kType>
__device__ __forceinline__ void max_of_wide(const uint4& wide, float* x) {
  widen<kType>(max_or_nan_of_pairs<kType>(max_or_nan_of_pairs<kType>(wide.x, wide.y),
                                          max_or_nan_of_pairs<kType>(wide.z, wide.w)),
               x);
}

// A whole tile, aligned: 32 elements a thread as they are stored.
template <int kType>
struct Stored {
  static constexpr bool kIsFloat32 = kType == kFloat32;
  static constexpr int kWords = kIsFloat32 ? 4 : 2;  // of 32 bits, of four elements
  uint32_t word[kPerThread / 4][kWords];

  __device__ __forceinline__ explicit Stored(const char* data, int first) {
    const char* mine = data + first * (kIsFloat32 ? 4 : 2);
#pragma unroll
    for (int g = 0; g < kPerThread / 4; ++g) {
      if constexpr (kIsFloat32) {
        const uint4 w = __ldg(reinterpret_cast<const uint4*>(mine) + g * (kLanes / 4));
        word[g][0] = w.x, word[g][1] = w.y, word[g][2] = w.z, word[g][3] = w.w;
      } else {
        const uint2 w = __ldg(reinterpret_cast<const uint2*>(mine) + g * (kLanes / 4));
        word[g][0] = w.x, word[g][1] = w.y;
      }
    }
  }

  __device__ __forceinline__ void four(int g, float* x) const {
    if constexpr (kIsFloat32) {
#pragma unroll
      for (int k = 0; k < 4; ++k) x[k] = device::scalar_from_bits(word[g][k]);
    } else {
      widen<kType>(word[g][0], x);
      widen<kType>(word[g][1], x + 2);
    }
  }

  // The largest of this thread's elements, NaN if there is one.
  __device__ __forceinline__ float max() const {
    if constexpr (kIsFloat32) {
      float m[4];  // four chains side by side
#pragma unroll
      for (int k = 0; k < 4; ++k) m[k] = device::scalar_from_bits(word[0][k]);
#pragma unroll
      for (int i = 4; i < kPerThread; ++i)
        m[i % 4] = max_or_nan(m[i % 4], device::scalar_from_bits(word[i / 4][i % 4]));
      return max_or_nan(max_or_nan(m[0], m[1]), max_or_nan(m[2], m[3]));
    } else {
      uint32_t m = word[0][0];
#pragma unroll
      for (int i = 1; i < kPerThread / 2; ++i)
        m = max_or_nan_of_pairs<kType>(m, word[i / 2][i % 2]);
      float x[2];
      widen<kType>(m, x);
      return max_or_nan(x[0], x[1]);
    }
  }
};

// The largest of one number a lane, NaN if there is one, in every lane.
__device__ __forceinline__ float warp_max_or_nan(float m) {
#pragma unroll
  for (int n = 16; n >= 1; n /= 2) m = max_or_nan(m, __shfl_xor_sync(kFullWarp, m, n));
  return m;
}

// The same of a block.
__device__ __forceinline__ float block_max_or_nan(float m) {
  TTA_SHARED(float4, parts);
  float* part = reinterpret_cast<float*>(&parts);
  static_assert(kWarps == 4, "a number a warp");
  m = warp_max_or_nan(m);
  if (lane_id() == 0) part[warp_id()] = m;
  __syncthreads();
  const float4 all = parts;
  return max_or_nan(max_or_nan(all.x, all.y), max_or_nan(all.z, all.w));
}

// ---- tiles in shared memory --------------------------------------------------------------------

// Four of a thread's numbers, elements i .. i + 3, as put_four left them.
__device__ __forceinline__ void take_four(const Tile& tile, int i, const float* from, float* x) {
  if (tile.vector) {
    const float4 v = *reinterpret_cast<const float4*>(from + tile.at(i));
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] = from[tile.at(i + k)];
  }
}

// Four of a thread's results to global memory; `vectors`: the tile's start is aligned to 16 bytes.
__device__ __forceinline__ void put_four_out(const Tile& tile, int i, const float* x, bool vectors,
                                             float* out) {
  if (vectors && tile.at(i) + 4 <= tile.count) {
    // Through the intrinsic: nvcc splits a plain assignment into four stores.
    __stcg(reinterpret_cast<float4*>(out + tile.at(i)), make_float4(x[0], x[1], x[2], x[3]));
    return;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k)
    if (tile.at(i + k) < tile.count) out[tile.at(i + k)] = x[k];
}

// A tile that starts at `data`, as float32 to where the sum looks for weights: each thread its own
// elements, -inf beyond the row. All loads of a whole aligned tile are under way at once.
template <int kType>
__device__ __forceinline__ void stage_tile(const char* data, const Tile& tile, float* to) {
  if (tile.vector && tile.count == kTile) {
    const Stored<kType> stored(data, tile.first);
#pragma unroll
    for (int i = 0; i < kPerThread; i += 4) {
      float x[4];
      stored.four(i / 4, x);
      put_four(tile, i, x, to);
    }
    return;
  }
#pragma unroll 2
  for (int i = 0; i < kPerThread; i += 4) {
    float x[4];
    read_part<kType>(data, tile, i, x);
    put_four(tile, i, x, to);
  }
}

// Elements i .. i + 3 of a thread.
__device__ __forceinline__ void read_four(const Row& row, int t, const Tile& tile, int i,
                                          float* x) {
  read_part(row.begin(t), row.dtype, tile, i, x);
}

__device__ __forceinline__ void stage(const Row& row, int t, const Tile& tile, float* to) {
  if (row.dtype == kFloat32)
    stage_tile<kFloat32>(row.begin(t), tile, to);
  else if (row.dtype == kFloat16)
    stage_tile<kFloat16>(row.begin(t), tile, to);
  else
    stage_tile<kBFloat16>(row.begin(t), tile, to);
}

// The largest of a thread's staged elements, NaN if there is one.
__device__ __forceinline__ float staged_max(const Tile& tile, const float* staged) {
  float m = -kInfinity;
#pragma unroll 2
  for (int i = 0; i < kPerThread; i += 4) {
    float x[4];
    take_four(tile, i, staged, x);
    m = max_or_nan(m, max_or_nan(max_or_nan(x[0], x[1]), max_or_nan(x[2], x[3])));
  }
  return m;
}

// Staged elements to terms, in place; followed by a barrier.
__device__ __forceinline__ void weigh_staged(const Tile& tile, float reference,
                                             float inv_temperature, float* weights) {
  const auto four = [&](int i) {
    float x[4];
    take_four(tile, i, weights, x);
    terms_of_four<false>(x, reference, inv_temperature, x);
    put_four(tile, i, x, weights);
  };
  if (tile.vector) {
#pragma unroll 4
    for (int i = 0; i < kPerThread; i += 4) four(i);
  } else {
#pragma unroll 2
    for (int i = 0; i < kPerThread; i += 4) four(i);
  }
  __syncthreads();
}

}  // namespace cuda
}  // namespace tta
