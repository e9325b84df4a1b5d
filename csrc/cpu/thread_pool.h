// Data parallelism on torch's own OpenMP threads, or on a small pool where there are none.
//
// On Linux torch loads libgomp, whose threads spin for a while after every torch op: the same
// threads have to do our work, or both would share the cores. Without libgomp, and in a forked
// child (where it hangs), the pool serves: its caller takes chunks like every worker and never
// waits for a worker that has not started. A second caller, a nested call or a single thread run on
// the calling thread.
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
