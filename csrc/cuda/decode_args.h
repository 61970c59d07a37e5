// What a decode launch is told, and how it divides shared memory: the part that host and device share.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define WOQ_HOST_DEVICE __host__ __device__
#else
#define WOQ_HOST_DEVICE
#endif

namespace woq {

constexpr int kBlock = 64;         // rows and inputs of a block of weights
constexpr int kDecodeTokens = 32;  // most tokens of one launch
constexpr int kMaxWarps = 8;       // of a thread block

struct DecodeArgs {
  const void* x;          // [m, k], rows contiguous
  const uint8_t* weight;  // [row_groups][k_blocks][block_bytes]
  const uint8_t* scales;  // [row_groups][groups][scale_stride]
  void* y;                // [m, n]
  int m, n, k;
  int row_groups, k_blocks, groups;
  int group_units;              // group size / 32
  uint32_t group_reciprocal;    // floor(2^32 / group_units) + 1: dividing by multiplying
  int scale_stride;             // bytes a group: 128, or 192 with zero points
  float symmetric_zero;         // 2^(bits-1)
  bool scale_is_bf16;
  const int* order;             // [k]: the column of x that meets each column of the weight, or null (products in digits only)
  int k_warps, row_warps, stages, split;  // the plan, see decode.cuh
};

// Whether products are of integers (decode_digits.cuh). Pairs of inputs must lie on 4 bytes.
constexpr WOQ_HOST_DEVICE bool in_digits(const DecodeArgs& a) { return a.m <= 2 && a.k % 2 == 0; }

// Blocks of weights that a warp multiplies each time it is handed a stage.
constexpr WOQ_HOST_DEVICE int blocks_per_turn(int bits) { return bits == 8 ? 1 : 2; }

// Shared memory: barriers | ring of stages | x | partial sums of the warps | partial sums of the cluster (two parities)
struct DecodeLayout {
  int stage_blocks;   // blocks of one row group in a stage
  int scale_offset;   // in a stage: weights of all row warps, then scales
  int scale_room;     // scales of one row group
  int stage, ring, x, x_stride, x_sums, x_units, partial, partial_stride, gather, x_whole, total;

  WOQ_HOST_DEVICE static DecodeLayout of(int bits, const DecodeArgs& a) {
    DecodeLayout l;
    const int rows = kBlock * a.row_warps, slice = (a.k_blocks + a.split - 1) / a.split;
    l.stage_blocks = a.k_warps * blocks_per_turn(bits);
    l.scale_offset = a.row_warps * l.stage_blocks * 512 * bits;
    l.scale_room = groups_of_stage(a, 2 * l.stage_blocks) * a.scale_stride;
    l.stage = (l.scale_offset + a.row_warps * l.scale_room + 127) / 128 * 128;
    l.ring = 256;
    l.x = l.ring + a.stages * l.stage;
    if (in_digits(a)) {
      const int pairs = (slice + 1) / 2 * a.m;  // of blocks, for every token
      l.x_stride = 4 * a.m * kBlock;            // a block's digits
      l.x_sums = l.x + (slice + 1) / 2 * 2 * l.x_stride;
      l.x_units = l.x_sums + pairs * 16;
      l.partial = l.x_units + (pairs * 4 + 15) / 16 * 16;
    } else {
      l.x_stride = slice * kBlock * 2 + 16;  // 16 bytes off a multiple of 128: ldmatrix rows fall into different banks
      l.x_sums = l.x_units = l.partial = l.x + (a.m * l.x_stride + 15) / 16 * 16;
    }
    l.partial_stride = rows + 4;           // 4 off a multiple of 32: a warp's stores fall into different banks
    l.gather = l.partial + a.k_warps * a.m * l.partial_stride * 4;
    l.x_whole = l.gather + (a.split > 1 ? 2 * a.m * rows * 4 : 0);  // with `order`, rows of x as they are
    l.total = l.x_whole + (a.order != nullptr ? a.m * a.k * 2 : 0);
    return l;
  }

 private:
  // Groups that a stage of `units` times 32 inputs may touch: one more at either end where slices do not begin with a group.
  static constexpr WOQ_HOST_DEVICE int groups_of_stage(const DecodeArgs& a, int units) {
    const bool begins = a.split == 1 || (a.k_blocks % a.split == 0 && 2 * (a.k_blocks / a.split) % a.group_units == 0);
    if (begins && units % a.group_units == 0) return units / a.group_units;
    if (begins && a.group_units % units == 0) return 1;
    return units / a.group_units + 2;
  }
};

}  // namespace woq
