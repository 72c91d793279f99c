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
  Logits base, proxy;
  RuleSpec rule;
  InvalidRow* invalid = nullptr;
  Scratch s;
  uint32_t* arrivals = nullptr;
  int64_t rows = 0;       // batch rows times positions
  int64_t positions = 1;  // K + 1 in verification
  uint32_t inverse = 0;   // 2^32 / positions, rounded up; 0 for one position
  int64_t param_row_stride = 1, param_position_stride = 0;
  bool same_temperature = true;
  // Of the launch: the row of its first line of blocks, and how the statistics share a row's tiles.
  uint32_t first_row = 0, first_batch_row = 0;
  int span = 1, columns = 0;

  // This block's.
  __device__ __forceinline__ uint32_t row() const { return first_row + blockIdx.y; }
  __device__ __forceinline__ int tile() const { return static_cast<int>(blockIdx.x); }
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
  __device__ __forceinline__ int proxy_rule_slot() const {
    return same_temperature ? kProxySlot : kProxyRuleSlot;
  }
  __device__ __forceinline__ bool seeks_cut(int64_t row) const {
    return s.state(row).valid && s.state(row).step == kOpen;
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

// Where a model's statistics go, at the temperatures the rule wants.
__device__ __forceinline__ TileNumbers numbers_of(const Kad& a, int64_t row, int model,
                                                  bool for_rule) {
  return {a.s.tile_max(row, model),     a.s.tile_sum(row, model),
          a.s.tile_sum(row, model + 2), a.rule.inv_temperature,
          a.rule.inv_rule_temperature,  for_rule && !a.same_temperature ? 2 : 1};
}

// This block's tiles of one model's row: the base has the first `columns` columns of blocks, the
// proxy the next.
__device__ __forceinline__ void row_statistics(const Kad& a, int64_t row, int model, bool for_rule,
                                               float* weights) {
  block_statistics(model ? a.proxy_row(row) : a.base_row(row), a.column(), a.span, a.s.tiles,
                   numbers_of(a, row, model, for_rule), weights);
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

// The least float greater than x.
__device__ __forceinline__ float next_above(float x) {
  return x == kInfinity ? x : from_ordered_bits(ordered_bits(add_rn(x, 0.0f)) + 1);  // -0 as +0
}

// A deferral's test of one tile's elements: between two numbers, unless the cut's id lies in the
// tile and parts its ties.
struct TileTest {
  float from, below;  // deferred: from <= x < below
  float cut;
  int ties;  // where the tile is parted: those at smaller places are before the cut
  bool parted;
  bool upper;
  bool uniform, all;  // all elements are deferred, or none is

  __device__ __forceinline__ TileTest(const Deferral& d, int t, float tile_max)
      : cut(d.cut.x), upper(d.upper) {
    const int64_t left = d.cut.id - static_cast<int64_t>(t) * kTile;
    parted = left >= 0 && left < kTile;
    ties = static_cast<int>(parted ? left : 0);
    const float end = left < kTile ? cut : next_above(cut);
    from = upper ? end : -kInfinity;
    below = upper ? kInfinity : end;
    const bool whole = tile_max < end;
    uniform = whole || end == -kInfinity;
    all = whole != upper;
  }
  // Elements i .. i + 3 of a thread; kPlain: of a tile that is not parted.
  template <bool kPlain>
  __device__ __forceinline__ void four(const float* x, const Tile& map, int i, bool* in) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      in[k] = x[k] >= from && x[k] < below;
      if (!kPlain && parted && x[k] == cut) in[k] = (map.at(i + k) < ties) != upper;
    }
  }
};

// ---- masked sums -------------------------------------------------------------------------------

// Adds up a tile's positive weights, or its negative ones' sizes, like canonical_sum.
template <bool kNegative>
__device__ __forceinline__ float canonical_sum_of_sign(const float* weights, int count) {
  float lane[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  const int groups = (count + kLanes - 1) / kLanes;
#pragma unroll 4
  for (int g = 0; g < groups; ++g) {
    const float4 v = *reinterpret_cast<const float4*>(weights + g * kLanes + lane_id() * 4);
    const float w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int c = 0; c < 4; ++c) lane[c] = add_rn(lane[c], fmaxf(kNegative ? -w[c] : w[c], 0.0f));
  }
  return fold(lane);
}

// The base's canonical mass, at one slot's temperature, of what a set defers in a tile, into
// `query` of the scratch memory; and of what it keeps, the critical item included, into the next.
// A tile that counts whole, or not at all, is not read. For a whole block.
template <bool kWithKept>
__device__ __forceinline__ void tile_mass(const Kad& a, int64_t row, int t, int query,
                                          const Deferral& set, int slot, float* weights) {
  const double scale = a.s.scale(row, slot)[t];
  double* deferred_mass = a.s.mass(row, query) + t;
  double* kept_mass = a.s.mass(row, query + kWithKept) + t;
  const TileTest test(set, t, a.s.tile_max(row, set.by_proxy)[t]);
  if (test.uniform || scale == 0.0) {
    const double all = mul_rn(static_cast<double>(a.s.tile_sum(row, slot)[t]), scale);
    if (threadIdx.x) return;
    *deferred_mass = test.all ? all : 0.0;
    if (kWithKept) *kept_mass = test.all ? 0.0 : all;
    return;
  }
  const float m = a.s.tile_max(row, 0)[t];
  const float inv = slot < 2 ? a.rule.inv_temperature : a.rule.inv_rule_temperature;
  const Source base(a.base_row(row), t);
  const Source judged = set.by_proxy ? Source(a.proxy_row(row), t) : base;
  const Tile map = map_of(a.base.vocab, t, base.aligned() && judged.aligned());
  each_four(map, base, judged, !test.parted, [&](auto read, int i, const float* x) {
    float w[4];
    bool in[4];
    weigh_four(x, m, inv, w);
    if (set.by_proxy) {
      float y[4];
      read(judged, map, i, y);
      test.four<decltype(read)::kPlain>(y, map, i, in);
    } else {
      test.four<decltype(read)::kPlain>(x, map, i, in);
    }
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

// Shares the tiles of `rows` rows among blocks.
inline void share_tiles(Kad* k, int64_t rows, const Launch& launch) {
  k->rows = rows;
  k->span = span_of(k->s.tiles, rows, launch.width);
  k->columns = columns_of(k->s.tiles, k->span);
}

}  // namespace cuda
}  // namespace tta
