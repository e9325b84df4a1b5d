// Dtype codes shared with Python (robustgate/ops/backends/native.py keeps the same order).
#pragma once

#include <cstdint>

namespace robustgate {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

}  // namespace robustgate
