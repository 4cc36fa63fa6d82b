// What csrc/cuda uses of CUDA's header of this name, and in place of its own device.h.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "emulation.h"

#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

using emulation::blockDim;
using emulation::blockIdx;
using emulation::threadIdx;

struct float2 {
  float x, y;
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline int min(int a, int b) { return a < b ? a : b; }

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline void __stcs(uint4* to, uint4 value) { *to = value; }
inline void __syncthreads() { emulation::wait_for_block(); }
inline float __shfl_xor_sync(unsigned, float value, int distance) {
  return emulation::shuffle(value, distance);
}

// ---- device.h

#define MCORE_SFT_CUDA_DEVICE_H

inline float power_of_two(float x) {
  const float power = std::exp2(x);
  return power < 0x1p-126f ? 0 : power;
}

template <typename T>
T& shared() {
  static const char key = 0;
  return *static_cast<T*>(emulation::shared_memory(&key, sizeof(T)));
}

inline uint4* shared_of_launch() { return static_cast<uint4*>(emulation::shared_of_launch()); }

using emulation::arrive_at_cluster;
using emulation::rank_in_cluster;
using emulation::wait_for_cluster;

template <typename T>
T* in_block(T* own, int rank) {
  return static_cast<T*>(emulation::in_block(own, rank));
}

// ---- on the host

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorUnknown };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout
};
constexpr int cudaSharedmemCarveoutMaxShared = 100;
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  const cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const bool capability = attribute == cudaDevAttrComputeCapabilityMajor;
  *value = capability ? emulation::machine.capability : emulation::shared_room();
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  const bool well = emulation::allow_shared(reinterpret_cast<const void*>(kernel), value);
  return well ? cudaSuccess : cudaErrorUnknown;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  const unsigned cluster = config->numAttrs == 0 ? 1 : config->attrs->val.clusterDim.x;
  const bool well = emulation::run(
      reinterpret_cast<const void*>(kernel),
      {config->gridDim.x, config->blockDim.x, cluster, config->dynamicSmemBytes},
      [&] { kernel(arguments...); });
  return well ? cudaSuccess : cudaErrorUnknown;
}

inline int aoti_torch_get_current_cuda_stream(int, void**) { return 0; }

// What STD_CUDA_CHECK asks.
inline void torch_c10_cuda_check_msg(int32_t code, const char*, const char*, uint32_t, bool,
                                     char** message) {
  *message = code == cudaSuccess ? nullptr : strdup(emulation::error());
}
inline void torch_c10_cuda_free_error_msg(char* message) { std::free(message); }
