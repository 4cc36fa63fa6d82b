// Schemas of all operators, once; cpu/ and cuda/ register what computes them.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(mcore_sft, ops) {
  ops.def("best_fit_pack(Tensor lengths, int capacity, int seed) -> (Tensor order, Tensor offsets)");
}
