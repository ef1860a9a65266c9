// What CUTLASS multiplies, from the ends of experts' rows: sizes, pointers and strides of all groups, made on the device.
//
// Nothing waits for the device: how many rows an expert has is read where it is. What no group writes is filled with
// zeros by the same launch: rows behind the last expert's, and matrices of experts without rows. Ends that decrease or
// exceed the rows make groups without work, never an access out of bounds.
//
// Dropped: groups with a k of 0, whose sums would be zeros by themselves. CUTLASS's pipeline for sm_80 has read of their
// operands before it knows that there is nothing to sum up, and a TMA descriptor of no extent cannot be.
#pragma once

#include "../common/gpu.h"
#include "grouped.h"

namespace dsp {
namespace grouped {

constexpr int kThreads = 128;
constexpr int64_t kMostBlocks = 1024;    // several for each multiprocessor; mostly there is nothing to fill
constexpr int64_t kPart = kThreads * 4;  // units of 16 bytes that a thread block fills of one expert's matrix

// A product of x[rows, inner] and weight[experts, inner, columns], or an outer one of x and grad[rows, columns].
struct Operands {
  const char* left;   // x
  const char* right;  // weight or grad, of 16 bits a value as all are
  char* out;          // [rows, columns], or [experts, inner, columns]; without gaps
  int64_t left_stride;
  int64_t right_stride;
  int64_t matrix_stride;  // between experts' weights
  int64_t rows;
  int64_t inner;
  int64_t columns;
  const int32_t* ends;
};

struct Span {
  int64_t begin;
  int64_t end;
};

struct alignas(16) Zeros {
  uint64_t low;
  uint64_t high;
};

__device__ __forceinline__ int64_t row_of(const Operands& operands, int64_t end) {
  return end < 0 ? 0 : end < operands.rows ? end : operands.rows;
}

__device__ __forceinline__ Span span_of(const Operands& operands, int64_t expert) {
  const int64_t begin = expert == 0 ? 0 : row_of(operands, operands.ends[expert - 1]);
  const int64_t end = row_of(operands, operands.ends[expert]);
  return {begin, end < begin ? begin : end};
}

template <bool kIsOuter>
__device__ __forceinline__ void describe(const Operands& operands, const Groups& groups, int64_t expert) {
  const Span span = span_of(operands, expert);
  const int64_t count = span.end - span.begin;
  constexpr int64_t kBytes = 2;
  groups.sizes[expert][0] = static_cast<int32_t>(count == 0 ? 0 : kIsOuter ? operands.inner : count);
  groups.sizes[expert][1] = static_cast<int32_t>(operands.columns);
  groups.sizes[expert][2] = static_cast<int32_t>(kIsOuter ? count : operands.inner);
  const int64_t right = kIsOuter ? span.begin * operands.right_stride : expert * operands.matrix_stride;
  const int64_t out = kIsOuter ? expert * operands.inner * operands.columns : span.begin * operands.columns;
  groups.left[expert] = operands.left + span.begin * operands.left_stride * kBytes;
  groups.right[expert] = operands.right + right * kBytes;
  groups.out[expert] = operands.out + out * kBytes;
  groups.left_stride[expert] = operands.left_stride;
  groups.right_stride[expert] = operands.right_stride;
  groups.out_stride[expert] = operands.columns;
}

template <bool kIsOuter>
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(DSP_BY_VALUE(Operands) operands, DSP_BY_VALUE(Groups) groups) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t expert = thread; expert < groups.count; expert += threads) describe<kIsOuter>(operands, groups, expert);
  Zeros* const out = reinterpret_cast<Zeros*>(operands.out);
  if constexpr (kIsOuter) {
    const int64_t units = operands.inner * operands.columns / kAlignment;
    const int64_t parts = (units + kPart - 1) / kPart;
    for (int64_t number = blockIdx.x; number < groups.count * parts; number += gridDim.x) {
      const int64_t expert = number / parts;
      const Span span = span_of(operands, expert);
      if (span.begin < span.end) continue;
      const int64_t first = (number - expert * parts) * kPart;
      const int64_t behind = first + kPart < units ? first + kPart : units;
      for (int64_t unit = first + threadIdx.x; unit < behind; unit += kThreads) out[expert * units + unit] = {0, 0};
    }
  } else {
    const int64_t units = operands.columns / kAlignment;
    const int64_t first = row_of(operands, operands.ends[groups.count - 1]) * units;
    for (int64_t unit = first + thread; unit < operands.rows * units; unit += threads) out[unit] = {0, 0};
  }
}

inline int prepare(bool is_outer, const Operands& operands, const Groups& groups, void* stream) {
  const int64_t values = is_outer ? groups.count * operands.inner : operands.rows;
  int64_t blocks = (values * operands.columns / kAlignment + kPart - 1) / kPart;
  const int64_t describing = (groups.count + kThreads - 1) / kThreads;
  if (blocks < describing) blocks = describing;
  if (blocks > kMostBlocks) blocks = kMostBlocks;
  auto kernel = is_outer ? prepare_kernel<true> : prepare_kernel<false>;
  return DSP_LAUNCH(kernel, grid_of(blocks), kThreads, 0, stream, operands, groups);
}

}  // namespace grouped
}  // namespace dsp
