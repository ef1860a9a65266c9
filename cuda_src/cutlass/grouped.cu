// The grouped products of runtime/grouped.py by CUTLASS: the C interface, which chooses a unit by the device.
//
// A unit is a family of kernels for one architecture in a translation unit of its own (grouped_sm80.cu, grouped_sm90.cu),
// for they take long to compile. Devices of compute capability 9 have sm_90a's, all others from 8 on sm_80's, which
// newer ones compile from its PTX.
//
// Which products there are: of fp16 or bf16, summed up in fp32, where
//   - x and grad lie by rows and weight by rows or by columns,
//   - there is a row, inner and columns are multiples of 8, and so is every stride but the 1,
//   - all begin at multiples of 16 bytes.
// kInvalidValue is the answer to all else, before anything is launched: another path serves it.
//
// Dropped: fp32, which tensor cores would round to tf32. Dropped: narrower accesses for rows that are not aligned, each
// of which is one more kernel to compile for shapes that models do not have.
#include <type_traits>

#include "device.h"
#include "groups.cuh"

namespace dsp {
namespace grouped {
namespace {

constexpr int64_t kMostRows = 0x7fffffff;
constexpr int64_t kMostExperts = 8192;  // runtime/experts.py

int64_t aligned(int64_t bytes) { return (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment; }

int64_t bytes_of_arrays(int64_t experts) {
  return aligned(experts * static_cast<int64_t>(3 * sizeof(int32_t) + 3 * sizeof(void*) + 3 * sizeof(int64_t)));
}

// Arrays in memory of bytes_of_arrays: those of 8 bytes a value first.
Groups groups_in(void* memory, int64_t count) {
  Groups groups;
  char* at = static_cast<char*>(memory);
  const auto take = [&](auto& array) {
    array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(at);
    at += count * static_cast<int64_t>(sizeof *array);
  };
  take(groups.left);
  take(groups.right);
  take(groups.out);
  take(groups.left_stride);
  take(groups.right_stride);
  take(groups.out_stride);
  take(groups.sizes);
  groups.count = count;
  return groups;
}

bool is_size(int64_t size) { return size > 0 && size % kAlignment == 0 && size <= kMostRows; }

bool is_stride(int64_t stride, int64_t width) { return stride >= width && stride % kAlignment == 0; }

bool are_operands(const Operands& operands, int64_t experts, int dtype) {
  return (dtype == 1 || dtype == 2) && experts >= 1 && experts <= kMostExperts && operands.ends != nullptr &&
         operands.rows >= 1 && operands.rows <= kMostRows && is_size(operands.inner) && is_size(operands.columns) &&
         is_aligned(operands.left, 16) && is_aligned(operands.right, 16) && is_aligned(operands.out, 16);
}

int run(Form form, const Operands& operands, int64_t experts, int dtype, void* workspace, int64_t bytes,
        void* stream) {
  const int64_t arrays = bytes_of_arrays(experts);
  if (!is_aligned(workspace, kWorkspaceAlignment) || bytes < arrays) return kInvalidValue;
  int major = 0;
  if (const int error = capability(&major)) return error;
  if (major < 8) return kInvalidValue;
  const Groups groups = groups_in(workspace, experts);
  if (const int error = prepare(form == Form::kOuter, operands, groups, stream)) return error;
  const auto unit = major == 9 ? run_sm90 : run_sm80;
  return unit(form, dtype, groups, static_cast<char*>(workspace) + arrays, bytes - arrays, stream);
}

}  // namespace
}  // namespace grouped
}  // namespace dsp

// -- the C ABI ------------------------------------------------------------------------------------------------------
//
// Dtypes are numbered as in formats.cuh. All memory is the current device's. Each answers the driver's error code, 0 for
// none, 1 for what is not served.

// How many bytes a product of so many experts works in, on the current device; they begin at a multiple of 64.
DSP_EXPORT int dsp_grouped_workspace(int64_t experts, int64_t* bytes) {
  using namespace dsp::grouped;
  if (experts < 1 || experts > kMostExperts || bytes == nullptr) return dsp::kInvalidValue;
  int major = 0;
  if (const int error = dsp::capability(&major)) return error;
  if (major < 8) return dsp::kInvalidValue;
  int64_t own = 0;
  if (const int error = major == 9 ? run_sm90_workspace(&own) : run_sm80_workspace(&own)) return error;
  *bytes = bytes_of_arrays(experts) + own;
  return 0;
}

// x[rows, inner] by rows, `x_stride` values apart, and weight[experts, inner, columns] with strides of its three
// dimensions, the second or the third 1; out[rows, columns], without gaps. ends[experts] are int32.
DSP_EXPORT int dsp_grouped_product(const void* x, int64_t x_stride, const void* weight, int64_t matrix_stride,
                                   int64_t row_stride, int64_t column_stride, const void* ends, void* out, int64_t rows,
                                   int64_t inner, int64_t columns, int64_t experts, int dtype, void* workspace,
                                   int64_t bytes, void* stream) {
  using namespace dsp::grouped;
  const bool is_by_rows = column_stride == 1;
  const int64_t right_stride = is_by_rows ? row_stride : column_stride;
  const Operands operands{static_cast<const char*>(x), static_cast<const char*>(weight), static_cast<char*>(out),
                          x_stride, right_stride, matrix_stride, rows, inner, columns,
                          static_cast<const int32_t*>(ends)};
  if (!are_operands(operands, experts, dtype) || !is_stride(x_stride, inner)) return dsp::kInvalidValue;
  if (!is_by_rows && row_stride != 1) return dsp::kInvalidValue;
  if (!is_stride(right_stride, is_by_rows ? columns : inner) || matrix_stride < 0 || matrix_stride % kAlignment)
    return dsp::kInvalidValue;
  return run(is_by_rows ? Form::kRows : Form::kColumns, operands, experts, dtype, workspace, bytes, stream);
}

// x[rows, inner] and grad[rows, columns] by rows, so many values apart; out[experts, inner, columns], without gaps.
DSP_EXPORT int dsp_grouped_outer(const void* x, int64_t x_stride, const void* grad, int64_t grad_stride,
                                 const void* ends, void* out, int64_t rows, int64_t inner, int64_t columns,
                                 int64_t experts, int dtype, void* workspace, int64_t bytes, void* stream) {
  using namespace dsp::grouped;
  const Operands operands{static_cast<const char*>(x), static_cast<const char*>(grad), static_cast<char*>(out),
                          x_stride, grad_stride, 0, rows, inner, columns, static_cast<const int32_t*>(ends)};
  if (!are_operands(operands, experts, dtype) || !is_stride(x_stride, inner) || !is_stride(grad_stride, columns))
    return dsp::kInvalidValue;
  return run(Form::kOuter, operands, experts, dtype, workspace, bytes, stream);
}
