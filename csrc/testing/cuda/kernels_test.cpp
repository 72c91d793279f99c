// Every CUDA entry point against the CPU kernels, bit for bit, on random inputs; no Python, no
// torch. Needs a CUDA device (or the SIMT layer); without one it ends with 77, "skipped".
//
//   kernels_test [all|deferral|verify|sampling|knapsack|prelogit|control]
//                [--repetitions N] [--seed S] [--vocab LARGEST] [--width BLOCKS]
//   kernels_test common OPERATOR [--batch B] [--vocab V] [--seed S] [--width BLOCKS]
//                [--dtype float32|float16|bfloat16] [--shape SHAPE] [--budget BUDGET]
// `common` takes the call of common_cases.cpp that has this name, over logits of one of its shapes,
// by its own rule or a knapsack. Where no more than `width` blocks
// fill the device (1: always), blocks take several tiles.
#include <cstdlib>
#include <cstring>

#include "testing/cuda/cases.h"

namespace {

using tta::testing::Options;
using tta::testing::Random;

struct Family {
  const char* name;
  void (*run)(const Options&, Random*);
};
const Family kFamilies[] = {
    {"deferral", tta::testing::deferral_cases}, {"verify", tta::testing::verify_cases},
    {"sampling", tta::testing::sampling_cases}, {"knapsack", tta::testing::knapsack_cases},
    {"prelogit", tta::testing::prelogit_cases}, {"control", tta::testing::control_cases}};

constexpr int kSkipped = 77, kUsage = 2;

bool read_number(const char* text, int64_t least, int64_t* value) {
  char* end = nullptr;
  *value = std::strtoll(text, &end, 10);
  return *text && !*end && *value >= least;
}

bool read_budget(const char* text, double* value) {
  char* end = nullptr;
  *value = std::strtod(text, &end);
  return *text && !*end && *value >= 0.0;
}

bool read_dtype(const char* text, int* dtype) {
  const char* names[] = {"float32", "float16", "bfloat16"};
  for (int i = 0; i < 3; ++i)
    if (!std::strcmp(text, names[i])) {
      *dtype = i;
      return true;
    }
  return false;
}

bool read_options(int argc, char** argv, Options* o) {
  int words = 0;
  for (int i = 1; i < argc; ++i) {
    if (std::strncmp(argv[i], "--", 2)) {
      (words++ ? o->op : o->family) = argv[i];
      continue;
    }
    if (i + 1 == argc) return false;
    const char* name = argv[i];
    const char* value = argv[++i];
    int64_t number = 0;
    bool good = false;
    if (!std::strcmp(name, "--dtype")) {
      good = read_dtype(value, &o->dtype);
    } else if (!std::strcmp(name, "--shape")) {
      o->shape = value;
      good = tta::testing::known_shape(o->shape);
    } else if (!std::strcmp(name, "--budget")) {
      good = read_budget(value, &o->budget);
    } else if (!std::strcmp(name, "--repetitions")) {
      good = read_number(value, 1, &o->repetitions);
    } else if (!std::strcmp(name, "--seed")) {
      good = read_number(value, 0, &number);
      o->seed = static_cast<uint64_t>(number);
    } else if (!std::strcmp(name, "--vocab")) {
      good = read_number(value, 1, &o->vocab);
    } else if (!std::strcmp(name, "--width")) {
      good = read_number(value, 1, &tta::testing::device_width());
    } else if (!std::strcmp(name, "--batch")) {
      good = read_number(value, 1, &o->batch);
    }
    if (!good) return false;
  }
  return words == (o->family == "common" ? 2 : words < 1 ? 0 : 1);
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  bool known = read_options(argc, argv, &options);
  if (known && !tta::testing::has_device()) {
    std::printf("kernels_test: skipped, there is no CUDA device\n");
    return kSkipped;
  }
  Random random(options.seed);
  if (known && options.family == "common") {
    known = tta::testing::common_case(options, &random);
  } else if (known) {
    known = options.family == "all";
    for (const Family& family : kFamilies)
      if (options.family == "all" || options.family == family.name) {
        known = true;
        family.run(options, &random);
      }
  }
  if (!known) {
    std::fprintf(stderr,
                 "usage: kernels_test [all|deferral|verify|sampling|knapsack|prelogit|control]\n"
                 "                    [--repetitions N] [--seed S] [--vocab LARGEST]\n"
                 "                    [--width BLOCKS]\n"
                 "       kernels_test common OPERATOR [--batch B] [--vocab V] [--seed S]\n"
                 "                    [--width BLOCKS] [--dtype float32|float16|bfloat16]\n"
                 "                    [--shape SHAPE] [--budget BUDGET]\n");
    return kUsage;
  }
  return tta::testing::finish("kernels_test");
}
