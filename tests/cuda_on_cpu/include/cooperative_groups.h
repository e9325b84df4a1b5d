// Clusters of blocks, and their shared memory seen from each other.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

class cluster_group {
 public:
  struct arrival_token {};

  static arrival_token barrier_arrive() {
    cuda_on_cpu::cluster_arrive();
    return {};
  }
  static void barrier_wait() { cuda_on_cpu::cluster_wait(); }
  static void barrier_wait(arrival_token&&) { cuda_on_cpu::cluster_wait(); }
  static void sync() {
    cuda_on_cpu::cluster_arrive();
    cuda_on_cpu::cluster_wait();
  }
  static unsigned block_rank() { return cuda_on_cpu::rank_in_cluster(); }
  static unsigned num_blocks() { return cuda_on_cpu::blocks_in_cluster(); }

  template <typename T>
  static T* map_shared_rank(T* address, int rank) {
    return reinterpret_cast<T*>(cuda_on_cpu::shared_memory_of(address, rank));
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
