#include "dequantize.h"

#include "dequantize.cuh"

namespace woq {

template <class T>
static cudaError_t by_bits(int bits, const DequantizeArgs& a, cudaStream_t stream) {
  switch (bits) {
    case 2: return launch_dequantize_typed<T, 2>(a, stream);
    case 3: return launch_dequantize_typed<T, 3>(a, stream);
    case 4: return launch_dequantize_typed<T, 4>(a, stream);
    default: return launch_dequantize_typed<T, 8>(a, stream);
  }
}

cudaError_t launch_dequantize(int bits, bool is_bf16, const DequantizeArgs& a, cudaStream_t stream) {
  return is_bf16 ? by_bits<__nv_bfloat16>(bits, a, stream) : by_bits<__half>(bits, a, stream);
}

static __global__ void gather_kernel(const uint16_t* from, const int* order, uint16_t* to, int m, int k) {
  const int j = blockIdx.x * blockDim.x + threadIdx.x, column = order[min(j, k - 1)];
#if HOPPER
  launch_dependents();  // the product fetches its weights meanwhile
  dependency_wait();
#endif
  if (j >= k) return;
  for (int i = blockIdx.y; i < m; i += gridDim.y) to[static_cast<int64_t>(i) * k + j] = from[static_cast<int64_t>(i) * k + column];
}

cudaError_t launch_gather(const void* from, const int* order, void* to, int m, int k, bool early_start, cudaStream_t stream) {
  cudaLaunchAttribute early;
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((k + 255) / 256, m < 1024 ? m : 1024);
  config.blockDim = dim3(256);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = early_start ? 1 : 0;
  return cudaLaunchKernelEx(&config, gather_kernel, static_cast<const uint16_t*>(from), order, static_cast<uint16_t*>(to), m, k);
}

}  // namespace woq
