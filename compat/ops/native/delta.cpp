// The gated delta rule without gradients; compat/ops/delta.py has the mathematics. A head goes through
// its row in segments of at most INNER tokens that neither padding nor a new sequence interrupts, its
// state in the cache of one core. Decays between two tokens of a segment are products of the tokens'
// own, never quotients, so that nothing overflows and nothing is lost after a token that forgets all.
#include <algorithm>
#include <vector>

#include "tiles.h"

namespace {

constexpr int64_t INNER = 32;  // tokens of a segment

// The arguments, as compat/ops/delta.py lays them out; strides in elements.
struct Delta {
  const void *query, *key, *value;  // (batch, seqlen, heads, channels), the channels side by side
  void* out;                        // (batch, seqlen, heads, value_dim), contiguous
  const float *g, *beta;            // (batch, seqlen, heads), or g with (..., key_dim); contiguous
  const int32_t* seq_idx;           // (batch, seqlen), or null
  float* state;                     // (batch, heads, key_dim, padded value_dim), before and after
  int64_t query_stride[3], key_stride[3], value_stride[3];  // of batch, seqlen, heads
  int64_t batch, seqlen, heads, key_heads, key_dim, value_dim;
  int64_t by_channel, use_qk_l2norm, is_bf16, threads;
  float scale;
};

struct Solve {  // u = beta (v - k state) - A u, row by row, in v's place; `minus` is -A
  const float *k, *state, *minus, *beta;
  float* u;
  int64_t key_dim, padded;
  template <int R, int V>
  void run(int64_t row, int64_t column) const {
    Vec acc[R][V] = {}, own[V];
    multiply<R, V>(k + row * key_dim, key_dim, 1, key_dim, state + column, padded, acc);
    for (int r = 0; r < R; ++r) {
      std::memcpy(own, u + (row + r) * padded + column, sizeof own);
      for (int v = 0; v < V; ++v) acc[r][v] = beta[row + r] * (own[v] - acc[r][v]);
    }
    multiply<R, V>(minus + row * INNER, INNER, 1, row, u + column, padded, acc);
    for (int r = 0; r < R; ++r) {
      for (int s = 0; s < r; ++s)
        for (int v = 0; v < V; ++v) acc[r][v] += minus[(row + r) * INNER + row + s] * acc[s][v];
      std::memcpy(u + (row + r) * padded + column, acc[r], sizeof acc[r]);
    }
  }
};

struct Outputs {  // q state + P u
  const float *q, *state, *scores, *u;
  float* out;
  int64_t key_dim, padded;
  template <int R, int V>
  void run(int64_t row, int64_t column) const {
    Vec acc[R][V] = {};
    multiply<R, V>(q + row * key_dim, key_dim, 1, key_dim, state + column, padded, acc);
    multiply<R, V>(scores + row * INNER, INNER, 1, row + R, u + column, padded, acc);
    for (int r = 0; r < R; ++r)
      std::memcpy(out + (row + r) * padded + column, acc[r], sizeof acc[r]);
  }
};

struct Update {  // state = kept state + K^T u, with keys that have decayed to the segment's end
  const float *kt, *u, *kept;
  float* state;
  int64_t length, padded;
  template <int R, int V>
  void run(int64_t row, int64_t column) const {
    Vec acc[R][V];
    for (int r = 0; r < R; ++r) {
      std::memcpy(acc[r], state + (row + r) * padded + column, sizeof acc[r]);
      for (int v = 0; v < V; ++v) acc[r][v] *= kept[row + r];
    }
    multiply<R, V>(kt + row * INNER, INNER, 1, length, u + column, padded, acc);
    for (int r = 0; r < R; ++r)
      std::memcpy(state + (row + r) * padded + column, acc[r], sizeof acc[r]);
  }
};

// Reads a key or query as float, divided by its length if asked for, and scaled.
template <class T>
void read(const T* x, int64_t count, bool normalise, float scale, float* __restrict__ out) {
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t c = 0; c < count; ++c) {
    out[c] = to_float(x[c]);
    squares += out[c] * out[c];
  }
  if (normalise) scale /= std::sqrt(squares + 1e-6f);
#pragma omp simd
  for (int64_t c = 0; c < count; ++c) out[c] *= scale;
}

// What a head needs for a segment.
template <class T>
struct Head {
  const Delta& p;
  const int64_t row, head, padded;
  float* state;
  // Keys and, behind them, queries; keys transposed; values, later u, and outputs; -A and, behind it,
  // P; keys that decay from token to token, where channels have gates of their own.
  std::vector<float> both, kt, u, out, scores, decayed, kept, beta;

  Head(const Delta& p, int64_t item, int64_t padded)
      : p(p), row(item / p.heads), head(item % p.heads), padded(padded),
        state(p.state + item * p.key_dim * padded), both(2 * INNER * p.key_dim),
        kt(INNER * p.key_dim), u(INNER * padded), out(INNER * padded), scores(2 * INNER * INNER),
        decayed(p.by_channel ? INNER * p.key_dim : 0), kept(p.key_dim), beta(INNER) {}

  const T* at(const void* x, const int64_t* stride, int64_t t, int64_t h) const {
    return static_cast<const T*>(x) + row * stride[0] + t * stride[1] + h * stride[2];
  }

  // One decay for a head: the products of all pairs, and then their decays.
  void score_by_head(const float* g, int64_t length) {
    for_tiles(2 * length, (length + LANES - 1) / LANES * LANES,
              Product<INNER>{both.data(), kt.data(), scores.data(), p.key_dim});
    float since[INNER] = {}, start = 1;
    for (int64_t l = 0; l < length; ++l) {
      const float decay = fast_exp(g[l * p.heads]);
      float *a = &scores[l * INNER], *b = &scores[(length + l) * INNER];
      start *= decay;
      for (int64_t s = 0; s < INNER; ++s) {
        since[s] = s < l ? since[s] * decay : s == l ? 1.f : 0.f;
        a[s] = s < l ? -beta[l] * since[s] * a[s] : 0.f;
        b[s] = s <= l ? since[s] * b[s] : 0.f;
      }
      for (float* line : {&both[l * p.key_dim], &both[(length + l) * p.key_dim]})
#pragma omp simd
        for (int64_t c = 0; c < p.key_dim; ++c) line[c] *= start;
    }
    for (int64_t c = 0; c < p.key_dim; ++c)
      for (int64_t s = 0; s < INNER; ++s) kt[c * INNER + s] *= since[s];
    std::fill(kept.begin(), kept.end(), start);
  }

  // A decay for each channel: all earlier keys decay once more at each token.
  void score_by_channel(const float* g, int64_t length) {
    const int64_t dim = p.key_dim;
    std::vector<float> decay(dim);
    std::fill(kept.begin(), kept.end(), 1.f);
    for (int64_t l = 0; l < length; ++l) {
      const float* gates = g + l * p.heads * dim;
      float *k = &both[l * dim], *q = &both[(length + l) * dim];
      float *a = &scores[l * INNER], *b = &scores[(length + l) * INNER];
      float* __restrict__ e = decay.data();
#pragma omp simd
      for (int64_t c = 0; c < dim; ++c) e[c] = fast_exp(gates[c]);
      std::fill(a, a + INNER, 0.f);
      std::fill(b, b + INNER, 0.f);
      std::copy_n(k, dim, &decayed[l * dim]);
      for (int64_t s = 0; s <= l; ++s) {
        float* __restrict__ old = &decayed[s * dim];
        float with_k = 0, with_q = 0;
        if (s < l) {
#pragma omp simd
          for (int64_t c = 0; c < dim; ++c) old[c] *= e[c];
        }
#pragma omp simd reduction(+ : with_k, with_q)
        for (int64_t c = 0; c < dim; ++c) {
          with_k += k[c] * old[c];
          with_q += q[c] * old[c];
        }
        if (s < l) a[s] = -beta[l] * with_k;
        b[s] = with_q;
      }
#pragma omp simd
      for (int64_t c = 0; c < dim; ++c) {
        kept[c] *= e[c];
        k[c] *= kept[c];
        q[c] *= kept[c];
      }
    }
    for (int64_t c = 0; c < dim; ++c)
      for (int64_t s = 0; s < length; ++s) kt[c * INNER + s] = decayed[s * dim + c];
  }

  void segment(int64_t start, int64_t length) {
    const int64_t key_head = head * p.key_heads / p.heads, dim = p.key_dim;
    const int64_t place = row * p.seqlen + start;
    for (int64_t l = 0; l < length; ++l) {
      const int64_t t = start + l;
      float* k = &both[l * dim];
      read(at(p.key, p.key_stride, t, key_head), dim, p.use_qk_l2norm, 1, k);
      read(at(p.query, p.query_stride, t, key_head), dim, p.use_qk_l2norm, p.scale,
           &both[(length + l) * dim]);
      read(at(p.value, p.value_stride, t, head), p.value_dim, false, 1, &u[l * padded]);
      beta[l] = p.beta[(place + l) * p.heads + head];
      if (!p.by_channel)
        for (int64_t c = 0; c < dim; ++c) kt[c * INNER + l] = k[c];
    }
    const int64_t first = place * p.heads + head;
    p.by_channel ? score_by_channel(p.g + first * dim, length) : score_by_head(p.g + first, length);
    for_tiles(length, padded,
              Solve{both.data(), state, scores.data(), beta.data(), u.data(), dim, padded});
    for_tiles(length, padded, Outputs{&both[length * dim], state, &scores[length * INNER], u.data(),
                                      out.data(), dim, padded});
    for_tiles(dim, padded, Update{kt.data(), u.data(), kept.data(), state, length, padded});
    for (int64_t l = 0; l < length; ++l) {
      T* line = static_cast<T*>(p.out) + ((place + l) * p.heads + head) * p.value_dim;
      const float* found = &out[l * padded];
#pragma omp simd
      for (int64_t i = 0; i < p.value_dim; ++i) line[i] = from_float<T>(found[i]);
    }
  }

  void run() {
    const int32_t* ids = p.seq_idx ? p.seq_idx + row * p.seqlen : nullptr;
    int32_t sequence = -1;
    for (int64_t t = 0, length; t < p.seqlen; t += length) {
      const int32_t id = ids ? ids[t] : 0;
      length = 1;
      if (id < 0) {
        T* line = static_cast<T*>(p.out) + ((row * p.seqlen + t) * p.heads + head) * p.value_dim;
        std::fill_n(line, p.value_dim, T{});
        continue;
      }
      if (sequence >= 0 && id != sequence) std::fill_n(state, p.key_dim * padded, 0.f);
      sequence = id;
      while (length < INNER && t + length < p.seqlen && (!ids || ids[t + length] == id)) ++length;
      segment(t, length);
    }
  }
};

template <class T>
void forward(const Delta& p) {
  const int64_t padded = (p.value_dim + LANES - 1) / LANES * LANES;
  parallel_for(p.batch * p.heads, int(p.threads),
               [&](int64_t item) { Head<T>(p, item, padded).run(); });
}

}  // namespace

extern "C" void compat_delta(const Delta* p) {
  p->is_bf16 ? forward<bf16>(*p) : forward<float>(*p);
}
