// Random orders, the same for the same seed.
#pragma once

#include <cstdint>

namespace cuda_on_cpu {

// xorshift64* (Vigna, arXiv 1402.6246), as a generator of the C++ standard library.
struct Random {
  using result_type = uint32_t;
  uint64_t state = 1;

  static constexpr uint32_t min() { return 0; }
  static constexpr uint32_t max() { return ~0u; }
  void seed(uint64_t value) { state = value * 0x9E3779B97F4A7C15 + 0x2545F4914F6CDD1D; }
  uint32_t operator()() {
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return static_cast<uint32_t>((state * 0x2545F4914F6CDD1D) >> 32);
  }
};

}  // namespace cuda_on_cpu
