// RWKV-4's wkv: one pass over time for each tile of channels.
#include <algorithm>

#include "common.h"

namespace {

constexpr int WIDTH = 64;  // Channels of a tile.

// As in compat/ops/rwkv4.py. Key, value and out: (batch, seqlen, dim) of one dtype, the channels side
// by side; strides in elements.
struct Wkv {
  const void *key, *value;
  void* out;
  int64_t key_stride[2], value_stride[2], out_stride[2];  // Of batch and seqlen.
  const float *decay, *first;                             // (dim,)
  float* state;                                           // (3, batch, dim), before, and then after.
  int64_t batch, seqlen, dim, is_bf16;
};

template <class T>
void read_tile(const Wkv& w, int64_t b, int64_t begin, int lanes) {
  const T* key = static_cast<const T*>(w.key) + b * w.key_stride[0] + begin;
  const T* value = static_cast<const T*>(w.value) + b * w.value_stride[0] + begin;
  T* out = static_cast<T*>(w.out) + b * w.out_stride[0] + begin;
  float above[WIDTH], below[WIDTH], top[WIDTH], decay[WIDTH], first[WIDTH];
  float* kept[3] = {above, below, top};
  for (int part = 0; part < 3; ++part)
    std::copy_n(w.state + (part * w.batch + b) * w.dim + begin, lanes, kept[part]);
  std::copy_n(w.decay + begin, lanes, decay);
  std::copy_n(w.first + begin, lanes, first);
  for (int64_t t = 0; t < w.seqlen; ++t) {
#pragma omp simd
    for (int l = 0; l < lanes; ++l) {
      const float k = to_float(key[l]), v = to_float(value[l]);
      // Of two weights the larger is 1, and the smaller e^-|difference|.
      const float now = k + first[l] - top[l];
      const float e = fast_exp(-std::fabs(now));
      const float old_scale = now > 0.f ? e : 1.f, new_scale = now > 0.f ? 1.f : e;
      out[l] = from_float<T>((old_scale * above[l] + new_scale * v) /
                             (old_scale * below[l] + new_scale));
      const float faded = top[l] + decay[l], later = k - faded;
      const float f = fast_exp(-std::fabs(later));
      const float old_kept = later > 0.f ? f : 1.f, new_kept = later > 0.f ? 1.f : f;
      above[l] = old_kept * above[l] + new_kept * v;
      below[l] = old_kept * below[l] + new_kept;
      top[l] = later > 0.f ? k : faded;
    }
    key += w.key_stride[1];
    value += w.value_stride[1];
    out += w.out_stride[1];
  }
  for (int part = 0; part < 3; ++part)
    std::copy_n(kept[part], lanes, w.state + (part * w.batch + b) * w.dim + begin);
}

}  // namespace

extern "C" void compat_rwkv4_wkv(const Wkv* wkv, int threads) {
  const Wkv& w = *wkv;
  const int64_t tiles = (w.dim + WIDTH - 1) / WIDTH;
  parallel_for(w.batch * tiles, threads, [&](int64_t i) {
    const int64_t b = i / tiles, begin = i % tiles * WIDTH;
    const int lanes = int(std::min<int64_t>(WIDTH, w.dim - begin));
    w.is_bf16 ? read_tile<bf16>(w, b, begin, lanes) : read_tile<float>(w, b, begin, lanes);
  });
}
