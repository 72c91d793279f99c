// The cut of the greedy knapsack over a row: its critical item, found without sorting, in time that
// hardly depends on the row. Included once per instruction set, after cpu/row.h.
//
// 1. A sixteenth of the row is counted into bands of logits, deepest first, until what lies below a
//    band surely fits the capacity and what lies above surely does not; then the bands between are
//    cut into bands again. Where one logit is left, its rank tells between which tiles.
// 2. One pass over the row adds up the mass on one side of that bracket, lists what is inside, and
//    so tells whether the sample spoke true. If not, the whole row is counted; at worst all is
//    listed.
// 3. The list is shortened by probing it, or by counting where one logit is left of it, and sorted.
// 4. Masses so far were rough (`kRough`, or float32's rounding where the weights were kept). Where
//    they leave several items in question, the canonical sum S decides, guided by them: a pass over
//    the row, then the tiles of an item or two.
// So the result is the one the definition gives, whatever the sample and the roughness were.
// Bytes: about 2.1 row reads after row_stats where all tiles hold something beyond the cut.

namespace tta {
namespace TTA_ISA {

struct KnapsackCut {
  int64_t critical = -1;  // -1: everything is taken
  float x = kInfinity;    // its logit
  Cut taken() const { return critical < 0 ? Cut::all() : Cut::before(x, critical); }
};

// Scratch of one thread; grows to the largest row seen.
struct Candidates {
  std::unique_ptr<float[]> x;
  std::unique_ptr<int32_t[]> id;
  std::unique_ptr<double[]> through;  // mass up to each and with it
  int64_t capacity = 0;
  int64_t count = 0;
  float least = 0.0f, most = 0.0f;  // of x
  void reserve(int64_t n) {
    count = 0;
    if (n <= capacity) return;
    x.reset(new float[n + 2 * kWidth]);
    id.reset(new int32_t[n + 2 * kWidth]);
    through.reset(new double[n]);
    capacity = n;
  }
};

static float reduce_add_unordered(F a) {
  float lane[kWidth];
  store(lane, a);
  for (int n = kWidth / 2; n >= 1; n /= 2)
    for (int k = 0; k < n; ++k) lane[k] += lane[k + n];
  return lane[0];
}
static float reduce_min(F a) { return -reduce_max(negate(a)); }

struct Bracket {
  float low = -kInfinity;  // items at or below it are taken
  float high = kInfinity;  // the critical item is at or below it
  // Of items at `high`, where there is none between: those before a tile are taken, those from
  // another on lie beyond.
  int from = 0, to = kMaxTiles;
  double below = 0.0;  // mass of the items that are taken
  double error = 0.0;  // bound of what that is wrong by, and with it any sum of listed items
};

// ---- 1. a guess ------------------------------------------------------------------------------

constexpr int kBands = 512;
constexpr int kCopies = 4;  // of the counters: equal logits would wait for one another
constexpr int kSampleRun = 16, kSampleStep = 256;

// How many of the elements seen lie in each of kBands bands of equal width. Band 0 has what lies
// above its range, the last band what lies below.
class Bands {
 public:
  // Band k around origin - k step.
  Bands(float origin, float step) : origin_(origin), step_(step) {}
  void count(const float* x, int64_t n) {  // n: whole vectors
    const F origin = set1(origin_), scale = set1(1.0f / step_), magic = set1(0x1p23f);
    const F last = set1(static_cast<float>(kBands - 1)), zero = set1(0.0f);
    for (int64_t j = 0; j < n; j += kWidth) {
      const F place = min(max(mul(sub(origin, load(x + j)), scale), zero), last);
      int32_t band[kWidth];
      store(band, bits(add(place, magic)));
      for (int k = 0; k < kWidth; ++k)
        ++counts_[(band[k] & (kBands - 1)) * kCopies + (kWidth == 1 ? j : k) % kCopies];
    }
  }
  uint32_t in(int band) const {
    uint32_t sum = 0;
    for (int k = 0; k < kCopies; ++k) sum += counts_[band * kCopies + k];
    return sum;
  }
  float edge(int band) const {  // its upper one
    return band ? origin_ - (static_cast<float>(band) - 0.5f) * step_ : kInfinity;
  }

 private:
  float origin_, step_;
  uint32_t counts_[kBands * kCopies] = {};
};

constexpr double kDeviations = 3.5;
constexpr int kTied = 32;  // of the sample: fewer say little of what it missed, and are soon listed

// Narrows the bracket by bands, each of which stands for `share` of the row, so that the masses
// below it are known to some standard deviations (none where share is 1). False: no narrower.
static bool narrow_by_bands(const Bands& bands, float step, const Stats& s, double share,
                            double bound, double top_weight, Bracket* bracket, double* variance) {
  constexpr float kMargin = 0.0625f;  // of a band: what lies at its edge may be counted in either
  const double ratio = std::exp(static_cast<double>(step * s.inv_temperature));
  double weight = top_weight / std::pow(ratio, kBands - 1);  // of the middle of a band
  const double each = 1.0 / share;
  double mass = bracket->below, spread = *variance;
  int low = kBands, high = 0;
  double low_mass = mass, low_spread = spread;
  for (int band = kBands - 1; band >= 1 && !high; --band, weight *= ratio) {
    const double in = static_cast<double>(bands.in(band));
    const double one = share < 1.0 ? weight * each : 0.0;  // as if one more were there, unseen
    if (band < kBands - 1 || bracket->low == -kInfinity) {
      mass += in * (weight * each);
      spread += in * (one * one);
    }
    const double away = kDeviations * kDeviations * (spread + one * one);  // squared: no root
    const double room = bound - mass - mass * kRough, beyond = mass - mass * kRough - bound;
    if (room >= 0.0 && room * room >= away) {
      low = band;
      low_mass = mass;
      low_spread = spread;
    } else if (beyond > 0.0 && beyond * beyond > away) {
      high = band;
    }
  }
  const float old_low = bracket->low, old_high = bracket->high;
  if (low < kBands) {
    bracket->low = bands.edge(low) - step * kMargin;
    bracket->below = low_mass;
    *variance = low_spread;
  }
  if (high) bracket->high = bands.edge(high) + step * kMargin;
  return bracket->low > -kInfinity && bracket->high < kInfinity &&
         (bracket->low > old_low || bracket->high < old_high);
}

static int64_t sample_row(const Row& row, float* out) {
  int64_t n = 0;
  for (int64_t j = 0; j + kSampleRun <= row.vocab; j += kSampleStep, n += kSampleRun)
    load_raw(row.data, row.dtype, j, kSampleRun, out + n);
  return n;
}

// Where what the sample x has in the bracket is one logit: between which tiles its items are in
// question, as they stand in the order of their ids.
static void narrow_to_tiles(const float* x, int64_t n, const Stats& s, double share, double bound,
                            double variance, Bracket* bracket) {
  const F low = set1(bracket->low), high = set1(bracket->high);
  float tie = kNaN;
  int tied = 0;
  for (int64_t j = 0; j < n; j += kWidth) {
    const F value = load(x + j);
    const M inside = mask_and(less(low, value), less_equal(value, high));
    const uint32_t found = lanes(inside);
    if (!found) continue;
    if (!tied) tie = x[j + __builtin_ctz(found)];
    if (lanes(mask_and(inside, mask_not(equal(value, set1(tie)))))) return;
    tied += __builtin_popcount(found);
  }
  if (tied < kTied) return;
  const double each =
      static_cast<double>(exp_scalar(mul_rn(tie - s.max, s.inv_temperature))) / share;
  const double rank = (bound - bracket->below) / each;
  const double away =
      1.0 + kDeviations * std::sqrt(variance / (each * each) + (rank > 1.0 ? rank : 1.0));
  double earlier = 0.0;
  int to = 0;
  for (int64_t j = 0; j < n; j += kWidth) {
    const int tile = static_cast<int>(j / kSampleRun * kSampleStep / kTile);
    if (earlier <= rank - away) bracket->from = tile;
    if (earlier <= rank + away) to = tile + 1;
    earlier += __builtin_popcount(lanes(equal(load(x + j), set1(tie))));
  }
  if (earlier > rank + away) bracket->to = to;
  bracket->low = from_ordered_bits(ordered_bits(tie == 0.0f ? -0.0f : tie) - 1);
  bracket->high = tie;
}

// Bands of 1/12 nat to begin with: what is deeper than 42 nats is one band.
static float first_step(const Stats& s) { return (1.0f / 12.0f) / s.inv_temperature; }

// Of n elements those above `low` and at or below `high`, to `out`, padded to whole vectors with
// what is neither; how many, padding included.
static int64_t inside_of(const Bracket& bracket, const float* x, int64_t n, float* out) {
  const F low = set1(bracket.low), high = set1(bracket.high);
  int64_t count = 0;
  for (int64_t j = 0; j < n; j += kWidth) {
    const F value = load(x + j);
    const M inside = mask_and(less(low, value), less_equal(value, high));
    compress_store(out + count, inside, value);
    count += __builtin_popcount(lanes(inside));
  }
  store(out + count, set1(-kInfinity));
  return (count + kWidth - 1) / kWidth * kWidth;
}

static Bracket guess_by_sample(const Row& row, const Stats& s, double bound, Candidates* scratch) {
  float* const x = scratch->x.get();
  const int64_t n = sample_row(row, x);
  const double share = static_cast<double>(n) / static_cast<double>(row.vocab);
  Bracket bracket;
  double variance = 0.0;
  float step = first_step(s), origin = s.max + step;
  const float* counted = x;
  int64_t left = n;
  for (int round = 0; round < 3; ++round) {
    Bands bands(origin, step);
    bands.count(counted, left);
    const double top = static_cast<double>(exp_scalar(mul_rn(origin - s.max, s.inv_temperature)));
    if (!narrow_by_bands(bands, step, s, share, bound, top, &bracket, &variance)) break;
    const float width = bracket.high - bracket.low;
    if (width > step * (kBands / 16)) break;
    origin = bracket.high;
    step = width / (kBands - 3);
    if (!(origin - 0.125f * step < origin)) break;  // hardly more floats than bands
    left = inside_of(bracket, counted, left, x + n);
    counted = x + n;
  }
  narrow_to_tiles(x, n, s, share, bound, variance, &bracket);
  return bracket;
}

static Bracket guess_by_row(const Row& row, const Stats& s, double bound) {
  alignas(64) float scratch[kTile];
  const float step = first_step(s);
  Bands bands(s.max + step, step);
  for (int t = 0; t < s.tiles; ++t) {
    const Tile tile = load_tile(row, t, scratch);
    bands.count(tile.x, tile.count);
  }
  // A band's elements weigh as much as its middle's to within half its width.
  Bracket below, above;
  double none = 0.0;
  const double half = std::exp(0.5 * static_cast<double>(step * s.inv_temperature)) * 1.001;
  narrow_by_bands(bands, step, s, 1.0, bound, half * half * half, &below, &none);
  narrow_by_bands(bands, step, s, 1.0, bound, half, &above, &none);
  below.high = above.high;
  return below;
}

// ---- 2. the list -----------------------------------------------------------------------------

constexpr int kChain = 512;  // rough weights added up in float32: 3e-5 is their rounding
constexpr int kAdds = 64;    // of others in a lane, which round to less than this
constexpr double kAddsRounding = 0x1p-17;

// Lists what is inside the bracket; the mass of what lies below it or, where `kAbove`, above it:
// then most of a peaked row is one comparison. Rough, unless weights were kept.
template <bool kAbove, bool kWeights>
static double collect(const Row& row, const Stats& s, const Bracket& bracket, Candidates* list) {
  constexpr int kVectors = kWidth == 1   ? 1
                           : kWidth == 8 ? 2
                                         : 4;  // by the registers that there are
  constexpr int kNoted = kWidth == 8 ? 2 : 1;  // of them together
  constexpr int kStep = kVectors * kWidth;
  constexpr int kPart = kWeights ? kAdds * kStep : kChain;
  alignas(64) float scratch[kTile];
  const F octave = set1(per_octave(s.inv_temperature));
  double side = 0.0;
  float* to_x = list->x.get();
  int32_t* to_id = list->id.get();
  int64_t count = 0;
  for (int t = 0; t < s.tiles; ++t) {
    const float taken = t < bracket.from ? bracket.high : bracket.low;
    const float last = t < bracket.to ? bracket.high : bracket.low;
    if (s.tile_max[t] <= taken) {
      if (!kAbove) side += s.mass(t);
      continue;
    }
    const Tile tile = load_tile(row, t, scratch);
    const F m = set1(s.tile_max[t]), low = set1(taken), high = set1(last);
    int16_t at[kTile / (kNoted * kWidth)];  // where something is listed
    int some = 0;
    for (int part = 0; part < tile.count; part += kPart) {
      F sum[kVectors];
      for (int k = 0; k < kVectors; ++k) sum[k] = set1(0.0f);
      const int end = tile.count < part + kPart ? tile.count : part + kPart;
      for (int j = part; j < end; j += kStep) {
        F x[kVectors], w[kVectors];
        M above[kVectors], beyond[kVectors];
        for (int k = 0; k < kVectors; ++k) x[k] = load(tile.x + j + k * kWidth);
        for (int k = 0; k < kVectors; ++k) above[k] = less(low, x[k]);
        M any = above[0];
        for (int k = 1; k < kVectors; ++k) any = mask_or(any, above[k]);
        if (kAbove && !lanes(any)) continue;
        if constexpr (kWeights)
          for (int k = 0; k < kVectors; ++k) w[k] = load(s.kept(t) + j + k * kWidth);
        else
          rough_pack<kVectors>(tile.x + j, m, octave, w);
        for (int k = 0; k < kVectors; ++k) beyond[k] = less(high, x[k]);
        for (int k = 0; k < kVectors; ++k)
          sum[k] = add(sum[k], kAbove ? keep(beyond[k], w[k]) : drop(above[k], w[k]));
        for (int k = 0; k < kVectors; k += kNoted) {
          M listed = mask_and(above[k], mask_not(beyond[k]));
          for (int i = k + 1; i < k + kNoted; ++i)
            listed = mask_or(listed, mask_and(above[i], mask_not(beyond[i])));
          at[some] = static_cast<int16_t>(j + k * kWidth);
          some += lanes(listed) != 0;
        }
      }
      for (int k = 1; k < kVectors; ++k) sum[0] = add(sum[0], sum[k]);
      side += static_cast<double>(reduce_add_unordered(sum[0])) * s.scale[t];
    }
    for (int i = 0; i < some; ++i) {
      for (int j = at[i]; j < at[i] + kNoted * kWidth; j += kWidth) {
        const F x = load(tile.x + j);
        const M listed = mask_and(less(low, x), less_equal(x, high));
        const I id = add(iota(), set1i(t * kTile + j));
        const int found = __builtin_popcount(lanes(listed));
        if (found <= kFew) {
          compress_store_few(to_x + count, listed, x);
          compress_store_few(to_id + count, listed, id);
        } else {
          compress_store(to_x + count, listed, x);
          compress_store(to_id + count, listed, id);
        }
        count += found;
      }
    }
  }
  list->count = count;
  return side;
}

static double collect(bool above, const Row& row, const Stats& s, const Bracket& bracket,
                      Candidates* list) {
  if (s.weights)
    return above ? collect<true, true>(row, s, bracket, list)
                 : collect<false, true>(row, s, bracket, list);
  return above ? collect<true, false>(row, s, bracket, list)
               : collect<false, false>(row, s, bracket, list);
}

static double rough_weight(const Stats& s, float x) {
  float lane[kWidth], rough[kWidth];
  store(lane, set1(x));
  F w;
  rough_pack<1>(lane, set1(s.max), set1(per_octave(s.inv_temperature)), &w);
  store(rough, w);
  return static_cast<double>(rough[0]);
}

// Notes the least and the most of what is listed; its rough mass.
static double survey(const Stats& s, Candidates* listed) {
  Candidates& list = *listed;
  float* x = list.x.get();
  for (int k = 0; k < kWidth; ++k) x[list.count + k] = x[0];
  F smallest = set1(x[0]), largest = smallest;
  for (int64_t j = 0; j < list.count; j += kWidth) {
    smallest = min(load(x + j), smallest);
    largest = max(load(x + j), largest);
  }
  list.least = reduce_min(smallest);
  list.most = reduce_max(largest);
  if (list.least == list.most) return rough_weight(s, list.least) * static_cast<double>(list.count);
  for (int k = 0; k < kWidth; ++k) x[list.count + k] = -kInfinity;
  double mass = 0.0;
  for (int64_t begin = 0; begin < list.count; begin += kChain) {
    const int64_t end = list.count < begin + kChain ? list.count : begin + kChain;
    F sum = set1(0.0f), w;
    for (int64_t j = begin; j < end; j += kWidth) {
      rough_pack<1>(x + j, set1(s.max), set1(per_octave(s.inv_temperature)), &w);
      sum = add(sum, w);
    }
    mass += static_cast<double>(reduce_add_unordered(sum));
  }
  return mass;
}

// ---- 3. fewer --------------------------------------------------------------------------------

constexpr int kProbes = 8;

// mass[i] += rough sum of exp((x - reference) / T) over x <= probe[i].
static void probe_masses(const float* x, int64_t count, float reference, float inv_temperature,
                         const float* probe, double* mass) {
  const F m = set1(reference), octave = set1(per_octave(inv_temperature));
  F limit[kProbes], sum[kProbes];
  for (int i = 0; i < kProbes; ++i) {
    limit[i] = set1(probe[i]);
    sum[i] = set1(0.0f);
  }
  for (int64_t j = 0; j < count; j += kWidth) {
    F w;
    rough_pack<1>(x + j, m, octave, &w);
    const F value = load(x + j);
    for (int i = 0; i < kProbes; ++i) sum[i] = add(sum[i], keep(less_equal(value, limit[i]), w));
  }
  for (int i = 0; i < kProbes; ++i) mass[i] += static_cast<double>(reduce_add_unordered(sum[i]));
}

// Of the list, what lies above `low` and at or below `high`.
static void keep_between(float low, float high, Candidates* list) {
  float* x = list->x.get();
  int32_t* id = list->id.get();
  const F from = set1(low), to = set1(high), infinity = set1(kInfinity);
  F smallest = infinity, largest = negate(infinity);
  int64_t count = 0;
  for (int k = 0; k < kWidth; ++k) x[list->count + k] = kInfinity;
  for (int64_t j = 0; j < list->count; j += kWidth) {
    const F value = load(x + j);
    const I index = load_i(id + j);
    const M inside =
        mask_and(mask_and(less(from, value), less_equal(value, to)), less(value, infinity));
    compress_store(x + count, inside, value);
    compress_store(id + count, inside, index);
    count += __builtin_popcount(lanes(inside));
    smallest = min(select(inside, value, infinity), smallest);
    largest = max(select(inside, value, negate(infinity)), largest);
  }
  list->count = count;
  list->least = reduce_min(smallest);
  list->most = reduce_max(largest);
}

// Halves the list, at least, by eight probes between its least and its most. False: it could not.
static bool narrow_by_probes(const Stats& s, double bound, Bracket* bracket, Candidates* list) {
  const int64_t before = list->count;
  float* x = list->x.get();
  for (int k = 0; k < kWidth; ++k) x[before + k] = kInfinity;  // beyond every probe
  float probe[kProbes];
  double mass[kProbes] = {};
  for (int i = 0; i < kProbes; ++i)
    probe[i] =
        list->least + (list->most - list->least) * (static_cast<float>(i + 1) / (kProbes + 1));
  for (int64_t j = 0; j < before; j += kChain)
    probe_masses(x + j, before - j < kChain ? before - j : kChain, s.max, s.inv_temperature, probe,
                 mass);
  float low = -kInfinity, high = kInfinity;
  double below = 0.0;
  for (int i = 0; i < kProbes; ++i) {
    const double through = bracket->below + mass[i];
    if (through + bracket->error <= bound) {
      low = probe[i];
      below = mass[i];
    }
    if (through - bracket->error > bound && probe[i] < high) high = probe[i];
  }
  bracket->below += below;
  keep_between(low, high, list);
  return list->count <= before / 2;
}

// Where masses are too vague for probes: by S at the middle of the floats between least and most.
static void narrow_by_sum(const Row& row, const Stats& s, double bound, Bracket* bracket,
                          Candidates* list) {
  const int64_t least = ordered_bits(list->least), most = ordered_bits(list->most);
  const float middle = from_ordered_bits(static_cast<int32_t>((least + most) >> 1));
  const double sum = prefix_sum(row, s, {middle, kNoLimit});
  if (sum <= bound) {
    bracket->below = sum;
    keep_between(middle, kInfinity, list);
  } else {
    keep_between(-kInfinity, middle, list);
  }
}

// By rank, where all items have one logit: they stand in the order of their ids.
static void narrow_by_rank(double each, double bound, Bracket* bracket, Candidates* list) {
  const double rank = (bound - bracket->below) / each, vague = bracket->error / each + 2.0;
  const double end = static_cast<double>(list->count - 1);
  const auto inside = [end](double i) { return i < 0.0 ? 0.0 : i > end ? end : i; };
  const auto from = static_cast<int64_t>(inside(rank - vague));
  list->count = static_cast<int64_t>(inside(rank + vague)) - from + 1;
  const auto left = static_cast<size_t>(list->count);
  std::memmove(list->x.get(), list->x.get() + from, left * sizeof(float));
  std::memmove(list->id.get(), list->id.get() + from, left * sizeof(int32_t));
  bracket->below += static_cast<double>(from) * each;
}

// Shell's, by logit and id: lists are short, or nearly in order.
static void sort(Candidates* list) {
  float* x = list->x.get();
  int32_t* id = list->id.get();
  int64_t gap = 1;
  while (gap < list->count / 3) gap = 3 * gap + 1;
  for (; gap >= 1; gap /= 3)
    for (int64_t i = gap; i < list->count; ++i) {
      const float value = x[i];
      const int32_t index = id[i];
      const Cut cut = Cut::before(value, index);
      int64_t j = i;
      for (; j >= gap && !cut.admits(x[j - gap], id[j - gap]); j -= gap) {
        x[j] = x[j - gap];
        id[j] = id[j - gap];
      }
      x[j] = value;
      id[j] = index;
    }
}

// ---- 4. the critical item --------------------------------------------------------------------

// The first of the sorted list whose prefix passes the bound. Leaves `sum` at the cut
// through it, where it had to ask S at all.
static int64_t first_beyond(const Stats& s, double bound, const Bracket& bracket,
                            const Candidates& list, PrefixSum* sum) {
  const float* x = list.x.get();
  const int32_t* id = list.id.get();
  double* through = list.through.get();
  double mass = bracket.below;
  for (int64_t i = 0; i < list.count; ++i) {
    mass += static_cast<double>(exp_scalar((x[i] - s.max) * s.inv_temperature));
    through[i] = mass;
  }
  int64_t taken = -1, beyond = list.count - 1;
  while (taken + 1 < beyond && through[taken + 1] + bracket.error <= bound) ++taken;
  while (taken + 1 < beyond && through[beyond - 1] - bracket.error > bound) --beyond;
  int64_t at = 0;  // of `sum`
  const auto move_to = [&](int64_t i) {
    for (int64_t j = (i < at ? i : at) + 1; j <= (i < at ? at : i); ++j) sum->touch(id[j] / kTile);
    at = i;
    return sum->move(Cut::through(x[i], id[i]));
  };
  double shift = 0.0;
  for (int tries = 0; taken + 1 < beyond; ++tries) {
    int64_t guess = taken + 1;
    if (tries >= 4)
      guess = taken + (beyond - taken) / 2;
    else
      while (guess + 1 < beyond && through[guess + 1] + shift <= bound) ++guess;
    const double exact = move_to(guess);
    shift = exact - through[guess];
    if (exact <= bound)
      taken = guess;
    else
      beyond = guess;
  }
  if (sum->started()) move_to(beyond);
  return beyond;
}

// `sum`: where it has been started, it stands behind the critical item.
static KnapsackCut knapsack_cut(const Row& row, const Stats& s, double bound, PrefixSum* sum) {
  KnapsackCut cut;
  if (s.z <= bound) return cut;
  static thread_local Candidates list;
  list.reserve(row.vocab);
  const bool above = bound > s.z * 0x1p-4;
  Bracket bracket;
  for (int attempt = row.vocab < 2 * kTile ? 2 : 0; attempt < 3; ++attempt) {
    bracket = attempt == 0   ? guess_by_sample(row, s, bound, &list)
              : attempt == 1 ? guess_by_row(row, s, bound)
                             : Bracket{};
    const double side = collect(above, row, s, bracket, &list);
    if (!list.count) continue;
    const double inside = survey(s, &list);
    bracket.below = above ? s.z - side - inside : side;
    // S rounds what it adds up, and Z, of which the mass above was taken.
    bracket.error = side * (s.weights ? kAddsRounding : kRough) + inside * kRough +
                    (above ? 2.0 * s.z : side + inside) * 0x1p-18 + kVague;
    if ((bracket.low == -kInfinity || bracket.below + bracket.error <= bound) &&
        (bracket.high == kInfinity || bracket.below + inside - bracket.error > bound))
      break;
  }
  while (list.count > 48 && list.least < list.most && narrow_by_probes(s, bound, &bracket, &list)) {
  }
  while (list.count > 1024 && list.least < list.most) narrow_by_sum(row, s, bound, &bracket, &list);
  if (list.least == list.most)
    narrow_by_rank(rough_weight(s, list.least), bound, &bracket, &list);
  else
    sort(&list);
  const int64_t beyond = first_beyond(s, bound, bracket, list, sum);
  cut.critical = list.id[beyond];
  cut.x = list.x[beyond];
  return cut;
}

}  // namespace TTA_ISA
}  // namespace tta
