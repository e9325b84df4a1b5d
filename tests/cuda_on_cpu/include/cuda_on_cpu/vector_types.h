// CUDA's vector types, with the alignment that 8- and 16-byte loads demand.
#pragma once

#define CUDA_ON_CPU_VECTORS(scalar, name)                                           \
  struct name##2 {                                                                  \
    alignas(2 * sizeof(scalar)) scalar x;                                           \
    scalar y;                                                                       \
  };                                                                                \
  struct name##3 { scalar x, y, z; };                                               \
  struct name##4 {                                                                  \
    alignas(sizeof(scalar) < 4 ? 4 * sizeof(scalar) : 16) scalar x;                 \
    scalar y, z, w;                                                                 \
  };                                                                                \
  inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }              \
  inline name##3 make_##name##3(scalar x, scalar y, scalar z) { return {x, y, z}; } \
  inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }

CUDA_ON_CPU_VECTORS(short, short)
CUDA_ON_CPU_VECTORS(unsigned short, ushort)
CUDA_ON_CPU_VECTORS(int, int)
CUDA_ON_CPU_VECTORS(unsigned, uint)
CUDA_ON_CPU_VECTORS(long long, longlong)
CUDA_ON_CPU_VECTORS(unsigned long long, ulonglong)
CUDA_ON_CPU_VECTORS(float, float)
CUDA_ON_CPU_VECTORS(double, double)
#undef CUDA_ON_CPU_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};
