// Host side of the dequantize kernel.
#pragma once

#include <cstdint>
#include <cuda_runtime.h>

namespace woq {

struct DequantizeArgs {
  const uint8_t* weight;
  const uint8_t* scales;
  void* out;  // [n, k], inputs in the weight's order
  int n, k, k_blocks, groups, group_units, scale_stride;
  float symmetric_zero;
  bool scale_is_bf16;
};

// `bits` 2, 3, 4 or 8; writes bf16 or fp16.
cudaError_t launch_dequantize(int bits, bool is_bf16, const DequantizeArgs& a, cudaStream_t stream);


// to[i, j] = from[i, order[j]] for 16-bit elements [m, k]: act-order, once a product, for kernels that want x in the weight's
// order (decoding in digits takes it as it is).
cudaError_t launch_gather(const void* from, const int* order, void* to, int m, int k, bool early_start, cudaStream_t stream);

}  // namespace woq
