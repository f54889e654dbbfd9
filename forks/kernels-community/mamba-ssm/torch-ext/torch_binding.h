// The ops of selective_scan.

#pragma once

#include <optional>
#include <vector>

#include <torch/library.h>

// As selective-scan/selective_scan.cpp defines them.
std::vector<at::Tensor> selective_scan_fwd(
    const at::Tensor &u, const at::Tensor &delta, const at::Tensor &A, const at::Tensor &B,
    const at::Tensor &C, const std::optional<at::Tensor> &D, const std::optional<at::Tensor> &z,
    const std::optional<at::Tensor> &delta_bias, bool delta_softplus,
    const std::optional<at::Tensor> &initial_states);

std::vector<at::Tensor> selective_scan_bwd(
    const at::Tensor &u, const at::Tensor &delta, const at::Tensor &A, const at::Tensor &B,
    const at::Tensor &C, const std::optional<at::Tensor> &D, const std::optional<at::Tensor> &z,
    const std::optional<at::Tensor> &delta_bias, const at::Tensor &dout,
    const std::optional<at::Tensor> &x, const std::optional<at::Tensor> &out,
    std::optional<at::Tensor> &dz, bool delta_softplus, bool recompute_out_z,
    const std::optional<at::Tensor> &initial_states, const std::optional<at::Tensor> &dlast_state);

// As for causal_conv1d: what is written to is marked, and on a CPU there are only the schemas.
inline void define_selective_scan(torch::Library &ops) {
  ops.def("selective_scan_fwd(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, "
          "Tensor? z, Tensor? delta_bias, bool delta_softplus, Tensor? initial_states=None) "
          "-> Tensor[]");
  ops.def("selective_scan_bwd(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, "
          "Tensor? z, Tensor? delta_bias, Tensor dout, Tensor? x, Tensor? out, Tensor(a!)? dz, "
          "bool delta_softplus, bool recompute_out_z, Tensor? initial_states=None, "
          "Tensor? dlast_state=None) -> Tensor[]");

#if defined(CUDA_KERNEL)
  using Maybe = std::optional<at::Tensor>;
  ops.impl("selective_scan_fwd", c10::kCUDA,
           [](const at::Tensor &u, const at::Tensor &delta, const at::Tensor &A,
              const at::Tensor &B, const at::Tensor &C, Maybe D, Maybe z, Maybe delta_bias,
              bool delta_softplus, Maybe initial_states) {
             return selective_scan_fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus,
                                       initial_states);
           });
  ops.impl("selective_scan_bwd", c10::kCUDA,
           [](const at::Tensor &u, const at::Tensor &delta, const at::Tensor &A,
              const at::Tensor &B, const at::Tensor &C, Maybe D, Maybe z, Maybe delta_bias,
              const at::Tensor &dout, Maybe x, Maybe out, Maybe dz, bool delta_softplus,
              bool recompute_out_z, Maybe initial_states, Maybe dlast_state) {
             return selective_scan_bwd(u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz,
                                       delta_softplus, recompute_out_z, initial_states,
                                       dlast_state);
           });
#endif
}
