// Deferral rules on CPU rows: which tokens a rule defers, the deferred mass, and the policy pi.
// Included once per instruction set, after cpu/row.h and cpu/knapsack_cut.h.

namespace tta {
namespace TTA_ISA {

// The uniform of one decision about row b, `ahead` tokens after its position.
static double uniform(const KeySpec& key, int64_t b, int64_t ahead, Stream stream) {
  return philox_uniform(seed_bits(key.seed), 0, static_cast<uint32_t>(key.position[b] + ahead),
                        static_cast<uint32_t>(key.sequence[b]), key.word3(stream, b));
}

// The rows of one position and their statistics: at the sampling temperature, and at the rule's
// where that differs.
struct RowPair {
  Row base, proxy;
  bool same_temperature = true;
  bool keeps_weights = false;  // of the base, where there is one temperature: masked sums follow
  Stats base_stats, proxy_stats;
  Stats base_rule_stats, proxy_rule_stats;

  const Stats& base_rule() const { return same_temperature ? base_stats : base_rule_stats; }
  const Stats& proxy_rule() const { return same_temperature ? proxy_stats : proxy_rule_stats; }

  // False: a row that was read is invalid (already noted).
  bool read(const DeferralArgs& a, int64_t b, bool with_proxy, int64_t k = 0, int64_t number = -1) {
    same_temperature = a.rule.inv_temperature == a.rule.inv_rule_temperature;
    base = row_of(a.base, b, k);
    if (keeps_weights && same_temperature) base_stats.weights = room_for_weights(base.vocab);
    if (!row_stats(base, a.rule.inv_temperature, &base_stats, a.rule.inv_rule_temperature,
                   same_temperature ? nullptr : &base_rule_stats)) {
      a.invalid->note(number < 0 ? b : number, kBaseLogits);
      return false;
    }
    return !with_proxy || read_proxy(a, b, true, k, number);
  }

  bool read_proxy(const DeferralArgs& a, int64_t b, bool for_rule, int64_t k = 0,
                  int64_t number = -1) {
    proxy = row_of(a.proxy, b, k);
    if (!row_stats(proxy, a.rule.inv_temperature, &proxy_stats, a.rule.inv_rule_temperature,
                   same_temperature || !for_rule ? nullptr : &proxy_rule_stats)) {
      a.invalid->note(number < 0 ? b : number, kProxyLogits);
      return false;
    }
    return true;
  }
};

// A resolved rule: mu(v) = 1 exactly for the tokens the cut admits in the judging model's logits
// (or, `upper`, for those it does not), and `fraction` for the critical item.
struct Deferral {
  Cut cut = Cut::none();
  bool by_proxy = false;
  bool upper = false;
  int64_t critical = -1;
  float critical_x = kInfinity;
  double fraction = 0.0;  // of the critical item, for Critical::split
  double sum = -1.0;      // S(cut) at the rule's temperature, where it is known

  bool admits(float x, int64_t v) const { return cut.admits(x, v) != upper; }
  double mu(const RowPair& rows, int64_t v) const {
    if (admits(logit_at(by_proxy ? rows.proxy : rows.base, v), v)) return 1.0;
    return v == critical ? fraction : 0.0;
  }
};

// fl32 probabilities of one token at the sampling temperature.
TTA_INLINE float base_probability(const RowPair& rows, int64_t v) {
  return rows.base_stats.probability(logit_at(rows.base, v));
}
TTA_INLINE float proxy_probability(const RowPair& rows, int64_t v) {
  return rows.proxy_stats.probability(logit_at(rows.proxy, v));
}

// kWidth tokens from id `first` on, whose judging logits are x, in a tile of that mode.
template <int kMode>
TTA_INLINE M deferred_as(const Deferral& d, F x, int64_t first) {
  const M in = admitted<kMode>(x, set1(d.cut.x), add(iota(), set1i(static_cast<int32_t>(first))),
                               set1i(static_cast<int32_t>(d.cut.id)));
  return d.upper ? mask_not(in) : in;
}

// Whether any of kPair kWidth tokens is kept, the critical item among them.
template <int kMode>
TTA_INLINE bool keeps_any(const Deferral& d, const float* x, int64_t first) {
  M all = deferred_as<kMode>(d, load(x), first);
  for (int k = kWidth; k < kPair * kWidth; k += kWidth)
    all = mask_and(all, deferred_as<kMode>(d, load(x + k), first + k));
  return lanes(mask_not(all)) != 0;
}

// body(mode) with the tile's mode as a constant, so that loops inside need not ask for it.
template <class Body>
TTA_INLINE void with_mode(const Cut& cut, int t, Body body) {
  switch (mask_mode(cut, t)) {
    case kBelow:
      return body(std::integral_constant<int, kBelow>());
    case kAtOrBelow:
      return body(std::integral_constant<int, kAtOrBelow>());
    default:
      return body(std::integral_constant<int, kMixed>());
  }
}
TTA_INLINE M deferred_lanes(const Deferral& d, F x, int64_t first, int t) {
  switch (mask_mode(d.cut, t)) {
    case kBelow:
      return deferred_as<kBelow>(d, x, first);
    case kAtOrBelow:
      return deferred_as<kAtOrBelow>(d, x, first);
    default:
      return deferred_as<kMixed>(d, x, first);
  }
}

// Weight of one element as the canonical sum counts it.
static double canonical_weight(const Stats& s, float x, int64_t v) {
  const int t = static_cast<int>(v / kTile);
  return static_cast<double>(exp_scalar((x - s.tile_max[t]) * s.inv_temperature)) * s.scale[t];
}

// How much of the critical item fills the capacity; float32, so that what is reported is what is
// used.
static double split_fraction(const Stats& s, double bound, double before, float x, int64_t v) {
  const double part = (bound - before) / canonical_weight(s, x, v);
  return static_cast<double>(static_cast<float>(part < 0.0 ? 0.0 : part > 1.0 ? 1.0 : part));
}

// Of a tile: short loops over it, each with its constants in registers, find it in L1.
constexpr int kPart = 1024;

// The total variation of p and q to within kRoughDistance, at half the cost. Not inlined, nor is
// the other: their arrays would widen the frames of all rules.
constexpr double kRoughDistance = 4.0 * kRough;  // p and q add up to 1, and sums round
TTA_NOINLINE static double rough_total_variation(const RowPair& rows) {
  alignas(64) float base_scratch[kPart], proxy_scratch[kPart];
  const Stats &p = rows.base_rule(), &q = rows.proxy_rule();
  const F p_max = set1(p.max), q_max = set1(q.max);
  const F octave = set1(per_octave(p.inv_temperature));
  constexpr float kScale = 0x1p24f;  // or the least weights would give subnormals, which are slow
  const F p_each = set1(kScale * p.max_probability()), q_each = set1(kScale * q.max_probability());
  double total = 0.0;
  for (int64_t begin = 0; begin < rows.base.vocab; begin += kPart) {
    const Tile base = load_part(rows.base, begin, kPart, base_scratch);
    const Tile proxy = load_part(rows.proxy, begin, kPart, proxy_scratch);
    F acc[kPack];
    for (int k = 0; k < kPack; ++k) acc[k] = set1(0.0f);
    for (int j = 0; j < base.count; j += kPack * kWidth) {
      F w[kPack], v[kPack];
      rough_pack<kPack>(base.x + j, p_max, octave, w);
      rough_pack<kPack>(proxy.x + j, q_max, octave, v);
      for (int k = 0; k < kPack; ++k)
        acc[k] = add(acc[k], max(sub(mul(w[k], p_each), mul(v[k], q_each)), set1(0.0f)));
    }
    for (int k = 0; k < kPack; ++k) total += static_cast<double>(reduce_add_unordered(acc[k]));
  }
  return total / static_cast<double>(kScale);
}

// The total variation of p and q, sum max(p - q, 0), at the rule's temperature: p and q rounded to
// float32, then their difference.
TTA_NOINLINE static double total_variation(const RowPair& rows) {
  alignas(64) float base_scratch[kTile], proxy_scratch[kTile], p[kTile], q[kTile];
  double total = 0.0;
  for (int t = 0; t < rows.base.tiles(); ++t) {
    const Tile base = load_tile(rows.base, t, base_scratch);
    write_probabilities(base, rows.base_rule(), p);
    write_probabilities(load_tile(rows.proxy, t, proxy_scratch), rows.proxy_rule(), q);
    F acc[kAcc];
    for (int k = 0; k < kAcc; ++k) acc[k] = set1(0.0f);
    for (int j = 0; j < base.count; j += kLanes)
      for (int k = 0; k < kAcc; ++k)
        acc[k] =
            add(acc[k], max(sub(load(p + j + k * kWidth), load(q + j + k * kWidth)), set1(0.0f)));
    total += static_cast<double>(fold(acc));
  }
  return total;
}

// The test of any rule but the knapsack. A threshold rises or falls with the distance throughout,
// so that what two distances agree on holds between them.
static RuleTest test_of(const RuleSpec& rule, int64_t b, const RowPair& rows) {
  bool asked = false;
  const auto test = [&](auto distance) {
    return RuleTest::of(rule.rule, rule.param[b], rows.base_rule(), rows.proxy_rule(), [&] {
      asked = true;
      return distance();
    });
  };
  double rough = 0.0;
  const RuleTest least = test([&] {
    rough = rough_total_variation(rows);
    return rough > kRoughDistance ? rough - kRoughDistance : 0.0;
  });
  if (!asked || test([&] { return rough + kRoughDistance; }) == least) return least;
  return test([&] { return total_variation(rows); });
}

static bool resolve(const RuleSpec& rule, int64_t b, const RowPair& rows, Deferral* d) {
  if (!rule.valid_param(b)) return false;
  const double param = rule.param[b];
  const Stats& p = rows.base_rule();
  const Stats& q = rows.proxy_rule();
  if (rule.rule != kKnapsack) {
    const RuleTest test = test_of(rule, b, rows);
    d->by_proxy = test.by_proxy;
    d->upper = test.above;
    d->cut = below_probability(test.by_proxy ? q : p, test.threshold, test.above);
    return true;
  }
  const double bound = param * p.z;
  PrefixSum sum(rows.base, p);
  const KnapsackCut cut = knapsack_cut(rows.base, p, bound, &sum);
  d->cut = cut.taken();
  d->critical = cut.critical;
  d->critical_x = cut.x;
  if (cut.critical < 0) return true;
  if (rule.critical == kInclude)
    d->cut = Cut::through(cut.x, cut.critical);
  else
    sum.touch(cut.critical / kTile);
  if (sum.started() || rule.critical == kSplitItem) d->sum = sum.move(d->cut);
  if (rule.critical == kSplitItem)
    d->fraction = split_fraction(p, bound, d->sum, cut.x, cut.critical);
  return true;
}

// Whether a drawn v is deferred; the set is not built. `coin` supplies the critical item's uniform.
template <class Coin>
static bool judge(const RuleSpec& rule, int64_t b, const RowPair& rows, int64_t v, Coin coin) {
  const double param = rule.param[b];
  const Stats& p = rows.base_rule();
  const Stats& q = rows.proxy_rule();
  if (rule.rule != kKnapsack) {
    const RuleTest test = test_of(rule, b, rows);
    return test.defers(test.by_proxy ? q.probability(logit_at(rows.proxy, v))
                                     : p.probability(logit_at(rows.base, v)));
  }
  const float x = logit_at(rows.base, v);
  const double bound = param * p.z;
  if (rule.critical == kInclude) return prefix_at_most(rows.base, p, Cut::before(x, v), bound);
  if (prefix_at_most(rows.base, p, Cut::through(x, v), bound)) return true;
  if (rule.critical == kExclude) return false;
  const Cut before = Cut::before(x, v);
  if (!prefix_at_most(rows.base, p, before, bound)) return false;
  return coin() < split_fraction(p, bound, prefix_sum(rows.base, p, before), x, v);
}

// ---- masses ----------------------------------------------------------------------------------

// Canonical sum of the base weights of the tokens a rule defers, or of those it keeps; the critical
// item counts as kept. The general form: prefix_sum is the quick one for what a cut defers.
template <bool kWeights>
static double judged_sum_as(const RowPair& rows, const Stats& s, const Deferral& d, bool kept) {
  alignas(64) float base_scratch[kTile];
  alignas(64) float proxy_scratch[kTile];
  double total = 0.0;
  for (int t = 0; t < s.tiles; ++t) {
    if (s.scale[t] == 0.0) continue;
    if (kept && !d.by_proxy && tile_before(s, t, d.cut)) continue;
    const Tile base = load_tile(rows.base, t, base_scratch);
    const Tile judged = d.by_proxy ? load_tile(rows.proxy, t, proxy_scratch) : base;
    const F m = set1(s.tile_max[t]), inv = set1(s.inv_temperature);
    const int64_t begin = static_cast<int64_t>(t) * kTile;
    F acc[kAcc];
    for (int k = 0; k < kAcc; ++k) acc[k] = set1(0.0f);
    for (int j = 0; j < base.count; j += kLanes) {
      for (int k = 0; k < kAcc; ++k) {
        const int i = j + k * kWidth;
        const M deferred = deferred_lanes(d, load(judged.x + i), begin + i, t);
        const M in = kept ? mask_not(deferred) : deferred;
        F w;
        if constexpr (kWeights)
          w = load(s.kept(t) + i);
        else
          w = weight(load(base.x + i), m, inv);
        acc[k] = add(acc[k], keep(in, w));
      }
    }
    total += static_cast<double>(fold(acc)) * s.scale[t];
  }
  return total;
}
static double judged_sum(const RowPair& rows, const Stats& s, const Deferral& d, bool kept) {
  return s.weights ? judged_sum_as<true>(rows, s, d, kept) : judged_sum_as<false>(rows, s, d, kept);
}

// sum_v mu(v) p(v) with p at the temperature of `s` (statistics of the base row).
static double mass_at(const RowPair& rows, const Deferral& d, const Stats& s) {
  double sum = d.by_proxy                                ? judged_sum(rows, s, d, false)
               : d.sum >= 0.0 && &s == &rows.base_rule() ? d.sum
                                                         : prefix_sum(rows.base, s, d.cut);
  if (d.fraction > 0.0) sum += d.fraction * canonical_weight(s, d.critical_x, d.critical);
  return sum / s.z;
}

static double deferred_mass(const RowPair& rows, const Deferral& d) {
  return mass_at(rows, d, rows.base_stats);
}

// 1 - D, added up from the kept tokens themselves.
static double kept_mass(const RowPair& rows, const Deferral& d) {
  const Stats& s = rows.base_stats;
  double sum = judged_sum(rows, s, d, true);
  if (d.fraction > 0.0) sum -= d.fraction * canonical_weight(s, d.critical_x, d.critical);
  return sum / s.z;
}

// ---- the policy --------------------------------------------------------------------------------

// pi(v) = (1 - mu(v)) p(v) + q(v) D, one tile at a time: p and q rounded to float32, then mul and
// add in float64, rounded once.
class PolicyTile {
 public:
  PolicyTile(const RowPair& rows, const Deferral& d, double mass)
      : rows_(rows), d_(d), mass_(mass) {}

  // Writes a whole (padded) tile of pi.
  void write(int t, float* out) const {
    const int64_t first = static_cast<int64_t>(t) * kTile;
    const int64_t end = first + kTile < rows_.base.vocab ? first + kTile : rows_.base.vocab;
    with_mode(d_.cut, t, [&](auto mode) {
      for (int64_t begin = first; begin < end; begin += kPart)
        write_part<mode>(begin, out + (begin - first));
    });
    if (d_.fraction > 0.0 && d_.critical / kTile == t) {
      const double kept =
          (1.0 - d_.fraction) * static_cast<double>(base_probability(rows_, d_.critical));
      const double from_proxy = static_cast<double>(proxy_probability(rows_, d_.critical)) * mass_;
      out[d_.critical - first] = static_cast<float>(kept + from_proxy);
    }
  }

  // Argmax of pi as written, ties to the lowest id.
  int64_t argmax() const {
    alignas(64) float tile[kTile];
    float best = -1.0f;
    int64_t best_id = 0;
    for (int t = 0; t < rows_.base.tiles(); ++t) {
      write(t, tile);
      const int64_t begin = static_cast<int64_t>(t) * kTile;
      const int64_t left = rows_.base.vocab - begin;
      const int count = left < kTile ? static_cast<int>(left) : kTile;
      const int padded = (count + kLanes - 1) / kLanes * kLanes;
      const float top = tile_max({tile, padded});  // padding holds pi = 0
      if (!(top > best)) continue;
      best = top;
      for (int j = 0; j < count; ++j) {
        if (tile[j] == top) {
          best_id = begin + j;
          break;
        }
      }
    }
    return best_id;
  }

 private:
  template <int kMode>
  void write_part(int64_t begin, float* out) const {
    alignas(64) float base_scratch[kPart], proxy_scratch[kPart], moved[kPart];
    const Tile base = load_part(rows_.base, begin, kPart, base_scratch);
    const Tile proxy = load_part(rows_.proxy, begin, kPart, proxy_scratch);
    const Deferral d = d_;  // what is stored might lie in another's
    const float* judged = d.by_proxy ? proxy.x : base.x;
    const auto keeps = [&](int j) { return keeps_any<kMode>(d, judged + j, begin + j); };
    const auto deferred = [&](int j) { return deferred_as<kMode>(d, load(judged + j), begin + j); };
    write_probabilities(base, rows_.base_stats, keeps, out);
    if (!(mass_ > 0.0)) {
      for (int j = 0; j < base.count; j += kWidth) store(out + j, drop(deferred(j), load(out + j)));
      return;
    }
    write_probabilities(proxy, rows_.proxy_stats, moved);
    const D mass = set1d(mass_);
    for (int j = 0; j < base.count; j += kWidth)
      store_narrow(out + j,
                   add(load_wide_unless(deferred(j), out + j), mul(load_wide(moved + j), mass)));
  }

  const RowPair& rows_;
  const Deferral& d_;
  double mass_;
};

// Lowest id whose logit equals `value`, which is some tile's maximum.
static int64_t first_of_value(const Row& row, const Stats& s, float value) {
  alignas(64) float scratch[kTile];
  for (int t = 0; t < s.tiles; ++t) {
    if (s.tile_max[t] != value) continue;
    const Tile tile = load_tile(row, t, scratch);
    for (int j = 0; j < tile.count; ++j)
      if (tile.x[j] == value) return static_cast<int64_t>(t) * kTile + j;
  }
  return -1;
}

struct KeptBest {
  int64_t id = -1;      // most probable kept token, lowest id
  float first = 0.0f;   // its (1 - mu) p
  double second = 0.0;  // the next kept token's
};

// Rules that look at p alone keep an upper set: its best tokens are the row's largest logits.
static KeptBest best_kept(const RowPair& rows, const Deferral& d) {
  const Stats& s = rows.base_stats;
  alignas(64) float scratch[kTile];
  alignas(64) float kept[kTile];
  KeptBest best;
  float top = -kInfinity, next = -kInfinity;
  for (int t = 0; t < s.tiles; ++t) {
    if (s.tile_max[t] < next || tile_before(s, t, d.cut)) continue;
    const Tile tile = load_tile(rows.base, t, scratch);
    const int64_t begin = static_cast<int64_t>(t) * kTile;
    for (int j = 0; j < tile.count; j += kWidth) {
      const F x = load(tile.x + j);
      store(kept + j, select(deferred_lanes(d, x, begin + j, t), set1(-kInfinity), x));
    }
    if (d.fraction > 0.0 && d.critical / kTile == t) kept[d.critical - begin] = -kInfinity;
    for (int j = 0; j < tile.count; ++j) {
      if (kept[j] > top) {
        next = top;
        top = kept[j];
        best.id = begin + j;
      } else if (kept[j] > next) {
        next = kept[j];
      }
    }
  }
  if (best.id >= 0) best.first = s.probability(top);
  if (next != -kInfinity) best.second = static_cast<double>(s.probability(next));
  if (d.fraction > 0.0) {  // the critical item keeps a part of its p, less than any kept token's
    const double part = (1.0 - d.fraction) * static_cast<double>(s.probability(d.critical_x));
    if (best.id < 0) {
      best.id = d.critical;
      best.first = static_cast<float>(part);
    } else if (part > best.second) {
      best.second = part;
    }
  }
  return best;
}

// Greedy choice without q: the most probable kept token, and whether q could still change it. pi of
// any other token is at most fl32(second best kept p + D), pi of this one at least its p. Logits
// may differ where the float32 p do not, so that with D = 0 too the lead must be one of p.
static int64_t propose_greedy(const RowPair& rows, const Deferral& d, double mass,
                              bool* needs_proxy) {
  const KeptBest best = best_kept(rows, d);
  *needs_proxy = best.id < 0 || !(static_cast<float>(best.second + mass) < best.first);
  return best.id < 0 ? first_of_value(rows.base, rows.base_stats, rows.base_stats.max) : best.id;
}

TTA_INLINE void write_bools(bool* out, uint32_t bits, int count) {
#if TTA_ISA_LEVEL >= 1
  if (count == kWidth) {
    for (int k = 0; k < kWidth; k += 8) {
      const uint64_t bytes = _pdep_u64(bits >> k, 0x0101010101010101ull);
      std::memcpy(out + k, &bytes, 8);
    }
    return;
  }
#endif
  for (int k = 0; k < count; ++k) out[k] = (bits >> k) & 1u;
}

}  // namespace TTA_ISA
}  // namespace tta
