// Mamba-2's fused op (convolution, SiLU, SSD scan, gated norm) without gradients; compat/ops/mamba2.py
// has the mathematics. A row is cut into segments of at most INNER tokens that neither padding nor a
// new sequence interrupts; a head goes through them one after the other, its state in the cache of
// one core. What is shared by the heads of a group (B, C and their products) is made before.
#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "tiles.h"

namespace {

constexpr int64_t INNER = 32;       // tokens of a segment
constexpr int64_t BLOCK = 256;      // tokens of a row between the two passes over the heads
constexpr int64_t TOKENS = 2048;    // the same of all rows, where the rows are many

// The arguments, as compat/ops/mamba2_native.py lays them out. Tensors are contiguous, except
// zxbcdt, whose channels are.
struct Mamba2 {
  const void* zxbcdt;            // (batch, seqlen, dim + conv_dim + nheads): z, (x, B, C), dt
  void* out;                     // (batch, seqlen, dim)
  const int32_t* seq_idx;        // (batch, seqlen), or null
  float* state;                  // (batch, nheads, dstate, padded headdim), before and after
  const void* conv_before;       // (batch, width - 1, conv_dim)
  void* conv_after;              // the same
  const float* conv_weight;      // (width, conv_dim)
  const float* conv_bias;        // (conv_dim,)
  const float* dt_bias;          // (nheads,)
  const float* A;                // (nheads,)
  const float* D;                // (nheads,)
  const float* norm_weight;      // (dim,), or null: gated, but not normed
  int64_t batch, seqlen, row_stride, token_stride;
  int64_t nheads, headdim, dstate, ngroups, width;
  int64_t is_bf16, norm_before_gate, threads;
  float dt_min, dt_max, eps;
};

struct Segment {
  int64_t row, start, length;  // start counts from the block's beginning
  bool fresh;                  // begins a sequence that is not the row's first
};

struct Outputs {  // decayed (C state) + (decayed scores) x, of a head in a segment
  const float *c, *state, *from_start, *mixed, *x;
  float* out;
  int64_t dstate, padded;
  template <int R, int V>
  void run(int64_t row, int64_t column) const {
    Vec acc[R][V] = {};
    multiply<R, V>(c + row * dstate, dstate, 1, dstate, state + column, padded, acc);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) acc[r][v] *= from_start[row + r];
    multiply<R, V>(mixed + row * INNER, INNER, 1, row + R, x + column, padded, acc);
    for (int r = 0; r < R; ++r)
      std::memcpy(out + (row + r) * padded + column, acc[r], sizeof acc[r]);
  }
};

struct Update {  // state = decay state + B^T (decayed x), of a head after a segment
  const float *bt, *x;
  float* state;
  float decay;
  int64_t length, padded;
  template <int R, int V>
  void run(int64_t row, int64_t column) const {
    Vec acc[R][V];
    for (int r = 0; r < R; ++r) {
      std::memcpy(acc[r], state + (row + r) * padded + column, sizeof acc[r]);
      for (int v = 0; v < V; ++v) acc[r][v] *= decay;
    }
    multiply<R, V>(bt + row * INNER, INNER, 1, length, x + column, padded, acc);
    for (int r = 0; r < R; ++r)
      std::memcpy(state + (row + r) * padded + column, acc[r], sizeof acc[r]);
  }
};

template <int WIDTH, class T>
inline void convolve(const Mamba2& p, const T* const* taps, int64_t first, int64_t count,
                     float* __restrict__ out) {
  const int64_t conv_dim = p.nheads * p.headdim + 2 * p.ngroups * p.dstate;
  const float *weight = p.conv_weight + first, *bias = p.conv_bias + first;
  const T* tap[WIDTH];
  for (int k = 0; k < WIDTH; ++k) tap[k] = taps[k] + first;
#pragma omp simd
  for (int64_t c = 0; c < count; ++c) {
    float sum = bias[c];
    for (int k = 0; k < WIDTH; ++k) sum += weight[k * conv_dim + c] * to_float(tap[k][c]);
    out[c] = silu(sum);
  }
}

// The convolution and SiLU of some channels of one token.
template <class T>
inline void convolve(const Mamba2& p, const T* const* taps, int64_t first, int64_t count,
                     float* out) {
  if (p.width == 2) convolve<2>(p, taps, first, count, out);
  if (p.width == 3) convolve<3>(p, taps, first, count, out);
  if (p.width == 4) convolve<4>(p, taps, first, count, out);
}

// out = y silu(z), or y where z is null; returns the sum of its squares.
template <class T>
inline float gate(const float* __restrict__ y, const T* __restrict__ z, int64_t count,
                  float* __restrict__ out) {
  float squares = 0;
  if (z) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = y[i] * silu(to_float(z[i]));
  } else {
    std::copy_n(y, count, out);
  }
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < count; ++i) squares += out[i] * out[i];
  return squares;
}

// out = scale weight y, times silu(z) where z is not null.
template <class T>
inline void normalise(const float* __restrict__ y, float scale, const float* __restrict__ weight,
                      const T* __restrict__ z, int64_t count, T* __restrict__ out) {
  if (z) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
      out[i] = from_float<T>(y[i] * scale * weight[i] * silu(to_float(z[i])));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = from_float<T>(y[i] * scale * weight[i]);
  }
}

inline float softplus(float x) { return x > 20.f ? x : std::log1p(std::exp(x)); }

template <class T>
void forward(const Mamba2& p) {
  const T* zxbcdt = static_cast<const T*>(p.zxbcdt);
  const int64_t dim = p.nheads * p.headdim, grouped = p.ngroups * p.dstate, width = p.width;
  const int64_t conv_dim = dim + 2 * grouped, padded = (p.headdim + LANES - 1) / LANES * LANES;
  const int64_t heads_per_group = p.nheads / p.ngroups;
  // One row takes whole blocks; many rows take shorter ones, so that the scratch stays small.
  const int64_t block = std::min(
      {BLOCK, std::max(TOKENS / p.batch / INNER, int64_t(1)) * INNER, p.seqlen});
  const int64_t places = p.batch * block;

  const std::vector<T> zeros(conv_dim, T{});
  std::vector<const T*> history(p.batch * (width - 1));  // the last inputs of each row
  for (int64_t i = 0; i < int64_t(history.size()); ++i)
    history[i] = static_cast<const T*>(p.conv_before) + i * conv_dim;
  std::vector<int32_t> sequence(p.batch, -1);

  std::vector<const T*> taps(places * width);  // the convolution's inputs; null at padding
  std::vector<Segment> segments;
  std::vector<int64_t> row_begin(p.batch + 1);
  // Of each place: C, from a segment's first token on group by group; the outputs before the norm,
  // and their sums of squares. Of each segment and group: B^T and the scores.
  const std::unique_ptr<float[]> c(new float[places * grouped]), y(new float[places * dim]);
  const std::unique_ptr<float[]> squares(new float[places * p.nheads]);
  std::vector<float> bt, scores;

  auto token = [&](int64_t row, int64_t t) {
    return zxbcdt + row * p.row_stride + t * p.token_stride;
  };

  for (int64_t begin = 0; begin < p.seqlen; begin += block) {
    const int64_t tokens = std::min(block, p.seqlen - begin);
    segments.clear();
    std::fill(taps.begin(), taps.end(), nullptr);
    for (int64_t row = 0; row < p.batch; ++row) {
      row_begin[row] = segments.size();
      const T** last = &history[row * (width - 1)];
      bool open = false;
      for (int64_t t = 0; t < tokens; ++t) {
        const int32_t id = p.seq_idx ? p.seq_idx[row * p.seqlen + begin + t] : 0;
        if (id < 0) {
          open = false;
          continue;
        }
        const bool fresh = sequence[row] >= 0 && id != sequence[row];
        sequence[row] = id;
        if (fresh) std::fill(last, last + width - 1, zeros.data());
        if (!open || fresh || segments.back().length == INNER)
          segments.push_back({row, t, 0, fresh});
        open = true;
        ++segments.back().length;
        const T** tap = &taps[(row * block + t) * width];
        std::copy(last, last + width - 1, tap);
        tap[width - 1] = token(row, begin + t) + dim;
        std::copy(tap + 1, tap + width, last);
      }
    }
    row_begin[p.batch] = segments.size();
    bt.resize(std::max(bt.size(), segments.size() * grouped * INNER));
    scores.resize(std::max(scores.size(), segments.size() * p.ngroups * INNER * INNER));

    parallel_for(segments.size(), p.threads, [&](int64_t index) {
      const Segment& s = segments[index];
      const int64_t place = s.row * block + s.start;
      float* own_bt = &bt[index * grouped * INNER];
      std::vector<float> line(grouped);
      for (int64_t l = 0; l < s.length; ++l) {
        const T* const* tap = &taps[(place + l) * width];
        convolve(p, tap, dim, grouped, line.data());
        for (int64_t n = 0; n < grouped; ++n) own_bt[n * INNER + l] = line[n];
        convolve(p, tap, dim + grouped, grouped, line.data());
        for (int64_t g = 0; g < p.ngroups; ++g)
          std::copy_n(&line[g * p.dstate], p.dstate,
                      &c[place * grouped + (g * s.length + l) * p.dstate]);
      }
      for (int64_t g = 0; g < p.ngroups; ++g)
        for_tiles(s.length, (s.length + LANES - 1) / LANES * LANES,
                  Product<INNER>{&c[place * grouped + g * s.length * p.dstate],
                         own_bt + g * p.dstate * INNER,
                         &scores[(index * p.ngroups + g) * INNER * INNER], p.dstate});
    });

    parallel_for(p.batch * p.nheads, p.threads, [&](int64_t item) {
      const int64_t row = item / p.nheads, head = item % p.nheads, group = head / heads_per_group;
      float* state = p.state + item * p.dstate * padded;
      std::vector<float> x(INNER * padded), found(INNER * padded), mixed(INNER * INNER);
      float dt[INNER] = {}, sum[INNER] = {}, from_start[INNER], to_end[INNER];
      for (int64_t index = row_begin[row]; index < row_begin[row + 1]; ++index) {
        const Segment& s = segments[index];
        const int64_t place = row * block + s.start;
        if (s.fresh) std::fill_n(state, p.dstate * padded, 0.f);

        double total = 0;
        for (int64_t l = 0; l < s.length; ++l) {
          const T* const* tap = &taps[(place + l) * width];
          const T* now = token(row, begin + s.start + l);
          const T* soon = token(row, std::min(begin + s.start + l + INNER, p.seqlen - 1));
          // Too far apart in memory for the CPU to see them coming: z, and the next segment's x.
          for (int64_t i = 0; i < p.headdim; i += 64 / sizeof(T)) {
            __builtin_prefetch(now + head * p.headdim + i);
            __builtin_prefetch(soon + dim + head * p.headdim + i);
          }
          convolve(p, tap, head * p.headdim, p.headdim, &x[l * padded]);
          const float raw = to_float(now[dim + conv_dim + head]);
          dt[l] = std::min(std::max(softplus(raw + p.dt_bias[head]), p.dt_min), p.dt_max);
          total += double(dt[l]) * p.A[head];
          sum[l] = total;
        }
        const float* score = &scores[(index * p.ngroups + group) * INNER * INNER];
        const int64_t wide = (s.length + LANES - 1) / LANES * LANES;
        for (int64_t l = 0; l < s.length; ++l) {
          float* line = &mixed[l * INNER];
          const int64_t end = std::min(l / ROWS * ROWS + ROWS + LANES - 1, wide) / LANES * LANES;
#pragma omp simd
          for (int64_t k = 0; k < end; ++k) {
            const float decayed = fast_exp(sum[l] - sum[k]) * dt[k] * score[l * INNER + k];
            line[k] = k <= l ? decayed : 0.f;
          }
          line[l] += p.D[head];
        }
        for (int64_t l = 0; l < s.length; ++l) {
          from_start[l] = fast_exp(sum[l]);
          to_end[l] = fast_exp(sum[s.length - 1] - sum[l]) * dt[l];
        }
        for_tiles(s.length, padded,
                  Outputs{&c[place * grouped + group * s.length * p.dstate], state, from_start,
                          mixed.data(), x.data(), found.data(), p.dstate, padded});

        for (int64_t l = 0; l < s.length; ++l) {
          const T* z = token(row, begin + s.start + l) + head * p.headdim;
          const bool gated = !p.norm_weight || !p.norm_before_gate;
          const float square = gate(&found[l * padded], gated ? z : nullptr, p.headdim,
                                    &y[(place + l) * dim + head * p.headdim]);
          if (p.norm_weight) squares[(place + l) * p.nheads + head] = square;
          float* scaled = &x[l * padded];
          for (int64_t i = 0; i < padded; ++i) scaled[i] *= to_end[l];
        }
        for_tiles(p.dstate, padded,
                  Update{&bt[(index * grouped + group * p.dstate) * INNER], x.data(), state,
                         fast_exp(sum[s.length - 1]), s.length, padded});
      }
    });

    const int64_t grain = 8, grains = (tokens + grain - 1) / grain;
    parallel_for(p.batch * grains, p.threads, [&](int64_t item) {
      const int64_t row = item / grains, from = item % grains * grain;
      for (int64_t t = from; t < std::min(from + grain, tokens); ++t) {
        const int64_t place = row * block + t;
        T* out = static_cast<T*>(p.out) + (row * p.seqlen + begin + t) * dim;
        if (!taps[place * width]) {
          std::fill_n(out, dim, T{});
          continue;
        }
        const T* z = token(row, begin + t);
        for (int64_t g = 0; g < p.ngroups; ++g) {
          const int64_t channels = heads_per_group * p.headdim, first = g * channels;
          const float* values = &y[place * dim + first];
          if (!p.norm_weight) {
            for (int64_t i = 0; i < channels; ++i) out[first + i] = from_float<T>(values[i]);
            continue;
          }
          const float* square = &squares[place * p.nheads + g * heads_per_group];
          const float sum = std::accumulate(square, square + heads_per_group, 0.f);
          normalise(values, 1 / std::sqrt(sum / channels + p.eps), p.norm_weight + first,
                    p.norm_before_gate ? z + first : nullptr, channels, out + first);
        }
      }
    });
  }
  for (int64_t i = 0; i < int64_t(history.size()); ++i)
    std::copy_n(history[i], conv_dim, static_cast<T*>(p.conv_after) + i * conv_dim);
}

}  // namespace

extern "C" void compat_mamba2(const Mamba2* p) {
  p->is_bf16 ? forward<bf16>(*p) : forward<float>(*p);
}

// The length that `state`'s headdim is padded to a multiple of.
extern "C" int64_t compat_lanes() { return LANES; }
