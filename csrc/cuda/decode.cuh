// y = x W^T for a handful of tokens: the memory-bound case, where the only cost that counts is reading the weights once.
//
// W is the left operand, so that its 16-row tiles fill the tensor core whatever the number of tokens. The warps of a thread
// block share a ring of bulk copies, which they refill in turn, and meet only to add up partial sums: over the block's warps
// in shared memory, then over the cluster's blocks through distributed shared memory, in a fixed order (results are bitwise
// repeatable).
//
//     grid     (split, row blocks); the cluster spans x: `split` blocks share rows and divide K
//     block    k_warps x row_warps warps: k_warps take turns along K, row_warps take neighbouring row groups
//     turn     one warp's part of a stage: 64 rows x 128 inputs (64 with 8 bits)
//
// Weights and scales do not depend on the previous kernel, so the ring is filled before dependency_wait(): with programmatic
// launch the memory stays busy while the predecessor drains. It follows that weights must have been written by a kernel that
// is known to be complete; `prepare` synchronizes once for that reason.
//
// Below sm_90 the refilling warp uses cp.async, and `split` is 1.
#pragma once

#include "reduce.cuh"

namespace woq {

// The stages this thread block goes through, in order: its K slice of one row item after the other.
struct Walk {
  int slice_begin, slice_end, stage_blocks, item_step, items;
  int item, block;  // current row item, first block of the current stage

  __device__ bool done() const { return item >= items; }
  __device__ int blocks() const { return min(stage_blocks, slice_end - block); }
  __device__ bool last_of_item() const { return block + stage_blocks >= slice_end; }
  __device__ void next() {
    block += stage_blocks;
    if (block >= slice_end) block = slice_begin, item += item_step;
  }
};

// One warp starts the copies of the stage `walk` stands at into `slot`, which every warp has left.
template <int BLOCK_BYTES>
__device__ void fetch_stage(const DecodeArgs& a, const DecodeLayout& layout, const Walk& walk, uint32_t base, int slot, int lane) {
  const int rows_here = min(a.row_warps, a.row_groups - walk.item * a.row_warps);
  const int weight_bytes = walk.blocks() * BLOCK_BYTES;
  const int first_group = group_of(a, 2 * walk.block);
  const int last_group = min(group_of(a, 2 * (walk.block + walk.blocks()) - 1), a.groups - 1);
  const int scale_bytes = (last_group - first_group + 1) * a.scale_stride;
  const uint32_t full = base + full_barrier(slot), stage = base + layout.ring + slot * layout.stage;
#if HOPPER
  if (!elect()) return;
  barrier_expect(full, rows_here * (weight_bytes + scale_bytes));
  const uint64_t policy = read_once_policy();
#endif
#pragma unroll 1
  for (int r = 0; r < rows_here; ++r) {
    const int64_t row_group = walk.item * a.row_warps + r;
    const uint8_t* weight = a.weight + (row_group * a.k_blocks + walk.block) * BLOCK_BYTES;
    const uint8_t* scales = a.scales + (row_group * a.groups + first_group) * a.scale_stride;
    const uint32_t to = stage + r * layout.stage_blocks * BLOCK_BYTES, scales_to = stage + layout.scale_offset + r * layout.scale_room;
#if HOPPER
    bulk_copy(to, weight, weight_bytes, full, policy);
    bulk_copy(scales_to, scales, scale_bytes, full, policy);
#else
    for (int i = lane * 16; i < weight_bytes; i += 512) copy16_async(to + i, weight + i);
    for (int i = lane * 16; i < scale_bytes; i += 512) copy16_async(scales_to + i, scales + i);
#endif
  }
#if !HOPPER
  copy_arrive(full);
#endif
}

// x[:, 64 first .. 64 last) to shared memory, zero beyond k.
template <class T>
__device__ void stage_x(const DecodeArgs& a, uint8_t* shared, int stride, int first, int last, uint32_t barrier, int warp, int lane) {
  const T* x = static_cast<const T*>(a.x);
#if HOPPER
  if (a.k % kBlock == 0) {
    const int bytes = (last - first) * kBlock * 2;
    if (warp == 0) {
      if (elect()) {
        barrier_expect(barrier, a.m * bytes);
        for (int row = 0; row < a.m; ++row)
          bulk_copy(smem_address(shared) + row * stride, x + static_cast<int64_t>(row) * a.k + first * kBlock, bytes, barrier, keep_policy());
      }
      __syncwarp();
    }
    barrier_wait(barrier, 0);
    return;
  }
#endif
  const bool vectors = a.k % 8 == 0;
  const int width = vectors ? 8 : 1, columns = (last - first) * kBlock / width;
  // Thread i takes elements i, i + blockDim, ..., without dividing by the row length each time.
  int row = threadIdx.x / columns, column = threadIdx.x % columns;
  while (row < a.m) {
    const int k = first * kBlock + column * width;
    const T* from = x + static_cast<int64_t>(row) * a.k;
    uint8_t* to = shared + row * stride + column * width * 2;
    if (vectors) {
      // cp.async keeps all of a thread's loads in flight at once, without registers
      copy16_async(smem_address(to), from + min(k, a.k - 8), k < a.k ? 16 : 0);
    } else {
      *reinterpret_cast<T*>(to) = k < a.k ? from[k] : Float16<T>::round(0.f);
    }
    for (column += blockDim.x; column >= columns; column -= columns) ++row;
  }
  copy_commit();
  copy_wait<0>();
  __syncthreads();
}

// A lane's scales and (offset + zero point)s in TILES row tiles from `first` on: rows lane / 4 and lane / 4 + 8 of each.
template <int TILES>
struct GroupScales {
  float scale[2 * TILES], zero[2 * TILES];

  __device__ GroupScales(const DecodeArgs& a, const uint8_t* group, float offset, int first, int lane) {
    uint32_t pairs[TILES];
    copy_words(pairs, group + lane / 4 * 16 + first * 4);
    if (a.scale_is_bf16) {
#pragma unroll
      for (int i = 0; i < 2 * TILES; ++i) scale[i] = __uint_as_float(i % 2 ? pairs[i / 2] & 0xFFFF0000 : pairs[i / 2] << 16);
    } else {
#pragma unroll
      for (int i = 0; i < TILES; ++i) {
        const float2 two = __half22float2(*reinterpret_cast<const __half2*>(&pairs[i]));
        scale[2 * i] = two.x, scale[2 * i + 1] = two.y;
      }
    }
    if (a.scale_stride == kScaleBytes) {
#pragma unroll
      for (int i = 0; i < 2 * TILES; ++i) zero[i] = offset + a.symmetric_zero;
    } else {
      uint32_t bytes[TILES / 2];
      copy_words(bytes, group + kScaleBytes + lane / 4 * 8 + first * 2);
#pragma unroll
      for (int i = 0; i < 2 * TILES; ++i) zero[i] = offset + float((bytes[i / 4] >> (8 * (i % 4))) & 255);
    }
  }

 private:
  template <int WORDS>
  __device__ static void copy_words(uint32_t (&to)[WORDS], const uint8_t* from) {
    if constexpr (WORDS == 4) {
      const uint4 v = *reinterpret_cast<const uint4*>(from);
      to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    } else if constexpr (WORDS == 2) {
      const uint2 v = *reinterpret_cast<const uint2*>(from);
      to[0] = v.x, to[1] = v.y;
    } else {
      to[0] = *reinterpret_cast<const uint32_t*>(from);
    }
  }
};

// One warp's turn: UNITS * 32 inputs at a time, which lie in one group, are summed unscaled and then scaled once:
//     total += scale * (sum x (offset + code) - (offset + zero) * sum x)
// The second sum is a product with ones: the tensor cores are idle, and it lands in the lanes that need it.
template <class T, int BITS, int TOKEN_TILES, int UNITS>
struct Turn {
  using C = Codes<T, BITS>;
  static constexpr int tiles = TOKEN_TILES == 1 ? 4 : 2;  // row tiles at a time: what registers allow
  float total[kRowTiles][TOKEN_TILES][4];

  // `blocks` consecutive blocks, their groups' scales (the first group's at `scales`), and x in shared memory.
  __device__ void multiply(const DecodeArgs& a, const uint8_t* block, int blocks, const uint8_t* scales, int first_unit, int first_group,
                           const uint32_t (&x)[TOKEN_TILES], int lane) {
    if constexpr (UNITS == 4) {
      chunk(a, block, blocks, 0, scales, x, lane);
    } else {
      for (int b = 0; b < blocks; ++b) {
#pragma unroll
        for (int half = 0; half < 2; half += UNITS) {
          const int group = min(group_of(a, first_unit + 2 * b + half), a.groups - 1) - first_group;
          uint32_t x_here[TOKEN_TILES];
#pragma unroll
          for (int c = 0; c < TOKEN_TILES; ++c) x_here[c] = x[c] + b * kBlock * 2;
          chunk(a, block + b * C::block_bytes, 1, half, scales + group * a.scale_stride, x_here, lane);
        }
      }
    }
  }

 private:
  // UNITS units from unit `from` (0 or 1) of the first block on; UNITS == 4 is up to two blocks.
  __device__ void chunk(const DecodeArgs& a, const uint8_t* block, int blocks, int from, const uint8_t* group, const uint32_t (&x)[TOKEN_TILES],
                        int lane) {
    float inputs[TOKEN_TILES][4] = {};
#pragma unroll
    for (int first_tile = 0; first_tile < kRowTiles; first_tile += tiles) {
      float codes[tiles][TOKEN_TILES][4] = {};
#pragma unroll
      for (int b = 0; b < (UNITS == 4 ? 2 : 1); ++b) {
        if (b < blocks) {
          uint32_t words[tiles][C::words];
#pragma unroll
          for (int half = UNITS == 1 ? from : 0; half < (UNITS == 1 ? from + 1 : 2); ++half) {
            if (BITS == 8 || UNITS == 1 || half == 0)
#pragma unroll
              for (int t = 0; t < tiles; ++t) C::load(words[t], block + b * C::block_bytes, first_tile + t, half, lane);
            uint32_t right[TOKEN_TILES][4];
#pragma unroll
            for (int c = 0; c < TOKEN_TILES; ++c) load_matrices(right[c], x[c] + (b * kBlock + half * 32) * 2);
#pragma unroll
            for (int j = 0; j < 2; ++j) step(words, codes, inputs, right, first_tile == 0, 2 * half + j);
          }
        }
      }
      const GroupScales<tiles> g(a, group, C::offset, first_tile, lane);
#pragma unroll
      for (int t = 0; t < tiles; ++t)
#pragma unroll
        for (int c = 0; c < TOKEN_TILES; ++c)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int row = 2 * t + e / 2;
            total[first_tile + t][c][e] += g.scale[row] * (codes[t][c][e] - g.zero[row] * inputs[c][e]);
          }
    }
  }

  // One k-step of 16 inputs.
  __device__ static void step(const uint32_t (&words)[tiles][C::words], float (&codes)[tiles][TOKEN_TILES][4], float (&inputs)[TOKEN_TILES][4],
                              const uint32_t (&right)[TOKEN_TILES][4], bool sum_inputs, int j) {
    const uint32_t ones[4] = {Float16<T>::ones, Float16<T>::ones, Float16<T>::ones, Float16<T>::ones};
    if (sum_inputs)
#pragma unroll
      for (int c = 0; c < TOKEN_TILES; ++c) mma<T>(inputs[c], ones, right[c][2 * (j & 1)], right[c][2 * (j & 1) + 1]);
#pragma unroll
    for (int t = 0; t < tiles; ++t) {
      uint32_t fragment[4];
      C::fragment(fragment, words[t], j);
#pragma unroll
      for (int c = 0; c < TOKEN_TILES; ++c) mma<T>(codes[t][c], fragment, right[c][2 * (j & 1)], right[c][2 * (j & 1) + 1]);
      if constexpr (C::split) {
        C::template fragment<1>(fragment, words[t], j);
#pragma unroll
        for (int c = 0; c < TOKEN_TILES; ++c) mma<T>(codes[t][c], fragment, right[c][2 * (j & 1)], right[c][2 * (j & 1) + 1]);
      }
    }
  }
};

template <class T, int BITS, int TOKEN_TILES, int UNITS>
__global__ void __launch_bounds__(32 * kMaxWarps, TOKEN_TILES <= 2 ? 2 : 1) decode_kernel(const __grid_constant__ DecodeArgs a) {
  using C = Codes<T, BITS>;
  constexpr int turn_blocks = blocks_per_turn(BITS);
  extern __shared__ __align__(128) uint8_t shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = a.k_warps * a.row_warps;
  const DecodeLayout layout = DecodeLayout::of(BITS, a);
  const uint32_t base = smem_address(shared);

  const int items = (a.row_groups + a.row_warps - 1) / a.row_warps;
  const int slice_begin = a.k_blocks * int(blockIdx.x) / a.split, slice_end = a.k_blocks * int(blockIdx.x + 1) / a.split;
  Walk walk{slice_begin, slice_end, layout.stage_blocks, int(gridDim.y), items, int(blockIdx.y), slice_begin};

#if HOPPER
  launch_dependents();
#endif
  if (threadIdx.x == 0) {
    for (int i = 0; i < a.stages; ++i) {
      barrier_init(base + full_barrier(i), HOPPER ? 1 : 32);
      barrier_init(base + empty_barrier(i), warps);
    }
    for (int i = 0; i < 2; ++i) barrier_init(base + gather_barrier(i), 1);
    barrier_init(base + kInputBarrier, 1);
    barrier_init_fence();
  }
  __syncthreads();
  Walk ahead = walk;  // the next stage to fetch
  for (int i = 0; i < a.stages && !ahead.done(); ++i, ahead.next())
    if (warp == 0) fetch_stage<C::block_bytes>(a, layout, ahead, base, i, lane);
#if HOPPER
  if (a.split > 1) cluster_arrive();
  dependency_wait();
#endif
  stage_x<T>(a, shared + layout.x, layout.x_stride, slice_begin, slice_end, base + kInputBarrier, warp, lane);
#if HOPPER
  if (a.split > 1) cluster_wait();  // the cluster's other blocks have started: their shared memory may be written
#endif

  // ldmatrix: lane l addresses row l % 8 (a token; rows past m repeat the last and are dropped) and 8 inputs of matrix l / 8.
  uint32_t x_row[TOKEN_TILES];
#pragma unroll
  for (int c = 0; c < TOKEN_TILES; ++c) x_row[c] = base + layout.x + min(8 * c + lane % 8, a.m - 1) * layout.x_stride + lane / 8 * 16;

  const int k_warp = warp % a.k_warps, row_warp = warp / a.k_warps;
  const int rounds = (items - int(blockIdx.y) + int(gridDim.y) - 1) / int(gridDim.y);
  int slot = 0, previous = -1, round = 0, on_duty = 0;
  uint32_t parity = 0;
  while (!walk.done()) {
    const int item = walk.item;
    Turn<T, BITS, TOKEN_TILES, UNITS> turn = {};
    for (bool last = false; !last; walk.next()) {
      last = walk.last_of_item();
      const int blocks = min(turn_blocks, walk.blocks() - k_warp * turn_blocks);  // may be none in the last stage
      barrier_wait(base + full_barrier(slot), parity);
      if (blocks > 0) {
        const uint8_t* stage = shared + layout.ring + slot * layout.stage;
        const int block = walk.block + k_warp * turn_blocks, unit = 2 * block;
        const int stage_group = group_of(a, 2 * walk.block);
        const uint8_t* scales = stage + layout.scale_offset + row_warp * layout.scale_room;
        int group = stage_group;
        if constexpr (UNITS == 4) {
          group = group_of(a, unit);
          scales += (group - stage_group) * a.scale_stride;
        }
        uint32_t x[TOKEN_TILES];
#pragma unroll
        for (int c = 0; c < TOKEN_TILES; ++c) x[c] = x_row[c] + (block - slice_begin) * kBlock * 2;
        turn.multiply(a, stage + (row_warp * layout.stage_blocks + k_warp * turn_blocks) * C::block_bytes, blocks, scales, unit, group, x, lane);
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(base + empty_barrier(slot));
      // Refill the slot of the turn before, which the others have most likely left too.
      if (previous >= 0 && !ahead.done()) {
        if (warp == on_duty) {
          barrier_wait(base + empty_barrier(previous), slot == 0 ? parity ^ 1 : parity);
          fetch_stage<C::block_bytes>(a, layout, ahead, base, previous, lane);
          __syncwarp();
        }
        ahead.next();
        if (++on_duty == warps) on_duty = 0;
      }
      previous = slot;
      if (++slot == a.stages) slot = 0, parity ^= 1;
    }
    // Lane l holds rows l / 4 and l / 4 + 8 of a tile, tokens 2 (l % 4) and the next.
    float* partial = reinterpret_cast<float*>(shared + layout.partial) + k_warp * a.m * layout.partial_stride + row_warp * kBlock;
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
      for (int c = 0; c < TOKEN_TILES; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int token = 8 * c + 2 * (lane % 4) + e % 2, row = 16 * t + lane / 4 + 8 * (e / 2);
          if (token < a.m) partial[token * layout.partial_stride + row] = turn.total[t][c][e];
        }
    __syncthreads();
    reduce<T>(a, layout.partial, layout.partial_stride, layout.gather, 256 * a.m * a.row_warps, blockDim.x, shared, item, round, rounds);
    ++round;
  }
}

}  // namespace woq
