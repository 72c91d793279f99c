// greedy_knapsack.
#include <cmath>

#include "testing/cuda/cases.h"

namespace tta {
namespace testing {

void knapsack_cases(const Options& options, Random* random) {
  for (int64_t i = 0; i < options.repetitions; ++i) {
    const int64_t items = random_vocab(options.vocab, random), batch = 1 + random->below(3);
    const int64_t stride = items + random->below(3), skip = random->below(4);
    const bool wide = random->below(6) == 0;
    const int64_t likeness = random->below(4);  // of densities: a few, close ones, else any
    const std::string where = "repetition " + std::to_string(i) + ", items " +
                              std::to_string(items) + ", likeness " + std::to_string(likeness) +
                              (wide ? ", wide" : "");
    Twin<float> profit((batch - 1) * stride + items, skip);
    Twin<float> weight((batch - 1) * stride + items, skip);
    Twin<double> capacity(batch);
    for (int64_t j = 0; j < profit.count(); ++j) {
      weight[j] = static_cast<float>(std::exp(random_normal(random)));
      if (random->below(50) == 0) weight[j] = 0.0f;
      if (random->below(100) == 0) weight[j] *= 1000.0f;
      if (wide) weight[j] = std::ldexp(weight[j], static_cast<int>(random->below(200)) - 130);
      profit[j] = static_cast<float>(random->uniform());
      if (likeness == 0)
        profit[j] = weight[j] * static_cast<float>(random->below(3));
      else if (likeness == 1)
        profit[j] = weight[j] * (1.0f + 1e-6f * profit[j]);
    }
    if (random->below(6) == 0) weight[random->below(weight.count())] = std::nanf("");
    if (random->below(6) == 0) profit[random->below(profit.count())] = -1.0f;
    for (int64_t b = 0; b < batch; ++b) {
      double total = 0.0;
      const int64_t prefix = random->below(items + 1);
      for (int64_t j = 0; j < prefix; ++j) total += static_cast<double>(weight[b * stride + j]);
      capacity[b] =
          pick({0.0, 1e-3, 1.0, total, 2.0 * total, total * random->uniform(), -1.0, std::nan("")},
               random);
    }
    profit.upload();
    weight.upload();
    capacity.upload();
    const InvalidTwin invalid;
    const KnapsackOutputs out(batch, items, skip);
    call_both<KnapsackArgs>(
        greedy_knapsack, cuda::greedy_knapsack,
        [&](Side side) {
          KnapsackArgs a;
          a.profit = profit.at(side);
          a.weight = weight.at(side);
          a.profit_stride = a.weight_stride = stride;
          a.batch = batch;
          a.items = items;
          a.capacity = {capacity.at(side), 1};
          out.at(side, &a);
          a.invalid = invalid.at(side);
          return a;
        },
        where);
    out.compare_in(where);
    compare("invalid", where, invalid);
  }
}

}  // namespace testing
}  // namespace tta
