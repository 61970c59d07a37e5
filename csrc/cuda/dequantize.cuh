// The whole weight back in 16-bit floats, at the rate of memory: for products so large that cuBLAS on a dense copy wins, for
// gradients, and as the plain counterpart that the other kernels are compared with.
#pragma once

#include "dequant.cuh"
#include "dequantize.h"

namespace woq {

// One block of weights a thread block; warp w takes row tile w. Through shared memory, so that rows leave 128 bytes at a time.
template <class T, int BITS>
__global__ void __launch_bounds__(32 * kRowTiles) dequantize_kernel(const DequantizeArgs a) {
  using C = Codes<T, BITS>;
  constexpr int stride = kBlock + 8;
  __shared__ __align__(16) T tile[kBlock * stride];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, k_block = blockIdx.x, row_group = blockIdx.y;
  const uint8_t* block = a.weight + (static_cast<int64_t>(row_group) * a.k_blocks + k_block) * C::block_bytes;
  const uint8_t* scales = a.scales + static_cast<int64_t>(row_group) * a.groups * a.scale_stride;

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t words[C::words];
    C::load(words, block, warp, half, lane);
    const int group = min((2 * k_block + half) / a.group_units, a.groups - 1);
    const uint8_t* row_scales = scales + static_cast<int64_t>(group) * a.scale_stride;
    float scale[2], zero[2];
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      const int place = lane / 4 * 8 + 2 * warp + upper;  // see kScaleBytes
      scale[upper] = scale_value(reinterpret_cast<const uint16_t*>(row_scales)[place], a.scale_is_bf16);
      zero[upper] = C::offset + (a.scale_stride == kScaleBytes ? a.symmetric_zero : float(row_scales[kScaleBytes + place]));
    }
#pragma unroll
    for (int j = 2 * half; j < 2 * half + 2; ++j) {
      uint32_t low[4], high[4] = {};
      C::fragment(low, words, j);
      if constexpr (C::split) C::template fragment<1>(high, words, j);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 16 * warp + lane / 4 + 8 * (i % 2), column = 16 * j + 2 * (lane % 4) + 8 * (i / 2);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float code = Float16<T>::value(low[i] >> (16 * e));
          if constexpr (C::split) code += Float16<T>::value(high[i] >> (16 * e));
          tile[row * stride + column + e] = Float16<T>::round((code - zero[i % 2]) * scale[i % 2]);
        }
      }
    }
  }
  __syncthreads();

  T* out = static_cast<T*>(a.out);
  const int first_row = row_group * kBlock, first_column = k_block * kBlock;
  if (a.k % 8 == 0) {
    for (int i = threadIdx.x; i < kBlock * kBlock / 8; i += blockDim.x) {
      const int row = i / 8, column = i % 8 * 8;
      if (first_row + row < a.n && first_column + column < a.k)
        *reinterpret_cast<uint4*>(out + static_cast<int64_t>(first_row + row) * a.k + first_column + column) =
            *reinterpret_cast<const uint4*>(tile + row * stride + column);
    }
  } else {
    for (int i = threadIdx.x; i < kBlock * kBlock; i += blockDim.x) {
      const int row = i / kBlock, column = i % kBlock;
      if (first_row + row < a.n && first_column + column < a.k)
        out[static_cast<int64_t>(first_row + row) * a.k + first_column + column] = tile[row * stride + column];
    }
  }
}

template <class T, int BITS>
cudaError_t launch_dequantize_typed(const DequantizeArgs& a, cudaStream_t stream) {
  const dim3 grid(a.k_blocks, (a.n + kBlock - 1) / kBlock);
  dequantize_kernel<T, BITS><<<grid, 32 * kRowTiles, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace woq
