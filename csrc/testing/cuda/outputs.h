// What the operators with several outputs write, on both sides: at(side) into their arguments, then
// compared.
#pragma once

#include "testing/cuda/device.h"

namespace tta {
namespace testing {

struct MaskOutputs {
  int64_t vocab;
  Twin<bool> mask;
  Twin<int64_t> critical;
  Twin<float> fraction;
  MaskOutputs(int64_t rows, int64_t vocab, int64_t skip = 0)
      : vocab(vocab), mask(rows * vocab, skip), critical(rows), fraction(rows) {}
  void at(Side side, MaskArgs* a) const {
    a->mask = mask.at(side);
    a->mask_stride = vocab;
    a->critical_index = critical.at(side);
    a->fraction = fraction.at(side);
  }
  void compare_in(const std::string& where) const {
    compare("mask", where, mask);
    compare("mask critical", where, critical);
    compare("mask fraction", where, fraction);
  }
};

struct ProbsOutputs {
  int64_t vocab;
  Twin<float> probs;
  ProbsOutputs(int64_t rows, int64_t vocab, int64_t skip = 0)
      : vocab(vocab), probs(rows * vocab, skip) {}
  void at(Side side, ProbsArgs* a) const {
    a->out = probs.at(side);
    a->out_stride = vocab;
  }
  void compare_in(const std::string& where) const { compare("probs", where, probs); }
};

struct StatsOutputs {
  Twin<double> mass, used;
  Twin<int64_t> critical;
  Twin<float> cut;
  explicit StatsOutputs(int64_t rows) : mass(rows), used(rows), critical(rows), cut(rows) {}
  void at(Side side, StatsArgs* a) const {
    a->deferred_mass = mass.at(side);
    a->critical_index = critical.at(side);
    a->cut_logit = cut.at(side);
    a->used = used.at(side);
  }
  void compare_in(const std::string& where) const {
    compare("stats mass", where, mass);
    compare("stats critical", where, critical);
    compare("stats cut", where, cut);
    compare("stats used", where, used);
  }
};

struct SampleOutputs {
  Twin<int64_t> token;
  Twin<bool> deferred;
  explicit SampleOutputs(int64_t rows) : token(rows), deferred(rows) {}
  void at(Side side, SampleArgs* a) const {
    a->token = token.at(side);
    a->deferred = deferred.at(side);
  }
  void compare_in(const std::string& where) const {
    compare("token", where, token);
    compare("deferred", where, deferred);
  }
};

struct VerifyOutputs {
  Twin<int64_t> accepted, token;
  Twin<bool> deferred;
  Twin<double> mass;
  VerifyOutputs(int64_t batch, int64_t positions)
      : accepted(batch), token(batch), deferred(batch), mass(batch * positions) {}
  void at(Side side, VerifyArgs* a) const {
    a->accepted = accepted.at(side);
    a->token = token.at(side);
    a->deferred = deferred.at(side);
    a->mass = mass.at(side);
  }
  void compare_in(const std::string& where) const {
    compare("accepted", where, accepted);
    compare("verified token", where, token);
    compare("verified deferred", where, deferred);
    compare("verified mass", where, mass);
  }
};

struct KnapsackOutputs {
  int64_t items;
  Twin<bool> selected;
  Twin<double> used, value, bound;
  Twin<int64_t> critical;
  KnapsackOutputs(int64_t batch, int64_t items, int64_t skip = 0)
      : items(items),
        selected(batch * items, skip),
        used(batch),
        value(batch),
        bound(batch),
        critical(batch) {}
  void at(Side side, KnapsackArgs* a) const {
    a->selected = selected.at(side);
    a->selected_stride = items;
    a->used = used.at(side);
    a->value = value.at(side);
    a->critical_index = critical.at(side);
    a->upper_bound = bound.at(side);
  }
  void compare_in(const std::string& where) const {
    compare("selected", where, selected);
    compare("used", where, used);
    compare("value", where, value);
    compare("critical", where, critical);
    compare("upper bound", where, bound);
  }
};

struct WeightsOutputs {
  Twin<float> weights, ess;
  WeightsOutputs(int64_t prompts, int64_t rollouts) : weights(prompts * rollouts), ess(prompts) {}
  void at(Side side, WeightsArgs* a) const {
    a->weights = weights.at(side);
    a->ess = ess.at(side);
  }
  void compare_in(const std::string& where) const {
    compare("weights", where, weights);
    compare("ess", where, ess);
  }
};

}  // namespace testing
}  // namespace tta
