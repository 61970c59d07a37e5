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

#include "decode_digits.cuh"
#include "decode_floats.cuh"

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

// One warp's turn: `blocks` consecutive blocks from the slice's block `first` on, in parts whose inputs share a scale.
template <class Turn, int UNITS>
__device__ void multiply(Turn& turn, const DecodeArgs& a, const uint8_t* block, int blocks, int block_bytes, const uint8_t* scales, int first_group,
                         const typename Turn::Input& x, int first, int slice_begin, int lane) {
  const auto group = [&](int unit) { return scales + (min(group_of(a, unit), a.groups - 1) - first_group) * a.scale_stride; };
  const int unit = 2 * (slice_begin + first);
  if constexpr (UNITS == 4) {
    turn.chunk(a, block, blocks, 0, group(unit), x, first, lane);
  } else {
    for (int b = 0; b < blocks; ++b)
#pragma unroll
      for (int half = 0; half < 2; half += UNITS) turn.chunk(a, block + b * block_bytes, 1, half, group(unit + 2 * b + half), x, first + b, lane);
  }
}

template <class T, class Turn, int BITS, int UNITS>
__global__ void __launch_bounds__(32 * kMaxWarps, Turn::residents) decode_kernel(const __grid_constant__ DecodeArgs a) {
  constexpr int block_bytes = kBlock * kBlock * BITS / 8;
  constexpr int turn_blocks = blocks_per_turn(BITS);
  extern __shared__ __align__(128) uint8_t shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = a.k_warps * a.row_warps;
  const DecodeLayout layout = DecodeLayout::of(BITS, a);
  const uint32_t base = smem_address(shared);

  const int items = (a.row_groups + a.row_warps - 1) / a.row_warps;
  const int slice_begin = a.k_blocks * int(blockIdx.x) / a.split, slice_end = a.k_blocks * int(blockIdx.x + 1) / a.split;
  Walk walk{slice_begin, slice_end, layout.stage_blocks, int(gridDim.y), items, int(blockIdx.y), slice_begin};

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
    if (warp == 0) fetch_stage<block_bytes>(a, layout, ahead, base, i, lane);
#if HOPPER
  if (a.split > 1) cluster_arrive();
#endif
  const typename Turn::Order order(a, slice_begin, slice_end);
#if HOPPER
  dependency_wait();
  launch_dependents();
#endif
  Turn::stage(a, layout, shared, base + kInputBarrier, slice_begin, slice_end, order);
#if HOPPER
  if (a.split > 1) cluster_wait();  // the cluster's other blocks have started: their shared memory may be written
#endif

  const typename Turn::Input x(a, layout, base, lane);
  const int k_warp = warp % a.k_warps, row_warp = warp / a.k_warps;
  const int rounds = (items - int(blockIdx.y) + int(gridDim.y) - 1) / int(gridDim.y);
  int slot = 0, previous = -1, round = 0, on_duty = 0;
  uint32_t parity = 0;
  while (!walk.done()) {
    const int item = walk.item;
    Turn turn = {};
    for (bool last = false; !last; walk.next()) {
      last = walk.last_of_item();
      const int blocks = min(turn_blocks, walk.blocks() - k_warp * turn_blocks);  // may be none in the last stage
      barrier_wait(base + full_barrier(slot), parity);
      if (blocks > 0) {
        const uint8_t* stage = shared + layout.ring + slot * layout.stage;
        const uint8_t* weight = stage + (row_warp * layout.stage_blocks + k_warp * turn_blocks) * block_bytes;
        const uint8_t* scales = stage + layout.scale_offset + row_warp * layout.scale_room;
        const int first = walk.block + k_warp * turn_blocks - slice_begin;
        multiply<Turn, UNITS>(turn, a, weight, blocks, block_bytes, scales, group_of(a, 2 * walk.block), x, first, slice_begin, lane);
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(base + empty_barrier(slot));
      // Refill the slot of the turn before, which the others have most likely left too.
      if (previous >= 0 && !ahead.done()) {
        if (warp == on_duty) {
          barrier_wait(base + empty_barrier(previous), slot == 0 ? parity ^ 1 : parity);
          fetch_stage<block_bytes>(a, layout, ahead, base, previous, lane);
          __syncwarp();
        }
        ahead.next();
        if (++on_duty == warps) on_duty = 0;
      }
      previous = slot;
      if (++slot == a.stages) slot = 0, parity ^= 1;
    }
    float* partial = reinterpret_cast<float*>(shared + layout.partial) + k_warp * a.m * layout.partial_stride + row_warp * kBlock;
    turn.store(a, partial, layout.partial_stride, lane);
    __syncthreads();
    reduce<T>(a, layout.partial, layout.partial_stride, layout.gather, 256 * a.m * a.row_warps, blockDim.x, shared, item, round, rounds);
    ++round;
  }
}

}  // namespace woq
