// Products of fp16 or bf16 with int8 for sm_80, by CUTLASS's kernels of its second version: codes are converted in
// registers, and sums scaled by the scale of their column once, in fp32.
//
// int4 is left out: CUTLASS 4.2 has no iterator for its tiles here. Nothing was tuned, for nothing has run.
#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/default_gemm_universal_with_visitor.h>

#include <cutlass/epilogue/threadblock/fusion/visitors.hpp>  // which does not include what it needs

#include "mixed.h"
#include "status.h"

namespace dsp {
namespace mixed {
namespace {

namespace visit = cutlass::epilogue::threadblock;

using ByRows = cutlass::layout::RowMajor;
using ByColumns = cutlass::layout::ColumnMajor;

using BlockTile = cutlass::gemm::GemmShape<128, 128, 64>;
using WarpTile = cutlass::gemm::GemmShape<64, 64, 64>;
using Instruction = cutlass::gemm::GemmShape<16, 8, 16>;

template <class Value>
struct Product {
  using Threads = visit::OutputTileThreadLayout<BlockTile, WarpTile, Value, kAlignment, /*stages=*/1>;
  using Scales = visit::VisitorRowBroadcast<Threads, float, cute::Stride<cute::_0, cute::_1, int32_t>>;
  using Multiply = visit::VisitorCompute<cutlass::multiplies, float, float, cutlass::FloatRoundStyle::round_to_nearest>;
  using Scaled = visit::Sm80EVT<Multiply, visit::VisitorAccFetch, Scales>;
  using Rounded = visit::VisitorAuxStore<Threads, Value, cutlass::FloatRoundStyle::round_to_nearest,
                                         cute::Stride<int64_t, cute::_1, int64_t>>;
  using Result = visit::Sm80EVT<Rounded, Scaled>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<typename cutlass::gemm::kernel::DefaultGemmWithVisitor<
      Value, ByRows, cutlass::ComplexTransform::kNone, kAlignment,  //
      int8_t, ByColumns, cutlass::ComplexTransform::kNone, 16,      //
      Value, ByRows, kAlignment, float, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, BlockTile, WarpTile,
      Instruction, Result, cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<>, /*stages=*/4,
      cutlass::arch::OpMultiplyAddMixedInputUpcast>::GemmKernel>;

  static int multiply(const Operands& operands, void* stream) {
    const typename Result::Arguments result{
        {{}, {operands.scales, 0.f, {}}, {}},
        {static_cast<Value*>(operands.out), {operands.columns, cute::_1{}, operands.rows * operands.columns}}};
    const cutlass::gemm::GemmCoord sizes(static_cast<int>(operands.rows), static_cast<int>(operands.columns),
                                         static_cast<int>(operands.inner));
    const typename Gemm::Arguments arguments(
        cutlass::gemm::GemmUniversalMode::kGemm, sizes, /*batches=*/1, result, operands.x, operands.codes, nullptr,
        nullptr, 0, 0, 0, 0, operands.x_stride, operands.code_stride, 0, 0);
    if (const int error = error_of(Gemm::can_implement(arguments))) return error;
    if (Gemm::get_workspace_size(arguments) != 0) return kUnknown;
    Gemm gemm;
    const auto on = static_cast<cudaStream_t>(stream);
    if (const int error = error_of(gemm.initialize(arguments, nullptr, on))) return error;
    return error_of(gemm.run(on));
  }
};

}  // namespace

int run_sm80(int format, int dtype, const Operands& operands, void* stream) {
  if (format != 0 || operands.group < operands.inner) return kInvalid;
  if (dtype == 1) return Product<cutlass::half_t>::multiply(operands, stream);
  if (dtype == 2) return Product<cutlass::bfloat16_t>::multiply(operands, stream);
  return kInvalid;
}

}  // namespace mixed
}  // namespace dsp
