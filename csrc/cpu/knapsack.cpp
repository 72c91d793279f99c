// greedy_knapsack: the 0-1 knapsack by falling density profit / weight, for any profits and
// weights, without sorting.
//
// Order: density (a float64 quotient) falling, ties by rising id. Items of weight 0 come first and
// are taken; items heavier than the capacity are left out beforehand. An item is taken iff S(v),
// the canonical float64 sum of the weights ordered at or before it, is at most the capacity; the
// first one not taken is the critical item, and Dantzig's bound fills the rest with a part of it.
//
// Passes over memory, 8 V bytes in and V out: one computes the densities (kept in scratch, 8 V
// bytes); one adds up the weights above eight sampled densities, which bracket the cut; one
// compacts the bracket, and the step repeats on a list about nine times shorter each time. Inexact
// sums answer only where they clear the capacity by more than their error; S decides the rest.

#define TTA_TARGET_FILE "cpu/knapsack.cpp"
#include "cpu/foreach_isa.h"

#include "cpu/denormals.h"
#include "cpu/kad.h"

namespace tta {
namespace TTA_ISA {

TTA_INLINE D load_d(const double* p) {
  D out;
  std::memcpy(&out, p, sizeof out);
  return out;
}

// Items ordered strictly before (density, id).
struct DensityCut {
  double density = -0.5;  // all eligible items; ineligible ones have density -1
  int32_t id = 0;
};

TTA_INLINE M before(D density, I id, D cut, I cut_id) {
  return mask_or(less(cut, density), mask_and(equal(density, cut), less(id, cut_id)));
}

// Scratch of one thread: densities, and the shrinking list of candidates.
struct Items {
  int64_t capacity = 0;
  std::unique_ptr<double[]> density, list_density;
  std::unique_ptr<float[]> list_weight;
  std::unique_ptr<int32_t[]> list_id;
  void reserve(int64_t n) {
    if (n <= capacity) return;
    const int64_t padded = n + kLanes + 2 * kWidth;
    density.reset(new double[padded]);
    list_density.reset(new double[padded]);
    list_weight.reset(new float[padded]);
    list_id.reset(new int32_t[padded]);
    capacity = n;
  }
};

// Canonical float64 sum of x over the items before the cut.
static double sum_before(const float* x, const double* density, int64_t n, const DensityCut& cut) {
  constexpr int kPart = kAcc < 4 ? kAcc : 4;  // vectors a sweep: eight registers of float64
  alignas(64) float tail[kTile];
  const D cut_density = set1d(cut.density);
  const I cut_id = set1i(cut.id);
  double total = 0.0;
  for (int64_t begin = 0; begin < n; begin += kTile) {
    const int count = n - begin < kTile ? static_cast<int>(n - begin) : kTile;
    const int padded = (count + kLanes - 1) / kLanes * kLanes;
    const float* value = x + begin;
    if (count != padded) {
      std::memcpy(tail, value, static_cast<size_t>(count) * sizeof(float));
      for (int j = count; j < padded; ++j) tail[j] = 0.0f;
      value = tail;
    }
    D acc[kAcc];
    for (int h = 0; h < kAcc; h += kPart) {
      D part[kPart];
      for (int k = 0; k < kPart; ++k) part[k] = set1d(0.0);
      for (int j = h * kWidth; j < padded; j += kLanes) {
        for (int k = 0; k < kPart; ++k) {
          const int i = j + k * kWidth;
          const M in =
              before(load_d(density + begin + i),
                     add(iota(), set1i(static_cast<int32_t>(begin) + i)), cut_density, cut_id);
          part[k] = add(part[k], keep(in, widen(load(value + i))));
        }
      }
      for (int k = 0; k < kPart; ++k) acc[h + k] = part[k];
    }
    for (int n_left = kAcc / 2; n_left >= 1; n_left /= 2)
      for (int k = 0; k < n_left; ++k) acc[k] = add(acc[k], acc[k + n_left]);
    double lane[kWidth];
    store(lane, acc[0]);
    for (int n_left = kWidth / 2; n_left >= 1; n_left /= 2)
      for (int k = 0; k < n_left; ++k) lane[k] += lane[k + n_left];
    total += lane[0];
  }
  return total;
}

// Densities of a row, padded to whole lanes. False: a negative, infinite or NaN value.
static bool densities(const float* profit, const float* weight, int64_t n, double capacity,
                      double* out, int* culprit) {
  const F zero = set1(0.0f), infinity = set1(kInfinity);
  const D limit = set1d(capacity);
  bool good = true;
  int64_t j = 0;
  for (; j + kWidth <= n; j += kWidth) {
    const F p = load(profit + j), w = load(weight + j);
    const M valid = mask_and(mask_and(less_equal(zero, p), less(p, infinity)),
                             mask_and(less_equal(zero, w), less(w, infinity)));
    good = good && lanes(valid) == (kWidth == 32 ? ~0u : (1u << kWidth) - 1u);
    const D wide = widen(w);
    const D quotient = div(widen(p), wide);
    D value = keep(less(zero, w), quotient);
    const D free = keep(equal(w, zero), set1d(std::numeric_limits<double>::infinity()));
    value = max(value, free);
    value = sub(keep(mask_not(less(limit, wide)), value), keep(less(limit, wide), set1d(1.0)));
    store(out + j, value);
  }
  for (; j < n; ++j) {
    const float p = profit[j], w = weight[j];
    good = good && p >= 0.0f && p < kInfinity && w >= 0.0f && w < kInfinity;
    const double wide = static_cast<double>(w);
    out[j] = wide > capacity ? -1.0
             : w == 0.0f     ? std::numeric_limits<double>::infinity()
                             : static_cast<double>(p) / wide;
  }
  for (const int64_t padded = (n + kLanes - 1) / kLanes * kLanes; j < padded; ++j) out[j] = -1.0;
  if (!good) {
    *culprit = 1;
    for (int64_t i = 0; i < n; ++i)
      if (!(profit[i] >= 0.0f && profit[i] < kInfinity)) *culprit = 0;
  }
  return good;
}

// Writes the items that `stays` names to the end of the list.
TTA_INLINE void append(Items* items, int64_t* count, M stays, D density, F weight, I id) {
  const uint32_t bits = lanes(stays);
  double lane[kWidth];
  store(lane, density);
  double* out = items->list_density.get() + *count;
#if TTA_ISA_LEVEL == 2
  const __mmask8 low = static_cast<__mmask8>(stays.v), high = static_cast<__mmask8>(stays.v >> 8);
  _mm512_storeu_pd(out, _mm512_maskz_compress_pd(low, density.lo));
  _mm512_storeu_pd(out + __builtin_popcount(low), _mm512_maskz_compress_pd(high, density.hi));
#else
  for (uint32_t left = bits; left; left &= left - 1) *out++ = lane[__builtin_ctz(left)];
#endif
  compress_store(items->list_weight.get() + *count, stays, weight);
  compress_store(items->list_id.get() + *count, stays, id);
  *count += __builtin_popcount(bits);
}

constexpr int kSample = 63;

// Eight rising densities from a strided sample of the list.
static void sample_probes(const Items& items, int64_t count, double* probe) {
  double sample[kSample];
  for (int i = 0; i < kSample; ++i) {
    const double d = items.list_density[count * (2 * i + 1) / (2 * kSample)];
    int j = i;
    for (; j > 0 && sample[j - 1] > d; --j) sample[j] = sample[j - 1];
    sample[j] = d;
  }
  for (int i = 0; i < kProbes; ++i) probe[i] = sample[7 * i + 6];
}

// The critical item: the first whose S exceeds the capacity. Exists unless S of all is within it.
static DensityCut critical_item(const float* weight, int64_t n, double capacity, double total,
                                Items* items) {
  const double slack = total * 1e-10;
  const double* density = items->density.get();
  int64_t count = 0;
  {
    const D zero = set1d(-0.5), top = set1d(std::numeric_limits<double>::infinity());
    int64_t j = 0;
    for (; j + kWidth <= n; j += kWidth) {
      const D d = load_d(density + j);
      append(items, &count, mask_and(less(zero, d), less(d, top)), d, load(weight + j),
             add(iota(), set1i(static_cast<int32_t>(j))));
    }
    for (; j < n; ++j) {
      if (!(density[j] >= 0.0) || weight[j] == 0.0f) continue;
      items->list_density[count] = density[j];
      items->list_weight[count] = weight[j];
      items->list_id[count++] = static_cast<int32_t>(j);
    }
  }
  DensityCut critical;
  double taken = 0.0;  // approximate weight of the items already known to come before
  const double* ld = items->list_density.get();
  const float* lw = items->list_weight.get();
  const int32_t* li = items->list_id.get();
  bool narrowing = true;
  while (count) {
    double probe[kProbes];
    const int64_t size = count;
    int probes = kProbes;
    int32_t pivot_id = 0;
    narrowing = narrowing && size > 64;
    if (narrowing) {
      sample_probes(*items, size, probe);
    } else {
      probes = 1;
      probe[0] = ld[size / 2];
      pivot_id = li[size / 2];
    }
    // Weight of the items denser than each probe (narrowing), or at or before the pivot.
    double mass[kProbes];
    D sum[kProbes], limit[kProbes];
    for (int i = 0; i < kProbes; ++i) {
      sum[i] = set1d(0.0);
      limit[i] = set1d(probe[i < probes ? i : 0]);
    }
    const I through = set1i(pivot_id + 1);
    for (int k = 0; k < kWidth; ++k) {  // a whole vector at the end of the list
      items->list_density[size + k] = -1.0;
      items->list_weight[size + k] = 0.0f;
      items->list_id[size + k] = 0;
    }
    for (int64_t j = 0; j < size; j += kWidth) {
      const D d = load_d(ld + j);
      const D w = widen(load(lw + j));
      if (narrowing) {
        for (int i = 0; i < kProbes; ++i) sum[i] = add(sum[i], keep(less(limit[i], d), w));
      } else {
        sum[0] = add(sum[0], keep(before(d, load_i(li + j), limit[0], through), w));
      }
    }
    for (int i = 0; i < probes; ++i) mass[i] = taken + sum_exact(sum[i]);

    // Everything denser than `upper` is taken; the critical item is denser than or equal to
    // `lower`.
    double upper = std::numeric_limits<double>::infinity(), lower = -0.5;
    bool pivot_taken = false;
    double new_taken = taken;
    if (narrowing) {
      for (int i = 0; i < kProbes; ++i) {
        if (mass[i] <= capacity - slack) {
          if (probe[i] < upper) {
            upper = probe[i];
            new_taken = mass[i];
          }
        } else if (mass[i] > capacity + slack && probe[i] > lower) {
          lower = probe[i];
        }
      }
    } else {
      pivot_taken = mass[0] <= capacity - slack ||
                    (mass[0] <= capacity + slack &&
                     sum_before(weight, density, n, {probe[0], pivot_id + 1}) <= capacity);
      if (pivot_taken)
        new_taken = mass[0];
      else
        critical = {probe[0], pivot_id};
    }
    count = 0;
    const D up = set1d(upper), low = set1d(lower), nothing = set1d(-0.5);
    const I same_id = set1i(pivot_id);
    for (int64_t j = 0; j < size; j += kWidth) {
      const D d = load_d(ld + j);
      const F w = load(lw + j);
      const I id = load_i(li + j);
      M stays;
      if (narrowing) {
        stays = mask_and(less(low, d), mask_not(less(up, d)));
      } else if (pivot_taken) {
        stays = mask_not(before(d, id, limit[0], through));
      } else {
        stays = mask_and(before(d, id, limit[0], through),
                         mask_not(mask_and(equal(d, limit[0]), equal(id, same_id))));
      }
      append(items, &count, mask_and(stays, less(nothing, d)), d, w, id);
    }
    taken = new_taken;
    if (narrowing && count > size / 2) narrowing = false;
  }
  return critical;
}

static void knapsack_row(const KnapsackArgs& a, int64_t b, Items* items) {
  const float* profit = a.profit + b * a.profit_stride;
  const float* weight = a.weight + b * a.weight_stride;
  bool* selected = a.selected + b * a.selected_stride;
  const double capacity = a.capacity[b];
  const int64_t n = a.items;
  items->reserve(n);
  double* density = items->density.get();
  int culprit = 0;
  const bool good = densities(profit, weight, n, capacity, density, &culprit);
  if (!good) a.invalid->note(b, culprit);
  if (!good || !(capacity >= 0.0)) {
    std::memset(selected, 0, static_cast<size_t>(n));
    a.used[b] = a.value[b] = a.upper_bound[b] = std::numeric_limits<double>::quiet_NaN();
    a.critical_index[b] = -2;
    return;
  }
  DensityCut cut;
  const double total = sum_before(weight, density, n, cut);
  const bool all = total <= capacity;
  if (!all) cut = critical_item(weight, n, capacity, total, items);
  const D cut_density = set1d(cut.density);
  const I cut_id = set1i(cut.id);
  for (int64_t j = 0; j < n; j += kWidth) {
    const M in = before(load_d(density + j), add(iota(), set1i(static_cast<int32_t>(j))),
                        cut_density, cut_id);
    write_bools(selected + j, lanes(in), n - j < kWidth ? static_cast<int>(n - j) : kWidth);
  }
  a.used[b] = all ? total : sum_before(weight, density, n, cut);
  a.value[b] = sum_before(profit, density, n, cut);
  a.critical_index[b] = all ? -1 : cut.id;
  const double part = all ? 0.0 : (capacity - a.used[b]) * cut.density;
  a.upper_bound[b] = a.value[b] + part;
}

static void knapsack_rows(void* context, int64_t begin, int64_t end) {
  const KeepDenormals guard;
  const KnapsackArgs& a = *static_cast<const KnapsackArgs*>(context);
  static thread_local Items items;
  for (int64_t b = begin; b < end; ++b) knapsack_row(a, b, &items);
}

void greedy_knapsack(const KnapsackArgs& a, const Parallel& parallel) {
  parallel.run(a.batch, parallel.grain, knapsack_rows, const_cast<KnapsackArgs*>(&a));
}

}  // namespace TTA_ISA

#if TTA_ISA_LEVEL == 0
void greedy_knapsack(const KnapsackArgs& a, const Parallel& parallel) {
  TTA_DISPATCH(greedy_knapsack, a, parallel)
}
#endif

}  // namespace tta
