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
  const int j = blockIdx.x * blockDim.x + threadIdx.x;
  if (j >= k) return;
  const int column = order[j];
  for (int i = blockIdx.y; i < m; i += gridDim.y) to[static_cast<int64_t>(i) * k + j] = from[static_cast<int64_t>(i) * k + column];
}

cudaError_t launch_gather(const void* from, const int* order, void* to, int m, int k, cudaStream_t stream) {
  const dim3 grid((k + 255) / 256, m < 1024 ? m : 1024);
  gather_kernel<<<grid, 256, 0, stream>>>(static_cast<const uint16_t*>(from), order, static_cast<uint16_t*>(to), m, k);
  return cudaGetLastError();
}

}  // namespace woq
