// The cut of the greedy knapsack over a row: its critical item, found without sorting.
// Included once per instruction set, after cpu/row.h.
//
// 1. An eighth of the row is probed: the mass below eight logits, which brackets the cut.
// 2. One pass adds up the mass below the bracket and compacts its items (logit, id). Where the sum
//    shows that the sample misled, the whole row is probed and the pass repeated.
// 3. The list is probed and compacted again while that shortens it, then bisected.
// Approximate masses answer wherever they clear the capacity by more than their error bound;
// otherwise the canonical sum S of the candidate decides, so the result is the one the definition
// gives, whatever the sample and the approximations were.
// Bytes: about 1.1 row reads after row_stats, plus the tiles an ambiguous candidate touches.

namespace tta {
namespace TTA_ISA {

struct KnapsackCut {
  int64_t critical = -1;  // -1: everything is taken
  float x = kInfinity;    // its logit
  Cut taken() const { return critical < 0 ? Cut::all() : Cut::before(x, critical); }
};

constexpr int kProbes = 8;

// Per-thread candidate list; grows to the largest row seen.
struct Candidates {
  std::unique_ptr<float[]> x;
  std::unique_ptr<int32_t[]> id;
  int64_t capacity = 0;
  int64_t count = 0;
  void reserve(int64_t n) {
    count = 0;
    if (n <= capacity) return;
    x.reset(new float[n + 2 * kWidth]);
    id.reset(new int32_t[n + 2 * kWidth]);
    capacity = n;
  }
  void append(M m, F value, I index) {
    compress_store(x.get() + count, m, value);
    compress_store(id.get() + count, m, index);
    count += __builtin_popcount(lanes(m));
  }
};

static float reduce_add_unordered(F a) {
  float lane[kWidth], total = 0.0f;
  store(lane, a);
  for (int k = 0; k < kWidth; ++k) total += lane[k];
  return total;
}

// mass[i] += sum of exp((x - reference) / T) over x <= probe[i].
static void probe_masses(const float* x, int64_t count, float reference, float inv_temperature,
                         const float* probe, double scale, double* mass) {
  const F m = set1(reference), inv = set1(inv_temperature);
  F limit[kProbes], sum[kProbes];
  for (int i = 0; i < kProbes; ++i) {
    limit[i] = set1(probe[i]);
    sum[i] = set1(0.0f);
  }
  int64_t j = 0;
  for (; j + kPack * kWidth <= count; j += kPack * kWidth) {
    F w[kPack];
    weight_pack<kPack>(x + j, m, inv, w);
    for (int k = 0; k < kPack; ++k) {
      const F value = load(x + j + k * kWidth);
      for (int i = 0; i < kProbes; ++i)
        sum[i] = add(sum[i], keep(less_equal(value, limit[i]), w[k]));
    }
  }
  for (; j < count; j += kWidth) {
    const F value = load(x + j);
    const F w = weight(value, m, inv);
    for (int i = 0; i < kProbes; ++i) sum[i] = add(sum[i], keep(less_equal(value, limit[i]), w));
  }
  for (int i = 0; i < kProbes; ++i)
    mass[i] += static_cast<double>(reduce_add_unordered(sum[i])) * scale;
}

struct Bracket {
  float low = -kInfinity;  // items at or below it are taken
  float high = kInfinity;  // the critical item is at or below it
  double below = 0.0;      // approximate mass of the items at or below `low`
};

// Tightens the bracket by eight probed masses. Ambiguous probes (within `slack`) tighten nothing.
static void tighten(Bracket* b, const float* probe, const double* mass, double bound,
                    double slack) {
  const double below = b->below;
  for (int i = 0; i < kProbes; ++i) {
    if (below + mass[i] <= bound - slack && probe[i] >= b->low) {
      b->low = probe[i];
      b->below = below + mass[i];
    }
  }
  for (int i = kProbes - 1; i >= 0; --i)
    if (below + mass[i] > bound + slack && probe[i] < b->high) b->high = probe[i];
}

constexpr int kSampled = 8;  // one element in so many is probed first

// Masses below the probes over the first 1/fraction of every tile.
static void probe_row(const Row& row, const Stats& s, int fraction, const float* probe,
                      double* mass) {
  alignas(64) float scratch[kTile];
  for (int t = 0; t < s.tiles; ++t) {
    if (s.scale[t] == 0.0) continue;
    const Tile tile = load_tile(row, t, scratch);
    const int count = fraction == 1 || tile.count < kTile ? tile.count : kTile / fraction;
    probe_masses(tile.x, count, s.tile_max[t], s.inv_temperature, probe, s.scale[t], mass);
  }
}

// Lists the items inside the bracket, sets bracket->below, returns the mass inside.
static double collect(const Row& row, const Stats& s, Bracket* bracket, Candidates* list) {
  alignas(64) float scratch[kTile];
  const F low = set1(bracket->low), high = set1(bracket->high), inv = set1(s.inv_temperature);
  double below = 0.0, inside = 0.0;
  list->count = 0;
  for (int t = 0; t < s.tiles; ++t) {
    if (s.tile_max[t] <= bracket->low) {
      below += s.mass(t);
      continue;
    }
    const Tile tile = load_tile(row, t, scratch);
    const int32_t begin = t * kTile;
    const F m = set1(s.tile_max[t]);
    F under = set1(0.0f), in = set1(0.0f);
    for (int j = 0; j < tile.count; j += kPack * kWidth) {
      F w[kPack];
      weight_pack<kPack>(tile.x + j, m, inv, w);
      for (int k = 0; k < kPack; ++k) {
        const F x = load(tile.x + j + k * kWidth);
        const M above = less(low, x), listed = mask_and(above, less_equal(x, high));
        under = add(under, keep(mask_not(above), w[k]));
        if (!lanes(listed)) continue;
        in = add(in, keep(listed, w[k]));
        list->append(listed, x, add(iota(), set1i(begin + j + k * kWidth)));
      }
    }
    below += static_cast<double>(reduce_add_unordered(under)) * s.scale[t];
    inside += static_cast<double>(reduce_add_unordered(in)) * s.scale[t];
  }
  bracket->below = below;
  return inside;
}

static KnapsackCut knapsack_cut(const Row& row, const Stats& s, double bound) {
  KnapsackCut cut;
  if (s.z <= bound) return cut;
  // Twice the worst error of the longest float32 chain in probe_masses and collect.
  const double slack = s.z * (kTile / kWidth) * 0x1p-23;

  // 1. Probe where the mass of a peaked row lies; distances in units of the temperature.
  static const float kDepth[kProbes] = {-20.f, -15.f, -12.f, -10.f, -8.f, -6.f, -4.f, -2.f};
  float probe[kProbes];
  for (int i = 0; i < kProbes; ++i) probe[i] = s.max + kDepth[i] / s.inv_temperature;
  Bracket bracket;
  static thread_local Candidates list;
  list.reserve(row.vocab);
  bool guessed = row.vocab >= 4 * kTile;
  if (guessed) {
    double mass[kProbes] = {};
    probe_row(row, s, kSampled, probe, mass);
    for (int i = 0; i < kProbes; ++i)
      if (mass[i] * kSampled <= 0.75 * bound) bracket.low = probe[i];
    for (int i = kProbes - 1; i >= 0; --i)
      if (mass[i] * kSampled >= 1.5 * bound) bracket.high = probe[i];
    // 2. The guess is kept if the exact masses confirm it.
    const double inside = collect(row, s, &bracket, &list);
    guessed = bracket.low < bracket.high && bracket.below <= bound - slack &&
              (bracket.high == kInfinity || bracket.below + inside > bound + slack);
  }
  if (!guessed) {
    double mass[kProbes] = {};
    bracket = Bracket{};
    probe_row(row, s, 1, probe, mass);
    tighten(&bracket, probe, mass, bound, slack);
    collect(row, s, &bracket, &list);
  }

  // 3. Narrow the list while that at least halves it.
  double mass[kProbes];
  while (list.count > 64) {
    const int64_t before = list.count;
    float* x = list.x.get();
    int32_t* id = list.id.get();
    for (int k = 0; k < kWidth; ++k) x[before + k] = kInfinity;  // padding: beyond every probe
    F smallest = set1(kInfinity), negated = set1(kInfinity);
    for (int64_t j = 0; j < before; j += kWidth) {
      const F value = load(x + j);
      smallest = min(value, smallest);
      negated = min(select(less(value, set1(kInfinity)), sub(set1(0.0f), value), negated), negated);
    }
    const float low = -reduce_max(sub(set1(0.0f), smallest));
    const float high = reduce_max(sub(set1(0.0f), negated));
    for (int i = 0; i < kProbes; ++i) {
      probe[i] = low + (high - low) * (static_cast<float>(i + 1) / (kProbes + 1));
      mass[i] = 0.0;
    }
    for (int64_t j = 0; j < before; j += kTile) {
      const int64_t count = before - j < kTile ? before - j : kTile;
      probe_masses(x + j, count, s.max, s.inv_temperature, probe, 1.0, mass);
    }
    tighten(&bracket, probe, mass, bound, slack);
    list.count = 0;
    const F from = set1(bracket.low), to = set1(bracket.high);
    for (int64_t j = 0; j < before; j += kWidth) {
      const F value = load(x + j);
      const I index = load_i(id + j);
      const M inside = mask_and(mask_and(less(from, value), less_equal(value, to)),
                                less(value, set1(kInfinity)));
      list.append(inside, value, index);
    }
    if (list.count > before / 2) break;
  }

  // 3. Bisect: every step drops at least the pivot.
  double below = bracket.below;
  while (list.count) {
    float* x = list.x.get();
    int32_t* id = list.id.get();
    const int64_t n = list.count;
    for (int k = 0; k < kWidth; ++k) x[n + k] = kInfinity;
    const float pivot = x[n / 2];
    const int32_t pivot_id = id[n / 2];
    const F px = set1(pivot), m = set1(s.max), inv = set1(s.inv_temperature);
    const I limit = set1i(pivot_id + 1);
    D sum = set1d(0.0);
    for (int64_t j = 0; j < n; j += kWidth) {
      const F value = load(x + j);
      sum = add(sum, widen(keep(admitted<kMixed>(value, px, load_i(id + j), limit),
                                weight(value, m, inv))));
    }
    const double through = below + sum_exact(sum);
    bool taken;
    if (through <= bound - slack)
      taken = true;
    else if (through > bound + slack)
      taken = false;
    else
      taken = prefix_at_most(row, s, Cut::through(pivot, pivot_id), bound);
    if (taken) {
      below = through;
    } else {
      cut.critical = pivot_id;
      cut.x = pivot;
    }
    list.count = 0;
    for (int64_t j = 0; j < n; j += kWidth) {
      const F value = load(x + j);
      const I index = load_i(id + j);
      const M at_or_before = admitted<kMixed>(value, px, index, limit);
      const M same = mask_and(equal(value, px), equal(index, set1i(pivot_id)));
      const M stays =
          mask_and(taken ? mask_not(at_or_before) : mask_and(at_or_before, mask_not(same)),
                   less(value, set1(kInfinity)));
      list.append(stays, value, index);
    }
  }
  return cut;
}

}  // namespace TTA_ISA
}  // namespace tta
