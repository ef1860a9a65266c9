// Buckets without quantisation: many tensors into one buffer for a collective, and back, in one pass over memory.
//
// What moves are bytes, so that one kernel serves every dtype. A row of the buffer is a chunk, and holds of each tensor
// `bytes[i]` bytes one after another; beyond a tensor's end the buffer is filled with zeros, and nothing is taken back.
//
// Dropped: cudaMemcpyBatchAsync and a copy a tensor, whose cost a call is that of some hundred kilobytes. Dropped: a
// table of tensors in device memory; quantise.cuh says why.
#pragma once

#include "tiles.cuh"

namespace dsp {
namespace copying {

constexpr int kThreads = 256;
constexpr int kMostParts = 64;
constexpr int kVectors = 4;                                // of 16 bytes a thread has on their way at once
constexpr int64_t kTileBytes = 16 * kVectors * kThreads;  // that a thread block moves between two searches

struct Part {
  uint8_t* data;
  int64_t whole;   // bytes in all
  int64_t bytes;   // a chunk
  int64_t offset;  // in a row of the buffer
  int64_t first_tile;
  int64_t tiles;  // a chunk
};

struct Work {
  Part parts[kMostParts];
  uint8_t* buffer;
  int64_t row_bytes;
  int64_t tiles;
  int count;
};
static_assert(sizeof(Work) <= 3900, "a launch's arguments are 4 KiB at most");

// Moves `count` bytes with all threads, or writes zeros where there is no source.
__device__ __forceinline__ void move(uint8_t* to, const uint8_t* from, int64_t count) {
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
  const int64_t vectors = (addresses & 15) == 0 ? count / 16 : 0;
  for (int64_t first = threadIdx.x; first < vectors; first += kVectors * kThreads) {
    uint4 held[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      held[i] = uint4{0, 0, 0, 0};
      if (from && first + i * kThreads < vectors) held[i] = reinterpret_cast<const uint4*>(from)[first + i * kThreads];
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      if (first + i * kThreads < vectors) reinterpret_cast<uint4*>(to)[first + i * kThreads] = held[i];
  }
  for (int64_t i = vectors * 16 + threadIdx.x; i < count; i += kThreads) to[i] = from ? from[i] : 0;
}

template <bool kIsIn>
__global__ void __launch_bounds__(kThreads) copy_kernel(DSP_BY_VALUE(Work) work) {
  for (int64_t number = blockIdx.x; number < work.tiles; number += gridDim.x) {
    const Part& part = work.parts[part_of(work, number)];
    const int64_t local = number - part.first_tile;
    const int64_t chunk = local / part.tiles;
    const int64_t first = (local - chunk * part.tiles) * kTileBytes;
    const int64_t rest = part.bytes - first;
    const int64_t count = rest < kTileBytes ? rest : kTileBytes;
    const int64_t begin = chunk * part.bytes + first;  // in the tensor
    int64_t there = part.whole - begin;
    there = there < 0 ? 0 : (there < count ? there : count);
    uint8_t* in_buffer = work.buffer + chunk * work.row_bytes + part.offset + first;
    if (kIsIn) {
      move(in_buffer, part.data + begin, there);
      move(in_buffer + there, nullptr, count - there);
    } else {
      move(part.data + begin, in_buffer, there);
    }
  }
}

template <bool kIsIn>
int copy(void* const* data, const int64_t* whole, const int64_t* bytes, int64_t count, int64_t chunks, void* buffer,
         void* stream) {
  Work work;
  work.buffer = static_cast<uint8_t*>(buffer);
  work.row_bytes = 0;
  if (count < 0 || chunks < 0) return kInvalidValue;
  for (int64_t i = 0; i < count; ++i) {
    if (whole[i] < 0 || bytes[i] < 0) return kInvalidValue;
    work.row_bytes += bytes[i];
  }
  int64_t offset = 0;
  work.count = 0;
  work.tiles = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (bytes[i] > 0 && chunks > 0) {
      const int64_t tiles = (bytes[i] + kTileBytes - 1) / kTileBytes;
      work.parts[work.count++] = {static_cast<uint8_t*>(data[i]), whole[i], bytes[i], offset, work.tiles, tiles};
      work.tiles += tiles * chunks;
    }
    offset += bytes[i];
    if (work.count == kMostParts || (i == count - 1 && work.count > 0)) {
      auto kernel = copy_kernel<kIsIn>;
      if (const int error = DSP_LAUNCH(kernel, grid_of(work.tiles), kThreads, 0, stream, work)) return error;
      work.count = 0;
      work.tiles = 0;
    }
  }
  return 0;
}

}  // namespace copying
}  // namespace dsp

// Of tensor i, `whole[i]` bytes in all, `bytes[i]` of each of `chunks` chunks into, or from, row c of the buffer.
DSP_EXPORT int dsp_copy_in(const void* const* data, const int64_t* whole, const int64_t* bytes, int64_t count,
                           int64_t chunks, void* buffer, void* stream) {
  return dsp::copying::copy<true>(const_cast<void* const*>(data), whole, bytes, count, chunks, buffer, stream);
}

DSP_EXPORT int dsp_copy_out(const void* buffer, void* const* data, const int64_t* whole, const int64_t* bytes,
                            int64_t count, int64_t chunks, void* stream) {
  return dsp::copying::copy<false>(data, whole, bytes, count, chunks, const_cast<void*>(buffer), stream);
}
