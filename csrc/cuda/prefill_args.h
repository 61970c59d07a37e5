// What a prefill launch is told.
#pragma once

#include <algorithm>

#include "decode_args.h"

namespace woq {

// `stages` and `split` of the plan are in DecodeArgs; k_warps and row_warps mean nothing here.
struct PrefillArgs : DecodeArgs {
  int token_tiles, tiles;  // tiles along the tokens; all
  int band;                // tiles along the tokens that are gone through before the next rows
  int whole;               // tiles that one thread block computes alone; the rest is shared out by turns (split == 1)
  void* partial;           // sums that thread blocks leave for others
  uint64_t* ready;         // a mark for each of them: `launch` once it is there
  uint64_t launch;         // a number of this launch's own
};

// Tiles are 64 `groups` rows x `tokens` tokens; see prefill.cuh.
struct PrefillPlan {
  int tokens, groups, stages;
  int split;  // thread blocks of a cluster, which divide K: at most its turns; 1: none; 0: none, and no tile is shared out

  // Whether tiles are multiplied by mma.sync (narrow.cuh).
  static constexpr WOQ_HOST_DEVICE bool narrow(int tokens) { return tokens <= 8; }
  // Blocks of a row group in a stage. Of the widest tile, one: x alone takes 32 KB of it.
  static constexpr WOQ_HOST_DEVICE int turn_blocks(int tokens) { return narrow(tokens) ? 4 : tokens > 128 ? 1 : 2; }
  static constexpr WOQ_HOST_DEVICE int turns(int tokens, int k_blocks) { return (k_blocks + turn_blocks(tokens) - 1) / turn_blocks(tokens); }
  // Multiplying warp groups. Large tiles have two, with registers for 128 sums a thread: fewer instructions a multiplication.
  static constexpr WOQ_HOST_DEVICE int warp_groups(int tokens, int groups) { return tokens > 64 && groups != 3 ? 2 : groups; }
  // Of a row group in a stage: a group of inputs every 32, with zero points.
  static constexpr WOQ_HOST_DEVICE int scale_room(int tokens) { return 2 * turn_blocks(tokens) * 192; }
  static constexpr WOQ_HOST_DEVICE int stage_bytes(int tokens, int groups, int bits) {
    return (turn_blocks(tokens) * (tokens * kBlock * 2 + groups * 512 * bits) + groups * scale_room(tokens) + 1023) / 1024 * 1024;
  }
  // Whether the cluster's sums have room beside the ring.
  static constexpr WOQ_HOST_DEVICE bool gather_apart(int tokens, int groups) { return tokens * groups * kBlock * 4 <= 32768; }

  // Results of large tiles leave by way of shared memory, 128 tokens of a row group at a time, while the next tile is computed.
  static constexpr int box_tokens = 128;
  static constexpr WOQ_HOST_DEVICE int box_bytes(int tokens, int groups) { return tokens >= box_tokens ? groups * box_tokens * kBlock * 2 : 0; }

  // What warps of a narrow tile hand each other: 16 rows' sums each.
  static constexpr WOQ_HOST_DEVICE int pair_bytes(int tokens, int groups) { return narrow(tokens) ? groups * 4 * 64 * tokens : 0; }

  static constexpr WOQ_HOST_DEVICE int residents(int tokens, int groups) { return groups > 2 || tokens > 64 ? 1 : 2; }  // thread blocks a processor
  int residents() const { return residents(tokens, groups); }
  int shared_bytes(int bits) const {
    const int ring = 1024 + stages * stage_bytes(tokens, groups, bits) + pair_bytes(tokens, groups), parts = tokens / 2 * groups;  // 512 bytes each
    if (split <= 1) return 1024 + ring + box_bytes(tokens, groups);
    const int sums = (parts + split - 1) / split * split * 512;
    return 1024 + (gather_apart(tokens, groups) ? ring + sums : ring > 1024 + sums ? ring : 1024 + sums);  // 1024 align the base
  }
};

constexpr int64_t kBandBytes = 16 << 20;  // of x: what the L2 cache holds beside what streams through it

// How a launch of `plan` divides `a`; returns the thread blocks, times plan.split for the grid.
inline int divide(const PrefillPlan& plan, int processors, PrefillArgs& a) {
  const int turns = PrefillPlan::turns(plan.tokens, a.k_blocks);
  a.stages = plan.stages, a.split = std::max(1, plan.split);
  a.token_tiles = (a.m + plan.tokens - 1) / plan.tokens;
  a.tiles = (a.row_groups + plan.groups - 1) / plan.groups * a.token_tiles;
  a.band = std::max(1, std::min(a.token_tiles, int(kBandBytes / (int64_t(plan.tokens) * a.k * 2))));
  a.whole = a.tiles;
  if (plan.split > 1) return a.tiles;
  const int64_t most = int64_t(a.tiles) * (plan.split == 0 ? 1 : turns);
  const int blocks = most < plan.residents() * processors ? int(most) : plan.residents() * processors;
  if (plan.split == 0) return blocks;
  // A share of leftovers is at least a tile where there are so many: then few thread blocks meet in one.
  if (a.tiles % blocks != 0) a.whole = a.tiles < blocks ? 0 : (a.tiles / blocks - 1) * blocks;
  return blocks;
}

// Bytes of a.partial, then of a.ready, for that.
inline int64_t partial_bytes(const PrefillPlan& plan, const PrefillArgs& a, int blocks) {
  return a.whole < a.tiles ? int64_t(blocks) * plan.groups * kBlock * plan.tokens * 4 : 0;
}
inline int64_t ready_bytes(const PrefillPlan& plan, const PrefillArgs& a, int blocks) { return a.whole < a.tiles ? int64_t(blocks) * plan.groups * 8 : 0; }

}  // namespace woq
