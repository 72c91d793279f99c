// greedy_knapsack against a brute force that sorts and adds up by definition.

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "core/config.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "testing/check.h"
#include "testing/host.h"
#if TTA_X86_64
#include <immintrin.h>
#endif

namespace tta {
namespace testing {
namespace {

constexpr int64_t kTile = 4096, kLanes = 128;
constexpr double kInf = std::numeric_limits<double>::infinity();

struct Solution {
  std::vector<char> selected;
  double used = 0.0, value = 0.0, upper_bound = 0.0;
  int64_t critical = -1;
};

// Canonical float64 sum of the values that `in` admits.
double canonical_sum(const float* x, int64_t n, const std::vector<char>& in) {
  double total = 0.0;
  for (int64_t begin = 0; begin < n; begin += kTile) {
    double lane[kLanes] = {};
    for (int64_t j = begin; j < std::min(begin + kTile, n); ++j)
      lane[(j - begin) % kLanes] += in[j] ? static_cast<double>(x[j]) : 0.0;
    for (int64_t half = kLanes / 2; half >= 1; half /= 2)
      for (int64_t l = 0; l < half; ++l) lane[l] += lane[l + half];
    total += lane[0];
  }
  return total;
}

// Items by falling density, then rising id; those heavier than the capacity left out.
std::vector<int64_t> greedy_order(const float* profit, const float* weight, int64_t n,
                                  double capacity) {
  std::vector<int64_t> order;
  std::vector<double> density(n);
  for (int64_t i = 0; i < n; ++i) {
    const double w = static_cast<double>(weight[i]);
    density[i] = w == 0.0 ? kInf : static_cast<double>(profit[i]) / w;
    if (w <= capacity) order.push_back(i);
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return density[a] > density[b]; });
  return order;
}

// S after k items of the order.
double running_weight(const float* weight, int64_t n, const std::vector<int64_t>& order, size_t k) {
  std::vector<char> in(n, 0);
  for (size_t i = 0; i < k; ++i) in[order[i]] = 1;
  return canonical_sum(weight, n, in);
}

Solution brute_force(const float* profit, const float* weight, int64_t n, double capacity,
                     bool every_prefix) {
  const std::vector<int64_t> order = greedy_order(profit, weight, n, capacity);
  size_t taken = order.size();
  if (every_prefix) {
    double before = 0.0;
    for (size_t k = 1; k <= order.size(); ++k) {
      const double s = running_weight(weight, n, order, k);
      CHECK(s >= before, "the running weight falls");
      before = s;
      if (s > capacity) {
        taken = k - 1;
        break;
      }
    }
  } else {  // the running weight never falls, which the small cases check
    size_t low = 0, high = order.size() + 1;  // S(low) <= capacity < S(high)
    while (high - low > 1) {
      const size_t k = (low + high) / 2;
      (running_weight(weight, n, order, k) <= capacity ? low : high) = k;
    }
    taken = low;
  }
  Solution s;
  s.selected.assign(n, 0);
  for (size_t i = 0; i < taken; ++i) s.selected[order[i]] = 1;
  s.used = canonical_sum(weight, n, s.selected);
  s.value = canonical_sum(profit, n, s.selected);
  s.upper_bound = s.value;
  if (taken < order.size()) {
    s.critical = order[taken];
    const double density =
        static_cast<double>(profit[s.critical]) / static_cast<double>(weight[s.critical]);
    s.upper_bound += (capacity - s.used) * density;
  }
  return s;
}

struct Batch {
  std::vector<std::vector<float>> profit, weight;
  std::vector<double> capacity;
};

struct Output {
  std::vector<char> selected;
  std::vector<double> used, value, upper_bound;
  std::vector<int64_t> critical;
  bool invalid = false;
  int64_t row = -1, tensor = -1;
};

Output solve(const Batch& batch, int level) {
  const int64_t rows = static_cast<int64_t>(batch.capacity.size());
  const int64_t n = static_cast<int64_t>(batch.profit[0].size());
  // Strides beyond the row, filled with values that would be noticed.
  const int64_t stride = n + 3, selected_stride = n + 5;
  std::vector<float> profit(rows * stride, -1.0f), weight(rows * stride, -1.0f);
  for (int64_t b = 0; b < rows; ++b) {
    std::copy(batch.profit[b].begin(), batch.profit[b].end(), profit.begin() + b * stride);
    std::copy(batch.weight[b].begin(), batch.weight[b].end(), weight.begin() + b * stride);
  }
  // Exactly as long as needed: the sanitizers then see any step beyond.
  profit.resize((rows - 1) * stride + n);
  weight.resize((rows - 1) * stride + n);
  profit.shrink_to_fit();
  weight.shrink_to_fit();
  Output out;
  out.selected.assign(rows * selected_stride, 7);
  out.used.resize(rows);
  out.value.resize(rows);
  out.upper_bound.resize(rows);
  out.critical.resize(rows);
  InvalidRow invalid;
  KnapsackArgs a;
  a.profit = profit.data();
  a.weight = weight.data();
  a.profit_stride = a.weight_stride = stride;
  a.batch = rows;
  a.items = n;
  a.capacity = {batch.capacity.data(), 1};
  a.selected = reinterpret_cast<bool*>(out.selected.data());
  a.selected_stride = selected_stride;
  a.used = out.used.data();
  a.value = out.value.data();
  a.critical_index = out.critical.data();
  a.upper_bound = out.upper_bound.data();
  a.invalid = &invalid;
  set_isa(level);
  greedy_knapsack(a, kSerial);
  out.invalid = invalid.any();
  if (out.invalid) {
    out.row = invalid.row();
    out.tensor = invalid.tensor();
  }
  for (int64_t b = 0; b < rows; ++b)
    for (int64_t j = n; j < selected_stride; ++j)
      CHECK(out.selected[b * selected_stride + j] == 7, "level %d writes beyond the row", level);
  return out;
}

enum ItemKind : int { kRandom, kTies, kFree, kWorthless, kWide, kTiny, kProbabilities, kItemKinds };

void make_items(ItemKind kind, int64_t n, Random* random, std::vector<float>* profit,
                std::vector<float>* weight) {
  profit->resize(n);
  weight->resize(n);
  for (int64_t i = 0; i < n; ++i) {
    float p = static_cast<float>(random->uniform()), w = static_cast<float>(random->uniform());
    switch (kind) {
      case kTies:
        p = static_cast<float>(1 + random->below(3));
        w = static_cast<float>(1 + random->below(3));
        break;
      case kFree:
        if (random->below(3) == 0) w = random->below(2) ? 0.0f : -0.0f;
        break;
      case kWorthless:
        if (random->below(2)) p = 0.0f;
        if (random->below(8) == 0) w = 0.0f;
        break;
      case kWide:
        p = static_cast<float>(std::exp(120.0 * random->uniform() - 60.0));
        w = static_cast<float>(std::exp(120.0 * random->uniform() - 60.0));
        break;
      case kTiny:  // subnormal weights and profits
        p = std::ldexp(p, -130);
        w = std::ldexp(w, -130);
        break;
      case kProbabilities:
        w = static_cast<float>(std::exp(-12.0 * random->uniform())) / static_cast<float>(n);
        p = -w * std::log(w);
        break;
      default:
        break;
    }
    (*profit)[i] = p;
    (*weight)[i] = w;
  }
}

bool close(double a, double b) { return a == b || std::fabs(a - b) <= 1e-15 * std::fabs(b); }

void check_batch(const Batch& batch, int kind, bool every_prefix, int best) {
  const int64_t n = static_cast<int64_t>(batch.profit[0].size());
  const Output first = solve(batch, kScalar);
  for (size_t b = 0; b < batch.capacity.size(); ++b) {
    const Solution want = brute_force(batch.profit[b].data(), batch.weight[b].data(), n,
                                      batch.capacity[b], every_prefix);
    const char* got = first.selected.data() + b * static_cast<size_t>(n + 5);
    CHECK(!std::memcmp(got, want.selected.data(), static_cast<size_t>(n)),
          "kind %d, n %d, capacity %a: another selection", kind, static_cast<int>(n),
          batch.capacity[b]);
    CHECK(first.critical[b] == want.critical,
          "kind %d, n %d, capacity %a: critical %" PRId64 ", want %" PRId64, kind,
          static_cast<int>(n), batch.capacity[b], first.critical[b], want.critical);
    CHECK(first.used[b] == want.used && first.value[b] == want.value,
          "kind %d, n %d, capacity %a: used %a, value %a; want %a, %a", kind, static_cast<int>(n),
          batch.capacity[b], first.used[b], first.value[b], want.used, want.value);
    CHECK(close(first.upper_bound[b], want.upper_bound), "kind %d, n %d, capacity %a: bound %a, %a",
          kind, static_cast<int>(n), batch.capacity[b], first.upper_bound[b], want.upper_bound);
    CHECK(first.used[b] <= batch.capacity[b], "kind %d: over the capacity", kind);
  }
  for (int level = 1; level <= best; ++level) {
    const Output other = solve(batch, level);
    CHECK(other.selected == first.selected && other.critical == first.critical &&
              other.used == first.used && other.value == first.value &&
              other.upper_bound == first.upper_bound,
          "kind %d, n %d: level %d differs from scalar", kind, static_cast<int>(n), level);
  }
}

void check_invalid(int best) {
  for (int level = 0; level <= best; ++level) {
    for (const int64_t n : {1, 15, 16, 33, 200}) {
      for (const float bad : {-1.0f, -1e-45f, std::numeric_limits<float>::infinity(),
                              std::numeric_limits<float>::quiet_NaN(), float_of(0xffffffffu)}) {
        for (const int tensor : {0, 1}) {
          for (const int64_t at : {int64_t{0}, n / 2, n - 1}) {
            Batch batch;
            batch.profit.assign(2, std::vector<float>(n, 1.0f));
            batch.weight.assign(2, std::vector<float>(n, 1.0f));
            batch.capacity = {2.0, 2.0};
            (tensor ? batch.weight : batch.profit)[1][at] = bad;
            const Output out = solve(batch, level);
            CHECK(out.invalid && out.row == 1 && out.tensor == tensor,
                  "level %d: %a of tensor %d is not reported", level, bad, tensor);
            CHECK(out.critical[0] == (n > 2 ? 2 : -1) && out.critical[1] == -2, "critical items");
            CHECK(std::isnan(out.used[1]) && std::isnan(out.value[1]) &&
                      std::isnan(out.upper_bound[1]) && out.selected[n + 5] == 0,
                  "level %d: an invalid row has a solution", level);
          }
        }
      }
      for (const double capacity : {-1.0, std::numeric_limits<double>::quiet_NaN()}) {
        Batch batch;
        batch.profit.assign(1, std::vector<float>(n, 1.0f));
        batch.weight = batch.profit;
        batch.capacity = {capacity};
        const Output out = solve(batch, level);
        CHECK(out.critical[0] == -2 && std::isnan(out.used[0]), "level %d: capacity %a", level,
              capacity);
      }
    }
  }
}

}  // namespace
}  // namespace testing
}  // namespace tta

int main() {
  using namespace tta;
  using namespace tta::testing;
  const int best = set_isa(kAvx512);
  Random random(7);
  for (const int64_t n : {1, 2, 3, 15, 64, 65, 127, 128, 129, 200, 1000, 4096, 4097, 9001}) {
    for (int kind = 0; kind < kItemKinds; ++kind) {
      Batch batch;
      std::vector<float> profit, weight;
      make_items(static_cast<ItemKind>(kind), n, &random, &profit, &weight);
      const double total = std::accumulate(weight.begin(), weight.end(), 0.0);
      std::vector<double> capacities = {0.0,         kInf,        total * 1e-6, total * 0.1,
                                        total * 0.5, total * 0.9, total,        total * 2.0};
      for (int i = 0; i < 4; ++i) {  // exactly a running weight, and beside it
        const double c = capacities[3 + i % 4];
        const std::vector<int64_t> order = greedy_order(profit.data(), weight.data(), n, c);
        if (order.empty()) continue;
        const size_t k = 1 + random.below(static_cast<int64_t>(order.size()));
        const double s = running_weight(weight.data(), n, order, k);
        capacities.insert(capacities.end(), {s, std::nextafter(s, kInf), std::nextafter(s, 0.0)});
      }
      for (const double c : capacities) {
        batch.profit.push_back(profit);
        batch.weight.push_back(weight);
        batch.capacity.push_back(c);
      }
      check_batch(batch, kind, n <= 200, best);
#if TTA_X86_64
      // Flushing subnormals, as torch.set_flush_denormal does, changes nothing.
      const Output plain = solve(batch, best);
      const unsigned saved = _mm_getcsr();
      _mm_setcsr(saved | 0x8040u);
      const Output flushed = solve(batch, best);
      const bool kept = (_mm_getcsr() & 0x8040u) == 0x8040u;
      _mm_setcsr(saved);
      CHECK(kept, "the caller's flush bits are lost");
      CHECK(plain.selected == flushed.selected && plain.used == flushed.used &&
                plain.value == flushed.value && plain.upper_bound == flushed.upper_bound,
            "kind %d, n %d: flush-to-zero changes the result", kind, static_cast<int>(n));
#endif
    }
  }
  check_invalid(best);
  return finish("knapsack_test");
}
