// y = x W^T for more tokens than `decode` is good at, on sm_90a: wgmma with the weights as the operand held in registers.
//
// The transposed product again: a tile is 64 GROUPS rows of W times TOKENS tokens, 64 rows for each multiplying warp group. A
// fetching warp a group streams packed weights (bulk copies) and x (TMA, 128-byte swizzle) through a ring of stages; each
// multiplying thread turns its codes into A fragments, exactly (code - zero), rounds them once with the scale to the
// activations' dtype, and issues wgmma. Fragments are held twice: while the tensor cores read one set, the next is made. A
// stage is two blocks, 128 inputs. What this gives up over `decode`: a weight is rounded to 16 bits before it is multiplied,
// as any dequantize-then-matmul would.
//
//     split > 1    grid (split, tiles): the cluster spans x, each of its thread blocks takes a part of K, and the sums are
//                  exchanged through distributed shared memory
//     split == 1   grid (1, thread blocks that stay): whole tiles first, one wave after the other; what is left over is cut
//                  into equal shares of turns, and a tile's last thread block adds up what the others left in memory
//
// Sums are added in a fixed order either way: results repeat to the bit.
#pragma once

#include <cuda.h>

#include "prefill_args.h"
#include "reduce.cuh"
#include "wgmma.cuh"

namespace woq {

constexpr int kFetchRegisters = 32;

template <class T, int BITS, int TOKENS, int GROUPS>
struct PrefillLayout {
  static constexpr int tokens = TOKENS, groups = GROUPS, rows = GROUPS * kBlock, warps = 4 * GROUPS, threads = 128 * GROUPS + 128;
  static constexpr int registers = GROUPS > 2 ? 112 : 104;           // of a multiplying thread, after they are dealt out anew
  static constexpr int x_block = TOKENS * kBlock * 2, x_bytes = kTurnBlocks * x_block;
  static constexpr int weight_block = 512 * BITS, weight_bytes = kTurnBlocks * weight_block;
  static constexpr int scale_room = PrefillPlan::scale_room;
  static constexpr int scales = x_bytes + GROUPS * weight_bytes;     // in a stage
  static constexpr int stage = PrefillPlan::stage_bytes(TOKENS, GROUPS, BITS);
  static constexpr int pieces = TOKENS / 8;                          // of a warp's sums: 16 rows x 8 tokens, a float4 a lane
  static constexpr int box = PrefillPlan::box_bytes(TOKENS, GROUPS) / GROUPS;  // of a warp group

  // Offsets from the aligned base: barriers | ring | boxes, or sums of the cluster, which take the ring's place where they are large
  static constexpr bool gather_apart = PrefillPlan::gather_apart(TOKENS, GROUPS);
  __device__ static int gather(int stages) { return 1024 + (gather_apart ? stages * stage : 0); }
};

#if HOPPER_WGMMA
// Turns begin .. end of one tile.
struct Piece {
  int tile, begin, end;
};

// What one thread block computes, in order. The shares of leftover tiles go backwards: what others wait for comes first.
class Schedule {
 public:
  __device__ explicit Schedule(const PrefillArgs& a) : turns((a.k_blocks + kTurnBlocks - 1) / kTurnBlocks) {
    const int rank = blockIdx.x, block = blockIdx.y;
    if (a.split > 1) {
      whole = next_whole = 0;
      low = block * turns + turns * rank / a.split, high = block * turns + turns * (rank + 1) / a.split;
    } else {
      whole = a.whole, next_whole = block;
      low = share(a, block), high = share(a, block + 1);
    }
  }
  __device__ bool next(Piece& p) {
    if (next_whole < whole) {
      p = {next_whole, 0, turns};
      next_whole += gridDim.y;
      return true;
    }
    if (high <= low) return false;
    const int tile = (high - 1) / turns, first = tile * turns;
    p = {tile, max(low - first, 0), high - first};
    high = first + p.begin;
    return true;
  }
  // Where thread block i's share of the leftover turns begins.
  __device__ int share(const PrefillArgs& a, int i) const {
    return whole * turns + static_cast<int>(int64_t(a.tiles - whole) * turns * i / gridDim.y);
  }
  const int turns;

 private:
  int whole, next_whole, low, high;
};

// Exact code - zero, then one rounding with the scale. `zero` and `scale` hold a value twice.
template <class T, int BITS>
struct Dequantizer {
  using C = Codes<T, BITS>;
  using T2 = typename Float16<T>::Pair;
  uint32_t scale[2], zero[2];  // rows lane / 4 and lane / 4 + 8

  __device__ explicit Dequantizer(const PrefillArgs& a) {
    const float z = a.symmetric_zero + (C::split ? 0.f : C::offset);
    zero[0] = zero[1] = bits(Float16<T>::twice(z));
  }
  // The group whose scales are at `group`. Symmetric weights have no zero points there, but readable memory.
  __device__ void enter(const PrefillArgs& a, Shared group, int place) {
    const uint32_t pair = read<uint32_t>(group + place * 4), zeros = read<uint16_t>(group + kScaleBytes + place * 2);
    const bool convert = a.scale_is_bf16 != Float16<T>::is_bf16, symmetric = a.scale_stride == kScaleBytes;
    const T2 low = Float16<T>::twice(scale_value(pair & 0xFFFF, a.scale_is_bf16)), high = Float16<T>::twice(scale_value(pair >> 16, a.scale_is_bf16));
    scale[0] = convert ? bits(low) : __byte_perm(pair, 0, 0x1010), scale[1] = convert ? bits(high) : __byte_perm(pair, 0, 0x3232);
    zero[0] = symmetric ? zero[0] : C::twice(zeros & 255), zero[1] = symmetric ? zero[1] : C::twice(zeros >> 8);
  }
  __device__ void fragment(uint32_t (&a)[4], const uint32_t (&words)[C::words], int j) const {
    uint32_t low[4], high[4];
    C::fragment(low, words, j);
    if constexpr (C::split) C::template fragment<1>(high, words, j);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      T2 code = pair(low[i]);
      if constexpr (C::split) code = __hadd2(__hsub2(pair(high[i]), Float16<T>::twice(C::offset)), code);
      a[i] = bits(__hmul2(__hsub2(code, pair(zero[i % 2])), pair(scale[i % 2])));
    }
  }

 private:
  __device__ static uint32_t bits(T2 v) { return *reinterpret_cast<const uint32_t*>(&v); }
  __device__ static T2 pair(uint32_t v) { return *reinterpret_cast<const T2*>(&v); }
};

// One fetching warp: packed weights of row group `row` of every tile, or the activations; with four row groups, the first warp
// brings both. Weights do not depend on the previous kernel, so only x waits for it.
template <class L>
__device__ void fetch(const PrefillArgs& a, const CUtensorMap* x_map, uint32_t base, int row) {
  const bool weights = row < L::groups, inputs = row == L::groups % 4;
  const uint64_t policy = a.token_tiles > 1 ? keep_policy() : read_once_policy();
  if (inputs) dependency_wait();
  Schedule work(a);
  Piece p;
  int slot = 0;
  uint32_t parity = 1;
  while (work.next(p)) {
    const int row_group = p.tile / a.token_tiles * L::groups + row, first_token = p.tile % a.token_tiles * L::tokens;
    const bool present = weights && row_group < a.row_groups;
    const uint8_t* weight = a.weight + int64_t(row_group) * a.k_blocks * L::weight_block;
    const uint8_t* scales = a.scales + int64_t(row_group) * a.groups * a.scale_stride;
#pragma unroll 1
    for (int turn = p.begin; turn < p.end; ++turn) {
      const uint32_t full = base + full_barrier(slot), stage = base + 1024 + slot * L::stage;
      const int bytes = min(kTurnBlocks, a.k_blocks - kTurnBlocks * turn) * L::weight_block;  // of the last: maybe one block
      const int first = group_of(a, 4 * turn), last = min(group_of(a, 4 * turn + 3), a.groups - 1);
      const int scale_bytes = (last - first + 1) * a.scale_stride;
      barrier_wait(base + empty_barrier(slot), parity);
      barrier_expect(full, (present ? bytes + scale_bytes : 0) + (inputs ? L::x_bytes : 0));
      if (present) {
        bulk_copy(stage + L::x_bytes + row * L::weight_bytes, weight + int64_t(turn) * L::weight_bytes, bytes, full, policy);
        bulk_copy(stage + L::scales + row * L::scale_room, scales + int64_t(first) * a.scale_stride, scale_bytes, full, policy);
      }
      if (inputs)  // zeros beyond k: a missing block of weights counts for nothing
#pragma unroll
        for (int b = 0; b < kTurnBlocks; ++b) tensor_copy(stage + b * L::x_block, x_map, (kTurnBlocks * turn + b) * kBlock, first_token, full);
      if (++slot == a.stages) slot = 0, parity ^= 1;
    }
  }
}

// 16 rows x 8 tokens: lane l holds rows l / 4 and l / 4 + 8 of tokens 2 (l % 4) and the next. Turned around, so that a token's
// rows, which are neighbours in y, lie in neighbouring lanes.
template <class T>
__device__ void write_piece(const PrefillArgs& a, int row, int token, float4 v, int lane) {
  const uint32_t pairs[2] = {Float16<T>::pack(v.x, v.y), Float16<T>::pack(v.z, v.w)};
  token += lane / 4, row += 2 * (lane % 4);
  T* y = static_cast<T*>(a.y) + static_cast<int64_t>(token) * a.n + row;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t out = transpose(pairs[i]);
    if (token >= a.m) continue;
    if (a.n % 2 == 0) {
      if (row + 8 * i < a.n) *reinterpret_cast<uint32_t*>(y + 8 * i) = out;
    } else {
      const T* two = reinterpret_cast<const T*>(&out);
      if (row + 8 * i < a.n) y[8 * i] = two[0];
      if (row + 8 * i + 1 < a.n) y[8 * i + 1] = two[1];
    }
  }
}

// Piece `u % warps` of the rows and `u / warps` of the tokens belongs to thread block u % split of the cluster, which is sent
// all parts of it and adds them up.
template <class T, class L>
__device__ void exchange(const PrefillArgs& a, const float4 (&sums)[L::pieces], int row, int token, int pieces, uint32_t base, int warp, int lane) {
  const int rank = blockIdx.x;
  const uint32_t gather = base + L::gather(a.stages), barrier = base + gather_barrier(0);
  if (!L::gather_apart) cluster_arrive();  // this ring has been read; for a place beside it the arrival was at the start
  cluster_wait();
#pragma unroll
  for (int j = 0; j < L::pieces; ++j) {
    const int u = j * L::warps + warp;
    if (j < pieces) store_remote(gather + ((u / a.split * a.split + rank) * 32 + lane) * 16, barrier, u % a.split, sums[j]);
  }
  const int owned = (pieces * L::warps - rank + a.split - 1) / a.split;
  if (threadIdx.x == 0) barrier_expect(barrier, owned * a.split * 512);
  barrier_wait_cluster(barrier, 0);
  for (int i = warp; i < owned; i += L::warps) {
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int r = 0; r < a.split; ++r) sum = sum + read<float4>(Shared{gather + ((i * a.split + r) * 32 + lane) * 16});
    const int u = i * a.split + rank;
    write_piece<T>(a, row + u % L::warps * 16, token + u / L::warps * 8, sum, lane);
  }
}

// Barrier of one multiplying warp group.
__device__ __forceinline__ void join(int group) { asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory"); }

// A warp group's rows of a tile, by way of its box: the copies to memory run while the next tile is computed. Needs n % 8 == 0.
template <class T, class L>
__device__ void send(const PrefillArgs& a, const float4 (&sums)[L::pieces], int first_row, int token, uint32_t base, int group, int warp, int lane) {
  const Shared box{base + 1024 + a.stages * L::stage + group * L::box};
  bulk_wait_read();  // of the tile before
  join(group);
#pragma unroll
  for (int j = 0; j < L::pieces; ++j) {
    const Shared to = box + ((8 * j + lane / 4) * PrefillPlan::box_stride + (16 * (warp % 4) + 2 * (lane % 4)) * 2);
    write(to, transpose(Float16<T>::pack(sums[j].x, sums[j].y)));
    write(to + 16, transpose(Float16<T>::pack(sums[j].z, sums[j].w)));
  }
  copy_fence();
  join(group);
  const int own = threadIdx.x % 128, row = first_row + kBlock * group, rows = min(kBlock, a.n - row);  // a token a thread
  if (rows > 0 && token + own < a.m)
    bulk_store(static_cast<T*>(a.y) + static_cast<int64_t>(token + own) * a.n + row, box.address + own * PrefillPlan::box_stride, rows * 2);
  bulk_commit();
}

// A thread block that does not finish a tile leaves its sums in memory; each warp group by itself.
template <class L>
__device__ void leave(const PrefillArgs& a, const float4 (&sums)[L::pieces], int pieces, int group) {
  const int place = blockIdx.y * (L::warps / 4) + group;
  float4* to = static_cast<float4*>(a.partial) + static_cast<int64_t>(place) * L::pieces * 128 + threadIdx.x % 128;
#pragma unroll
  for (int j = 0; j < L::pieces; ++j)
    if (j < pieces) to[j * 128] = sums[j];
  __threadfence();
  join(group);
  if (threadIdx.x % 128 == 0) store_release(a.ready + place, a.launch);
}

// The one that does finish it adds them, from the nearest thread block to the farthest. It waits only for thread blocks with
// smaller indices, which started no later. A mark is wiped once read: a graph's next replay has the same `launch`.
template <class L>
__device__ void collect(const PrefillArgs& a, const Schedule& work, float4 (&sums)[L::pieces], int first_turn, int pieces, int group) {
  for (int block = blockIdx.y - 1;; --block) {
    const int place = block * (L::warps / 4) + group;
    if (threadIdx.x % 128 == 0) {
      while (load_acquire(a.ready + place) != a.launch) {
      }
      a.ready[place] = 0;
    }
    join(group);
    const float4* from = static_cast<const float4*>(a.partial) + static_cast<int64_t>(place) * L::pieces * 128 + threadIdx.x % 128;
#pragma unroll
    for (int j = 0; j < L::pieces; ++j)
      if (j < pieces) sums[j] = sums[j] + __ldcg(from + j * 128);
    if (work.share(a, block) <= first_turn) break;
  }
}
#endif

// UNITS: 4 if the 128 inputs of a turn lie in one group, 1 if every 32 inputs' scales must be looked up. No branches on that:
// the compiler gives up overlapping wgmma with what a branch may define.
template <class T, int BITS, int TOKENS, int GROUPS, int UNITS>
__global__ void __launch_bounds__(128 * GROUPS + 128, GROUPS > 2 ? 1 : 2)
    prefill_kernel(const __grid_constant__ PrefillArgs a, const __grid_constant__ CUtensorMap x_map) {
#if HOPPER_WGMMA
  using C = Codes<T, BITS>;
  using L = PrefillLayout<T, BITS, TOKENS, GROUPS>;
  extern __shared__ uint8_t unaligned[];
  // Through shuffles, or the compiler computes both anew wherever they are used.
  const uint32_t base = __shfl_sync(~0u, (smem_address(unaligned) + 1023) & ~1023u, 0);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;

  launch_dependents();
  if (threadIdx.x == 0) {
    for (int i = 0; i < a.stages; ++i) {
      barrier_init(base + full_barrier(i), GROUPS + (GROUPS % 4 != 0));
      barrier_init(base + empty_barrier(i), L::warps);
    }
    barrier_init(base + gather_barrier(0), 1);
    barrier_init_fence();
  }
  __syncthreads();
  if (L::gather_apart && a.split > 1) cluster_arrive();

  if (warp >= L::warps) {
    registers_release<kFetchRegisters>();
    // One warp a row group, because issuing copies is slow: one thread alone could not keep up.
    const int row = warp - L::warps;
    if (row <= GROUPS && elect()) fetch<L>(a, &x_map, base, row);
  } else {
    registers_claim<L::registers>();
    dependency_wait();
    constexpr int step = TOKENS < 128 ? 2 : 1;  // half blocks of fragments in a set: what registers have room for
    const int group = warp / 4, tile = warp % 4, scale_place = lane / 4 * 4 + tile;
    int slot = 0, previous = -1;
    uint32_t parity = 0;
    Dequantizer<T, BITS> dequantizer(a);
    float sums[TOKENS / 2];
    uint32_t fragments[2][2 * step][4];
    Schedule work(a);
    Piece p;
    while (work.next(p)) {
#pragma unroll
      for (int i = 0; i < TOKENS / 2; ++i) sums[i] = 0.f;
      for (int turn = p.begin; turn < p.end; ++turn) {
        const uint32_t stage = base + 1024 + slot * L::stage;
        const Shared weight{stage + L::x_bytes + group * L::weight_bytes}, scales{stage + L::scales + group * L::scale_room};
        barrier_wait(base + full_barrier(slot), parity);
        uint32_t words[2][C::words];
        C::load(words[0], weight, tile, 0, lane);
        if (BITS != 8 && step == 2) C::load(words[1], weight + L::weight_block, tile, 0, lane);
        if (UNITS == 4) dequantizer.enter(a, scales, scale_place);
        const int first_group = UNITS == 4 ? 0 : group_of(a, 4 * turn);
#pragma unroll
        for (int half = 0; half < 2 * kTurnBlocks; ++half) {
          const int set = half / step % 2;
          if (half % step == 0) wgmma_wait<1>();  // this set of fragments has been read
          if (half == step) {                     // and the stage before this one
            if (previous >= 0 && lane == 0) barrier_arrive(base + empty_barrier(previous));
            previous = slot;
          }
          if (BITS == 8 ? half > 0 : step == 1 && half == 1)
            C::load(words[BITS == 8 ? 0 : 1], weight + (BITS == 8 ? half / 2 : 1) * L::weight_block, tile, half % 2, lane);
          if (UNITS == 1) dequantizer.enter(a, scales + (min(group_of(a, 4 * turn + half), a.groups - 1) - first_group) * a.scale_stride, scale_place);
#pragma unroll
          for (int j = 0; j < 2; ++j)
            dequantizer.fragment(fragments[set][2 * (half % step) + j], words[BITS == 8 ? 0 : half / 2], 2 * (half % 2) + j);
          if (half % step == step - 1) {
            wgmma_begin();
#pragma unroll
            for (int j = 0; j < 2 * step; ++j) {
              const int k_step = 2 * (half + 1 - step) + j;
              Wgmma<T, TOKENS>::run(sums, fragments[set][j], swizzled_operand(stage, k_step / 4 * L::x_block + k_step % 4 * 32));
            }
            wgmma_commit();
          }
        }
        if (++slot == a.stages) slot = 0, parity ^= 1;
      }
      wgmma_wait<0>();
      if (lane == 0) barrier_arrive(base + empty_barrier(previous));
      previous = -1;

      float4 pieces[L::pieces];
#pragma unroll
      for (int j = 0; j < L::pieces; ++j) pieces[j] = make_float4(sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]);
      const int row = p.tile / a.token_tiles * L::rows, token = p.tile % a.token_tiles * TOKENS;
      const int present = min(L::pieces, (a.m - token + 7) / 8);
      if (a.split > 1) {
        exchange<T, L>(a, pieces, row, token, present, base, warp, lane);
      } else if (p.end < work.turns) {
        leave<L>(a, pieces, present, group);
      } else {
        if (p.begin > 0) collect<L>(a, work, pieces, p.tile * work.turns, present, group);
        if (L::box > 0 && a.n % 8 == 0) {
          send<T, L>(a, pieces, row, token, base, group, warp, lane);
        } else {
#pragma unroll
          for (int j = 0; j < L::pieces; ++j)
            if (j < present) write_piece<T>(a, row + 16 * warp, token + 8 * j, pieces[j], lane);
        }
      }
    }
    if (L::box > 0) bulk_wait();
  }
#endif
}

}  // namespace woq
