// Kernels with one defect each, which the emulation must report, and sound ones.
#include <cstring>
#include <map>
#include <string>

#include "cuda_runtime.h"

namespace {

using Kernel = void (*)(float*);

constexpr unsigned kThreads = 64;

float& own() { return shared<float[kThreads]>()[threadIdx.x]; }
float& neighbours() { return shared<float[kThreads]>()[threadIdx.x ^ 1]; }
float* of_next_block() { return in_block(&own(), rank_in_cluster() ^ 1); }

void sound(float* out) {
  own() = 1;
  __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = neighbours();
  __syncthreads();
  own() = 2;
}

void reads_too_early(float* out) {
  own() = 1;
  __syncthreads();
  own() = 2;
  out[blockIdx.x * kThreads + threadIdx.x] = neighbours();
}

void writes_too_early(float* out) {
  own() = 1;
  __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = neighbours();
  own() = 2;
}

void reads_what_nobody_wrote(float* out) { out[blockIdx.x * kThreads + threadIdx.x] = own(); }

void writes_where_another_block_writes(float* out) { out[threadIdx.x] = 1; }

void shuffles_without_a_lane(float* out) {
  if (threadIdx.x == 3) return;
  out[threadIdx.x] = __shfl_xor_sync(~0u, 1, 1);
}

void waits_for_a_lane(float* out) {
  if (threadIdx.x == 3) __syncthreads();
  out[threadIdx.x] = __shfl_xor_sync(~0u, 1, 1);
}

void sound_cluster(float* out) {
  arrive_at_cluster();
  wait_for_cluster();
  *of_next_block() = 1;
  arrive_at_cluster();
  wait_for_cluster();
  out[blockIdx.x * kThreads + threadIdx.x] = own();
}

void reaches_out_too_early(float*) {
  *of_next_block() = 1;
  arrive_at_cluster();
  wait_for_cluster();
}

void reaches_out_too_late(float*) {
  arrive_at_cluster();
  wait_for_cluster();
  *of_next_block() = 1;
}

void reads_before_the_cluster_has_written(float* out) {
  own() = 1;
  arrive_at_cluster();
  wait_for_cluster();
  *of_next_block() = 2;
  __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = own();
  arrive_at_cluster();
  wait_for_cluster();
}

void writes_past_shared_memory(float*) { (&own())[kThreads] = 1; }

void reads_a_vector_that_is_not_aligned(float* out) {
  float* volatile odd = out + 1;
  out[0] = __uint_as_float(reinterpret_cast<uint4*>(odd)->x);
}

const std::map<std::string, Kernel> kernels = {
#define KERNEL(name) {#name, name}
    KERNEL(sound),
    KERNEL(reads_too_early),
    KERNEL(writes_too_early),
    KERNEL(reads_what_nobody_wrote),
    KERNEL(writes_where_another_block_writes),
    KERNEL(shuffles_without_a_lane),
    KERNEL(waits_for_a_lane),
    KERNEL(sound_cluster),
    KERNEL(reaches_out_too_early),
    KERNEL(reaches_out_too_late),
    KERNEL(reads_before_the_cluster_has_written),
    KERNEL(writes_past_shared_memory),
    KERNEL(reads_a_vector_that_is_not_aligned),
};

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// What the emulation says of a kernel on two blocks; nothing where all is well.
const char* run_planted(const char* name) {
  static float memory[2 * kThreads];
  const Kernel kernel = kernels.at(name);
  const unsigned cluster = std::strstr(name, "cluster") || std::strstr(name, "reaches") ? 2 : 1;
  const bool well = emulation::run(name, {2, kThreads, cluster}, [&] { kernel(memory); });
  return well ? "" : emulation::error();
}

// What it says of a launch.
const char* run_nothing(unsigned blocks, unsigned threads, unsigned cluster, size_t shared_bytes) {
  const bool well = emulation::run(nullptr, {blocks, threads, cluster, shared_bytes}, [] {});
  return well ? "" : emulation::error();
}
}
