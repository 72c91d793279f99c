// The canonical order of a sum over a row, and reading and writing rows in their own dtype.
// Included once per instruction set.
//
// Tiles of 4096 elements; element j of a tile belongs to virtual lane j mod 128; a lane adds its
// elements in order, in float32; the 128 lanes fold l + 64, l + 32, ... l + 1; tiles are added left
// to right in float64.

namespace tta {
namespace TTA_ISA {

constexpr int kAcc = kLanes / kWidth;        // vectors that hold the 128 lanes
constexpr int kHalves = kAcc == 16 ? 2 : 1;  // AVX2 has 16 registers: 8 accumulators a sweep
constexpr int kSweep = kAcc / kHalves;

// The 128 lanes to one float, l + 64 first, l + 1 last.
TTA_INLINE float fold(F* acc) {
  for (int n = kAcc / 2; n >= 1; n /= 2)
    for (int k = 0; k < n; ++k) acc[k] = add(acc[k], acc[k + n]);
  float lane[kWidth];
  store(lane, acc[0]);
  for (int n = kWidth / 2; n >= 1; n /= 2)
    for (int k = 0; k < n; ++k) lane[k] += lane[k + n];
  return lane[0];
}

TTA_INLINE int dtype_bytes(int dtype) { return dtype == kFloat32 ? 4 : 2; }

template <int kType>
TTA_INLINE F load_as(const char* data, int64_t j) {
  if constexpr (kType == kFloat32) return load(reinterpret_cast<const float*>(data) + j);
  if constexpr (kType == kFloat16) return load_half(reinterpret_cast<const uint16_t*>(data) + j);
  return load_bfloat16(reinterpret_cast<const uint16_t*>(data) + j);
}

template <int kType>
TTA_INLINE void store_as(char* data, int64_t j, F x) {
  if constexpr (kType == kFloat32) return store(reinterpret_cast<float*>(data) + j, x);
  if constexpr (kType == kFloat16) return store_half(reinterpret_cast<uint16_t*>(data) + j, x);
  store_bfloat16(reinterpret_cast<uint16_t*>(data) + j, x);
}

TTA_INLINE float element(const char* data, int dtype, int64_t j) {
  if (dtype == kFloat32) return reinterpret_cast<const float*>(data)[j];
  const uint16_t raw = reinterpret_cast<const uint16_t*>(data)[j];
  return dtype == kFloat16 ? half_to_float(raw) : bfloat16_to_float(raw);
}

template <int kType>
static void convert(const char* data, int64_t begin, int count, float* out) {
  int j = 0;
  for (; j + 4 * kWidth <= count; j += 4 * kWidth)
    for (int k = 0; k < 4 * kWidth; k += kWidth)
      store(out + j + k, load_as<kType>(data, begin + j + k));
  for (; j + kWidth <= count; j += kWidth) store(out + j, load_as<kType>(data, begin + j));
  for (; j < count; ++j) out[j] = element(data, kType, begin + j);
}

static void load_raw(const char* data, int dtype, int64_t begin, int count, float* out) {
  if (dtype == kFloat32) return convert<kFloat32>(data, begin, count, out);
  if (dtype == kFloat16) return convert<kFloat16>(data, begin, count, out);
  convert<kBFloat16>(data, begin, count, out);
}

TTA_INLINE float exp_scalar(float x) {
  float lane[kWidth];
  store(lane, exp(set1(x)));
  return lane[0];
}

}  // namespace TTA_ISA
}  // namespace tta
