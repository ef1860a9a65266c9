// CUTLASS's answers as the driver's error codes.
#pragma once

#include <cuda_runtime.h>
#include <cutlass/cutlass.h>

namespace dsp {

constexpr int kInvalid = cudaErrorInvalidValue;
constexpr int kUnknown = cudaErrorUnknown;

// CUTLASS takes the driver's own code away before it answers, and has none but these two meanings for a caller.
inline int error_of(cutlass::Status status) {
  switch (status) {
    case cutlass::Status::kSuccess: return cudaSuccess;
    case cutlass::Status::kErrorMisalignedOperand:
    case cutlass::Status::kErrorInvalidProblem:
    case cutlass::Status::kErrorNotSupported: return kInvalid;
    default: return kUnknown;
  }
}

}  // namespace dsp
