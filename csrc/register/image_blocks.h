// The blocks that are ops, for `layers`, which runs them one after another.
#pragma once

#include "blocks.h"

namespace qcsbm {

namespace res_block {

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Gradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Result forward(const Tensor& x, const Maybe& tangents, const Tensor& bias, const Tensor& gamma_in,
               const Tensor& beta_in, const Tensor& weight_in, const Tensor& gamma_out, const Tensor& beta_out,
               const Tensor& weight_out, const Tensor& bias_out, const Maybe& shortcut, int64_t groups_in,
               int64_t groups_out, double eps, double scale, std::vector<double> taps, int64_t up, int64_t down,
               int64_t pad);
Gradients vjp(const Tensor& g, const Maybe& g_tangents, const Tensor& x, const Maybe& tangents, const Tensor& bias,
              const Tensor& gamma_in, const Tensor& beta_in, const Tensor& weight_in, const Tensor& gamma_out,
              const Tensor& beta_out, const Tensor& weight_out, const Maybe& shortcut, const Tensor& kept,
              const Tensor& statistics, int64_t groups_in, int64_t groups_out, double scale, std::vector<double> taps,
              int64_t up, int64_t down, int64_t pad, bool weights);

}  // namespace res_block

namespace attention_block {

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Result forward(const Tensor& x, const Maybe& tangents, const Tensor& gamma, const Tensor& beta, const Tensor& weight,
               const Tensor& bias, const Tensor& weight_out, const Tensor& bias_out, int64_t groups, double eps,
               double scale);
Gradients vjp(const Tensor& g, const Maybe& g_tangents, const Tensor& x, const Maybe& tangents, const Tensor& gamma,
              const Tensor& beta, const Tensor& weight, const Tensor& weight_out, const Tensor& kept,
              const Tensor& statistics, int64_t groups, double scale, bool weights);

}  // namespace attention_block

}  // namespace qcsbm
