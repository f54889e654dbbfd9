// Mamba-1's selective scan: one pass over time for each tile of channels, its states in cache.
#include <algorithm>
#include <vector>

#include "common.h"

namespace {

constexpr int WIDTH = 16;  // Channels of a tile.
constexpr int BLOCK = 64;  // Tokens that are loaded at a time.

// As in compat/ops/mamba1.py.
struct Scan {
  View u, delta, z, out;  // (batch, groups, channels, seqlen); z.data may be null.
  View B, C;              // (batch, groups, dstate, seqlen), float32.
  const float *A, *D, *bias;  // (dim, dstate), (dim), (dim), contiguous; D and bias may be null.
  float* state;               // (batch, dim, dstate), contiguous; before, and then after.
  int64_t batch, groups, channels, seqlen, dstate, softplus;
};

// max(x, 0) + log(1 + y) with y = e^-|x|; the logarithm as 2 artanh(y / (2 + y)), of its series.
inline float softplus(float x) {
  const float y = fast_exp(-std::fabs(x)), s = y / (2.f + y), q = s * s;
  float p = 2.f / 15;
  p = p * q + 2.f / 13;
  p = p * q + 2.f / 11;
  p = p * q + 2.f / 9;
  p = p * q + 2.f / 7;
  p = p * q + 2.f / 5;
  p = p * q + 2.f / 3;
  p = p * q + 2.f;
  return (x > 0.f ? x : 0.f) + p * s;
}

template <class T>
void load(const View& from, int64_t begin, int tokens, int lanes, float* to) {
  const T* data = static_cast<const T*>(from.data) + begin;
  const int64_t channel = from.stride[2], token = from.stride[3];
  if (lanes < WIDTH) std::fill_n(to, tokens * WIDTH, 0.f);
  if (channel == 1 && lanes == WIDTH) {
    for (int t = 0; t < tokens; ++t)
      for (int l = 0; l < WIDTH; ++l) to[t * WIDTH + l] = to_float(data[t * token + l]);
    return;
  }
  for (int l = 0; l < lanes; ++l)
    for (int t = 0; t < tokens; ++t) to[t * WIDTH + l] = to_float(data[l * channel + t * token]);
}

void load(const View& from, int64_t begin, int tokens, int lanes, float* to) {
  from.is_bf16 ? load<bf16>(from, begin, tokens, lanes, to)
               : load<float>(from, begin, tokens, lanes, to);
}

template <class T>
void store(const View& into, int64_t begin, int tokens, int lanes, const float* from) {
  T* data = static_cast<T*>(into.data) + begin;
  for (int t = 0; t < tokens; ++t)
    for (int l = 0; l < lanes; ++l)
      data[t * into.stride[3] + l * into.stride[2]] = from_float<T>(from[t * WIDTH + l]);
}

int64_t offset(const View& view, int64_t b, int64_t g, int64_t i, int64_t t) {
  return b * view.stride[0] + g * view.stride[1] + i * view.stride[2] + t * view.stride[3];
}

void scan_tile(const Scan& s, int64_t b, int64_t g, int64_t first, int lanes) {
  const int64_t N = s.dstate, channel = g * s.channels + first;
  std::vector<float> states(N * WIDTH), decays(N * WIDTH);
  float* __restrict h = states.data();
  float* __restrict a = decays.data();
  float* state = s.state + (b * s.groups * s.channels + channel) * N;
  for (int l = 0; l < lanes; ++l)
    for (int64_t n = 0; n < N; ++n) {
      h[n * WIDTH + l] = state[l * N + n];
      a[n * WIDTH + l] = s.A[(channel + l) * N + n];
    }
  alignas(64) float u[BLOCK * WIDTH], dt[BLOCK * WIDTH], y[BLOCK * WIDTH], z[BLOCK * WIDTH];
  alignas(64) float skip[WIDTH] = {}, bias[WIDTH] = {};
  for (int l = 0; l < lanes; ++l) {
    if (s.D) skip[l] = s.D[channel + l];
    if (s.bias) bias[l] = s.bias[channel + l];
  }
  for (int64_t begin = 0; begin < s.seqlen; begin += BLOCK) {
    const int tokens = int(std::min<int64_t>(BLOCK, s.seqlen - begin));
    load(s.u, offset(s.u, b, g, first, begin), tokens, lanes, u);
    load(s.delta, offset(s.delta, b, g, first, begin), tokens, lanes, dt);
    for (int i = 0; i < tokens * WIDTH; ++i) dt[i] += bias[i % WIDTH];
    if (s.softplus)
      for (int i = 0; i < tokens * WIDTH; ++i) dt[i] = softplus(dt[i]);
    const float* B = static_cast<const float*>(s.B.data) + offset(s.B, b, g, 0, begin);
    const float* C = static_cast<const float*>(s.C.data) + offset(s.C, b, g, 0, begin);
    for (int t = 0; t < tokens; ++t, B += s.B.stride[3], C += s.C.stride[3]) {
      float sum[WIDTH], added[WIDTH];
      for (int l = 0; l < WIDTH; ++l) {
        sum[l] = skip[l] * u[t * WIDTH + l];
        added[l] = dt[t * WIDTH + l] * u[t * WIDTH + l];
      }
      for (int64_t n = 0; n < N; ++n) {
        const float in = B[n * s.B.stride[2]], out = C[n * s.C.stride[2]];
#pragma omp simd
        for (int l = 0; l < WIDTH; ++l) {
          float now = fast_exp(dt[t * WIDTH + l] * a[n * WIDTH + l]) * h[n * WIDTH + l] + added[l] * in;
          h[n * WIDTH + l] = now;
          sum[l] += now * out;
        }
      }
      for (int l = 0; l < WIDTH; ++l) y[t * WIDTH + l] = sum[l];
    }
    if (s.z.data) {
      load(s.z, offset(s.z, b, g, first, begin), tokens, lanes, z);
      for (int i = 0; i < tokens * WIDTH; ++i) y[i] *= silu(z[i]);
    }
    const int64_t at = offset(s.out, b, g, first, begin);
    s.out.is_bf16 ? store<bf16>(s.out, at, tokens, lanes, y)
                  : store<float>(s.out, at, tokens, lanes, y);
  }
  for (int l = 0; l < lanes; ++l)
    for (int64_t n = 0; n < N; ++n) state[l * N + n] = h[n * WIDTH + l];
}

}  // namespace

extern "C" void compat_mamba1_scan(const Scan* scan, int threads) {
  const Scan& s = *scan;
  const int64_t tiles = (s.channels + WIDTH - 1) / WIDTH;
  parallel_for(s.batch * s.groups * tiles, threads, [&](int64_t i) {
    const int64_t first = i % tiles * WIDTH, g = i / tiles % s.groups, b = i / tiles / s.groups;
    scan_tile(s, b, g, first, int(std::min<int64_t>(WIDTH, s.channels - first)));
  });
}
