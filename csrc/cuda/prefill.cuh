// y = x W^T for more tokens than `decode` is good at, on sm_90a: wgmma with the weights as the operand held in registers.
//
// The transposed product again: a thread block computes 256 rows of W (four warp groups, 64 each) times TOKENS tokens. A
// fetching warp streams packed weights (bulk copies) and x (TMA, 128-byte swizzle) through a ring of stages; each multiplying
// thread turns its 32 codes of a stage into A fragments, exactly (code - zero), rounds them once with the scale to the
// activations' dtype, and issues wgmma. While one group's wgmma occupy the tensor cores the others dequantize, so no group
// needs two sets of fragments. A stage is two blocks, 128 inputs, because what is not dequantizing costs as much again. What
// this gives up over `decode`: a weight is rounded to 16 bits before it is multiplied, as any dequantize-then-matmul would.
//
//     grid    (split, row tiles, token tiles); the cluster spans x and adds up the `split` parts of K as `decode` does
#pragma once

#include <cuda.h>

#include "reduce.cuh"
#include "wgmma.cuh"

namespace woq {

constexpr int kRowGroups = 4;  // multiplying warp groups, 64 rows each
constexpr int kPrefillThreads = 128 * kRowGroups + 128;
constexpr int kTurnBlocks = 2;  // blocks of a row group in a stage
constexpr int kFetchRegisters = 24, kMultiplyRegisters = 112;  // of a thread, after they are dealt out anew

template <class T, int BITS, int TOKENS>
struct PrefillLayout {
  static constexpr int x_block = TOKENS * kBlock * 2, x_bytes = kTurnBlocks * x_block;
  static constexpr int weight_block = 512 * BITS, weight_bytes = kTurnBlocks * weight_block;
  static constexpr int scale_room = 2 * kTurnBlocks * (kScaleBytes + kZeroBytes);
  static constexpr int stage = (x_bytes + kRowGroups * (weight_bytes + scale_room) + 1023) / 1024 * 1024;
  // Sums leave in parts of at most 64 tokens: the exchange of a cluster would not fit otherwise.
  static constexpr int part = TOKENS < 64 ? TOKENS : 64, parts = TOKENS / part;
  static constexpr int partial_stride = kRowGroups * kBlock + 4;

  // Offsets from the aligned base: barriers | ring, and when that is done: sums of a part | sums of the cluster, by part
  static constexpr int gather = 1024 + part * partial_stride * 4;
  static int total(int stages, int split) {
    const int ring = 1024 + stages * stage, sums = gather + (split > 1 ? TOKENS * kRowGroups * kBlock * 4 : 0);
    return (ring > sums ? ring : sums) + 1024;  // the last aligns the base
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
__global__ void __launch_bounds__(kPrefillThreads, 1)
    prefill_kernel(const __grid_constant__ DecodeArgs a, const __grid_constant__ CUtensorMap x_map) {
#if HOPPER_WGMMA
  using C = Codes<T, BITS>;
  using L = PrefillLayout<T, BITS, TOKENS>;
  extern __shared__ uint8_t unaligned[];
  uint8_t* shared = unaligned + ((1024 - (smem_address(unaligned) & 1023)) & 1023);
  const uint32_t base = smem_address(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4;
  const int turns = (a.k_blocks + kTurnBlocks - 1) / kTurnBlocks;
  const int begin = turns * int(blockIdx.x) / a.split, end = turns * int(blockIdx.x + 1) / a.split;
  const int item = blockIdx.y, first_token = blockIdx.z * TOKENS;

  launch_dependents();
  if (threadIdx.x == 0) {
    for (int i = 0; i < a.stages; ++i) {
      barrier_init(base + full_barrier(i), kRowGroups);
      barrier_init(base + empty_barrier(i), 4 * kRowGroups);
    }
    for (int i = 0; i < 2; ++i) barrier_init(base + gather_barrier(i), 1);
    barrier_init_fence();
  }
  __syncthreads();

  if (group == kRowGroups) {
    registers_release<kFetchRegisters>();
    // One warp a row group, because issuing copies is slow: one thread alone could not keep up. The first also fetches x.
    const int row = warp - 4 * kRowGroups;
    if (elect()) {
      const bool present = item * kRowGroups + row < a.row_groups;
      const uint64_t policy = keep_policy();
      const int64_t row_group = present ? item * kRowGroups + row : 0;
      const uint8_t* weight = a.weight + row_group * a.k_blocks * L::weight_block;
      const uint8_t* scales = a.scales + row_group * a.groups * a.scale_stride;
      const uint32_t ring = base + 1024, weight_at = L::x_bytes + row * L::weight_bytes;
      const uint32_t scales_at = L::x_bytes + kRowGroups * L::weight_bytes + row * L::scale_room;
      const auto fetch_weight = [&](int turn, int slot) {
        const int bytes = min(kTurnBlocks, a.k_blocks - kTurnBlocks * turn) * L::weight_block;  // of the last: maybe one block
        const int first = group_of(a, 4 * turn), last = min(group_of(a, 4 * turn + 3), a.groups - 1);
        const int scale_bytes = (last - first + 1) * a.scale_stride;
        const uint32_t full = base + full_barrier(slot), stage = ring + slot * L::stage;
        barrier_expect(full, (present ? bytes + scale_bytes : 0) + (row == 0 ? L::x_bytes : 0));
        if (present) {
          bulk_copy(stage + weight_at, weight + int64_t(turn) * L::weight_bytes, bytes, full, policy);
          bulk_copy(stage + scales_at, scales + int64_t(first) * a.scale_stride, scale_bytes, full, policy);
        }
      };
      // Weights do not depend on the previous kernel, x does.
      for (int i = 0; i < a.stages && begin + i < end; ++i) fetch_weight(begin + i, i);
      if (row == 0) dependency_wait();
      int slot = 0;
      uint32_t parity = 0;
      for (int turn = begin; turn < end; ++turn) {
        if (turn - begin >= a.stages) {
          barrier_wait(base + empty_barrier(slot), parity ^ 1);
          fetch_weight(turn, slot);
        }
        if (row == 0)  // zeros beyond k: a missing block of weights counts for nothing
#pragma unroll
          for (int b = 0; b < kTurnBlocks; ++b)
            tensor_copy(ring + slot * L::stage + b * L::x_block, &x_map, (kTurnBlocks * turn + b) * kBlock, first_token, base + full_barrier(slot));
        if (++slot == a.stages) slot = 0, parity ^= 1;
      }
    }
  } else {
    registers_claim<kMultiplyRegisters>();
    dependency_wait();
    float sums[TOKENS / 2];
#pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i) sums[i] = 0.f;
    const int tile = warp % 4;
    int slot = 0;
    uint32_t parity = 0;
    const bool several = a.group_units % 4 != 0, many = a.group_units % 2 != 0;  // groups in a turn, in a block
    for (int turn = begin; turn < end; ++turn) {
      const uint8_t* stage = shared + 1024 + slot * L::stage;
      const uint8_t* weight = stage + L::x_bytes + group * L::weight_bytes;
      const uint8_t* scales = stage + L::x_bytes + kRowGroups * L::weight_bytes + group * L::scale_room;
      barrier_wait(base + full_barrier(slot), parity);
      wgmma_wait<0>();  // the stage before this one has been multiplied
      if (turn > begin && lane == 0) barrier_arrive(base + empty_barrier(slot == 0 ? a.stages - 1 : slot - 1));
      Dequantizer<T, BITS> dequantizer(a, scales, tile, lane);
      constexpr int held = TOKENS < 128 ? kTurnBlocks : 1;  // blocks of fragments that registers have room for
      uint32_t words[C::words], fragments[4 * held][4];
#pragma unroll
      for (int half = 0; half < 2 * kTurnBlocks; ++half) {
        if (half % (2 * held) == 0 && half > 0) wgmma_wait<0>();  // the fragments have been read
        if (half % 2 == 0 || BITS == 8) C::load(words, weight + half / 2 * L::weight_block, tile, half % 2, lane);
        if (half > 0 && (half % 2 == 0 ? several : many)) {
          const int group_here = min(group_of(a, 4 * turn + half), a.groups - 1) - group_of(a, 4 * turn);
          dequantizer = Dequantizer<T, BITS>(a, scales + group_here * a.scale_stride, tile, lane);
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) dequantizer.fragment(fragments[2 * (half % (2 * held)) + j], words, 2 * (half % 2) + j);
        if ((half + 1) % (2 * held) == 0) {
          wgmma_begin();
#pragma unroll
          for (int j = 0; j < 4 * held; ++j) {
            const int k_step = 2 * (half + 1) - 4 * held + j;
            Wgmma<T, TOKENS>::run(sums, fragments[j],
                                  swizzled_operand(base + 1024 + slot * L::stage + k_step / 4 * L::x_block + k_step % 4 * 32));
          }
          wgmma_commit();
        }
      }
      if (++slot == a.stages) slot = 0, parity ^= 1;
    }
    wgmma_wait<0>();

    // Sums to shared memory, over the ring, which nobody needs any more; then over the cluster, and out.
    constexpr int threads = 128 * kRowGroups;
    float* partial = reinterpret_cast<float*>(shared + 1024);
    DecodeArgs part_args = a;
    if (a.split > 1) {  // the others' sums will land where the ring was: all must be done with theirs
      cluster_arrive();
      cluster_wait();
    }
#pragma unroll
    for (int p = 0; p < L::parts; ++p) {
      const int from = first_token + p * L::part;
      part_args.m = min(L::part, a.m - from);
      part_args.y = static_cast<T*>(a.y) + static_cast<int64_t>(from) * a.n;
      if (part_args.m <= 0) break;
      join(threads);  // the ring, or the part before, has been read
#pragma unroll
      for (int i = 0; i < L::part / 2; ++i) {
        const int token = i / 4 * 8 + 2 * (lane % 4) + i % 2, row = group * kBlock + 16 * tile + lane / 4 + 8 * (i / 2 % 2);
        partial[token * L::partial_stride + row] = sums[p * L::part / 2 + i];
      }
      join(threads);
      reduce<T>(part_args, 1024, L::partial_stride, L::gather, L::part * (4 * kRowGroups * kBlock), threads, shared, item, p, 1);
    }
  }
#endif
}

}  // namespace woq
