// What the two halves of the SIMT layer share: runtime.cpp (fibers, scheduling, barriers, warp
// operations, shared memory) and shadow.cpp (checks of memory accesses, hook build only).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "control.h"
#include "simt.h"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace simt {

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kStaticShared = 48 << 10;  // of a block, without cudaFuncSetAttribute
constexpr size_t kMaxShared = 99 << 10;     // with it: sm_120's, the least of our architectures

enum class State : uint8_t { kReady, kBarrier, kWarpOp, kExited };

struct Fiber : Thread {
  void* stack_pointer = nullptr;
  char* stack = nullptr;  // lowest address
  State state = State::kReady;
  WarpOp op = WarpOp::kSync;
  Site site{};
  unsigned mask = 0, source = 0;
  uint64_t value = 0;  // given to the operation, then its result
  void* fake_stack = nullptr;
};

extern std::vector<Fiber> fibers;
extern size_t stack_bytes;
// Grows with every block of every launch, so that old records need no clearing.
extern uint32_t block_serial, first_serial;
// Barriers that this block has passed.
extern uint32_t epoch;
extern const char* kernel_name;

// The layer's own templates may be linked to copies of them that a kernel file instantiated, with
// hooks: while the layer works they must not count as the kernel's accesses.
extern bool in_layer;
struct Inside {
  Inside() { in_layer = true; }
  ~Inside() { in_layer = false; }
};

inline Fiber& running() { return *static_cast<Fiber*>(current); }

uint64_t random_bits();
// "block (0,0,0) thread 5"; and the same of another block and thread of this launch.
std::string describe(const Fiber& fiber);
std::string describe(uint32_t serial, unsigned thread);

// Records the first error: "KIND: TEXT | kernel K block B thread T".
void report(const std::string& text);
// The same from a kernel's thread, which does not go on.
[[noreturn]] void fail(const std::string& text);
// Lets other threads go first.
void give_way();

struct SharedObject {
  const void* site;
  size_t offset, bytes;
  const char* name;
};
extern std::vector<SharedObject> shared_objects;
extern char* static_arena;  // kArena bytes
extern size_t static_used;
extern char* dynamic_arena;  // dynamic_used bytes, or null
extern size_t dynamic_used;
constexpr size_t kArena = 2 * kStaticShared;  // gaps included

// The closure that holds the kernel's arguments.
extern const char* parameters;
extern size_t parameter_bytes;

// shadow.cpp; without hooks these do nothing.
namespace shadow {
void begin_launch();
void begin_block();
void settle();  // before a thread stops running
void barrier();
void warp_barrier(unsigned warp, unsigned mask);
void progress();  // a synchronisation happened: no endless loop
void fence(Fiber& fiber, bool whole_device);
void shared_grew();
void buffers_changed();
}  // namespace shadow

struct Buffer {
  uintptr_t begin, end;
  bool writable;
  std::string name;
  unsigned index;  // of its shadow
};
// Sorted by address.
extern std::vector<Buffer> buffers;
const Buffer* find_buffer(uintptr_t address);

}  // namespace simt
