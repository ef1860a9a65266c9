// A CPU emulator of the execution model that CUDA and HIP share, for tests: one fiber a GPU thread, a block at a time.
//
// A fiber runs until it waits, at a barrier or for its warp; then another does. In order of their indices, or, where
// DSP_EMU_SHUFFLE is set to a number, in a random order that follows from it, so that a missing barrier gives a wrong
// result. Warps have DSP_EMU_WARP threads, 32 or 64. Under -fsanitize=address each access out of bounds is reported at
// the kernel's line. What would hang or be undefined on a device ends the launch with an error that names the lines:
// threads of a block that wait at different barriers, or at one that others have left behind; a warp operation
// that not all of a warp take part in.
//
// Environment: DSP_EMU_SHUFFLE, a number, for random order; DSP_EMU_GRID, the most blocks of a launch, so that a small
// case takes the path of a grid that has to be cut; DSP_EMU_FIRST, the first block that is run, so that a test sees the
// end of more memory than it could go through.
//
// Dropped: an operating-system thread a GPU thread, a hundred times slower. Dropped: blocks on several cores; tests are
// small, and shared memory can be plain static variables, which the address sanitizer guards.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#ifndef DSP_EMU_WARP
#define DSP_EMU_WARP 32
#endif
static_assert(DSP_EMU_WARP == 32 || DSP_EMU_WARP == 64, "a warp has 32 or 64 threads");

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace dsp_emu {

// A place in a kernel, for messages.
struct Place {
  const char* file;
  int line;
  bool operator==(const Place& other) const { return line == other.line && !strcmp(file, other.file); }
};
#define DSP_EMU_HERE \
  dsp_emu::Place { __FILE__, __LINE__ }

// cudaErrorLaunchFailure.
constexpr int kLaunchFailure = 719;

// Runs body once for each thread of each block; answers 0, or kLaunchFailure and says why on stderr.
int launch(int64_t blocks, int64_t threads, size_t shared_bytes, const std::function<void()>& body);

int64_t largest_grid();
void* dynamic_shared();

dim3 thread_index();
dim3 block_index();
dim3 block_size();
dim3 grid_size();

void barrier(Place here);

// Each thread of the warp hands in a value and takes that of thread `lane`, or, for a ballot, a bit of each.
enum class Exchange : uint8_t { kShuffle, kBallot };
uint64_t exchange(Exchange kind, uint64_t value, int lane, Place here);
int own_lane();

template <class T>
T shuffle(T value, int lane, Place here) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "at most 8 bytes are handed over at once");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = exchange(Exchange::kShuffle, bits, lane, here);
  memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T>
T shuffle_xor(T value, int mask, Place here) {
  return shuffle(value, own_lane() ^ mask, here);
}
inline uint64_t ballot(bool is_set, Place here) { return exchange(Exchange::kBallot, is_set, 0, here); }

}  // namespace dsp_emu

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static

#define threadIdx (dsp_emu::thread_index())
#define blockIdx (dsp_emu::block_index())
#define blockDim (dsp_emu::block_size())
#define gridDim (dsp_emu::grid_size())
#define __syncthreads() dsp_emu::barrier(DSP_EMU_HERE)
