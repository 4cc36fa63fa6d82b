// The passes over rows of logits on the CPU: AVX-512, AVX2 or what the compiler takes for granted,
// chosen when the library is loaded. Rows are computed one by one and whole, so that the result does
// not depend on the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string_view>

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kStatistics = 3;

enum class Kind { kStatistics, kGradient, kBoth };

// Rows of logits and all that is known of them; pointers to float, or to double beside doubles.
struct Job {
  void* logits;
  const int64_t* labels;
  int64_t stride, first, width;
  const void *largest, *log_sum, *factors;
  void* statistics;
};

using Pass = void (*)(const Job& job, int64_t begin, int64_t end);

namespace portable {
#define REGISTER 16
#include "cross_entropy_rows.h"
#undef REGISTER
}

#if defined(__x86_64__)  // one instruction set after another
#define PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define BEGIN_TARGET(features) \
  PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define BEGIN_TARGET(features) PRAGMA(GCC push_options) PRAGMA(GCC target(features))
#define END_TARGET PRAGMA(GCC pop_options)
#endif

BEGIN_TARGET("avx2,fma")
namespace avx2 {
#define REGISTER 32
#include "cross_entropy_rows.h"
#undef REGISTER
}
END_TARGET

BEGIN_TARGET("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")
namespace avx512 {
#define REGISTER 64
#include "cross_entropy_rows.h"
#undef REGISTER
}
END_TARGET
#endif

enum class Isa { kPortable, kAvx2, kAvx512 };

// The best that the processor has; ATEN_CPU_CAPABILITY lowers it as it lowers torch's own.
Isa find_isa() {
#if defined(__x86_64__)
  const char* named = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view allowed = named ? named : "";
  if (allowed == "default") return Isa::kPortable;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (wide && allowed != "avx2") return Isa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kPortable;
}

const Isa isa = find_isa();

Pass find(Kind kind, ScalarType type) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512::find(kind, type);
  if (isa == Isa::kAvx2) return avx2::find(kind, type);
#endif
  return portable::find(kind, type);
}

ScalarType check_logits(const Tensor& logits, const Tensor& labels, int64_t width) {
  const ScalarType type = logits.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 ||
                      type == ScalarType::Double,
                  "cross_entropy: logits must be fp32, bf16 or fp64");
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous(),
                  "cross_entropy: logits must be a contiguous matrix [C, V]");
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long && labels.dim() == 1 &&
                      labels.is_contiguous() && labels.size(0) == logits.size(0),
                  "cross_entropy: labels must be int64 [", logits.size(0), "], contiguous");
  STD_TORCH_CHECK(0 <= width && width <= logits.size(1), "cross_entropy: width is ", width,
                  ", expected 0 to ", logits.size(1));
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

const void* check_values(const Tensor& values, const char* name, ScalarType type, int64_t rows) {
  STD_TORCH_CHECK(values.scalar_type() == type && values.dim() == 1 && values.is_contiguous() &&
                      values.size(0) == rows,
                  "cross_entropy: ", name, " must be ",
                  type == ScalarType::Double ? "fp64" : "fp32", " [", rows, "], contiguous");
  return values.const_data_ptr();
}

void run(Kind kind, const Tensor& logits, const Job& job) {
  const Pass pass = find(kind, logits.scalar_type());
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, job.stride));
  torch::stable::parallel_for(0, logits.size(0), grain, [&](int64_t begin, int64_t end) {
    pass(job, begin, end);
  });
}

Job job_of(const Tensor& logits, const Tensor& labels, int64_t first, int64_t width) {
  Job job{};
  job.logits = logits.data_ptr();
  job.labels = static_cast<const int64_t*>(labels.const_data_ptr());
  job.stride = logits.size(1);
  job.first = first;
  job.width = width;
  return job;
}

Tensor cross_entropy_statistics(Tensor logits, Tensor labels, int64_t first, int64_t width) {
  const ScalarType values = check_logits(logits, labels, width);
  Tensor statistics = torch::stable::empty({logits.size(0), kStatistics}, values);
  Job job = job_of(logits, labels, first, width);
  job.statistics = statistics.data_ptr();
  run(Kind::kStatistics, logits, job);
  return statistics;
}

void cross_entropy_gradient_(Tensor logits, Tensor labels, Tensor largest, Tensor log_sum,
                             Tensor factors, int64_t first, int64_t width) {
  const ScalarType values = check_logits(logits, labels, width);
  Job job = job_of(logits, labels, first, width);
  job.largest = check_values(largest, "largest", values, logits.size(0));
  job.log_sum = check_values(log_sum, "log_sum", values, logits.size(0));
  job.factors = check_values(factors, "factors", values, logits.size(0));
  run(Kind::kGradient, logits, job);
}

Tensor cross_entropy_(Tensor logits, Tensor labels, Tensor factors, int64_t width) {
  const ScalarType values = check_logits(logits, labels, width);
  Tensor statistics = torch::stable::empty({logits.size(0), kStatistics}, values);
  Job job = job_of(logits, labels, 0, width);
  job.factors = check_values(factors, "factors", values, logits.size(0));
  job.statistics = statistics.data_ptr();
  run(Kind::kBoth, logits, job);
  return statistics;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mcore_sft, CPU, ops) {
  ops.impl("cross_entropy_statistics", TORCH_BOX(&cross_entropy_statistics));
  ops.impl("cross_entropy_gradient_", TORCH_BOX(&cross_entropy_gradient_));
  ops.impl("cross_entropy_", TORCH_BOX(&cross_entropy_));
}
