// In the place of <torch/extension.h> and <torch/python.h>: what extensions of these libraries use of
// them. The whole of them is some ten seconds more of compiling for each source.
#pragma once
#include <torch/csrc/utils/pybind.h>
#include <torch/types.h>
