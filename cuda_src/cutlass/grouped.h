// What a unit of grouped products is given, and the units there are: nothing of CUTLASS, so that it is read anywhere.
#pragma once

#include <stdint.h>

namespace dsp {
namespace grouped {

// How the matrices of a group lie, all of them without gaps in one dimension.
enum class Form : int {
  kRows = 0,     // [m, k] by rows times [k, n] by rows
  kColumns = 1,  // [m, k] by rows times [k, n] by columns
  kOuter = 2,    // [m, k] by columns times [k, n] by rows
};

// Arrays on the device with a value a group, as CUTLASS takes them: out = left times right, by rows. Strides are in
// elements, between rows, or between columns where a matrix lies by columns. A group without work has an m of 0.
struct Groups {
  int32_t (*sizes)[3];  // m, n, k
  const void** left;
  const void** right;
  void** out;
  int64_t* left_stride;
  int64_t* right_stride;
  int64_t* out_stride;
  int64_t count;
};

// Values per 16 bytes: rows begin at multiples of it.
constexpr int64_t kAlignment = 8;

// Each unit is a translation unit, compiled for one architecture. `workspace` is aligned to 64 bytes and has what
// ..._workspace answers for the current device. Dtypes are numbered as in formats.cuh: 1 fp16, 2 bf16. They answer the
// driver's error code; 1 for a dtype that they do not know.
int run_sm80(Form form, int dtype, const Groups& groups, void* workspace, int64_t bytes, void* stream);
int run_sm80_workspace(int64_t* bytes);
int run_sm90(Form form, int dtype, const Groups& groups, void* workspace, int64_t bytes, void* stream);
int run_sm90_workspace(int64_t* bytes);

}  // namespace grouped
}  // namespace dsp
