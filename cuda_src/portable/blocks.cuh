// The scale of a block of values, which a group of threads of one warp holds, units of eight each.
//
// A block's largest magnitude is found among the bits of its values, as integers: an infinity is above all numbers,
// and a NaN above it, which no comparison of floats says.
#pragma once

#include "formats.cuh"

namespace dsp {

constexpr uint32_t kSmallest = 27u << 23;  // 2**-100, by its bits

__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) { return a < b ? b : a; }

__device__ __forceinline__ uint32_t largest_magnitude(const float (&values)[kUnit]) {
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < kUnit; ++i) most = larger(most, bits_of(values[i]) & kMagnitude);
  return most;
}

__device__ __forceinline__ uint32_t largest_of_group(uint32_t most, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) most = larger(most, shuffle_xor(most, mask));
  return most;
}

// By what a block's values are multiplied, and with what its codes are later.
struct Scaling {
  float inverse;
  float scale;
  bool is_finite;
};

template <class Format>
__device__ __forceinline__ Scaling scaling_of(uint32_t most) {
  constexpr float over_largest = static_cast<float>(1.0 / Format::kLargest);
  if (most >= kInfinity) return {0.f, float_of(kNaN), false};
  const float magnitude = float_of(larger(most, kSmallest));
  return {multiply(divide(1.f, magnitude), static_cast<float>(Format::kLargest)), multiply(magnitude, over_largest),
          true};
}

}  // namespace dsp
