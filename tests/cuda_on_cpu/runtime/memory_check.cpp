// Every load and store of a kernel is checked. In shared memory: within bounds, of a block that is
// alive, and ordered by a barrier against other threads' accesses to the same place. In global
// memory: within what the host has registered, if it has registered anything.
//
// Kernels are compiled with -fsanitize=thread, which calls the functions at the end; the
// sanitizer's own library is not linked, since it knows system threads alone.

#include <algorithm>

#include "runtime/engine.h"

// The image of this library, as the linker lays it out.
extern "C" __attribute__((visibility("hidden"))) const unsigned char __ehdr_start, _end;

namespace cuda_on_cpu {
namespace {

constexpr size_t kGranule = 2;  // bytes; no two threads share less

struct Access {
  const Thread* thread;
  uint64_t time;
  unsigned arrivals;  // at the cluster's barrier, by then
};

struct History {
  Access write, read;  // the last ones
};
std::vector<History> history;  // of each granule of the cluster's shared memory

std::vector<Range> global_memory;

bool is_of_this_cluster(const Access& access) { return access.time >= engine.cluster_start; }

// Whether a barrier stands between an earlier access and the running thread.
bool is_ordered(const Access& earlier) {
  if (!is_of_this_cluster(earlier) || earlier.thread == self) return true;
  const Warp &theirs = *earlier.thread->warp, &mine = *self->warp;
  return self->cluster_waits > earlier.arrivals ||
         (theirs.block == mine.block && mine.block->last_barrier > earlier.time) ||
         (&theirs == &mine && self->last_collective > earlier.time);
}

void check_race(const Access& earlier, const char* what) {
  if (is_ordered(earlier)) return;
  const uint3 t = earlier.thread->index;
  fail("race: %s by thread (%u, %u, %u) of block rank %u without a barrier between", what, t.x, t.y,
       t.z, earlier.thread->warp->block->rank);
}

void check_shared(size_t offset, size_t bytes, bool is_write) {
  const size_t spacing = engine.shared_memory.size() / engine.blocks.size();
  const Block& owner = engine.blocks[offset / spacing];
  const ptrdiff_t first = engine.shared_memory.data() + offset - owner.shared_memory;
  if (first < 0 || first + bytes > engine.shape.shared_bytes) {
    fail("%s of %zu bytes at byte %td of %zu of shared memory", is_write ? "write" : "read", bytes,
         first, engine.shape.shared_bytes);
  }
  if (&owner != self->warp->block) {
    if (self->cluster_waits == 0) fail("access to a block that may not have started yet");
    if (owner.exited == owner.threads) fail("access to a block that has exited");
  }
  const size_t end = (offset + bytes + kGranule - 1) / kGranule;
  if (history.size() < end) history.resize(engine.shared_memory.size() / kGranule + 1);
  const Access access = {self, engine.time, self->cluster_arrivals};
  for (size_t i = offset / kGranule; i < end; ++i) {
    History& before = history[i];
    check_race(before.write, is_write ? "a second write, the first" : "a read of what was written");
    if (is_write) check_race(before.read, "a write of what was read");
    (is_write ? before.write : before.read) = access;
  }
}

void check_global(uintptr_t address, size_t bytes, bool is_write) {
  // Loads of 16 aligned bytes may reach beyond a tensor: they stay within its pages.
  const uintptr_t slack = is_write ? 0 : 15;
  const auto is_in = [=](const Range& r) {
    return address >= (r.begin & ~slack) && address + bytes <= ((r.end + slack) & ~slack);
  };
  if (global_memory.empty() || is_in(engine.thread_stacks) ||
      is_in(range_of(engine.call.parameters, engine.call.bytes)) ||
      is_in(range_of(&__ehdr_start, &_end - &__ehdr_start))) {
    return;
  }
  const auto found = std::find_if(global_memory.begin(), global_memory.end(), is_in);
  if (found != global_memory.end()) return std::swap(*found, global_memory.front());
  ptrdiff_t beyond = PTRDIFF_MAX, before = PTRDIFF_MAX;
  for (const Range& r : global_memory) {
    if (address >= r.begin) beyond = std::min<ptrdiff_t>(beyond, address + bytes - r.end);
    if (address < r.begin) before = std::min<ptrdiff_t>(before, r.begin - address);
  }
  fail("%s of %zu bytes outside of every tensor: %td beyond one's end, %td before one's start",
       is_write ? "write" : "read", bytes, beyond, before);
}

}  // namespace

void check_access(const void* address, size_t bytes, bool is_write) {
  if (!self) return;
  const auto place = reinterpret_cast<uintptr_t>(address);
  const size_t offset = place - reinterpret_cast<uintptr_t>(engine.shared_memory.data());
  if (offset < engine.shared_memory.size()) {
    check_shared(offset, bytes, is_write);
  } else {
    check_global(place, bytes, is_write);
  }
}

// The memory goes with the block; what others have read of it must lie before a barrier.
void check_exit(const Block& block) {
  const size_t first = (block.shared_memory - engine.shared_memory.data()) / kGranule;
  const size_t end = first + engine.shape.shared_bytes / kGranule;
  for (size_t i = first; i < end && i < history.size(); ++i) {
    const Access& read = history[i].read;
    if (is_of_this_cluster(read) && read.thread->warp->block != &block) {
      check_race(read, "exit after a read of shared memory");
    }
  }
}

}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_HOOKS(bytes)                                                             \
  void __tsan_read##bytes(void* p) { cuda_on_cpu::check_access(p, bytes, false); }           \
  void __tsan_write##bytes(void* p) { cuda_on_cpu::check_access(p, bytes, true); }           \
  void __tsan_unaligned_read##bytes(void* p) { cuda_on_cpu::check_access(p, bytes, false); } \
  void __tsan_unaligned_write##bytes(void* p) { cuda_on_cpu::check_access(p, bytes, true); }

extern "C" {

// Until forget_global_memory() kernels may touch what is registered, and nothing else.
void register_global_memory(const void* start, size_t bytes) {
  cuda_on_cpu::global_memory.push_back(cuda_on_cpu::range_of(start, bytes));
}
void forget_global_memory() { cuda_on_cpu::global_memory.clear(); }

CUDA_ON_CPU_HOOKS(1)
CUDA_ON_CPU_HOOKS(2)
CUDA_ON_CPU_HOOKS(4)
CUDA_ON_CPU_HOOKS(8)
CUDA_ON_CPU_HOOKS(16)
void __tsan_read_range(void* p, size_t bytes) { cuda_on_cpu::check_access(p, bytes, false); }
void __tsan_write_range(void* p, size_t bytes) { cuda_on_cpu::check_access(p, bytes, true); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

}  // extern "C"
