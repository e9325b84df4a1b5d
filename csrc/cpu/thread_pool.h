// A small pool for fork-safe data parallelism.
//
// The calling thread takes chunks like every worker and never waits for a worker that has not
// started, so a busy neighbour delays a call by one chunk at most. A second caller, a nested call
// or a single thread run on the calling thread. After fork() the child starts a pool of its own.
#pragma once

#include <cstdint>

namespace robustgate {

using ChunkFunction = void (*)(void* context, int64_t chunk);

// Runs function(context, c) for every c in [0, chunks), on at most `threads` threads.
void parallel_for(int64_t chunks, int threads, ChunkFunction function, void* context);

template <typename Body>
void parallel_for(int64_t chunks, int threads, Body& body) {
  parallel_for(
      chunks, threads, [](void* context, int64_t chunk) { (*static_cast<Body*>(context))(chunk); },
      &body);
}

}  // namespace robustgate
