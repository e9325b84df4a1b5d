// cp.async
#pragma once

#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* shared, const void* global, size_t size_and_align,
                                    size_t zfill = 0) {
  cuda_on_cpu::copy_later(shared, global, size_and_align, zfill);
}

inline void __pipeline_commit() { cuda_on_cpu::commit_copies(); }

// Waits for all but the last `prior` commits.
inline void __pipeline_wait_prior(size_t prior) { cuda_on_cpu::wait_for_copies(prior); }
