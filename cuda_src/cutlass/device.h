// What the C interfaces ask before they choose a unit.
#pragma once

#include <stdlib.h>

#include "../common/gpu.h"

namespace dsp {

constexpr int64_t kWorkspaceAlignment = 64;  // of TMA descriptors

// Compute capability of the current device, without the minor part; the emulator's is what a test sets.
inline int capability(int* major) {
#if DSP_EMU
  const char* const wanted = getenv("DSP_EMU_CAPABILITY");
  *major = wanted ? atoi(wanted) : 8;
  return 0;
#else
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  return cudaDeviceGetAttribute(major, cudaDevAttrComputeCapabilityMajor, device);
#endif
}

inline bool is_aligned(const void* pointer, int64_t to) {
  return pointer != nullptr && reinterpret_cast<uintptr_t>(pointer) % to == 0;
}

}  // namespace dsp
