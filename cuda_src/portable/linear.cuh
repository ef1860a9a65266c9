// Products of a few rows with a weight in few bits: dspass::few_rows_linear of runtime/few_bits.py.
//
// Each code is read once and becomes a value in registers: int4 is a quarter of bf16's bytes, int8 half. A thread block
// takes four rows of the weight, each an output, and all rows of x. Its threads go along the weight's rows side by
// side, sixteen codes a thread and row: 16 bytes of 8-bit formats, 8 of int4, 8 and 4 of fp6. The next ones are on
// their way while these are multiplied, 1 or 2 KiB a warp. What is read of x, from the caches of the GPU, serves four
// outputs. At the end sums go from thread to thread, without atomic operations: in one order, whatever comes first.
//
// A weight is what the reference multiplies with: the value of its code times its scale, rounded to fp32, and then to
// x's dtype. Products are added up in fp32, by fused operations on purpose. What differs from the reference is the
// order of the sums alone: columns * 2**-23 * sum |x * w| at most, before the sum is rounded to x's dtype.
//
// By arithmetic alone (nothing here has run on a GPU) it is bound by memory for one row or two. Instructions a weight
// in the inner loop, as nvcc 13.0 compiles it for sm_90a and bf16, where a row's last piece is whole and the pieces of a
// block are a power of two:
//
//   rows of x   1     2     4     8     16    an H100 has, while it reads a weight
//   int8        6.6   8.6   12    19    32    10
//   fp8         8.1   10    14    20    33    10
//   fp6         11    13    16    23    36    7.5
//   int4        6.9   8.7   12    19    32    5
//
// The last column is of its data sheet, 3.35 TB/s and 33.5 * 10**12 fp32 instructions a second. So int8 and fp8 are bound
// by memory up to two rows; fp6 and int4 by instructions from the first row on, which take 1.5 and 1.4 times as long as
// reading. A weight in bf16 takes the time of 20 to read, and one that is written out first of 45 to 50: the kernel is
// ahead of the first up to about 8 rows, of the second at all 16. More rows, and int4 at its full rate, want tensor cores.
//
// Dropped: x in shared memory. A value of it is needed by one thread of a block, and staging would cost a barrier.
// Dropped: a warp an output, without shared memory at all: where there are few outputs too few bytes are on their way.
// Dropped: codes sixteen bytes at a time in int4 too; rows are multiples of 8, and a piece would have two scales.
#pragma once

#include "formats.cuh"

namespace dsp {
namespace linear {

constexpr int kThreads = 128;
constexpr int kMostRows = 16;
constexpr int64_t kMostColumns = 1 << 30;  // positions inside of a row are 32 bit

constexpr int kOutputs = 4;  // of a thread block; more would reuse x more often, and need more registers

// Thread blocks that a multiprocessor is to hold at a time: the more, the fewer registers a thread has. As many as leave
// it what it needs; a test fails where one spills. hipcc keeps more in registers, and spills at any of these.
#if DSP_HIP
template <int kRows, class T>
constexpr int kBlocks = 1;
#else
template <int kRows, class T>
constexpr int kBlocks = kRows > 4 ? 2 : (kRows <= 2 ? 5 : 4) - (sizeof(T) == 4 ? 1 : 0);
#endif

struct Shape {
  int64_t outputs;
  int64_t row_bytes;  // of codes
  int rows;           // of x
  int columns;
  int pieces;  // of a row, the last of which may end behind `columns`
  int block;   // columns that share a scale
  int blocks;  // of a row
  int shift;   // the pieces of a block are 2**shift; below 0 where they are no power of two
};

__device__ __forceinline__ int block_of(const Shape& shape, int piece) {
  if (shape.shift >= 0) return piece >> shape.shift;
  return static_cast<int>(static_cast<uint32_t>(piece) / static_cast<uint32_t>(shape.block / kPiece));
}

// A piece of each output, and its scale.
template <class Format>
struct Codes {
  Piece<Format> pieces[kOutputs];
  float scales[kOutputs];

  // Of `count` outputs, whose codes and scales begin at these addresses; beyond them the last one is read again.
  __device__ __forceinline__ void load(const uint8_t* __restrict__ codes, const float* __restrict__ all_scales,
                                       const Shape& shape, int count, int piece) {
    const int block = block_of(shape, piece);
    const PiecePlace place = place_of_piece<Format>(shape.block, block, piece);
    all_scales += block;
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
      pieces[i] = load_piece<Format>(codes, place);
      scales[i] = *all_scales;
      if (i + 1 < count) {
        codes += shape.row_bytes;
        all_scales += shape.blocks;
      }
    }
  }
};

// Half of a piece of each output times that of each row of x. `there` columns are left; beyond them a code may be
// anything, and a scale times zero no number.
template <class Format, class T, int kRows>
__device__ __forceinline__ void add_half(const Codes<Format>& codes, int half, const T* __restrict__ x,
                                         const Shape& shape, int there, float (&sums)[kRows * kOutputs]) {
  float weights[kOutputs][kUnit];
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) {
    decode_half<Format>(codes.pieces[i], half, weights[i]);
#pragma unroll
    for (int k = 0; k < kUnit; ++k) weights[i][k] = rounded_to<T>(multiply(weights[i][k], codes.scales[i]));
  }
  if (there < kUnit) {
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
#pragma unroll
      for (int k = 0; k < kUnit; ++k) weights[i][k] = k < there ? weights[i][k] : 0.f;
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    float values[kUnit];
    load_whole(x, values);
    if (row + 1 < shape.rows) x += shape.pieces * kPiece;  // the last row is read again where there are no more
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
      float& sum = sums[row * kOutputs + i];
#pragma unroll
      for (int k = 0; k < kUnit; ++k) sum = multiply_add(values[k], weights[i][k], sum);
    }
  }
}

// Each of kCount values, a power of two, summed over the warp. A lane then has in sums[0] the one whose number is
// answered, and, where there are more values than lanes, those behind it in sums[1] and so on.
//
// In each step a thread gives half of its values away, and adds those it receives to the other half: kCount exchanges
// in all, instead of kCount in each step.
template <int kHalf, int kCount>
__device__ __forceinline__ int sum_over_warp(float (&sums)[kCount], int lane) {
  constexpr int kMask = kCount / 2 / (kHalf > 0 ? kHalf : 1);
  if constexpr (kHalf == 0 || kMask >= DSP_WARP) {
#pragma unroll
    for (int mask = kCount; mask < DSP_WARP; mask *= 2) sums[0] = add(sums[0], shuffle_xor(sums[0], mask));
    return 0;
  } else {
    const bool is_upper = (lane & kMask) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      // Values, not places to choose between: a place that is computed puts the whole array into memory.
      const float low = sums[i], high = sums[i + kHalf];
      const float given = is_upper ? low : high;
      const float kept = is_upper ? high : low;
      sums[i] = add(kept, shuffle_xor(given, kMask));
    }
    return (is_upper ? kHalf : 0) + sum_over_warp<kHalf / 2>(sums, lane);
  }
}

template <class Format, class T, int kRows>
__global__ void __launch_bounds__(kThreads, (kBlocks<kRows, T>))
    linear_kernel(const T* __restrict__ x, const uint8_t* __restrict__ codes, const float* __restrict__ scales,
                  const T* __restrict__ bias, T* __restrict__ out, DSP_BY_VALUE(Shape) shape) {
  constexpr int kSums = kRows * kOutputs;
  constexpr int kLeft = kSums > DSP_WARP ? kSums / DSP_WARP : 1;  // sums of a lane at the end
  __shared__ float partial[kThreads / DSP_SMALLEST_WARP][kSums];
  const int thread = threadIdx.x, threads = blockDim.x;
  const int lane = thread % DSP_WARP, warp = thread / DSP_WARP;
  for (int64_t tile = blockIdx.x; tile * kOutputs < shape.outputs; tile += gridDim.x) {
    const int64_t first = tile * kOutputs;
    float sums[kSums];
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = 0.f;
    const int64_t rest = shape.outputs - first;
    const int count = rest < kOutputs ? static_cast<int>(rest) : kOutputs;
    const uint8_t* own_codes = codes + first * shape.row_bytes;
    const float* own_scales = scales + first * shape.blocks;
    Codes<Format> next;
    if (thread < shape.pieces) next.load(own_codes, own_scales, shape, count, thread);
    for (int piece = thread; piece < shape.pieces; piece += threads) {
      const Codes<Format> own = next;
      if (piece + threads < shape.pieces) next.load(own_codes, own_scales, shape, count, piece + threads);
      const T* from = x + static_cast<int64_t>(piece) * kPiece;
      const int there = shape.columns - piece * kPiece;
#pragma unroll kRows <= 4 ? 2 : 1
      for (int half = 0; half < 2; ++half)
        add_half<Format, T, kRows>(own, half, from + half * kUnit, shape, there - half * kUnit, sums);
    }
    const int number = sum_over_warp<kSums / 2>(sums, lane);
    if (lane < kSums) {
#pragma unroll
      for (int i = 0; i < kLeft; ++i) partial[warp][number + i] = sums[i];
    }
    __syncthreads();
    if (thread < kSums) {
      const int row = thread / kOutputs;
      const int64_t output = first + thread % kOutputs;
      float sum = partial[0][thread];
      for (int i = 1; i < threads / DSP_WARP; ++i) sum = add(sum, partial[i][thread]);
      if (row < shape.rows && thread % kOutputs < count) {
        if (bias) sum = add(sum, to_float(bias[output]));
        out[row * shape.outputs + output] = from_float<T>(sum);
      }
    }
    __syncthreads();  // the next outputs have other sums
  }
}

// -- launches -------------------------------------------------------------------------------------------------------

inline int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool is_aligned(const void* address, int bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

template <class Format, class T, int kRows>
int launch(const void* x, const void* codes, const void* scales, const void* bias, void* out, const Shape& shape,
           void* stream) {
  const int threads = shape.pieces <= kThreads / 2 ? kThreads / 2 : kThreads;
  auto kernel = linear_kernel<Format, T, kRows>;
  return DSP_LAUNCH(kernel, grid_of(ceiling(shape.outputs, kOutputs)), threads, 0, stream,
                    static_cast<const T*>(x), static_cast<const uint8_t*>(codes), static_cast<const float*>(scales),
                    static_cast<const T*>(bias), static_cast<T*>(out), shape);
}

inline int multiply_rows(const void* x, const void* codes, const void* scales, const void* bias, void* out, int64_t rows,
                         int64_t outputs, int64_t columns, int64_t block, int dtype, int format, void* stream) {
  if (rows < 1 || rows > kMostRows || outputs < 0 || columns < 1 || columns > kMostColumns) return kInvalidValue;
  if (block < kPiece || block % kPiece || block > kMostColumns) return kInvalidValue;
  if (!is_aligned(x, 16) || !is_aligned(codes, 16)) return kInvalidValue;
  return with_format(format, [&](auto format_tag) {
    return with_dtype(dtype, [&](auto value) {
      using Format = decltype(format_tag);
      using T = decltype(value);
      if (outputs == 0) return 0;
      const int64_t blocks = ceiling(columns, block), grains = block / kPiece;
      int shift = 0;
      while (int64_t{1} << shift < grains) ++shift;
      if (int64_t{1} << shift != grains) shift = -1;
      const Shape shape{outputs,
                        blocks * bytes_of_block<Format>(block),
                        static_cast<int>(rows),
                        static_cast<int>(columns),
                        static_cast<int>(ceiling(columns, kPiece)),
                        static_cast<int>(block),
                        static_cast<int>(blocks),
                        shift};
      if (rows == 1) return launch<Format, T, 1>(x, codes, scales, bias, out, shape, stream);
      if (rows == 2) return launch<Format, T, 2>(x, codes, scales, bias, out, shape, stream);
      if (rows <= 4) return launch<Format, T, 4>(x, codes, scales, bias, out, shape, stream);
      if (rows <= 8) return launch<Format, T, 8>(x, codes, scales, bias, out, shape, stream);
      return launch<Format, T, 16>(x, codes, scales, bias, out, shape, stream);
    });
  });
}

}  // namespace linear
}  // namespace dsp

// -- the C ABI ------------------------------------------------------------------------------------------------------
//
// Formats and dtypes are numbered as in formats.cuh. All tensors are contiguous and on one device. Answers the driver's
// error code, 0 for none, and 1 for what cannot be launched: other than 1 to 16 rows, and x or codes at addresses that
// 16 does not divide.

// x [rows, columns, filled up to a multiple of 16 with zeros] times the transposed weight [outputs, columns] of codes and
// scales [outputs, ceil(columns / block)], plus bias [outputs], or null: out [rows, outputs].
DSP_EXPORT int dsp_quantised_linear(const void* x, const void* codes, const void* scales, const void* bias, void* out,
                                    int64_t rows, int64_t outputs, int64_t columns, int64_t block, int dtype, int format,
                                    void* stream) {
  return dsp::linear::multiply_rows(x, codes, scales, bias, out, rows, outputs, columns, block, dtype, format, stream);
}
