// What nvcc alone compiles. The tests compile the rest of this folder for the CPU: they define this
// guard and functions of the same names.
#ifndef MCORE_SFT_CUDA_DEVICE_H
#define MCORE_SFT_CUDA_DEVICE_H

#include <cooperative_groups.h>

// 2^x within a part of 2^22, and 0 where that is below 2^-126.
__device__ inline float power_of_two(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Memory that the threads of a block share, one such for each type.
template <typename T>
__device__ T& shared() {
  __shared__ T memory;
  return memory;
}

// The shared memory that the launch asks for.
__device__ inline uint4* shared_of_launch() {
  extern __shared__ uint4 memory[];
  return memory;
}

// Clusters: blocks that run at the same time and reach into each other's shared memory.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ inline int rank_in_cluster() { return cooperative_groups::this_cluster().block_rank(); }

// A barrier of all threads of the cluster, in two halves.
__device__ inline void arrive_at_cluster() { cooperative_groups::this_cluster().barrier_arrive(); }
__device__ inline void wait_for_cluster() { cooperative_groups::this_cluster().barrier_wait(); }

// What lies at `own` in this block, in the block of that rank.
template <typename T>
__device__ T* in_block(T* own, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(own, rank);
}
#else  // kernels for clusters are compiled and never launched
__device__ inline int rank_in_cluster() { __trap(); }
__device__ inline void arrive_at_cluster() { __trap(); }
__device__ inline void wait_for_cluster() { __trap(); }
template <typename T>
__device__ T* in_block(T* own, int) { __trap(); return own; }
#endif

#endif
