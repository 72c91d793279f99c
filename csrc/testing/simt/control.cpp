// control.h for Python's ctypes (tests/simt.py).

#include "control.h"

#include <cstring>

#define TTA_SIMT_EXPORT extern "C" __attribute__((visibility("default")))

TTA_SIMT_EXPORT int simt_has_hooks() { return simt::has_hooks(); }

TTA_SIMT_EXPORT void simt_configure(uint64_t seed, double preempt, int bounds, int races,
                                    int uninitialised, uint64_t step_limit, const char* forget,
                                    const char* forget_in, int forget_at) {
  simt::options = {seed,       preempt, bounds != 0, races != 0, uninitialised != 0,
                   step_limit, forget,  forget_in,   forget_at};
}

TTA_SIMT_EXPORT void simt_add_buffer(const void* data, size_t bytes, int writable,
                                     const char* name) {
  simt::add_buffer(data, bytes, writable != 0, name);
}

TTA_SIMT_EXPORT void simt_clear_buffers() { simt::clear_buffers(); }

TTA_SIMT_EXPORT const char* simt_error() { return simt::error().c_str(); }

TTA_SIMT_EXPORT void simt_clear_error() { simt::clear_error(); }

// In the order of the fields; starts counting anew.
TTA_SIMT_EXPORT void simt_statistics(uint64_t* out) {
  const simt::Statistics& s = simt::statistics;
  const uint64_t fields[] = {s.launches, s.blocks,          s.switches,     s.accesses,
                             s.barriers, s.warp_operations, s.shared_bytes, s.max_threads};
  std::memcpy(out, fields, sizeof fields);
  simt::statistics = simt::Statistics();
}
