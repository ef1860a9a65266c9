// The units as plain loops on the CPU, for tests: what stands before CUTLASS is tested with these in its place.
//
// They read the arrays as CUTLASS does, refuse what it could not take, and that of sm_90 writes all of its workspace.
#include <string.h>

#include "../portable/formats.cuh"
#include "grouped.h"
#include "mixed.h"

namespace dsp {
namespace {

constexpr int kMisaligned = 716;  // the driver's cudaErrorMisalignedAddress
constexpr int kAssert = 710;      // and its cudaErrorAssert

bool is_at_16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

namespace grouped {
namespace {

template <class T>
int multiply(Form form, const Groups& groups) {
  for (int64_t group = 0; group < groups.count; ++group) {
    const auto [m, n, k] = groups.sizes[group];
    if (m == 0) continue;
    if (m < 0 || n <= 0 || k <= 0) return kAssert;
    const auto* const left = static_cast<const T*>(groups.left[group]);
    const auto* const right = static_cast<const T*>(groups.right[group]);
    auto* const out = static_cast<T*>(groups.out[group]);
    const int64_t along_left = groups.left_stride[group], along_right = groups.right_stride[group];
    for (const int64_t stride : {along_left, along_right, groups.out_stride[group]})
      if (stride % kAlignment != 0) return kMisaligned;
    if (!is_at_16(left) || !is_at_16(right) || !is_at_16(out)) return kMisaligned;
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        float sum = 0.f;
        for (int64_t l = 0; l < k; ++l) {
          const float a = to_float(form == Form::kOuter ? left[l * along_left + i] : left[i * along_left + l]);
          const float b = to_float(form == Form::kColumns ? right[j * along_right + l] : right[l * along_right + j]);
          sum += a * b;
        }
        out[i * groups.out_stride[group] + j] = from_float<T>(sum);
      }
    }
  }
  return 0;
}

int multiply(Form form, int dtype, const Groups& groups) {
  if (dtype == 1) return multiply<f16>(form, groups);
  if (dtype == 2) return multiply<bf16>(form, groups);
  return kInvalidValue;
}

constexpr int64_t kWorkspace = 384;  // any

}  // namespace

int run_sm80(Form form, int dtype, const Groups& groups, void*, int64_t, void*) {
  return multiply(form, dtype, groups);
}

int run_sm80_workspace(int64_t* bytes) {
  *bytes = 0;
  return 0;
}

int run_sm90(Form form, int dtype, const Groups& groups, void* workspace, int64_t bytes, void*) {
  if (bytes < kWorkspace) return kInvalidValue;
  memset(workspace, 0x5a, kWorkspace);
  return multiply(form, dtype, groups);
}

int run_sm90_workspace(int64_t* bytes) {
  *bytes = kWorkspace;
  return 0;
}

}  // namespace grouped

namespace mixed {
namespace {

// As CUTLASS numbers values of 4 bits: the first of a byte in its low half, signed.
float code_at(const void* row, int format, int64_t i) {
  const auto* const bytes = static_cast<const int8_t*>(row);
  if (format == 0) return bytes[i];
  return static_cast<int8_t>(bytes[i / 2] << (i % 2 == 0 ? 4 : 0)) >> 4;
}

// Scales are of the sum, or of each value, which is rounded to T then.
template <class T, bool kIsOfSum>
int multiply(int format, const Operands& operands) {
  const int64_t aligned = format == 0 ? 16 : 32;
  if (operands.inner % aligned || operands.columns % kAlignment || operands.x_stride % kAlignment ||
      operands.code_stride % 16)
    return kMisaligned;
  if (!is_at_16(operands.x) || !is_at_16(operands.codes) || !is_at_16(operands.scales) || !is_at_16(operands.out))
    return kMisaligned;
  if (operands.group < operands.inner && (kIsOfSum || operands.group % kGroup)) return kAssert;
  for (int64_t i = 0; i < operands.rows; ++i) {
    const T* const row = static_cast<const T*>(operands.x) + i * operands.x_stride;
    for (int64_t j = 0; j < operands.columns; ++j) {
      const auto* const codes = static_cast<const char*>(operands.codes) + j * operands.code_stride;
      float sum = 0.f;
      for (int64_t l = 0; l < operands.inner; ++l) {
        float weight = code_at(codes, format, l);
        const float scale = operands.scales[l / operands.group * operands.columns + j];
        if (!kIsOfSum) weight = to_float(from_float<T>(weight * scale));
        sum += to_float(row[l]) * weight;
      }
      if (kIsOfSum) sum *= operands.scales[j];
      static_cast<T*>(operands.out)[i * operands.columns + j] = from_float<T>(sum);
    }
  }
  return 0;
}

template <bool kIsOfSum>
int multiply(int format, int dtype, const Operands& operands) {
  if (dtype == 1) return multiply<f16, kIsOfSum>(format, operands);
  if (dtype == 2) return multiply<bf16, kIsOfSum>(format, operands);
  return kInvalidValue;
}

}  // namespace

int run_sm80(int format, int dtype, const Operands& operands, void*) {
  return format == 0 ? multiply<true>(format, dtype, operands) : kInvalidValue;
}

int run_sm90(int format, int dtype, const Operands& operands, void*) { return multiply<false>(format, dtype, operands); }

}  // namespace mixed
}  // namespace dsp
