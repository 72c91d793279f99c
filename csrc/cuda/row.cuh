// What a row has taught so far, in scratch memory between the blocks and launches that work on it,
// and draws from it.
//
// Every operator of the KAD family is a chain of stages. A stage is one launch with a block for
// each tile of each row (statistics: for one to four tiles); the block that arrives last at a row
// (`last_to_arrive`) merges what the tiles found, decides what can be decided, and leaves the rest
// to the next stage, whose blocks return at once for rows that need nothing more. No stage waits
// for the host, and the result of a row depends on nothing but the row.
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
  double bound;  // budget Z, of the knapsack
  double mass;   // D
  double kept;   // 1 - D, summed from the kept tokens
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

  static constexpr size_t kState = (sizeof(RowState) + 255) / 256 * 256;
  static constexpr size_t kEachTile =
      (2 + kSlots) * sizeof(float) + (kSlots + kQueries) * sizeof(double);

  TTA_HOST_DEVICE static size_t align(size_t n) { return (n + 255) / 256 * 256; }
  static size_t bytes_of_row(int tiles, bool with_cut) {
    const size_t n = align(kState + static_cast<size_t>(tiles) * kEachTile);
    return with_cut ? align(n + kBuckets * sizeof(uint64_t) +
                            kListed * (sizeof(float) + sizeof(int32_t)))
                    : n;
  }

  __device__ __forceinline__ char* at(int64_t row) const { return base + row * row_bytes; }
  __device__ __forceinline__ RowState& state(int64_t row) const {
    return *reinterpret_cast<RowState*>(at(row));
  }
  // Two maxima and kSlots sums a tile: 24 bytes, so that what follows is aligned.
  __device__ __forceinline__ float* tile_max(int64_t row, int model) const {
    return reinterpret_cast<float*>(at(row) + kState) + model * tiles;
  }
  __device__ __forceinline__ float* tile_sum(int64_t row, int slot) const {
    return tile_max(row, 2 + slot);
  }
  __device__ __forceinline__ double* scale(int64_t row, int slot) const {
    return reinterpret_cast<double*>(tile_max(row, 2 + kSlots)) + slot * tiles;
  }
  __device__ __forceinline__ double* mass(int64_t row, int query) const {
    return scale(row, kSlots + query);
  }
  __device__ __forceinline__ uint64_t* histogram(int64_t row) const {
    return reinterpret_cast<uint64_t*>(at(row) +
                                       align(kState + static_cast<size_t>(tiles) * kEachTile));
  }
  __device__ __forceinline__ float* list_x(int64_t row) const {
    return reinterpret_cast<float*>(histogram(row) + kBuckets);
  }
  __device__ __forceinline__ int32_t* list_id(int64_t row) const {
    return reinterpret_cast<int32_t*>(list_x(row) + kListed);
  }
};

// ---- statistics --------------------------------------------------------------------------------

// Where the tiles' maxima and their canonical sums at one or two temperatures go.
struct TileNumbers {
  float* max;
  float *first_sum, *second_sum;
  float first_inv_temperature, second_inv_temperature;
  int temperatures;

  __device__ __forceinline__ float* sum(int i) const { return i ? second_sum : first_sum; }
  __device__ __forceinline__ float inv_temperature(int i) const {
    return i ? second_inv_temperature : first_inv_temperature;
  }

  // What the maximum alone decides: a tile of impossible tokens weighs nothing, and NaN or +inf
  // comes back as a NaN sum. True if the sums are still to be made.
  __device__ __forceinline__ bool put_max(int t, float m) const {
    if (threadIdx.x == 0) max[t] = m;
    if (m > -kInfinity && m < kInfinity) return true;
    if (threadIdx.x == 0)
      for (int i = 0; i < temperatures; ++i) sum(i)[t] = m == -kInfinity ? 0.0f : kNaN;
    __syncthreads();  // before the next tile's maximum
    return false;
  }
  // After a barrier. The other warps go on to the next tile.
  __device__ __forceinline__ void put_sum(int i, int t, const float* weights, int count) const {
    if (warp_id() != summing_warp(t)) return;
    const float total = canonical_sum<true>(weights, count);
    if (lane_id() == 0) sum(i)[t] = total;
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
    if (to.inv_temperature(i) == 1.0f)
      put_terms<kType, true>(stored, first, m, 1.0f, weights);
    else
      put_terms<kType, false>(stored, first, m, to.inv_temperature(i), weights);
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

// Of the tiles of this block: column `column` of the grid has `span` of them.
template <class Reader>
__device__ __forceinline__ void block_statistics(const Reader& reader, int column, int span,
                                                 int tiles, const TileNumbers& to, float* weights) {
  const int first = column * span, end = first + span < tiles ? first + span : tiles;
#pragma unroll 1
  for (int t = first; t < end; ++t) tile_statistics(reader, t, to, weights);
}

// Running sums in place, left to right, by one warp; the last of them. The numbers of each lane are
// read before the chain begins, so that additions alone make it.
__device__ __forceinline__ double accumulate(double* numbers, int count) {
  double sum = 0.0;
  for (int first = 0; first < count; first += 32) {
    const double mine = first + lane_id() < count ? numbers[first + lane_id()] : 0.0;
    double through = 0.0;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      sum = add_rn(sum, __shfl_sync(kFullWarp, mine, i));
      if (lane_id() == i) through = sum;
    }
    if (first + lane_id() < count) numbers[first + lane_id()] = through;
  }
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

// ---- draws -------------------------------------------------------------------------------------

// First element of the tile whose scaled prefix passes `target`; the last one of non-zero weight if
// none does. Weights are taken as multiples of 2^-40, so integers hold the prefixes exactly and the
// order of their additions is free: 32 neighbours a thread first, read in turns that no two lanes
// take from one bank, then a lane an element of the thread in whose range the prefix passes.
// Weights beyond the row are 0 or terms of an impossible token. For a whole block.
__device__ __forceinline__ int find_in_tile(const float* weights, double scale, double before,
                                            double target) {
  constexpr int kNone = kThreads;
  TTA_SHARED_ARRAY(int64_t, warp_total, kWarps);
  TTA_SHARED_ARRAY(int64_t, start, kThreads);
  TTA_SHARED_ARRAY(int, first_passing, kWarps);
  TTA_SHARED_ARRAY(int, last_nonzero, kWarps);
  const int me = static_cast<int>(threadIdx.x);
  Quanta quanta;
#pragma unroll
  for (int turn = 0; turn < 8; ++turn) {
    const int four = me * 8 + (turn + lane_id()) % 8;
    const float4 w = *reinterpret_cast<const float4*>(weights + four * 4);
    quanta.add(w.x), quanta.add(w.y), quanta.add(w.z), quanta.add(w.w);
  }
  const int64_t mine = quanta.sum();
  int64_t through = warp_scan(mine);
  if (lane_id() == 31) warp_total[warp_id()] = through;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w)
    if (w < warp_id()) through += warp_total[w];
  start[me] = through - mine;
  const auto passes = [&](int64_t prefix) {
    const double mass = mul_rn(mul_rn(static_cast<double>(prefix), 0x1p-40), scale);
    return add_rn(before, mass) > target;
  };
  const unsigned nonzero = __ballot_sync(kFullWarp, mine != 0);
  const unsigned passing = __ballot_sync(kFullWarp, mine != 0 && passes(through));
  if (lane_id() == 0) {
    first_passing[warp_id()] = passing ? warp_id() * 32 + __ffs(passing) - 1 : kNone;
    last_nonzero[warp_id()] = nonzero ? warp_id() * 32 + 31 - __clz(nonzero) : 0;
  }
  __syncthreads();
  int first = kNone, last = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    first = first_passing[w] < first ? first_passing[w] : first;
    last = last_nonzero[w] > last ? last_nonzero[w] : last;
  }
  const int owner = first < kNone ? first : last;
  const int64_t here = Quanta::of(weights[owner * 32 + lane_id()]);
  const int64_t prefix = start[owner] + warp_scan(here);
  const unsigned some = __ballot_sync(kFullWarp, here != 0);
  const unsigned past = __ballot_sync(kFullWarp, here != 0 && passes(prefix));
  const int at = first < kNone ? __ffs(past) - 1 : some ? 31 - __clz(some) : 0;
  __syncthreads();  // before anybody writes the weights or these numbers again
  return owner * 32 + at;
}

// The tile in which the cumulative mass passes `target`, the mass before it, and the target to look
// for inside: beyond the end by rounding means the last token.
struct TileChoice {
  int t;
  double before, target;
};

// Every warp by itself: no barriers.
template <class Mass>
__device__ __forceinline__ TileChoice choose_tile(const double* cum, int tiles, double target,
                                                  Mass mass) {
  for (int first = 0; first < tiles; first += 32) {
    const int i = first + lane_id();
    const unsigned passing = __ballot_sync(kFullWarp, i < tiles && cum[i] > target);
    if (!passing) continue;
    const int t = first + __ffs(passing) - 1;
    return {t, t ? cum[t - 1] : 0.0, target};
  }
  int last = 0;
  for (int first = 0; first < tiles; first += 32) {
    const int i = first + lane_id();
    const unsigned some = __ballot_sync(kFullWarp, i < tiles && mass(i) > 0.0);
    if (some) last = first + 31 - __clz(some);
  }
  return {last, 0.0, static_cast<double>(kInfinity)};
}

// Inverse CDF at u in [0, 1) over a row whose `cum` is at hand. For a whole block.
template <class Reader>
__device__ __forceinline__ int64_t draw(const Reader& reader, const Scratch& s, int64_t row,
                                        int slot, int model, float inv_temperature, double z,
                                        double u, const double* cum, float* weights) {
  const TileChoice choice = choose_tile(cum, s.tiles, mul_rn(u, z), [&](int t) {
    return mul_rn(static_cast<double>(s.tile_sum(row, slot)[t]), s.scale(row, slot)[t]);
  });
  const float reference = s.tile_max(row, model)[choice.t];
  const double scale = s.scale(row, slot)[choice.t];
  const Tile tile = reader.map(choice.t);
  stage(reader, choice.t, tile, weights);
  weigh_staged(tile, reference, inv_temperature, weights);
  const int j = find_in_tile(weights, scale, choice.before, choice.target);
  return static_cast<int64_t>(choice.t) * kTile + j;
}

// The first of a thread's elements of a tile that equal `value`; kTile if there is none.
template <class Reader>
__device__ __forceinline__ int first_equal(const Reader& reader, int t, const Tile& tile,
                                           float value) {
  int first = kTile;
#pragma unroll 2
  for (int i = 0; i < kPerThread; i += 4) {
    float x[4];
    read_four(reader, t, tile, i, x);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (tile.at(i + k) < tile.count && x[k] == value)
        first = tile.at(i + k) < first ? tile.at(i + k) : first;
  }
  return first;
}

template <int kType>
__device__ __forceinline__ int first_equal(const Stored<kType>& stored, const Tile& tile,
                                           float value) {
  int first = kTile;
#pragma unroll
  for (int g = kPerThread / 4 - 1; g >= 0; --g) {
    float x[4];
    stored.four(g, x);
#pragma unroll
    for (int k = 3; k >= 0; --k)
      if (x[k] == value) first = tile.first + g * kLanes + k;
  }
  return first;
}

// All loads of a whole aligned tile at once: one wait for L2, not eight.
__device__ __forceinline__ int first_equal(const Row& row, int t, const Tile& tile, float value) {
  if (!tile.vector || tile.count < kTile) return first_equal<Row>(row, t, tile, value);
  const char* data = row.begin(t);
  if (row.dtype == kFloat32) return first_equal(Stored<kFloat32>(data, tile.first), tile, value);
  if (row.dtype == kFloat16) return first_equal(Stored<kFloat16>(data, tile.first), tile, value);
  return first_equal(Stored<kBFloat16>(data, tile.first), tile, value);
}

// Lowest id of the row's largest logit.
template <class Reader>
__device__ __forceinline__ int64_t first_of_max(const Reader& reader, const Scratch& s, int64_t row,
                                                int model, float max) {
  int mine = kMaxTiles;
  for (int i = static_cast<int>(threadIdx.x); i < s.tiles; i += kThreads)
    if (s.tile_max(row, model)[i] == max && i < mine) mine = i;
  const int t = block_reduce(mine, Min());
  const int found = first_equal(reader, t, reader.map(t), max);
  return static_cast<int64_t>(t) * kTile + block_reduce(found, Min());
}

// An invalid row is reported by the lowest code; nothing is, where nobody asks.
__device__ __forceinline__ void report(InvalidRow* invalid, int64_t row, int64_t tensor) {
  if (threadIdx.x == 0 && invalid)
    atomicMin(reinterpret_cast<long long*>(invalid->code()),
              static_cast<long long>(InvalidRow::encode(row, tensor)));
}

// The uniform of one decision about batch row b, `ahead` tokens after its position.
__device__ __forceinline__ double uniform_of(const KeySpec& key, int64_t b, int64_t ahead,
                                             uint32_t stream, uint32_t number = 0) {
  return philox_uniform(seed_bits(key.seed), number, static_cast<uint32_t>(key.position[b] + ahead),
                        static_cast<uint32_t>(key.sequence[b]), key.word3(stream, b));
}

}  // namespace cuda
}  // namespace tta
