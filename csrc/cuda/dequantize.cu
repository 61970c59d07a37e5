#include "dequantize.h"

#include <algorithm>

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

constexpr int kGatherThreads = 512;
constexpr int kRowRoom = 48 * 1024;  // bytes of a row that a thread block may hold: what needs no permission

// A thread block's columns of one row. `hold`: the whole row goes to shared memory first and is read there in any order.
static __global__ void __launch_bounds__(kGatherThreads) gather_kernel(const uint16_t* x, const int* order, uint16_t* y, int k, bool hold) {
  extern __shared__ uint4 row[];
  const int columns = (k + gridDim.y - 1) / gridDim.y, begin = blockIdx.y * columns, end = min(k, begin + columns);
  x += static_cast<int64_t>(blockIdx.x) * k, y += static_cast<int64_t>(blockIdx.x) * k;
  int j = begin + threadIdx.x, column = order[min(j, k - 1)];
#if HOPPER
  // The product may fetch its weights even now. It waits for us, and so for what we wait for, before it lets anything follow.
  launch_dependents();
  dependency_wait();
#endif
  if (hold) {
    for (int i = threadIdx.x; i < k / 8; i += kGatherThreads) row[i] = reinterpret_cast<const uint4*>(x)[i];
    __syncthreads();
    x = reinterpret_cast<const uint16_t*>(row);
  }
  while (j < end) {
    y[j] = x[column];
    j += kGatherThreads, column = order[min(j, k - 1)];
  }
}

cudaError_t launch_gather(const void* from, const int* order, void* to, int m, int k, bool early_start, cudaStream_t stream) {
  // With few rows every thread has one column, and its order before x is there; with many, 32 bytes for each element read are too much.
  const bool hold = m > 32 && k % 8 == 0 && k * 2 <= kRowRoom;
  cudaLaunchAttribute early;
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(m, hold ? std::max(1, 256 / m) : (k + kGatherThreads - 1) / kGatherThreads);
  config.blockDim = dim3(kGatherThreads);
  config.dynamicSmemBytes = hold ? k * 2 : 0;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = early_start ? 1 : 0;
  return cudaLaunchKernelEx(&config, gather_kernel, static_cast<const uint16_t*>(from), order, static_cast<uint16_t*>(to), k, hold);
}

}  // namespace woq
