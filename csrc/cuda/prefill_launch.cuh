// Instantiates the prefill kernel for one bit width.
#pragma once

#include <atomic>

#include "prefill.cuh"
#include "prefill.h"

namespace woq {

// A matrix of `tokens` rows as TMA sees it, in boxes of `box_tokens` x 64, swizzled. The driver's function is looked up, not linked.
inline cudaError_t describe(CUtensorMap* map, const void* data, int tokens, int features, bool is_bf16, int box_tokens) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                              const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[2] = {cuuint64_t(features), cuuint64_t(tokens)}, strides[1] = {cuuint64_t(features) * 2};
  const cuuint32_t box[2] = {kBlock, cuuint32_t(box_tokens)}, ones[2] = {1, 1};
  const CUresult result = encode(map, is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<void*>(data),
                                 sizes, strides, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <class T, int BITS, int TOKENS, int GROUPS, bool ONE_GROUP>
cudaError_t launch_kernel(const PrefillArgs& a, bool is_bf16, int bytes, int blocks, bool early_start, cudaStream_t stream) {
  const auto kernel = prefill_kernel<T, BITS, TOKENS, GROUPS, ONE_GROUP>;
  static std::atomic<uint64_t> raised{0};  // one bit a device: its shared-memory limit has been raised for this kernel
  int device = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess && !(raised.load(std::memory_order_relaxed) >> (device & 63) & 1)) {
    error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
    if (error == cudaSuccess) raised.fetch_or(uint64_t(1) << (device & 63), std::memory_order_relaxed);
  }
  if (error != cudaSuccess) return error;
  CUtensorMap x_map, y_map = {};  // y's rows must be 16-byte aligned; the kernel looks at it where they are
  error = describe(&x_map, a.x, a.m, a.k, is_bf16, TOKENS);
  if (error == cudaSuccess && a.n % 8 == 0) error = describe(&y_map, a.y, a.m, a.n, is_bf16, PrefillPlan::box_tokens);
  if (error != cudaSuccess) return error;

  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(a.split, blocks);
  config.blockDim = dim3(PrefillLayout<T, BITS, TOKENS, GROUPS>::threads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (a.split > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim = {static_cast<unsigned>(a.split), 1, 1};
    ++config.numAttrs;
  }
  if (early_start) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs].val.programmaticStreamSerializationAllowed = 1;
    ++config.numAttrs;
  }
  return cudaLaunchKernelEx(&config, kernel, a, x_map, y_map);
}

template <class T, int BITS, int TOKENS, int GROUPS>
cudaError_t launch_tile(const PrefillArgs& a, bool is_bf16, int bytes, int blocks, bool early_start, cudaStream_t stream) {
  using L = PrefillLayout<T, BITS, TOKENS, GROUPS>;
  const bool one_group = a.group_units % L::shared_units == 0 && (L::narrow || a.scale_is_bf16 == is_bf16);
  return one_group ? launch_kernel<T, BITS, TOKENS, GROUPS, true>(a, is_bf16, bytes, blocks, early_start, stream)
                   : launch_kernel<T, BITS, TOKENS, GROUPS, false>(a, is_bf16, bytes, blocks, early_start, stream);
}

template <class T, int BITS>
cudaError_t launch_plan(const PrefillArgs& a, bool is_bf16, const PrefillPlan& plan, int blocks, bool early_start, cudaStream_t stream) {
  const int bytes = plan.shared_bytes(BITS);
  switch (8 * plan.tokens + plan.groups) {
    case 8 * 8 + 2: return launch_tile<T, BITS, 8, 2>(a, is_bf16, bytes, blocks, early_start, stream);
    case 8 * 8 + 4: return launch_tile<T, BITS, 8, 4>(a, is_bf16, bytes, blocks, early_start, stream);
    case 8 * 16 + 2: return launch_tile<T, BITS, 16, 2>(a, is_bf16, bytes, blocks, early_start, stream);
    case 8 * 16 + 4: return launch_tile<T, BITS, 16, 4>(a, is_bf16, bytes, blocks, early_start, stream);
    case 8 * 32 + 2: return launch_tile<T, BITS, 32, 2>(a, is_bf16, bytes, blocks, early_start, stream);
    case 8 * 32 + 4: return launch_tile<T, BITS, 32, 4>(a, is_bf16, bytes, blocks, early_start, stream);
    case 8 * 48 + 2: return launch_tile<T, BITS, 48, 2>(a, is_bf16, bytes, blocks, early_start, stream);
    case 8 * 48 + 4: return launch_tile<T, BITS, 48, 4>(a, is_bf16, bytes, blocks, early_start, stream);
    case 8 * 64 + 2: return launch_tile<T, BITS, 64, 2>(a, is_bf16, bytes, blocks, early_start, stream);
    case 8 * 64 + 4: return launch_tile<T, BITS, 64, 4>(a, is_bf16, bytes, blocks, early_start, stream);
    case 8 * 96 + 2: return launch_tile<T, BITS, 96, 2>(a, is_bf16, bytes, blocks, early_start, stream);
    case 8 * 96 + 3: return launch_tile<T, BITS, 96, 3>(a, is_bf16, bytes, blocks, early_start, stream);
    case 8 * 96 + 4: return launch_tile<T, BITS, 96, 4>(a, is_bf16, bytes, blocks, early_start, stream);
    case 8 * 128 + 2: return launch_tile<T, BITS, 128, 2>(a, is_bf16, bytes, blocks, early_start, stream);
    case 8 * 128 + 3: return launch_tile<T, BITS, 128, 3>(a, is_bf16, bytes, blocks, early_start, stream);
    case 8 * 128 + 4: return launch_tile<T, BITS, 128, 4>(a, is_bf16, bytes, blocks, early_start, stream);
    case 8 * 256 + 2: return launch_tile<T, BITS, 256, 2>(a, is_bf16, bytes, blocks, early_start, stream);
    default: return cudaErrorInvalidConfiguration;
  }
}

template <int BITS>
cudaError_t launch_prefill(const PrefillArgs& a, bool is_bf16, const PrefillPlan& plan, int blocks, bool early_start, cudaStream_t stream) {
  return is_bf16 ? launch_plan<__nv_bfloat16, BITS>(a, true, plan, blocks, early_start, stream)
                 : launch_plan<__half, BITS>(a, false, plan, blocks, early_start, stream);
}

}  // namespace woq
