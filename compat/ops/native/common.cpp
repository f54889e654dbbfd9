#include "common.h"

Team compat_team = nullptr;

extern "C" void compat_set_team(Team team) { compat_team = team; }

// For the tests.
extern "C" void compat_exp(const float* x, float* out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = fast_exp(x[i]);
}
