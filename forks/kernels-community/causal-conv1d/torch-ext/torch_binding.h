// The ops of causal_conv1d. The hub kernel mamba-ssm takes this file too.

#pragma once

#include <optional>

#include <torch/library.h>

// As causal-conv1d/causal_conv1d.cpp defines them.
void causal_conv1d_fwd(const at::Tensor &x, const at::Tensor &weight,
                       const std::optional<at::Tensor> &bias,
                       const std::optional<at::Tensor> &seq_idx,
                       const std::optional<at::Tensor> &initial_states, at::Tensor &out,
                       std::optional<at::Tensor> &final_states_out, bool silu_activation);

void causal_conv1d_bwd(const at::Tensor &x, const at::Tensor &weight,
                       const std::optional<at::Tensor> &bias, at::Tensor &dout,
                       const std::optional<at::Tensor> &seq_idx,
                       const std::optional<at::Tensor> &initial_states,
                       const std::optional<at::Tensor> &dfinal_states, at::Tensor &dx,
                       at::Tensor &dweight, std::optional<at::Tensor> &dbias,
                       std::optional<at::Tensor> &dinitial_states, bool silu_activation);

void causal_conv1d_update(const at::Tensor &x, const at::Tensor &conv_state,
                          const at::Tensor &weight, const std::optional<at::Tensor> &bias,
                          at::Tensor &out, bool silu_activation,
                          const std::optional<at::Tensor> &cache_seqlens,
                          const std::optional<at::Tensor> &conv_state_indices);

// Every tensor that is written to is marked in the schema. On a CPU there are only the schemas, so
// that a call there says what is missing.
inline void define_causal_conv1d(torch::Library &ops) {
  ops.def("causal_conv1d_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, "
          "Tensor? initial_states, Tensor(a!) out, Tensor(b!)? final_states_out, "
          "bool silu_activation) -> ()");
  ops.def("causal_conv1d_bwd(Tensor x, Tensor weight, Tensor? bias, Tensor dout, "
          "Tensor? seq_idx, Tensor? initial_states, Tensor? dfinal_states, Tensor(a!) dx, "
          "Tensor(b!) dweight, Tensor(c!)? dbias, Tensor(d!)? dinitial_states, "
          "bool silu_activation) -> ()");
  ops.def("causal_conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, "
          "Tensor(b!) out, bool silu_activation, Tensor? cache_seqlens, "
          "Tensor? conv_state_indices) -> ()");

#if defined(CUDA_KERNEL)
  // An op is given its optional tensors by value, where the functions want a reference.
  using Maybe = std::optional<at::Tensor>;
  ops.impl("causal_conv1d_fwd", c10::kCUDA,
           [](const at::Tensor &x, const at::Tensor &weight, Maybe bias, Maybe seq_idx,
              Maybe initial_states, at::Tensor out, Maybe final_states_out, bool silu_activation) {
             causal_conv1d_fwd(x, weight, bias, seq_idx, initial_states, out, final_states_out,
                               silu_activation);
           });
  ops.impl("causal_conv1d_bwd", c10::kCUDA,
           [](const at::Tensor &x, const at::Tensor &weight, Maybe bias, at::Tensor dout,
              Maybe seq_idx, Maybe initial_states, Maybe dfinal_states, at::Tensor dx,
              at::Tensor dweight, Maybe dbias, Maybe dinitial_states, bool silu_activation) {
             causal_conv1d_bwd(x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx,
                               dweight, dbias, dinitial_states, silu_activation);
           });
  ops.impl("causal_conv1d_update", c10::kCUDA,
           [](const at::Tensor &x, const at::Tensor &conv_state, const at::Tensor &weight,
              Maybe bias, at::Tensor out, bool silu_activation, Maybe cache_seqlens,
              Maybe conv_state_indices) {
             causal_conv1d_update(x, conv_state, weight, bias, out, silu_activation, cache_seqlens,
                                  conv_state_indices);
           });
#endif
}
