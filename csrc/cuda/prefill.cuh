// y = x W^T for more tokens than `decode` is good at, on sm_90a: wgmma with the weights as the operand held in registers.
//
// The transposed product again: a tile is 64 GROUPS rows of W times TOKENS tokens, 64 or 128 rows for each multiplying warp
// group. A fetching warp a row group streams packed weights (bulk copies) and x (TMA, 128-byte swizzle) through a ring of stages;
// each multiplying thread turns its codes into A fragments, exactly (code - zero), rounds them once with the scale to the
// activations' dtype, and issues wgmma. Fragments are held twice: while the tensor cores read one set, the next is made. A stage
// is two blocks, 128 inputs, or with 256 tokens one. What this gives up over `decode`: a weight is rounded to 16 bits before it
// is multiplied, as any dequantize-then-matmul would.
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
#include "wgmma.cuh"

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
  __device__ static int gather(int stages) { return 1024 + (gather_apart ? stages * stage + PrefillPlan::pair_bytes(TOKENS, GROUPS) : 0); }
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

// code - zero, exactly, and if SCALED one rounding with the scale. `zero` and `scale` hold a value twice.
template <class T, int BITS>
struct Dequantizer {
  using C = Codes<T, BITS, 0>;
  using T2 = typename Float16<T>::Pair;
  uint32_t scale[2], zero[2];  // rows lane / 4 and lane / 4 + 8

  __device__ void begin(const PrefillArgs& a) {
    const float z = a.symmetric_zero + (C::split ? 0.f : C::offset);
    zero[0] = zero[1] = bits(Float16<T>::twice(z));
  }
  struct Stored {
    uint32_t scales;
    uint16_t zeros;
  };
  // A group's, at `group`. Symmetric weights have no zero points there, but readable memory.
  __device__ static Stored load(Shared group, int place) { return {read<uint32_t>(group + place * 4), read<uint16_t>(group + kScaleBytes + place * 2)}; }
  // Without branches; CONVERT: scales may be of the other dtype.
  template <bool CONVERT>
  __device__ void enter(const PrefillArgs& a, Stored s) {
    scale[0] = __byte_perm(s.scales, 0, 0x1010), scale[1] = __byte_perm(s.scales, 0, 0x3232);
    if constexpr (CONVERT) {
      const bool other = a.scale_is_bf16 != Float16<T>::is_bf16;
      const T2 low = Float16<T>::twice(scale_value(s.scales & 0xFFFF, a.scale_is_bf16)), high = Float16<T>::twice(scale_value(s.scales >> 16, a.scale_is_bf16));
      scale[0] = other ? bits(low) : scale[0], scale[1] = other ? bits(high) : scale[1];
    }
    const bool symmetric = a.scale_stride == kScaleBytes;
    zero[0] = symmetric ? zero[0] : C::twice(s.zeros & 255), zero[1] = symmetric ? zero[1] : C::twice(s.zeros >> 8);
  }
  template <bool SCALED>
  __device__ void fragment(uint32_t (&a)[4], const uint32_t (&words)[C::words], int j) const {
    uint32_t low[4], high[4];
    C::fragment(low, words, j);
    if constexpr (C::split) C::template fragment<1>(high, words, j);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      T2 code = pair(low[i]);
      if constexpr (C::split) code = __hadd2(__hsub2(pair(high[i]), Float16<T>::twice(C::offset)), code);
      code = __hsub2(code, pair(zero[i % 2]));
      a[i] = bits(SCALED ? __hmul2(code, pair(scale[i % 2])) : code);
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

// Barrier of one multiplying warp group.
__device__ __forceinline__ void join(int warp) { asm volatile("bar.sync %0, 128;" ::"r"(1 + warp / 4) : "memory"); }

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

#if HOPPER_WGMMA
// What a multiplying warp holds, and what it does in a turn. ONE_GROUP: the inputs of a turn lie in one group, whose scales have
// the activations' dtype; otherwise every 32 inputs' scales are looked up and converted. No branches on that: the compiler gives
// up overlapping wgmma with what a branch may define.
//
// With few tokens and ONE_GROUP scales come late: weights are (code - zero), a turn's sums of products are scaled, in fp32, when
// the next begins. Fewer instructions than scaling weights, and none is rounded.
template <class T, int BITS, class L, bool ONE_GROUP>
struct Multiplier {
  using C = Codes<T, BITS, 0>;
  using D = Dequantizer<T, BITS>;
  static constexpr bool at_once = false;
  static constexpr bool late = ONE_GROUP && L::tokens <= 32;
  static constexpr int step = L::height * L::tokens < 256 ? 2 : 1;  // half blocks of fragments in a set: what registers have room for
  static constexpr int each = BITS == 8 ? 1 : 2;                    // half blocks of codes loaded at a time
  static constexpr int sums_each = L::tokens / 2;                   // of a row group: rows lane / 4 and lane / 4 + 8 of every token, as wgmma has them

  const PrefillArgs& a;
  const int lane, tile, scale_place, group;  // 16 rows of each row group, where their scales lie; the warp group's first row group
  D dequantizers[L::height];
  typename D::Stored stored[L::height];
  uint32_t words[2][L::height][C::words], fragments[2][L::height][2 * step][4];
  float sums[L::height][sums_each];
  float products[late ? sums_each : 1], late_scales[2];  // of the last turn; late implies a height of one

  __device__ Multiplier(const PrefillArgs& a, int warp, int lane) 
      : a(a), lane(lane), tile(warp % 4), scale_place(lane / 4 * 4 + warp % 4), group(warp / 4 * L::height) {
#pragma unroll
    for (int h = 0; h < L::height; ++h) dequantizers[h].begin(a);
  }

  __device__ void clear() {
#pragma unroll
    for (int h = 0; h < L::height; ++h)
#pragma unroll
      for (int i = 0; i < sums_each; ++i) sums[h][i] = 0.f;
    if constexpr (late) {
#pragma unroll
      for (int i = 0; i < sums_each; ++i) products[i] = 0.f;
      late_scales[0] = late_scales[1] = 0.f;
    }
  }

  // Turn number `turn` of the tile, from `stage`. `release` is called once the stage before it has been read.
  template <class Release>
  __device__ void run(uint32_t stage, int turn, Release release) {
    load(words[0], stage, 0);
    if (ONE_GROUP) enter<false>(stage, 0);
    [[maybe_unused]] const int first_group = ONE_GROUP ? 0 : group_of(a, L::halves * turn);
#pragma unroll
    for (int half = 0; half < L::halves; ++half) {
      const int set = half / step % 2, now = half / each % 2;
      if (half % each == 0 && half + each < L::halves) load(words[1 - now], stage, half + each);
      if (!ONE_GROUP) enter<true>(stage, min(group_of(a, L::halves * turn + half), a.groups - 1) - first_group);
      if constexpr (late) {
        if (half == 0) scale_products();
        else if (half == step) wgmma_wait<1>();
      } else if (half % step == 0) {
        wgmma_wait<1>();  // this set of fragments has been read
      }
      if (half == (late ? 0 : step)) release();
#pragma unroll
      for (int h = 0; h < L::height; ++h)
#pragma unroll
        for (int j = 0; j < 2; ++j) dequantizers[h].template fragment<!late>(fragments[set][h][2 * (half % step) + j], words[now][h], 2 * (half % 2) + j);
      if (half % step == step - 1) multiply(fragments[set], stage, half + 1 - step);
    }
  }

  // Nothing is under way any more, and the last stage has been read.
  __device__ void end() {
    if constexpr (late) scale_products();
    else wgmma_wait<0>();
  }

 private:
  __device__ void load(uint32_t (&to)[L::height][C::words], uint32_t stage, int half) const {
#pragma unroll
    for (int h = 0; h < L::height; ++h)
      C::load(to[h], Shared{stage + L::x_bytes + (group + h) * L::weight_bytes + half / 2 * L::weight_block}, tile, half % 2, lane);
  }
  // Scales and zero points of the stage's group `number`.
  template <bool CONVERT>
  __device__ void enter(uint32_t stage, int number) {
#pragma unroll
    for (int h = 0; h < L::height; ++h)
      stored[h] = D::load(Shared{stage + L::scales + (group + h) * L::scale_room + number * a.scale_stride}, scale_place);
#pragma unroll
    for (int h = 0; h < L::height; ++h) dequantizers[h].template enter<CONVERT>(a, stored[h]);
  }
  // The last turn's products are added to the sums, under that turn's scales; those of the one that begins take their place.
  __device__ void scale_products() {
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < sums_each; ++i) sums[0][i] += late_scales[i / 2 % 2] * products[i], products[i] = 0.f;
#pragma unroll
    for (int i = 0; i < 2; ++i) late_scales[i] = Float16<T>::value(dequantizers[0].scale[i] & 0xFFFF);
  }
  __device__ void multiply(const uint32_t (&set)[L::height][2 * step][4], uint32_t stage, int half) {
    wgmma_begin();
#pragma unroll
    for (int j = 0; j < 2 * step; ++j) {
      const int k_step = 2 * half + j;
      const uint64_t x = swizzled_operand(stage, k_step / 4 * L::x_block + k_step % 4 * 32);
#pragma unroll
      for (int h = 0; h < L::height; ++h) {
        if constexpr (late) Wgmma<T, L::tokens>::run(products, set[h][j], x);
        else Wgmma<T, L::tokens>::run(sums[h], set[h][j], x);
      }
    }
    wgmma_commit();
  }
};
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
  const auto multiplier_of = [&] {
    if constexpr (L::narrow) {
      const uint32_t pairs = base + 1024 + a.stages * L::stage + warp * 64 * TOKENS;
      return NarrowMultiplier<T, BITS, L, ONE_GROUP>(a, unaligned + (base - smem_address(unaligned)), base, pairs, warp, lane);
    } else {
      return Multiplier<T, BITS, L, ONE_GROUP>(a, warp, lane);
    }
  };
  auto multiplier = multiplier_of();
  Schedule work(a, PrefillPlan::turns(TOKENS, a.k_blocks));
  Piece p;
  int slot = 0, previous = -1;
  uint32_t parity = 0;
  const auto release = [&] {
    if (previous >= 0 && lane == 0) barrier_arrive(base + empty_barrier(previous));
    previous = slot;
  };
  while (work.next(p)) {
    multiplier.clear();
    for (int turn = p.begin; turn < p.end; ++turn) {
      // Through a shuffle, so that the addresses of operands are made in uniform registers, where wgmma wants them.
      const uint32_t stage = __shfl_sync(~0u, base + 1024 + slot * L::stage, 0);
      barrier_wait(base + full_barrier(slot), parity);
      multiplier.run(stage, turn, release);
      if constexpr (multiplier.at_once) {
        __syncwarp();
        if (lane == 0) barrier_arrive(base + empty_barrier(slot));
      }
      if (++slot == a.stages) slot = 0, parity ^= 1;
    }
    multiplier.end();
    if constexpr (!multiplier.at_once) release();
    previous = -1;
    finish<T, L>(a, &y_map, work, p, multiplier.sums, base, warp, lane);
  }
  if (L::box > 0) bulk_wait();
#endif
}

}  // namespace woq
