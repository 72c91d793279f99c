// How a test drives the SIMT layer: options, device buffers, the report of the first fault.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace simt {

struct Options {
  // Order of the threads of a block and of the blocks: 0 ascending, 1 descending, else random.
  uint64_t seed = 0;
  // Probability of a switch to another thread before a memory access (hook build), and before an
  // atomic (every build).
  double preempt = 0;
  // The hook build's checks: addresses, happens-before, reads of shared memory nobody wrote.
  bool bounds = true;
  bool races = true;
  bool uninitialised = true;
  // Memory accesses of a block without a barrier, a warp operation or an exit before the kernel
  // counts as an endless loop.
  uint64_t step_limit = 200'000'000;
  // Synchronisation that is left out, as if the kernel's author had forgotten it: the function,
  // such as "__syncthreads", the end of its file's path, and the line of the call (0: each of the
  // file).
  std::string forget, forget_in;
  int forget_at = 0;
};

extern Options options;

// True where the kernels were compiled with hooks, that is, where accesses are checked.
bool has_hooks();

// What kernels may touch: exact to the byte. Buffers must not overlap.
void add_buffer(const void* data, size_t bytes, bool writable, const std::string& name);
void clear_buffers();

// "" or the first fault since clear_error(). After one, launches do nothing.
const std::string& error();
void clear_error();

// What the launches since reset_statistics() did.
struct Statistics {
  uint64_t launches = 0, blocks = 0, switches = 0, accesses = 0, barriers = 0, warp_operations = 0;
  uint64_t shared_bytes = 0;  // most of one block, static and dynamic
  unsigned max_threads = 0;   // of one block
};
extern Statistics statistics;

}  // namespace simt
