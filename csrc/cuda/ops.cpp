// torch.ops.woq.cuda_linear and cuda_dequantize, registered through PyTorch's stable ABI: one binary serves every torch from
// 2.11 on and every Python. Shapes are checked in Python (woq/backends/cuda.py), where an error can name the layer; what is
// checked here is what would otherwise read out of bounds.
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <mutex>
#include <random>

#include "decode.h"
#include "dequantize.h"
#include "plan.h"
#include "prefill.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) cudaGetLastError();  // it would come up again at the next launch
  STD_TORCH_CHECK(error == cudaSuccess, "woq: ", what, ": ", cudaGetErrorString(error));
}

// PyTorch's current stream. The function lives in libtorch_cuda, which a CPU build of torch lacks: it is looked up in the
// process instead of linked, so that the library loads, and says so, where there is no CUDA.
cudaStream_t current_stream(int device) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return library ? reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(getter != nullptr, "woq: this torch has no CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(getter(device, &stream) == 0, "woq: no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

const woq::Device& device_properties(int index) {
  static woq::Device devices[64];
  static std::once_flag once[64];
  STD_TORCH_CHECK(index >= 0 && index < 64, "woq: device index ", index);
  std::call_once(once[index], [index] {
    int major = 0, minor = 0;
    woq::Device& d = devices[index];
    check(cudaDeviceGetAttribute(&d.processors, cudaDevAttrMultiProcessorCount, index), "device properties");
    check(cudaDeviceGetAttribute(&d.shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, index), "device properties");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), "device properties");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index), "device properties");
    d.capability = 10 * major + minor;
  });
  return devices[index];
}

bool is_bf16(const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half, "woq: x must be bf16 or fp16");
  return x.scalar_type() == ScalarType::BFloat16;
}

struct Weight {
  const uint8_t *data, *scales;
  int row_groups, k_blocks, groups, scale_stride;
};

Weight check_weight(const Tensor& weight, const Tensor& scales, int64_t n, int64_t k, int64_t bits, int64_t group_size) {
  STD_TORCH_CHECK(bits == 2 || bits == 3 || bits == 4 || bits == 8, "woq: bits must be 2, 3, 4 or 8, got ", bits);
  STD_TORCH_CHECK(n > 0 && k > 0 && group_size > 0 && group_size % 32 == 0, "woq: group size must be a multiple of 32");
  Weight w;
  w.row_groups = static_cast<int>((n + 63) / 64);
  w.k_blocks = static_cast<int>((k + 63) / 64);
  w.groups = static_cast<int>((k + group_size - 1) / group_size);
  STD_TORCH_CHECK(weight.is_contiguous() && weight.numel() * 4 == int64_t(w.row_groups) * w.k_blocks * 512 * bits,
                  "woq: weight does not hold ", n, " x ", k, " codes of ", bits, " bits");
  STD_TORCH_CHECK(scales.is_contiguous() && scales.dim() == 3 && scales.size(0) == w.row_groups && scales.size(1) == w.groups &&
                      (scales.size(2) == 128 || scales.size(2) == 192),
                  "woq: scales must be uint8 [", w.row_groups, ", ", w.groups, ", 128 or 192]");
  w.scale_stride = static_cast<int>(scales.size(2));
  w.data = static_cast<const uint8_t*>(weight.data_ptr());
  w.scales = static_cast<const uint8_t*>(scales.data_ptr());
  return w;
}

cudaError_t launch(int64_t bits, const woq::DecodeArgs& a, bool bf16, const woq::DecodePlan& p, bool hopper, bool early, cudaStream_t s) {
  switch (bits) {
    case 2: return woq::launch_decode<2>(a, bf16, p.row_blocks, hopper, early, s);
    case 3: return woq::launch_decode<3>(a, bf16, p.row_blocks, hopper, early, s);
    case 4: return woq::launch_decode<4>(a, bf16, p.row_blocks, hopper, early, s);
    default: return woq::launch_decode<8>(a, bf16, p.row_blocks, hopper, early, s);
  }
}

woq::PrefillArgs describe(const Weight& w, int64_t n, int64_t k, int64_t bits, int64_t group_size, bool scale_is_bf16) {
  woq::PrefillArgs a = {};
  a.weight = w.data, a.scales = w.scales;
  a.n = static_cast<int>(n), a.k = static_cast<int>(k);
  a.row_groups = w.row_groups, a.k_blocks = w.k_blocks, a.groups = w.groups;
  a.group_units = static_cast<int>(group_size / 32);
  a.group_reciprocal = static_cast<uint32_t>((uint64_t(1) << 32) / a.group_units) + 1;
  a.scale_stride = w.scale_stride;
  a.symmetric_zero = static_cast<float>(1 << (bits - 1));
  a.scale_is_bf16 = scale_is_bf16;
  return a;
}

Tensor dense(const Weight& w, const Tensor& like, int64_t n, int64_t k, int64_t bits, int64_t group_size, bool scale_is_bf16, cudaStream_t stream) {
  Tensor out = torch::stable::new_empty(like, {n, k});
  const woq::DequantizeArgs a = {w.data, w.scales, out.data_ptr(), int(n), int(k), w.k_blocks, w.groups, int(group_size / 32),
                                 w.scale_stride, static_cast<float>(1 << (bits - 1)), scale_is_bf16};
  check(woq::launch_dequantize(static_cast<int>(bits), is_bf16(like), a, stream), "dequantize launch");
  return out;
}

// One or several decode launches: more tokens than one takes, or than shared memory holds for this K.
void run_decode(woq::DecodeArgs a, const Tensor& x, Tensor& y, int64_t bits, bool early_start, const std::vector<int64_t>& given,
                const woq::Device& device, cudaStream_t stream) {
  const int64_t m = x.size(0);
  int64_t step = woq::kDecodeTokens;
  for (int64_t first = 0; first < m;) {
    a.m = static_cast<int>(std::min(step, m - first));
    a.x = static_cast<const char*>(x.data_ptr()) + first * a.k * 2;
    a.y = static_cast<char*>(y.data_ptr()) + first * a.n * 2;
    woq::DecodePlan p = woq::choose_decode(a, static_cast<int>(bits), device);
    if (!given.empty()) {
      p = {int(given[0]), int(given[1]), int(given[2]), int(given[3]), int(given[4])};
      if (p.row_blocks == 0) p.row_blocks = (a.row_groups + p.row_warps - 1) / p.row_warps;
    }
    if (p.k_warps == 0) {
      STD_TORCH_CHECK(step > 1, "woq: in_features ", a.k, " is too large for this device");
      step /= 2;
      continue;
    }
    woq::apply(p, a);
    check(launch(bits, a, is_bf16(x), p, device.capability >= 90, early_start, stream), "decode launch");
    first += a.m;
  }
}

// A number that no earlier launch of this process left in memory.
uint64_t launch_number() {
  static std::atomic<uint64_t> next{std::random_device{}() * uint64_t(0x9E3779B97F4A7C15) | 1};
  return next.fetch_add(2, std::memory_order_relaxed);
}

void run_prefill(woq::PrefillArgs a, const Tensor& x, Tensor& y, int64_t bits, bool early_start, const woq::PrefillPlan& p,
                 const woq::Device& device, cudaStream_t stream) {
  a.m = static_cast<int>(x.size(0)), a.x = x.data_ptr(), a.y = y.data_ptr();
  const int blocks = woq::divide(p, device.processors, a);
  const int64_t partial = woq::partial_bytes(p, a, blocks);
  Tensor scratch;
  if (partial > 0) {
    scratch = torch::stable::new_empty(x, {(partial + woq::ready_bytes(p, a, blocks)) / 2});
    a.partial = scratch.data_ptr();
    a.ready = reinterpret_cast<uint64_t*>(static_cast<char*>(a.partial) + partial);
    a.launch = launch_number();
  }
  const bool bf16 = is_bf16(x);
  cudaError_t error;
  switch (bits) {
    case 2: error = woq::launch_prefill<2>(a, bf16, p, blocks, early_start, stream); break;
    case 3: error = woq::launch_prefill<3>(a, bf16, p, blocks, early_start, stream); break;
    case 4: error = woq::launch_prefill<4>(a, bf16, p, blocks, early_start, stream); break;
    default: error = woq::launch_prefill<8>(a, bf16, p, blocks, early_start, stream); break;
  }
  check(error, "prefill launch");
}

// `plan` is empty (the table decides), five numbers for decode, or four for prefill (0 stages: as many as fit); see plan.h.
Tensor linear(const Tensor& given_x, const Tensor& weight, const Tensor& scales, std::optional<Tensor> order, int64_t n, int64_t bits,
              int64_t group_size, bool scale_is_bf16, bool early_start, std::vector<int64_t> plan) {
  STD_TORCH_CHECK(given_x.dim() == 2 && given_x.is_contiguous() && given_x.is_cuda(), "woq: x must be a contiguous CUDA matrix");
  const int64_t m = given_x.size(0), k = given_x.size(1);
  const Weight w = check_weight(weight, scales, n, k, bits, group_size);
  STD_TORCH_CHECK(!order || (order->is_contiguous() && order->numel() == k && order->scalar_type() == ScalarType::Int),
                  "woq: order must be int32 [", k, "]");
  STD_TORCH_CHECK(plan.empty() || plan.size() == 5 || plan.size() == 4, "woq: a plan has 5 or 4 numbers");
  const int device_index = given_x.get_device();
  const auto here = [device_index](const Tensor& t) { return t.is_cuda() && t.get_device() == device_index; };
  STD_TORCH_CHECK(here(weight) && here(scales) && (!order || here(*order)), "woq: the weight is not on the device of x");
  const torch::stable::accelerator::DeviceGuard guard(device_index);
  const woq::Device& device = device_properties(device_index);
  const cudaStream_t stream = current_stream(device_index);

  Tensor x = given_x;
  if (reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 != 0) x = torch::stable::clone(x);
  woq::PrefillArgs a = describe(w, n, k, bits, group_size, scale_is_bf16);
  a.m = static_cast<int>(m);
  const woq::Path path = plan.size() == 5 ? woq::Path::decode : plan.size() == 4 ? woq::Path::prefill : woq::choose_path(a, static_cast<int>(bits), device);
  const int* columns = order ? static_cast<const int*>(order->data_ptr()) : nullptr;
  if (columns != nullptr && path == woq::Path::decode && woq::reorders(a, columns, static_cast<int>(bits), device)) {
    a.order = columns;
  } else if (columns != nullptr && m > 0) {
    Tensor gathered = torch::stable::new_empty(x, {m, k});
    const bool early = early_start && device.capability >= 90;
    check(woq::launch_gather(x.data_ptr(), columns, gathered.data_ptr(), int(m), int(k), early, stream), "gather");
    x = gathered;
  }
  if (path == woq::Path::dense)
    return torch::stable::matmul(x, torch::stable::transpose(dense(w, x, n, k, bits, group_size, scale_is_bf16, stream), 0, 1));
  Tensor y = torch::stable::new_empty(x, {m, n});
  if (path == woq::Path::decode) {
    run_decode(a, x, y, bits, early_start, plan, device, stream);
  } else {
    woq::PrefillPlan p = plan.empty() ? woq::choose_prefill(a, static_cast<int>(bits), device).plan
                                      : woq::PrefillPlan{int(plan[0]), int(plan[1]), int(plan[2]), int(plan[3])};
    if (p.stages == 0) p.stages = woq::prefill_stages(p, static_cast<int>(bits), device);
    STD_TORCH_CHECK(p.split <= woq::PrefillPlan::turns(p.tokens, w.k_blocks), "woq: a plan's split must not exceed the turns of K");
    run_prefill(a, x, y, bits, early_start, p, device, stream);
  }
  return y;
}

Tensor dequantize(const Tensor& weight, const Tensor& scales, const Tensor& like, int64_t n, int64_t k, int64_t bits, int64_t group_size,
                  bool scale_is_bf16) {
  const Weight w = check_weight(weight, scales, n, k, bits, group_size);
  STD_TORCH_CHECK(weight.is_cuda() && scales.is_cuda(), "woq: weight and scales must be on a CUDA device");
  const int device_index = weight.get_device();
  const torch::stable::accelerator::DeviceGuard guard(device_index);
  return dense(w, like, n, k, bits, group_size, scale_is_bf16, current_stream(device_index));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(woq, m) {
  m.def("cuda_linear(Tensor x, Tensor weight, Tensor scales, Tensor? order, int out_features, int bits, int group_size, "
        "bool scale_is_bf16, bool early_start, int[] plan) -> Tensor");
  m.def("cuda_dequantize(Tensor weight, Tensor scales, Tensor like, int out_features, int in_features, int bits, int group_size, "
        "bool scale_is_bf16) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(woq, CUDA, m) {
  m.impl("cuda_linear", TORCH_BOX(&linear));
  m.impl("cuda_dequantize", TORCH_BOX(&dequantize));
}
