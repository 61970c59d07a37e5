// y = x W^T for more tokens than `decode` is good at, on sm_90a: wgmma with the weights as the operand held in registers.
//
// The transposed product again: a thread block computes 128 rows of W (two warp groups, 64 each) times TOKENS tokens. A
// fetching warp streams packed weights (bulk copies) and x (TMA, 128-byte swizzle) through a ring of stages; each multiplying
// thread turns its 32 codes of a stage into A fragments, exactly (code - zero), rounds them once with the scale to the
// activations' dtype, and issues four asynchronous wgmma, which run while it dequantizes the next stage. What this gives up
// over `decode`: a weight is rounded to 16 bits before it is multiplied, as any dequantize-then-matmul would.
//
//     grid    (split, row tiles, token tiles); the cluster spans x and adds up the `split` parts of K as `decode` does
#pragma once

#include <cuda.h>

#include "reduce.cuh"
#include "wgmma.cuh"

namespace woq {

constexpr int kRowGroups = 2;                        // multiplying warp groups, 64 rows each
constexpr int kPrefillThreads = 128 * kRowGroups + 128;

// Registers a thread: small tiles leave room for two thread blocks on a processor.
template <int TOKENS>
struct Budget {
  static constexpr int blocks = TOKENS <= 64 ? 2 : 1, fetching = TOKENS <= 64 ? 24 : 40, multiplying = TOKENS <= 64 ? 104 : 232;
};

template <class T, int BITS, int TOKENS>
struct PrefillLayout {
  static constexpr int x_bytes = TOKENS * kBlock * 2;
  static constexpr int weight_bytes = 512 * BITS;
  static constexpr int scale_room = 2 * (kScaleBytes + kZeroBytes);
  static constexpr int stage = (x_bytes + kRowGroups * (weight_bytes + scale_room) + 1023) / 1024 * 1024;
  static constexpr int partial_stride = kRowGroups * kBlock + 4;

  // Offsets from the aligned base: barriers | ring, later the sums | sums of the cluster
  WOQ_HOST_DEVICE static int gather(int stages) {
    const int ring = 1024 + stages * stage, sums = 1024 + TOKENS * partial_stride * 4;
    return ((ring > sums ? ring : sums) + 15) / 16 * 16;
  }
  static int total(int stages, int split) {
    return gather(stages) + (split > 1 ? TOKENS * kRowGroups * kBlock * 4 : 0) + 1024;  // the last aligns the base
  }
};

#if HOPPER
// Exact code - zero, then one rounding with the scale. `zero` and `scale` hold a value twice.
template <class T, int BITS>
struct Dequantizer {
  using C = Codes<T, BITS>;
  using T2 = typename Float16<T>::Pair;
  T2 scale[2], zero[2];  // rows lane / 4 and lane / 4 + 8

  __device__ Dequantizer(const DecodeArgs& a, const uint8_t* group, int tile, int lane) {
    const uint32_t pair = *reinterpret_cast<const uint32_t*>(group + (lane / 4 * 4 + tile) * 4);
    uint32_t zeros = 0;
    const bool symmetric = a.scale_stride == kScaleBytes;
    if (!symmetric) zeros = *reinterpret_cast<const uint16_t*>(group + kScaleBytes + (lane / 4 * 4 + tile) * 2);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      scale[i] = Float16<T>::twice(scale_value(i ? pair >> 16 : pair & 0xFFFF, a.scale_is_bf16));
      const float z = symmetric ? a.symmetric_zero : float((zeros >> (8 * i)) & 255);
      zero[i] = Float16<T>::twice(C::split ? z : C::offset + z);
    }
  }

  __device__ void fragment(uint32_t (&a)[4], const uint32_t (&words)[C::words], int j) const {
    uint32_t low[4], high[4];
    C::fragment(low, words, j);
    if constexpr (C::split) C::template fragment<1>(high, words, j);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      T2 code = *reinterpret_cast<T2*>(&low[i]);
      if constexpr (C::split) code = __hadd2(__hsub2(*reinterpret_cast<T2*>(&high[i]), Float16<T>::twice(C::offset)), code);
      const T2 weight = __hmul2(__hsub2(code, zero[i % 2]), scale[i % 2]);
      a[i] = *reinterpret_cast<const uint32_t*>(&weight);
    }
  }
};
#endif

// Barrier among the multiplying warps.
__device__ __forceinline__ void join(int threads) { asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory"); }

template <class T, int BITS, int TOKENS>
__global__ void __launch_bounds__(kPrefillThreads, Budget<TOKENS>::blocks)
    prefill_kernel(const __grid_constant__ DecodeArgs a, const __grid_constant__ CUtensorMap x_map) {
#if HOPPER_WGMMA
  using C = Codes<T, BITS>;
  using L = PrefillLayout<T, BITS, TOKENS>;
  constexpr int step = TOKENS > 128 ? 128 : TOKENS, steps = TOKENS / step;
  extern __shared__ uint8_t unaligned[];
  uint8_t* shared = unaligned + ((1024 - (smem_address(unaligned) & 1023)) & 1023);
  const uint32_t base = smem_address(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4;
  const int begin = a.k_blocks * int(blockIdx.x) / a.split, end = a.k_blocks * int(blockIdx.x + 1) / a.split;
  const int item = blockIdx.y, first_token = blockIdx.z * TOKENS;

  launch_dependents();
  if (threadIdx.x == 0) {
    for (int i = 0; i < a.stages; ++i) {
      barrier_init(base + full_barrier(i), 1);
      barrier_init(base + empty_barrier(i), 4 * kRowGroups);
    }
    barrier_init(base + gather_barrier(0), 1);
    barrier_init_fence();
  }
  __syncthreads();
  if (a.split > 1) cluster_arrive();

  if (group == kRowGroups) {
    registers_release<Budget<TOKENS>::fetching>();
    if (warp == 4 * kRowGroups && elect()) {
      const int rows_here = min(kRowGroups, a.row_groups - item * kRowGroups);
      const uint64_t policy = keep_policy();
      const auto fetch_weight = [&](int block, int slot) {
        const int first = group_of(a, 2 * block), last = min(group_of(a, 2 * block + 1), a.groups - 1);
        const int scale_bytes = (last - first + 1) * a.scale_stride;
        const uint32_t full = base + full_barrier(slot), stage = base + 1024 + slot * L::stage + L::x_bytes;
        barrier_expect(full, rows_here * (L::weight_bytes + scale_bytes) + L::x_bytes);
        for (int r = 0; r < rows_here; ++r) {
          const int64_t row_group = item * kRowGroups + r;
          bulk_copy(stage + r * L::weight_bytes, a.weight + (row_group * a.k_blocks + block) * L::weight_bytes, L::weight_bytes, full, policy);
          bulk_copy(stage + kRowGroups * L::weight_bytes + r * L::scale_room, a.scales + (row_group * a.groups + first) * a.scale_stride,
                    scale_bytes, full, policy);
        }
      };
      const auto fetch_x = [&](int block, int slot) {
        tensor_copy(base + 1024 + slot * L::stage, &x_map, block * kBlock, first_token, base + full_barrier(slot));
      };
      // Weights do not depend on the previous kernel, x does.
      for (int i = 0; i < a.stages && begin + i < end; ++i) fetch_weight(begin + i, i);
      dependency_wait();
      int slot = 0;
      uint32_t parity = 0;
      for (int block = begin; block < end; ++block) {
        if (block - begin >= a.stages) {
          barrier_wait(base + empty_barrier(slot), parity ^ 1);
          fetch_weight(block, slot);
        }
        fetch_x(block, slot);
        if (++slot == a.stages) slot = 0, parity ^= 1;
      }
    }
  } else {
    registers_claim<Budget<TOKENS>::multiplying>();
    dependency_wait();
    float sums[steps][step / 2];
#pragma unroll
    for (int s = 0; s < steps; ++s)
#pragma unroll
      for (int i = 0; i < step / 2; ++i) sums[s][i] = 0.f;
    const int tile = warp % 4;
    uint32_t fragments[2][4][4];  // two stages': one being multiplied, one being made
    int slot = 0;
    uint32_t parity = 0;
    const auto turn = [&](int block, uint32_t (&fragment)[4][4]) {
      const uint8_t* stage = shared + 1024 + slot * L::stage;
      const uint8_t* weight = stage + L::x_bytes + group * L::weight_bytes;
      const uint8_t* scales = stage + L::x_bytes + kRowGroups * L::weight_bytes + group * L::scale_room;
      barrier_wait(base + full_barrier(slot), parity);
      const int first = group_of(a, 2 * block);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t words[C::words];
        C::load(words, weight, tile, half, lane);
        const int here = min(group_of(a, 2 * block + half), a.groups - 1) - first;
        const Dequantizer<T, BITS> dequantizer(a, scales + here * a.scale_stride, tile, lane);
#pragma unroll
        for (int j = 2 * half; j < 2 * half + 2; ++j) dequantizer.fragment(fragment[j], words, j);
      }
      wgmma_begin();
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int s = 0; s < steps; ++s)
          Wgmma<T, step>::run(sums[s], fragment[j], swizzled_operand(base + 1024 + slot * L::stage + s * step * 128 + j * 32));
      wgmma_commit();
      wgmma_wait<1>();  // the stage before this one has been multiplied
      if (block > begin && lane == 0) barrier_arrive(base + empty_barrier(slot == 0 ? a.stages - 1 : slot - 1));
      if (++slot == a.stages) slot = 0, parity ^= 1;
    };
    int block = begin;
    for (; block + 1 < end; block += 2) {
      turn(block, fragments[0]);
      turn(block + 1, fragments[1]);
    }
    if (block < end) turn(block, fragments[0]);
    wgmma_wait<0>();

    // Sums to shared memory, over the ring, which nobody needs any more; then over the cluster, and out.
    constexpr int threads = 128 * kRowGroups;
    join(threads);
    float* partial = reinterpret_cast<float*>(shared + 1024);
#pragma unroll
    for (int s = 0; s < steps; ++s)
#pragma unroll
      for (int i = 0; i < step / 2; ++i) {
        const int token = s * step + i / 4 * 8 + 2 * (lane % 4) + i % 2, row = group * kBlock + 16 * tile + lane / 4 + 8 * (i / 2 % 2);
        partial[token * L::partial_stride + row] = sums[s][i];
      }
    if (a.split > 1) cluster_wait();
    join(threads);
    DecodeArgs tile_args = a;
    tile_args.m = min(TOKENS, a.m - first_token);
    tile_args.y = static_cast<T*>(a.y) + static_cast<int64_t>(first_token) * a.n;
    reduce<T>(tile_args, 1024, L::partial_stride, L::gather(a.stages), threads, shared, item, 0, 1);
  }
#endif
}

}  // namespace woq
