// Blocks of Philox4x32-10, as `torch.ops.tta_ext.philox` shows them: 32-bit patterns in int64.
//
// Thread map: a thread a block of four words, 32 consecutive bytes in and out, in loads and stores
// of 16 bytes where the arrays are aligned to them. One pass; 64 bytes a block. Every block is a
// function of its own counter alone.

#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace tta {
namespace cuda {
namespace {

constexpr unsigned kPhiloxThreads = 256;

template <bool kAligned>
__global__ void __launch_bounds__(kPhiloxThreads) philox_kernel(PhiloxArgs a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kPhiloxThreads + threadIdx.x;
  if (i >= a.blocks) return;
  const int64_t* counter = a.counter + 4 * i;
  int64_t* out = a.out + 4 * i;
  Philox4 c;
  if (kAligned) {
    const uint4 low = reinterpret_cast<const uint4*>(counter)[0];
    const uint4 high = reinterpret_cast<const uint4*>(counter)[1];
    c = Philox4{{low.x, low.z, high.x, high.z}};
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k) c.x[k] = static_cast<uint32_t>(counter[k]);
  }
  const Philox4 word =
      philox4x32(c, static_cast<uint32_t>(a.key_low[0]), static_cast<uint32_t>(a.key_high[0]));
  if (kAligned) {
    reinterpret_cast<uint4*>(out)[0] = make_uint4(word.x[0], 0u, word.x[1], 0u);
    reinterpret_cast<uint4*>(out)[1] = make_uint4(word.x[2], 0u, word.x[3], 0u);
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k) out[k] = static_cast<int64_t>(word.x[k]);
  }
}

}  // namespace

Need need_of(const PhiloxArgs&) { return {}; }

cudaError_t philox(const PhiloxArgs& a, const Launch& launch) {
  if (a.blocks == 0) return cudaSuccess;
  // 2^31 blocks, the most of a line, would be terabytes.
  const unsigned grid = static_cast<unsigned>((a.blocks + kPhiloxThreads - 1) / kPhiloxThreads);
  const bool is_aligned =
      (reinterpret_cast<uintptr_t>(a.counter) | reinterpret_cast<uintptr_t>(a.out)) % 16 == 0;
  if (is_aligned) {
    TTA_LAUNCH((philox_kernel<true>), grid, kPhiloxThreads, 0, launch.stream, a);
  } else {
    TTA_LAUNCH((philox_kernel<false>), grid, kPhiloxThreads, 0, launch.stream, a);
  }
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace tta
