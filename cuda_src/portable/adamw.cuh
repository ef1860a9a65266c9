// AdamW over many tensors: the operators of runtime/adamw.py, with which these agree to the last bit.
//
// Every thread steps eight values at a time. What is read is read once, what is written is written once, 16 bytes a
// thread and access where tensors begin at multiples of it. dtypes are the tensors' own, found once a tile, so that one
// launch takes parameters of both.
//
// Where states are of 8 bits, a block of 256 values is 32 neighbouring threads', a warp or half of one, who find its
// largest magnitudes by shuffles: so all of them go on where their tensor has ended.
//
// Dropped: a kernel a pair of dtypes, which would take four launches where one does.
#pragma once

#include <cmath>

#include "blocks.cuh"
#include "formats.cuh"
#include "tiles.cuh"

namespace dsp {
namespace adamw {

constexpr int kThreads = 256;
constexpr int64_t kTile = static_cast<int64_t>(kThreads) * kUnit;
constexpr int64_t kBlock = 256;  // values that share a scale in states of 8 bits
constexpr int kLanes = kBlock / kUnit;

struct Tensors {
  void* param;
  const void* grad;
  int64_t values;
  int64_t first_tile;
  uint32_t key;
  bool param_is_bf16;
  bool grad_is_bf16;
};

struct Part : Tensors {
  float* exp_avg;
  float* exp_avg_sq;
};

struct PartOf8Bits : Tensors {
  uint8_t* exp_avg;
  float* exp_avg_scales;
  uint8_t* exp_avg_sq;
  float* exp_avg_sq_scales;
};

struct Numbers {
  float decay;  // 1 - lr * weight_decay
  float rest1;  // 1 - beta1
  float beta2;
  float rest2;
  float size;  // lr over the first bias correction
  float over;  // 1 over the root of the second
  float eps;
  bool is_stochastic;
};

template <class Part, int kMostParts>
struct Work {
  static constexpr int kMost = kMostParts;
  Part parts[kMostParts];
  int64_t tiles;
  Numbers numbers;
  int count;
};
using Work32 = Work<Part, 56>;
using Work8 = Work<PartOf8Bits, 46>;
static_assert(sizeof(Work32) <= 3900 && sizeof(Work8) <= 3900, "a launch's arguments are 4 KiB at most");

// -- random bits ----------------------------------------------------------------------------------------------------

// lowbias32.
__host__ __device__ inline uint32_t mix(uint32_t bits) {
  bits = (bits ^ bits >> 16) * 0x7feb352du;
  bits = (bits ^ bits >> 15) * 0x846ca68bu;
  return bits ^ bits >> 16;
}

inline uint32_t key_of(uint64_t seed, uint64_t step, uint64_t number) {
  uint32_t key = 0;
  for (const uint64_t part : {number, step, seed >> 32, seed}) key = mix(static_cast<uint32_t>(part) ^ key);
  return key;
}

// `index` is the value's in its tensor. The lower half is the parameter's, the upper half the first state's.
__device__ __forceinline__ uint32_t random_of(uint32_t key, int64_t index) {
  const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(index) >> 32);
  return mix(static_cast<uint32_t>(index) ^ mix(high ^ key));
}

// The upper half of a value to which 16 random bits are added: exact in bf16.
__device__ __forceinline__ float stochastic(float value, uint32_t random) {
  const uint32_t bits = bits_of(value);
  if ((bits & kMagnitude) >= kInfinity) return value;
  return float_of((bits + (random & 0xffff)) & 0xffff0000u);
}

// -- a unit of values -----------------------------------------------------------------------------------------------

__device__ __forceinline__ void load_either(const void* from, bool is_bf16, int64_t first, int64_t there,
                                            float (&values)[kUnit]) {
  if (is_bf16) {
    const bf16* at = static_cast<const bf16*>(from) + first;
    load_values(at, there, is_aligned_to(at, 16), values);
  } else {
    const float* at = static_cast<const float*>(from) + first;
    load_values(at, there, is_aligned_to(at, 16), values);
  }
}

__device__ __forceinline__ void store_param(const Tensors& part, bool is_stochastic, int64_t first, int64_t there,
                                            float (&param)[kUnit]) {
  if (part.param_is_bf16) {
    if (is_stochastic) {
#pragma unroll
      for (int i = 0; i < kUnit; ++i) param[i] = stochastic(param[i], random_of(part.key, first + i));
    }
    bf16* to = static_cast<bf16*>(part.param) + first;
    store_values(to, there, is_aligned_to(to, 16), param);
  } else {
    float* to = static_cast<float*>(part.param) + first;
    store_values(to, there, is_aligned_to(to, 16), param);
  }
}

__device__ __forceinline__ void step(const Numbers& numbers, const float (&grad)[kUnit], float (&param)[kUnit],
                                     float (&exp_avg)[kUnit], float (&exp_avg_sq)[kUnit]) {
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    exp_avg[i] = add(exp_avg[i], multiply(add(grad[i], -exp_avg[i]), numbers.rest1));
    exp_avg_sq[i] = add(multiply(exp_avg_sq[i], numbers.beta2), multiply(multiply(grad[i], grad[i]), numbers.rest2));
    const float below = add(multiply(square_root(exp_avg_sq[i]), numbers.over), numbers.eps);
    param[i] = add(multiply(param[i], numbers.decay), -divide(multiply(exp_avg[i], numbers.size), below));
  }
}

// -- states of fp32 -------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads) adamw_kernel(DSP_BY_VALUE(Work32) work) {
  for (int64_t number = blockIdx.x; number < work.tiles; number += gridDim.x) {
    const Part& part = work.parts[part_of(work, number)];
    const int64_t first = (number - part.first_tile) * kTile + static_cast<int64_t>(threadIdx.x) * kUnit;
    const int64_t there = part.values - first;
    if (there <= 0) continue;
    float param[kUnit], grad[kUnit], exp_avg[kUnit], exp_avg_sq[kUnit];
    load_either(part.param, part.param_is_bf16, first, there, param);
    load_either(part.grad, part.grad_is_bf16, first, there, grad);
    load_values(part.exp_avg + first, there, is_aligned_to(part.exp_avg + first, 16), exp_avg);
    load_values(part.exp_avg_sq + first, there, is_aligned_to(part.exp_avg_sq + first, 16), exp_avg_sq);
    step(work.numbers, grad, param, exp_avg, exp_avg_sq);
    store_values(part.exp_avg + first, there, is_aligned_to(part.exp_avg + first, 16), exp_avg);
    store_values(part.exp_avg_sq + first, there, is_aligned_to(part.exp_avg_sq + first, 16), exp_avg_sq);
    store_param(part, work.numbers.is_stochastic, first, there, param);
  }
}

// -- states of 8 bits -----------------------------------------------------------------------------------------------

template <class Format>
__device__ __forceinline__ void load_state(const uint8_t* codes, const float* scales, int64_t first,
                                           float (&values)[kUnit]) {
  uint32_t found[kUnit];
  load_codes<Format>(codes + first, 0, 0, found, is_aligned_to(codes, 8));
  const float scale = scales[first / kBlock];
#pragma unroll
  for (int i = 0; i < kUnit; ++i) values[i] = multiply(decode<Format>(found[i]), scale);
}

// All threads of the group call it; `code_of` answers the code of value i, scaled.
template <class Format, class Code>
__device__ __forceinline__ void store_state(uint8_t* codes, float* scales, int64_t first, bool is_there,
                                            const float (&values)[kUnit], Code code_of) {
  const Scaling scaling = scaling_of<Format>(largest_of_group(largest_magnitude(values), kLanes));
  if (!is_there) return;
  uint32_t found[kUnit];
#pragma unroll
  for (int i = 0; i < kUnit; ++i)
    found[i] = scaling.is_finite ? code_of(multiply(values[i], scaling.inverse), i) : 0;
  store_codes<Format>(codes + first, 0, 0, found, is_aligned_to(codes, 8));
  if (first % kBlock == 0) scales[first / kBlock] = scaling.scale;
}

__global__ void __launch_bounds__(kThreads) adamw_8bit_kernel(DSP_BY_VALUE(Work8) work) {
  for (int64_t number = blockIdx.x; number < work.tiles; number += gridDim.x) {
    const PartOf8Bits& part = work.parts[part_of(work, number)];
    const int64_t first = (number - part.first_tile) * kTile + static_cast<int64_t>(threadIdx.x) * kUnit;
    const int64_t there = part.values - first;
    float param[kUnit], grad[kUnit], exp_avg[kUnit] = {}, exp_avg_sq[kUnit] = {};
    load_either(part.param, part.param_is_bf16, first, there, param);
    load_either(part.grad, part.grad_is_bf16, first, there, grad);
    if (there > 0) {
      load_state<Fp8E4M3>(part.exp_avg, part.exp_avg_scales, first, exp_avg);
      load_state<UnsignedE5M3>(part.exp_avg_sq, part.exp_avg_sq_scales, first, exp_avg_sq);
    }
    step(work.numbers, grad, param, exp_avg, exp_avg_sq);
    store_state<Fp8E4M3>(part.exp_avg, part.exp_avg_scales, first, there > 0, exp_avg, [&](float value, int i) {
      const float noise = multiply(static_cast<float>(random_of(part.key, first + i) >> 16), power_of_two(-16));
      return encode<Fp8E4M3>(value, noise);
    });
    store_state<UnsignedE5M3>(part.exp_avg_sq, part.exp_avg_sq_scales, first, there > 0, exp_avg_sq,
                              [&](float value, int i) {
                                const uint32_t code = encode<UnsignedE5M3>(value);
                                return code == 0 && exp_avg_sq[i] > 0.f ? 1u : code;
                              });
    store_param(part, work.numbers.is_stochastic, first, there, param);
  }
}

// -- launches -------------------------------------------------------------------------------------------------------

inline Numbers numbers_of(int64_t step, double lr, double beta1, double beta2, double eps, double weight_decay,
                          int is_stochastic) {
  return {static_cast<float>(1 - lr * weight_decay),
          static_cast<float>(1 - beta1),
          static_cast<float>(beta2),
          static_cast<float>(1 - beta2),
          static_cast<float>(lr / (1 - std::pow(beta1, static_cast<double>(step)))),
          static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, static_cast<double>(step)))),
          static_cast<float>(eps),
          is_stochastic != 0};
}

inline bool can_be(const int64_t* values, const int* param_dtypes, const int* grad_dtypes, int64_t count,
                   int64_t step) {
  constexpr int fp32 = 0, bf16_code = 2;
  if (count < 0 || step < 1) return false;
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] < 0) return false;
    for (const int dtype : {param_dtypes[i], grad_dtypes[i]})
      if (dtype != fp32 && dtype != bf16_code) return false;
  }
  return true;
}

// Launches for all tensors that are not empty, as many at once as Work has room for; part_of answers tensor i's.
template <class Work, class MakePart, class Kernel>
int launch(Kernel kernel, const int64_t* values, int64_t count, const Numbers& numbers, void* stream,
           MakePart make_part) {
  Work work;
  work.numbers = numbers;
  work.tiles = 0;
  work.count = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] > 0) {
      work.parts[work.count] = make_part(i);
      work.parts[work.count++].first_tile = work.tiles;
      work.tiles += (values[i] + kTile - 1) / kTile;
    }
    if (work.count == Work::kMost || (i == count - 1 && work.count > 0)) {
      if (const int error = DSP_LAUNCH(kernel, grid_of(work.tiles), kThreads, 0, stream, work)) return error;
      work.tiles = 0;
      work.count = 0;
    }
  }
  return 0;
}

}  // namespace adamw
}  // namespace dsp

// -- the C ABI ------------------------------------------------------------------------------------------------------
//
// Of tensor i `values[i]` values; parameters and gradients of the dtypes that formats.cuh numbers, fp32 or bf16. All
// are contiguous and on one device; lists are the host's and are read before the call returns. Answers the driver's
// error code, 0 for none. The first has states of fp32; the second codes, whole blocks of 256 bytes with zeros behind
// the last value, and an fp32 scale for each block.
DSP_EXPORT int dsp_adamw(void* const* params, const void* const* grads, void* const* exp_avgs,
                         void* const* exp_avg_sqs, const int64_t* values, const int* param_dtypes,
                         const int* grad_dtypes, int64_t count, int64_t step, double lr, double beta1, double beta2,
                         double eps, double weight_decay, int is_stochastic, int64_t seed, void* stream) {
  using namespace dsp::adamw;
  if (!can_be(values, param_dtypes, grad_dtypes, count, step)) return dsp::kInvalidValue;
  const Numbers numbers = numbers_of(step, lr, beta1, beta2, eps, weight_decay, is_stochastic);
  return launch<Work32>(adamw_kernel, values, count, numbers, stream, [&](int64_t i) {
    return Part{{params[i], grads[i], values[i], 0, key_of(seed, step, i), param_dtypes[i] != 0, grad_dtypes[i] != 0},
                static_cast<float*>(exp_avgs[i]),
                static_cast<float*>(exp_avg_sqs[i])};
  });
}

DSP_EXPORT int dsp_adamw_8bit(void* const* params, const void* const* grads, void* const* exp_avgs,
                              void* const* exp_avg_scales, void* const* exp_avg_sqs, void* const* exp_avg_sq_scales,
                              const int64_t* values, const int* param_dtypes, const int* grad_dtypes, int64_t count,
                              int64_t step, double lr, double beta1, double beta2, double eps, double weight_decay,
                              int is_stochastic, int64_t seed, void* stream) {
  using namespace dsp::adamw;
  if (!can_be(values, param_dtypes, grad_dtypes, count, step)) return dsp::kInvalidValue;
  const Numbers numbers = numbers_of(step, lr, beta1, beta2, eps, weight_decay, is_stochastic);
  return launch<Work8>(adamw_8bit_kernel, values, count, numbers, stream, [&](int64_t i) {
    return PartOf8Bits{
        {params[i], grads[i], values[i], 0, key_of(seed, step, i), param_dtypes[i] != 0, grad_dtypes[i] != 0},
        static_cast<uint8_t*>(exp_avgs[i]),
        static_cast<float*>(exp_avg_scales[i]),
        static_cast<uint8_t*>(exp_avg_sqs[i]),
        static_cast<float*>(exp_avg_sq_scales[i])};
  });
}
