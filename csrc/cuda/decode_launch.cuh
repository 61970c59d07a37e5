// Instantiates the decode kernel for one bit width; each decode_<bits>.cu is this, so that they compile side by side.
#pragma once

#include <atomic>

#include "decode.cuh"
#include "decode.h"

namespace woq {

template <class T, class Turn, int BITS, int UNITS>
cudaError_t launch_one(const DecodeArgs& a, int row_blocks, bool hopper, bool early_start, cudaStream_t stream) {
  const auto kernel = decode_kernel<T, Turn, BITS, UNITS>;
  const int bytes = DecodeLayout::of(BITS, a).total;
  static std::atomic<uint64_t> raised{0};  // one bit a device: its shared-memory limit has been raised for this kernel
  int device = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  if (!(raised.load(std::memory_order_relaxed) >> (device & 63) & 1)) {
    error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
    if (error != cudaSuccess) return error;
    raised.fetch_or(uint64_t(1) << (device & 63), std::memory_order_relaxed);
  }

  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(a.split, row_blocks);
  config.blockDim = dim3(32 * a.k_warps * a.row_warps);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (hopper && a.split > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim = {static_cast<unsigned>(a.split), 1, 1};
    ++config.numAttrs;
  }
  if (hopper && early_start) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs].val.programmaticStreamSerializationAllowed = 1;
    ++config.numAttrs;
  }
  return cudaLaunchKernelEx(&config, kernel, a);
}

template <class T, int BITS, int UNITS>
cudaError_t launch_by_tokens(const DecodeArgs& a, int row_blocks, bool hopper, bool early_start, cudaStream_t stream) {
  if (in_digits(a)) return launch_one<T, DigitTurn<T, BITS, UNITS>, BITS, UNITS>(a, row_blocks, hopper, early_start, stream);
  if (a.m <= 8) return launch_one<T, FloatTurn<T, BITS, 1, UNITS>, BITS, UNITS>(a, row_blocks, hopper, early_start, stream);
  if (a.m <= 16) return launch_one<T, FloatTurn<T, BITS, 2, UNITS>, BITS, UNITS>(a, row_blocks, hopper, early_start, stream);
  return launch_one<T, FloatTurn<T, BITS, 4, UNITS>, BITS, UNITS>(a, row_blocks, hopper, early_start, stream);
}

// UNITS: inputs that certainly share a scale are all 128 of a turn, a block of 64, or 32.
template <int BITS, class T>
cudaError_t launch_typed(const DecodeArgs& a, int row_blocks, bool hopper, bool early_start, cudaStream_t stream) {
  constexpr int all = 2 * blocks_per_turn(BITS);
  if (a.group_units % all == 0) return launch_by_tokens<T, BITS, all>(a, row_blocks, hopper, early_start, stream);
  if (a.group_units % 2 == 0) return launch_by_tokens<T, BITS, 2>(a, row_blocks, hopper, early_start, stream);
  return launch_by_tokens<T, BITS, 1>(a, row_blocks, hopper, early_start, stream);
}

template <int BITS>
cudaError_t launch_decode(const DecodeArgs& a, bool is_bf16, int row_blocks, bool hopper, bool early_start, cudaStream_t stream) {
  return is_bf16 ? launch_typed<BITS, __nv_bfloat16>(a, row_blocks, hopper, early_start, stream)
                 : launch_typed<BITS, __half>(a, row_blocks, hopper, early_start, stream);
}

}  // namespace woq
