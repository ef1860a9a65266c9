// What a unit of mixed products is given, and the units there are: nothing of CUTLASS, so that it is read anywhere.
#pragma once

#include <stdint.h>

namespace dsp {
namespace mixed {

// out[rows, columns] = x[rows, inner] times the transpose of what codes and scales are [columns, inner] of. All lie by
// rows; scales are one a row of codes, or, where there are several groups, as the workspace has them.
struct Operands {
  const void* x;
  int64_t x_stride;  // in values
  const void* codes;
  int64_t code_stride;  // in bytes
  const float* scales;  // [groups, columns]
  void* out;
  int64_t rows;
  int64_t inner;
  int64_t columns;
  int64_t group;  // values of a row with one scale: all of them, or a multiple of kGroup
};

constexpr int64_t kGroup = 64;  // what a tile goes along a row: within it there is one scale
constexpr int64_t kAlignment = 8;

// Each unit is a translation unit, compiled for one architecture. Formats and dtypes are numbered as in formats.cuh:
// formats 0 int8 and 1 int4, dtypes 1 fp16 and 2 bf16. They answer the driver's error code; 1 for what they do not know.
int run_sm80(int format, int dtype, const Operands& operands, void* stream);  // int8 with one scale a row
int run_sm90(int format, int dtype, const Operands& operands, void* stream);

}  // namespace mixed
}  // namespace dsp
