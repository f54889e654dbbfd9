// The wkv of RWKV-7 and RWKV-6: token by token, a head's state in the first-level cache.
#include <algorithm>
#include <vector>

#include "tiles.h"

namespace {

constexpr int64_t TILE = LANES * PANEL;  // Columns of the state that are held in registers.
constexpr int64_t BLOCK = 16;            // Tokens that are loaded at a time.

// As in compat/ops/rwkv7_native.py; RWKV-6 has no a and b, and a bonus.
struct Wkv {
  View r, w, k, v, a, b, out;  // (batch, seqlen, nheads, dim), the last side by side.
  const float* bonus;      // (nheads, dim), or null: RWKV-7
  const int32_t* seq_idx;  // (batch, seqlen), contiguous, or null
  float* state;            // (batch, nheads, dim, v_dim), contiguous; before, and then after
  int64_t batch, seqlen, nheads, dim, v_dim;
};

// What a token does to the rows of the state, h = keep h + fade h + b removed + k v, and what is read
// of them: r for the output, next for what the next token removes. A number of each for each row.
struct Token {
  float *keep, *fade, *b, *k, *r, *next;
  Token(float* memory, int64_t dim)
      : keep(memory), fade(keep + dim), b(fade + dim), k(b + dim), r(k + dim), next(r + dim) {}
};

// The decay is split so that one near 1 is as exact over thousands of tokens as its logarithm.
// fade is the logarithm before.
void split_decays(int64_t count, float* __restrict keep, float* __restrict fade) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float w = fade[i];
    float p = 1.f / 5040;  // e^w - 1, as its series.
    p = p * w + 1.f / 720;
    p = p * w + 1.f / 120;
    p = p * w + 1.f / 24;
    p = p * w + 1.f / 6;
    p = p * w + 0.5f;
    p = p * w + 1.f;
    const float whole = fast_exp(w);
    const bool slow = std::fabs(w) < 0.35f;
    keep[i] = slow ? 1.f : 0.f;
    fade[i] = slow ? p * w : whole;
  }
}

template <class T>
void load(const T* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
}

void load(const View& view, int64_t b, int64_t t, int64_t h, int64_t count, float* to) {
  const int64_t at = b * view.stride[0] + t * view.stride[1] + h * view.stride[2];
  view.is_bf16 ? load(static_cast<const bf16*>(view.data) + at, count, to)
               : load(static_cast<const float*>(view.data) + at, count, to);
}

void store(const View& view, int64_t b, int64_t t, int64_t h, int64_t count, const float* from) {
  const int64_t at = b * view.stride[0] + t * view.stride[1] + h * view.stride[2];
  if (view.is_bf16) {
    bf16* to = static_cast<bf16*>(view.data) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = from_float<bf16>(from[i]);
  } else {
    std::copy_n(from, count, static_cast<float*>(view.data) + at);
  }
}

// Reads tokens that follow one another in a sequence, in a tile of the state: DELTA is RWKV-7's rule,
// that of RWKV-6 reads the state before it is written to. values and outs: (tokens, padded).
template <bool DELTA>
void read_tile(float* coefficients, const float* first, const float* own, const float* values,
               int64_t tokens, int64_t dim, int64_t padded, float* state, float* outs) {
  Vec removed[PANEL] = {};
  if (DELTA)
    for (int64_t i = 0; i < dim; ++i) {
      const Vec* h = reinterpret_cast<const Vec*>(state + i * padded);
      for (int p = 0; p < PANEL; ++p) removed[p] += first[i] * h[p];
    }
  for (int64_t t = 0; t < tokens; ++t) {
    const Token token(coefficients + t * 6 * dim, dim);
    Vec value[PANEL], out[PANEL] = {}, next[PANEL] = {};
    std::memcpy(value, values + t * padded, sizeof value);
    for (int64_t i = 0; i < dim; ++i) {
      Vec* h = reinterpret_cast<Vec*>(state + i * padded);
      for (int p = 0; p < PANEL; ++p) {
        const Vec before = h[p];
        Vec now = token.keep[i] * before + token.fade[i] * before;
        if (DELTA) now += token.b[i] * removed[p];
        now += token.k[i] * value[p];
        h[p] = now;
        out[p] += token.r[i] * (DELTA ? now : before);
        if (DELTA) next[p] += token.next[i] * now;
      }
    }
    for (int p = 0; p < PANEL; ++p) {
      if (!DELTA) out[p] += own[t] * value[p];
      removed[p] = next[p];
    }
    std::memcpy(outs + t * padded, out, sizeof out);
  }
}

template <bool DELTA>
void read_head(const Wkv& s, int64_t b, int64_t head) {
  const int64_t K = s.dim, V = s.v_dim, padded = (V + TILE - 1) / TILE * TILE;
  std::vector<float> memory(K * padded + 2 * BLOCK * padded + (6 * BLOCK + 1) * K + BLOCK);
  float* h = memory.data();
  float *values = h + K * padded, *outs = values + BLOCK * padded, *own = outs + BLOCK * padded;
  float *first = own + BLOCK, *coefficients = first + K;
  float* state = s.state + (b * s.nheads + head) * K * V;
  for (int64_t i = 0; i < K; ++i) std::copy_n(state + i * V, V, h + i * padded);
  const int32_t* ids = s.seq_idx ? s.seq_idx + b * s.seqlen : nullptr;
  const float* bonus = DELTA ? nullptr : s.bonus + head * K;
  int32_t sequence = -1;
  for (int64_t begin = 0, end; begin < s.seqlen; begin = end) {
    end = begin + 1;
    const int32_t id = ids ? ids[begin] : 0;
    if (id < 0) {
      std::fill_n(outs, V, 0.f);
      store(s.out, b, begin, head, V, outs);
      continue;
    }
    while (end < s.seqlen && end < begin + BLOCK && (!ids || ids[end] == id)) ++end;
    if (sequence >= 0 && id != sequence) std::fill_n(h, K * padded, 0.f);
    sequence = id;
    const int64_t tokens = end - begin;
    for (int64_t t = 0; t < tokens; ++t) {
      const Token token(coefficients + t * 6 * K, K);
      load(s.r, b, begin + t, head, K, token.r);
      load(s.w, b, begin + t, head, K, token.fade);
      load(s.k, b, begin + t, head, K, token.k);
      load(s.v, b, begin + t, head, V, values + t * padded);
      split_decays(K, token.keep, token.fade);
      if (DELTA) {
        // What a token removes is read of the state in the pass of the token before.
        load(s.a, b, begin + t, head, K, t ? token.next - 6 * K : first);
        load(s.b, b, begin + t, head, K, token.b);
      } else {
        float sum = 0.f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < K; ++i) sum += token.r[i] * bonus[i] * token.k[i];
        own[t] = sum;
      }
    }
    std::fill_n(Token(coefficients + (tokens - 1) * 6 * K, K).next, K, 0.f);
    for (int64_t c = 0; c < padded; c += TILE)
      read_tile<DELTA>(coefficients, first, own, values + c, tokens, K, padded, h + c, outs + c);
    for (int64_t t = 0; t < tokens; ++t) store(s.out, b, begin + t, head, V, outs + t * padded);
  }
  for (int64_t i = 0; i < K; ++i) std::copy_n(h + i * padded, V, state + i * V);
}

}  // namespace

extern "C" void compat_rwkv7_wkv(const Wkv* wkv, int threads) {
  const Wkv& s = *wkv;
  parallel_for(s.batch * s.nheads, threads, [&](int64_t i) {
    s.bonus ? read_head<false>(s, i / s.nheads, i % s.nheads)
            : read_head<true>(s, i / s.nheads, i % s.nheads);
  });
}
