// registration.h comes from kernel-builder.

#include <torch/library.h>

#include "registration.h"
#include "torch_binding.h"

TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, ops) { define_causal_conv1d(ops); }

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
