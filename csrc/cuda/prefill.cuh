// y = x W^T for more tokens than `decode` is good at, on sm_90a.
//
// The transposed product again: a tile is 64 GROUPS rows of W times TOKENS tokens, 64 or 128 rows for each multiplying warp
// group. A fetching warp a row group streams packed weights (bulk copies) and x (TMA, 128-byte swizzle) through a ring of stages,
// from which the others multiply: wide.cuh by wgmma, narrow.cuh tiles of 8 tokens by mma.sync. A stage is two blocks, 128 inputs;
// with 256 tokens one, with 8 four.
//
//     split > 1    grid (split, tiles): the cluster spans x, each of its thread blocks takes a part of K, and the sums are
//                  exchanged through distributed shared memory
//     split == 1   grid (1, thread blocks that stay): whole tiles first, one wave after the other; what is left over, if the plan
//                  shares it out, is cut into equal shares of turns, and a tile's last thread block adds up what the others
//                  left in memory
//
// Sums are added in a fixed order either way: results repeat to the bit.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "narrow.cuh"
#include "prefill_args.h"
#include "reduce.cuh"
#include "wide.cuh"

namespace woq {

constexpr int kFetchRegisters = 32;

template <class T, int BITS, int TOKENS, int GROUPS>
struct PrefillLayout {
  static constexpr int tokens = TOKENS, groups = GROUPS, rows = GROUPS * kBlock, residents = PrefillPlan::residents(TOKENS, GROUPS);
  static constexpr int warp_groups = PrefillPlan::warp_groups(TOKENS, GROUPS), warps = 4 * warp_groups, threads = 32 * warps + 128;
  static constexpr int height = GROUPS / warp_groups;                // row groups of a warp group
  static constexpr int registers = warp_groups == 4 ? 112 : warp_groups == 3 ? 160 : residents > 1 ? 104 : 232;  // of a multiplying thread, after they are dealt out anew
  static constexpr int turn_blocks = PrefillPlan::turn_blocks(TOKENS), halves = 2 * turn_blocks;  // of a stage; half: 32 inputs
  static constexpr bool narrow = PrefillPlan::narrow(TOKENS);
  static constexpr int shared_units = narrow ? halves / 2 : halves;  // times 32 inputs that must share scales for ONE_GROUP
  static constexpr int x_block = TOKENS * kBlock * 2, x_bytes = turn_blocks * x_block;
  static constexpr int weight_block = 512 * BITS, weight_bytes = turn_blocks * weight_block;
  static constexpr int scale_room = PrefillPlan::scale_room(TOKENS);
  static constexpr int scales = x_bytes + GROUPS * weight_bytes;     // in a stage
  static constexpr int stage = PrefillPlan::stage_bytes(TOKENS, GROUPS, BITS);
  static constexpr int pieces = TOKENS / 8;                          // of 16 rows' sums: 8 tokens each, a float4 a lane
  static constexpr int box = PrefillPlan::box_bytes(TOKENS, GROUPS) / GROUPS;  // of a row group

  // Offsets from the aligned base: barriers | ring | pairs' sums | boxes, or sums of the cluster, which take the ring's place where
  // they are large
  static constexpr bool gather_apart = PrefillPlan::gather_apart(TOKENS, GROUPS);
  __device__ static int pairs(int stages) { return 1024 + stages * stage; }
  __device__ static int gather(int stages) { return gather_apart ? pairs(stages) + PrefillPlan::pair_bytes(TOKENS, GROUPS) : 1024; }
};

#if HOPPER_WGMMA
// Turns begin .. end of one tile.
struct Piece {
  int tile, begin, end;
};

// What one thread block computes, in order. The shares of leftover tiles go backwards: what others wait for comes first.
class Schedule {
 public:
  __device__ Schedule(const PrefillArgs& a, int turns) : turns(turns) {
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

// Where a tile lies. Tiles go through a band of tokens that the L2 cache can hold, row by row.
struct Place {
  int row_tile, token_tile;
  __device__ Place(const PrefillArgs& a, int tile) {
    const int row_tiles = a.tiles / a.token_tiles, first = tile / (a.band * row_tiles) * a.band;
    const int inside = tile - first * row_tiles, width = min(a.band, a.token_tiles - first);
    row_tile = inside / width, token_tile = first + inside % width;
  }
};

// One fetching warp: packed weights of row group `row` of every tile, or the activations; with four row groups, the first warp
// brings both. Weights do not depend on the previous kernel, so only x waits for it.
template <class L>
__device__ void fetch(const PrefillArgs& a, const CUtensorMap* x_map, uint32_t base, int row) {
  const bool weights = row < L::groups, inputs = row == L::groups % 4;
  const uint64_t policy = a.token_tiles > 1 ? keep_policy() : read_once_policy();
  if (inputs) dependency_wait();
  Schedule work(a, PrefillPlan::turns(L::tokens, a.k_blocks));
  Piece p;
  int slot = 0;
  uint32_t parity = 1;
  while (work.next(p)) {
    const Place place(a, p.tile);
    const int row_group = place.row_tile * L::groups + row, first_token = place.token_tile * L::tokens;
    const bool present = weights && row_group < a.row_groups;
    const uint8_t* weight = a.weight + int64_t(row_group) * a.k_blocks * L::weight_block;
    const uint8_t* scales = a.scales + int64_t(row_group) * a.groups * a.scale_stride;
#pragma unroll 1
    for (int turn = p.begin; turn < p.end; ++turn) {
      const uint32_t full = base + full_barrier(slot), stage = base + 1024 + slot * L::stage;
      const int bytes = min(L::turn_blocks, a.k_blocks - L::turn_blocks * turn) * L::weight_block;  // of the last: maybe one block
      const int first = group_of(a, L::halves * turn), last = min(group_of(a, L::halves * turn + L::halves - 1), a.groups - 1);
      const int scale_bytes = (last - first + 1) * a.scale_stride;
      barrier_wait(base + empty_barrier(slot), parity);
      barrier_expect(full, (present ? bytes + scale_bytes : 0) + (inputs ? L::x_bytes : 0));
      if (present) {
        bulk_copy(stage + L::x_bytes + row * L::weight_bytes, weight + int64_t(turn) * L::weight_bytes, bytes, full, policy);
        bulk_copy(stage + L::scales + row * L::scale_room, scales + int64_t(first) * a.scale_stride, scale_bytes, full, policy);
      }
      if (inputs)  // zeros beyond k: a missing block of weights counts for nothing
#pragma unroll
        for (int b = 0; b < L::turn_blocks; ++b) tensor_copy(stage + b * L::x_block, x_map, (L::turn_blocks * turn + b) * kBlock, first_token, full);
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

template <class L>
__device__ float4 piece(const float (&sums)[L::tokens / 2], int j) {
  return make_float4(sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]);
}

// 16 rows of a tile, `part`, times 8 tokens, `j`, are piece u = j parts + part. It belongs to thread block u % split of the
// cluster, which is sent all parts of it and adds them up.
template <class T, class L>
__device__ void exchange(const PrefillArgs& a, const float (&sums)[L::height][L::tokens / 2], int row, int token, int pieces, uint32_t base, int warp, int lane) {
  constexpr int parts = 4 * L::groups;
  const int rank = blockIdx.x;
  const uint32_t gather = base + L::gather(a.stages), barrier = base + gather_barrier(0);
  if (!L::gather_apart) cluster_arrive();  // this ring has been read; for a place beside it the arrival was at the start
  cluster_wait();
#pragma unroll
  for (int h = 0; h < L::height; ++h)
#pragma unroll
    for (int j = 0; j < L::pieces; ++j) {
      const int u = j * parts + 4 * (warp / 4 * L::height + h) + warp % 4;
      if (j < pieces) store_remote(gather + ((u / a.split * a.split + rank) * 32 + lane) * 16, barrier, u % a.split, piece<L>(sums[h], j));
    }
  const int owned = (pieces * parts - rank + a.split - 1) / a.split;
  if (threadIdx.x == 0) barrier_expect(barrier, owned * a.split * 512);
  barrier_wait_cluster(barrier, 0);
  for (int i = warp; i < owned; i += L::warps) {
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int r = 0; r < a.split; ++r) sum = sum + read<float4>(Shared{gather + ((i * a.split + r) * 32 + lane) * 16});
    const int u = i * a.split + rank;
    write_piece<T>(a, row + u % parts * 16, token + u / parts * 8, sum, lane);
  }
}

// A warp group's rows of a tile, by way of a box [128 tokens][64 rows] for each of its row groups, swizzled as TMA wants it: the
// copies to memory run while the next tile is computed. Needs n % 8 == 0.
template <class T, class L>
__device__ void send(const PrefillArgs& a, const CUtensorMap* y_map, const float (&sums)[L::height][L::tokens / 2], int row, int token, uint32_t base, int warp, int lane) {
  constexpr int pieces = PrefillPlan::box_tokens / 8, bytes = PrefillPlan::box_tokens * kBlock * 2;
  const uint32_t boxes = base + 1024 + a.stages * L::stage + warp / 4 * L::height * bytes;
  const int own = (lane / 4) * 128 + 4 * (lane % 4), chunk = 2 * (warp % 4);
#pragma unroll
  for (int first = 0; first < L::pieces; first += pieces) {
    if (threadIdx.x % 128 == 0) bulk_wait_read();  // of what was in the boxes before
    join(warp);
#pragma unroll
    for (int h = 0; h < L::height; ++h)
#pragma unroll
      for (int j = 0; j < pieces; ++j) {
        const Shared to{boxes + h * bytes + j * 1024 + own};
        const float4 v = piece<L>(sums[h], first + j);
        write(to + (chunk ^ (lane / 4)) * 16, transpose(Float16<T>::pack(v.x, v.y)));
        write(to + ((chunk + 1) ^ (lane / 4)) * 16, transpose(Float16<T>::pack(v.z, v.w)));
      }
    copy_fence();
    join(warp);
    if (threadIdx.x % 128 == 0) {
      for (int h = 0; h < L::height; ++h) tensor_store(y_map, row + h * kBlock, token + 8 * first, boxes + h * bytes);
      bulk_commit();
    }
  }
}

// A thread block that does not finish a tile leaves its sums in memory; each warp group by itself.
template <class L>
__device__ void leave(const PrefillArgs& a, const float (&sums)[L::height][L::tokens / 2], int pieces, int warp) {
  const int place = blockIdx.y * L::warp_groups + warp / 4;
  float4* to = static_cast<float4*>(a.partial) + static_cast<int64_t>(place) * L::height * L::pieces * 128 + threadIdx.x % 128;
#pragma unroll
  for (int h = 0; h < L::height; ++h)
#pragma unroll
    for (int j = 0; j < L::pieces; ++j)
      if (j < pieces) to[(h * L::pieces + j) * 128] = piece<L>(sums[h], j);
  __threadfence();
  join(warp);
  if (threadIdx.x % 128 == 0) store_release(a.ready + place, a.launch);
}

// The one that does finish it adds them, from the nearest thread block to the farthest. It waits only for thread blocks with
// smaller indices, which started no later. A mark is wiped once read: a graph's next replay has the same `launch`.
template <class L>
__device__ void collect(const PrefillArgs& a, const Schedule& work, float (&sums)[L::height][L::tokens / 2], int first_turn, int pieces, int warp) {
  for (int block = blockIdx.y - 1;; --block) {
    const int place = block * L::warp_groups + warp / 4;
    if (threadIdx.x % 128 == 0) {
      while (load_acquire(a.ready + place) != a.launch) {
      }
      a.ready[place] = 0;
    }
    join(warp);
    const float4* from = static_cast<const float4*>(a.partial) + static_cast<int64_t>(place) * L::height * L::pieces * 128 + threadIdx.x % 128;
#pragma unroll
    for (int h = 0; h < L::height; ++h)
#pragma unroll
      for (int j = 0; j < L::pieces; ++j)
        if (j < pieces) {
          const float4 v = __ldcg(from + (h * L::pieces + j) * 128);
          sums[h][4 * j] += v.x, sums[h][4 * j + 1] += v.y, sums[h][4 * j + 2] += v.z, sums[h][4 * j + 3] += v.w;
        }
    if (work.share(a, block) <= first_turn) break;
  }
}

// What becomes of a tile's sums, or of a part of K of them.
template <class T, class L>
__device__ void finish(const PrefillArgs& a, const CUtensorMap* y_map, const Schedule& work, const Piece& p, float (&sums)[L::height][L::tokens / 2], uint32_t base, int warp, int lane) {
  const Place place(a, p.tile);
  const int row = place.row_tile * L::rows, token = place.token_tile * L::tokens, group = warp / 4 * L::height;
  const int present = min(L::pieces, (a.m - token + 7) / 8);
  if (a.split > 1) return exchange<T, L>(a, sums, row, token, present, base, warp, lane);
  if (p.end < work.turns) return leave<L>(a, sums, present, warp);
  if (p.begin > 0) collect<L>(a, work, sums, p.tile * work.turns, present, warp);
  if (L::box > 0 && a.n % 8 == 0) {
    send<T, L>(a, y_map, sums, row + kBlock * group, token, base, warp, lane);
  } else {
#pragma unroll
    for (int h = 0; h < L::height; ++h)
#pragma unroll
      for (int j = 0; j < L::pieces; ++j)
        if (j < present) write_piece<T>(a, row + kBlock * (group + h) + 16 * (warp % 4), token + 8 * j, piece<L>(sums[h], j), lane);
  }
}
#endif

template <class T, int BITS, int TOKENS, int GROUPS, bool ONE_GROUP>
__global__ void __launch_bounds__(PrefillLayout<T, BITS, TOKENS, GROUPS>::threads, PrefillLayout<T, BITS, TOKENS, GROUPS>::residents)
    prefill_kernel(const __grid_constant__ PrefillArgs a, const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap y_map) {
#if HOPPER_WGMMA
  using L = PrefillLayout<T, BITS, TOKENS, GROUPS>;
  extern __shared__ uint8_t unaligned[];
  // Through shuffles, or the compiler computes both anew wherever they are used.
  const uint32_t base = __shfl_sync(~0u, (smem_address(unaligned) + 1023) & ~1023u, 0);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;

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
    return;
  }
  registers_claim<L::registers>();
  dependency_wait();
  launch_dependents();
  using M = std::conditional_t<L::narrow, NarrowMultiplier<T, BITS, L, ONE_GROUP>, Multiplier<T, BITS, L, ONE_GROUP>>;
  M multiplier(a, unaligned + (base - smem_address(unaligned)), base, warp, lane);
  Schedule work(a, PrefillPlan::turns(TOKENS, a.k_blocks));
  Piece p;
  int slot = 0, previous = -1;
  uint32_t parity = 0;
  const auto leave_stage = [&](int which) {
    if (which >= 0 && lane == 0) barrier_arrive(base + empty_barrier(which));
  };
  while (work.next(p)) {
    multiplier.clear();
    for (int turn = p.begin; turn < p.end; ++turn) {
      // Through a shuffle, so that the addresses of operands are made in uniform registers, where wgmma wants them.
      const uint32_t stage = __shfl_sync(~0u, base + 1024 + slot * L::stage, 0);
      barrier_wait(base + full_barrier(slot), parity);
      multiplier.run(stage, turn, [&] { leave_stage(previous), previous = slot; });
      if (M::at_once) __syncwarp(), leave_stage(slot);
      if (++slot == a.stages) slot = 0, parity ^= 1;
    }
    multiplier.end();
    leave_stage(previous), previous = -1;
    finish<T, L>(a, &y_map, work, p, multiplier.sums, base, warp, lane);
  }
  if (L::box > 0) bulk_wait();
#endif
}

}  // namespace woq
