// Products with a weight in few bits (runtime/few_bits.py) by CUTLASS: the C interface, which chooses a unit by the device.
//
// Which products there are: of fp16 or bf16 with int8 or int4, summed up in fp32, where
//   - x and codes lie by rows, the former's a multiple of 8 values apart, the latter's of 16 bytes,
//   - inner is a multiple of 16, and with int4 of 32, columns one of 8,
//   - there is one scale a row, or groups are a multiple of 64 values,
//   - all begin at multiples of 16 bytes,
// and on devices that are not of compute capability 9 only int8 with one scale a row. kInvalidValue is the answer to all
// else, before anything is launched.
#include "device.h"
#include "mixed.h"
#include "scales.cuh"

namespace dsp {
namespace mixed {
namespace {

constexpr int64_t kMostSize = 0x7fffffff;
constexpr int64_t kMostScales = int64_t{1} << 40;

bool is_size(int64_t size, int64_t of) { return size > 0 && size % of == 0 && size <= kMostSize; }

int64_t groups_of(int64_t inner, int64_t group) { return (inner + group - 1) / group; }

bool is_group(int64_t inner, int64_t group) { return group >= inner || (group > 0 && group % kGroup == 0); }

// Of scales [groups, columns], which are made where there are several groups.
bool find_bytes(int64_t columns, int64_t inner, int64_t group, int64_t* bytes) {
  if (!is_size(columns, kAlignment) || !is_size(inner, 1) || !is_group(inner, group)) return false;
  const int64_t groups = groups_of(inner, group);
  if (groups > kMostScales / columns) return false;
  *bytes = groups == 1 ? 0 : groups * columns * static_cast<int64_t>(sizeof(float));
  return true;
}

bool are_operands(const Operands& operands, int format, int dtype) {
  if ((format != 0 && format != 1) || (dtype != 1 && dtype != 2)) return false;
  const int64_t bits = format == 0 ? 8 : 4;
  return is_size(operands.rows, 1) && is_size(operands.inner, 128 / bits) && is_size(operands.columns, kAlignment) &&
         operands.x_stride >= operands.inner && operands.x_stride % kAlignment == 0 &&
         operands.code_stride >= operands.inner * bits / 8 && operands.code_stride % 16 == 0 &&
         is_group(operands.inner, operands.group) && is_aligned(operands.x, 16) && is_aligned(operands.codes, 16) &&
         is_aligned(operands.scales, 16) && is_aligned(operands.out, 16);
}

}  // namespace
}  // namespace mixed
}  // namespace dsp

// -- the C ABI ------------------------------------------------------------------------------------------------------
//
// Formats and dtypes are numbered as in formats.cuh. All memory is the current device's. Each answers the driver's error
// code, 0 for none, 1 for what is not served.

// How many bytes a product works in, 0 where there is one group; they begin at a multiple of 64.
DSP_EXPORT int dsp_mixed_workspace(int64_t inner, int64_t columns, int64_t group, int64_t* bytes) {
  return bytes != nullptr && dsp::mixed::find_bytes(columns, inner, group, bytes) ? 0 : dsp::kInvalidValue;
}

// out[rows, columns], without gaps, of x[rows, inner], rows x_stride values apart, and the weight of codes[columns, inner],
// rows code_stride bytes apart, and scales[columns, groups], fp32 and without gaps; a group is `group` values of a row.
DSP_EXPORT int dsp_mixed_product(const void* x, int64_t x_stride, const void* codes, int64_t code_stride,
                                 const void* scales, void* out, int64_t rows, int64_t inner, int64_t columns,
                                 int64_t group, int format, int dtype, void* workspace, int64_t bytes, void* stream) {
  using namespace dsp::mixed;
  Operands operands{x, x_stride, codes, code_stride, static_cast<const float*>(scales), out, rows, inner, columns, group};
  int64_t wanted = 0;
  if (!are_operands(operands, format, dtype) || !find_bytes(columns, inner, group, &wanted)) return dsp::kInvalidValue;
  if (wanted > 0 && (wanted > bytes || !dsp::is_aligned(workspace, dsp::kWorkspaceAlignment)))
    return dsp::kInvalidValue;
  int major = 0;
  if (const int error = dsp::capability(&major)) return error;
  const bool is_sm90 = major == 9;
  if (major < 8 || (!is_sm90 && (format != 0 || wanted > 0))) return dsp::kInvalidValue;
  if (wanted > 0) {
    auto* const transposed = static_cast<float*>(workspace);
    if (const int error = transpose(operands.scales, transposed, columns, groups_of(inner, group), stream)) return error;
    operands.scales = transposed;
  }
  return (is_sm90 ? run_sm90 : run_sm80)(format, dtype, operands, stream);
}
