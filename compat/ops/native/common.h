// What the kernels share: threads of torch's own pool, bfloat16, and exp in loops that vectorise.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

// GOMP_parallel of the OpenMP runtime that torch has loaded, or null: then threads are started for
// each loop. Taken from there rather than linked, as a second runtime would spin beside torch's.
using Team = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
extern Team compat_team;

// Runs body(i) for i < n on `threads` threads, which take the next i when they are done with one.
template <class Body>
void parallel_for(int64_t n, int threads, const Body& body) {
  if (threads <= 1 || n <= 1) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  struct Shared {
    const Body& body;
    int64_t n;
    std::atomic<int64_t> next{0};
  } shared{body, n};
  void (*work)(void*) = [](void* given) {
    auto& s = *static_cast<Shared*>(given);
    for (int64_t i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.n;) s.body(i);
  };
  // Always of all threads: libgomp ends those that a smaller team leaves over, and torch's next
  // loop would have to start them again.
  if (compat_team) return compat_team(work, &shared, unsigned(threads), 0);
  if (n < threads) threads = int(n);
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work, &shared);
  work(&shared);
  for (auto& other : others) other.join();
}

struct bf16 {
  uint16_t bits;
};

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

template <class T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {  // To the nearest, ties to even; NaN stays NaN.
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {uint16_t(x == x ? rounded : 0x7fc0)};
}

// A tensor of four dimensions, of float32 or bfloat16; strides in elements. As in compat/ops/compiled.py.
struct View {
  void* data;
  int64_t stride[4];
  int64_t is_bf16;
};

// e^x to 2 units in the last place: 2^n e^r with |r| <= ln(2) / 2, and r's Taylor series to r^7.
static inline float fast_exp(float x) {
  const float shift = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits.
  float kept = x > 88.72f ? 88.72f : x;
  kept = kept < -87.33f ? -87.33f : kept;
  float shifted = kept * 1.44269504088896f + shift;
  float n = shifted - shift;
  float r = kept - n * 0.693145751953125f - n * 1.42860677e-6f;
  float p = 1.f / 5040;
  p = p * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  // Times 2^n, n in shifted's low bits: added to the exponent, which stays in range for these x.
  uint32_t bits, power;
  std::memcpy(&bits, &p, 4);
  std::memcpy(&power, &shifted, 4);
  bits += power << 23;
  float y;
  std::memcpy(&y, &bits, 4);
  y = x > 88.72f ? INFINITY : y;
  y = x < -87.33f ? 0.f : y;
  return x == x ? y : x;
}

static inline float sigmoid(float x) { return 1.f / (1.f + fast_exp(-x)); }
static inline float silu(float x) { return x * sigmoid(x); }
