// Functions of the algebra that host and device share.
#pragma once

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define RG_HOST_DEVICE __host__ __device__ __forceinline__
#define RG_UNROLL _Pragma("unroll")
#else
#define RG_HOST_DEVICE inline
#define RG_UNROLL
#endif

// Files compiled once per instruction set put their copy in a namespace of its own: a linker that
// merged the copies would hand AVX-512 code to every processor.
#ifndef RG_ISA
#define RG_ISA generic
#endif
