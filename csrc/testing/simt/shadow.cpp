// The hook build's checks. g++ -fsanitize=thread only emits a call for every access to memory that
// another thread might see (__tsan_read4 and so on); libtsan is not linked, and these functions
// here receive them, each with the thread that runs.
//
// Happens-before, per byte: an access is ordered after an older one of another thread of the block
// if a block barrier lies between (epochs), a chain of __syncwarp (clocks of a warp's lanes), or a
// release and an acquire: "write; __threadfence(); atomic on X" there, "atomic on X;
// __threadfence(); read" here. The last one alone orders blocks, whatever order they ran in, and is
// kept as the set of releases that a thread knows. Shuffles and votes order no memory.
//
// Of each byte the last write and three reads are remembered (the last, one by another warp, one by
// another block), so a race is found if it is between accesses that happen; several seeds help.

#include "runtime.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <deque>
#include <unordered_map>

namespace simt {

namespace {

uint64_t steps = 0;  // accesses since the block's last synchronisation

// A thread that waits for another one in a loop must let it run.
constexpr uint64_t kPatience = 1 << 14;

// `where` is "" or " at FILE:LINE", asked for only if it is needed.
template <class Where>
void step(Where&& where) {
  ++statistics.accesses;
  if (++steps > options.step_limit)
    fail("endless loop: " + std::to_string(steps) + " accesses without a synchronisation" +
         where());
  const bool preempted =
      options.preempt > 0 && static_cast<double>(random_bits() >> 11) * 0x1p-53 < options.preempt;
  if (preempted || steps % kPatience == 0) give_way();
}

}  // namespace

#if !defined(TTA_SIMT_HOOKS)

namespace shadow {
void begin_launch() {}
void begin_block() { steps = 0; }
void settle() {}
void barrier() { steps = 0; }
void warp_barrier(unsigned, unsigned) {}
void progress() { steps = 0; }
void fence(Fiber&, bool) {}
void shared_grew() {}
void buffers_changed() {}
}  // namespace shadow

void atomic_access(void* address, size_t bytes, void*) {
  const Inside inside;
  if (reinterpret_cast<uintptr_t>(address) % bytes) misaligned(address, bytes, "an atomic");
  step([] { return std::string(); });
}

void constant_access(const void*, size_t) {}

#else

namespace {

enum class Kind : uint8_t { kRead, kWrite, kAtomic };

// Who touched a byte, and when. serial 0: nobody.
struct Record {
  uint32_t serial = 0, epoch = 0, clock = 0;
  uint32_t pc = 0;  // offset in the module
  uint16_t thread = 0;
  bool atomic = false;
};

struct Cell {
  Record write, reads[3];
};

// Cells of 4 bytes until something narrower or misaligned comes, then of one byte.
struct Region {
  size_t bytes = 0;
  unsigned grain = 4;
  std::vector<Cell> cells;

  void resize(size_t size) {
    bytes = size;
    cells.resize((size + grain - 1) / grain);
  }
  void refine() {
    std::vector<Cell> fine(bytes);
    for (size_t i = 0; i < bytes; ++i) fine[i] = cells[i / grain];
    cells.swap(fine);
    grain = 1;
  }
};

struct Release;
// Sorted by serial, then address.
using Known = std::vector<const Release*>;

// What a thread's fence made visible to whoever sees one of its later atomics.
struct Release {
  uint32_t serial, epoch;
  uint16_t thread;
  bool whole_device;
  std::array<uint32_t, kWarp> clock;
  std::shared_ptr<const Known> known;

  bool covers(const Record& record) const {
    if (record.epoch != epoch) return record.epoch < epoch;
    return record.thread / kWarp == thread / kWarp && record.clock <= clock[record.thread % kWarp];
  }
};

// An address that atomics went to after fences.
struct SyncVariable {
  std::vector<const Release*> releases;
};

struct ThreadState {
  // clock[l]: accesses of lane l up to this clock happened before; clock[own lane] is now.
  std::array<uint32_t, kWarp> clock;
  std::shared_ptr<const Known> known;
  const Release* released = nullptr;                         // by the last fence
  std::vector<std::pair<const SyncVariable*, size_t>> seen;  // by atomics, not yet by a fence
};

std::vector<ThreadState> states;
std::shared_ptr<const Known> common;  // known to every thread at the last barrier
bool uncommon = false;                // some thread has learnt more since
std::deque<Release> releases;
std::unordered_map<uintptr_t, SyncVariable> global_variables, shared_variables;

Region static_region, dynamic_region;
std::vector<Region> buffer_regions;
bool buffers_stale = true;

bool earlier(const Release* a, const Release* b) {
  return a->serial != b->serial ? a->serial < b->serial : a < b;
}

std::shared_ptr<const Known> merge(const std::shared_ptr<const Known>& a,
                                   const std::shared_ptr<const Known>& b) {
  if (a == b || !b) return a;
  if (!a) return b;
  auto both = std::make_shared<Known>();
  std::set_union(a->begin(), a->end(), b->begin(), b->end(), std::back_inserter(*both), earlier);
  return both;
}

bool knows(const std::shared_ptr<const Known>& known, const Record& record) {
  if (!known) return false;
  auto at = std::lower_bound(known->begin(), known->end(), record.serial,
                             [](const Release* r, uint32_t serial) { return r->serial < serial; });
  for (; at != known->end() && (*at)->serial == record.serial; ++at)
    if ((*at)->covers(record)) return true;
  return false;
}

// `record` happened before whatever the thread does now.
bool ordered(const Record& record, const Fiber& fiber) {
  if (record.serial == block_serial) {
    if (record.thread == fiber.linear || record.epoch < epoch) return true;
    if (record.thread / kWarp == fiber.warp &&
        states[fiber.linear].clock[record.thread % kWarp] >= record.clock)
      return true;
  }
  return knows(states[fiber.linear].known, record);
}

// The module that holds the kernels.
struct Module {
  uintptr_t base = 0, begin = 0, end = 0;
  std::string path;
};

const Module& module() {
  static const Module found = [] {
    Module m;
    Dl_info info;
    if (!dladdr(reinterpret_cast<void*>(&has_hooks), &info)) return m;
    m.base = reinterpret_cast<uintptr_t>(info.dli_fbase);
    m.path = info.dli_fname;
    dl_iterate_phdr(
        [](dl_phdr_info* object, size_t, void* data) {
          Module& mine = *static_cast<Module*>(data);
          uintptr_t begin = ~uintptr_t{0}, end = 0;
          for (int i = 0; i < object->dlpi_phnum; ++i) {
            const auto& header = object->dlpi_phdr[i];
            if (header.p_type != PT_LOAD) continue;
            begin = std::min<uintptr_t>(begin, object->dlpi_addr + header.p_vaddr);
            end = std::max<uintptr_t>(end, object->dlpi_addr + header.p_vaddr + header.p_memsz);
          }
          if (mine.base < begin || mine.base >= end) return 0;
          mine.begin = begin;
          mine.end = end;
          return 1;
        },
        &m);
    return m;
  }();
  return found;
}

// "csrc/cuda/x.cu:12" of a return address, by addr2line; "" where that does not know.
std::string source_line(uint32_t pc) {
  if (!pc) return "";
  char offset[32];
  std::snprintf(offset, sizeof offset, "0x%x", pc - 1);  // inside the call
  const std::string command = "addr2line -i -e '" + module().path + "' " + offset + " 2>/dev/null";
  FILE* const pipe = popen(command.c_str(), "r");
  if (!pipe) return "";
  std::string found;
  char line[4096];
  while (std::fgets(line, sizeof line, pipe)) {
    std::string text = line;
    text = text.substr(0, text.find_first_of(" \n"));
    if (!found.empty() || text.find("??") != std::string::npos) continue;
    if (text.find("/simt.h:") != std::string::npos) continue;  // the layer, inlined into the kernel
    const size_t tree = text.rfind("csrc/");
    found = tree == std::string::npos ? text : text.substr(tree);
  }
  pclose(pipe);
  return found;
}

uint32_t module_offset(const void* pc) {
  return pc ? static_cast<uint32_t>(reinterpret_cast<uintptr_t>(pc) - module().base) : 0;
}

std::string at_line(uint32_t pc) {
  const std::string line = source_line(pc);
  return line.empty() ? "" : " at " + line;
}

const char* verb(Kind kind) {
  return kind == Kind::kRead ? "read" : kind == Kind::kWrite ? "write" : "atomic";
}

// A conflicting write that may turn out to write what is there already.
struct Suspect {
  bool active = false;
  const void* address = nullptr;
  size_t bytes = 0;
  unsigned char before[16];
  Kind other_kind = Kind::kRead;
  Record other;
  uint32_t pc = 0;
  const char* name = "";
  size_t offset = 0;
  bool shared = false;
} suspect;

std::string race_text(const Suspect& s, Kind kind) {
  return "race: " + std::string(verb(kind)) + " after " + verb(s.other_kind) + " on " +
         (s.shared ? "shared " : "global ") + s.name + " + " + std::to_string(s.offset) +
         at_line(s.pc) + " against " + describe(s.other.serial, s.other.thread) +
         at_line(s.other.pc);
}

bool live(const Record& record, bool shared) {
  return shared ? record.serial == block_serial : record.serial >= first_serial;
}

void remember_read(Cell& cell, const Record& record) {
  const Record last = cell.reads[0];
  cell.reads[0] = record;
  if (last.serial < first_serial || (last.serial == record.serial && last.thread == record.thread))
    return;
  if (last.serial != record.serial) {
    cell.reads[2] = last;
  } else if (last.thread / kWarp != record.thread / kWarp ||
             cell.reads[1].serial != record.serial || cell.reads[1].epoch != record.epoch ||
             cell.reads[1].thread / kWarp == record.thread / kWarp) {
    cell.reads[1] = last;
  }
}

// `bytes` of one region, from `offset`; `name_offset` is for the report.
void check_cells(Region& region, size_t offset, size_t bytes, Kind kind, bool shared,
                 const char* name, size_t name_offset, const void* address, const void* pc) {
  if (region.grain > 1 && (bytes % region.grain || offset % region.grain)) region.refine();
  const Fiber& fiber = running();
  Record record;
  record.serial = block_serial;
  record.epoch = epoch;
  record.clock = states[fiber.linear].clock[fiber.lane];
  record.pc = module_offset(pc);
  record.thread = static_cast<uint16_t>(fiber.linear);
  record.atomic = kind == Kind::kAtomic;
  for (size_t i = 0; i < bytes; i += region.grain) {
    Cell& cell = region.cells[(offset + i) / region.grain];
    if (shared && kind != Kind::kWrite && options.uninitialised &&
        cell.write.serial != block_serial)
      fail("uninitialised: " + std::string(verb(kind)) + " of shared " + name + " + " +
           std::to_string(name_offset + i) + at_line(record.pc));
    bool harmless = true;
    if (options.races) {
      const Record* other = nullptr;
      Kind other_kind = Kind::kWrite;
      if (live(cell.write, shared) && !(cell.write.atomic && record.atomic) &&
          !ordered(cell.write, fiber)) {
        other = &cell.write;
        if (cell.write.atomic) other_kind = Kind::kAtomic;
      }
      if (kind != Kind::kRead)
        for (const Record& read : cell.reads)
          if (!other && live(read, shared) && !ordered(read, fiber)) {
            other = &read;
            other_kind = Kind::kRead;
          }
      if (other) {
        Suspect found;
        found.active = true;
        found.address = address;
        found.bytes = bytes;
        found.other = *other;
        found.other_kind = other_kind;
        found.pc = record.pc;
        found.name = name;
        found.offset = name_offset + i;
        found.shared = shared;
        if (kind != Kind::kWrite || bytes > sizeof found.before) fail(race_text(found, kind));
        std::memcpy(found.before, address, bytes);
        suspect = found;
        harmless = false;
      }
    }
    if (kind == Kind::kRead) {
      remember_read(cell, record);
    } else if (harmless) {
      cell.write = record;
      for (Record& read : cell.reads) read.serial = 0;
    }
  }
}

[[noreturn]] void out_of_bounds(uintptr_t address, size_t bytes, Kind kind, const void* pc) {
  std::string text = "out of bounds: " + std::string(verb(kind)) + " of " + std::to_string(bytes) +
                     " bytes" + at_line(module_offset(pc));
  const auto beside = [&](uintptr_t begin, size_t size, const std::string& name) {
    const int64_t offset = static_cast<int64_t>(address - begin);
    if (offset > -4096 && offset < static_cast<int64_t>(size) + 4096)
      text += ", at " + name + " + " + std::to_string(offset) + " of " + std::to_string(size) +
              " bytes";
  };
  if (address - reinterpret_cast<uintptr_t>(static_arena) < kArena) {
    for (const SharedObject& object : shared_objects)
      beside(reinterpret_cast<uintptr_t>(static_arena) + object.offset, object.bytes,
             std::string("shared ") + object.name);
  } else {
    if (dynamic_arena)
      beside(reinterpret_cast<uintptr_t>(dynamic_arena), dynamic_used, "dynamic shared memory");
    for (const Buffer& buffer : buffers)
      beside(buffer.begin, buffer.end - buffer.begin, buffer.name);
    for (const Fiber& fiber : fibers)
      if (address - reinterpret_cast<uintptr_t>(fiber.stack) < stack_bytes)
        text += ", a local variable of thread " + std::to_string(fiber.linear);
  }
  fail(text);
}

void check(uintptr_t address, size_t bytes, Kind kind, const void* pc) {
  const void* const pointer = reinterpret_cast<const void*>(address);
  const uintptr_t arena = reinterpret_cast<uintptr_t>(static_arena);
  if (address - arena < kArena) {
    const size_t offset = address - arena;
    for (const SharedObject& object : shared_objects)
      if (offset - object.offset < object.bytes && offset + bytes <= object.offset + object.bytes) {
        check_cells(static_region, offset, bytes, kind, true, object.name, offset - object.offset,
                    pointer, pc);
        return;
      }
    if (options.bounds) out_of_bounds(address, bytes, kind, pc);
    return;
  }
  const uintptr_t dynamic = reinterpret_cast<uintptr_t>(dynamic_arena);
  if (dynamic && address - dynamic < dynamic_used && address - dynamic + bytes <= dynamic_used) {
    check_cells(dynamic_region, address - dynamic, bytes, kind, true, "dynamic", address - dynamic,
                pointer, pc);
    return;
  }
  if (const Buffer* const buffer = find_buffer(address)) {
    if (address + bytes <= buffer->end) {
      if (buffer->writable) {
        Region& region = buffer_regions[buffer->index];
        if (region.cells.empty()) region.resize(buffer->end - buffer->begin);
        check_cells(region, address - buffer->begin, bytes, kind, false, buffer->name.c_str(),
                    address - buffer->begin, pointer, pc);
      } else if (kind != Kind::kRead) {
        fail("read-only: " + std::string(verb(kind)) + " to " + buffer->name + " + " +
             std::to_string(address - buffer->begin) + at_line(module_offset(pc)));
      }
      return;
    }
  } else if (kind == Kind::kRead) {
    if (address - reinterpret_cast<uintptr_t>(parameters) < parameter_bytes) return;
    if (address >= module().begin && address + bytes <= module().end) return;  // constants
  }
  if (options.bounds) out_of_bounds(address, bytes, kind, pc);
}

// `natural`: the access is of a type of this size. GCC calls the 16-byte hook for structures of two
// 8-byte members too, so of a float4 only UBSan and __ldg see an alignment to 8 bytes.
void access(const void* pointer, size_t bytes, Kind kind, bool natural, const void* pc) {
  if (!bytes) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  if (address - reinterpret_cast<uintptr_t>(running().stack) < stack_bytes) return;
  shadow::settle();
  step([pc] { return at_line(module_offset(pc)); });
  if (natural && address % std::min<size_t>(bytes, 8))
    fail("misaligned: " + std::string(verb(kind)) + " of " + std::to_string(bytes) + " bytes" +
         at_line(module_offset(pc)) + ", at an address that is " + std::to_string(address % bytes) +
         " modulo " + std::to_string(bytes));
  check(address, bytes, kind, pc);
}

// From a hook: the call's place in the kernel is `pc`.
inline void hooked(const void* pointer, size_t bytes, Kind kind, bool natural, const void* pc) {
  if (!current || in_layer) return;
  const Inside inside;
  access(pointer, bytes, kind, natural, pc);
}

}  // namespace

namespace shadow {

void begin_launch() {
  if (buffers_stale) {
    buffer_regions.assign(buffers.size(), Region());
    for (size_t i = 0; i < buffers.size(); ++i) buffers[i].index = static_cast<unsigned>(i);
    buffers_stale = false;
  }
  dynamic_region = Region();
  dynamic_region.resize(dynamic_used);
  static_region.grain = 4;
  static_region.cells.clear();
  states.resize(fibers.size());
  for (ThreadState& state : states) state = ThreadState();
  common.reset();
  global_variables.clear();
  releases.clear();
}

void begin_block() {
  steps = 0;
  suspect.active = false;
  for (size_t t = 0; t < states.size(); ++t) {
    ThreadState& state = states[t];
    state.clock.fill(0);
    state.clock[t % kWarp] = 1;
    state.known.reset();
    state.released = nullptr;
    state.seen.clear();
  }
  common.reset();
  uncommon = false;
  shared_variables.clear();
}

void settle() {
  if (!suspect.active) return;
  suspect.active = false;
  if (std::memcmp(suspect.address, suspect.before, suspect.bytes))
    fail(race_text(suspect, Kind::kWrite));
}

void progress() { steps = 0; }

void barrier() {
  steps = 0;
  if (!uncommon) return;
  for (const ThreadState& state : states) common = merge(common, state.known);
  for (ThreadState& state : states) state.known = common;
  uncommon = false;
}

void warp_barrier(unsigned warp, unsigned mask) {
  ThreadState* const lane = &states[warp * kWarp];
  std::array<uint32_t, kWarp> latest{};
  std::shared_ptr<const Known> known;
  for (unsigned m = mask; m; m &= m - 1) {
    const ThreadState& state = lane[__builtin_ctz(m)];
    for (unsigned i = 0; i < kWarp; ++i) latest[i] = std::max(latest[i], state.clock[i]);
    known = merge(known, state.known);
  }
  for (unsigned m = mask; m; m &= m - 1) {
    const unsigned i = static_cast<unsigned>(__builtin_ctz(m));
    const uint32_t own = lane[i].clock[i];
    lane[i].clock = latest;
    lane[i].clock[i] = own + 1;
    lane[i].known = known;
  }
}

void fence(Fiber& fiber, bool whole_device) {
  ThreadState& state = states[fiber.linear];
  if (!state.seen.empty()) {
    auto learnt = std::make_shared<Known>();
    std::shared_ptr<const Known> known = state.known;
    for (const auto& [variable, count] : state.seen)
      for (size_t i = 0; i < count; ++i) {
        const Release* const release = variable->releases[i];
        if (release->serial != block_serial && !(whole_device && release->whole_device)) continue;
        learnt->push_back(release);
        known = merge(known, release->known);
      }
    std::sort(learnt->begin(), learnt->end(), earlier);
    learnt->erase(std::unique(learnt->begin(), learnt->end()), learnt->end());
    state.known = merge(known, learnt);
    state.seen.clear();
    uncommon = true;
  }
  releases.push_back({block_serial, epoch, static_cast<uint16_t>(fiber.linear), whole_device,
                      state.clock, state.known});
  state.released = &releases.back();
  ++state.clock[fiber.lane];
}

void shared_grew() { static_region.resize(static_used); }

void buffers_changed() { buffers_stale = true; }

}  // namespace shadow

void atomic_access(void* pointer, size_t bytes, void* pc) {
  const Inside inside;
  access(pointer, bytes, Kind::kAtomic, true, pc);
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  const bool shared = address - reinterpret_cast<uintptr_t>(static_arena) < kArena ||
                      address - reinterpret_cast<uintptr_t>(dynamic_arena) < dynamic_used;
  auto& variables = shared ? shared_variables : global_variables;
  ThreadState& state = states[running().linear];
  auto found = variables.find(address);
  if (found == variables.end()) {
    if (!state.released) return;
    found = variables.emplace(address, SyncVariable()).first;
  }
  SyncVariable& variable = found->second;
  if (!variable.releases.empty()) {
    const auto seen = std::find_if(state.seen.begin(), state.seen.end(),
                                   [&](const auto& s) { return s.first == &variable; });
    if (seen == state.seen.end())
      state.seen.emplace_back(&variable, variable.releases.size());
    else
      seen->second = variable.releases.size();
  }
  if (state.released && (variable.releases.empty() || variable.releases.back() != state.released))
    variable.releases.push_back(state.released);
}

void constant_access(const void* pointer, size_t bytes) {
  if (!options.races) return;
  const Inside inside;
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  const Buffer* const buffer = find_buffer(address);
  if (!buffer || !buffer->writable) return;
  const Region& region = buffer_regions[buffer->index];
  for (size_t i = address - buffer->begin; i < address - buffer->begin + bytes; ++i)
    if (i / region.grain < region.cells.size() &&
        region.cells[i / region.grain].write.serial >= first_serial)
      fail("race: __ldg of " + buffer->name + " + " + std::to_string(i) +
           at_line(module_offset(__builtin_return_address(0))) +
           ", which this launch writes: the cache is not coherent");
}

#endif  // TTA_SIMT_HOOKS

}  // namespace simt

#if defined(TTA_SIMT_HOOKS)

#define TTA_SIMT_HOOK(name, bytes, kind, natural)                                         \
  extern "C" __attribute__((visibility("hidden"))) void __tsan_##name(void* pointer) {    \
    simt::hooked(pointer, bytes, simt::Kind::kind, natural, __builtin_return_address(0)); \
  }
#define TTA_SIMT_HOOKS_OF(bytes)                            \
  TTA_SIMT_HOOK(read##bytes, bytes, kRead, true)            \
  TTA_SIMT_HOOK(write##bytes, bytes, kWrite, true)          \
  TTA_SIMT_HOOK(unaligned_read##bytes, bytes, kRead, false) \
  TTA_SIMT_HOOK(unaligned_write##bytes, bytes, kWrite, false)
TTA_SIMT_HOOKS_OF(1)
TTA_SIMT_HOOKS_OF(2)
TTA_SIMT_HOOKS_OF(4)
TTA_SIMT_HOOKS_OF(8)
TTA_SIMT_HOOKS_OF(16)

extern "C" __attribute__((visibility("hidden"))) void __tsan_read_range(void* pointer, size_t n) {
  simt::hooked(pointer, n, simt::Kind::kRead, false, __builtin_return_address(0));
}
extern "C" __attribute__((visibility("hidden"))) void __tsan_write_range(void* pointer, size_t n) {
  simt::hooked(pointer, n, simt::Kind::kWrite, false, __builtin_return_address(0));
}
extern "C" __attribute__((visibility("hidden"))) void __tsan_init() {}
extern "C" __attribute__((visibility("hidden"))) void __tsan_func_entry(void*) {}
extern "C" __attribute__((visibility("hidden"))) void __tsan_func_exit() {}
// Host functions in a .cu file: the guard of a static variable, virtual tables.
extern "C" __attribute__((visibility("hidden"))) char __tsan_atomic8_load(const char* p, int) {
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
extern "C" __attribute__((visibility("hidden"))) void __tsan_vptr_update(void**, void*) {}
extern "C" __attribute__((visibility("hidden"))) void __tsan_vptr_read(void**) {}

#endif
