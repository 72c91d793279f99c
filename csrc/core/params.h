// Arguments of the kernels, CPU and CUDA alike: raw pointers and numbers, no torch.
#pragma once

#include <cstdint>
#include <limits>

#include "core/philox.h"
#include "core/rules.h"

namespace tta {

enum DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// A stack of logits rows: row (b, k) starts at data + b * batch_stride + k * row_stride elements.
struct Logits {
  const void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t row_stride = 0;
  int64_t vocab = 0;
  int dtype = kFloat32;
};

// One value for all rows (stride 0), one a row (stride 1), or a number that the host knows (no
// data).
template <class T>
struct PerRow {
  const T* data = nullptr;
  int64_t stride = 0;
  T value = T();
  PerRow() = default;
  PerRow(const T* first, int64_t step) : data(first), stride(step) {}
  PerRow(T number) : value(number) {}  // NOLINT(google-explicit-constructor)
  TTA_HOST_DEVICE T operator[](int64_t row) const { return data ? data[row * stride] : value; }
};

using Seed = PerRow<int64_t>;  // 64 bits, read as unsigned
TTA_HOST_DEVICE inline uint64_t seed_bits(const Seed& seed) {
  return static_cast<uint64_t>(seed[0]);
}

struct RuleSpec {
  PerRow<double> param;
  int rule = kThreshold;
  int critical = kExclude;
  float inv_temperature = 1.0f;       // fl32(1 / T)
  float inv_rule_temperature = 1.0f;  // fl32(1 / T_rule)
  TTA_HOST_DEVICE bool valid_param(int64_t i) const {
    const double p = param[i];
    return p == p && !(rule == kKnapsack && p < 0.0);
  }
};

struct KeySpec {
  Seed seed;
  PerRow<int64_t> position;
  PerRow<int64_t> sequence;
  PerRow<int64_t> rollout;
  uint32_t iteration = 0;
  bool do_sample = true;
  TTA_HOST_DEVICE uint32_t word3(uint32_t stream, int64_t b) const {
    return counter_word3(stream, iteration, static_cast<uint32_t>(rollout[b]) & 0xffffu);
  }
};

// The first row found invalid (NaN, +inf, or nothing but -inf); lower rows win whatever the
// scheduling. Encodes row and tensor so that one atomic minimum keeps both. On the device it lives
// in device memory and may be missing.
class InvalidRow {
 public:
  static constexpr int64_t kTensors = 4096;
  static constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  void note(int64_t row, int64_t tensor) {
    const int64_t code = encode(row, tensor);
    int64_t seen = __atomic_load_n(&code_, __ATOMIC_RELAXED);
    while (code < seen && !__atomic_compare_exchange_n(&code_, &seen, code, true, __ATOMIC_RELAXED,
                                                       __ATOMIC_RELAXED)) {
    }
  }
  TTA_HOST_DEVICE static int64_t encode(int64_t row, int64_t tensor) {
    return row * kTensors + tensor;
  }
  TTA_HOST_DEVICE int64_t* code() { return &code_; }
  bool any() const { return code_ != kNone; }
  int64_t row() const { return code_ / kTensors; }
  int64_t tensor() const { return code_ % kTensors; }

 private:
  int64_t code_ = kNone;
};

// Numbers the tensors an InvalidRow can name. In a mixture of E experts: 1 + e expert e, 1 + E + e
// its anti-expert, 1 + 2 E the combined scores.
enum TensorName : int { kBaseLogits = 0, kProxyLogits = 1 };

struct DeferralArgs {
  Logits base, proxy;  // proxy.data may be null for rules that look at p alone
  int64_t batch = 0;
  RuleSpec rule;
  InvalidRow* invalid = nullptr;
};

struct MaskArgs : DeferralArgs {
  bool* mask = nullptr;  // [batch, vocab]
  int64_t mask_stride = 0;
  int64_t* critical_index = nullptr;
  float* fraction = nullptr;
};

struct ProbsArgs : DeferralArgs {
  float* out = nullptr;  // [batch, vocab]
  int64_t out_stride = 0;
};

struct StatsArgs : DeferralArgs {
  double* deferred_mass = nullptr;
  int64_t* critical_index = nullptr;
  float* cut_logit = nullptr;
  double* used = nullptr;
};

struct SampleArgs : DeferralArgs {  // deferral_propose when proxy.data is null
  KeySpec key;
  bool propose = false;
  int64_t* token = nullptr;
  bool* deferred = nullptr;
};

struct VerifyArgs : DeferralArgs {
  KeySpec key;
  int64_t draft_capacity = 0;  // K
  bool has_bonus_row = false;  // proxy has K + 1 rows
  bool return_mass = false;
  const int64_t* draft = nullptr;  // [batch, K]
  int64_t draft_row_stride = 0, draft_position_stride = 0;
  TTA_HOST_DEVICE int64_t draft_at(int64_t b, int64_t k) const {
    return draft[b * draft_row_stride + k * draft_position_stride];
  }
  const int64_t* draft_length = nullptr;
  int64_t* accepted = nullptr;
  int64_t* token = nullptr;
  bool* deferred = nullptr;
  double* mass = nullptr;                                   // [batch, K + 1]
  int64_t param_row_stride = 0, param_position_stride = 0;  // of rule.param
  TTA_HOST_DEVICE int64_t param_index(int64_t b, int64_t k) const {
    return b * param_row_stride + k * param_position_stride;
  }
};

struct CategoricalArgs {
  Logits logits;
  int64_t batch = 0;
  float inv_temperature = 1.0f;
  KeySpec key;
  uint32_t stream = 0;
  uint32_t draw = 0;
  int64_t* token = nullptr;
  InvalidRow* invalid = nullptr;
};

// score = base + sum_e beta_e (expert_e - anti_e): log-linear mixtures of models.
struct MixtureArgs {
  Logits base;
  Logits expert,
      anti;  // [experts, batch, vocab]: batch_stride is the expert's, row_stride the row's
  int64_t experts = 0;
  const float* beta = nullptr;
  int64_t batch = 0;
  float inv_temperature = 1.0f;
  InvalidRow* invalid = nullptr;
  float* probs = nullptr;  // [batch, vocab], or
  int64_t probs_stride = 0;
  KeySpec key;
  int64_t* token = nullptr;  // [batch]
};

struct KnapsackArgs {
  const float* profit = nullptr;
  const float* weight = nullptr;
  int64_t profit_stride = 0, weight_stride = 0;
  int64_t batch = 0, items = 0;
  PerRow<double> capacity;
  bool* selected = nullptr;
  int64_t selected_stride = 0;
  double* used = nullptr;
  double* value = nullptr;
  int64_t* critical_index = nullptr;
  double* upper_bound = nullptr;
  InvalidRow* invalid = nullptr;
};

struct PerturbArgs {
  const void* hidden = nullptr;  // [rows, dim]
  void* out = nullptr;
  int dtype = kFloat32;
  int64_t hidden_stride = 0, out_stride = 0;
  int64_t rows = 0, dim = 0;
  const float* mean = nullptr;  // [prompts, steps, dim]
  int64_t mean_prompt_stride = 0, mean_step_stride = 0;
  int64_t prompts = 0, steps = 0;
  PerRow<int64_t> step, prompt, sequence, rollout;
  uint32_t iteration = 0;
  float sigma = 0;
  Seed seed;
  float* dot = nullptr;  // [rows], accumulated
};

struct ControlArgs {
  const float* mean = nullptr;  // [prompts, steps, dim], contiguous
  float* out = nullptr;
  int64_t prompts = 0, steps = 0, dim = 0, rollouts = 0;
  const float* weights = nullptr;   // [prompts, rollouts]
  const int64_t* length = nullptr;  // [prompts, rollouts] or null
  PerRow<int64_t> sequence;
  Seed seed;
  uint32_t iteration = 0;
  float sigma = 0;
  int64_t start = 0, stop = 0;  // rollout range, an aligned subtree
  bool partial = false;
};

struct MergeArgs {
  const float* mean = nullptr;
  const float* partials = nullptr;  // [shards, count]
  float* out = nullptr;
  int64_t shards = 0, count = 0;
  float sigma = 0;
};

// What an InvalidRow of importance_weights can name.
enum WeightsInput : int { kUsable = -1, kRewardInput, kDotInput, kNorm2Input, kScores };

struct WeightsArgs {
  const float* reward = nullptr;  // [prompts, rollouts], like dot and norm2
  const float* dot = nullptr;
  const float* norm2 = nullptr;
  int64_t reward_stride = 0, dot_stride = 0, norm2_stride = 0;
  int64_t prompts = 0, rollouts = 0;
  double lambda = 0, alpha = 1, sigma = 0;
  float* weights = nullptr;  // [prompts, rollouts], contiguous
  float* ess = nullptr;
  InvalidRow* invalid = nullptr;
};

struct NormalArgs {
  float* out = nullptr;
  int64_t count = 0;
  Seed seed;
  uint32_t step = 0, sequence = 0, word3 = 0;
};

// Blocks of Philox4x32-10: counters in, words out, both 32-bit patterns in int64.
struct PhiloxArgs {
  const int64_t* counter = nullptr;  // [blocks, 4]
  Seed key_low, key_high;
  int64_t* out = nullptr;  // [blocks, 4]
  int64_t blocks = 0;
};

}  // namespace tta
