// The row kernels against their definitions, on every instruction set: canonical sums, the cut of
// the greedy knapsack, inverse-CDF draws, probabilities and the sets below a probability.

#include "testing/naive.h"

namespace tta {
namespace testing {
namespace {

constexpr double kLargest = std::numeric_limits<double>::max();

double up(double x) { return std::nextafter(x, kLargest); }
double down(double x) { return std::nextafter(x, -kLargest); }

struct Case {
  const char* what;
  const TestRow& row;
  const Naive& naive;
  const Functions& f;
};

#define CASE_FORMAT "%s, %s, V %d, dtype %d, 1/T %g: "
#define CASE_VALUES(c)                                                    \
  (c).f.name, (c).what, static_cast<int>((c).row.vocab()), (c).row.dtype, \
      static_cast<double>((c).row.inv_temperature)

void check_stats(const Case& c) {
  RowStats s;
  c.f.stats(c.row.view(), &s);
  CHECK(s.valid && s.tiles == c.naive.tiles(), CASE_FORMAT "valid %d, %d tiles", CASE_VALUES(c),
        s.valid, s.tiles);
  CHECK(s.max == c.naive.max(), CASE_FORMAT "max %a", CASE_VALUES(c), s.max);
  CHECK(s.z == c.naive.z(), CASE_FORMAT "Z %a, want %a", CASE_VALUES(c), s.z, c.naive.z());
  for (int t = 0; t < c.naive.tiles(); ++t) {
    const float sum = c.naive.tile_sum(t, [](int64_t) { return true; });
    CHECK(s.tile_max[t] == c.naive.tile_max(t) && s.tile_sum[t] == sum &&
              s.scale[t] == c.naive.scale(t),
          CASE_FORMAT "tile %d: max %a, sum %a, scale %a; want %a, %a, %a", CASE_VALUES(c), t,
          s.tile_max[t], s.tile_sum[t], s.scale[t], c.naive.tile_max(t), sum, c.naive.scale(t));
  }
}

// Cuts before and through items, between items, in the middle of ties, and beyond both ends.
std::vector<CutView> some_cuts(const TestRow& row, int count, Random* random) {
  std::vector<CutView> cuts = {{kInf, std::numeric_limits<int64_t>::max()}, {-kInf, 0}};
  for (int i = 0; i < count; ++i) {
    const int64_t v = random->below(row.vocab());
    const float x = row.x[v];
    cuts.push_back({x, v});
    cuts.push_back({x, v + 1});
    cuts.push_back({x, random->below(row.vocab() + 1)});
    cuts.push_back({x + static_cast<float>(random->uniform()), random->below(row.vocab() + 1)});
  }
  return cuts;
}

void check_prefix_sums(const Case& c, int count, Random* random) {
  std::vector<CutView> cut, many;
  std::vector<double> want, bound;
  for (const CutView& one : some_cuts(c.row, count, random)) {
    cut.push_back(one);
    want.push_back(c.naive.prefix_sum(one));
    const double s = want.back();
    for (const double b : {s, up(s), down(s), s * (1.0 + 0x1p-20), s * (1.0 - 0x1p-20), 0.0, 1e-300,
                           c.naive.z() * 1e-15, c.naive.z() * random->uniform(), c.naive.z()}) {
      many.push_back(one);
      bound.push_back(b);
    }
  }
  std::vector<double> got(cut.size());
  c.f.prefix_sum(c.row.view(), cut.data(), static_cast<int64_t>(cut.size()), got.data());
  for (size_t i = 0; i < cut.size(); ++i)
    CHECK(got[i] == want[i], CASE_FORMAT "S before (%a, %" PRId64 ") = %a, want %a", CASE_VALUES(c),
          cut[i].x, cut[i].id, got[i], want[i]);
  const std::unique_ptr<bool[]> within(new bool[many.size()]);
  c.f.prefix_at_most(c.row.view(), many.data(), bound.data(), static_cast<int64_t>(many.size()),
                     within.get());
  for (size_t i = 0; i < many.size(); ++i)
    CHECK(within[i] == (want[i / 10] <= bound[i]),
          CASE_FORMAT "S before (%a, %" PRId64 ") <= %a: %d, but S = %a", CASE_VALUES(c), many[i].x,
          many[i].id, bound[i], within[i], want[i / 10]);
}

void check_knapsack_cut(const Case& c, const std::vector<int64_t>& order,
                        const std::vector<double>& s, int count, Random* random) {
  const double z = c.naive.z();
  std::vector<double> bound;
  for (const double budget : {0.0, 1e-30, 1e-15, 1e-9, 1e-5, 0.003, 0.05, 0.3, 0.5, 0.8, 0.97,
                              1.0 - 1e-6, 1.0 - 1e-12, 1.0 - 0x1p-53, 1.0, 2.0})
    bound.push_back(budget * z);
  // A row's fixed bounds take turns where questions are dear.
  if (count < 4) {
    std::vector<double> some;
    for (size_t i = static_cast<size_t>(random->below(4)); i < bound.size(); i += 4)
      some.push_back(bound[i]);
    bound.swap(some);
  }
  for (int i = 0; i < count; ++i) {
    const double exact = s[random->below(static_cast<int64_t>(s.size()))];
    bound.insert(bound.end(), {exact, up(exact), down(exact), exact * (1.0 - 0x1p-18)});
    bound.push_back(random->uniform() * z);
  }
  for (double& b : bound) b = std::max(b, 0.0);
  std::vector<CriticalItem> got(bound.size());
  c.f.knapsack_cut(c.row.view(), bound.data(), static_cast<int64_t>(bound.size()), got.data());
  for (size_t i = 0; i < bound.size(); ++i) {
    const size_t at =
        std::find_if(s.begin(), s.end(), [&](double x) { return x > bound[i]; }) - s.begin();
    const int64_t want = at == s.size() ? -1 : order[at];
    CHECK(got[i].id == want,
          CASE_FORMAT "bound %a of Z %a: critical item %" PRId64 ", want %" PRId64, CASE_VALUES(c),
          bound[i], z, got[i].id, want);
    CHECK(got[i].x == (want < 0 ? kInf : c.row.x[want]), CASE_FORMAT "critical logit %a",
          CASE_VALUES(c), got[i].x);
  }
}

void check_draws(const Case& c, const std::vector<double>& extra, Random* random) {
  std::vector<double> u = {0.0, 1.0 - 0x1p-32, 0x1p-32, 0.5};
  for (int i = 0; i < 20; ++i) u.push_back(static_cast<double>(random->next() >> 32) * 0x1p-32);
  u.insert(u.end(), extra.begin(), extra.end());
  std::vector<int64_t> got(u.size());
  c.f.draw(c.row.view(), u.data(), static_cast<int64_t>(u.size()), got.data());
  for (size_t i = 0; i < u.size(); ++i) {
    const int64_t want = c.naive.draw(u[i]);
    CHECK(got[i] == want, CASE_FORMAT "u %a draws %" PRId64 ", want %" PRId64, CASE_VALUES(c), u[i],
          got[i], want);
    CHECK(got[i] >= 0 && got[i] < c.row.vocab() && c.row.x[got[i]] != -kInf,
          CASE_FORMAT "u %a draws the impossible %" PRId64, CASE_VALUES(c), u[i], got[i]);
  }
}

void check_probabilities(const Case& c, const std::vector<float>& want, Random* random) {
  std::vector<float> got(want.size());
  c.f.probabilities(c.row.view(), got.data());
  for (size_t v = 0; v < want.size(); ++v)
    CHECK(bits_of(got[v]) == bits_of(want[v]), CASE_FORMAT "p(%d) = %a, want %a", CASE_VALUES(c),
          static_cast<int>(v), got[v], want[v]);
  std::vector<double> bounds = {-0.5, 0.0, 1e-30, 0.3, 1.0, 1.5};
  for (int i = 0; i < 4; ++i) {
    const int64_t v = random->below(c.row.vocab());
    CHECK(c.f.probability(c.row.view(), c.row.x[v]) == want[v], CASE_FORMAT "p of logit %a",
          CASE_VALUES(c), c.row.x[v]);
    const double p = static_cast<double>(want[v]);
    bounds.insert(bounds.end(), {p, up(p), down(p)});
  }
  for (const double t : bounds) {
    for (const bool or_equal : {false, true}) {
      const CutView cut = c.f.below_probability(c.row.view(), t, or_equal);
      for (size_t v = 0; v < want.size(); ++v) {
        const double p = static_cast<double>(want[v]);
        CHECK(c.naive.before(static_cast<int64_t>(v), cut) == (or_equal ? p <= t : p < t),
              CASE_FORMAT "p(%d) = %a against %a%s: cut (%a, %" PRId64 ")", CASE_VALUES(c),
              static_cast<int>(v), want[v], t, or_equal ? " or equal" : "", cut.x, cut.id);
      }
    }
  }
}

void check_row(const char* what, const TestRow& row, int cuts, Random* random) {
  const Naive naive(row);
  const std::vector<int64_t> order = naive.order();
  const std::vector<double> s = naive.all_prefix_sums(order);
  CHECK(s.back() == naive.z(), "%s: S of the last item is not Z", what);
  for (size_t i = 1; i < s.size(); ++i)
    CHECK(s[i] >= s[i - 1], "%s: the masked sum falls at item %d", what, static_cast<int>(i));
  for (int i = 0; i < 3; ++i) {  // the shortcut of all_prefix_sums against the definition
    const size_t at = static_cast<size_t>(random->below(row.vocab()));
    const double plain = naive.prefix_sum({row.x[order[at]], order[at] + 1});
    CHECK(s[at] == plain, "%s: naive sums differ: %a, %a", what, s[at], plain);
  }
  std::vector<float> p(row.x.size());
  for (int64_t v = 0; v < row.vocab(); ++v) p[v] = naive.probability(v);
  // Uniforms on the edges of tokens and tiles.
  std::vector<double> edges;
  double mass = 0.0;
  for (int t = 0; t < naive.tiles() && t < 8; ++t) {
    mass += static_cast<double>(naive.tile_sum(t, [](int64_t) { return true; })) * naive.scale(t);
    for (const double u : {down(mass / naive.z()), mass / naive.z(), up(mass / naive.z())})
      if (u < 1.0) edges.push_back(std::min(u, 1.0 - 0x1p-32));
  }
  for (int level = 0; level <= best_level(); ++level) {
    const Case c{what, row, naive, functions(level)};
    const int count = level == 0 && row.vocab() > kNaiveTile ? 1 : cuts;  // scalar code is slow
    Random same = *random;
    check_stats(c);
    check_prefix_sums(c, count, &same);
    check_knapsack_cut(c, order, s, count, &same);
    check_draws(c, edges, &same);
    check_probabilities(c, p, &same);
  }
  random->next();
}

void check_invalid_rows() {
  for (int level = 0; level <= best_level(); ++level) {
    const Functions& f = functions(level);
    for (const int64_t vocab : {1, 5, 128, 5000, 9000}) {
      const auto valid = [&](const std::vector<float>& x) {
        RowStats s;
        f.stats({x.data(), kFloat32, vocab, 1.0f}, &s);
        return s.valid;
      };
      std::vector<float> x(static_cast<size_t>(vocab), -kInf);
      CHECK(!valid(x), "%s: nothing but -inf is taken for a distribution", f.name);
      for (const int64_t at : {int64_t{0}, vocab / 2, vocab - 1}) {
        for (const bool rest_finite : {false, true}) {
          for (const uint32_t bad : {0x7f800000u, 0x7fc00000u, 0xffc00000u, 0x7f800001u,
                                     0x7fffffffu, 0xffffffffu, 0x7fc00001u, 0xff8001ffu}) {
            std::fill(x.begin(), x.end(), rest_finite ? -1.5f : -kInf);
            CHECK(rest_finite == valid(x), "%s: a good row is refused", f.name);
            x[at] = float_of(bad);
            CHECK(!valid(x), "%s: %08x at %d of %d is not noticed (rest finite: %d)", f.name, bad,
                  static_cast<int>(at), static_cast<int>(vocab), rest_finite);
          }
          x[at] = 3e38f;
          CHECK(valid(x), "%s: a huge finite logit is refused", f.name);
        }
      }
    }
  }
}

void check_find_in_tile(Random* random) {
  for (int turn = 0; turn < 300; ++turn) {
    const int count = static_cast<int>(128 * (1 + random->below(32)));
    std::vector<float> w(static_cast<size_t>(count));
    const double spread = 40.0 * random->uniform();
    for (float& one : w) one = naive_exp(static_cast<float>(-spread * random->uniform()));
    for (int j = count - static_cast<int>(random->below(count)); j < count && turn % 3 == 0; ++j)
      w[j] = 0.0f;
    const double scale = turn % 2 ? 1.0 : std::exp(-30.0 * random->uniform());
    const double before = turn % 5 ? random->uniform() : 0.0;
    double total = 0.0;
    const int64_t edge = random->below(count);
    double at_edge = 0.0;
    for (int j = 0; j < count; ++j) {
      total += std::nearbyint(static_cast<double>(w[j]) * 0x1p40) * 0x1p-40;
      if (j == edge) at_edge = before + total * scale;
    }
    for (const double target : {before, at_edge, up(at_edge), down(at_edge), before + total * scale,
                                before + total * scale * random->uniform(), 2.0 + total}) {
      const int64_t want = Naive::find(w.data(), count, scale, before, target);
      for (int level = 0; level <= best_level(); ++level) {
        const int got = functions(level).find_in_tile(w.data(), count, scale, before, target);
        CHECK(got == want, "%s: target %a in %d weights: %d, want %d", functions(level).name,
              target, count, got, static_cast<int>(want));
      }
    }
  }
}

// Quotients of random weights, and quotients within 2^-53 of the middle between two floats, which
// the quick way must leave to the slow one.
void check_division(Random* random, int64_t pairs) {
  constexpr int kBatch = 64;
  for (int64_t done = 0; done < pairs; done += kBatch) {
    float w[kBatch], got[kBatch];
    for (float& one : w) {
      const uint32_t raw = 0x00800000u + static_cast<uint32_t>(random->below(0x3f000001));
      one = float_of(raw);
    }
    w[1] = 0.0f;
    w[2] = 1.0f;
    double z = std::ldexp(1.0 + random->uniform(), static_cast<int>(random->below(21)));
    const int kind = static_cast<int>(random->below(4));
    if (kind == 0) {  // w[0] / z rounds to a double at or beside an odd 25-bit number
      const double middle =
          std::ldexp(static_cast<double>((1 << 24) + random->below(1 << 23) * 2 + 1),
                     -24 - static_cast<int>(random->below(20)));
      w[0] = static_cast<float>(1.0 + random->uniform()) * 0.5f;
      z = static_cast<double>(w[0]) / middle;
      while (z < 1.0) z *= 2.0;
    } else if (kind == 1) {  // mantissas of z at and near all ones
      const double top = std::ldexp(1.0, 1 + static_cast<int>(random->below(20)));
      z = top - (top * 0x1p-53) * static_cast<double>(1 + random->below(4));
    } else if (kind == 2) {
      z = std::ldexp(1.0, static_cast<int>(random->below(21)));
    }
    for (int level = 0; level <= best_level(); ++level) {
      functions(level).divide(w, z, kBatch, got);
      for (int i = 0; i < kBatch; ++i) {
        const float want = static_cast<float>(static_cast<double>(w[i]) / z);
        CHECK(bits_of(got[i]) == bits_of(want), "%s: %a / %a = %a, want %a", functions(level).name,
              w[i], z, got[i], want);
      }
    }
  }
}

}  // namespace
}  // namespace testing
}  // namespace tta

int main(int argc, char** argv) {
  using namespace tta;
  using namespace tta::testing;
  static const char* const kNames[kRowKinds] = {
      "language model", "uniform", "tied", "tied below one", "few values", "padded",
      "peaked",         "steps",   "wide", "zeros",          "plateaus",   "unlike its sample"};
  const bool exhaustive = has_flag(argc, argv, "--exhaustive");
  Random random(2024);
  check_invalid_rows();
  check_find_in_tile(&random);
  check_division(&random, exhaustive ? 100'000'000 : 10'000'000);
  const float inverses[] = {1.0f, 1.0f / 0.6f, 10.0f, 0.4f};
  for (int turn = 0; turn < (exhaustive ? 20 : 1); ++turn) {
    for (const int64_t vocab : {1, 2, 3, 17, 127, 128, 129, 1000, 4095, 4096, 4097, 8191, 8193,
                                3 * 4096 + 17, 4 * 4096, 40000}) {
      for (int kind = 0; kind < kRowKinds; ++kind) {
        if (!exhaustive && vocab >= 4 * 4096 && kind % 3 == 2) continue;
        const int dtype = static_cast<int>(random.below(5));
        const float inverse = inverses[random.below(4)];
        const std::vector<float> x = make_logits(static_cast<RowKind>(kind), vocab, &random);
        check_row(kNames[kind], TestRow::of(x, dtype > 2 ? kFloat32 : dtype, inverse),
                  vocab > 4096 ? 4 : 8, &random);
      }
    }
  }
  return finish("row_test");
}
