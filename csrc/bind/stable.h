// Between the dispatcher and the kernels: tensors become raw pointers here and nowhere else.
// Uses only the parts of PyTorch's stable ABI that exist in torch 2.10.
// The checks are a backstop for callers of torch.ops.tta_ext.*; tta_ext.ops words them for people.
//
// The operators (ops.h, ops_prelogit.h) are written once for every device. What differs is a class,
// Cpu (cpu.h) or Cuda (cuda.h), made for one call from a tensor that says where the call runs:
//   Device(like, name, check)
//   own(x, name)          refuses a tensor that lies elsewhere
//   reads(x, name)        notes an argument's memory, which output() guards
//   one<T>(x, name, i)    element i of a small tensor, which may always lie on the CPU
//   host(values, n)       the first n values, to be read here; waits for the device, so only with
//                         check
//   invalid()             what the kernels note bad rows in
//   run(args)             the kernel
//   found()               the InvalidRow after run(), only with check
//
// Small arguments (one value a row or position) may have any stride, logits and hidden rows any but
// over their last dimension, outputs are contiguous and share no memory with an argument or another
// output; where every element is read before its place is written, an output may be exactly an
// argument.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <string>

#include "core/params.h"

namespace tta {
namespace bind {

// Raised only when a later library could not serve the schemas of this package
// (tta_ext/schemas.py has its mirror).
constexpr int64_t kNativeVersion = 1;

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

inline int logits_dtype(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::Half:
      return kFloat16;
    case ScalarType::BFloat16:
      return kBFloat16;
    default:
      STD_TORCH_CHECK(false, name, " is ", dtype_name(x.scalar_type()),
                      ", expected float32, float16 or bfloat16");
  }
}

inline void check_dtype(const Tensor& x, ScalarType type, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == type, name, " is ", dtype_name(x.scalar_type()), ", expected ",
                  dtype_name(type));
}

inline void check_unit_stride(const Tensor& x, const char* name) {
  const int64_t last = x.dim() - 1;
  STD_TORCH_CHECK(last >= 0 && (x.stride(last) == 1 || x.size(last) <= 1 || x.numel() == 0), name,
                  " must be contiguous in its last dimension");
}

constexpr int64_t kMaxVocab = int64_t{1} << 20;

// What one call reads and writes.
class Memory {
 public:
  void reads(const Tensor& x, const char* name) { note(x, name); }

  // `in_place` names the arguments whose very place the output may take.
  void writes(const Tensor& x, const char* name, std::initializer_list<const char*> in_place) {
    const int before = count_;
    note(x, name);
    if (count_ == before) return;
    const Span& mine = spans_[before];
    for (int i = 0; i < before; ++i) {
      const Span& other = spans_[i];
      if (mine.begin >= other.end || other.begin >= mine.end) continue;
      bool exact = other.dense && mine.begin == other.begin && mine.end == other.end;
      if (exact) {
        exact = false;
        for (const char* allowed : in_place) exact = exact || !std::strcmp(allowed, other.name);
      }
      STD_TORCH_CHECK(exact, name, " shares memory with ", other.name,
                      ", expected memory of its own");
    }
  }

 private:
  struct Span {
    const char* begin;
    const char* end;
    const char* name;
    bool dense;
  };

  // From the first byte to the last, whatever lies between.
  void note(const Tensor& x, const char* name) {
    const int64_t numel = x.numel();
    if (numel == 0) return;
    const bool dense = x.is_contiguous();
    int64_t last = numel - 1;
    if (!dense) {
      last = 0;
      for (int64_t d = 0; d < x.dim(); ++d) last += (x.size(d) - 1) * x.stride(d);
    }
    const char* begin = static_cast<const char*>(x.const_data_ptr());
    STD_TORCH_CHECK(count_ < kMost, "more tensors than a call has");
    spans_[count_++] = {begin, begin + (last + 1) * static_cast<int64_t>(x.element_size()), name,
                        dense};
  }

  static constexpr int kMost = 20;
  Span spans_[kMost];
  int count_ = 0;
};

// [B, V] or [B, K, V] logits.
template <class Device>
Logits logits(Device& device, const Tensor& x, const char* name, int64_t dim = 2) {
  device.own(x, name);
  device.reads(x, name);
  STD_TORCH_CHECK(x.dim() == dim, name, " has ", x.dim(), " dimensions, expected ", dim);
  Logits out;
  out.dtype = logits_dtype(x, name);
  check_unit_stride(x, name);
  out.vocab = x.size(dim - 1);
  STD_TORCH_CHECK(out.vocab >= 1 && out.vocab <= kMaxVocab, name, " has a vocabulary of ",
                  out.vocab, ", expected 1 to 2^20");
  out.data = x.const_data_ptr();
  out.batch_stride = x.stride(0);
  out.row_stride = dim == 3 ? x.stride(1) : 0;
  return out;
}

template <class T, class Device>
T* output(Device& device, const Tensor& x, ScalarType type, int64_t numel, const char* name,
          std::initializer_list<const char*> in_place = {}) {
  device.own(x, name);
  check_dtype(x, type, name);
  STD_TORCH_CHECK(x.numel() == numel, name, " has ", x.numel(), " elements, expected ", numel);
  STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous");
  device.writes(x, name, in_place);
  return static_cast<T*>(x.mutable_data_ptr());
}

// A small argument as one block: itself, or a copy that takes its place.
inline Tensor& dense(Tensor& x) {
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  return x;
}

// A tensor of one element, or of one a row at any stride.
template <class T, class Device>
PerRow<T> per_row(Device& device, Tensor& x, ScalarType type, int64_t rows, const char* name) {
  check_dtype(x, type, name);
  device.reads(x, name);
  const int64_t n = x.numel();
  STD_TORCH_CHECK(n == 1 || n == rows, name, " has ", n, " elements, expected 1 or ", rows);
  if (n == 1) return device.template one<T>(x, name);
  device.own(x, name);
  if (x.dim() != 1) dense(x);
  return {static_cast<const T*>(x.const_data_ptr()), x.dim() == 1 ? x.stride(0) : 1};
}

template <class Device>
Seed seed_of(Device& device, const Tensor& x) {
  check_dtype(x, ScalarType::Long, "seed");
  device.reads(x, "seed");
  STD_TORCH_CHECK(x.numel() == 1, "seed has ", x.numel(), " elements, expected 1");
  return device.template one<int64_t>(x, "seed");
}

inline float inverse_temperature(double t, const char* name) {
  const float inverse = 1.0f / static_cast<float>(t);
  STD_TORCH_CHECK(t > 0 && std::isnormal(inverse), name, " is ", t,
                  ", expected a positive number whose inverse is a normal float32");
  return inverse;
}

template <class Device>
RuleSpec rule_spec(Device& device, Tensor& param, int64_t rule, int64_t critical,
                   double temperature, double rule_temperature, int64_t rows, bool check) {
  RuleSpec out;
  STD_TORCH_CHECK(rule >= 0 && rule < kRules, "rule is ", rule, ", expected 0 to ", kRules - 1);
  STD_TORCH_CHECK(critical >= kExclude && critical <= kSplitItem, "critical is ", critical,
                  ", expected 0 to 2");
  out.param = per_row<double>(device, param, ScalarType::Double, rows, "param");
  out.rule = static_cast<int>(rule);
  out.critical = rule == kKnapsack ? static_cast<int>(critical) : static_cast<int>(kExclude);
  out.inv_temperature = inverse_temperature(temperature, "temperature");
  out.inv_rule_temperature = inverse_temperature(rule_temperature, "rule_temperature");
  if (check) {
    const int64_t n = out.param.stride ? rows : 1;
    const auto values = device.host(out.param, n);
    for (int64_t b = 0; b < n; ++b) {
      const double p = values[b];
      STD_TORCH_CHECK(p == p && (rule != kKnapsack || p >= 0), "invalid row: param[", b, "] is ", p,
                      rule == kKnapsack ? ", expected a budget >= 0" : ", expected a number");
    }
  }
  return out;
}

template <class Device>
void check_word(const Device& device, const PerRow<int64_t>& x, int64_t rows, int64_t limit,
                const char* name, const char* limit_text) {
  const int64_t n = x.stride ? rows : (rows ? 1 : 0);
  const auto values = device.host(x, n);
  for (int64_t b = 0; b < n; ++b)
    STD_TORCH_CHECK(values[b] >= 0 && values[b] < limit, "invalid row: ", name, "[", b, "] is ",
                    values[b], ", expected 0 <= ", name, " < ", limit_text);
}

constexpr int64_t kWord = int64_t{1} << 32;

inline uint32_t counter_field(int64_t value, int64_t limit, const char* name) {
  STD_TORCH_CHECK(value >= 0 && value < limit, name, " is ", value, ", expected 0 to ", limit - 1);
  return static_cast<uint32_t>(value);
}

template <class Device>
KeySpec key_spec(Device& device, const Tensor& seed, Tensor& position, Tensor& sequence,
                 int64_t iteration, Tensor& rollout, bool do_sample, int64_t rows, bool check,
                 int64_t more_positions = 0) {
  KeySpec out;
  out.seed = seed_of(device, seed);
  out.position = per_row<int64_t>(device, position, ScalarType::Long, rows, "position");
  out.sequence = per_row<int64_t>(device, sequence, ScalarType::Long, rows, "sequence");
  out.iteration = counter_field(iteration, 1 << 12, "iteration");
  out.rollout = per_row<int64_t>(device, rollout, ScalarType::Long, rows, "rollout");
  out.do_sample = do_sample;
  if (check && do_sample) {
    check_word(device, out.position, rows, kWord - more_positions, "position",
               more_positions ? ("2**32 - " + std::to_string(more_positions)).c_str() : "2**32");
    check_word(device, out.sequence, rows, kWord, "sequence", "2**32");
    check_word(device, out.rollout, rows, 1 << 16, "rollout", "65536");
  }
  return out;
}

constexpr const char* kBadRow = " has NaN or +inf, or no finite value";

}  // namespace bind
}  // namespace tta
