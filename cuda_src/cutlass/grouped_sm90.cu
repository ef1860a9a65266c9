// Grouped products for sm_90a, by CUTLASS's kernels of its third version: warps that only load, by TMA, beside warps that
// only multiply, by wgmma. Each thread block keeps TMA descriptors of its own in the workspace and changes them from one
// group to the next.
//
// Two warp groups share a tile of 128 rows. Nothing was tuned, for nothing has run.
#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "grouped.h"
#include "status.h"

namespace dsp {
namespace grouped {
namespace {

using ByRows = cutlass::layout::RowMajor;
using ByColumns = cutlass::layout::ColumnMajor;

using BlockTile = cute::Shape<cute::_128, cute::_128, cute::_64>;
using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
using Sizes = cute::Shape<int, int, int>;

template <class Value, class Left, class Right>
struct Product {
  // Without a matrix that is added: void.
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, BlockTile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, ByRows*, kAlignment, Value, ByRows*,
      kAlignment, cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative>::CollectiveOp;
  using Stages = cutlass::gemm::collective::StageCountAutoCarveout<sizeof(typename Epilogue::SharedStorage)>;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Value, Left*, kAlignment, Value, Right*, kAlignment, float,
      BlockTile, Cluster, Stages, cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cutlass::gemm::GroupProblemShape<Sizes>, Mainloop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  using Arguments = typename Gemm::Arguments;

  // A layout is one number, the other is 1 and known to the compiler: the arrays of Groups are those of CUTLASS.
  static_assert(sizeof(typename Kernel::InternalStrideA) == sizeof(int64_t));
  static_assert(sizeof(typename Kernel::InternalStrideB) == sizeof(int64_t));
  static_assert(sizeof(typename Kernel::InternalStrideD) == sizeof(int64_t));
  static_assert(sizeof(Sizes) == sizeof *Groups::sizes);

  // Of no groups where only the workspace is asked for.
  static int arguments(const Groups& groups, Arguments& found) {
    found.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
    found.problem_shape = {static_cast<int>(groups.count), reinterpret_cast<Sizes*>(groups.sizes), nullptr};
    found.mainloop.ptr_A = reinterpret_cast<const Value**>(groups.left);
    found.mainloop.dA = reinterpret_cast<typename Kernel::InternalStrideA*>(groups.left_stride);
    found.mainloop.ptr_B = reinterpret_cast<const Value**>(groups.right);
    found.mainloop.dB = reinterpret_cast<typename Kernel::InternalStrideB*>(groups.right_stride);
    found.epilogue.thread.alpha = 1.f;
    found.epilogue.thread.beta = 0.f;
    found.epilogue.ptr_D = reinterpret_cast<Value**>(groups.out);
    found.epilogue.dD = reinterpret_cast<typename Kernel::InternalStrideD*>(groups.out_stride);
    if (const cudaError_t error = cudaGetDevice(&found.hw_info.device_id)) return error;
    return cudaDeviceGetAttribute(&found.hw_info.sm_count, cudaDevAttrMultiProcessorCount, found.hw_info.device_id);
  }

  static int workspace(int64_t* bytes) {
    Arguments own{};
    if (const int error = arguments(Groups{}, own)) return error;
    const auto wanted = static_cast<int64_t>(Gemm::get_workspace_size(own));
    if (wanted > *bytes) *bytes = wanted;
    return 0;
  }

  static int multiply(const Groups& groups, void* workspace, int64_t bytes, void* stream) {
    Arguments own{};
    if (const int error = arguments(groups, own)) return error;
    if (static_cast<int64_t>(Gemm::get_workspace_size(own)) > bytes) return kInvalid;
    if (const int error = error_of(Gemm::can_implement(own))) return error;
    Gemm gemm;
    const auto on = static_cast<cudaStream_t>(stream);
    if (const int error = error_of(gemm.initialize(own, workspace, on))) return error;
    return error_of(gemm.run(on));
  }
};

template <class Value>
int multiply(Form form, const Groups& groups, void* workspace, int64_t bytes, void* stream) {
  switch (form) {
    case Form::kRows: return Product<Value, ByRows, ByRows>::multiply(groups, workspace, bytes, stream);
    case Form::kColumns: return Product<Value, ByRows, ByColumns>::multiply(groups, workspace, bytes, stream);
    case Form::kOuter: return Product<Value, ByColumns, ByRows>::multiply(groups, workspace, bytes, stream);
  }
  return kInvalid;
}

}  // namespace

int run_sm90(Form form, int dtype, const Groups& groups, void* workspace, int64_t bytes, void* stream) {
  if (dtype == 1) return multiply<cutlass::half_t>(form, groups, workspace, bytes, stream);
  if (dtype == 2) return multiply<cutlass::bfloat16_t>(form, groups, workspace, bytes, stream);
  return kInvalid;
}

// The most that one of them wants; dtypes are of one size.
int run_sm90_workspace(int64_t* bytes) {
  using Value = cutlass::bfloat16_t;
  *bytes = 0;
  if (const int error = Product<Value, ByRows, ByRows>::workspace(bytes)) return error;
  if (const int error = Product<Value, ByRows, ByColumns>::workspace(bytes)) return error;
  return Product<Value, ByColumns, ByRows>::workspace(bytes);
}

}  // namespace grouped
}  // namespace dsp
