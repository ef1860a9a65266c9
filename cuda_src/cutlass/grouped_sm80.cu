// Grouped products for sm_80, by CUTLASS's kernels of its second version, whose loads do not wait for each other
// (cp.async). One kernel goes through the tiles of all groups, as many thread blocks as the device holds at once.
//
// Tiles are what CUTLASS's own defaults for such products are; nothing was tuned, for nothing has run.
#include <cutlass/cutlass.h>

#include <cutlass/epilogue/thread/linear_combination.h>
#include <cutlass/gemm/device/gemm_grouped.h>
#include <cutlass/gemm/kernel/default_gemm_grouped.h>

#include "grouped.h"
#include "status.h"

namespace dsp {
namespace grouped {
namespace {

using ByRows = cutlass::layout::RowMajor;
using ByColumns = cutlass::layout::ColumnMajor;

template <class Value, class Left, class Right>
using Product = cutlass::gemm::device::GemmGrouped<typename cutlass::gemm::kernel::DefaultGemmGrouped<
    Value, Left, cutlass::ComplexTransform::kNone, kAlignment,   //
    Value, Right, cutlass::ComplexTransform::kNone, kAlignment,  //
    Value, ByRows, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80,
    cutlass::gemm::GemmShape<128, 128, 32>,  // of a thread block
    cutlass::gemm::GemmShape<64, 64, 32>,    // of a warp
    cutlass::gemm::GemmShape<16, 8, 16>,     // of an instruction
    cutlass::epilogue::thread::LinearCombination<Value, kAlignment, float, float,
                                                 cutlass::epilogue::thread::ScaleType::Nothing>,
    cutlass::gemm::threadblock::GemmBatchedIdentityThreadblockSwizzle, /*stages=*/4,
    cutlass::gemm::kernel::GroupScheduleMode::kDeviceOnly>::GemmKernel>;

template <class Value, class Left, class Right>
int multiply(const Groups& groups, void* stream) {
  using Gemm = Product<Value, Left, Right>;
  static_assert(sizeof(cutlass::gemm::GemmCoord) == sizeof *groups.sizes);
  const int blocks = Gemm::sufficient();
  if (blocks <= 0) return kUnknown;
  const auto left = reinterpret_cast<Value**>(const_cast<void**>(groups.left));  // which it does not write to
  const auto right = reinterpret_cast<Value**>(const_cast<void**>(groups.right));
  const auto out = reinterpret_cast<Value**>(groups.out);
  const typename Gemm::Arguments arguments(
      reinterpret_cast<cutlass::gemm::GemmCoord*>(groups.sizes), static_cast<int>(groups.count), blocks, {},
      left, right, /*added, which it is not=*/out, out, groups.left_stride, groups.right_stride, groups.out_stride,
      groups.out_stride);
  Gemm gemm;
  if (const int error = error_of(gemm.initialize(arguments))) return error;
  return error_of(gemm.run(static_cast<cudaStream_t>(stream)));
}

template <class Value>
int multiply(Form form, const Groups& groups, void* stream) {
  switch (form) {
    case Form::kRows: return multiply<Value, ByRows, ByRows>(groups, stream);
    case Form::kColumns: return multiply<Value, ByRows, ByColumns>(groups, stream);
    case Form::kOuter: return multiply<Value, ByColumns, ByRows>(groups, stream);
  }
  return kInvalid;
}

}  // namespace

int run_sm80(Form form, int dtype, const Groups& groups, void*, int64_t, void* stream) {
  if (dtype == 1) return multiply<cutlass::half_t>(form, groups, stream);
  if (dtype == 2) return multiply<cutlass::bfloat16_t>(form, groups, stream);
  return kInvalid;
}

// Thread blocks find their tiles by themselves.
int run_sm80_workspace(int64_t* bytes) {
  *bytes = 0;
  return 0;
}

}  // namespace grouped
}  // namespace dsp
