// What decode and prefill share: where barriers lie, which group an input is in, and the sum over warps and cluster.
#pragma once

#include "decode_args.h"
#include "dequant.cuh"

namespace woq {

// Barriers, by their offset in shared memory.
__device__ __forceinline__ int full_barrier(int slot) { return 8 * slot; }          // a stage has arrived
__device__ __forceinline__ int empty_barrier(int slot) { return 80 + 8 * slot; }    // every warp has left it
__device__ __forceinline__ int gather_barrier(int parity) { return 160 + 8 * parity; }  // the cluster's sums have arrived
constexpr int kInputBarrier = 176;                                                  // x has arrived

// The group of 32-input unit `unit`.
__device__ __forceinline__ int group_of(const DecodeArgs& a, int unit) {
  return a.group_units == 1 ? unit : static_cast<int>(__umulhi(static_cast<uint32_t>(unit), a.group_reciprocal));
}

__device__ __forceinline__ float4 operator+(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

// Barrier of one multiplying warp group.
__device__ __forceinline__ void join(int warp) { asm volatile("bar.sync %0, 128;" ::"r"(1 + warp / 4) : "memory"); }

// Rows n .. n + 3 of one token.
template <class T>
__device__ void write(const DecodeArgs& a, int token, int n, float4 v) {
  T* y = static_cast<T*>(a.y) + static_cast<int64_t>(token) * a.n + n;
  const T out[4] = {Float16<T>::round(v.x), Float16<T>::round(v.y), Float16<T>::round(v.z), Float16<T>::round(v.w)};
  if (a.n % 4 == 0 && n < a.n) {
    *reinterpret_cast<uint2*>(y) = *reinterpret_cast<const uint2*>(out);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (n + i < a.n) y[i] = out[i];
  }
}

// Add the warps' partial sums, then the cluster's, and write y for the rows of one item. Four rows of a token at a time;
// row_warps and split are powers of two.
template <class T>
__device__ void reduce(const DecodeArgs& a, int partial_offset, int partial_stride, int gather_offset, int gather_size, int threads, uint8_t* shared, int item, int round, int rounds) {
  const int row_bits = 6 + __ffs(a.row_warps) - 1;
  [[maybe_unused]] const int owned_bits = row_bits - (__ffs(a.split) - 1), rank = blockIdx.x;
  const float* partial = reinterpret_cast<const float*>(shared + partial_offset);
  [[maybe_unused]] const uint32_t gather = gather_offset + round % 2 * gather_size, barrier = smem_address(shared) + gather_barrier(round % 2);
  for (int i = threadIdx.x; i < a.m << (row_bits - 2); i += threads) {
    const int row = 4 * i & ((1 << row_bits) - 1), token = 4 * i >> row_bits;
    const float* from = partial + token * partial_stride + row;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int w = 0; w < a.k_warps; ++w) sum = sum + *reinterpret_cast<const float4*>(from + w * a.m * partial_stride);
    if (a.split > 1) {
#if HOPPER
      const int place = ((rank * a.m + token) << owned_bits) + (row & ((1 << owned_bits) - 1));
      store_remote(smem_address(shared) + gather + place * 4, barrier, row >> owned_bits, sum);
#endif
    } else {
      write<T>(a, token, (item << row_bits) + row, sum);
    }
  }
#if HOPPER
  if (a.split > 1) {
    if (threadIdx.x == 0) barrier_expect(barrier, a.m * (4 << row_bits));
    barrier_wait_cluster(barrier, round / 2 % 2);
    for (int i = threadIdx.x; i < a.m << (owned_bits - 2); i += threads) {
      const int row = 4 * i & ((1 << owned_bits) - 1), token = 4 * i >> owned_bits;
      float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
      for (int r = 0; r < a.split; ++r)
        sum = sum + *reinterpret_cast<const float4*>(shared + gather + ((((r * a.m + token) << owned_bits) + row) * 4));
      write<T>(a, token, (item << row_bits) + (rank << owned_bits) + row, sum);
    }
    // The next round but one stores to this half of `gather` again: all must have read it by then.
    if (round + 1 < rounds) {
      cluster_arrive();
      cluster_wait();
    }
    return;
  }
#endif
  if (round + 1 < rounds) __syncthreads();  // partial sums have been read
}

}  // namespace woq
