// tta_ext_testing: csrc/core and the row kernels for pytest, per instruction set, on NumPy arrays.
// Built on demand by tests/native.py; never part of a wheel.
//
// `level` is 0 scalar, 1 AVX2, 2 AVX-512. A row of logits is a 1-d float32 or float16 array, or a
// uint16 array of bfloat16 patterns.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/rules.h"
#include "testing/functions.h"

namespace py = pybind11;

namespace {

using tta::testing::CutView;
using tta::testing::Functions;
using tta::testing::RowView;
template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

const Functions& at(int level) {
  if (level < 0 || level > tta::testing::best_level())
    throw py::value_error("level " + std::to_string(level) + " is not available here");
  return tta::testing::functions(level);
}

// The caller keeps `logits` alive while the view is used.
RowView row(const py::array& logits, float inv_temperature) {
  if (logits.ndim() != 1 || logits.size() < 1)
    throw py::value_error("expected a row of at least one logit");
  if (logits.strides(0) != logits.itemsize()) throw py::value_error("expected unit stride");
  if (logits.size() > 1 << 20) throw py::value_error("expected at most 2**20 logits");
  const char kind = logits.dtype().kind();
  const py::ssize_t size = logits.itemsize();
  int dtype;
  if (kind == 'f' && size == 4)
    dtype = tta::kFloat32;
  else if (kind == 'f' && size == 2)
    dtype = tta::kFloat16;
  else if (kind == 'u' && size == 2)
    dtype = tta::kBFloat16;
  else
    throw py::type_error("expected float32, float16 or uint16 (bfloat16 patterns)");
  return {logits.data(), dtype, logits.size(), inv_temperature};
}

Array<float> map(void (*function)(const float*, int64_t, float*), const Array<float>& x) {
  Array<float> out(x.size());
  function(x.data(), x.size(), out.mutable_data());
  return out;
}

template <class T>
void same_size(const Array<T>& a, const Array<T>& b) {
  if (a.size() != b.size()) throw py::value_error("expected arrays of one size");
}

// Of a row, as RuleTest asks for them.
struct MaxProbability {
  float value;
  float max_probability() const { return value; }
};

}  // namespace

PYBIND11_MODULE(tta_ext_testing, m) {
  m.doc() = "tta_ext's core arithmetic and row kernels, one instruction set at a time.";
  m.def("levels", [] {
    std::vector<std::string> names;
    for (int level = 0; level <= tta::testing::best_level(); ++level)
      names.push_back(tta::testing::functions(level).name);
    return names;
  });
  m.def("exp", [](int level, const Array<float>& x) { return map(at(level).exp, x); });
  m.def("log", [](int level, const Array<float>& x) { return map(at(level).log, x); });
  m.def("normal_pair", [](int level, const Array<uint32_t>& a, const Array<uint32_t>& b) {
    same_size(a, b);
    Array<float> cosine(a.size()), sine(a.size());
    at(level).normal_pair(a.data(), b.data(), a.size(), cosine.mutable_data(), sine.mutable_data());
    return std::make_pair(cosine, sine);
  });
  m.def("noise", [](int level, int64_t n, uint64_t seed, uint32_t step, uint32_t sequence,
                    uint32_t iteration, uint32_t rollout) {
    Array<float> out(n);
    const uint32_t word3 = tta::counter_word3(tta::kNoise, iteration, rollout);
    at(level).noise(seed, step, sequence, word3, 0, n, out.mutable_data());
    return out;
  });
  m.def("philox", [](const std::vector<uint32_t>& counter, const std::vector<uint32_t>& key) {
    if (counter.size() != 4 || key.size() != 2)
      throw py::value_error("expected a counter of four words and a key of two");
    const tta::Philox4 block = tta::philox4x32(
        tta::Philox4{{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
    return std::vector<uint32_t>(block.x, block.x + 4);
  });
  m.def("half_to_float", [](const Array<uint16_t>& x) {
    Array<float> out(x.size());
    for (py::ssize_t i = 0; i < x.size(); ++i)
      out.mutable_data()[i] = tta::half_to_float(x.data()[i]);
    return out;
  });
  m.def("float_to_half", [](const Array<float>& x) {
    Array<uint16_t> out(x.size());
    for (py::ssize_t i = 0; i < x.size(); ++i)
      out.mutable_data()[i] = tta::float_to_half(x.data()[i]);
    return out;
  });
  // (name, code, whether it reads q) of every rule.
  m.def("rules", [] {
#define TTA_ROW(name, code, reads_q, test) {#name, tta::name, tta::rule_needs_proxy(tta::name)},
    return std::vector<std::tuple<std::string, int, bool>>{TTA_RULES(TTA_ROW)};
#undef TTA_ROW
  });
  m.def("rule_defers",
        [](int rule, double param, float max_p, float max_q, float p, float q, double distance) {
          const auto test = tta::RuleTest::of(rule, param, MaxProbability{max_p},
                                              MaxProbability{max_q}, [=] { return distance; });
          return test.defers(test.by_proxy ? q : p);
        });
  // (valid, maximum, Z)
  m.def("canonical_sum", [](int level, const py::array& logits, float inv_temperature) {
    tta::testing::RowStats s;
    at(level).stats(row(logits, inv_temperature), &s);
    return py::make_tuple(s.valid, s.max, s.z);
  });
  // S of everything ordered strictly before (x[i], id[i]).
  m.def("prefix_sum", [](int level, const py::array& logits, float inv_temperature,
                         const std::vector<float>& x, const std::vector<int64_t>& id) {
    if (x.size() != id.size()) throw py::value_error("expected as many logits as ids");
    std::vector<CutView> cut;
    for (size_t i = 0; i < x.size(); ++i) cut.push_back({x[i], id[i]});
    Array<double> out(static_cast<py::ssize_t>(cut.size()));
    at(level).prefix_sum(row(logits, inv_temperature), cut.data(), static_cast<int64_t>(cut.size()),
                         out.mutable_data());
    return out;
  });
  // The critical item of each capacity, -1 for none.
  m.def("knapsack_cut", [](int level, const py::array& logits, float inv_temperature,
                           const Array<double>& capacity) {
    std::vector<tta::testing::CriticalItem> item(static_cast<size_t>(capacity.size()));
    at(level).knapsack_cut(row(logits, inv_temperature), capacity.data(), capacity.size(),
                           item.data());
    Array<int64_t> out(capacity.size());
    for (size_t i = 0; i < item.size(); ++i) out.mutable_data()[i] = item[i].id;
    return out;
  });
  m.def("draw",
        [](int level, const py::array& logits, float inv_temperature, const Array<double>& u) {
          Array<int64_t> out(u.size());
          at(level).draw(row(logits, inv_temperature), u.data(), u.size(), out.mutable_data());
          return out;
        });
  m.def("probabilities", [](int level, const py::array& logits, float inv_temperature) {
    Array<float> out(logits.size());
    at(level).probabilities(row(logits, inv_temperature), out.mutable_data());
    return out;
  });
}
