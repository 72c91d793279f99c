// The rows of a KAD operator, and rules: which tokens a rule defers. csrc/cpu/rule.h is the same in
// loops.
#pragma once

#include "cuda/launch.h"
#include "cuda/row.cuh"

namespace tta {
namespace cuda {

enum Step : int32_t { kDone, kOpen, kWantsProxy, kResidualDraw, kProxyDraw };  // RowState::step

// What every stage of the KAD family is given.
struct Kad {
  static constexpr bool kSingle = true;  // a batch row has one position: see single
  Logits base, proxy;
  RuleSpec rule;
  InvalidRow* invalid = nullptr;
  Scratch s;
  uint32_t* arrivals = nullptr;
  float* nodes = nullptr;  // of the base's tiles; null: masked sums go by all elements
  int64_t rows = 0;        // batch rows times positions
  int64_t positions = 1;   // K + 1 in verification
  uint32_t inverse = 0;    // 2^32 / positions, rounded up; 0 for one position
  int64_t param_row_stride = 1, param_position_stride = 0;
  bool same_temperature = true;
  // Of the launch: the row of its first line of blocks, and how the statistics share a row's tiles.
  uint32_t first_row = 0, first_batch_row = 0;
  int span = 1, columns = 0;

  // This block's.
  __device__ __forceinline__ uint32_t row() const { return first_row + blockIdx.y; }
  __device__ __forceinline__ int tile() const { return static_cast<int>(blockIdx.x); }
  // Of a stage whose blocks share a row's tiles.
  __device__ __forceinline__ int first_tile() const { return column() * span; }
  __device__ __forceinline__ int end_tile() const {
    return first_tile() + span < s.tiles ? first_tile() + span : s.tiles;
  }
  // Whether warps take the tiles of this block, in wide loads (tile.cuh).
  __device__ __forceinline__ bool by_warps(const Row& logits) const {
    return span == kWarps && logits.dtype != kFloat32 && logits.vocab % kWide == 0 &&
           reinterpret_cast<uintptr_t>(logits.data) % sizeof(uint4) == 0;
  }
  // Of a statistics stage.
  __device__ __forceinline__ int model() const { return tile() >= columns; }
  __device__ __forceinline__ int column() const { return tile() - model() * columns; }

  // A product in place of a division: exact, as the rows of a launch and the positions have 16
  // bits.
  __device__ __forceinline__ int64_t batch_row(int64_t row) const {
    const uint32_t r = static_cast<uint32_t>(row);
    return inverse ? first_batch_row + __umulhi(r - first_row, inverse) : r;
  }
  __device__ __forceinline__ int64_t position(int64_t row) const {
    return row - batch_row(row) * positions;
  }
  __device__ __forceinline__ Row base_row(int64_t row) const {
    return Row(base, batch_row(row), position(row));
  }
  __device__ __forceinline__ Row proxy_row(int64_t row) const {
    return Row(proxy, batch_row(row), position(row));
  }
  __device__ __forceinline__ double param(int64_t row) const {
    return rule.param[batch_row(row) * param_row_stride + position(row) * param_position_stride];
  }
  __device__ __forceinline__ bool valid_param(int64_t row) const {
    const double p = param(row);
    return p == p && !(rule.rule == kKnapsack && p < 0.0);
  }
  __device__ __forceinline__ int base_rule_slot() const {
    return same_temperature ? kBaseSlot : kBaseRuleSlot;
  }
  __device__ __forceinline__ bool seeks_cut(int64_t row) const {
    return s.state(row).valid && s.state(row).step == kOpen;
  }
  __device__ __forceinline__ float* nodes_of(int64_t row, int t) const {
    return nodes + (row * s.tiles + t) * kNodes;
  }
  __device__ __forceinline__ void note(int64_t row, int64_t tensor) const {
    report(invalid, row, tensor);
  }
};

// A kernel's arguments where batch rows have one position, which the compiler is to know.
template <class Op>
__device__ __forceinline__ Op single(Op a) {
  a.positions = 1;
  a.inverse = 0;
  return a;
}

__device__ __forceinline__ float base_probability(const Kad& a, const RowState& r, int64_t row,
                                                  int64_t v) {
  return r.slot[kBaseSlot].probability(a.base_row(row).at(v));
}
__device__ __forceinline__ float proxy_probability(const Kad& a, const RowState& r, int64_t row,
                                                   int64_t v) {
  return r.slot[kProxySlot].probability(a.proxy_row(row).at(v));
}

// mu(v), of a resolved rule.
__device__ __forceinline__ double mu_of(const Kad& a, const Deferral& d, int64_t row, int64_t v) {
  if (d.admits((d.by_proxy ? a.proxy_row(row) : a.base_row(row)).at(v), v)) return 1.0;
  return v == d.critical ? d.fraction : 0.0;
}

// {v : p(v) < t} (or <= t) as a cut: p is monotone in the logit, so a search over the floats finds
// the last logit inside. 128 floats are tried at a time: five rounds for the 2^32 of them.
__device__ __forceinline__ Cut below_probability(const SlotNumbers& s, double t,
                                                 bool or_equal = false) {
  const auto inside = [&](float x) {
    const double p = static_cast<double>(s.probability(x));
    return or_equal ? p <= t : p < t;
  };
  if (inside(s.max)) return Cut::all();
  if (!inside(-kInfinity)) return Cut::none();
  int64_t low = ordered_bits(-kInfinity), high = ordered_bits(s.max);
  while (high - low > 1) {
    const int64_t step = (high - low + kThreads) / (kThreads + 1);
    const int64_t mine = low + (static_cast<int64_t>(threadIdx.x) + 1) * step;
    const bool in = mine < high && inside(from_ordered_bits(static_cast<int32_t>(mine)));
    const int64_t count = __syncthreads_count(in);
    low += count * step;
    high = low + step < high ? low + step : high;
  }
  return Cut{from_ordered_bits(static_cast<int32_t>(low)), kNoLimit};
}

// Every rule but the knapsack, from the rows' statistics alone. For a whole block.
__device__ __forceinline__ Deferral resolve(const Kad& a, int64_t row, const SlotNumbers& p,
                                            const SlotNumbers& q) {
  Deferral d = {Cut::none(), -1, 0.0, kInfinity, false, false};
  const double param = a.param(row);
  const double max_p = static_cast<double>(p.max_probability());
  switch (a.rule.rule) {
    case kThreshold:
      d.cut = below_probability(p, param);
      break;
    case kConfidenceBet:
      d.cut = below_probability(p, sub_rn(static_cast<double>(q.max_probability()), param));
      break;
    case kNudging:
      d.cut = max_p < param ? Cut::all() : Cut::none();
      break;
    case kRelative:
      d.cut = below_probability(p, sub_rn(max_p, param));
      break;
    case kArgmax:
      d.cut = below_probability(p, max_p);
      break;
    case kProxyBelow:
      d.by_proxy = true;
      d.cut = below_probability(q, add_rn(max_p, param));
      break;
    default:
      d.by_proxy = d.upper = true;
      d.cut = below_probability(q, add_rn(max_p, param), true);
  }
  return d;
}

// Whether a drawn token with logits x (base) and y (proxy) is deferred, by any rule but the
// knapsack; the set is not built.
__device__ __forceinline__ bool judge(const Kad& a, int64_t row, const SlotNumbers& p,
                                      const SlotNumbers& q, float x, float y) {
  const double param = a.param(row);
  const double max_p = static_cast<double>(p.max_probability());
  switch (a.rule.rule) {
    case kThreshold:
      return static_cast<double>(p.probability(x)) < param;
    case kConfidenceBet:
      return static_cast<double>(p.probability(x)) <
             sub_rn(static_cast<double>(q.max_probability()), param);
    case kNudging:
      return max_p < param;
    case kRelative:
      return static_cast<double>(p.probability(x)) < sub_rn(max_p, param);
    case kArgmax:
      return static_cast<double>(p.probability(x)) < max_p;
    case kProxyBelow:
      return static_cast<double>(q.probability(y)) < add_rn(max_p, param);
    default:
      return static_cast<double>(q.probability(y)) > add_rn(max_p, param);
  }
}

// Weight of one element as the canonical sum counts it.
__device__ __forceinline__ double canonical_weight(const Scratch& s, int64_t row, int slot,
                                                   float inv_temperature, float x, int64_t v) {
  const int t = static_cast<int>(v / kTile);
  const float w = exp_of(mul_rn(sub_rn(x, s.tile_max(row, slot & 1)[t]), inv_temperature));
  return mul_rn(static_cast<double>(w), s.scale(row, slot)[t]);
}

// How much of the critical item fills the capacity; float32, so that what is reported is what is
// used.
__device__ __forceinline__ double split_fraction(double bound, double before, double weight) {
  const double part = div_rn(sub_rn(bound, before), weight);
  return static_cast<double>(static_cast<float>(part < 0.0 ? 0.0 : part > 1.0 ? 1.0 : part));
}

// ---- statistics --------------------------------------------------------------------------------

// Where a model's statistics go, at the temperatures the rule wants; with_nodes: the base's nodes
// too, where the call keeps them.
__device__ __forceinline__ TileNumbers numbers_of(const Kad& a, int64_t row, int model,
                                                  bool for_rule, bool with_nodes = false) {
  return {a.s.tile_max(row, model),
          a.s.tiles,
          a.rule.inv_temperature,
          a.rule.inv_rule_temperature,
          for_rule && !a.same_temperature ? 2 : 1,
          with_nodes && model == 0 && a.nodes ? a.nodes_of(row, 0) : nullptr};
}

// This block's tiles of one model's row: the base has the first `columns` columns of blocks, the
// proxy the next.
__device__ __forceinline__ void row_statistics(const Kad& a, int64_t row, int model, bool for_rule,
                                               float* weights, bool with_nodes = false) {
  block_statistics(model ? a.proxy_row(row) : a.base_row(row), a.column(), a.span, a.s.tiles,
                   numbers_of(a, row, model, for_rule, with_nodes), weights);
}

// Merges a model's row into its slots; false if it is invalid. `cum` is left for a draw from the
// sampling temperature's.
__device__ __forceinline__ bool finish_model(const Kad& a, int64_t row, int model, bool for_rule,
                                             double* cum, SlotNumbers* slot) {
  bool valid = true;
  if (for_rule && !a.same_temperature)
    valid =
        finish_slot(a.s, row, model + 2, model, a.rule.inv_rule_temperature, cum, slot + model + 2);
  valid = finish_slot(a.s, row, model, model, a.rule.inv_temperature, cum, slot + model) && valid;
  if (a.same_temperature || !for_rule) slot[model + 2] = slot[model];
  return valid;
}

// A column's share of what must be zero before the knapsack's cut is searched.
__device__ __forceinline__ void clear_bands(const Kad& a, int64_t row) {
  if (!a.s.with_cut) return;
  uint64_t* total = a.s.histogram(row);
  for (int i = a.column() * kThreads + static_cast<int>(threadIdx.x); i < kBuckets;
       i += a.columns * kThreads)
    total[i] = 0;
}

// A row whose statistics are known, for the stages that follow: the rule resolved, or the search of
// the knapsack's cut prepared. For a whole block.
__device__ __forceinline__ void prepare_row(const Kad& a, int64_t row, const SlotNumbers* slot,
                                            bool valid) {
  Deferral d = {Cut::none(), -1, 0.0, kInfinity, false, false};
  double bound = 0.0;
  bool open = false;
  if (valid && a.rule.rule == kKnapsack) {
    bound = mul_rn(a.param(row), slot[kBaseRuleSlot].z);
    open = !(slot[kBaseRuleSlot].z <= bound);
    d.cut = Cut::all();
  } else if (valid) {
    d = resolve(a, row, slot[kBaseRuleSlot], slot[kProxyRuleSlot]);
  }
  if (threadIdx.x) return;
  RowState& r = a.s.state(row);
#pragma unroll
  for (int i = 0; i < kSlots; ++i) r.slot[i] = slot[i];
  r.deferral = d;
  r.bound = bound;
  r.valid = valid;
  r.step = open ? kOpen : kDone;
}

// ---- a tile in memory --------------------------------------------------------------------------

// One row's tile, to be read four elements a thread at a time: a whole one would not fit the
// registers beside the arithmetic.
struct Source {
  const char* data;
  int dtype;

  __device__ __forceinline__ Source(const Row& row, int t)
      : data(row.data + static_cast<int64_t>(t) * kTile * element_bytes(row.dtype)),
        dtype(row.dtype) {}
  __device__ __forceinline__ bool aligned() const { return aligned_to_four(data, dtype); }
};

// How each_four's loops read a thread's elements i .. i + 3; kPlain: in a whole aligned tile, about
// which nothing else needs to be asked either.
template <int kType>
struct ReadWhole {
  static constexpr bool kPlain = true;
  __device__ __forceinline__ void operator()(const Source& s, const Tile& map, int i,
                                             float* x) const {
    read_four<kType>(s.data, map.at(i), x);
  }
};
struct ReadPart {
  static constexpr bool kPlain = false;
  __device__ __forceinline__ void operator()(const Source& s, const Tile& map, int i,
                                             float* x) const {
    read_part(s.data, s.dtype, map, i, x);
  }
};

__device__ __forceinline__ Tile map_of(int64_t vocab, int t, bool vector) {
  Tile map;
  place(&map, vocab, t, vector);
  return map;
}

template <int kType, class Use>
__device__ __forceinline__ void each_four_of_whole(const Tile& map, const Source& source, Use use) {
  const ReadWhole<kType> read;
  float next[4];
  read(source, map, 0, next);
#pragma unroll 2
  for (int i = 0; i < kPerThread; i += 4) {
    const float x[4] = {next[0], next[1], next[2], next[3]};
    if (i + 4 < kPerThread) read(source, map, i + 4, next);  // underway while these are used
    use(read, i, x);
  }
}

// use(read, i, x) for all of a thread's elements of a source, x: elements i .. i + 3; read(other,
// map, i, y) reads the other source's. `plain`: the caller has no question about single elements if
// the tile is whole and aligned; then it gets a loop without any.
template <class Use>
__device__ __forceinline__ void each_four(const Tile& map, const Source& source,
                                          const Source& other, bool plain, Use use) {
  const int dtype = source.dtype;
  plain = plain && map.vector && map.count == kTile && other.dtype == dtype;
  if (plain && dtype == kFloat32) return each_four_of_whole<kFloat32>(map, source, use);
  if (plain && dtype == kFloat16) return each_four_of_whole<kFloat16>(map, source, use);
  if (plain) return each_four_of_whole<kBFloat16>(map, source, use);
#pragma unroll 1
  for (int i = 0; i < kPerThread; i += 4) {
    const ReadPart read;
    float x[4];
    read(source, map, i, x);
    use(read, i, x);
  }
}
template <class Use>
__device__ __forceinline__ void each_four(const Tile& map, const Source& source, bool plain,
                                          Use use) {
  each_four(map, source, source, plain, use);
}

// The tiles of this block: by_warp(type, t, elements) by a warp each, where there are
// Kad::by_warps, or by_block(t) one after another.
template <class ByWarp, class ByBlock>
__device__ __forceinline__ void each_tile(const Kad& a, const Row& row, bool warps,
                                          const ByWarp& by_warp, const ByBlock& by_block) {
  const int first = a.first_tile(), end = a.end_tile();
  if (!warps) {
#pragma unroll 1
    for (int t = first; t < end; ++t) by_block(t);
    return;
  }
  const int t = first + warp_id();
  if (t >= end) return;
  const int count = map_of(row.vocab, t, true).count;
  if (row.dtype == kFloat16)
    by_warp(Type<kFloat16>(), t, count);
  else
    by_warp(Type<kBFloat16>(), t, count);
}

// The least float greater than x; +inf is its own.
__device__ __forceinline__ float next_above(float x) {
  return x == kInfinity ? x : from_ordered_bits(ordered_bits(add_rn(x, 0.0f)) + 1);  // -0 as +0
}

// A deferral's test of one tile's elements: by one number, unless the cut's id lies in the tile and
// parts its ties.
struct TileTest {
  float end;  // what is less lies on the cut's lower side, the rest on its upper one
  float cut;
  int ties;  // where the tile is parted: those at smaller places are before the cut
  bool parted;
  bool upper;         // the cut's upper side is deferred, not the lower one
  bool uniform, all;  // all elements are deferred, or none is

  __device__ __forceinline__ TileTest(const Deferral& d, int t, float tile_max)
      : cut(d.cut.x), upper(d.upper) {
    const int64_t left = d.cut.id - static_cast<int64_t>(t) * kTile;
    parted = left >= 0 && left < kTile;
    ties = static_cast<int>(parted ? left : 0);
    end = left < kTile ? cut : next_above(cut);
    const bool whole = tile_max < end;
    uniform = whole || end == -kInfinity;
    all = whole != upper;
  }
  // The element at a place of the tile; kPlain: of one that is not parted.
  template <bool kPlain>
  __device__ __forceinline__ bool one(float x, int place) const {
    if (!kPlain && parted && x == cut) return (place < ties) != upper;
    return (x < end) != upper;
  }
  // Elements i .. i + 3 of a thread.
  template <bool kPlain>
  __device__ __forceinline__ void four(const float* x, const Tile& map, int i, bool* in) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) in[k] = one<kPlain>(x[k], map.at(i + k));
  }
};

// Which of elements i .. i + 3 of a thread, whose base logits are x, a test defers; `judged`: the
// row it looks at, another one where `by_proxy`.
template <class Read>
__device__ __forceinline__ void judge_four(const TileTest& test, bool by_proxy,
                                           const Source& judged, Read read, const Tile& map, int i,
                                           const float* x, bool* in) {
  if (by_proxy) {
    float y[4];
    read(judged, map, i, y);
    test.four<Read::kPlain>(y, map, i, in);
  } else {
    test.four<Read::kPlain>(x, map, i, in);
  }
}

// ---- masked sums -------------------------------------------------------------------------------

// The canonical sum of a tile's positive weights, or of its negative ones' sizes.
template <bool kNegative>
__device__ __forceinline__ float canonical_sum_of_sign(const float* weights, int count) {
  const auto add = [](float sum, float w) { return add_rn(sum, fmaxf(kNegative ? -w : w, 0.0f)); };
  return canonical_sum_by<float>(add, weights, count);
}

// ---- masked sums by nodes ----------------------------------------------------------------------
//
// Few tokens are likely, and of most rules these are all that lies on one side of the cut in a
// tile. Of the tree that adds a tile's 128 virtual lanes, the first sums (nodes: lanes l and l +
// 64) are kept from the statistics; a masked sum then makes those anew that hold one of the few,
// and takes the others as they are. By a warp a tile, whose lanes have two nodes each (fold_nodes).

constexpr int kMostNodes = kNodes / 2;  // that are made anew; all elements where there are more
constexpr int kNodesAtOnce = 16;        // a virtual lane a thread
static_assert(2 * kNodesAtOnce * kGroups * kWarps == kTile, "in the place of a tile's weights");

// Nodes of a tile: bit 16 i + l is node i of lane l in a fold, or of lane 16 + l.
struct Nodes {
  uint32_t lower, upper;

  __device__ __forceinline__ bool any() const { return (lower | upper) != 0; }
  __device__ __forceinline__ int count() const { return __popc(lower) + __popc(upper); }
  __device__ __forceinline__ bool has(int i) const {
    const uint32_t mine = lane_id() < 16 ? lower : upper;
    return (mine >> (16 * i + lane_id() % 16) & 1u) != 0;
  }
  // How many are taken before this lane's i-th.
  __device__ __forceinline__ int before(int i) const {
    const uint32_t below = (1u << (16 * i + lane_id() % 16)) - 1;
    return lane_id() < 16 ? __popc(lower & below) : __popc(lower) + __popc(upper & below);
  }
  // Removes the first: its virtual lanes are the number returned and kNodes more.
  __device__ __forceinline__ int take() {
    const bool low = lower != 0;
    const int bit = __ffs(static_cast<int>(low ? lower : upper)) - 1;
    if (low)
      lower &= lower - 1;
    else
      upper &= upper - 1;
    return bit % 16 * 4 + bit / 16 + (low ? 0 : 2);
  }
};

// Those with an element that is not below `end`, in a tile of `count` elements. For a warp, a lane
// of which has the four virtual lanes that it adds up in the canonical sum.
template <int kType>
__device__ __forceinline__ Nodes find_nodes(const char* data, int count, float end) {
  float m[4];  // the largest of each virtual lane
  const int first = lane_id() * 4;
  if (count < kTile || !aligned_to_four(data, kType)) {
#pragma unroll
    for (int c = 0; c < 4; ++c) m[c] = -kInfinity;
#pragma unroll 4
    for (int place = first; place < count; place += kLanes)
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (place + c < count) m[c] = fmaxf(m[c], read_one<kType>(data, place + c));
  } else if constexpr (kType == kFloat32) {
    constexpr int kAtOnce = 16;
#pragma unroll
    for (int c = 0; c < 4; ++c) m[c] = -kInfinity;
#pragma unroll 1
    for (int j = first; j < kTile; j += kAtOnce * kLanes) {
      float x[kAtOnce][4];
#pragma unroll
      for (int g = 0; g < kAtOnce; ++g) read_four<kType>(data, j + g * kLanes, x[g]);
#pragma unroll
      for (int g = 0; g < kAtOnce; ++g)
#pragma unroll
        for (int c = 0; c < 4; ++c) m[c] = fmaxf(m[c], x[g][c]);
    }
  } else {
    const uint2* const mine = reinterpret_cast<const uint2*>(data) + lane_id();
    uint2 most = __ldg(mine);
#pragma unroll 16
    for (int g = 1; g < kGroups; ++g) {
      const uint2 word = __ldg(mine + g * 32);
      most.x = max_or_nan_of_pairs<kType>(most.x, word.x);
      most.y = max_or_nan_of_pairs<kType>(most.y, word.y);
    }
    widen<kType>(most.x, m);
    widen<kType>(most.y, m + 2);
  }
  uint32_t lanes[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) lanes[c] = __ballot_sync(kFullWarp, m[c] >= end);
  const auto folded = [&](int c) { return lanes[c] | lanes[c] >> 16 | lanes[c] << 16; };
  return {(folded(0) & 0xffffu) | (folded(1) & 0xffff0000u),
          (folded(2) & 0xffffu) | (folded(3) & 0xffff0000u)};
}

// Where the weight of an element of group g in the c-th virtual lane lies, so that neither warps
// that write a virtual lane nor threads that read one each, in fours, meet in a bank.
__device__ __forceinline__ int node_place(int c, int g) { return c * kGroups + (g ^ c % 8 * 4); }

// This lane's elements of a node, one of each of its virtual lanes; -inf beyond the row.
template <int kType>
struct NodePair {
  int place[2];
  float x[2], y[2];  // base and judged

  __device__ __forceinline__ NodePair(const Source& base, const Source& judged, int count,
                                      bool by_proxy, int node) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      place[half] = lane_id() * kLanes + half * kNodes + node;
      const bool inside = place[half] < count;
      x[half] = inside ? read_one<kType>(base.data, place[half]) : -kInfinity;
      y[half] = inside && by_proxy ? read_one<kType>(judged.data, place[half]) : x[half];
    }
  }
};

// Takes kNodesAtOnce nodes or fewer and weighs their elements, a group a lane; kept ones are
// negative, or nothing where they are not wanted. Returns how many nodes; followed by a barrier of
// the warp. `lowest`: of the kept logits.
template <int kType, bool kWithKept>
__device__ __forceinline__ int weigh_nodes(const Source& base, const Source& judged, int count,
                                           const TileTest& test, bool by_proxy, Nodes* left,
                                           float reference, float inv_temperature, float* weights,
                                           float* lowest) {
  const int made = left->count() < kNodesAtOnce ? left->count() : kNodesAtOnce;
  NodePair<kType> next(base, judged, count, by_proxy, left->take());
#pragma unroll 1
  for (int i = 0; i < made; ++i) {
    const NodePair<kType> now = next;
    if (i + 1 < made)  // underway while these are used
      next = NodePair<kType>(base, judged, count, by_proxy, left->take());
    device::F w[2];
    bool in[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      in[half] = test.one<false>(now.y[half], now.place[half]);
      if (!in[half] && now.place[half] < count) *lowest = fminf(*lowest, now.x[half]);
      w[half].v =
          fmaxf(mul_rn(sub_rn(now.x[half], reference), inv_temperature), device::kExpTermLow);
    }
    device::exp_term_pack<2>(w);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      weights[node_place(2 * i + half, lane_id())] = in[half]    ? w[half].v
                                                     : kWithKept ? -w[half].v
                                                                 : 0.0f;
  }
  __syncwarp();
  return made;
}

// What this lane has in the folds of what is deferred and of what is kept.
struct NodeSums {
  float deferred[2], kept[2];
};

// Adds up the virtual lanes of the `made` nodes that were weighed last, a virtual lane a thread,
// and gives them to the lanes that fold them; `earlier` were weighed before them.
template <bool kWithKept>
__device__ __forceinline__ void sum_nodes(const float* weights, const Nodes& found, int earlier,
                                          int made, NodeSums* to) {
  float deferred = 0.0f, kept = 0.0f;
  if (lane_id() < 2 * made) {
#pragma unroll
    for (int g = 0; g < kGroups; g += 4) {
      const float4 v = *reinterpret_cast<const float4*>(weights + node_place(lane_id(), g));
      const float w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        deferred = add_flush(deferred, kWithKept ? fmaxf(w[k], 0.0f) : w[k]);
        if (kWithKept) kept = add_flush(kept, fmaxf(-w[k], 0.0f));
      }
    }
  }
  deferred = add_rn(deferred, __shfl_down_sync(kFullWarp, deferred, 1));
  if (kWithKept) kept = add_rn(kept, __shfl_down_sync(kFullWarp, kept, 1));
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int at = found.before(i) - earlier;
    const bool mine = found.has(i) && at >= 0 && at < made;
    const float deferred_sum = __shfl_sync(kFullWarp, deferred, 2 * at & 31);
    if (mine) to->deferred[i] = deferred_sum;
    if (!kWithKept) continue;
    const float kept_sum = __shfl_sync(kFullWarp, kept, 2 * at & 31);
    if (mine) to->kept[i] = kept_sum;
  }
  __syncwarp();
}

// The mass of a tile that counts whole, or not at all, by the one thread that `writes`: it is not
// read. False: another.
template <bool kWithKept>
__device__ __forceinline__ bool whole_mass(const Kad& a, int64_t row, int t, int query, int slot,
                                           const TileTest& test, bool writes) {
  const double scale = a.s.scale(row, slot)[t];
  if (!test.uniform && scale != 0.0) return false;
  if (writes) {
    const double all = mul_rn(static_cast<double>(a.s.tile_sum(row, slot)[t]), scale);
    a.s.mass(row, query)[t] = test.all ? all : 0.0;
    if (kWithKept) a.s.mass(row, query + 1)[t] = test.all ? 0.0 : all;
  }
  return true;
}

// The base's canonical mass, at one slot's temperature, of what a set defers in a tile, into
// `query` of the scratch memory; and of what it keeps, the critical item included, into the next.
// For a whole block.
template <bool kWithKept>
__device__ __forceinline__ void tile_mass(const Kad& a, int64_t row, int t, int query,
                                          const Deferral& set, int slot, float* weights) {
  const TileTest test(set, t, a.s.tile_max(row, set.by_proxy)[t]);
  if (whole_mass<kWithKept>(a, row, t, query, slot, test, threadIdx.x == 0)) return;
  const double scale = a.s.scale(row, slot)[t];
  double* deferred_mass = a.s.mass(row, query) + t;
  double* kept_mass = a.s.mass(row, query + kWithKept) + t;
  const float m = a.s.tile_max(row, 0)[t];
  const float inv = slot < 2 ? a.rule.inv_temperature : a.rule.inv_rule_temperature;
  const Source base(a.base_row(row), t);
  const Source judged = set.by_proxy ? Source(a.proxy_row(row), t) : base;
  const Tile map = map_of(a.base.vocab, t, base.aligned() && judged.aligned());
  each_four(map, base, judged, !test.parted, [&](auto read, int i, const float* x) {
    float w[4];
    bool in[4];
    weigh_four(x, m, inv, w);
    judge_four(test, set.by_proxy, judged, read, map, i, x, in);
    // With kept ones wanted too, the sign tells them apart.
#pragma unroll
    for (int k = 0; k < 4; ++k) w[k] = in[k] ? w[k] : kWithKept ? -w[k] : 0.0f;
    put_four(map, i, w, weights);
  });
  __syncthreads();
  if (warp_id() == 0) {
    const float sum = kWithKept ? canonical_sum_of_sign<false>(weights, map.count)
                                : canonical_sum(weights, map.count);
    if (lane_id() == 0) *deferred_mass = mul_rn(static_cast<double>(sum), scale);
  } else if (kWithKept && warp_id() == 1) {
    const float sum = canonical_sum_of_sign<true>(weights, map.count);
    if (lane_id() == 0) *kept_mass = mul_rn(static_cast<double>(sum), scale);
  }
}

// The same by nodes, into queries 0 and 1 at the sampling temperature, and the lowest kept logit.
// For a warp; false where too many nodes hold an element of the cut's upper side. Rows of one type.
template <int kType, bool kWithKept>
__device__ __forceinline__ bool mass_by_nodes(const Kad& a, int64_t row, int t,
                                              const TileTest& test, bool by_proxy,
                                              const Source& base, const Source& judged,
                                              float* weights, float* lowest) {
  const int count = map_of(a.base.vocab, t, true).count;
  const Nodes found = find_nodes<kType>(judged.data, count, test.end);
  if (found.count() > kMostNodes) return false;
  // Of a node without such an element everything is on the lower side.
  const float2 whole = *reinterpret_cast<const float2*>(a.nodes_of(row, t) + first_node());
  const float2 none = make_float2(0.0f, 0.0f);
  const float2 deferred = test.upper ? none : whole, kept = test.upper ? whole : none;
  NodeSums sums = {{deferred.x, deferred.y}, {kept.x, kept.y}};
  const float reference = a.s.tile_max(row, 0)[t];
  Nodes left = found;
  for (int earlier = 0; left.any(); earlier += kNodesAtOnce) {
    const int made =
        weigh_nodes<kType, kWithKept>(base, judged, count, test, by_proxy, &left, reference,
                                      a.rule.inv_temperature, weights, lowest);
    sum_nodes<kWithKept>(weights, found, earlier, made, &sums);
  }
  const double scale = a.s.scale(row, kBaseSlot)[t];
  const auto put = [&](int query, const float* of_lane) {
    const float sum = fold_nodes(of_lane[0], of_lane[1]);
    if (lane_id() == 0) a.s.mass(row, query)[t] = mul_rn(static_cast<double>(sum), scale);
  };
  put(0, sums.deferred);
  if (kWithKept) put(1, sums.kept);
  return true;
}

enum Left : int { kMassLeft = 1, kLowestLeft = 2 };

// What a warp does of a tile's masses and its lowest kept logit; the rest is left to the block.
template <bool kWithKept>
__device__ __forceinline__ int warp_mass(const Kad& a, int64_t row, int t, const Deferral& set,
                                         const Row& base_row, const Row& judged_row, float* weights,
                                         float* lowest) {
  const TileTest test(set, t, a.s.tile_max(row, set.by_proxy)[t]);
  const int lowest_left = test.uniform && test.all ? 0 : kLowestLeft;
  if (whole_mass<kWithKept>(a, row, t, 0, kBaseSlot, test, lane_id() == 0)) return lowest_left;
  bool done = false;
  if (a.nodes && judged_row.dtype == base_row.dtype) {
    const Source base(base_row, t), judged(judged_row, t);
    done = of_type(base.dtype, [&](auto type) {
      return mass_by_nodes<type.value, kWithKept>(a, row, t, test, set.by_proxy, base, judged,
                                                  weights, lowest);
    });
  }
  if (!done) return kMassLeft | lowest_left;
  return set.by_proxy ? lowest_left : 0;
}

// The lowest kept logit of this thread's elements of a tile.
__device__ __forceinline__ float lowest_kept(const Kad& a, int64_t row, int t, const Deferral& set,
                                             const Row& base_row, const Row& judged_row) {
  float lowest = kInfinity;
  const TileTest test(set, t, a.s.tile_max(row, set.by_proxy)[t]);
  if (test.uniform && test.all) return lowest;
  const Source base(base_row, t), judged(judged_row, t);
  const Tile map = map_of(a.base.vocab, t, base.aligned() && judged.aligned());
  each_four(map, base, judged, !test.parted, [&](auto read, int i, const float* x) {
    bool in[4];
    judge_four(test, set.by_proxy, judged, read, map, i, x, in);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (read.kPlain || map.at(i + k) < map.count)
        lowest = fminf(lowest, in[k] ? kInfinity : x[k]);
  });
  return lowest;
}

// The masses of the tiles of this block: by a warp each, and what these leave by all of them.
// kLowest: its lowest kept logit, into query 2 of its first tile.
template <bool kWithKept, bool kLowest>
__device__ __forceinline__ void block_masses(const Kad& a, int64_t row, const Deferral& set,
                                             float* weights) {
  static_assert(kMostSpan <= kWarps, "a warp a tile");
  TTA_SHARED_ARRAY(int, left, kWarps);
  const Row base = a.base_row(row);
  const Row judged = set.by_proxy ? a.proxy_row(row) : base;
  const int first = a.first_tile(), end = a.end_tile(), mine = first + warp_id();
  float lowest = kInfinity;
  if (mine < end) {
    const int open = warp_mass<kWithKept>(a, row, mine, set, base, judged,
                                          weights + warp_id() * (kTile / kWarps), &lowest);
    if (lane_id() == 0) left[warp_id()] = open;
  }
  __syncthreads();
#pragma unroll 1
  for (int t = first; t < end; ++t) {
    if (left[t - first] & kMassLeft) {
      tile_mass<kWithKept>(a, row, t, 0, set, kBaseSlot, weights);
      __syncthreads();
    }
    if (kLowest && (left[t - first] & kLowestLeft))
      lowest = fminf(lowest, lowest_kept(a, row, t, set, base, judged));
  }
  if (kLowest) {
    lowest = block_reduce(lowest, Min());
    if (threadIdx.x == 0) a.s.mass(row, 2)[first] = static_cast<double>(lowest);
  }
}

// The deferred masses of the tiles of this block at the rule's temperature.
__device__ __forceinline__ void block_masses_at_rule(const Kad& a, int64_t row, int query,
                                                     const Deferral& set, float* weights) {
  const int end = a.end_tile();
#pragma unroll 1
  for (int t = a.first_tile(); t < end; ++t) {
    tile_mass<false>(a, row, t, query, set, kBaseRuleSlot, weights);
    __syncthreads();
  }
}

// The deferred mass over all tiles by one block: rare decisions only.
__device__ __forceinline__ double sum_here(const Kad& a, int64_t row, int query,
                                           const Deferral& set, int slot, float* weights,
                                           double* shared) {
  for (int t = 0; t < a.s.tiles; ++t) {
    tile_mass<false>(a, row, t, query, set, slot, weights);
    __syncthreads();
  }
  return sum_of_masses(a.s, row, query, shared);
}

__device__ __forceinline__ Deferral before(const Cut& cut) {
  return {cut, -1, 0.0, kInfinity, false, false};
}

// What the critical item adds to the deferred mass at the two temperatures.
struct Share {
  double sampled, at_rule;
};

// Splits the critical item of a row, if it has one to split: its fraction fills the capacity beside
// `rule_sum`, the mass deferred before it at the rule's temperature. For one thread.
__device__ __forceinline__ Share split(const Kad& a, int64_t row, double rule_sum) {
  RowState& r = a.s.state(row);
  Deferral& d = r.deferral;
  if (d.critical < 0 || a.rule.critical != kSplitItem) return {0.0, 0.0};
  const double at_rule = canonical_weight(a.s, row, a.base_rule_slot(), a.rule.inv_rule_temperature,
                                          d.critical_x, d.critical);
  d.fraction = split_fraction(r.bound, rule_sum, at_rule);
  const double sampled =
      canonical_weight(a.s, row, kBaseSlot, a.rule.inv_temperature, d.critical_x, d.critical);
  return {mul_rn(d.fraction, sampled), mul_rn(d.fraction, at_rule)};
}

// ---- launches ----------------------------------------------------------------------------------

// Scratch memory of rows: with nodes, where sampling and rule have one temperature.
inline size_t scratch_of(const DeferralArgs& a, int64_t rows, bool with_cut, bool with_nodes) {
  const int tiles = tiles_of(a.base.vocab);
  with_nodes = with_nodes && a.rule.inv_temperature == a.rule.inv_rule_temperature;
  return static_cast<size_t>(rows) *
         (Scratch::bytes_of_row(tiles, with_cut) +
          (with_nodes ? static_cast<size_t>(tiles) * kNodes * sizeof(float) : 0));
}

inline void fill(Kad* k, const DeferralArgs& a, const Launch& launch, bool with_cut) {
  k->base = a.base;
  k->proxy = a.proxy;
  k->rule = a.rule;
  k->invalid = a.invalid;
  k->arrivals = launch.arrivals;
  k->same_temperature = a.rule.inv_temperature == a.rule.inv_rule_temperature;
  k->s.base = static_cast<char*>(launch.scratch);
  k->s.tiles = tiles_of(a.base.vocab);
  k->s.with_cut = with_cut;
  k->s.row_bytes = static_cast<int64_t>(Scratch::bytes_of_row(k->s.tiles, with_cut));
}

// Behind the rows of the scratch memory, as scratch_of counts them.
inline void place_nodes(Kad* k, int64_t rows) {
  if (k->same_temperature) k->nodes = reinterpret_cast<float*>(k->s.base + rows * k->s.row_bytes);
}

// Shares the tiles of `rows` rows among blocks.
inline void share_tiles(Kad* k, int64_t rows, const Launch& launch) {
  k->rows = rows;
  k->span = span_of(k->s.tiles, rows, launch.width);
  k->columns = columns_of(k->s.tiles, k->span);
}

}  // namespace cuda
}  // namespace tta
