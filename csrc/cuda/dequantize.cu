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

constexpr int kRowRoom = 48 * 1024;  // bytes of a row that a thread block may hold: what needs no permission

// Four columns from j on, those past the last repeat one that is there.
static __device__ int4 four_columns(const int* order, int j, int k) {
  if (k % 4 == 0) return *reinterpret_cast<const int4*>(order + min(j, k - 4));
  return make_int4(order[min(j, k - 1)], order[min(j + 1, k - 1)], order[min(j + 2, k - 1)], order[min(j + 3, k - 1)]);
}

// A thread block's columns of one row. `hold`: the whole row goes to shared memory first and is read there in any order.
static __global__ void __launch_bounds__(512) gather_kernel(const uint16_t* x, const int* order, uint16_t* y, int k, bool hold) {
  extern __shared__ uint4 row[];
  const int fours = (k + 3) / 4, share = 4 * ((fours + gridDim.y - 1) / gridDim.y), begin = blockIdx.y * share, end = min(k, begin + share);
  x += static_cast<int64_t>(blockIdx.x) * k, y += static_cast<int64_t>(blockIdx.x) * k;
  int j = begin + 4 * threadIdx.x;
  int4 columns = four_columns(order, j, k);
#if HOPPER
  // The product may fetch its weights even now. It waits for us, and so for what we wait for, before it lets anything follow.
  launch_dependents();
  dependency_wait();
#endif
  if (hold) {
    for (int i = threadIdx.x; i < k / 8; i += blockDim.x) row[i] = reinterpret_cast<const uint4*>(x)[i];
    __syncthreads();
    x = reinterpret_cast<const uint16_t*>(row);
  }
  for (; j < end; j += 4 * blockDim.x, columns = four_columns(order, j, k)) {
    const uint16_t v[4] = {x[columns.x], x[columns.y], x[columns.z], x[columns.w]};
    if (k % 4 == 0) *reinterpret_cast<uint2*>(y + j) = make_uint2(v[0] | uint32_t(v[1]) << 16, v[2] | uint32_t(v[3]) << 16);
    else for (int i = 0; i < 4 && j + i < end; ++i) y[j + i] = v[i];
  }
}

cudaError_t launch_gather(const void* from, const int* order, void* to, int m, int k, bool early_start, cudaStream_t stream) {
  // With few rows every thread has four columns, and their order before x is there. With many, 32 bytes for each element read are
  // too much.
  const bool hold = m > 32 && k % 8 == 0 && k * 2 <= kRowRoom;
  const int threads = hold ? 512 : 128;
  cudaLaunchAttribute early;
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(m, hold ? std::max(1, 256 / m) : (k + 4 * threads - 1) / (4 * threads));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = hold ? k * 2 : 0;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = early_start ? 1 : 0;
  return cudaLaunchKernelEx(&config, gather_kernel, static_cast<const uint16_t*>(from), order, static_cast<uint16_t*>(to), k, hold);
}

}  // namespace woq
