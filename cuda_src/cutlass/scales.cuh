// Scales of a weight in few bits as CUTLASS reads them: a group's of all rows one after another.
#pragma once

#include "../common/gpu.h"

namespace dsp {
namespace mixed {

constexpr int kThreads = 128;

// From [columns, groups] to [groups, columns]. They are a 64th of the codes or less: read in strides, written in order.
__global__ void __launch_bounds__(kThreads)
    transpose_kernel(const float* __restrict__ from, float* __restrict__ to, int64_t columns, int64_t groups) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < columns * groups; i += threads) {
    const int64_t group = i / columns;
    to[i] = from[(i - group * columns) * groups + group];
  }
}

inline int transpose(const float* from, float* to, int64_t columns, int64_t groups, void* stream) {
  const int64_t blocks = (columns * groups + kThreads - 1) / kThreads;
  return DSP_LAUNCH(transpose_kernel, grid_of(blocks), kThreads, 0, stream, from, to, columns, groups);
}

}  // namespace mixed
}  // namespace dsp
