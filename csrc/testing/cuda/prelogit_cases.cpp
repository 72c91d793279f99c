// prelogit_perturb, normal, philox.
#include "testing/cuda/cases.h"

namespace tta {
namespace testing {
namespace {

// `packed`: rows without padding, at aligned addresses.
void perturb_case(int64_t dim, int dtype, bool packed, float sigma, Random* random) {
  constexpr int64_t kPrompts = 2, kSteps = 3;
  const int64_t rows = 1 + random->below(4), stride = dim + (packed ? 0 : random->below(4));
  const int64_t skip = packed ? 0 : random->below(4), size = bytes_of(dtype);
  const std::string where = "perturb " + std::to_string(rows) + " x " + std::to_string(dim) +
                            ", dtype " + std::to_string(dtype) + (packed ? ", packed" : "") +
                            ", sigma " + std::to_string(sigma);
  const Twin<char> hidden(((rows - 1) * stride + dim) * size, skip * size);
  const Twin<char> out(rows * dim * size, skip * size);
  const Twin<float> mean(kPrompts * kSteps * dim, skip), dot(rows);
  const Twin<int64_t> step(rows), prompt(rows), sequence(rows), rollout(rows), seed(1);
  for (int64_t j = 0; j < hidden.count() / size; ++j)
    store(hidden.at(kHost), dtype, j, static_cast<float>(random_normal(random)));
  for (int64_t j = 0; j < mean.count(); ++j) mean[j] = static_cast<float>(random_normal(random));
  for (int64_t r = 0; r < rows; ++r) {
    step[r] = random->below(kSteps + 2) - 1;  // steps outside are copied
    prompt[r] = random->below(kPrompts);
    sequence[r] = random->below(int64_t{1} << 32);
    rollout[r] = random->below(65536);
    dot[r] = static_cast<float>(random->uniform());
  }
  seed[0] = static_cast<int64_t>(random->next());
  hidden.upload();
  mean.upload();
  dot.upload();
  for (const Twin<int64_t>* numbers : {&step, &prompt, &sequence, &rollout, &seed})
    numbers->upload();
  call_both<PerturbArgs>(
      prelogit_perturb, cuda::prelogit_perturb,
      [&](Side side) {
        PerturbArgs a;
        a.hidden = hidden.at(side);
        a.out = out.at(side);
        a.dtype = dtype;
        a.hidden_stride = stride;
        a.out_stride = a.dim = dim;
        a.rows = rows;
        a.mean = mean.at(side);
        a.mean_prompt_stride = kSteps * dim;
        a.mean_step_stride = dim;
        a.prompts = kPrompts;
        a.steps = kSteps;
        a.step = {step.at(side), 1};
        a.prompt = {prompt.at(side), 1};
        a.sequence = {sequence.at(side), 1};
        a.rollout = {rollout.at(side), 1};
        a.iteration = 4095;
        a.sigma = sigma;
        a.seed = {seed.at(side), 0};
        a.dot = dot.at(side);
        return a;
      },
      where);
  compare("hidden", where, out);
  compare("dot", where, dot);
}

}  // namespace

void normal_case(int64_t count, int64_t skip, Random* random) {
  const Twin<float> out(count, skip);
  const int64_t seed = static_cast<int64_t>(random->next());
  const std::string where = "normal " + std::to_string(count);
  call_both<NormalArgs>(
      normal, cuda::normal,
      [&](Side side) {
        NormalArgs a;
        a.out = out.at(side);
        a.count = count;
        a.seed = seed;
        a.step = 7;
        a.sequence = 0xffffffffu;
        a.word3 = 0x7fff1234u;
        return a;
      },
      where);
  compare("normal", where, out);
}

void philox_case(int64_t blocks, int64_t skip, Random* random) {
  const Twin<int64_t> counter(4 * blocks, skip), out(4 * blocks);
  for (int64_t i = 0; i < counter.count(); ++i) counter[i] = static_cast<int64_t>(random->next());
  counter.upload();
  const uint64_t key = random->next();
  PhiloxArgs a;
  a.counter = counter.at(kDevice);
  a.out = out.at(kDevice);
  a.blocks = blocks;
  a.key_low = static_cast<int64_t>(key & 0xffffffffu);
  a.key_high = static_cast<int64_t>(key >> 32);
  for (int64_t i = 0; i < blocks; ++i) {
    Philox4 c;
    for (int k = 0; k < 4; ++k) c.x[k] = static_cast<uint32_t>(counter[4 * i + k]);
    const Philox4 word =
        philox4x32(c, static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
    for (int k = 0; k < 4; ++k) out[4 * i + k] = static_cast<int64_t>(word.x[k]);
  }
  const std::string where = "philox " + std::to_string(blocks);
  call_cuda<PhiloxArgs>(cuda::philox, a, where);
  compare("philox", where, out);
}

void prelogit_cases(const Options& options, Random* random) {
  for (int64_t i = 0; i < options.repetitions; ++i) {
    // By chance alone, hardly any are whole groups of four.
    const bool packed = i % 2 != 0;
    const int64_t dim =
        packed ? pick<int64_t>({4, 128, 132, 4096, 8192}, random)
               : pick<int64_t>({1, 3, 4, 127, 128, 130, 2048, 4096, 4099, 8192}, random);
    for (const int dtype : {kFloat32, kFloat16, kBFloat16})
      perturb_case(dim, dtype, packed, pick({0.0f, 0.37f, 1.5f}, random), random);
    const int64_t count = 1 + random->below(options.vocab);
    normal_case(packed ? (count + 3) / 4 * 4 : count, packed ? 0 : random->below(4), random);
    philox_case(1 + random->below(300), packed ? 0 : random->below(3), random);
  }
}

}  // namespace testing
}  // namespace tta
