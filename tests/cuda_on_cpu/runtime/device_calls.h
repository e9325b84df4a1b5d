// What the stand-ins for CUDA's headers ask of the runtime: to run a kernel, and what only its
// running threads may call.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda_on_cpu/vector_types.h"

namespace cuda_on_cpu {

struct LaunchShape {
  dim3 grid, block, cluster;
  size_t shared_bytes;
};

struct Call {  // a kernel with its parameters, for one thread to run
  void (*invoke)(const void* parameters);
  const void* parameters;
  size_t bytes;
};

// Runs a kernel. Returns nullptr, or what went wrong; the text is valid until the next launch.
const char* run(const LaunchShape& shape, const Call& call);

// Whether elementary functions of float32 err, as much as CUDA's may.
extern bool rough;

// Gives up the launch.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

unsigned lane();  // of the warp
unsigned rank_in_cluster();
unsigned blocks_in_cluster();
unsigned char* shared_memory();
unsigned char* shared_memory_of(const void* mine, int rank);  // the same place in another block

// Waits for every thread of the block; returns how many came with a predicate.
unsigned block_barrier(const char* name, bool predicate);

// Waits for the lanes of the mask. Returns the value of lane `source`; for kBallot the lanes whose
// value is not 0.
constexpr unsigned kBallot = 32;
uint64_t warp_collective(const char* name, unsigned mask, uint64_t value, unsigned source);

void cluster_arrive();
void cluster_wait();

// cp.async: a copy happens when it is waited for, never before, so that a missing wait reads NaN.
void copy_later(void* shared, const void* global, size_t bytes, size_t zeros);
void commit_copies();
void wait_for_copies(size_t commits_not_waited_for);

}  // namespace cuda_on_cpu
