// The passes over rows of logits on NVIDIA GPUs. A row belongs to one block of threads or to one
// cluster of blocks, and its parts are added up in their order: every run gives the same bits.
//
// All are bound by memory. What needs both the sums and the gradient takes one of two ways:
//
// From compute capability 9.0 on, a cluster of four blocks reads the row once and keeps it, each
// block its part, in shared memory (128,256 columns in bf16: four times 63 KB, three such blocks on
// a multiprocessor). Two numbers a block are exchanged.
//
// Elsewhere, and where a row is too short or too long for that, one block reads it twice, the
// second time backwards, from where the first ended: with one block of 1024 threads on each
// multiprocessor the rows under way (128,256 columns in bf16 on an A100: 108 x 251 KB = 27 MB) stay
// in the L2 cache of 40 MB, and their newest parts in L1. Memory is read once and written once.
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <bit>
#include <cfloat>
#include <climits>
#include <cstdint>

#include "device.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class Kind { kStatistics, kGradient, kBoth };

// Rows of logits and all that is known of them.
struct Job {
  void* logits;
  const int64_t* labels;
  int64_t first;
  int stride, width;
  const float *largest, *log_sum, *factors;
  float* statistics;
};

constexpr int kStatistics = 3;
constexpr int kWarp = 32;
constexpr int kLoads = 4;    // vectors that a thread asks for before it uses the first
constexpr int kCluster = 4;  // blocks
constexpr int kFewestThreads = 4 * kWarp;

// A block that makes both passes alone has a multiprocessor to itself: 1024 threads of more than 32
// registers.
constexpr int most_threads(Kind kind, int blocks) {
  return kind == Kind::kBoth && blocks == 1 ? 1024 : 512;
}

// For which a multiprocessor has registers: as many as it has shared memory for; 0 is any number.
template <typename Element>
constexpr int fewest_blocks(int blocks) {
  return blocks > 1 && sizeof(Element) < sizeof(float) ? 3 : 0;
}

__device__ float value(float element) { return element; }
__device__ float value(__nv_bfloat16 element) { return __bfloat162float(element); }

__device__ void store(float* to, float value) { *to = value; }
__device__ void store(__nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }

// exp(x) for x <= 0, within 1 unit in the last place; 0 for -inf, NaN for NaN. For bf16 the
// hardware's own, whose error of 2^-22 + |x| 2^-24 is far below a rounding to bf16.
template <typename Element>
__device__ float exponential(float x) {
  return sizeof(Element) == sizeof(float) ? expf(x) : power_of_two(x * 1.44269504f);
}

// 16 bytes of a row.
template <typename Element>
struct Vector;

template <>
struct Vector<float> {
  static constexpr int kLanes = 4;
  static __device__ void unpack(uint4 from, float (&to)[kLanes]) {
    to[0] = __uint_as_float(from.x);
    to[1] = __uint_as_float(from.y);
    to[2] = __uint_as_float(from.z);
    to[3] = __uint_as_float(from.w);
  }
  static __device__ uint4 pack(const float (&from)[kLanes]) {
    return {__float_as_uint(from[0]), __float_as_uint(from[1]), __float_as_uint(from[2]),
            __float_as_uint(from[3])};
  }
};

template <>
struct Vector<__nv_bfloat16> {
  static constexpr int kLanes = 8;
  static __device__ void unpack(uint4 from, float (&to)[kLanes]) {
    const uint32_t words[] = {from.x, from.y, from.z, from.w};
    for (int i = 0; i < 4; ++i) {
      to[2 * i] = __uint_as_float(words[i] << 16);
      to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
  static __device__ uint4 pack(const float (&from)[kLanes]) {
    uint32_t words[4];
    for (int i = 0; i < 4; ++i) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(from[2 * i], from[2 * i + 1]);
      words[i] = __bfloat16_as_ushort(pair.x) | uint32_t{__bfloat16_as_ushort(pair.y)} << 16;
    }
    return {words[0], words[1], words[2], words[3]};
  }
};

// Part of a row as aligned vectors, and the elements before and after them, at most one a thread:
// rows of an odd number of columns are as fast as others.
template <typename Element>
struct Span {
  static constexpr int kLanes = Vector<Element>::kLanes;

  Element* begin;
  int count;
  int head;     // elements before the first vector
  int vectors;
  int edges;    // elements in no vector, before and after

  __device__ Span(Element* begin, int count) : begin(begin), count(count) {
    const auto past = static_cast<int>(reinterpret_cast<uintptr_t>(begin) % sizeof(uint4));
    head = past == 0 ? 0 : min(count, static_cast<int>((sizeof(uint4) - past) / sizeof(Element)));
    vectors = (count - head) / kLanes;
    edges = count - vectors * kLanes;
  }

  __device__ uint4* body() const { return reinterpret_cast<uint4*>(begin + head); }

  __device__ Element* edge(int i) const {
    return begin + (i < head ? i : vectors * kLanes + i);
  }

  // The column at which part i of `parts` begins. Inner parts begin at a whole vector.
  __device__ int cut(int i, int parts) const {
    if (i == parts) return count;
    return i == 0 ? 0 : head + min(i * ((vectors + parts - 1) / parts), vectors) * kLanes;
  }

  // The thread that reads and writes this column.
  __device__ int owner(int column) const {
    const int in_body = column - head;
    if (in_body < 0) return column;
    const int vector = in_body / kLanes;
    return vector < vectors ? vector % static_cast<int>(blockDim.x) : column - vectors * kLanes;
  }
};

struct Sums {
  float largest = -FLT_MAX;  // m
  float exponentials = 0;    // sum exp(z - m)
};

// Measure the sum from `largest`, which is at least the largest so far.
template <typename Element>
__device__ void rescale(Sums& sums, float largest) {
  sums.exponentials *= exponential<Element>(sums.largest - largest);
  sums.largest = largest;
}

// Add logits of which none is above the largest.
template <typename Element, int kCount>
__device__ void add(Sums& sums, const float (&logits)[kCount]) {
  float total = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) total += exponential<Element>(logits[i] - sums.largest);
  sums.exponentials += total;
}

// The sums of what this thread reads; its vectors stay in `kept` where there is such.
template <typename Element>
__device__ Sums thread_sums(const Span<Element>& span, uint4* kept) {
  constexpr int kLanes = Span<Element>::kLanes;
  const int thread = threadIdx.x, threads = blockDim.x;
  const uint4* const body = span.body();
  Sums sums;
  for (int start = thread; start < span.vectors; start += kLoads * threads) {
    uint4 raw[kLoads] = {};
    float z[kLanes];
#pragma unroll
    for (int k = 0; k < kLoads; ++k)
      if (start + k * threads < span.vectors) raw[k] = body[start + k * threads];
    float largest = sums.largest;
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      if (start + k * threads >= span.vectors) break;
      if (kept) kept[start + k * threads] = raw[k];
      Vector<Element>::unpack(raw[k], z);
#pragma unroll
      for (int i = 0; i < kLanes; ++i) largest = fmaxf(largest, z[i]);  // fmaxf leaves NaN out
    }
    rescale<Element>(sums, largest);
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      if (start + k * threads >= span.vectors) break;
      Vector<Element>::unpack(raw[k], z);
      add<Element>(sums, z);
    }
  }
  if (thread < span.edges) {
    const float z[] = {value(*span.edge(thread))};
    rescale<Element>(sums, fmaxf(sums.largest, z[0]));
    add<Element>(sums, z);
  }
  return sums;
}

// `combine` over all threads of the block, in an order that is always the same; every thread gets
// the result. `of_warps` is shared memory that nothing else uses.
template <typename Combine>
__device__ float reduce(float value, float neutral, Combine combine, float (&of_warps)[kWarp]) {
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value = combine(value, __shfl_xor_sync(~0u, value, distance));
  if (lane == 0) of_warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = lane < warps ? of_warps[lane] : neutral;
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value = combine(value, __shfl_xor_sync(~0u, value, distance));
  return value;
}

// The sums of a row from those of its parts, one in each block of the cluster.
template <typename Element>
__device__ Sums exchange(const Sums& own) {
  auto& of_blocks = shared<float2[kCluster]>();
  const int thread = threadIdx.x;
  wait_for_cluster();  // since its begin: the others are there
  if (thread < kCluster)
    *in_block(&of_blocks[rank_in_cluster()], thread) = {own.largest, own.exponentials};
  arrive_at_cluster();
  wait_for_cluster();
  Sums sums;
  for (const float2& part : of_blocks) sums.largest = fmaxf(sums.largest, part.x);
  for (const float2& part : of_blocks)
    sums.exponentials += part.y * exponential<Element>(part.x - sums.largest);
  return sums;
}

// Those of what the block reads.
template <typename Element>
__device__ Sums block_sums(const Span<Element>& span, uint4* kept) {
  auto& of_warps = shared<float[2][kWarp]>();
  const auto larger = [](float a, float b) { return fmaxf(a, b); };
  const auto plus = [](float a, float b) { return a + b; };
  Sums sums = thread_sums(span, kept);
  rescale<Element>(sums, reduce(sums.largest, -FLT_MAX, larger, of_warps[0]));
  sums.exponentials = reduce(sums.exponentials, 0, plus, of_warps[1]);
  return sums;
}

template <typename Element>
__device__ void zero(const Span<Element>& span) {
  const int thread = threadIdx.x, threads = blockDim.x;
  for (int j = thread; j < span.vectors; j += threads) __stcs(span.body() + j, uint4{});
  if (thread < span.edges) store(span.edge(thread), 0);
}

// factor exp(d) in place of z, with d = z - largest - log_sum, from the end to the begin; the
// vectors of z are those at `kept`.
template <typename Element>
__device__ void write_gradient(const Span<Element>& span, const uint4* kept, float largest,
                               float log_sum, float factor) {
  constexpr int kLanes = Span<Element>::kLanes;
  const int thread = threadIdx.x, threads = blockDim.x;
  uint4* const body = span.body();
  const auto gradient = [=](float z) {
    return factor * exponential<Element>(z - largest - log_sum);
  };
  if (thread < span.edges) {
    Element* const edge = span.edge(thread);
    store(edge, gradient(value(*edge)));
  }
  const int step = kLoads * threads;
  for (int start = (span.vectors - 1) / step * step + thread; start >= 0; start -= step) {
    uint4 raw[kLoads] = {};
#pragma unroll
    for (int k = kLoads - 1; k >= 0; --k)
      if (start + k * threads < span.vectors) raw[k] = kept[start + k * threads];
#pragma unroll
    for (int k = kLoads - 1; k >= 0; --k) {
      if (start + k * threads >= span.vectors) continue;
      float z[kLanes];
      Vector<Element>::unpack(raw[k], z);
#pragma unroll
      for (int i = 0; i < kLanes; ++i) z[i] = gradient(z[i]);
      // Streaming: what is written leaves the L2 cache before what is still to be read.
      __stcs(body + start + k * threads, Vector<Element>::pack(z));
    }
  }
}

template <typename Element, Kind kKind, int kBlocks>
__global__ void __launch_bounds__(most_threads(kKind, kBlocks), fewest_blocks<Element>(kBlocks))
    pass(const __grid_constant__ Job job) {
  constexpr bool kAlone = kBlocks == 1;
  if constexpr (!kAlone) arrive_at_cluster();
  const int64_t r = blockIdx.x / kBlocks;
  const int part = kAlone ? 0 : rank_in_cluster();
  Element* const row = static_cast<Element*>(job.logits) + r * job.stride;
  const Span<Element> whole(row, job.width);
  const int begin = whole.cut(part, kBlocks), end = whole.cut(part + 1, kBlocks);
  const Span<Element> span(row + begin, end - begin);
  const int64_t label = job.labels[r];
  const float factor = kKind == Kind::kStatistics ? 0 : job.factors[r];
  const bool in_row = job.first <= label && label - job.first < job.width;
  const int column = in_row ? static_cast<int>(label - job.first) : 0;
  // One thread alone reads, overwrites and then mends the label's element: no barrier is needed.
  const bool in_part = kAlone || (begin <= column && column < end);
  const int of_column = in_row ? span.owner(column - begin) : 0;
  const bool owner = in_part && static_cast<int>(threadIdx.x) == of_column;
  const float of_label = owner && in_row ? value(row[column]) : 0;

  uint4* const kept = kAlone ? nullptr : shared_of_launch();
  float largest, log_sum;
  if constexpr (kKind == Kind::kGradient) {
    largest = job.largest[r];
    log_sum = job.log_sum[r];
  } else {
    Sums sums = block_sums(span, kept);
    if constexpr (!kAlone) sums = exchange<Element>(sums);
    if (owner) {
      float* const statistics = job.statistics + r * kStatistics;
      statistics[0] = sums.largest;
      statistics[1] = sums.exponentials;
      statistics[2] = of_label;
    }
    largest = sums.largest;
    log_sum = logf(sums.exponentials);
  }

  if constexpr (kKind != Kind::kStatistics) {
    if (factor == 0) {  // whatever the logits hold
      zero(span);
    } else {
      write_gradient(span, kAlone ? span.body() : kept, largest, log_sum, factor);
      // exp(d) - 1 before any rounding: most labels of a trained model have p near 1
      if (owner && in_row) store(row + column, factor * expm1f(of_label - largest - log_sum));
    }
    if (part == kBlocks - 1) zero(Span<Element>(row + job.width, job.stride - job.width));
  }
}

template <typename Element, Kind kKind, int kBlocks>
void launch(const Job& job, int64_t rows, size_t shared_bytes, cudaStream_t stream) {
  // A row that fits is read at once; a longer one by as many threads as may be.
  const int vectors = job.stride / Vector<Element>::kLanes / kBlocks;
  const int threads = std::clamp(static_cast<int>(std::bit_ceil(vectors / kLoads + 1u)),
                                 kFewestThreads, most_threads(kKind, kBlocks));
  const auto kernel = &pass<Element, kKind, kBlocks>;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kBlocks, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(rows * kBlocks);
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  if constexpr (kBlocks > 1) {
    config.attrs = &cluster;
    config.numAttrs = 1;
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared_bytes)));
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                        cudaSharedmemCarveoutMaxShared));
  }
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, job));
}

int ask(cudaDeviceAttr attribute, int32_t device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

// Shared memory in which each block of a cluster keeps its part of a row; 0 where one block is
// better, or has to do.
template <typename Element>
size_t cluster_bytes(const Job& job, int32_t device) {
  const int vectors = job.width / Vector<Element>::kLanes;
  if (vectors < kCluster * kFewestThreads * kLoads) return 0;  // such a row stays in the L1 cache
  if (ask(cudaDevAttrComputeCapabilityMajor, device) < 9) return 0;
  const size_t bytes = (vectors / kCluster + 1) * sizeof(uint4);
  const size_t beside = 1024;  // of the kernel itself, at most
  const int room = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes + beside <= static_cast<size_t>(room) ? bytes : 0;
}

template <typename Element, Kind kKind>
void launch_best(const Job& job, int64_t rows, int32_t device, cudaStream_t stream) {
  if constexpr (kKind == Kind::kBoth) {
    if (const size_t bytes = cluster_bytes<Element>(job, device)) {
      launch<Element, kKind, kCluster>(job, rows, bytes, stream);
      return;
    }
  }
  launch<Element, kKind, 1>(job, rows, 0, stream);
}

template <Kind kKind>
void run(const Tensor& logits, const Job& job) {
  if (logits.size(0) == 0) return;
  const int32_t device = logits.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const auto launch_typed = logits.scalar_type() == ScalarType::Float
                                ? &launch_best<float, kKind>
                                : &launch_best<__nv_bfloat16, kKind>;
  launch_typed(job, logits.size(0), device, static_cast<cudaStream_t>(stream));
}

void check_rows(const Tensor& values, const char* name, ScalarType type, const Tensor& logits) {
  STD_TORCH_CHECK(values.scalar_type() == type && values.dim() == 1 && values.is_contiguous(),
                  "cross_entropy: ", name, " is ", toString(values.scalar_type()), " of ",
                  values.dim(), " dimensions, expected contiguous ", toString(type), " [C]");
  STD_TORCH_CHECK(values.size(0) == logits.size(0), "cross_entropy: ", name, " has ",
                  values.size(0), " elements, expected one for each of the ", logits.size(0),
                  " rows of logits");
  STD_TORCH_CHECK(values.device() == logits.device(), "cross_entropy: ", name,
                  " is on another device than logits (", logits.get_device_index(), ")");
}

const float* check_values(const Tensor& values, const char* name, const Tensor& logits) {
  check_rows(values, name, ScalarType::Float, logits);
  return static_cast<const float*>(values.const_data_ptr());
}

Job job_of(const Tensor& logits, const Tensor& labels, int64_t first, int64_t width) {
  const ScalarType type = logits.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16,
                  "cross_entropy: logits are ", toString(type), ", expected Float or BFloat16");
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous(), "cross_entropy: logits have ",
                  logits.dim(), " dimensions, expected contiguous [C, V]");
  STD_TORCH_CHECK(logits.size(0) <= INT_MAX / kCluster && logits.size(1) <= INT_MAX / 2,
                  "cross_entropy: logits are [", logits.size(0), ", ", logits.size(1),
                  "], expected at most ", INT_MAX / kCluster, " rows and ", INT_MAX / 2, " columns");
  STD_TORCH_CHECK(0 <= width && width <= logits.size(1), "cross_entropy: width is ", width,
                  ", expected 0 to ", logits.size(1));
  STD_TORCH_CHECK(first >= 0, "cross_entropy: first is ", first, ", expected at least 0");
  check_rows(labels, "labels", ScalarType::Long, logits);
  Job job{};
  job.logits = logits.data_ptr();
  job.labels = static_cast<const int64_t*>(labels.const_data_ptr());
  job.first = first;
  job.stride = static_cast<int>(logits.size(1));
  job.width = static_cast<int>(width);
  return job;
}

Tensor cross_entropy_statistics(Tensor logits, Tensor labels, int64_t first, int64_t width) {
  Job job = job_of(logits, labels, first, width);
  Tensor statistics =
      torch::stable::new_empty(logits, {logits.size(0), kStatistics}, ScalarType::Float);
  job.statistics = static_cast<float*>(statistics.mutable_data_ptr());
  run<Kind::kStatistics>(logits, job);
  return statistics;
}

void cross_entropy_gradient_(Tensor logits, Tensor labels, Tensor largest, Tensor log_sum,
                             Tensor factors, int64_t first, int64_t width) {
  Job job = job_of(logits, labels, first, width);
  job.largest = check_values(largest, "largest", logits);
  job.log_sum = check_values(log_sum, "log_sum", logits);
  job.factors = check_values(factors, "factors", logits);
  run<Kind::kGradient>(logits, job);
}

Tensor cross_entropy_(Tensor logits, Tensor labels, Tensor factors, int64_t width) {
  Job job = job_of(logits, labels, 0, width);
  job.factors = check_values(factors, "factors", logits);
  Tensor statistics =
      torch::stable::new_empty(logits, {logits.size(0), kStatistics}, ScalarType::Float);
  job.statistics = static_cast<float*>(statistics.mutable_data_ptr());
  run<Kind::kBoth>(logits, job);
  return statistics;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mcore_sft, CUDA, ops) {
  ops.impl("cross_entropy_statistics", TORCH_BOX(&cross_entropy_statistics));
  ops.impl("cross_entropy_gradient_", TORCH_BOX(&cross_entropy_gradient_));
  ops.impl("cross_entropy_", TORCH_BOX(&cross_entropy_));
}
