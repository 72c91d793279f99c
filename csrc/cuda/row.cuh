// What a row has taught so far, in scratch memory between the blocks and launches that work on it,
// and draws from it.
//
// Every operator of the KAD family is a chain of stages. A stage is one launch with a block for
// each tile of each row; the block that arrives last at a row (`last_to_arrive`) merges what the
// tiles found, decides what can be decided, and leaves the rest to the next stage, whose blocks
// return at once for rows that need nothing more. No stage waits for the host, and the result of a
// row depends on nothing but the row.
#pragma once

#include "cuda/tile.cuh"

namespace tta {
namespace cuda {

// A model's row at one temperature: base and proxy at the sampling temperature, then at the rule's.
enum Slot : int {
  kBaseSlot = 0,
  kProxySlot = 1,
  kBaseRuleSlot = 2,
  kProxyRuleSlot = 3,
  kSlots = 4
};

struct SlotNumbers {
  double z;
  float max, inv_temperature;
  __device__ __forceinline__ float probability(float x) const {
    const float w = exp_of(mul_rn(sub_rn(x, max), inv_temperature));
    return static_cast<float>(div_rn(static_cast<double>(w), z));
  }
  __device__ __forceinline__ float max_probability() const {
    return static_cast<float>(div_rn(1.0, z));
  }
};

// A resolved rule: mu(v) = 1 exactly for the tokens the cut admits in the judging model's logits
// (or, `upper`, for those it does not), and `fraction` for the critical item.
struct Deferral {
  Cut cut;
  int64_t critical;
  double fraction;
  float critical_x;
  bool by_proxy, upper;

  __device__ __forceinline__ bool admits(float x, int64_t v) const {
    return cut.admits(x, v) != upper;
  }
};

struct RowState {
  SlotNumbers slot[kSlots];
  Deferral deferral;
  double bound;         // budget Z, of the knapsack
  double mass;          // D
  double kept;          // 1 - D, summed from the kept tokens
  double bracket_mass;  // of what lies below the knapsack's bracket, roughly
  int64_t token;
  int32_t bracket_low, bracket_high;  // bands of the histogram that may hold the critical item
  uint32_t listed;                    // candidates in the list
  int32_t step;                       // what the next stage has to do (the operator's own)
  bool valid;                         // everything the rule looks at can be used
  bool base_valid, proxy_valid;       // the rows can
  bool stands;                        // verification: the draft token is accepted
  bool deferred;                      // verification: mu(token) = 1, or the bonus token is deferred
};

constexpr int kQueries = 3;     // masked sums a stage can make of one row
constexpr int kBuckets = 4096;  // of the knapsack's histogram
constexpr int kListed = 3072;   // candidates that are listed at most

// Scratch memory of a batch of rows: RowState and the arrays over tiles side by side for each row.
struct Scratch {
  char* base = nullptr;
  int64_t row_bytes = 0;
  int tiles = 0;
  bool with_cut = false;

  static size_t align(size_t n) { return (n + 255) / 256 * 256; }
  static size_t bytes_of_row(int tiles, bool with_cut) {
    const size_t t = static_cast<size_t>(tiles);
    size_t n = align(sizeof(RowState)) + t * (kSlots + kQueries) * sizeof(double) +
               t * (2 + kSlots) * sizeof(float);
    if (with_cut)
      n = align(n) + kBuckets * sizeof(uint64_t) + kListed * (sizeof(float) + sizeof(int32_t));
    return align(n);
  }

  __device__ __forceinline__ char* at(int64_t row) const { return base + row * row_bytes; }
  __device__ __forceinline__ RowState& state(int64_t row) const {
    return *reinterpret_cast<RowState*>(at(row));
  }
  __device__ __forceinline__ double* doubles(int64_t row) const {
    return reinterpret_cast<double*>(at(row) + (sizeof(RowState) + 255) / 256 * 256);
  }
  __device__ __forceinline__ double* scale(int64_t row, int slot) const {
    return doubles(row) + slot * tiles;
  }
  __device__ __forceinline__ double* mass(int64_t row, int query) const {
    return doubles(row) + (kSlots + query) * tiles;
  }
  __device__ __forceinline__ float* floats(int64_t row) const {
    return reinterpret_cast<float*>(doubles(row) + (kSlots + kQueries) * tiles);
  }
  __device__ __forceinline__ float* tile_max(int64_t row, int model) const {
    return floats(row) + model * tiles;
  }
  __device__ __forceinline__ float* tile_sum(int64_t row, int slot) const {
    return floats(row) + (2 + slot) * tiles;
  }
  __device__ __forceinline__ uint64_t* histogram(int64_t row) const {
    const size_t used = (sizeof(RowState) + 255) / 256 * 256 +
                        static_cast<size_t>(tiles) *
                            ((kSlots + kQueries) * sizeof(double) + (2 + kSlots) * sizeof(float));
    return reinterpret_cast<uint64_t*>(at(row) + (used + 255) / 256 * 256);
  }
  __device__ __forceinline__ float* list_x(int64_t row) const {
    return reinterpret_cast<float*>(histogram(row) + kBuckets);
  }
  __device__ __forceinline__ int32_t* list_id(int64_t row) const {
    return reinterpret_cast<int32_t*>(list_x(row) + kListed);
  }
};

// ---- statistics --------------------------------------------------------------------------------

// The tile's maximum and its canonical sums at one or two temperatures, into scratch memory. A NaN
// that the maximum dropped comes back as a NaN sum.
__device__ __forceinline__ void tile_statistics(const Tile& tile, int t, float inv_temperature,
                                                float* maxima, float* sums, bool second,
                                                float inv_second, float* second_sums,
                                                float* weights) {
  const float m = tile_max(tile);
  if (m == -kInfinity) {
    const bool nan = tile_has_nan(tile);
    if (threadIdx.x == 0) {
      maxima[t] = m;
      sums[t] = nan ? kNaN : 0.0f;
      if (second) second_sums[t] = sums[t];
    }
    return;
  }
  for (int turn = 0; turn < (second ? 2 : 1); ++turn) {
    put_weights_in_bulk(tile, m, turn ? inv_second : inv_temperature, weights);
    if (warp_id() == 0) {
      const float sum = canonical_sum(weights, tile.count);
      if (lane_id() == 0) {
        maxima[t] = m;
        (turn ? second_sums : sums)[t] = sum;
      }
    }
    if (second) __syncthreads();
  }
}

// Adds up the tiles of a row, left to right: scales to scratch memory, cumulative masses to `cum`
// (shared, kMaxTiles), maximum and Z to `numbers`. False: the row is invalid. For a whole block.
__device__ __forceinline__ bool finish_slot(const Scratch& s, int64_t row, int slot, int model,
                                            float inv_temperature, double* cum,
                                            SlotNumbers* numbers) {
  const float* maxima = s.tile_max(row, model);
  const float* sums = s.tile_sum(row, slot);
  float top = -kInfinity;
  bool nan = false;
  for (int t = static_cast<int>(threadIdx.x); t < s.tiles; t += kThreads) {
    top = fmaxf(top, maxima[t]);
    nan = nan || sums[t] != sums[t];
  }
  const float max = block_reduce(top, Max());
  const bool valid = !__syncthreads_or(nan) && max > -kInfinity;
  for (int t = static_cast<int>(threadIdx.x); t < s.tiles; t += kThreads) {
    const float scale = valid ? exp_of(mul_rn(sub_rn(maxima[t], max), inv_temperature)) : 0.0f;
    s.scale(row, slot)[t] = static_cast<double>(scale);
    cum[t] = mul_rn(static_cast<double>(sums[t]), static_cast<double>(scale));
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double z = 0.0;
    for (int t = 0; t < s.tiles; ++t) cum[t] = z = add_rn(z, cum[t]);
  }
  __syncthreads();
  *numbers = {cum[s.tiles - 1], max, inv_temperature};
  return valid;
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

// ---- draws -------------------------------------------------------------------------------------

// Four weights as multiples of 2^-40.
__device__ __forceinline__ void quanta_of_four(const float* weights, int first, int count,
                                               int64_t* quanta) {
  const float4 w = *reinterpret_cast<const float4*>(weights + first);
  const float x[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const double rounded = quantize_weight(static_cast<double>(x[k]));
    quanta[k] = first + k < count ? static_cast<int64_t>(mul_rn(rounded, 0x1p40)) : 0;
  }
}

// First element of the tile whose scaled prefix passes `target`; the last one of non-zero weight if
// none does. Weights are multiples of 2^-40 here, so integers hold the prefixes exactly and the
// order of their additions is free: groups of 128 first, then the elements of one group.
__device__ __forceinline__ int find_in_tile(const float* weights, int count, double scale,
                                            double before, double target) {
  TTA_SHARED_ARRAY(int64_t, group_total, kGroups);
  TTA_SHARED(int, found);
  for (int g = warp_id(); g < kGroups; g += kWarps) {
    int64_t quanta[4];
    quanta_of_four(weights, g * kLanes + lane_id() * 4, count, quanta);
    int64_t sum = quanta[0] + quanta[1] + quanta[2] + quanta[3];
#pragma unroll
    for (int n = 16; n >= 1; n /= 2) sum += __shfl_xor_sync(kFullWarp, sum, n);
    if (lane_id() == 0) group_total[g] = sum;
  }
  __syncthreads();
  const auto passes = [&](int64_t prefix) {
    const double mass = mul_rn(mul_rn(static_cast<double>(prefix), 0x1p-40), scale);
    return add_rn(before, mass) > target;
  };
  if (warp_id() == 0) {
    int64_t prefix = 0;
    int group = 0, last = 0;  // the group to look into, the last one of non-zero weight
    for (; group < kGroups; ++group) {
      if (group_total[group] == 0) continue;
      if (passes(prefix + group_total[group])) break;
      last = group;
      prefix += group_total[group];
    }
    const bool any = group < kGroups;
    if (!any) group = last;
    int64_t quanta[4];
    const int first = group * kLanes + lane_id() * 4;
    quanta_of_four(weights, first, count, quanta);
    const int64_t sum = quanta[0] + quanta[1] + quanta[2] + quanta[3];
    int64_t through = sum;
#pragma unroll
    for (int n = 1; n < 32; n *= 2) {
      const int64_t other = __shfl_up_sync(kFullWarp, through, n);
      if (lane_id() >= n) through += other;
    }
    prefix += through - sum;
    int mine = any ? kTile : 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      prefix += quanta[k];
      if (any && mine == kTile && passes(prefix)) mine = first + k;
      if (!any && quanta[k]) mine = first + k;
    }
#pragma unroll
    for (int n = 16; n >= 1; n /= 2) {
      const int other = __shfl_xor_sync(kFullWarp, mine, n);
      mine = any == (other < mine) ? other : mine;
    }
    if (lane_id() == 0) found = mine;
  }
  __syncthreads();
  return found;
}

// The tile in which the cumulative mass passes `target`, the mass before it, and the target to look
// for inside: beyond the end by rounding means the last token.
struct TileChoice {
  int t;
  double before, target;
};

template <class Mass>
__device__ __forceinline__ TileChoice choose_tile(const double* cum, int tiles, double target,
                                                  Mass mass) {
  int passed = 0;
  for (int i = static_cast<int>(threadIdx.x); i < tiles; i += kThreads)
    passed += !(cum[i] > target);
  const int t = block_reduce(passed, Sum());
  if (t < tiles) return {t, t ? cum[t - 1] : 0.0, target};
  int last = 0;
  for (int i = static_cast<int>(threadIdx.x); i < tiles; i += kThreads)
    if (mass(i) > 0.0) last = i;
  return {block_reduce(last, Max()), 0.0, static_cast<double>(kInfinity)};
}

// Inverse CDF at u in [0, 1) over a row whose `cum` is at hand. For a whole block.
template <class Reader>
__device__ __forceinline__ int64_t draw(const Reader& reader, const Scratch& s, int64_t row,
                                        int slot, int model, float inv_temperature, double z,
                                        double u, const double* cum, float* weights) {
  const TileChoice choice = choose_tile(cum, s.tiles, mul_rn(u, z), [&](int t) {
    return mul_rn(static_cast<double>(s.tile_sum(row, slot)[t]), s.scale(row, slot)[t]);
  });
  Tile tile;
  reader.load(choice.t, &tile);
  put_weights(tile, s.tile_max(row, model)[choice.t], inv_temperature, weights);
  const int j =
      find_in_tile(weights, tile.count, s.scale(row, slot)[choice.t], choice.before, choice.target);
  return static_cast<int64_t>(choice.t) * kTile + j;
}

// Lowest id of the row's largest logit.
template <class Reader>
__device__ __forceinline__ int64_t first_of_max(const Reader& reader, const Scratch& s, int64_t row,
                                                int model, float max) {
  int mine = kMaxTiles;
  for (int i = static_cast<int>(threadIdx.x); i < s.tiles; i += kThreads)
    if (s.tile_max(row, model)[i] == max && i < mine) mine = i;
  const int t = block_reduce(mine, Min());
  Tile tile;
  reader.load(t, &tile);
  int found = kTile;
#pragma unroll
  for (int k = 0; k < kPerThread; ++k)
    if (tile.at(k) < tile.count && tile.x[k] == max)
      found = tile.at(k) < found ? tile.at(k) : found;
  return static_cast<int64_t>(t) * kTile + block_reduce(found, Min());
}

// The uniform of one decision about batch row b, `ahead` tokens after its position.
__device__ __forceinline__ double uniform_of(const KeySpec& key, int64_t b, int64_t ahead,
                                             uint32_t stream, uint32_t number = 0) {
  return philox_uniform(seed_bits(key.seed), number, static_cast<uint32_t>(key.position[b] + ahead),
                        static_cast<uint32_t>(key.sequence[b]), key.word3(stream, b));
}

}  // namespace cuda
}  // namespace tta
