#pragma once

#include "cuda_on_cpu/short_float.h"

using __half = cuda_on_cpu::ShortFloat<cuda_on_cpu::Binary16>;
using __half2 = cuda_on_cpu::ShortFloat2<cuda_on_cpu::Binary16>;
using half = __half;
using half2 = __half2;
CUDA_ON_CPU_SHORT_FLOAT(__half, half, half2)
