// The portability layer: a kernel includes this and nothing of a vendor's.
//
// A kernel is written once and compiled three ways: by nvcc, by hipcc, and by a plain C++ compiler for the emulator
// (emu.h), which runs it on the CPU in tests. What differs between the three is in this file: warp operations, fp32
// arithmetic that is rounded once, 16-bit floats, launches.
//
// Dropped: cooperative groups and CUB, which the emulator would have to imitate. Dropped: the vendors' 16-bit types in
// kernels; they differ in name and in which conversions the compiler makes by itself.
#pragma once

#include <stdint.h>

#if defined(__HIPCC__) || defined(__HIP__)
#define DSP_HIP 1
#include <hip/hip_fp16.h>
#include <hip/hip_runtime.h>
typedef hipStream_t dsp_stream;
#if !defined(__HIP_DEVICE_COMPILE__) || defined(__GFX8__) || defined(__GFX9__)
#define DSP_WARP 64
#else
#define DSP_WARP 32
#endif
#elif defined(__CUDACC__)
#define DSP_CUDA 1
#include <cuda_fp16.h>
#include <cuda_runtime.h>
typedef cudaStream_t dsp_stream;
#define DSP_WARP 32
#else
#define DSP_EMU 1
#include "emu.h"
typedef void* dsp_stream;
#define DSP_WARP DSP_EMU_WARP
#endif

// The smallest warp that host code may meet, from which it sizes shared memory: HIP's host pass does not know the
// device.
#if DSP_EMU
#define DSP_SMALLEST_WARP DSP_EMU_WARP
#else
#define DSP_SMALLEST_WARP 32
#endif

// A struct that travels with the launch. CUDA would otherwise copy it to local memory where it is indexed at run time.
#if DSP_CUDA
#define DSP_BY_VALUE(Type) const __grid_constant__ Type
#elif DSP_HIP
#define DSP_BY_VALUE(Type) const Type
#else
#define DSP_BY_VALUE(Type) const Type&
#endif

// Launches and answers the driver's error code, 0 for none.
#if DSP_CUDA
#define DSP_LAUNCH(kernel, blocks, threads, shared_bytes, stream, ...)                                 \
  (kernel<<<(unsigned)(blocks), (unsigned)(threads), (shared_bytes), (dsp_stream)(stream)>>>(__VA_ARGS__), \
   (int)cudaGetLastError())
#define DSP_DYNAMIC_SHARED(Type, name)                           \
  extern __shared__ __align__(16) unsigned char name##_bytes[];  \
  Type* name = reinterpret_cast<Type*>(name##_bytes)
#elif DSP_HIP
#define DSP_LAUNCH(kernel, blocks, threads, shared_bytes, stream, ...)                                 \
  (kernel<<<(unsigned)(blocks), (unsigned)(threads), (shared_bytes), (dsp_stream)(stream)>>>(__VA_ARGS__), \
   (int)hipGetLastError())
#define DSP_DYNAMIC_SHARED(Type, name) HIP_DYNAMIC_SHARED(Type, name)
#else
#define DSP_LAUNCH(kernel, blocks, threads, shared_bytes, stream, ...) \
  ((void)(stream), dsp_emu::launch(blocks, threads, shared_bytes, [&] { kernel(__VA_ARGS__); }))
#define DSP_DYNAMIC_SHARED(Type, name) Type* name = static_cast<Type*>(dsp_emu::dynamic_shared())
#endif

#define DSP_EXPORT extern "C" __attribute__((visibility("default")))

namespace dsp {

// What the drivers of both vendors call an invalid value: the answer to arguments that no kernel can be launched for.
constexpr int kInvalidValue = 1;

// Blocks of one launch. Kernels go on in strides of the grid, so that no count of theirs has to fit 31 bits.
inline int64_t grid_of(int64_t wanted) {
#if DSP_EMU
  const int64_t most = dsp_emu::largest_grid();
#else
  const int64_t most = 0x7fffffff;
#endif
  return wanted < most ? wanted : most;
}

// -- fp32, each operation rounded once ------------------------------------------------------------------------------
//
// Compilers contract a * b + c into one operation unless told otherwise, and each in other places. With these, and with
// -fmad=false or -ffp-contract=off, results are the same to the last bit everywhere.

#if DSP_EMU
inline float multiply(float a, float b) { return a * b; }
inline float divide(float a, float b) { return a / b; }
inline float add(float a, float b) { return a + b; }
inline float square_root(float a) { return sqrtf(a); }
inline int nearest(float a) { return static_cast<int>(lrintf(a)); }
#else
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float divide(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float square_root(float a) { return __fsqrt_rn(a); }
__device__ __forceinline__ int nearest(float a) { return __float2int_rn(a); }  // ties to even
#endif

// a * b + c, rounded once: for sums whose order, and so whose rounding, no reference fixes.
#if DSP_EMU
inline float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
#else
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
#endif

#if DSP_EMU
inline uint32_t bits_of(float a) {
  uint32_t bits;
  memcpy(&bits, &a, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float a;
  memcpy(&a, &bits, sizeof a);
  return a;
}
#else
__device__ __forceinline__ uint32_t bits_of(float a) { return __float_as_uint(a); }
__device__ __forceinline__ float float_of(uint32_t bits) { return __uint_as_float(bits); }
#endif

// Byte kByte of a word, and above it the upper three of `above`, whose lowest is 0.
template <int kByte>
__device__ __forceinline__ uint32_t byte_below(uint32_t word, uint32_t above) {
#if DSP_CUDA
  return __byte_perm(word, above, 0x7650 | kByte);  // one operation, which the compiler does not find
#else
  return (word >> 8 * kByte & 0xff) | above;
#endif
}

constexpr uint32_t kMagnitude = 0x7fffffff;  // all but the sign
constexpr uint32_t kInfinity = 0x7f800000;   // magnitudes above it are NaNs
constexpr uint32_t kNaN = 0x7fc00000;        // the NaN that kernels write: devices differ in which one arithmetic makes

// -- 16-bit floats, by their bits -----------------------------------------------------------------------------------

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float a) { return a; }
__device__ __forceinline__ float to_float(bf16 a) { return float_of(static_cast<uint32_t>(a.bits) << 16); }
__device__ __forceinline__ float to_float(f16 a) {
#if DSP_EMU
  _Float16 half;
  memcpy(&half, &a.bits, sizeof half);
  return static_cast<float>(half);
#else
  __half_raw raw;
  raw.x = a.bits;
  return __half2float(__half(raw));
#endif
}

// To the nearest, ties to even; every NaN becomes the positive quiet one, as torch's conversions on a CPU have it.
template <class T>
__device__ __forceinline__ T from_float(float a);

template <>
__device__ __forceinline__ float from_float<float>(float a) {
  return (bits_of(a) & kMagnitude) > kInfinity ? float_of(kNaN) : a;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float a) {
  const uint32_t bits = bits_of(a);
  if ((bits & kMagnitude) > kInfinity) return bf16{0x7fc0};
  return bf16{static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float a) {
  if ((bits_of(a) & kMagnitude) > kInfinity) return f16{0x7e00};
#if DSP_EMU
  const _Float16 half = static_cast<_Float16>(a);
  f16 result;
  memcpy(&result.bits, &half, sizeof half);
  return result;
#else
  const __half_raw raw = __float2half_rn(a);
  return f16{raw.x};
#endif
}

// Rounded to T, as fp32. A NaN stays one, whichever.
template <class T>
__device__ __forceinline__ float rounded_to(float a) {
  return to_float(from_float<T>(a));
}
template <>
__device__ __forceinline__ float rounded_to<float>(float a) {
  return a;
}
#if DSP_CUDA
template <>
__device__ __forceinline__ float rounded_to<bf16>(float a) {
  uint32_t bits;  // a bf16 with zeros behind it is its fp32: one operation, where from_float takes six
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(a), "f"(0.f));
  return float_of(bits);
}
template <>
__device__ __forceinline__ float rounded_to<f16>(float a) {
  return __half2float(__float2half_rn(a));
}
#endif

// -- warps ----------------------------------------------------------------------------------------------------------
//
// All threads of a warp must call these together.

#if DSP_CUDA
template <class T>
__device__ __forceinline__ T shuffle_xor(T a, int mask) {
  return __shfl_xor_sync(0xffffffffu, a, mask);
}
template <class T>
__device__ __forceinline__ T shuffle(T a, int lane) {
  return __shfl_sync(0xffffffffu, a, lane);
}
__device__ __forceinline__ uint64_t ballot(bool is_set) { return __ballot_sync(0xffffffffu, is_set); }
#elif DSP_HIP
template <class T>
__device__ __forceinline__ T shuffle_xor(T a, int mask) {
  return __shfl_xor(a, mask);
}
template <class T>
__device__ __forceinline__ T shuffle(T a, int lane) {
  return __shfl(a, lane);
}
__device__ __forceinline__ uint64_t ballot(bool is_set) { return __ballot(is_set); }
#else  // Macros, so that the emulator can name the line at which a thread waits.
#define shuffle_xor(a, mask) dsp_emu::shuffle_xor(a, mask, DSP_EMU_HERE)
#define shuffle(a, lane) dsp_emu::shuffle(a, lane, DSP_EMU_HERE)
#define ballot(is_set) dsp_emu::ballot(is_set, DSP_EMU_HERE)
#endif

#if DSP_EMU
inline int ones(uint64_t bits) { return __builtin_popcountll(bits); }
inline int lowest(uint64_t bits) { return __builtin_ctzll(bits); }
#else
__device__ __forceinline__ int ones(uint64_t bits) { return __popcll(bits); }
__device__ __forceinline__ int lowest(uint64_t bits) { return __ffsll(static_cast<unsigned long long>(bits)) - 1; }
#endif

}  // namespace dsp
