// Kernels that are wrong on purpose, each beside what the emulator has to make of it.
#include "common/emu_impl.h"
#include "common/gpu.h"

namespace {
using namespace dsp;

constexpr int kThreads = 128;

// Each thread takes what the one before it wrote. Without the barrier that is there by luck: where threads run in
// order.
template <bool kHasBarrier>
__global__ void neighbours(int* out) {
  __shared__ int written[kThreads];
  written[threadIdx.x] = -1;
  __syncthreads();
  written[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (kHasBarrier) __syncthreads();
  out[threadIdx.x] = threadIdx.x > 0 ? written[threadIdx.x - 1] : -1;
}

// The first warp writes what the others read, after it has exchanged values more often than they. Without the barrier that
// is there by luck: where no warp gets ahead.
template <bool kHasBarrier>
__global__ void ahead(int* out) {
  __shared__ int shared;
  if (threadIdx.x == 0) shared = 1;
  __syncthreads();
  const int exchanges = threadIdx.x < DSP_WARP ? 3 : 1;
  for (int i = 0; i < exchanges; ++i) shuffle_xor(i, 1);
  out[threadIdx.x] = shared;
  if (kHasBarrier) __syncthreads();
  if (threadIdx.x == 0) shared = 2;
}

__global__ void some_wait(int*) {
  if (threadIdx.x < 7) __syncthreads();  // line: some
}

__global__ void wait_apart(int*) {
  if (threadIdx.x < 64) {
    __syncthreads();  // line: first half
  } else {
    __syncthreads();  // line: second half
  }
}

__global__ void lane_has_left(int* out) {
  if (threadIdx.x % DSP_WARP == 3) return;
  out[threadIdx.x] = shuffle(static_cast<int>(threadIdx.x), 3);
}

__global__ void lanes_apart(int* out) {
  if (threadIdx.x % 2) {
    out[threadIdx.x] = shuffle_xor(1, 2);  // line: odd
  } else {
    out[threadIdx.x] = shuffle_xor(2, 2);  // line: even
  }
}

__global__ void beyond_the_warp(int* out) { out[threadIdx.x] = shuffle(1, DSP_WARP); }

}  // namespace

DSP_EXPORT int run(const char* name, int* out) {
  const auto is = [&](const char* other) { return !strcmp(name, other); };
  if (is("with barrier")) return DSP_LAUNCH(neighbours<true>, 1, kThreads, 0, nullptr, out);
  if (is("without barrier")) return DSP_LAUNCH(neighbours<false>, 1, kThreads, 0, nullptr, out);
  if (is("ahead with barrier")) return DSP_LAUNCH(ahead<true>, 1, kThreads, 0, nullptr, out);
  if (is("ahead without barrier")) return DSP_LAUNCH(ahead<false>, 1, kThreads, 0, nullptr, out);
  if (is("some wait")) return DSP_LAUNCH(some_wait, 1, kThreads, 0, nullptr, out);
  if (is("wait apart")) return DSP_LAUNCH(wait_apart, 1, kThreads, 0, nullptr, out);
  if (is("lane has left")) return DSP_LAUNCH(lane_has_left, 1, kThreads, 0, nullptr, out);
  if (is("lanes apart")) return DSP_LAUNCH(lanes_apart, 1, kThreads, 0, nullptr, out);
  if (is("beyond the warp")) return DSP_LAUNCH(beyond_the_warp, 1, kThreads, 0, nullptr, out);
  return -1;
}
