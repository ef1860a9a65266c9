// Products of fp16 or bf16 with int8 or int4 for sm_90a, by CUTLASS's kernels of its third version: what is in few bits
// comes by TMA, becomes fp32 in registers, is scaled there, rounded to the other operand's dtype, and multiplied by wgmma.
// So a weight is the one that dequantise_rows answers (runtime/few_bits.py).
//
// wgmma takes its left operand alone from registers: what is computed is the transpose, codes times x, which is written
// by columns. Codes of int4 are CUTLASS's as they are: signed, the first of two in the low half of a byte. Nothing was
// tuned, for nothing has run.
#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "mixed.h"
#include "status.h"

namespace dsp {
namespace mixed {
namespace {

using ByRows = cutlass::layout::RowMajor;
using ByColumns = cutlass::layout::ColumnMajor;

using BlockTile = cute::Shape<cute::_128, cute::_64, cute::Int<kGroup>>;
using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
using Sizes = cute::Shape<int, int, int, int>;

template <class Code, class Value>
struct Product {
  static constexpr int kBits = cutlass::sizeof_bits<Code>::value;
  static constexpr int kCodeAlignment = 128 / kBits;

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, BlockTile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, ByColumns, kAlignment, Value, ByColumns,
      kAlignment, cutlass::epilogue::TmaWarpSpecializedCooperative>::CollectiveOp;
  using Stages = cutlass::gemm::collective::StageCountAutoCarveout<sizeof(typename Epilogue::SharedStorage)>;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, cute::tuple<Code, float>, ByRows, kCodeAlignment, Value,
      ByColumns, kAlignment, float, BlockTile, Cluster, Stages,
      cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Sizes, Mainloop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static int multiply(const Operands& operands, void* stream) {
    typename Gemm::Arguments own{};
    own.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    own.problem_shape = {static_cast<int>(operands.columns), static_cast<int>(operands.rows),
                         static_cast<int>(operands.inner), 1};
    own.mainloop.ptr_A = static_cast<const Code*>(operands.codes);
    own.mainloop.dA = {operands.code_stride * 8 / kBits, cute::_1{}, 0};
    own.mainloop.ptr_B = static_cast<const Value*>(operands.x);
    own.mainloop.dB = {operands.x_stride, cute::_1{}, 0};
    own.mainloop.ptr_S = operands.scales;
    own.mainloop.dS = {cute::_1{}, operands.columns, 0};
    own.mainloop.group_size = static_cast<int>(operands.group < operands.inner ? operands.group : operands.inner);
    own.epilogue.thread.alpha = 1.f;
    own.epilogue.thread.beta = 0.f;
    own.epilogue.ptr_D = static_cast<Value*>(operands.out);
    own.epilogue.dD = {cute::_1{}, operands.columns, 0};
    if (const cudaError_t error = cudaGetDevice(&own.hw_info.device_id)) return error;
    if (const cudaError_t error =
            cudaDeviceGetAttribute(&own.hw_info.sm_count, cudaDevAttrMultiProcessorCount, own.hw_info.device_id))
      return error;
    if (const int error = error_of(Gemm::can_implement(own))) return error;
    if (Gemm::get_workspace_size(own) != 0) return kUnknown;
    Gemm gemm;
    const auto on = static_cast<cudaStream_t>(stream);
    if (const int error = error_of(gemm.initialize(own, nullptr, on))) return error;
    return error_of(gemm.run(on));
  }
};

template <class Code>
int multiply(int dtype, const Operands& operands, void* stream) {
  if (dtype == 1) return Product<Code, cutlass::half_t>::multiply(operands, stream);
  if (dtype == 2) return Product<Code, cutlass::bfloat16_t>::multiply(operands, stream);
  return kInvalid;
}

}  // namespace

int run_sm90(int format, int dtype, const Operands& operands, void* stream) {
  if (format == 0) return multiply<int8_t>(dtype, operands, stream);
  if (format == 1) return multiply<cutlass::int4b_t>(dtype, operands, stream);
  return kInvalid;
}

}  // namespace mixed
}  // namespace dsp
