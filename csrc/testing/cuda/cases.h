// The cases of kernels_test, a family of operators each: random inputs, CPU and CUDA side by side.
#pragma once

#include <string>

#include "testing/check.h"
#include "testing/cuda/device.h"
#include "testing/cuda/outputs.h"

namespace tta {
namespace testing {

struct Options {
  std::string family = "all";
  int64_t repetitions = 20;
  uint64_t seed = 1;
  int64_t vocab = 20000;  // the largest
  // `common` only
  std::string op;
  int64_t batch = 1;
  int dtype = kFloat32;
  std::string shape = "normal";  // of the logits
  double budget = -1.0;          // of a knapsack in place of the call's own rule
};

void deferral_cases(const Options&, Random*);
void verify_cases(const Options&, Random*);
void sampling_cases(const Options&, Random*);
void knapsack_cases(const Options&, Random*);
void prelogit_cases(const Options&, Random*);
void control_cases(const Options&, Random*);
// Noise of `count` dimensions and `blocks` blocks of Philox, `skip` elements behind an aligned
// address.
void normal_case(int64_t count, int64_t skip, Random*);
void philox_case(int64_t blocks, int64_t skip, Random*);
// One call of `op` as a decoding loop makes it, for profiles. False: there is no such operator.
bool common_case(const Options&, Random*);
bool known_shape(const std::string& name);  // of `common`

double random_normal(Random*);
// A vocabulary up to `most`: small ones, odd ones, around the tile's borders.
int64_t random_vocab(int64_t most, Random*);
template <class T>
T pick(std::initializer_list<T> values, Random* random) {
  return values.begin()[random->below(static_cast<int64_t>(values.size()))];
}

// Random logits [rows, vocab]: any dtype, spread, padding behind the rows and alignment; some with
// ties, impossible tokens, rows that cannot be used.
class Rows {
 public:
  Rows(int64_t rows, int64_t vocab, int dtype, Random* random);
  void set(int64_t row, int64_t v, float value);
  float get(int64_t row, int64_t v) const;
  void spoil(Random* random);  // makes one row invalid
  void upload() const { data_.upload(); }
  Logits at(Side side, int64_t batch_stride, int64_t row_stride) const;  // strides in rows
  int64_t vocab() const { return vocab_; }
  int64_t rows() const { return rows_; }

 private:
  int64_t rows_, vocab_, stride_;
  int dtype_;
  Twin<char> data_;
};

// Counter words for up to `batch` rows.
struct Keys {
  Twin<int64_t> position, sequence, rollout;
  int64_t seed;
  Keys(int64_t batch, Random* random);
  KeySpec at(Side side, bool do_sample) const;
};

// A rule with a parameter for each of `rows` rows, now and then one that is not a number.
struct RandomRule {
  int rule, critical;
  float inv_temperature, inv_rule_temperature;
  Twin<double> param;
  RandomRule(int rule, int critical, int64_t rows, Random* random);
  RuleSpec at(Side side) const;
  std::string text() const;
};

}  // namespace testing
}  // namespace tta
