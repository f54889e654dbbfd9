// A causal depthwise convolution and SiLU, from channels of tokens to tokens of channels: what is read
// is a tensor of which a token's channels lie apart, and what is written one where they lie together.
#include <algorithm>

#include "common.h"

namespace {

constexpr int64_t TILE = 64;  // Channels, and tokens, of a tile.

// As in compat/ops/convolution.py; strides in elements.
struct Convolution {
  const void* x;              // (batch, channels, seqlen), the tokens side by side
  const float *weight, *bias;  // (channels, width), (channels,)
  void* out;                  // (batch, seqlen, channels), contiguous
  int64_t stride[2];          // of batch and channels
  int64_t batch, channels, seqlen, width, is_bf16, threads;
};

template <int WIDTH, class T>
void convolve(const Convolution& p, int64_t b, int64_t first, int64_t channels) {
  constexpr int64_t BEFORE = WIDTH - 1;
  float in[BEFORE + TILE], found[TILE][TILE + 1], history[TILE][BEFORE] = {};
  for (int64_t begin = 0; begin < p.seqlen; begin += TILE) {
    const int64_t tokens = std::min(TILE, p.seqlen - begin);
    for (int64_t c = 0; c < channels; ++c) {
      const T* x = static_cast<const T*>(p.x) + b * p.stride[0] + (first + c) * p.stride[1] + begin;
      const float *weight = p.weight + (first + c) * WIDTH, bias = p.bias[first + c];
      float* __restrict__ out = found[c];
      std::copy_n(history[c], BEFORE, in);
#pragma omp simd
      for (int64_t t = 0; t < tokens; ++t) in[BEFORE + t] = to_float(x[t]);
      std::copy_n(in + tokens, BEFORE, history[c]);
#pragma omp simd
      for (int64_t t = 0; t < tokens; ++t) {
        float sum = bias;
        for (int k = 0; k < WIDTH; ++k) sum += weight[k] * in[t + k];
        out[t] = silu(sum);
      }
    }
    T* out = static_cast<T*>(p.out) + (b * p.seqlen + begin) * p.channels + first;
    for (int64_t t = 0; t < tokens; ++t, out += p.channels)
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) out[c] = from_float<T>(found[c][t]);
  }
}

template <class T>
void forward(const Convolution& p) {
  const int64_t tiles = (p.channels + TILE - 1) / TILE;
  parallel_for(p.batch * tiles, int(p.threads), [&](int64_t i) {
    const int64_t b = i / tiles, first = i % tiles * TILE;
    const int64_t channels = std::min(TILE, p.channels - first);
    if (p.width == 2) convolve<2, T>(p, b, first, channels);
    if (p.width == 3) convolve<3, T>(p, b, first, channels);
    if (p.width == 4) convolve<4, T>(p, b, first, channels);
  });
}

}  // namespace

extern "C" void compat_convolution(const Convolution* p) {
  p->is_bf16 ? forward<bf16>(*p) : forward<float>(*p);
}
