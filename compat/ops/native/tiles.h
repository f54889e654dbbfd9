// Small matrix products in registers, tile by tile, for the kernels that go through pieces of a text.
#pragma once
#include "common.h"

constexpr int ROWS = 4;  // of a matrix product that are held in registers
#if defined(__AVX512F__)
constexpr int64_t LANES = 16, PANEL = 4;
#elif defined(__AVX__)
constexpr int64_t LANES = 8, PANEL = 2;
#else
constexpr int64_t LANES = 4, PANEL = 4;
#endif
typedef float Vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

// acc[r] += sum_k a[r * a_row + k * a_step] * b[k * b_row], R rows of V vectors.
template <int R, int V>
inline void multiply(const float* a, int64_t a_row, int64_t a_step, int64_t count, const float* b,
                     int64_t b_row, Vec (&acc)[R][V]) {
  for (int64_t k = 0; k < count; ++k) {
    const Vec* line = reinterpret_cast<const Vec*>(b + k * b_row);
    Vec held[V];
    for (int v = 0; v < V; ++v) held[v] = line[v];
    for (int r = 0; r < R; ++r) {
      float factor = a[r * a_row + k * a_step];
      for (int v = 0; v < V; ++v) acc[r][v] += factor * held[v];
    }
  }
}

// out = a b, of rows of `inner` numbers times columns; b and out have WIDTH columns.
template <int64_t WIDTH>
struct Product {
  const float *a, *b;
  float* out;
  int64_t inner;
  template <int R, int V>
  void run(int64_t row, int64_t column) const {
    Vec acc[R][V] = {};
    multiply<R, V>(a + row * inner, inner, 1, inner, b + column, WIDTH, acc);
    for (int r = 0; r < R; ++r)
      std::memcpy(out + (row + r) * WIDTH + column, acc[r], sizeof acc[r]);
  }
};

// Calls tile.run<R, V>(row, column) for all of a matrix whose columns are a multiple of LANES.
template <class Tile>
inline void for_tiles(int64_t rows, int64_t columns, const Tile& tile) {
  int64_t c = 0;
  for (; c + PANEL * LANES <= columns; c += PANEL * LANES) {
    int64_t r = 0;
    for (; r + ROWS <= rows; r += ROWS) tile.template run<ROWS, PANEL>(r, c);
    for (; r < rows; ++r) tile.template run<1, PANEL>(r, c);
  }
  for (; c < columns; c += LANES) {
    int64_t r = 0;
    for (; r + ROWS <= rows; r += ROWS) tile.template run<ROWS, 1>(r, c);
    for (; r < rows; ++r) tile.template run<1, 1>(r, c);
  }
}
