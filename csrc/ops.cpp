// Schemas of all operators, once; cpu/ and cuda/ register what computes them.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(mcore_sft, ops) {
  ops.def("best_fit_pack(Tensor lengths, int capacity, int seed) -> (Tensor order, Tensor offsets)");
  // What the package calls, computed in mcore_sft/ops/head.py for every kind of device.
  ops.def(
      "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor labels, Tensor? rows, "
      "Tensor? upstream, int vocab_size, str group, bool sequence_parallel, bool for_hidden, "
      "bool for_weight) -> (Tensor loss, Tensor token_loss, Tensor grad_hidden, Tensor grad_weight)");
  ops.def(
      "linear_cross_entropy_main_grad_(Tensor hidden, Tensor weight, Tensor labels, Tensor? rows, "
      "Tensor(a!) main_grad, int vocab_size, str group, bool sequence_parallel, bool for_hidden) -> "
      "(Tensor loss, Tensor token_loss, Tensor grad_hidden)");
  // Multiplies in place; by 1 it touches nothing where that can be known without waiting.
  ops.def("scale_(Tensor(a!) values, Tensor factor) -> ()");
  // Its passes over rows of logits.
  ops.def("cross_entropy_statistics(Tensor logits, Tensor labels, int first, int width) -> Tensor");
  ops.def(
      "cross_entropy_gradient_(Tensor(a!) logits, Tensor labels, Tensor largest, Tensor log_sum, "
      "Tensor factors, int first, int width) -> ()");
  ops.def("cross_entropy_(Tensor(a!) logits, Tensor labels, Tensor factors, int width) -> Tensor");
}
