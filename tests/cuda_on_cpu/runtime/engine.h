// Runs the threads of a kernel as fibers of one OS thread, cluster by cluster.
//
// A thread runs until it waits for others. Which one is next is drawn at random wherever CUDA
// promises nothing: clusters of the grid, blocks of a cluster, warps of a block, lanes of a warp.
#pragma once

#include <vector>

#include "runtime/device_calls.h"
#include "runtime/fiber.h"
#include "runtime/random.h"

namespace cuda_on_cpu {

constexpr unsigned kWarp = 32;
constexpr unsigned char kPoison = 0xFF;  // unwritten shared memory: NaN in every format
constexpr size_t kGapBytes = 256;        // between the shared memories of two blocks

struct Block;
struct Warp;

struct AsyncCopy {
  void* to;
  const void* from;
  size_t bytes, zeros;  // the last `zeros` bytes are set to 0 instead
  unsigned commit;      // the number of the commit it belongs to
};

struct Thread {
  Context context;
  uint3 index;
  Warp* warp;
  unsigned lane;
  // The warp collective it waits in, and what came out of the last one.
  const char* collective;
  unsigned mask, source;  // source: the lane to read from, or kBallot
  uint64_t value, result;
  uint64_t last_collective;                  // when it ended
  unsigned cluster_arrivals, cluster_waits;  // at the cluster's barrier, so far
  std::vector<AsyncCopy> copies;
  unsigned commits;
};

struct Warp {
  Block* block;
  std::vector<Thread> lanes;
  // Lanes as bits; every lane is in exactly one of these.
  unsigned ready, in_collective, at_block_barrier, at_cluster_barrier, exited;
  bool queued;

  void make_ready(unsigned lanes);
};

struct Block {
  uint3 index;
  unsigned rank;  // in the cluster
  unsigned char* shared_memory;
  std::vector<Warp> warps;
  std::vector<Warp*> queue;  // warps that may run
  unsigned priority;         // among the blocks of the cluster; drawn anew at every barrier
  unsigned threads, exited;
  // The block's barrier.
  const char* barrier;
  unsigned arrived, predicates, result;
  uint64_t last_barrier;  // when it ended
};

struct Range {
  uintptr_t begin, end;
};

inline Range range_of(const void* start, size_t bytes) {
  return {reinterpret_cast<uintptr_t>(start), reinterpret_cast<uintptr_t>(start) + bytes};
}

struct Engine {
  LaunchShape shape;
  Call call;
  Range thread_stacks;
  std::vector<Block> blocks;  // of the cluster that runs
  std::vector<unsigned char> shared_memory;
  unsigned cluster_arrived, cluster_barriers;
  uint64_t time, cluster_start;  // time passes at the end of every barrier and collective
  Context scheduler;
  Random random;
  char failure[400];
};
extern Engine engine;
extern Thread* self;  // the running thread

[[noreturn]] void exit_thread();

// Fail where the running thread must not access memory, or must not be the last one of its block.
void check_access(const void* address, size_t bytes, bool is_write);
void check_exit(const Block& block);

}  // namespace cuda_on_cpu
