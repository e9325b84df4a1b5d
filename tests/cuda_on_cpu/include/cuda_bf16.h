#pragma once

#include "cuda_on_cpu/short_float.h"

using __nv_bfloat16 = cuda_on_cpu::ShortFloat<cuda_on_cpu::BFloat16>;
using __nv_bfloat162 = cuda_on_cpu::ShortFloat2<cuda_on_cpu::BFloat16>;
CUDA_ON_CPU_SHORT_FLOAT(__nv_bfloat16, bfloat16, bfloat162)
