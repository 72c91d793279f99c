// The definitions of DESIGN's numerics contract, written out one scalar at a time, with no thought
// for speed: what the kernels must equal bit for bit.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "testing/check.h"
#include "testing/functions.h"
#include "testing/host.h"

namespace tta {
namespace testing {

constexpr int kNaiveTile = 4096;
constexpr int kNaiveLanes = 128;
constexpr float kInf = std::numeric_limits<float>::infinity();

// A row of logits in memory in its own type, and the same values as float32.
struct TestRow {
  std::vector<float> x;
  std::vector<char> data;
  int dtype = kFloat32;
  float inv_temperature = 1.0f;

  int64_t vocab() const { return static_cast<int64_t>(x.size()); }
  // One element past the start of the buffer, so that no load is aligned by luck.
  RowView view() const { return {data.data() + bytes_of(dtype), dtype, vocab(), inv_temperature}; }
  static TestRow of(const std::vector<float>& values, int dtype, float inv_temperature) {
    TestRow row;
    row.dtype = dtype;
    row.inv_temperature = inv_temperature;
    row.x = values;
    row.data.resize((values.size() + 1) * static_cast<size_t>(bytes_of(dtype)));
    char* const first = row.data.data() + bytes_of(dtype);
    for (size_t i = 0; i < values.size(); ++i) {
      store(first, dtype, static_cast<int64_t>(i), values[i]);
      row.x[i] = load(first, dtype, static_cast<int64_t>(i));
    }
    return row;
  }
};

inline float naive_exp(float x) {
  float y;
  functions(0).exp(&x, 1, &y);
  return y;
}

inline float naive_fold(const float* lanes) {
  float lane[kNaiveLanes];
  std::copy(lanes, lanes + kNaiveLanes, lane);
  for (int n = kNaiveLanes / 2; n >= 1; n /= 2)
    for (int l = 0; l < n; ++l) lane[l] += lane[l + n];
  return lane[0];
}

class Naive {
 public:
  explicit Naive(const TestRow& row) : row_(row), weight_(row.x.size()) {
    const int64_t n = row.vocab();
    tiles_ = static_cast<int>((n + kNaiveTile - 1) / kNaiveTile);
    max_ = *std::max_element(row.x.begin(), row.x.end());
    for (int t = 0; t < tiles_; ++t) {
      float m = -kInf;
      for (int64_t v = begin(t); v < end(t); ++v) m = std::max(m, row.x[v]);
      tile_max_.push_back(m);
      scale_.push_back(static_cast<double>(naive_exp((m - max_) * row.inv_temperature)));
      for (int64_t v = begin(t); v < end(t); ++v)
        weight_[v] = m == -kInf ? 0.0f : naive_exp((row.x[v] - m) * row.inv_temperature);
    }
    z_ = masked_sum([](int64_t) { return true; });
  }

  int tiles() const { return tiles_; }
  int64_t begin(int t) const { return static_cast<int64_t>(t) * kNaiveTile; }
  int64_t end(int t) const { return std::min(begin(t + 1), row_.vocab()); }
  float max() const { return max_; }
  double z() const { return z_; }
  float tile_max(int t) const { return tile_max_[t]; }
  double scale(int t) const { return scale_[t]; }
  float weight(int64_t v) const { return weight_[v]; }

  template <class Admits>
  float tile_sum(int t, Admits admits) const {
    float lane[kNaiveLanes] = {};
    for (int64_t v = begin(t); v < end(t); ++v)
      lane[(v - begin(t)) % kNaiveLanes] += admits(v) ? weight_[v] : 0.0f;
    return naive_fold(lane);
  }
  template <class Admits>
  double masked_sum(Admits admits) const {
    double total = 0.0;
    for (int t = 0; t < tiles_; ++t) {
      const double scaled = static_cast<double>(tile_sum(t, admits)) * scale_[t];
      total += scaled;
    }
    return total;
  }
  double prefix_sum(CutView cut) const {
    return masked_sum([&](int64_t v) { return before(v, cut); });
  }
  bool before(int64_t v, CutView cut) const {
    return row_.x[v] < cut.x || (row_.x[v] == cut.x && v < cut.id);
  }

  // Ids in greedy order.
  std::vector<int64_t> order() const {
    std::vector<int64_t> id(row_.x.size());
    std::iota(id.begin(), id.end(), 0);
    std::stable_sort(id.begin(), id.end(),
                     [&](int64_t a, int64_t b) { return row_.x[a] < row_.x[b]; });
    return id;
  }

  // S of every item in greedy order. Admitting one more item changes one lane of one tile, which is
  // added up again from the start: the same operations as masked_sum, without repeating the rest.
  std::vector<double> all_prefix_sums(const std::vector<int64_t>& order) const {
    std::vector<std::vector<float>> lane(tiles_, std::vector<float>(kNaiveLanes, 0.0f));
    std::vector<double> mass(tiles_, 0.0);
    std::vector<char> in(row_.x.size(), 0);
    std::vector<double> out;
    for (const int64_t v : order) {
      in[v] = 1;
      const int t = static_cast<int>(v / kNaiveTile);
      const int64_t l = (v - begin(t)) % kNaiveLanes;
      float sum = 0.0f;
      for (int64_t w = begin(t) + l; w < end(t); w += kNaiveLanes) sum += in[w] ? weight_[w] : 0.0f;
      lane[t][l] = sum;
      mass[t] = static_cast<double>(naive_fold(lane[t].data())) * scale_[t];
      double total = 0.0;
      for (int i = 0; i < tiles_; ++i) total += mass[i];
      out.push_back(total);
    }
    return out;
  }

  float probability(int64_t v) const {
    const double w = static_cast<double>(naive_exp((row_.x[v] - max_) * row_.inv_temperature));
    return static_cast<float>(w / z_);
  }

  int64_t draw(double u) const {
    const double target = u * z_;
    double before = 0.0;
    for (int t = 0; t < tiles_; ++t) {
      const double mass =
          static_cast<double>(tile_sum(t, [](int64_t) { return true; })) * scale_[t];
      if (before + mass > target)
        return begin(t) +
               find(weight_.data() + begin(t), end(t) - begin(t), scale_[t], before, target);
      before += mass;
    }
    return -1;
  }

  // First element whose scaled prefix of weights, rounded to multiples of 2^-40, passes the target;
  // the last of non-zero weight if none does.
  static int64_t find(const float* weights, int64_t count, double scale, double before,
                      double target) {
    double prefix = 0.0;
    int64_t last = 0;
    for (int64_t j = 0; j < count; ++j) {
      const double w = std::nearbyint(static_cast<double>(weights[j]) * 0x1p40) * 0x1p-40;
      if (w > 0.0) last = j;
      prefix += w;
      const double scaled = prefix * scale;
      if (before + scaled > target) return j;
    }
    return last;
  }

 private:
  const TestRow& row_;
  int tiles_ = 0;
  float max_ = 0.0f;
  double z_ = 0.0;
  std::vector<float> weight_, tile_max_;
  std::vector<double> scale_;
};

// Rows that have made someone's kernel fail, or could.
enum RowKind : int {
  kLanguageModel,  // a few likely tokens over a normal background
  kUniform,        // evenly spread logits
  kTied,           // all equal
  kTiedBelowOne,   // all equal but for one larger: rounding errors all in one direction
  kFewValues,      // bfloat16-like: long runs of ties
  kPadded,         // impossible tokens at the end, a whole tile of them where there is room
  kPeaked,         // one token far above the rest
  kSteps,          // every tile far below the last
  kWide,           // most weights underflow
  kZeros,          // -0 and +0 are the same logit
  kPlateaus,       // two logits, in any order
  kUnlikeSample,   // equal where the knapsack's cut takes its sample, others beside it
  kRowKinds
};

inline double normal(Random* random) {
  double sum = -6.0;
  for (int i = 0; i < 12; ++i) sum += random->uniform();
  return sum;
}

inline std::vector<float> make_logits(RowKind kind, int64_t vocab, Random* random) {
  std::vector<float> x(vocab);
  const double shift = 10.0 * random->uniform() - 5.0;
  for (int64_t v = 0; v < vocab; ++v) {
    double value = 0.0;
    switch (kind) {
      case kUniform:
        value = 12.0 * random->uniform() - 6.0;
        break;
      case kTied:
        value = shift;
        break;
      case kTiedBelowOne:
        value = v == vocab / 3 ? shift + 1.7 : shift;
        break;
      case kFewValues:
        value = std::floor(8.0 * normal(random)) / 4.0;
        break;
      case kSteps:
        value = normal(random) + 14.0 * static_cast<double>(v / kNaiveTile);
        break;
      case kWide:
        value = 600.0 * random->uniform() - 300.0;
        break;
      case kZeros:
        value = static_cast<double>(random->below(3));
        break;
      case kPlateaus:
        value = static_cast<double>(random->below(2));
        break;
      case kUnlikeSample:
        value = 1.0 + (v % 256 < 16 ? 0.0 : 0x1p-23 * static_cast<double>(1 - random->below(3)));
        break;
      default:
        value = 2.5 * normal(random) + shift;
    }
    x[v] = static_cast<float>(value);
    if (kind == kZeros) x[v] = x[v] == 1.0f ? 1.0f : x[v] == 0.0f ? 0.0f : -0.0f;
  }
  if (kind == kLanguageModel || kind == kPadded)
    for (int i = 0; i < 6; ++i) x[random->below(vocab)] += static_cast<float>(8.0 + i);
  if (kind == kPeaked) x[random->below(vocab)] += 45.0f;
  if (kind == kPadded) {
    for (int64_t v = vocab - vocab / 7; v < vocab; ++v) x[v] = -kInf;
    if (vocab > 2 * kNaiveTile)
      for (int64_t v = kNaiveTile; v < 2 * kNaiveTile; ++v) x[v] = -kInf;
    if (x[0] == -kInf) x[0] = 0.0f;
  }
  return x;
}

}  // namespace testing
}  // namespace tta
