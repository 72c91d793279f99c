// One row of logits, read tile by tile: the canonical sum, inverse-CDF draws, and the cut of the
// greedy knapsack. Everything the KAD kernels share. Included once per instruction set.
//
// Canonical order (the same on every machine): tiles of 4096 elements; element j of a tile belongs
// to virtual lane j mod 128; a lane adds its 32 weights in order, in float32; the 128 lanes fold
// l + 64, l + 32, ... l + 1; tiles are scaled by exp(m_t - m_row) and added left to right in
// float64. A masked element adds 0, so a masked sum is monotone in its mask and the sum over all
// equals Z bit for bit.
//
// Passes over memory: `row_stats` reads the row once (each 16 KiB tile twice, the second time from
// L1). `prefix_sum` reads only the tiles whose maximum lies beyond the cut, `prefix_reaches` only
// as many of those as the answer takes. Where masked sums are certain to follow, `row_stats` keeps
// the weights, and they read these instead of making them again.

#include "cpu/canonical.h"

namespace tta {
namespace TTA_ISA {

// ---- rows ------------------------------------------------------------------------------------

struct Mixture;  // cpu/mixture.h: scores computed from several models
static void load_mixture(const Mixture& mixture, int64_t row, int64_t begin, int count, float* out);

struct Row {
  const char* data = nullptr;
  int dtype = kFloat32;
  int64_t vocab = 0;
  const Mixture* mixture = nullptr;  // scores are computed, not stored
  int64_t index = 0;                 // row of the batch, for the mixture
  int tiles() const { return tiles_of(vocab); }
};

static inline Row row_of(const Logits& x, int64_t b, int64_t k = 0) {
  Row row;
  row.data = static_cast<const char*>(x.data) +
             (b * x.batch_stride + k * x.row_stride) * dtype_bytes(x.dtype);
  row.dtype = x.dtype;
  row.vocab = x.vocab;
  return row;
}

// A tile as float32, padded with -inf to a multiple of 128. Whole float32 tiles are read in place.
struct Tile {
  const float* x;
  int count;  // padded
};

// At most `most` elements from `begin` on, whole lanes of 128.
static Tile load_part(const Row& row, int64_t begin, int most, float* scratch) {
  const int count = row.vocab - begin < most ? static_cast<int>(row.vocab - begin) : most;
  const int padded = (count + kLanes - 1) / kLanes * kLanes;
  if (row.dtype == kFloat32 && count == padded && !row.mixture)
    return {reinterpret_cast<const float*>(row.data) + begin, count};
  if (row.mixture)
    load_mixture(*row.mixture, row.index, begin, count, scratch);
  else
    load_raw(row.data, row.dtype, begin, count, scratch);
  for (int j = count; j < padded; ++j) scratch[j] = -kInfinity;
  return {scratch, padded};
}
static Tile load_tile(const Row& row, int t, float* scratch) {
  return load_part(row, static_cast<int64_t>(t) * kTile, kTile, scratch);
}

static float logit_at(const Row& row, int64_t v) {
  if (!row.mixture) return element(row.data, row.dtype, v);
  float x;
  load_mixture(*row.mixture, row.index, v, 1, &x);
  return x;
}

// ---- the canonical sum -------------------------------------------------------------------------

TTA_INLINE F weight(F x, F tile_max, F inv_temperature) {
  return exp(mul(sub(x, tile_max), inv_temperature));
}

// Temperature 1, whose product need not be made.
struct One {};
TTA_INLINE F mul(F a, One) { return a; }
// body(inv_temperature) as a vector or, where it is 1, as One.
template <class Body>
TTA_INLINE auto with_scale(float inv_temperature, Body body) {
  return inv_temperature == 1.0f ? body(One()) : body(set1(inv_temperature));
}

// N weights at once (core/math.h says why).
template <int N, bool kNaN = true, class Scale>
TTA_INLINE void weight_pack(const float* x, F tile_max, Scale inv_temperature, F* w) {
  for (int k = 0; k < N; ++k) w[k] = mul(sub(load(x + k * kWidth), tile_max), inv_temperature);
  exp_pack<N, kNaN>(w);
}
// Weights computed together; AVX-512's eight sums of a sweep leave registers for two.
constexpr int kPack = kWidth == 8 ? 4 : kWidth == 1 ? 1 : 2;
constexpr int kPair = kWidth == 1 ? 1 : 2;  // where they are not added up

// Weights to within kRough of theirs, at half the cost, N at a time: 2^n (1 + a cubic in the
// remainder). 8e-5 is the cubic's (minimax), 3e-5 both sides' rounding of exponents up to 88. Below
// that, where weights are 0, they are at most 2^-125: no subnormals, which are slow.
// `per_octave` is inv_temperature log2 e.
constexpr double kRough = 0x1p-12;
constexpr double kVague = 1e-31;  // more than 2^20 of what is 0 on one side
template <int N>
TTA_INLINE void rough_pack(const float* x, F tile_max, F per_octave, F* w) {
  F y[N], shifted[N];
  const F magic = set1(0x1.8p23f);
  for (int k = 0; k < N; ++k)
    y[k] = max(mul(sub(load(x + k * kWidth), tile_max), per_octave), set1(-125.0f));
  for (int k = 0; k < N; ++k) shifted[k] = add(y[k], magic);
  for (int k = 0; k < N; ++k) y[k] = sub(y[k], sub(shifted[k], magic));
  for (int k = 0; k < N; ++k) w[k] = fma(set1(0x1.c3f760p-5f), y[k], set1(0x1.f0de1ap-3f));
  for (int k = 0; k < N; ++k) w[k] = fma(w[k], y[k], set1(0x1.62f31ap-1f));
  for (int k = 0; k < N; ++k) w[k] = fma(w[k], y[k], set1(0x1.fff692p-1f));
  for (int k = 0; k < N; ++k) w[k] = from_bits(add(bits(w[k]), shift_left<23>(bits(shifted[k]))));
}
TTA_INLINE float per_octave(float inv_temperature) { return inv_temperature * 0x1.715476p+0f; }

// NaNs are dropped here; they come back as a NaN tile sum.
static float tile_max(Tile tile) {
  F m0 = set1(-kInfinity), m1 = m0, m2 = m0, m3 = m0;
  constexpr int kStep = kWidth == 1 ? 4 : 4 * kWidth;
  for (int j = 0; j < tile.count; j += kStep) {
    m0 = max(load(tile.x + j), m0);
    m1 = max(load(tile.x + j + kWidth), m1);
    m2 = max(load(tile.x + j + 2 * kWidth), m2);
    m3 = max(load(tile.x + j + 3 * kWidth), m3);
  }
  return reduce_max(max(max(m0, m1), max(m2, m3)));
}

enum MaskMode { kNoMask, kBelow, kAtOrBelow, kMixed };

TTA_INLINE MaskMode mask_mode(const Cut& cut, int t) {
  const int64_t limit = cut.id - static_cast<int64_t>(t) * kTile;
  if (limit <= 0) return kBelow;
  return limit >= kTile ? kAtOrBelow : kMixed;
}

template <int kMode>
TTA_INLINE M admitted(F x, F cut_x, I lane_index, I limit) {
  if constexpr (kMode == kBelow) return less(x, cut_x);
  if constexpr (kMode == kAtOrBelow) return less_equal(x, cut_x);
  return mask_or(less(x, cut_x), mask_and(equal(x, cut_x), less(lane_index, limit)));
}

// Where a tile's weights come from: exp, exp whose results go to `kept` too, what an earlier sum
// left in `kept`, or rough_pack.
enum Source { kMade, kMadeAndKept, kKept, kRoughlyMade };

template <int kMode, Source kSource, class Scale>
static float tile_sum_as(Tile tile, float max_value, Scale s, float cut_x = 0.0f,
                         int32_t cut_limit = 0, float* kept = nullptr) {
  const F m = set1(max_value), cx = set1(cut_x);
  const I limit = set1i(cut_limit);
  F acc[kAcc];
  for (int h = 0; h < kHalves; ++h) {
    F* part = acc + h * kSweep;
    F sum[kSweep];
    for (int k = 0; k < kSweep; ++k) sum[k] = set1(0.0f);
    for (int j = h * kSweep * kWidth; j < tile.count; j += kLanes) {
      for (int k = 0; k < kSweep; k += kPack) {
        F w[kPack];
        if constexpr (kSource == kRoughlyMade)
          rough_pack<kPack>(tile.x + j + k * kWidth, m, s, w);
        else if constexpr (kSource == kKept)
          for (int i = 0; i < kPack; ++i) w[i] = load(kept + j + (k + i) * kWidth);
        else
          weight_pack<kPack>(tile.x + j + k * kWidth, m, s, w);
        for (int i = 0; i < kPack; ++i) {
          const int at = j + (k + i) * kWidth;
          if constexpr (kSource == kMadeAndKept) store(kept + at, w[i]);
          if constexpr (kMode != kNoMask)
            w[i] =
                keep(admitted<kMode>(load(tile.x + at), cx, add(iota(), set1i(at)), limit), w[i]);
          sum[k + i] = add(sum[k + i], w[i]);
        }
      }
    }
    for (int k = 0; k < kSweep; ++k) part[k] = sum[k];
  }
  return fold(acc);
}

template <Source kSource>
static float tile_sum_before(Tile tile, float max_value, float inv_temperature, const Cut& cut,
                             int t, float* kept = nullptr) {
  const F s = set1(kSource == kRoughlyMade ? per_octave(inv_temperature) : inv_temperature);
  switch (mask_mode(cut, t)) {
    case kBelow:
      return tile_sum_as<kBelow, kSource>(tile, max_value, s, cut.x, 0, kept);
    case kAtOrBelow:
      return tile_sum_as<kAtOrBelow, kSource>(tile, max_value, s, cut.x, 0, kept);
    default:
      return tile_sum_as<kMixed, kSource>(
          tile, max_value, s, cut.x, static_cast<int32_t>(cut.id - static_cast<int64_t>(t) * kTile),
          kept);
  }
}

static bool all_minus_infinity(Tile tile) {
  for (int j = 0; j < tile.count; ++j) {
    uint32_t u;
    std::memcpy(&u, tile.x + j, sizeof u);
    if (u != 0xff800000u) return false;
  }
  return true;
}

// What one pass learns about a row at one temperature.
struct Stats {
  int tiles = 0;
  float inv_temperature = 1.0f;
  float max = -kInfinity;
  double z = 0.0;
  float tile_max[kMaxTiles];
  float tile_sum[kMaxTiles];  // relative to the tile's own maximum
  double scale[kMaxTiles];    // exp(m_t - m_row)
  // Where row_stats is to keep the weights, relative to their tiles' maxima; none of -inf tiles.
  float* weights = nullptr;

  float* kept(int t) const { return weights + static_cast<int64_t>(t) * kTile; }
  double mass(int t) const { return static_cast<double>(tile_sum[t]) * scale[t]; }
  float probability(float x) const {
    const float w = exp_scalar((x - max) * inv_temperature);
    return static_cast<float>(static_cast<double>(w) / z);
  }
  float max_probability() const { return static_cast<float>(1.0 / z); }
};

// Scales and Z from the tiles' maxima and sums.
static void finish_stats(Stats* s) {
  float m = -kInfinity;
  for (int t = 0; t < s->tiles; ++t) m = s->tile_max[t] > m ? s->tile_max[t] : m;
  s->max = m;
  s->z = 0.0;
  for (int t = 0; t < s->tiles; ++t) {
    s->scale[t] = static_cast<double>(exp_scalar((s->tile_max[t] - m) * s->inv_temperature));
    s->z += s->mass(t);
  }
}

// Room for the weights of a row, this thread's; grows to the largest row seen.
static float* room_for_weights(int64_t vocab) {
  static thread_local std::unique_ptr<float[]> room;
  static thread_local int tiles = 0;
  if (tiles_of(vocab) > tiles) {
    tiles = tiles_of(vocab);
    room.reset(new float[static_cast<size_t>(tiles) * kTile]);
  }
  return room.get();
}

// Reads the row once, at one or two temperatures. False: NaN, +inf or nothing but -inf.
static bool row_stats(const Row& row, float inv_temperature, Stats* a, float inv_second = 0.0f,
                      Stats* second = nullptr) {
  alignas(64) float scratch[kTile];
  a->tiles = row.tiles();
  a->inv_temperature = inv_temperature;
  if (second) {
    second->tiles = a->tiles;
    second->inv_temperature = inv_second;
  }
  bool valid = true, finite = false;
  for (int t = 0; t < a->tiles; ++t) {
    const Tile tile = load_tile(row, t, scratch);
    const float m = tile_max(tile);
    float sum = 0.0f, sum_second = 0.0f;
    if (m == -kInfinity) {
      valid = valid && all_minus_infinity(tile);
    } else {
      finite = true;
      sum = with_scale(inv_temperature, [&](auto s) {
        return a->weights ? tile_sum_as<kNoMask, kMadeAndKept>(tile, m, s, 0.0f, 0, a->kept(t))
                          : tile_sum_as<kNoMask, kMade>(tile, m, s);
      });
      if (second) sum_second = tile_sum_as<kNoMask, kMade>(tile, m, set1(inv_second));
      valid = valid && sum == sum;
    }
    a->tile_max[t] = m;
    a->tile_sum[t] = sum;
    if (second) {
      second->tile_max[t] = m;
      second->tile_sum[t] = sum_second;
    }
  }
  if (!valid || !finite) return false;
  finish_stats(a);
  if (second) finish_stats(second);
  return true;
}

// A tile lies wholly before the cut.
TTA_INLINE bool tile_before(const Stats& s, int t, const Cut& cut) {
  return s.tile_max[t] < cut.x ||
         (s.tile_max[t] == cut.x && cut.id >= (static_cast<int64_t>(t) + 1) * kTile);
}

template <bool kRoughly = false>
static double tile_mass_before(const Row& row, const Stats& s, int t, const Cut& cut,
                               float* scratch) {
  constexpr Source kSource = kRoughly ? kRoughlyMade : kMade;
  const Tile tile = load_tile(row, t, scratch);
  const float sum =
      s.weights ? tile_sum_before<kKept>(tile, s.tile_max[t], s.inv_temperature, cut, t, s.kept(t))
                : tile_sum_before<kSource>(tile, s.tile_max[t], s.inv_temperature, cut, t);
  return static_cast<double>(sum) * s.scale[t];
}

// S: the canonical masked sum of everything before a cut that moves; only tiles that hold something
// between its old place and its new one are read again.
class PrefixSum {
 public:
  PrefixSum(const Row& row, const Stats& s) : row_(row), s_(s) {}
  bool started() const { return started_; }
  // Tile t has something between the last cut and the next one.
  void touch(int64_t t) { known_[t] = false; }
  double move(const Cut& cut) {
    alignas(64) float scratch[kTile];
    double total = 0.0;
    for (int t = 0; t < s_.tiles; ++t) {
      if (!known_[t])
        mass_[t] = tile_before(s_, t, cut) ? s_.mass(t)
                   : s_.scale[t] == 0.0    ? 0.0
                                           : tile_mass_before(row_, s_, t, cut, scratch);
      known_[t] = true;
      total += mass_[t];
    }
    started_ = true;
    return total;
  }

 private:
  const Row& row_;
  const Stats& s_;
  bool started_ = false;
  bool known_[kMaxTiles] = {};
  double mass_[kMaxTiles];
};

static double prefix_sum(const Row& row, const Stats& s, const Cut& cut) {
  return PrefixSum(row, s).move(cut);
}

// reached(prefix_sum(cut)) for a `reached` that turns from false to true as its argument grows,
// reading as few tiles as the answer needs, roughly first. A tile beyond the cut holds at least its
// own maximum (weight exactly 1) outside the sum; float32 rounding inside a tile and float64
// rounding across tiles are far below the slack, so every early answer is the exact one.
template <class Reached>
static bool prefix_reaches(const Row& row, const Stats& s, const Cut& cut, Reached reached) {
  constexpr double kTileSlack = 1.0 + 0x1p-17, kSumSlack = 0x1p-40;
  alignas(64) float scratch[kTile];
  double least[kMaxTiles], most[kMaxTiles];  // of a tile's part; equal where it is known
  int open = 0;
  int16_t open_tile[kMaxTiles];
  bool rough[kMaxTiles];
  double known = 0.0;
  for (int t = 0; t < s.tiles; ++t) {
    least[t] = most[t] = 0.0;
    rough[t] = false;
    if (tile_before(s, t, cut)) {
      known += least[t] = most[t] = s.mass(t);
    } else if (s.scale[t] != 0.0) {
      const double admitted_sum =
          static_cast<double>(s.tile_sum[t]) * kTileSlack - (s.tile_max[t] > cut.x ? 1.0 : 0.0);
      most[t] = (admitted_sum > 0.0 ? admitted_sum : 0.0) * s.scale[t];
      open_tile[open++] = static_cast<int16_t>(t);
    }
  }
  while (open) {
    double low = known, high = known;  // afresh: differences would keep the rounding of old gaps
    int widest = 0;
    for (int i = 0; i < open; ++i) {
      const int t = open_tile[i], w = open_tile[widest];
      low += least[t];
      high += most[t];
      if (most[t] - least[t] > most[w] - least[w]) widest = i;
    }
    if (reached(low * (1.0 - kSumSlack))) return true;
    if (!reached(high * (1.0 + kSumSlack))) return false;
    const int t = open_tile[widest];
    if (!rough[t]) {
      const double mass = tile_mass_before<true>(row, s, t, cut, scratch);
      const double below = mass * (1.0 - kRough) - kVague, above = mass * (1.0 + kRough) + kVague;
      rough[t] = true;
      least[t] = below > 0.0 ? below : 0.0;
      most[t] = above < most[t] ? above : most[t];
    } else {
      open_tile[widest] = open_tile[--open];
      known += least[t] = most[t] = tile_mass_before(row, s, t, cut, scratch);
    }
  }
  double total = 0.0;
  for (int t = 0; t < s.tiles; ++t) total += most[t];
  return reached(total);
}

// prefix_sum(cut) <= bound.
static bool prefix_at_most(const Row& row, const Stats& s, const Cut& cut, double bound) {
  return !prefix_reaches(row, s, cut, [bound](double sum) { return sum > bound; });
}

// ---- draws -------------------------------------------------------------------------------------

TTA_INLINE D quantize(D w) { return sub(add(w, set1d(kQuantum)), set1d(kQuantum)); }

TTA_INLINE double sum_exact(D a) {
  double lane[kWidth];
  store(lane, a);
  double total = 0.0;
  for (int k = 0; k < kWidth; ++k) total += lane[k];
  return total;
}

// First element of the tile whose scaled prefix passes `target`; the last one of non-zero weight if
// none does. `weights` holds tile.count float32 weights <= 1.
static int find_in_tile(const float* weights, int count, double scale, double before,
                        double target) {
  double prefix = 0.0;
  for (int j = 0; j < count; j += kLanes) {
    D part = set1d(0.0);
    for (int k = 0; k < kLanes; k += kWidth)
      part = add(part, quantize(widen(load(weights + j + k))));
    const double next = prefix + sum_exact(part);
    if (before + next * scale > target) {
      for (int k = j; k < j + kLanes; ++k) {
        prefix += quantize_weight(static_cast<double>(weights[k]));
        if (before + prefix * scale > target) return k;
      }
    }
    prefix = next;
  }
  int last = count - 1;
  while (last > 0 && quantize_weight(static_cast<double>(weights[last])) == 0.0) --last;
  return last;
}

// Inverse CDF at u in [0, 1).
static int64_t draw(const Row& row, const Stats& s, double u) {
  double target = u * s.z;
  double before = 0.0;
  int t = 0, last = 0;
  for (; t < s.tiles; ++t) {
    const double next = before + s.mass(t);
    if (next > target) break;
    if (s.mass(t) > 0.0) last = t;
    before = next;
  }
  if (t == s.tiles) {
    t = last;
    target = static_cast<double>(kInfinity);  // beyond the end by rounding: the last token
  }
  alignas(64) float scratch[kTile];
  alignas(64) float weights[kTile];
  const Tile tile = load_tile(row, t, scratch);
  const F m = set1(s.tile_max[t]), inv = set1(s.inv_temperature);
  for (int j = 0; j < tile.count; j += kWidth) store(weights + j, weight(load(tile.x + j), m, inv));
  return static_cast<int64_t>(t) * kTile +
         find_in_tile(weights, tile.count, s.scale[t], before, target);
}

// ---- probabilities ---------------------------------------------------------------------------

// fl32(fl64(w / z)) for many w of 0 or at least 2^-126 and one z, hardly ever dividing. The
// quotient is found to 46 bits, as w times the sum of two floats, and rounded a little above and a
// little below: where both are the same number that is it. Where they are not (one weight in 2^19),
// and where float32 cannot hold what is left over, the quotient is in doubt, and float64 divides.
class DivideBy {
 public:
  struct Doubt {  // of all quotients so far
    I differ, least;
  };
  TTA_INLINE static Doubt none() { return {set1i(0), set1i(0x7fffffff)}; }

  explicit DivideBy(double z) : z_(set1d(z)) {
    const double y = 1.0 / z;
    const float high = static_cast<float>(y);
    const double low = y - static_cast<double>(high), slack = y * 0x1p-44;
    y_high_ = set1(high);
    minus_y_high_ = set1(-high);
    down_ = set1(static_cast<float>(slack - low));
    up_ = set1(static_cast<float>(-slack - low));
  }
  // In place, N vectors at a time.
  template <int N>
  TTA_INLINE void quickly(F* w, Doubt* doubt) const {
    F q[N], rest[N];
    for (int k = 0; k < N; ++k) q[k] = mul(w[k], y_high_);
    for (int k = 0; k < N; ++k) rest[k] = fma(w[k], minus_y_high_, q[k]);
    for (int k = 0; k < N; ++k) {
      const F below = sub(q[k], fma(w[k], down_, rest[k]));
      const F above = sub(q[k], fma(w[k], up_, rest[k]));
      doubt->differ = bit_or(doubt->differ, bit_xor(bits(below), bits(above)));
      // Order by bits, 0 last.
      doubt->least = min(doubt->least, add(bits(q[k]), set1i(0x7fffffff)));
      w[k] = below;
    }
  }
  // 0 < q < 2^-100: what is subnormal in a larger one is no more than rounding there.
  bool doubts(const Doubt& doubt) const {
    return TTA_ISA_LEVEL == 0 ||
           lanes(mask_or(less(set1i(0), doubt.differ), less(doubt.least, set1i(-0x72800001))));
  }
  F exactly(F w) const { return narrow(div(widen(w), z_)); }

 private:
  D z_;
  F y_high_, minus_y_high_, down_, up_;
};

// Of `packs` packs of x, whose places are listed. Not inlined: the registers are for its constants.
constexpr int kPackStep = kPair * kWidth;
TTA_NOINLINE static void write_packs(const float* x, const Stats& s, const int16_t* pack, int packs,
                                     float* out) {
  const F m = set1(s.max);
  const DivideBy z(s.z);
  const auto weigh = [&] {
    with_scale(s.inv_temperature, [&](auto inv) {
      F w[kPair];
      for (int i = 0; i < packs; ++i) {
        weight_pack<kPair, false>(x + pack[i], m, inv, w);
        for (int k = 0; k < kPair; ++k) store(out + pack[i] + k * kWidth, w[k]);
      }
    });
  };
  const auto divide = [&](auto quotients) {
    F w[kPair];
    for (int i = 0; i < packs; ++i) {
      float* const at = out + pack[i];
      for (int k = 0; k < kPair; ++k) w[k] = load(at + k * kWidth);
      quotients(w);
      for (int k = 0; k < kPair; ++k) store(at + k * kWidth, w[k]);
    }
  };
  weigh();
  if constexpr (TTA_ISA_LEVEL > 0) {
    DivideBy::Doubt doubt = DivideBy::none();
    divide([&](F* w) { z.quickly<kPair>(w, &doubt); });
    if (!z.doubts(doubt)) return;
    weigh();
  }
  divide([&](F* w) {
    for (int k = 0; k < kPair; ++k) w[k] = z.exactly(w[k]);
  });
}

// Those of packs j of which wanted(j) is true; of the others nothing is written.
template <class Wanted>
static void write_probabilities(Tile tile, const Stats& s, Wanted wanted, float* out) {
  int16_t pack[kTile / kPackStep];
  int packs = 0;
  for (int j = 0; j < tile.count; j += kPackStep) {
    pack[packs] = static_cast<int16_t>(j);
    packs += wanted(j);
  }
  write_packs(tile.x, s, pack, packs, out);
}
static void write_probabilities(Tile tile, const Stats& s, float* out) {
  write_probabilities(tile, s, [](int) { return true; }, out);
}

// ---- sets of tokens below a probability
// ----------------------------------------------------------

// {v : p(v) < t} (or <= t) as a cut: p is monotone in the logit, so a bisection over the floats
// finds the last logit inside, and the set costs one comparison an element, no exponential.
static Cut below_probability(const Stats& s, double t, bool or_equal) {
  const auto inside = [&](float x) {
    const double p = static_cast<double>(s.probability(x));
    return or_equal ? p <= t : p < t;
  };
  if (inside(s.max)) return Cut::all();
  if (!inside(-kInfinity)) return Cut::none();
  int32_t low = ordered_bits(-kInfinity), high = ordered_bits(s.max);
  while (static_cast<int64_t>(high) - low > 1) {
    const int32_t mid = static_cast<int32_t>((static_cast<int64_t>(low) + high) >> 1);
    (inside(from_ordered_bits(mid)) ? low : high) = mid;
  }
  return {from_ordered_bits(low), kNoLimit};
}

}  // namespace TTA_ISA
}  // namespace tta
