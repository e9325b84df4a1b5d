// Rows cut in tiles of columns, one block each, for kernels that write every column: nothing is
// added up along a row.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/packs.cuh"
#include "ops.h"

namespace robustgate::cuda {

constexpr int kTileThreads = 256;

// Columns [begin, end) of a row; the last tile has the padding too.
struct Tile {
  int64_t begin, end;
  bool last;

  static int64_t count(int64_t vocab, int64_t columns) { return (vocab + columns - 1) / columns; }

  __device__ Tile(int64_t index, int64_t tiles, int64_t columns, int64_t vocab)
      : begin(index * columns),
        end(::min(vocab, (index + 1) * columns)),
        last(index + 1 == tiles) {}

  __device__ Tile(int64_t from, int64_t to, bool is_last) : begin(from), end(to), last(is_last) {}

  // Sets the padding to 0, and the tile's columns to `value` unless they are to be computed.
  template <typename T>
  __device__ void fill(T* row, bool computed, float value, int64_t vocab, int64_t padded) const {
    for (int64_t v = begin + threadIdx.x; v < end && !computed; v += blockDim.x) {
      row[v] = from_float<T>(value);
    }
    for (int64_t v = vocab + threadIdx.x; v < padded && last; v += blockDim.x) {
      row[v] = from_float<T>(0.0f);
    }
  }
};

// Columns of a tile where `rows` rows are cut: as many as leave sixteen blocks to a multiprocessor,
// since each block works out its row's scalars anew; between 4 and 32 packs a thread.
inline int64_t tile_columns(const LogitsSpec& spec, int64_t rows, int device) {
  const int64_t enough = int64_t{16} * DeviceLimits(device).multiprocessors;
  int64_t columns = int64_t{32} * kTileThreads * 16 / size_of(spec.dtype);
  for (int halvings = 0; halvings < 3; ++halvings) {
    if (rows * Tile::count(spec.vocab, columns) >= enough) break;
    columns /= 2;
  }
  return columns;
}

}  // namespace robustgate::cuda
