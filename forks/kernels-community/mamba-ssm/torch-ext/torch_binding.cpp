// registration.h comes from kernel-builder, causal_conv1d_binding.h from the kernel causal-conv1d.

#include <torch/library.h>

#include "causal_conv1d_binding.h"
#include "registration.h"
#include "torch_binding.h"

TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, ops) {
  define_causal_conv1d(ops);
  define_selective_scan(ops);
}

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
