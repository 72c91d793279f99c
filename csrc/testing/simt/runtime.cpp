// The SIMT layer's machine: a fiber a thread, blocks one after another in an order drawn from the
// seed, barriers, warp operations, shared memory. shadow.cpp checks the memory accesses.
//
// A fiber runs until it meets a synchronisation, exits or is preempted. Whatever a thread order
// can hide in a correct program it must not change: results under seeds 0, 1 and random ones agree.
//
// Never compiled with -fsanitize=thread, and used by one host thread at a time.

#include "runtime.h"

#include <sys/mman.h>
#include <xmmintrin.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <unordered_map>

#if !defined(__x86_64__) || !defined(__GNUC__)
#error "the SIMT layer switches fibers in x86-64 assembly for GCC"
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// tta_simt_switch(save, load): parks the callee-saved registers on this stack, stores its pointer
// in *save and continues on the stack `load`.
extern "C" __attribute__((visibility("hidden"))) void tta_simt_switch(void** save, void* load);
asm(R"(
  .text
  .p2align 4
  .globl tta_simt_switch
  .hidden tta_simt_switch
  .type tta_simt_switch, @function
tta_simt_switch:
  pushq %r15
  pushq %r14
  pushq %r13
  pushq %r12
  pushq %rbx
  pushq %rbp
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %rbp
  popq %rbx
  popq %r12
  popq %r13
  popq %r14
  popq %r15
  ret
  .size tta_simt_switch, .-tta_simt_switch
)");

namespace simt {

Options options;
Statistics statistics;
Thread* current = nullptr;
uint3 block_index;
dim3 grid_size, block_size;

std::vector<Fiber> fibers;
uint32_t block_serial = 0, first_serial = 1;
uint32_t epoch = 0;
bool in_layer = false;
const char* kernel_name = "";
std::vector<SharedObject> shared_objects;
char* static_arena = nullptr;
size_t static_used = 0;
char* dynamic_arena = nullptr;
size_t dynamic_used = 0;
const char* parameters = nullptr;
size_t parameter_bytes = 0;
std::vector<Buffer> buffers;

#if defined(__SANITIZE_ADDRESS__)
size_t stack_bytes = 512 << 10;
#else
size_t stack_bytes = 128 << 10;
#endif

namespace {

std::string first_error;
void* main_stack_pointer = nullptr;
#if defined(__SANITIZE_ADDRESS__)
void* main_fake_stack = nullptr;
const void* main_stack = nullptr;
size_t main_stack_bytes = 0;
#endif
std::vector<char*> stacks;
Invoke invoke = nullptr;
const void* closure = nullptr;
std::unordered_map<const void*, size_t> dynamic_limit;
size_t shared_limit = 0;            // of this launch, static and dynamic
std::vector<uint32_t> block_order;  // position in the launch -> linear block index

// Threads that can run, first come first served; random orders swap before they take.
std::vector<unsigned> queue;
size_t queue_head = 0, queue_size = 0;

unsigned exited = 0, arrived = 0;
unsigned first_arrival = 0;  // whose site the barrier has
Vote barrier_vote = Vote::kNone;
int barrier_value = 0;
std::vector<unsigned> waiting;  // lanes of each warp in an unfinished warp operation
std::vector<unsigned> gone;     // lanes of each warp that exited or never were

uint64_t random_state = 0;

void push(unsigned thread) {
  size_t tail = queue_head + queue_size++;
  if (tail >= queue.size()) tail -= queue.size();
  queue[tail] = thread;
}

unsigned pop() {
  if (options.seed > 1) {
    const size_t other = (queue_head + random_bits() % queue_size) % queue.size();
    std::swap(queue[queue_head], queue[other]);
  }
  const unsigned thread = queue[queue_head];
  if (++queue_head == queue.size()) queue_head = 0;
  --queue_size;
  return thread;
}

void ready(unsigned thread) {
  fibers[thread].state = State::kReady;
  push(thread);
}

// Ascending order, or descending where the seed says so.
template <class F>
void in_order(unsigned count, F&& visit) {
  if (options.seed == 1)
    for (unsigned i = count; i-- > 0;) visit(i);
  else
    for (unsigned i = 0; i < count; ++i) visit(i);
}

void to_scheduler(Fiber& fiber, bool for_ever = false) {
  shadow::settle();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &fiber.fake_stack, main_stack,
                                 main_stack_bytes);
#else
  (void)for_ever;
#endif
  tta_simt_switch(&fiber.stack_pointer, main_stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
}

void run(Fiber& fiber) {
  ++statistics.switches;
  current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&main_fake_stack, fiber.stack, stack_bytes);
#endif
  tta_simt_switch(&main_stack_pointer, fiber.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(main_fake_stack, nullptr, nullptr);
#endif
  current = nullptr;
}

std::string place(const Site& site) {
  std::string file = site.file;
  const size_t tree = file.rfind("csrc/");
  if (tree != std::string::npos) file = file.substr(tree);
  return std::string(site.function) + " at " + file + ":" + std::to_string(site.line);
}

bool same_site(const Site& a, const Site& b) {
  return a.line == b.line && !std::strcmp(a.function, b.function) && !std::strcmp(a.file, b.file);
}

bool forgotten(const Site& site) {
  if (options.forget.empty() || options.forget != site.function) return false;
  const std::string_view file = site.file, end = options.forget_in;
  return file.size() >= end.size() && file.substr(file.size() - end.size()) == end &&
         (!options.forget_at || options.forget_at == site.line);
}

std::string lanes(unsigned mask) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

// A thread leaves the kernel.
[[noreturn]] void leave() {
  Fiber& fiber = running();
  shadow::settle();
  fiber.state = State::kExited;
  gone[fiber.warp] |= 1u << fiber.lane;
  ++exited;
  shadow::progress();
  for (unsigned others = waiting[fiber.warp]; others; others &= others - 1) {
    const Fiber& other = fibers[fiber.warp * kWarp + __builtin_ctz(others)];
    if (other.mask >> fiber.lane & 1)
      fail("warp operation: thread " + std::to_string(other.linear) + " waits in " +
           place(other.site) + " with mask " + lanes(other.mask) +
           " for a lane that exits the kernel");
  }
  if (arrived)
    fail("barrier: a thread exits while thread " + std::to_string(first_arrival) + " waits in " +
         place(fibers[first_arrival].site));
  to_scheduler(fiber, true);
  __builtin_trap();
}

[[noreturn]] void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_stack_bytes);
#endif
  in_layer = false;
  invoke(closure);
  in_layer = true;
  leave();
}

void prepare(Fiber& fiber) {
  // Stack tops of all threads would fall into the same cache sets.
  char* top = fiber.stack + stack_bytes - fiber.linear % 61 * 64;
#if defined(__SANITIZE_ADDRESS__)
  // leave() did not return, so the red zones of its frame are still there.
  __asan_unpoison_memory_region(top - (16 << 10), 16 << 10);
#endif
  void** sp = reinterpret_cast<void**>(top);
  *--sp = nullptr;  // entry() returns nowhere; this aligns its frame as a call does
  *--sp = reinterpret_cast<void*>(&entry);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  fiber.stack_pointer = sp;
}

void no_progress() {
  const Fiber* stuck = nullptr;
  for (const Fiber& fiber : fibers)
    if (fiber.state == State::kWarpOp && !stuck) stuck = &fiber;
  if (!stuck) {
    report("deadlock: some threads wait in " + place(fibers[first_arrival].site) + " and " +
           std::to_string(exited) + " have exited");
    return;
  }
  std::string text = "deadlock: thread " + std::to_string(stuck->linear) + " waits in " +
                     place(stuck->site) + " with mask " + lanes(stuck->mask);
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    const unsigned thread = stuck->warp * kWarp + lane;
    if (!(stuck->mask >> lane & 1) || thread >= fibers.size()) continue;
    const Fiber& other = fibers[thread];
    if (other.state == State::kBarrier ||
        (other.state == State::kWarpOp && !same_site(other.site, stuck->site))) {
      text += " for thread " + std::to_string(thread) + ", which waits in " + place(other.site);
      break;
    }
  }
  current = const_cast<Fiber*>(stuck);
  report(text);
  current = nullptr;
}

void run_block(uint32_t linear) {
  const unsigned threads = static_cast<unsigned>(fibers.size());
  block_index = {linear % grid_size.x, linear / grid_size.x % grid_size.y,
                 linear / grid_size.x / grid_size.y};
  epoch = 0;
  exited = arrived = 0;
  queue_head = queue_size = 0;
  // Poison: what the block before left here would hide a missing initialisation.
  for (const SharedObject& object : shared_objects)
    std::memset(static_arena + object.offset, 0xff, object.bytes);
  if (dynamic_arena) std::memset(dynamic_arena, 0xff, dynamic_used);
  waiting.assign((threads + kWarp - 1) / kWarp, 0);
  gone.assign(waiting.size(), 0);
  if (threads % kWarp) gone.back() = ~0u << threads % kWarp;
  for (Fiber& fiber : fibers) prepare(fiber);
  shadow::begin_block();
  in_order(threads, ready);
  ++statistics.blocks;
  while (queue_size && first_error.empty()) run(fibers[pop()]);
  if (first_error.empty() && exited != threads) no_progress();
}

void make_fibers(unsigned threads) {
  while (stacks.size() < threads) {
    const size_t guard = 4096;
    void* memory = mmap(nullptr, stack_bytes + guard, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE)) {
      std::fprintf(stderr, "simt: no memory for the stacks of %u threads\n", threads);
      std::abort();
    }
    stacks.push_back(static_cast<char*>(memory) + guard);
  }
  fibers.assign(threads, Fiber());
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    fiber.index = {t % block_size.x, t / block_size.x % block_size.y,
                   t / block_size.x / block_size.y};
    fiber.linear = t;
    fiber.lane = t % kWarp;
    fiber.warp = t / kWarp;
    fiber.stack = stacks[t];
  }
}

// What a GPU would refuse.
std::string launch_fault(const void* kernel, dim3 grid, dim3 block, size_t bytes) {
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  if (!threads || threads > kMaxThreads || block.z > 64)
    return "block of " + std::to_string(threads) + " threads";
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return "grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
           std::to_string(grid.z) + " blocks";
  if (static_cast<uint64_t>(grid.x) * grid.y * grid.z >= 0x7fffffffu)
    return "more blocks than this layer can number";
  const auto limit = dynamic_limit.find(kernel);
  const size_t allowed = limit == dynamic_limit.end() ? kStaticShared : limit->second;
  if (bytes > allowed)
    return std::to_string(bytes) + " bytes of dynamic shared memory where " +
           std::to_string(allowed) + " are allowed (cudaFuncSetAttribute)";
  shared_limit = limit == dynamic_limit.end() ? kStaticShared : kMaxShared;
  return "";
}

}  // namespace

bool has_hooks() {
#if defined(TTA_SIMT_HOOKS)
  return true;
#else
  return false;
#endif
}

const std::string& error() { return first_error; }
void clear_error() { first_error.clear(); }

uint64_t random_bits() {  // splitmix64
  uint64_t z = random_state += 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

std::string describe(uint32_t serial, unsigned thread) {
  const uint32_t linear = block_order[serial - first_serial];
  std::string text = "block " + std::to_string(linear % grid_size.x);
  if (grid_size.y * grid_size.z > 1)
    text += "," + std::to_string(linear / grid_size.x % grid_size.y) + "," +
            std::to_string(linear / grid_size.x / grid_size.y);
  return text + " thread " + std::to_string(thread);
}

std::string describe(const Fiber& fiber) { return describe(block_serial, fiber.linear); }

void report(const std::string& text) {
  in_layer = true;  // until a kernel's thread runs again
  if (!first_error.empty()) return;
  first_error = text;
  if (*kernel_name) first_error += std::string(" | kernel ") + kernel_name;
  if (current) first_error += " " + describe(running());
}

void fail(const std::string& text) {
  report(text);
  if (!current) {
    std::fprintf(stderr, "simt: %s\n", first_error.c_str());
    std::abort();
  }
  Fiber& fiber = running();
  fiber.state = State::kExited;
  to_scheduler(fiber);
  __builtin_trap();
}

void fail_at(const char* what, const char* file, int line) {
  in_layer = true;
  fail("assertion: " + place(Site{what, file, line}));
}

void misaligned(const void* address, size_t bytes, const char* function) {
  in_layer = true;
  fail("misaligned: " + std::string(function) + " of " + std::to_string(bytes) +
       " bytes at an address that is " +
       std::to_string(reinterpret_cast<uintptr_t>(address) % bytes) + " modulo " +
       std::to_string(bytes));
}

void give_way() {
  Fiber& fiber = running();
  push(fiber.linear);
  to_scheduler(fiber);
}

int block_barrier(Vote vote, int predicate, Site site) {
  const Inside inside;
  if (forgotten(site)) return predicate;
  Fiber& fiber = running();
  shadow::settle();
  if (exited)
    fail("barrier: " + place(site) + " after " + std::to_string(exited) +
         " threads of the block have exited");
  fiber.site = site;
  if (!arrived) {
    first_arrival = fiber.linear;
    barrier_vote = vote;
    barrier_value = vote == Vote::kAnd;
  } else if (!same_site(site, fibers[first_arrival].site)) {
    fail("divergent barrier: " + place(site) + " while thread " + std::to_string(first_arrival) +
         " waits in " + place(fibers[first_arrival].site));
  }
  if (vote == Vote::kOr) barrier_value |= predicate != 0;
  if (vote == Vote::kAnd) barrier_value &= predicate != 0;
  if (vote == Vote::kCount) barrier_value += predicate != 0;
  fiber.state = State::kBarrier;
  if (++arrived == fibers.size()) {
    arrived = 0;
    ++statistics.barriers;
    shadow::barrier();
    ++epoch;
    in_order(static_cast<unsigned>(fibers.size()), [](unsigned thread) {
      fibers[thread].value = static_cast<uint64_t>(barrier_value);
      ready(thread);
    });
  }
  to_scheduler(fiber);
  return static_cast<int>(fiber.value);
}

namespace {

uint64_t combine(WarpOp op, uint64_t a, uint64_t b) {
  const auto as_signed = [](uint64_t x) { return static_cast<int32_t>(x); };
  const auto as_unsigned = [](uint64_t x) { return static_cast<uint32_t>(x); };
  switch (op) {
    case WarpOp::kAdd:
      return as_unsigned(a) + as_unsigned(b);
    case WarpOp::kMinS:
      return as_signed(a) < as_signed(b) ? a : b;
    case WarpOp::kMaxS:
      return as_signed(a) > as_signed(b) ? a : b;
    case WarpOp::kMinU:
      return as_unsigned(a) < as_unsigned(b) ? a : b;
    case WarpOp::kMaxU:
      return as_unsigned(a) > as_unsigned(b) ? a : b;
    case WarpOp::kAnd:
      return a & b;
    case WarpOp::kOr:
      return a | b;
    case WarpOp::kXor:
      return a ^ b;
    default:
      return 0;
  }
}

// All lanes of the mask are here.
void finish_warp_operation(unsigned warp, unsigned mask, WarpOp op) {
  Fiber* const lane = &fibers[warp * kWarp];
  ++statistics.warp_operations;
  if (op == WarpOp::kSync) {
    shadow::warp_barrier(warp, mask);
  } else if (op == WarpOp::kShuffle) {
    uint64_t given[kWarp];
    for (unsigned m = mask; m; m &= m - 1) given[__builtin_ctz(m)] = lane[__builtin_ctz(m)].value;
    for (unsigned m = mask; m; m &= m - 1) {
      Fiber& fiber = lane[__builtin_ctz(m)];
      if (!(mask >> fiber.source & 1))
        fail("warp operation: thread " + std::to_string(fiber.linear) + " reads lane " +
             std::to_string(fiber.source) + " in " + place(fiber.site) + ", outside its mask " +
             lanes(mask));
      fiber.value = given[fiber.source];
    }
  } else {
    uint64_t result = 0;
    bool first = true;
    for (unsigned m = mask; m; m &= m - 1) {
      const unsigned i = static_cast<unsigned>(__builtin_ctz(m));
      if (op == WarpOp::kBallot) {
        result |= static_cast<uint64_t>(lane[i].value != 0) << i;
      } else {
        result = first ? lane[i].value : combine(op, result, lane[i].value);
        first = false;
      }
    }
    for (unsigned m = mask; m; m &= m - 1) lane[__builtin_ctz(m)].value = result;
  }
  waiting[warp] &= ~mask;
  in_order(kWarp, [&](unsigned i) {
    if (mask >> i & 1) ready(warp * kWarp + i);
  });
}

}  // namespace

uint64_t warp_operation(WarpOp op, unsigned mask, uint64_t value, unsigned source, Site site) {
  const Inside inside;
  if (op == WarpOp::kSync && forgotten(site)) return 0;
  Fiber& fiber = running();
  shadow::settle();
  shadow::progress();
  const unsigned self = 1u << fiber.lane;
  if (!(mask & self))
    fail("warp operation: the caller of " + place(site) + " is not in its mask " + lanes(mask));
  if (mask & gone[fiber.warp])
    fail("warp operation: mask " + lanes(mask) + " of " + place(site) +
         " names lanes that have exited or do not exist: " + lanes(mask & gone[fiber.warp]));
  fiber.op = op;
  fiber.site = site;
  fiber.mask = mask;
  fiber.value = value;
  fiber.source = source;
  // Two lanes that name each other from different places can never meet.
  bool complete = true;
  for (unsigned others = waiting[fiber.warp] & mask; others; others &= others - 1) {
    const Fiber& other = fibers[fiber.warp * kWarp + __builtin_ctz(others)];
    if (other.mask == mask && other.op == op && same_site(other.site, site)) {
      // It was compared with all that came before it, and they with each other.
      break;
    }
    if (other.mask & self)
      fail("divergent warp operation: " + place(site) + " with mask " + lanes(mask) +
           " while thread " + std::to_string(other.linear) + " waits in " + place(other.site) +
           " with mask " + lanes(other.mask));
    complete = false;  // it waits with others first
  }
  fiber.state = State::kWarpOp;
  waiting[fiber.warp] |= self;
  if ((waiting[fiber.warp] & mask) == mask) {
    for (unsigned m = mask; m && complete; m &= m - 1)
      complete = fibers[fiber.warp * kWarp + __builtin_ctz(m)].mask == mask;
    if (complete) finish_warp_operation(fiber.warp, mask, op);
  }
  to_scheduler(fiber);
  return fiber.value;
}

void fence(bool whole_device, Site site) {
  const Inside inside;
  if (forgotten(site)) return;
  shadow::settle();
  shadow::fence(running(), whole_device);
}

void* shared_object(const void* site, size_t bytes, size_t alignment, const char* name) {
  const Inside inside;
  for (const SharedObject& object : shared_objects)
    if (object.site == site) return static_arena + object.offset;
  // A gap before every object shows an index that runs over. The place is aligned to no more than
  // the type asks for, so that a cast to a wider vector shows too.
  size_t offset = (static_used + 32 + 2 * alignment - 1) / (2 * alignment) * (2 * alignment);
  offset += alignment;
  if (offset + bytes > kArena) fail("launch: more static shared memory than this layer holds");
  size_t total = bytes;
  for (const SharedObject& object : shared_objects) total += object.bytes;
  if (total > kStaticShared || total + dynamic_used > shared_limit)
    fail("launch: " + std::to_string(total) + " bytes of static and " +
         std::to_string(dynamic_used) + " of dynamic shared memory");
  shared_objects.push_back({site, offset, bytes, name});
  static_used = offset + bytes;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(static_arena + offset, bytes);
#endif
  shadow::shared_grew();
  statistics.shared_bytes = std::max<uint64_t>(statistics.shared_bytes, total + dynamic_used);
  return static_arena + offset;
}

void* dynamic_shared(size_t alignment) {
  const Inside inside;
  if (!dynamic_arena) fail("launch: dynamic shared memory of a launch that asked for none");
  if (alignment > 16) fail("launch: dynamic shared memory is aligned to 16 bytes");
  return dynamic_arena;
}

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || static_cast<size_t>(value) > kMaxShared) {
    report("launch: " + std::to_string(value) + " bytes of dynamic shared memory");
    return cudaErrorInvalidValue;
  }
  dynamic_limit[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

void launch_block_grid(const char* name, const void* kernel, dim3 grid, dim3 block, size_t bytes,
                       Invoke function, const void* data, size_t data_bytes) {
  if (!first_error.empty()) return;
  kernel_name = name;
  const std::string fault = launch_fault(kernel, grid, block, bytes);
  if (!fault.empty()) {
    report("launch: " + fault);
    kernel_name = "";
    return;
  }
  grid_size = grid;
  block_size = block;
  invoke = function;
  closure = data;
  parameters = static_cast<const char*>(data);
  parameter_bytes = data_bytes;
  const unsigned threads = block.x * block.y * block.z;
  const uint32_t blocks = grid.x * grid.y * grid.z;
  ++statistics.launches;
  statistics.max_threads = std::max(statistics.max_threads, threads);
  make_fibers(threads);
  queue.assign(threads, 0);
  if (!static_arena) static_arena = static_cast<char*>(std::aligned_alloc(4096, kArena));
  shared_objects.clear();
  static_used = 0;
  dynamic_used = bytes;
  // Ends where the allocation ends, for ASan; aligned to 16 bytes and no further.
  void* dynamic_memory = nullptr;
  if (bytes && posix_memalign(&dynamic_memory, 32, bytes + 16)) std::abort();
  dynamic_arena = bytes ? static_cast<char*>(dynamic_memory) + 16 : nullptr;
  statistics.shared_bytes = std::max<uint64_t>(statistics.shared_bytes, bytes);
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(static_arena, kArena);
#endif
  std::memset(static_arena, 0xff, kArena);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(static_arena, kArena);  // until shared_object() hands parts out
#endif

  random_state = options.seed * 0x2545F4914F6CDD1Dull + 1;
  block_order.resize(blocks);
  std::iota(block_order.begin(), block_order.end(), 0u);
  if (options.seed == 1) std::reverse(block_order.begin(), block_order.end());
  if (options.seed > 1)
    for (uint32_t i = blocks; i > 1; --i)
      std::swap(block_order[i - 1], block_order[random_bits() % i]);

  // The kernels' arithmetic is IEEE with subnormals, whatever the host thread has set.
  const unsigned control = _mm_getcsr();
  _mm_setcsr(0x1f80);
  if (block_serial > 0x7fffffffu - blocks) block_serial = 0, shadow::buffers_changed();
  first_serial = block_serial + 1;
  shadow::begin_launch();
  for (uint32_t i = 0; i < blocks && first_error.empty(); ++i) {
    ++block_serial;
    run_block(block_order[i]);
  }
  _mm_setcsr(control);

#if defined(__SANITIZE_ADDRESS__)
  if (!first_error.empty())  // frames that were never left
    for (char* stack : stacks) __asan_unpoison_memory_region(stack, stack_bytes);
#endif
  std::free(dynamic_memory);
  dynamic_arena = nullptr;
  parameters = nullptr;
  kernel_name = "";
}

void add_buffer(const void* data, size_t bytes, bool writable, const std::string& name) {
  if (!bytes) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  const Buffer buffer{begin, begin + bytes, writable, name, 0};
  const auto at =
      std::upper_bound(buffers.begin(), buffers.end(), buffer,
                       [](const Buffer& a, const Buffer& b) { return a.begin < b.begin; });
  if ((at != buffers.end() && at->begin < buffer.end) ||
      (at != buffers.begin() && (at - 1)->end > buffer.begin)) {
    report("buffers: " + name + " overlaps another one");
    return;
  }
  buffers.insert(at, buffer);
  shadow::buffers_changed();
}

void clear_buffers() {
  buffers.clear();
  shadow::buffers_changed();
}

const Buffer* find_buffer(uintptr_t address) {
  size_t low = 0, high = buffers.size();
  while (low < high) {
    const size_t middle = (low + high) / 2;
    if (buffers[middle].begin <= address)
      low = middle + 1;
    else
      high = middle;
  }
  return low && address < buffers[low - 1].end ? &buffers[low - 1] : nullptr;
}

}  // namespace simt

namespace {

bool in_buffer(const void* data, size_t bytes, bool write, const char* call) {
  if (!simt::error().empty()) return false;
  if (simt::buffers.empty() || !bytes) return true;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  const simt::Buffer* const buffer = simt::find_buffer(begin);
  if (buffer && begin + bytes <= buffer->end && (buffer->writable || !write)) return true;
  simt::report(std::string("out of bounds: ") + call + " of " + std::to_string(bytes) + " bytes" +
               (buffer ? " in " + buffer->name : ""));
  return false;
}

}  // namespace

cudaError_t cudaPeekAtLastError() {
  return simt::error().empty() ? cudaSuccess : cudaErrorLaunchFailure;
}
cudaError_t cudaGetLastError() { return cudaPeekAtLastError(); }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    default:
      return simt::error().c_str();
  }
}

cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t) {
  if (!in_buffer(target, bytes, true, "cudaMemsetAsync")) return cudaErrorInvalidValue;
  if (bytes) std::memset(target, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t) {
  const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  if ((from_device && !in_buffer(source, bytes, false, "cudaMemcpyAsync")) ||
      (to_device && !in_buffer(target, bytes, true, "cudaMemcpyAsync")))
    return cudaErrorInvalidValue;
  if (bytes) std::memcpy(target, source, bytes);
  return cudaSuccess;
}
