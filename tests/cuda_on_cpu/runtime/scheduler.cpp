// Starts the blocks of a launch, cluster by cluster, and chooses which thread runs next.

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "cuda_on_cpu/device_functions.h"
#include "runtime/engine.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_cpu {

Engine engine;
Thread* self = nullptr;
bool rough = false;

namespace {

// Not a multiple of 4 KiB: the tops of the stacks have to fall into different sets of the cache.
constexpr size_t kStackBytes = (64 << 10) + 17 * 64;
constexpr uint64_t kCanary = 0x5AFE57AC5AFE57AC;  // at the low end of each stack

unsigned volume(dim3 d) { return d.x * d.y * d.z; }

uint3 position(unsigned i, dim3 size) {  // x fastest
  return {i % size.x, i / size.x % size.y, i / size.x / size.y};
}

// The stack of a thread of the cluster. Grows only while no thread is alive.
unsigned char* stack_of(size_t thread) {
  static unsigned char* memory = nullptr;
  static size_t count = 0;
  if (thread >= count) {
    if (memory) munmap(memory, count * kStackBytes);
    count = thread + 1;
    void* fresh = mmap(nullptr, count * kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (fresh == MAP_FAILED) std::abort();
    memory = static_cast<unsigned char*>(fresh);
    engine.thread_stacks = range_of(memory, count * kStackBytes);
  }
  return memory + thread * kStackBytes;
}

void thread_main() {
  engine.call.invoke(engine.call.parameters);
  exit_thread();
}

void start(Thread& thread, Warp& warp, unsigned lane, unsigned in_block) {
  thread.index = position(in_block, blockDim);
  thread.warp = &warp;
  thread.lane = lane;
  thread.last_collective = 0;
  thread.cluster_arrivals = thread.cluster_waits = 0;
  thread.copies.clear();
  thread.commits = 0;
  unsigned char* const stack = stack_of(warp.block->rank * warp.block->threads + in_block);
  std::memcpy(stack, &kCanary, sizeof kCanary);
  prepare(thread.context, stack, kStackBytes, thread_main);
}

void start(Block& block, unsigned rank, uint3 index) {
  block.index = index;
  block.rank = rank;
  // Aligned to 16 bytes and no more, as CUDA promises.
  const size_t spacing = engine.shared_memory.size() / engine.blocks.size();
  const auto place = reinterpret_cast<uintptr_t>(engine.shared_memory.data()) + rank * spacing;
  block.shared_memory = reinterpret_cast<unsigned char*>((place + kGapBytes) / 128 * 128 + 16);
  block.queue.clear();
  block.priority = engine.random();
  block.threads = volume(blockDim);
  block.exited = block.arrived = block.predicates = 0;
  block.last_barrier = 0;
  block.warps.resize((block.threads + kWarp - 1) / kWarp);
  for (unsigned w = 0; w < block.warps.size(); ++w) {
    Warp& warp = block.warps[w];
    warp.block = &block;
    warp.lanes.resize(std::min(kWarp, block.threads - w * kWarp));
    warp.ready = warp.in_collective = warp.at_block_barrier = warp.at_cluster_barrier = 0;
    warp.exited = 0;
    warp.queued = false;
    warp.make_ready(~0u >> (kWarp - warp.lanes.size()));
    for (unsigned i = 0; i < warp.lanes.size(); ++i) start(warp.lanes[i], warp, i, w * kWarp + i);
  }
}

// Runs the ready lanes of a warp, mostly until all of them wait for something.
void run_warp(Warp& warp) {
  const unsigned first = engine.random(), stride = engine.random() | 1;  // odd: visits every lane
  blockIdx = warp.block->index;
  do {
    for (unsigned i = 0; i < kWarp; ++i) {
      const unsigned lane = (first + i * stride) % kWarp;
      if (!(warp.ready >> lane & 1)) continue;
      self = &warp.lanes[lane];
      threadIdx = self->index;
      switch_context(engine.scheduler, self->context);
      self = nullptr;
      if (engine.failure[0]) return;
    }
  } while (warp.ready && engine.random() % 4);
  warp.make_ready(warp.ready);
}

// A warp of the block of the highest priority, so that blocks of a cluster drift apart.
Warp* next_warp() {
  Block* block = nullptr;
  for (Block& b : engine.blocks) {
    if (!b.queue.empty() && (!block || b.priority > block->priority)) block = &b;
  }
  if (!block) return nullptr;
  std::swap(block->queue[engine.random() % block->queue.size()], block->queue.back());
  Warp* const warp = block->queue.back();
  block->queue.pop_back();
  warp->queued = false;
  return warp;
}

// With nothing left to run every thread should have exited, within its stack.
void check_end() {
  unsigned alive = 0, collective = 0, block = 0, cluster = 0;
  for (const Block& b : engine.blocks) {
    alive += b.threads - b.exited;
    for (const Warp& w : b.warps) {
      collective += __builtin_popcount(w.in_collective);
      block += __builtin_popcount(w.at_block_barrier);
      cluster += __builtin_popcount(w.at_cluster_barrier);
    }
  }
  if (alive > 0) {
    std::snprintf(engine.failure, sizeof engine.failure,
                  "deadlock: %u threads wait at their block's barrier, %u at the cluster's, %u in "
                  "a collective of their warp; the others have exited",
                  block, cluster, collective);
  }
  for (size_t i = 0; i < engine.blocks.size() * volume(blockDim); ++i) {
    if (std::memcmp(stack_of(i), &kCanary, sizeof kCanary) != 0) {
      std::snprintf(engine.failure, sizeof engine.failure, "stack overflow");
    }
  }
}

void run_cluster(uint3 at) {
  const dim3 size = engine.shape.cluster;
  engine.shared_memory.assign(engine.blocks.size() * (engine.shape.shared_bytes + 2 * kGapBytes),
                              kPoison);
  engine.cluster_arrived = engine.cluster_barriers = 0;
  engine.cluster_start = ++engine.time;
  for (unsigned rank = 0; rank < engine.blocks.size(); ++rank) {
    const uint3 in = position(rank, size);
    start(engine.blocks[rank], rank,
          {at.x * size.x + in.x, at.y * size.y + in.y, at.z * size.z + in.z});
  }
  while (Warp* warp = next_warp()) {
    run_warp(*warp);
    if (engine.failure[0]) return;
  }
  check_end();
}

}  // namespace

void Warp::make_ready(unsigned more) {
  ready |= more;
  if (!ready || queued) return;
  queued = true;
  block->queue.push_back(this);
}

const char* run(const LaunchShape& shape, const Call& call) {
  static uint64_t launches = 0;
  const char* seed = std::getenv("CUDA_ON_CPU_SEED");
  rough = std::getenv("CUDA_ON_CPU_ROUGH");
  engine.random.seed((seed ? std::strtoull(seed, nullptr, 10) : 0) * 1000003 + launches++);
  engine.shape = shape;
  engine.call = call;
  engine.failure[0] = '\0';
  engine.blocks.resize(volume(shape.cluster));
  blockDim = shape.block;
  gridDim = shape.grid;
  stack_of(engine.blocks.size() * volume(blockDim) - 1);
  const dim3 clusters(gridDim.x / shape.cluster.x, gridDim.y / shape.cluster.y,
                      gridDim.z / shape.cluster.z);
  std::vector<unsigned> order(volume(clusters));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), engine.random);
  for (size_t i = 0; i < order.size() && !engine.failure[0]; ++i) {
    run_cluster(position(order[i], clusters));
  }
  return engine.failure[0] ? engine.failure : nullptr;
}

}  // namespace cuda_on_cpu
