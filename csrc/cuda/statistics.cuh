// Statistics: the tiles' maxima and canonical sums, and a row's maximum and Z.
#pragma once

#include "cuda/row.cuh"

namespace tta {
namespace cuda {

// Where the tiles' maxima and their canonical sums at one or two temperatures go.
struct TileNumbers {
  float* max;  // a model's, in scratch memory
  int tiles;
  float first_inv_temperature, second_inv_temperature;
  int temperatures;
  float* nodes = nullptr;  // of all tiles at the first temperature, where they are kept

  // Of the model's slots, of which the rule's is two after the first.
  __device__ __forceinline__ float* sum(int i, int t) const {
    float* const at = max + t;
    return at + (2 + 2 * i) * tiles;
  }
  __device__ __forceinline__ float inv_temperature(int i) const {
    return i ? second_inv_temperature : first_inv_temperature;
  }
  __device__ __forceinline__ float* nodes_of(int i, int t) const {
    return nodes && i == 0 ? nodes + t * kNodes : nullptr;
  }

  // What the maximum alone decides, by the one thread that `writes`: a tile of impossible tokens
  // weighs nothing, and NaN or +inf comes back as a NaN sum. True if the sums are still to be made.
  __device__ __forceinline__ bool put_max(int t, float m, bool writes) const {
    if (writes) max[t] = m;
    if (m > -kInfinity && m < kInfinity) return true;
    if (writes)
      for (int i = 0; i < temperatures; ++i) *sum(i, t) = m == -kInfinity ? 0.0f : kNaN;
    return false;
  }
  // The same by a whole block.
  __device__ __forceinline__ bool put_max(int t, float m) const {
    const bool usable = put_max(t, m, threadIdx.x == 0);
    if (!usable) __syncthreads();  // before the next tile's maximum
    return usable;
  }
  // After a barrier. The other warps go on to the next tile.
  __device__ __forceinline__ void put_sum(int i, int t, const float* weights, int count) const {
    if (warp_id() != summing_warp(t)) return;
    const float total = canonical_sum<true>(weights, count, nodes_of(i, t));
    if (lane_id() == 0) *sum(i, t) = total;
  }
};

template <int kType, bool kUnitTemperature>
__device__ __forceinline__ void put_terms(const Stored<kType>& stored, int first, float reference,
                                          float inv_temperature, float* weights) {
#pragma unroll
  for (int g = 0; g < kPerThread / 4; ++g) {
    float w[4];
    stored.four(g, w);
    terms_of_four<kUnitTemperature>(w, reference, inv_temperature, w);
    *reinterpret_cast<float4*>(weights + first + g * kLanes) = make_float4(w[0], w[1], w[2], w[3]);
  }
}

// Of a whole aligned tile: where decoding spends its time. Read once, kept in registers.
template <int kType>
__device__ __forceinline__ void stored_statistics(const char* data, int t, int first,
                                                  const TileNumbers& to, float* weights) {
  const Stored<kType> stored(data, first);
  const float m = block_max_or_nan(stored.max());
  if (!to.put_max(t, m)) return;
#pragma unroll 1
  for (int i = 0; i < to.temperatures; ++i) {
    if (i) __syncthreads();
    // As they are stored the elements take fewer registers than less the maximum.
    const float reference = opaque(m);
    if (to.inv_temperature(i) == 1.0f)
      put_terms<kType, true>(stored, first, reference, 1.0f, weights);
    else
      put_terms<kType, false>(stored, first, reference, to.inv_temperature(i), weights);
    __syncthreads();
    to.put_sum(i, t, weights, kTile);
  }
}

// Of any tile of any reader, by way of shared memory.
template <class Reader>
__device__ __forceinline__ void staged_statistics(const Reader& reader, int t, const Tile& tile,
                                                  const TileNumbers& to, float* weights) {
  __syncthreads();  // the tile before may still be added up
  stage(reader, t, tile, weights);
  const float m = block_max_or_nan(staged_max(tile, weights));
  if (!to.put_max(t, m)) return;
#pragma unroll 1
  for (int i = 0; i < to.temperatures; ++i) {
    if (i) {
      __syncthreads();
      stage(reader, t, tile, weights);
    }
    weigh_staged(tile, m, to.inv_temperature(i), weights);
    to.put_sum(i, t, weights, tile.count);
  }
}

template <class Reader>
__device__ __forceinline__ void tile_statistics(const Reader& reader, int t, const TileNumbers& to,
                                                float* weights) {
  staged_statistics(reader, t, reader.map(t), to, weights);
}
__device__ __forceinline__ void tile_statistics(const Row& row, int t, const TileNumbers& to,
                                                float* weights) {
  const Tile tile = row.map(t);
  if (!tile.vector || tile.count < kTile)
    staged_statistics(row, t, tile, to, weights);
  else if (row.dtype == kFloat32)
    stored_statistics<kFloat32>(row.begin(t), t, tile.first, to, weights);
  else if (row.dtype == kFloat16)
    stored_statistics<kFloat16>(row.begin(t), t, tile.first, to, weights);
  else
    stored_statistics<kBFloat16>(row.begin(t), t, tile.first, to, weights);
}

// ---- a tile a warp
//
// Where a block has as many tiles as warps and elements have 16 bits, each warp takes a tile: lane
// l the elements 4 l .. 4 l + 3 of all its groups, and so four of the virtual lanes, whose weights
// it adds up in registers. No warp waits for another, and what is done once a tile is done by one
// warp. The elements wait in shared memory, each lane's for itself, while the maximum is sought: a
// loop over registers would be unrolled to some 2000 instructions.

// A lane's parts of two groups are 16 bytes; those of half a tile fill a tile's weights.
constexpr int kPairs = kGroups / 2;
constexpr int kHalf = kPairs / 2;
static_assert(kHalf * kThreads * sizeof(uint4) == kTile * sizeof(float), "halves");

struct Parts {
  uint4 *lower, *upper;  // halves of the tile; a thread's parts are kThreads apart
  __device__ __forceinline__ uint4& at(int pair) const {
    return pair < kHalf ? lower[pair * kThreads] : upper[(pair - kHalf) * kThreads];
  }
};

// A lane's part of a tile, as it is stored, to `to`; its largest element (NaN if there is one) and
// its smallest.
template <int kType>
struct LanePart {
  float max, min;
  int pairs;  // of groups, an even number; beyond the row -inf

  static constexpr uint32_t kImpossible = kType == kFloat16 ? 0xfc00fc00u : 0xff80ff80u;

  __device__ __forceinline__ LanePart(const Row& row, int t, const Parts& to) {
    const char* const data = row.begin(t);
    const int left = static_cast<int>(row.vocab) - t * kTile;
    const bool whole = left >= kTile;
    uint32_t high = kImpossible, low = whole ? kImpossible & 0x7fff7fffu : kImpossible;
    if (whole && aligned_to_four(row.data, row.dtype)) {
      const uint2* const mine = reinterpret_cast<const uint2*>(data) + lane_id();
      uint2 word[kGroups];
#pragma unroll
      for (int g = 0; g < kGroups; ++g) word[g] = __ldg(mine + g * 32);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) look_at(word[g], &high, &low);
#pragma unroll
      for (int i = 0; i < kPairs; ++i)
        to.at(i) = make_uint4(word[2 * i].x, word[2 * i].y, word[2 * i + 1].x, word[2 * i + 1].y);
      pairs = kPairs;
    } else {
      const int count = left < kTile ? left : kTile;
      pairs = (count + 4 * kLanes - 1) / (4 * kLanes) * 2;
#pragma unroll 2
      for (int i = 0; i < pairs; ++i) {
        const int first = i * (2 * kLanes) + lane_id() * 4;
        const uint2 a = four(data, first, count), b = four(data, first + kLanes, count);
        to.at(i) = make_uint4(a.x, a.y, b.x, b.y);
        look_at(a, &high, &low);
        look_at(b, &high, &low);
      }
    }
    float x[2];
    widen<kType>(high, x);
    max = max_or_nan(x[0], x[1]);
    widen<kType>(low, x);
    min = fminf(x[0], x[1]);
  }

 private:
  __device__ __forceinline__ static void look_at(uint2 word, uint32_t* high, uint32_t* low) {
    *high = max_or_nan_of_pairs<kType>(max_or_nan_of_pairs<kType>(*high, word.x), word.y);
    *low = min_of_pairs<kType>(min_of_pairs<kType>(*low, word.x), word.y);
  }
  // Elements first .. first + 3 of a tile of `count`, one by one.
  __device__ __forceinline__ static uint2 four(const char* data, int first, int count) {
    const auto* raw = reinterpret_cast<const unsigned short*>(data) + first;
    uint32_t x[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] = first + k < count ? __ldg(raw + k) : kImpossible & 0xffffu;
    return make_uint2(x[0] | x[1] << 16, x[2] | x[3] << 16);
  }
};

// The canonical sum of a tile's weights, in the first lane. Without kClamp of a whole tile.
template <int kType, bool kUnitTemperature, bool kClamp>
__device__ __forceinline__ float sum_of_parts(const Parts& part, int pairs, float reference,
                                              float inv_temperature, float* nodes) {
  float lane[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  constexpr int kStep = kClamp ? 2 : 4;  // a tile in part is not to be padded much
#pragma unroll 1
  for (int i = 0; i < (kClamp ? pairs : kPairs); i += kStep) {
    const uint4* const mine = &part.at(i);
#pragma unroll
    for (int k = 0; k < kStep; ++k) {
      const uint4 word = mine[k * kThreads];
      const uint32_t pair[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        float w[4];
        widen<kType>(pair[2 * g], w);
        widen<kType>(pair[2 * g + 1], w + 2);
        terms_of_four<kUnitTemperature, kClamp>(w, reference, inv_temperature, w);
#pragma unroll
        for (int c = 0; c < 4; ++c) lane[c] = add_flush(lane[c], w[c]);
      }
    }
  }
  return fold(lane, nodes);
}

template <int kType>
__device__ __forceinline__ void warp_statistics(const Row& row, int t, const TileNumbers& to,
                                                const Parts& part) {
  const LanePart<kType> mine(row, t, part);
  const float m = warp_max_or_nan(mine.max);
  if (!to.put_max(t, m, lane_id() == 0)) return;
#pragma unroll 1
  for (int i = 0; i < to.temperatures; ++i) {
    const float inv_temperature = to.inv_temperature(i);
    const float lowest = mul_rn(sub_rn(mine.min, m), inv_temperature);
    float* const nodes = to.nodes_of(i, t);
    float sum;
    if (__any_sync(kFullWarp, lowest < device::kExpTermLow))
      sum = sum_of_parts<kType, false, true>(part, mine.pairs, m, inv_temperature, nodes);
    else if (inv_temperature == 1.0f)
      sum = sum_of_parts<kType, true, false>(part, mine.pairs, m, 1.0f, nodes);
    else
      sum = sum_of_parts<kType, false, false>(part, mine.pairs, m, inv_temperature, nodes);
    if (lane_id() == 0) *to.sum(i, t) = sum;
  }
}

// Of the tiles of this block: column `column` of the grid has `span` of them.
template <class Reader>
__device__ __forceinline__ void block_statistics(const Reader& reader, int column, int span,
                                                 int tiles, const TileNumbers& to, float* weights) {
  const int first = column * span, end = first + span < tiles ? first + span : tiles;
#pragma unroll 1
  for (int t = first; t < end; ++t) tile_statistics(reader, t, to, weights);
}
__device__ __forceinline__ void block_statistics(const Row& row, int column, int span, int tiles,
                                                 const TileNumbers& to, float* weights) {
  if (span < kWarps || row.dtype == kFloat32)
    return block_statistics<Row>(row, column, span, tiles, to, weights);
  TTA_SHARED_ARRAY(uint4, more, kTile / 4);
  const int t = column * kWarps + warp_id();
  if (t >= tiles) return;
  const Parts part = {reinterpret_cast<uint4*>(weights) + threadIdx.x, more + threadIdx.x};
  if (row.dtype == kFloat16)
    warp_statistics<kFloat16>(row, t, to, part);
  else
    warp_statistics<kBFloat16>(row, t, to, part);
}

// Running sums in place, left to right, by one warp; the last of them. `numbers` has room for a
// multiple of 32 of them. Every lane adds up what all of them read before the chain begins: sharing
// the numbers out would take more steps than the additions.
__device__ __forceinline__ double accumulate(double* numbers, int count) {
  constexpr int kChain = 16;
  if (count + lane_id() < (count + 31) / 32 * 32) numbers[count + lane_id()] = 0.0;
  __syncwarp();
  double sum = 0.0;
#pragma unroll 1
  for (int first = 0; first < count; first += kChain) {
    double through[kChain];
#pragma unroll
    for (int i = 0; i < kChain; ++i) through[i] = numbers[first + i];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kChain; ++i) {
      sum = add_rn(sum, through[i]);
      if (lane_id() == 0) numbers[first + i] = sum;
    }
  }
  __syncwarp();
  return sum;
}

// Adds up the tiles of a row, left to right: scales to scratch memory, cumulative masses to `cum`
// (shared, kMaxTiles), maximum and Z to `numbers`. False: the row is invalid. For a whole block, of
// which one warp does it: a few dozen numbers are not worth the barriers.
__device__ __forceinline__ bool finish_slot(const Scratch& s, int64_t row, int slot, int model,
                                            float inv_temperature, double* cum,
                                            SlotNumbers* numbers) {
  TTA_SHARED(double, total);
  TTA_SHARED(float, row_max);
  TTA_SHARED(int, row_valid);
  __syncthreads();  // `cum` and the results of a call before this one
  if (warp_id() == 0) {
    const float* const maxima = s.tile_max(row, model);
    const float* const sums = s.tile_sum(row, slot);
    // Up to 32 tiles stay in registers; what is beyond is read twice.
    const bool any = lane_id() < s.tiles;
    const float first_max = any ? maxima[lane_id()] : -kInfinity;
    const float first_sum = any ? sums[lane_id()] : 0.0f;
    float max = first_max;
    bool nan = first_sum != first_sum;
#pragma unroll 1
    for (int t = 32 + lane_id(); t < s.tiles; t += 32) {
      max = fmaxf(max, maxima[t]);
      nan = nan || sums[t] != sums[t];
    }
#pragma unroll
    for (int n = 16; n >= 1; n /= 2) max = fmaxf(max, __shfl_xor_sync(kFullWarp, max, n));
    const bool valid = !__any_sync(kFullWarp, nan) && max > -kInfinity;
    const auto scaled = [&](int t, float m, float sum) {
      const float scale = valid ? exp_of(mul_rn(sub_rn(m, max), inv_temperature)) : 0.0f;
      s.scale(row, slot)[t] = static_cast<double>(scale);
      cum[t] = mul_rn(static_cast<double>(sum), static_cast<double>(scale));
    };
    if (any) scaled(lane_id(), first_max, first_sum);
#pragma unroll 1
    for (int t = 32 + lane_id(); t < s.tiles; t += 32) scaled(t, maxima[t], sums[t]);
    const double z = accumulate(cum, s.tiles);
    if (lane_id() == 0) {
      total = z;
      row_max = max;
      row_valid = valid;
    }
  }
  __syncthreads();
  *numbers = {total, row_max, inv_temperature};
  return row_valid;
}

// The canonical sum of a query's masses over the tiles, known to every thread.
__device__ __forceinline__ double sum_of_masses(const Scratch& s, int64_t row, int query,
                                                double* shared) {
  for (int t = static_cast<int>(threadIdx.x); t < s.tiles; t += kThreads)
    shared[t] = s.mass(row, query)[t];
  __syncthreads();
  double total = 0.0;
  for (int i = 0; i < s.tiles; ++i) total = add_rn(total, shared[i]);
  __syncthreads();
  return total;
}

}  // namespace cuda
}  // namespace tta
