// One tile of a row in the registers of one block: 128 threads, 32 elements each.
//
// Thread map. Where the row is aligned to four elements, warp w owns the groups 8 w .. 8 w + 7 of
// 128 elements and lane l the elements 4 l .. 4 l + 3 of each: loads of 16 bytes (8 for 16-bit
// types), 512 (256) consecutive bytes a warp. Elsewhere thread i owns the elements i + 128 k, read
// one by one, still consecutive over a warp. Either way every byte is read once, and weights go
// through shared memory by element index, so the sum does not know which map was used.
// 32 elements a thread rather than 16: what a thread does once a tile (addresses, reductions,
// barriers) is then 6 instructions an element instead of 12, beside the 16 of the exponential.
//
// The canonical sum: the 32 weights of each of the 128 virtual lanes are added in order by warp 0,
// four virtual lanes a thread (16-byte shared loads without bank conflicts), then folded by
// shuffles: l + 64 is 16 threads away, l + 4 one thread, l + 2 and l + 1 within the thread.
#pragma once

#include "cuda/block.cuh"

namespace tta {
namespace cuda {

constexpr int kPerThread = kTile / kThreads;
constexpr int kGroups = kTile / kLanes;
constexpr int kGroupsOfWarp = kGroups / kWarps;
static_assert(kPerThread == 4 * kGroupsOfWarp, "a thread owns four elements of each group");

struct Tile {
  float x[kPerThread];  // -inf beyond the row
  int count;            // elements of the row in this tile
  int first;            // where this thread's elements are
  bool vector;          // in fours
  __device__ __forceinline__ int at(int i) const {
    return first + (vector ? i / 4 * kLanes + i % 4 : i * kThreads);
  }
};

__device__ __forceinline__ int element_bytes(int dtype) { return dtype == kFloat32 ? 4 : 2; }

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

template <int kType>
__device__ __forceinline__ void read_tile(const char* data, Tile* tile) {
  if (tile->vector && tile->count == kTile) {
#pragma unroll
    for (int i = 0; i < kPerThread; i += 4) read_four<kType>(data, tile->at(i), tile->x + i);
    return;
  }
#pragma unroll
  for (int i = 0; i < kPerThread; i += 4) read_part<kType>(data, *tile, i, tile->x + i);
}

// Where a thread's elements are, for a row whose start is aligned to four elements or not.
__device__ __forceinline__ void place(Tile* tile, int64_t vocab, int t, bool vector) {
  const int64_t left = vocab - static_cast<int64_t>(t) * kTile;
  tile->count = left < kTile ? static_cast<int>(left) : kTile;
  tile->vector = vector;
  tile->first =
      vector ? warp_id() * (kGroupsOfWarp * kLanes) + lane_id() * 4 : static_cast<int>(threadIdx.x);
}

__device__ __forceinline__ void read_raw(const char* row, int dtype, int t, Tile* tile) {
  const char* data = row + static_cast<int64_t>(t) * kTile * element_bytes(dtype);
  if (dtype == kFloat32)
    read_tile<kFloat32>(data, tile);
  else if (dtype == kFloat16)
    read_tile<kFloat16>(data, tile);
  else
    read_tile<kBFloat16>(data, tile);
}

__device__ __forceinline__ bool aligned_to_four(const char* row, int dtype) {
  return reinterpret_cast<uintptr_t>(row) % (4u * static_cast<unsigned>(element_bytes(dtype))) == 0;
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

  __device__ __forceinline__ void load(int t, Tile* tile) const {
    place(tile, vocab, t, aligned_to_four(data, dtype));
    read_raw(data, dtype, t, tile);
  }
  __device__ __forceinline__ float at(int64_t v) const {
    if (dtype == kFloat32) return read_one<kFloat32>(data, v);
    return dtype == kFloat16 ? read_one<kFloat16>(data, v) : read_one<kBFloat16>(data, v);
  }
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

// The 128 lanes to one number, in the first thread of the warp.
template <class T>
__device__ __forceinline__ T fold(T* lane) {
#pragma unroll
  for (int n = 16; n >= 1; n /= 2)
#pragma unroll
    for (int c = 0; c < 4; ++c) lane[c] = add_rn(lane[c], __shfl_down_sync(kFullWarp, lane[c], n));
  return add_rn(add_rn(lane[0], lane[2]), add_rn(lane[1], lane[3]));
}

// The canonical sum of a tile's weights, in thread 0. For warp 0, after a barrier.
__device__ __forceinline__ float canonical_sum(const float* weights, int count) {
  float lane[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  const int groups = (count + kLanes - 1) / kLanes;
#pragma unroll 8
  for (int g = 0; g < groups; ++g) {
    const float4 w = *reinterpret_cast<const float4*>(weights + g * kLanes + lane_id() * 4);
    lane[0] = add_rn(lane[0], w.x);
    lane[1] = add_rn(lane[1], w.y);
    lane[2] = add_rn(lane[2], w.z);
    lane[3] = add_rn(lane[3], w.w);
  }
  return fold(lane);
}

// Weights of a whole tile into shared memory, followed by a barrier.
__device__ __forceinline__ void put_weights(const Tile& tile, float reference,
                                            float inv_temperature, float* weights) {
#pragma unroll
  for (int i = 0; i < kPerThread; i += 4) {
    float w[4];
    weigh_four(tile.x + i, reference, inv_temperature, w);
    put_four(tile, i, w, weights);
  }
  __syncthreads();
}

template <bool kUnitTemperature>
__device__ __forceinline__ void put_fours(const Tile& tile, float reference, float inv_temperature,
                                          float* weights) {
#pragma unroll
  for (int i = 0; i < kPerThread; i += 4) {
    device::F y[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      y[k].v = sub_rn(tile.x[i + k], reference);
      if (!kUnitTemperature) y[k].v = mul_rn(y[k].v, inv_temperature);
    }
    device::exp_pack<4>(y);
    *reinterpret_cast<float4*>(weights + tile.first + i / 4 * kLanes) =
        make_float4(y[0].v, y[1].v, y[2].v, y[3].v);
  }
}

// put_weights where it is the bulk of the work: the map is chosen once, nothing is multiplied by 1.
__device__ __forceinline__ void put_weights_in_bulk(const Tile& tile, float reference,
                                                    float inv_temperature, float* weights) {
  if (!tile.vector) return put_weights(tile, reference, inv_temperature, weights);
  if (inv_temperature == 1.0f)
    put_fours<true>(tile, reference, inv_temperature, weights);
  else
    put_fours<false>(tile, reference, inv_temperature, weights);
  __syncthreads();
}

// The largest element, NaNs dropped, in every thread.
__device__ __forceinline__ float tile_max(const Tile& tile) {
  TTA_SHARED_ARRAY(float, part, kWarps);
  float m = tile.x[0];
#pragma unroll
  for (int i = 1; i < kPerThread; ++i) m = fmaxf(m, tile.x[i]);
#pragma unroll
  for (int n = 16; n >= 1; n /= 2) m = fmaxf(m, __shfl_xor_sync(kFullWarp, m, n));
  if (lane_id() == 0) part[warp_id()] = m;
  __syncthreads();
  m = part[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) m = fmaxf(m, part[w]);
  return m == m ? m : -kInfinity;  // nothing but NaN
}

__device__ __forceinline__ bool tile_has_nan(const Tile& tile) {
  bool nan = false;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) nan = nan || tile.x[i] != tile.x[i];
  return __syncthreads_or(nan);
}

}  // namespace cuda
}  // namespace tta
