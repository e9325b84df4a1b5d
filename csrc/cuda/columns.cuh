// Runs a body over columns of K experts' rows: packs of them where K is fixed at compile time,
// one after the other from memory for any other K.
//
// body(v, u, upstream, emit): u(k) is the logit of expert k in column v, after the softcap's tanh;
// emit(k, value) hands a result to the sink.
#pragma once

#include "common/exponent.h"
#include "cuda/packs.cuh"

namespace robustgate::cuda {

using namespace generic;

// Something per expert: registers for a fixed K, shared memory for any.
template <int kExperts, typename Value>
struct PerExpert {
  Value values[kExperts];
  __device__ explicit PerExpert(const Value* shared) {
#pragma unroll
    for (int k = 0; k < kExperts; ++k) values[k] = shared[k];
  }
  __device__ const Value& operator[](int k) const { return values[k]; }
};
template <typename Value>
struct PerExpert<0, Value> {
  const Value* values;
  __device__ explicit PerExpert(const Value* shared) : values(shared) {}
  __device__ const Value& operator[](int k) const { return values[k]; }
};

// Results nobody wants.
struct NoSink {
  struct Pack {
    __device__ void set(int, int, float) {}
  };
  __device__ void store(int64_t, const Pack&) const {}
  __device__ void store_one(int64_t, int, float) const {}
};

// Gradients of each expert; null where none is asked for.
template <int kExperts, typename T>
struct GradientSink {
  T* const* rows;

  struct Pack {
    float values[kExperts ? kExperts : 1][kPackSize<T>];
    __device__ void set(int k, int i, float value) { values[k][i] = value; }
  };
  __device__ void store(int64_t v, const Pack& pack) const {
#pragma unroll
    for (int k = 0; k < kExperts; ++k) {
      if (rows[k]) store_pack(rows[k] + v, pack.values[k]);
    }
  }
  __device__ void store_one(int64_t v, int k, float value) const {
    if (rows[k]) rows[k][v] = from_float<T>(value);
  }
};

// One float32 row; its packs are those of logits of type T.
template <typename T>
struct FloatSink {
  float* row;

  struct Pack {
    float values[kPackSize<T> / 4][4];
    __device__ void set(int, int i, float value) { values[i / 4][i % 4] = value; }
  };
  __device__ void store(int64_t v, const Pack& pack) const {
#pragma unroll
    for (int i = 0; i < kPackSize<T> / 4; ++i) store_pack(row + v + 4 * i, pack.values[i]);
  }
  __device__ void store_one(int64_t v, int, float value) const { row[v] = value; }
};

// An upstream gradient: one number per column, or the same for all.
struct Upstream {
  const float* row;  // null: `constant`
  float constant;

  __device__ float one(int64_t v) const { return row ? row[v] : constant; }

  template <int kCount>
  __device__ void load(int64_t v, float (&out)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      float four[4] = {constant, constant, constant, constant};
      if (row) unpack<float>(load_pack(row + v + i), four);
#pragma unroll
      for (int j = 0; j < 4; ++j) out[i + j] = four[j];
    }
  }
};

// What the columns of a row are read with.
struct ColumnTransform {
  float inner;
  bool cap;
  __device__ __forceinline__ float operator()(float z) const {
    return cap ? ::tanhf(z * inner) : z;
  }
  // d u / d z times d z' / d u over the temperature's factor: 1, or the tanh's slope.
  __device__ __forceinline__ float slope(float u) const { return cap ? 1.0f - u * u : 1.0f; }
};

template <int kExperts, typename T, typename Sink, typename Body>
__device__ __forceinline__ void for_columns(const T* const* rows, int64_t begin, int64_t end,
                                            const ColumnTransform& transform,
                                            const Upstream& upstream, const Sink& sink,
                                            const Body& body) {
  if constexpr (kExperts == 0) {
    for (int64_t v = begin + threadIdx.x; v < end; v += blockDim.x) {
      body(
          v, [&](int k) { return transform(to_float(rows[k][v])); }, upstream.one(v),
          [&](int k, float value) { sink.store_one(v, k, value); });
    }
  } else {
    constexpr int kPack = kPackSize<T>, kUnroll = kExperts >= 4 ? 1 : 4 / kExperts;
    const PerExpert<kExperts, const T*> row(rows);
    const int64_t head = ::min(end - begin, static_cast<int64_t>(to_boundary(row[0] + begin)));
    const int64_t packs = (end - begin - head) / kPack;
    const int64_t first = begin + head, tail = first + packs * kPack;
    const auto one = [&](int64_t v) {
      float u[kExperts];
#pragma unroll
      for (int k = 0; k < kExperts; ++k) u[k] = transform(to_float(row[k][v]));
      body(
          v, [&](int k) { return u[k]; }, upstream.one(v),
          [&](int k, float value) { sink.store_one(v, k, value); });
    };
    if (threadIdx.x < head) one(begin + threadIdx.x);
    if (threadIdx.x < end - tail) one(tail + threadIdx.x);
    const int64_t step = blockDim.x;
    for (int64_t p = threadIdx.x; p < packs; p += kUnroll * step) {
      uint4 raw[kUnroll][kExperts];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        if (p + i * step >= packs) break;
#pragma unroll
        for (int k = 0; k < kExperts; ++k) {
          raw[i][k] = load_pack(row[k] + first + (p + i * step) * kPack);
        }
      }
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        if (p + i * step >= packs) break;
        const int64_t v = first + (p + i * step) * kPack;
        float c[kPack];
        upstream.load(v, c);
        typename Sink::Pack results;
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          float u[kExperts];
#pragma unroll
          for (int k = 0; k < kExperts; ++k) {
            u[k] = transform(to_float(reinterpret_cast<const T*>(&raw[i][k])[j]));
          }
          body(
              v + j, [&](int k) { return u[k]; }, c[j],
              [&](int k, float value) { results.set(k, j, value); });
        }
        sink.store(v, results);
      }
    }
  }
}

}  // namespace robustgate::cuda
