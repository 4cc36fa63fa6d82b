// csrc/cuda for tensors on the CPU, as operators of mcore_sft_emulated.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda_bf16.h"

namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(int) {}
};
}  // namespace torch::stable::accelerator

#define DeviceGuard NoGuard
#define mcore_sft mcore_sft_emulated
#define CUDA CPU
#include "csrc/cuda/cross_entropy.cu"
#include "csrc/ops.cpp"
