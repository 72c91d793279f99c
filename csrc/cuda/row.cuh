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
  double mass;   // D; before, the mass below the cut's bracket
  double kept;   // 1 - D, summed from the kept tokens; before, what that mass may be wrong by
  int64_t token;
  int32_t bracket_low, bracket_high;  // bands of the histogram that may hold the critical item
  float bracket_most, bracket_least;  // logits between which they lie
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
#pragma unroll 4
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
