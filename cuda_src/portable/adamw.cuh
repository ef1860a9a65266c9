// AdamW over many tensors: the operator of runtime/adamw.py, with which this agrees to the last bit.
//
// Every thread steps eight values at a time. What is read is read once, what is written is written once, 16 bytes a
// thread and access where tensors begin at multiples of it. dtypes are the tensors' own, found once a tile, so that one
// launch takes parameters of both.
//
// Dropped: a kernel a pair of dtypes, which would take four launches where one does.
#pragma once

#include <cmath>

#include "formats.cuh"
#include "tiles.cuh"

namespace dsp {
namespace adamw {

constexpr int kThreads = 256;
constexpr int kMostParts = 56;  // with Work's other fields below the 4 KiB of a launch's arguments
constexpr int64_t kTile = static_cast<int64_t>(kThreads) * kUnit;

struct Part {
  void* param;
  const void* grad;
  float* exp_avg;
  float* exp_avg_sq;
  int64_t values;
  int64_t first_tile;
  uint32_t key;
  bool param_is_bf16;
  bool grad_is_bf16;
};

struct Work {
  Part parts[kMostParts];
  int64_t tiles;
  float decay;  // 1 - lr * weight_decay
  float rest1;  // 1 - beta1
  float beta2;
  float rest2;
  float size;  // lr over the first bias correction
  float over;  // 1 over the root of the second
  float eps;
  bool is_stochastic;
  int count;
};
static_assert(sizeof(Work) <= 3900, "a launch's arguments are 4 KiB at most");

// lowbias32.
__host__ __device__ inline uint32_t mix(uint32_t bits) {
  bits = (bits ^ bits >> 16) * 0x7feb352du;
  bits = (bits ^ bits >> 15) * 0x846ca68bu;
  return bits ^ bits >> 16;
}

// The upper half of a value to which 16 random bits are added: exact in bf16. `index` is the value's in its tensor.
__device__ __forceinline__ float stochastic(float value, uint32_t key, int64_t index) {
  const uint32_t bits = bits_of(value);
  if ((bits & kMagnitude) >= kInfinity) return value;
  const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(index) >> 32);
  const uint32_t random = mix(static_cast<uint32_t>(index) ^ mix(high ^ key)) & 0xffff;
  return float_of((bits + random) & 0xffff0000u);
}

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

__global__ void __launch_bounds__(kThreads) adamw_kernel(DSP_BY_VALUE(Work) work) {
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
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      exp_avg[i] = add(exp_avg[i], multiply(add(grad[i], -exp_avg[i]), work.rest1));
      exp_avg_sq[i] = add(multiply(exp_avg_sq[i], work.beta2), multiply(multiply(grad[i], grad[i]), work.rest2));
      const float below = add(multiply(square_root(exp_avg_sq[i]), work.over), work.eps);
      param[i] = add(multiply(param[i], work.decay), -divide(multiply(exp_avg[i], work.size), below));
    }
    store_values(part.exp_avg + first, there, is_aligned_to(part.exp_avg + first, 16), exp_avg);
    store_values(part.exp_avg_sq + first, there, is_aligned_to(part.exp_avg_sq + first, 16), exp_avg_sq);
    if (part.param_is_bf16) {
      if (work.is_stochastic) {
#pragma unroll
        for (int i = 0; i < kUnit; ++i) param[i] = stochastic(param[i], part.key, first + i);
      }
      bf16* to = static_cast<bf16*>(part.param) + first;
      store_values(to, there, is_aligned_to(to, 16), param);
    } else {
      float* to = static_cast<float*>(part.param) + first;
      store_values(to, there, is_aligned_to(to, 16), param);
    }
  }
}

inline uint32_t key_of(uint64_t seed, uint64_t step, uint64_t number) {
  uint32_t key = 0;
  for (const uint64_t part : {number, step, seed >> 32, seed}) key = mix(static_cast<uint32_t>(part) ^ key);
  return key;
}

}  // namespace adamw
}  // namespace dsp

// -- the C ABI ------------------------------------------------------------------------------------------------------
//
// Of tensor i `values[i]` values; parameters and gradients of the dtypes that formats.cuh numbers, fp32 or bf16, states
// fp32. All are contiguous and on one device; lists are the host's and are read before the call returns. Answers the
// driver's error code, 0 for none.
DSP_EXPORT int dsp_adamw(void* const* params, const void* const* grads, void* const* exp_avgs,
                         void* const* exp_avg_sqs, const int64_t* values, const int* param_dtypes,
                         const int* grad_dtypes, int64_t count, int64_t step, double lr, double beta1, double beta2,
                         double eps, double weight_decay, int is_stochastic, int64_t seed, void* stream) {
  using namespace dsp;
  constexpr int fp32 = 0, bf16_code = 2;
  if (count < 0 || step < 1) return kInvalidValue;
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] < 0) return kInvalidValue;
    for (const int dtype : {param_dtypes[i], grad_dtypes[i]})
      if (dtype != fp32 && dtype != bf16_code) return kInvalidValue;
  }
  adamw::Work work;
  work.decay = static_cast<float>(1 - lr * weight_decay);
  work.rest1 = static_cast<float>(1 - beta1);
  work.beta2 = static_cast<float>(beta2);
  work.rest2 = static_cast<float>(1 - beta2);
  work.size = static_cast<float>(lr / (1 - std::pow(beta1, static_cast<double>(step))));
  work.over = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, static_cast<double>(step))));
  work.eps = static_cast<float>(eps);
  work.is_stochastic = is_stochastic != 0;
  work.tiles = 0;
  work.count = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] > 0) {
      work.parts[work.count++] = {params[i],
                                  grads[i],
                                  static_cast<float*>(exp_avgs[i]),
                                  static_cast<float*>(exp_avg_sqs[i]),
                                  values[i],
                                  work.tiles,
                                  adamw::key_of(static_cast<uint64_t>(seed), static_cast<uint64_t>(step),
                                                static_cast<uint64_t>(i)),
                                  param_dtypes[i] == bf16_code,
                                  grad_dtypes[i] == bf16_code};
      work.tiles += (values[i] + adamw::kTile - 1) / adamw::kTile;
    }
    if (work.count == adamw::kMostParts || (i == count - 1 && work.count > 0)) {
      if (const int error =
              DSP_LAUNCH(adamw::adamw_kernel, grid_of(work.tiles), adamw::kThreads, 0, stream, work))
        return error;
      work.tiles = 0;
      work.count = 0;
    }
  }
  return 0;
}
