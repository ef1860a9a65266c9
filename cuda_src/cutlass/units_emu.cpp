// The units as plain loops on the CPU, for tests: what stands before CUTLASS is tested with these in its place.
//
// They read the arrays as CUTLASS does, refuse what it could not take, and that of sm_90 writes all of its workspace.
#include <string.h>

#include "../portable/formats.cuh"
#include "grouped.h"

namespace dsp {
namespace grouped {
namespace {

constexpr int kMisaligned = 716;  // the driver's cudaErrorMisalignedAddress
constexpr int kAssert = 710;      // and its cudaErrorAssert

bool is_at_16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

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
}  // namespace dsp
