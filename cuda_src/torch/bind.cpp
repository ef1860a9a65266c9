// The operators of runtime/quantise.py, few_bits.py, experts.py and adamw.py answered by a kernel library, through torch's
// stable ABI.
//
// One binding serves every torch from TORCH_TARGET_VERSION on. Schemas are Python's (runtime/operators.py); this file
// says only who answers for CUDA, which ROCm's builds of torch call by the same name. The kernel library is found at
// run time, by dsp_bind, so that the binding is built without a GPU's compiler. With DSP_EMULATED the binding is for
// the CPU and the library is an emulator: so the path from torch's dispatcher to a kernel is tested without a GPU.
//
// Arguments are checked here: a kernel would read and write outside of what it was given.
#include <dlfcn.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Kernels {
  int (*quantise_bucket)(const void* const*, const int64_t*, const int64_t*, const int*, int64_t, int64_t, int64_t,
                         void*, void*, int64_t, int, void*);
  int (*dequantise_bucket)(const void*, const void*, void* const*, const int64_t*, int64_t, int64_t, int, int64_t, int,
                           void*);
  int (*dequantise_sum)(const void*, const void*, void* const*, const int64_t*, int64_t, int64_t, float, int, int64_t,
                        int, void*);
  int (*quantised_linear)(const void*, const void*, const void*, const void*, void*, int64_t, int64_t, int64_t, int64_t,
                          int, int, void*);
  int (*sort_experts_space)(int64_t, int64_t, int64_t*);
  int (*sort_experts)(const void*, int, int64_t, int64_t, void*, void*, void*, void*);
  int (*spread_experts)(const void*, const void*, const void*, int, void*, int64_t, int64_t, int64_t, int, void*);
  int (*unpermute_experts)(const void*, const void*, const void*, int, void*, int64_t, int64_t, int64_t, int, void*);
  int (*adamw)(void* const*, const void* const*, void* const*, void* const*, const int64_t*, const int*, const int*,
               int64_t, int64_t, double, double, double, double, double, int, int64_t, void*);
  int (*adamw_8bit)(void* const*, const void* const*, void* const*, void* const*, void* const*, void* const*,
                    const int64_t*, const int*, const int*, int64_t, int64_t, double, double, double, double, double, int,
                    int64_t, void*);
};
Kernels kernels;
std::string bind_error;

// -- where a call runs ----------------------------------------------------------------------------------------------

#ifdef DSP_EMULATED
struct Device {
  explicit Device(const Tensor&) {}
  void* stream() const { return nullptr; }
};
#else
// torch's libraries are loaded where the linker does not look: the function is taken from the one that is there.
using CurrentStream = AOTITorchError (*)(int32_t, void**);
CurrentStream find_current_stream() {
  for (const char* name : {"libtorch_cuda.so", "libtorch_hip.so"}) {
    if (void* library = dlopen(name, RTLD_NOW | RTLD_NOLOAD))
      return reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }
  return nullptr;
}

// The tensor's device is the current one as long as this lives.
struct Device {
  int32_t index;
  torch::stable::accelerator::DeviceGuard guard;

  explicit Device(const Tensor& tensor) : index(tensor.get_device_index()), guard(index) {}
  void* stream() const {
    static const CurrentStream current = find_current_stream();
    STD_TORCH_CHECK(current != nullptr, "this torch has neither CUDA nor ROCm: its current stream cannot be found");
    void* found = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(current(index, &found));
    return found;
  }
};
#endif

// -- arguments ------------------------------------------------------------------------------------------------------

struct Format {
  const char* name;
  int bits;
};
constexpr Format kFormats[] = {{"int8", 8}, {"int4", 4}, {"fp8_e4m3", 8}, {"fp8_e5m2", 8}, {"fp6_e3m2", 6}};

int format_code(const std::string& name) {
  for (int i = 0; i < 5; ++i)
    if (name == kFormats[i].name) return i;
  STD_TORCH_CHECK(false, "there is no format '", name, "': take one of int8, int4, fp8_e4m3, fp8_e5m2, fp6_e3m2.");
  return -1;
}

int dtype_code(ScalarType dtype) {
  if (dtype == ScalarType::Float) return 0;
  if (dtype == ScalarType::Half) return 1;
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16,
                  "a tensor of another dtype cannot be quantised: fp32, fp16 and bf16 can.");
  return 2;
}

void check_block(int64_t block) {
  STD_TORCH_CHECK(block >= 16 && block % 16 == 0, "a block of ", block,
                  " values cannot be: take a multiple of 16, such as 256.");
}

void check_device(const Tensor& tensor, const Tensor& first) {
  STD_TORCH_CHECK(tensor.device() == first.device(), "all tensors of a bucket are on one device, and these are not.");
}

void check_launch(int error) {
  STD_TORCH_CHECK(error == 0, "a kernel of dspass could not be launched: the driver answered ", error, ".");
}

int64_t blocks_of(int64_t values, int64_t block) { return (values + block - 1) / block; }

int64_t row_blocks_of(const std::vector<int64_t>& sizes, int64_t block) {
  int64_t blocks = 0;
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(size >= 0, "a tensor of a bucket has ", size, " values a chunk: it has none at least.");
    blocks += blocks_of(size, block);
  }
  return blocks;
}

// Codes and scales of `blocks` blocks in all.
void check_codes(const Tensor& codes, const Tensor& scales, int64_t blocks, int format, int64_t block) {
  check_block(block);
  check_device(scales, codes);
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte && scales.scalar_type() == ScalarType::Float,
                  "codes are uint8 and scales are fp32.");
  const int64_t bytes = blocks * (block * kFormats[format].bits / 8);
  STD_TORCH_CHECK(codes.numel() == bytes && scales.numel() == blocks, blocks, " blocks have ", bytes,
                  " bytes of codes and ", blocks, " scales, and these are ", codes.numel(), " and ", scales.numel(),
                  ".");
}

std::vector<void*> addresses_of(const std::vector<Tensor>& tensors) {
  std::vector<void*> found;
  for (const Tensor& tensor : tensors) found.push_back(tensor.data_ptr());
  return found;
}

// -- operators ------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> quantise_into(const std::vector<Tensor>& tensors, const std::vector<int64_t>& sizes,
                                         int64_t chunks, int64_t nodes, const std::string& format, int64_t block,
                                         const std::vector<int64_t>& code_shape,
                                         const std::vector<int64_t>& scale_shape) {
  std::vector<Tensor> contiguous;
  std::vector<int64_t> values;
  std::vector<int> dtypes;
  for (const Tensor& tensor : tensors) {
    check_device(tensor, tensors[0]);
    contiguous.push_back(torch::stable::contiguous(tensor));
    values.push_back(tensor.numel());
    dtypes.push_back(dtype_code(tensor.scalar_type()));
  }
  const Device device(tensors[0]);
  Tensor codes = torch::stable::new_empty(tensors[0], code_shape, ScalarType::Byte);
  Tensor scales = torch::stable::new_empty(tensors[0], scale_shape, ScalarType::Float);
  check_launch(kernels.quantise_bucket(addresses_of(contiguous).data(), values.data(), sizes.data(), dtypes.data(),
                                       static_cast<int64_t>(tensors.size()), chunks, nodes, codes.data_ptr(),
                                       scales.data_ptr(), block, format_code(format), device.stream()));
  return {codes, scales};
}

std::tuple<Tensor, Tensor> quantise(const Tensor& x, const std::string& format, int64_t block) {
  check_block(block);
  const int64_t blocks = blocks_of(x.numel(), block);
  const int64_t bytes = block * kFormats[format_code(format)].bits / 8;
  return quantise_into({x}, {x.numel()}, 1, 1, format, block, {blocks, bytes}, {blocks});
}

std::tuple<Tensor, Tensor> quantise_bucket(const std::vector<Tensor>& tensors, const std::vector<int64_t>& sizes,
                                           int64_t chunks, const std::string& format, int64_t block, int64_t nodes) {
  check_block(block);
  STD_TORCH_CHECK(!tensors.empty() && tensors.size() == sizes.size(),
                  "a bucket has a size for each of its tensors, one at least, and these are ", tensors.size(), " and ",
                  sizes.size(), ".");
  STD_TORCH_CHECK(chunks >= 0 && nodes >= 1 && chunks % nodes == 0, nodes, " nodes do not divide ", chunks, " chunks.");
  for (size_t i = 0; i < tensors.size(); ++i)
    STD_TORCH_CHECK(tensors[i].numel() <= chunks * sizes[i], "a tensor of ", tensors[i].numel(),
                    " values does not go into ", chunks, " chunks of ", sizes[i], ": make them larger.");
  const int64_t blocks = row_blocks_of(sizes, block);
  const int64_t bytes = block * kFormats[format_code(format)].bits / 8;
  return quantise_into(tensors, sizes, chunks, nodes, format, block, {chunks, blocks * bytes}, {chunks, blocks});
}

Tensor dequantise(const Tensor& codes, const Tensor& scales, const std::vector<int64_t>& shape,
                  const std::string& format, ScalarType dtype) {
  const int code = format_code(format);
  STD_TORCH_CHECK(codes.dim() == 2, "codes have a row a block, and these have ", codes.dim(), " dimensions.");
  const int64_t block = codes.size(1) * 8 / kFormats[code].bits;
  check_codes(codes, scales, codes.size(0), code, block);
  const Device device(codes);
  Tensor values = torch::stable::new_empty(codes, shape, dtype);
  STD_TORCH_CHECK(values.numel() <= codes.size(0) * block, "a tensor of ", values.numel(), " values has more than the ",
                  codes.size(0), " blocks of ", block, " that are given.");
  const Tensor from = torch::stable::contiguous(codes), by = torch::stable::contiguous(scales);
  const int64_t size = values.numel();
  void* const data = values.data_ptr();
  check_launch(kernels.dequantise_bucket(from.data_ptr(), by.data_ptr(), &data, &size, 1, 1, dtype_code(dtype), block,
                                         code, device.stream()));
  return values;
}

std::vector<Tensor> dequantise_bucket(const Tensor& codes, const Tensor& scales, const std::vector<int64_t>& sizes,
                                      const std::string& format, int64_t block, ScalarType dtype) {
  const int code = format_code(format);
  check_block(block);
  STD_TORCH_CHECK(codes.dim() == 2, "codes of a bucket have a row a chunk, and these have ", codes.dim(),
                  " dimensions.");
  const int64_t chunks = codes.size(0);
  check_codes(codes, scales, chunks * row_blocks_of(sizes, block), code, block);
  const Device device(codes);
  std::vector<Tensor> values;
  for (const int64_t size : sizes) values.push_back(torch::stable::new_empty(codes, {chunks, size}, dtype));
  const Tensor from = torch::stable::contiguous(codes), by = torch::stable::contiguous(scales);
  check_launch(kernels.dequantise_bucket(from.data_ptr(), by.data_ptr(), addresses_of(values).data(), sizes.data(),
                                         static_cast<int64_t>(sizes.size()), chunks, dtype_code(dtype), block, code,
                                         device.stream()));
  return values;
}

std::vector<Tensor> dequantise_sum(const Tensor& codes, const Tensor& scales, const std::vector<int64_t>& sizes,
                                   const std::string& format, int64_t block, double factor, ScalarType dtype) {
  const int code = format_code(format);
  check_block(block);
  STD_TORCH_CHECK(codes.dim() == 2 && codes.size(0) >= 1, "codes of a bucket have a row a chunk, one at least.");
  const int64_t chunks = codes.size(0);
  check_codes(codes, scales, chunks * row_blocks_of(sizes, block), code, block);
  const Device device(codes);
  std::vector<Tensor> values;
  for (const int64_t size : sizes) values.push_back(torch::stable::new_empty(codes, {size}, dtype));
  const Tensor from = torch::stable::contiguous(codes), by = torch::stable::contiguous(scales);
  check_launch(kernels.dequantise_sum(from.data_ptr(), by.data_ptr(), addresses_of(values).data(), sizes.data(),
                                      static_cast<int64_t>(sizes.size()), chunks, static_cast<float>(factor),
                                      dtype_code(dtype), block, code, device.stream()));
  return values;
}

// -- weights in few bits ---------------------------------------------------------------------------------------------

constexpr int64_t kMostRows = 16;  // runtime/few_bits.py

int product_dtype_code(ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  "x of another dtype cannot be multiplied: fp32, fp16 and bf16 can.");
  return dtype_code(dtype);
}

// Columns that share a scale, of rows of codes and scales, which are the last dimension of either.
int64_t check_rows(const Tensor& codes, const Tensor& scales, int64_t columns, int format) {
  const int64_t dims = codes.dim();
  STD_TORCH_CHECK(dims >= 1 && scales.dim() == dims, "rows of codes and of scales go together, and these have ", dims,
                  " and ", scales.dim(), " dimensions.");
  for (int64_t i = 0; i + 1 < dims; ++i)
    STD_TORCH_CHECK(codes.size(i) == scales.size(i), "rows of codes and of scales go together, and these are ",
                    codes.size(i), " and ", scales.size(i), ".");
  const int64_t groups = scales.size(dims - 1);
  STD_TORCH_CHECK(groups >= 1, "a row of codes has a scale at least, and these have none.");
  const int64_t group = codes.size(dims - 1) * 8 / kFormats[format].bits / groups;
  check_codes(codes, scales, scales.numel(), format, group);
  STD_TORCH_CHECK(blocks_of(columns, group) == groups, "a row of ", columns, " columns has not ", groups, " groups of ",
                  group, ".");
  return group;
}

Tensor dequantise_rows(const Tensor& codes, const Tensor& scales, int64_t columns, const std::string& format,
                       ScalarType dtype) {
  const int code = format_code(format);
  const int64_t group = check_rows(codes, scales, columns, code);
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < codes.dim(); ++i) shape.push_back(codes.size(i));
  shape.push_back(columns);
  const Device device(codes);
  Tensor values = torch::stable::new_empty(codes, shape, dtype);
  const Tensor from = torch::stable::contiguous(codes), by = torch::stable::contiguous(scales);
  void* const data = values.data_ptr();
  // A row is a chunk of a bucket of one tensor: what fills up its last group is left out.
  check_launch(kernels.dequantise_bucket(from.data_ptr(), by.data_ptr(), &data, &columns, 1, values.numel() / columns,
                                         dtype_code(dtype), group, code, device.stream()));
  return values;
}

// Contiguous, and where 16 bytes can be read at a time.
Tensor aligned(const Tensor& tensor) {
  const Tensor found = torch::stable::contiguous(tensor);
  return reinterpret_cast<uintptr_t>(found.data_ptr()) % 16 == 0 ? found : torch::stable::clone(found);
}

Tensor few_rows_linear(const Tensor& x, const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& bias,
                       const std::string& format) {
  const int code = format_code(format);
  STD_TORCH_CHECK(x.dim() == 2 && codes.dim() == 2, "a product is of two matrices, and these have ", x.dim(), " and ",
                  codes.dim(), " dimensions.");
  const int64_t rows = x.size(0), columns = x.size(1), outputs = codes.size(0);
  STD_TORCH_CHECK(rows <= kMostRows, "x of ", rows, " rows is not for few_rows_linear, which takes ", kMostRows,
                  ": call quantised_linear.");
  STD_TORCH_CHECK(codes.device() == x.device(), "x and the weight are on one device, and these are not.");
  const int dtype = product_dtype_code(x.scalar_type());
  const int64_t group = check_rows(codes, scales, columns, code);
  std::optional<Tensor> plus;
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == outputs && bias->scalar_type() == x.scalar_type() &&
                        bias->device() == x.device(),
                    "a bias is of x's dtype and device, a value for each of ", outputs, " rows of the weight.");
    plus = torch::stable::contiguous(*bias);
  }
  const Device device(x);
  Tensor out = torch::stable::new_empty(x, {rows, outputs});
  if (rows == 0 || outputs == 0) return out;
  const int64_t missing = blocks_of(columns, 16) * 16 - columns;
  const Tensor left = aligned(missing == 0 ? x : torch::stable::pad(x, {0, missing}));
  const Tensor from = aligned(codes), by = torch::stable::contiguous(scales);
  check_launch(kernels.quantised_linear(left.data_ptr(), from.data_ptr(), by.data_ptr(),
                                        plus ? plus->data_ptr() : nullptr, out.data_ptr(), rows, outputs, columns, group,
                                        dtype, code, device.stream()));
  return out;
}

// -- experts --------------------------------------------------------------------------------------------------------

constexpr int64_t kMostExperts = 8192;  // runtime/experts.py

int row_dtype_code(ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  "rows of another dtype do not go to experts: fp32, fp16 and bf16 do.");
  return dtype_code(dtype);
}

void check_same_device(const Tensor& tensor, const Tensor& first) {
  STD_TORCH_CHECK(tensor.device() == first.device(), "tokens, their experts and weights are on one device.");
}

// Positions [tokens, top_k], and weights of the same shape where there are any.
void check_positions(const Tensor& positions, const std::optional<Tensor>& weights, const Tensor& values) {
  STD_TORCH_CHECK(positions.scalar_type() == ScalarType::Int && positions.dim() == 2,
                  "positions are those of permute_experts, int32[tokens, top_k].");
  check_same_device(positions, values);
  if (!weights) return;
  check_same_device(*weights, values);
  STD_TORCH_CHECK(weights->dim() == 2 && weights->size(0) == positions.size(0) && weights->size(1) == positions.size(1),
                  "there is a weight for each position, and the shapes differ.");
}

using MoveRows = decltype(Kernels::spread_experts);

void move_rows(MoveRows move, const Tensor& from, const Tensor& positions, const std::optional<Tensor>& weights,
               Tensor& to) {
  const Tensor values = torch::stable::contiguous(from), places = torch::stable::contiguous(positions);
  std::optional<Tensor> by;
  if (weights) by = torch::stable::contiguous(*weights);
  const Device device(from);
  check_launch(move(values.data_ptr(), places.data_ptr(), by ? by->data_ptr() : nullptr,
                    by ? row_dtype_code(by->scalar_type()) : 0, to.data_ptr(), positions.size(0), positions.size(1),
                    from.size(1), row_dtype_code(from.scalar_type()), device.stream()));
}

Tensor spread_experts(const Tensor& x, const Tensor& positions, const std::optional<Tensor>& weights) {
  check_positions(positions, weights, x);
  row_dtype_code(x.scalar_type());
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == positions.size(0), "tokens [tokens, hidden] have positions ",
                  "[tokens, top_k], and there are ", positions.size(0), " of them.");
  Tensor rows = torch::stable::new_empty(x, {positions.numel(), x.size(1)});
  move_rows(kernels.spread_experts, x, positions, weights, rows);
  return rows;
}

Tensor unpermute_experts(const Tensor& rows, const Tensor& positions, const std::optional<Tensor>& weights) {
  check_positions(positions, weights, rows);
  row_dtype_code(rows.scalar_type());
  STD_TORCH_CHECK(rows.dim() == 2 && rows.size(0) == positions.numel(), "there is a row [rows, hidden] for each of ",
                  positions.numel(), " positions.");
  Tensor x = torch::stable::new_empty(rows, {positions.size(0), rows.size(1)});
  move_rows(kernels.unpermute_experts, rows, positions, weights, x);
  return x;
}

std::tuple<Tensor, Tensor, Tensor> permute_experts(const Tensor& x, const Tensor& experts, int64_t num_experts) {
  row_dtype_code(x.scalar_type());
  STD_TORCH_CHECK(x.dim() == 2 && experts.dim() == 2 && x.size(0) == experts.size(0),
                  "tokens [tokens, hidden] have experts [tokens, top_k].");
  check_same_device(experts, x);
  const bool is_wide = experts.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(is_wide || experts.scalar_type() == ScalarType::Int,
                  "experts of another dtype cannot be: take their numbers as int32 or int64.");
  STD_TORCH_CHECK(num_experts >= 1 && num_experts <= kMostExperts, num_experts, " experts cannot be: take 1 to ",
                  kMostExperts, ".");
  const int64_t count = experts.numel();
  STD_TORCH_CHECK(count <= 0x7fffffff, count, " assignments are more than the 2**31 - 1 rows of a grouped product: ",
                  "divide the tokens.");
  const Tensor ids = torch::stable::contiguous(experts);
  Tensor positions = torch::stable::new_empty(ids, {experts.size(0), experts.size(1)}, ScalarType::Int);
  Tensor ends = torch::stable::new_empty(ids, {num_experts}, ScalarType::Int);
  int64_t values = 0;
  check_launch(kernels.sort_experts_space(count, num_experts, &values));
  Tensor space = torch::stable::new_empty(ids, {values}, ScalarType::Int);
  {
    const Device device(x);
    check_launch(kernels.sort_experts(ids.data_ptr(), is_wide, count, num_experts, space.data_ptr(),
                                      positions.data_ptr(), ends.data_ptr(), device.stream()));
  }
  return {spread_experts(x, positions, std::nullopt), positions, ends};
}

// -- AdamW ----------------------------------------------------------------------------------------------------------

constexpr int64_t kStateBlock = 256;  // runtime/adamw.py

int stepped_dtype_code(ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
                  "a tensor of another dtype cannot be stepped: take fp32 or bf16, gradients too.");
  return dtype_code(dtype);
}

bool have_one_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) != b.size(i)) return false;
  return true;
}

double check_numbers(int64_t step, const Tensor& lr, double beta1, double beta2) {
  STD_TORCH_CHECK(step >= 1, "step ", step, " cannot be: the first one is 1.");
  STD_TORCH_CHECK(beta1 >= 0 && beta1 < 1 && beta2 >= 0 && beta2 < 1, "betas of ", beta1, " and ", beta2,
                  " cannot be: each is at least 0 and below 1.");
  const bool is_double = lr.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(lr.is_cpu() && lr.dim() == 0 && (is_double || lr.scalar_type() == ScalarType::Float),
                  "lr cannot be: take one number, fp32 or fp64, on the CPU.");
  return is_double ? *static_cast<const double*>(lr.data_ptr()) : *static_cast<const float*>(lr.data_ptr());
}

// Parameters and gradients as a kernel takes them; gradients live as long as this.
struct Stepped {
  std::vector<Tensor> contiguous;
  std::vector<int64_t> values;
  std::vector<int> param_dtypes, grad_dtypes;

  Stepped(const std::vector<Tensor>& params, const std::vector<Tensor>& grads) {
    for (size_t i = 0; i < params.size(); ++i) {
      check(params[i], params[0]);
      STD_TORCH_CHECK(grads[i].device() == params[0].device(), "all tensors of a step are on one device.");
      STD_TORCH_CHECK(have_one_shape(grads[i], params[i]),
                      "shapes differ: a parameter, its gradient and its states have one.");
      contiguous.push_back(torch::stable::contiguous(grads[i]));
      values.push_back(params[i].numel());
      param_dtypes.push_back(stepped_dtype_code(params[i].scalar_type()));
      grad_dtypes.push_back(stepped_dtype_code(grads[i].scalar_type()));
    }
  }

  // What is written to, in place.
  static void check(const Tensor& tensor, const Tensor& first) {
    STD_TORCH_CHECK(tensor.device() == first.device(), "all tensors of a step are on one device.");
    STD_TORCH_CHECK(tensor.is_contiguous(), "a parameter, or a state of it, is not contiguous: make it so first.");
  }
};

void adamw(const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const std::vector<Tensor>& exp_avgs,
           const std::vector<Tensor>& exp_avg_sqs, int64_t step, const Tensor& lr, double beta1, double beta2,
           double eps, double weight_decay, std::optional<int64_t> seed) {
  const size_t count = params.size();
  STD_TORCH_CHECK(grads.size() == count && exp_avgs.size() == count && exp_avg_sqs.size() == count,
                  "lists do not go together: take a gradient and two states a parameter.");
  const double rate = check_numbers(step, lr, beta1, beta2);
  if (count == 0) return;
  const Stepped stepped(params, grads);
  for (size_t i = 0; i < count; ++i) {
    for (const Tensor* state : {&exp_avgs[i], &exp_avg_sqs[i]}) {
      STD_TORCH_CHECK(have_one_shape(*state, params[i]),
                      "shapes differ: a parameter, its gradient and its states have one.");
      Stepped::check(*state, params[0]);
      STD_TORCH_CHECK(state->scalar_type() == ScalarType::Float, "states are of fp32.");
    }
  }
  const Device device(params[0]);
  check_launch(kernels.adamw(addresses_of(params).data(), addresses_of(stepped.contiguous).data(),
                             addresses_of(exp_avgs).data(), addresses_of(exp_avg_sqs).data(), stepped.values.data(),
                             stepped.param_dtypes.data(), stepped.grad_dtypes.data(), static_cast<int64_t>(count), step,
                             rate, beta1, beta2, eps, weight_decay, seed.has_value(), seed.value_or(0),
                             device.stream()));
}

void adamw_8bit(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_scales,
                const std::vector<Tensor>& exp_avg_sqs, const std::vector<Tensor>& exp_avg_sq_scales, int64_t step,
                const Tensor& lr, double beta1, double beta2, double eps, double weight_decay,
                std::optional<int64_t> seed) {
  const size_t count = params.size();
  for (const auto* list : {&grads, &exp_avgs, &exp_avg_scales, &exp_avg_sqs, &exp_avg_sq_scales})
    STD_TORCH_CHECK(list->size() == count,
                    "lists do not go together: take a gradient and codes and scales of two states a parameter.");
  const double rate = check_numbers(step, lr, beta1, beta2);
  if (count == 0) return;
  const Stepped stepped(params, grads);
  for (size_t i = 0; i < count; ++i) {
    const int64_t blocks = blocks_of(params[i].numel(), kStateBlock);
    for (const Tensor* codes : {&exp_avgs[i], &exp_avg_sqs[i]}) {
      Stepped::check(*codes, params[0]);
      STD_TORCH_CHECK(codes->scalar_type() == ScalarType::Byte && codes->dim() == 2 && codes->size(0) == blocks &&
                          codes->size(1) == kStateBlock,
                      "codes of a state are those of states_of_8_bits, uint8[blocks, 256].");
    }
    for (const Tensor* scales : {&exp_avg_scales[i], &exp_avg_sq_scales[i]}) {
      Stepped::check(*scales, params[0]);
      STD_TORCH_CHECK(scales->scalar_type() == ScalarType::Float && scales->dim() == 1 && scales->size(0) == blocks,
                      "scales of a state are those of states_of_8_bits, float32[blocks].");
    }
  }
  const Device device(params[0]);
  check_launch(kernels.adamw_8bit(
      addresses_of(params).data(), addresses_of(stepped.contiguous).data(), addresses_of(exp_avgs).data(),
      addresses_of(exp_avg_scales).data(), addresses_of(exp_avg_sqs).data(), addresses_of(exp_avg_sq_scales).data(),
      stepped.values.data(), stepped.param_dtypes.data(), stepped.grad_dtypes.data(), static_cast<int64_t>(count), step,
      rate, beta1, beta2, eps, weight_decay, seed.has_value(), seed.value_or(0), device.stream()));
}

template <class Function>
bool take(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (!function) bind_error = std::string("it has no ") + name;
  return function != nullptr;
}

}  // namespace

// Which kernel library answers: null, or why it cannot. To be called once, before the first operator is.
extern "C" __attribute__((visibility("default"))) const char* dsp_bind(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    bind_error = dlerror();
    return bind_error.c_str();
  }
  const bool is_whole = take(library, "dsp_quantise_bucket", kernels.quantise_bucket) &&
                        take(library, "dsp_dequantise_bucket", kernels.dequantise_bucket) &&
                        take(library, "dsp_dequantise_sum", kernels.dequantise_sum) &&
                        take(library, "dsp_quantised_linear", kernels.quantised_linear) &&
                        take(library, "dsp_sort_experts_space", kernels.sort_experts_space) &&
                        take(library, "dsp_sort_experts", kernels.sort_experts) &&
                        take(library, "dsp_spread_experts", kernels.spread_experts) &&
                        take(library, "dsp_unpermute_experts", kernels.unpermute_experts) &&
                        take(library, "dsp_adamw", kernels.adamw) &&
                        take(library, "dsp_adamw_8bit", kernels.adamw_8bit);
  return is_whole ? nullptr : bind_error.c_str();
}

#ifdef DSP_EMULATED
STABLE_TORCH_LIBRARY_IMPL(dspass, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(dspass, CUDA, m) {
#endif
  m.impl("quantise", TORCH_BOX(&quantise));
  m.impl("dequantise", TORCH_BOX(&dequantise));
  m.impl("quantise_bucket", TORCH_BOX(&quantise_bucket));
  m.impl("dequantise_bucket", TORCH_BOX(&dequantise_bucket));
  m.impl("dequantise_sum", TORCH_BOX(&dequantise_sum));
  m.impl("dequantise_rows", TORCH_BOX(&dequantise_rows));
  m.impl("few_rows_linear", TORCH_BOX(&few_rows_linear));
  m.impl("permute_experts", TORCH_BOX(&permute_experts));
  m.impl("spread_experts", TORCH_BOX(&spread_experts));
  m.impl("unpermute_experts", TORCH_BOX(&unpermute_experts));
  m.impl("adamw_", TORCH_BOX(&adamw));
  m.impl("adamw_8bit_", TORCH_BOX(&adamw_8bit));
}
