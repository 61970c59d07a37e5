// Which kernel a product gets, and how it is cut up: measured on an H200 and an H100, for others a reasonable start.
#pragma once

#include <algorithm>

#include "prefill_args.h"

namespace woq {

struct Device {
  int processors, shared_limit, capability;  // capability: 80, 90, ...
};

enum class Path { decode, prefill, dense };  // dense: dequantize, then cuBLAS

struct DecodePlan {
  int k_warps, row_warps, stages, split, row_blocks;  // see decode.cuh; k_warps == 0: it does not fit
};

inline void apply(const DecodePlan& p, DecodeArgs& a) {
  a.k_warps = p.k_warps, a.row_warps = p.row_warps, a.stages = p.stages, a.split = p.split;
}

// Measured on an H200 with group 128: the first entry that a product does not exceed is its plan. `blocks` is the
// number of thread blocks that stay and take one row item after the other, 0 for one item each.
struct DecodeEntry {
  int bits, row_groups, k_blocks, tokens;
  int k_warps, row_warps, stages, split, blocks;
};
constexpr int kMostStages = 10;  // barriers have room for
constexpr int kAny = 1 << 30;
constexpr DecodeEntry kDecodeTable[] = {
    // 4096 x 4096, 4096 x 14336, 6144 x 4096, 28672 x 4096, in digits
    {2, 80, 128, 2, 8, 1, 3, 2, 0}, {2, 80, kAny, 2, 8, 1, 4, 2, 0}, {2, 200, kAny, 2, 4, 2, 4, 2, 0}, {2, kAny, kAny, 2, 2, 4, 4, 2, 132},
    {3, 80, 128, 2, 8, 1, 3, 2, 0}, {3, 80, kAny, 2, 8, 1, 3, 2, 0}, {3, 200, kAny, 2, 8, 1, 2, 2, 0}, {3, kAny, kAny, 2, 2, 4, 3, 2, 132},
    {4, 80, 128, 2, 8, 1, 2, 2, 0}, {4, 80, kAny, 2, 2, 2, 3, 8, 0}, {4, 200, kAny, 1, 2, 2, 4, 4, 0}, {4, 200, kAny, 2, 2, 2, 2, 8, 0},
    {4, kAny, kAny, 1, 2, 2, 6, 2, 132}, {4, kAny, kAny, 2, 2, 4, 4, 1, 0},
    {8, 80, 128, 2, 4, 1, 6, 2, 66}, {8, 80, kAny, 2, 8, 1, 4, 2, 0}, {8, 200, kAny, 1, 2, 2, 3, 8, 0}, {8, 200, kAny, 2, 8, 1, 2, 2, 0}, {8, kAny, kAny, 2, 8, 1, 6, 2, 66},
    // 4096 x 4096
    {3, 80, 128, 8, 8, 1, 2, 2, 0}, {4, 80, 128, 8, 4, 1, 4, 2, 0}, {8, 80, 128, 32, 8, 1, 3, 2, 0},
    // 4096 x 14336
    {3, 80, kAny, 8, 8, 1, 3, 2, 0}, {8, 80, kAny, 4, 8, 1, 3, 2, 0}, {8, 80, kAny, 8, 4, 1, 4, 2, 0}, {8, 80, kAny, 32, 2, 4, 3, 8, 0},
    // 6144 x 4096
    {8, 200, kAny, 4, 2, 2, 2, 8, 0}, {8, 200, kAny, 8, 2, 4, 2, 8, 0}, {8, 200, kAny, 32, 2, 2, 2, 4, 0},
    // 28672 x 4096
    {8, kAny, kAny, 8, 2, 4, 4, 1, 0}, {8, kAny, kAny, 32, 4, 2, 3, 2, 66},
};

inline DecodePlan choose_decode(const DecodeArgs& a, int bits, const Device& device) {
  DecodePlan p = {8, 1, 4, 1, 0};
  if (device.capability >= 90) {
    const DecodeEntry* e = kDecodeTable;
    while (bits > e->bits || a.row_groups > e->row_groups || a.k_blocks > e->k_blocks || a.m > e->tokens) ++e;
    p = {e->k_warps, e->row_warps, e->stages, e->split, e->blocks};
  }
  if (a.order != nullptr && p.split > 2) p = {8, 1, 3, 2, 0};  // every thread block of a cluster reads all of x
  while (p.split > 1 && p.split * 2 > a.k_blocks) p.split /= 2;
  while (p.k_warps > 1 && (p.k_warps - 1) * blocks_per_turn(bits) * p.split >= a.k_blocks) p.k_warps /= 2;
  // Thread blocks must not wait for a processor only because of zero points, or of x's rows if fewer stages prevent that.
  const int items = (a.row_groups + p.row_warps - 1) / p.row_warps;
  const int blocks = (p.row_blocks == 0 ? items : std::min(p.row_blocks, items)) * p.split;
  const auto waves = [&](const DecodeArgs& v) {
    const int residents = std::min((device.shared_limit + 1024) / (DecodeLayout::of(bits, v).total + 1024), 2 * kMaxWarps / (p.k_warps * p.row_warps));
    return residents == 0 ? kAny : (blocks - 1) / (residents * device.processors);
  };
  DecodeArgs trial = a, plain = a;
  apply(p, trial), apply(p, plain);
  plain.scale_stride = 128;
  if (a.order != nullptr) plain.stages = 2;
  for (const int least = waves(plain); p.stages > 2 && waves(trial) > least; apply(p, trial)) --p.stages;
  // A large slice of x takes more than there is: widen the split, then give up stages and warps.
  while (DecodeLayout::of(bits, trial).total > device.shared_limit) {
    if (device.capability >= 90 && p.split < 8) p.split *= 2;
    else if (p.stages > 2) --p.stages;
    else if (p.row_warps > 1) p.row_warps /= 2;
    else if (p.k_warps > 1) p.k_warps /= 2;
    else return {0, 0, 0, 0, 0};
    apply(p, trial);
  }
  const int rows = (a.row_groups + p.row_warps - 1) / p.row_warps;  // row_warps may have become fewer
  p.row_blocks = p.row_blocks == 0 ? rows : std::min(p.row_blocks, rows);
  return p;
}

// Whether decoding takes x in the weight's order itself: rows of x beside what else is in shared memory, and bulk copies of them.
// Measured: up to 32 KB of x cost less than a kernel that gathers it.
inline bool reorders(DecodeArgs a, const int* order, int bits, const Device& device) {
  a.order = order;
  return in_digits(a) && a.k % 8 == 0 && a.m * a.k <= 16384 && device.capability >= 90 && choose_decode(a, bits, device).k_warps > 0;
}

// As many stages as fit, where two thread blocks share a processor into half of its memory; 0 if not even two do.
inline int prefill_stages(PrefillPlan p, int bits, const Device& device) {
  const int room = p.residents() > 1 ? (device.shared_limit + 1024) / 2 - 1024 : device.shared_limit;
  for (p.stages = kMostStages; p.stages >= 2; --p.stages)
    if (p.shared_bytes(bits) <= room) return p.stages;
  return 0;
}

// The tiles there are, and nanoseconds of a turn of one when its processor is full: measured with 4 bits, the widest on an H200,
// the others on an H100.
struct Tile {
  int tokens, groups, turn;
};
constexpr Tile kTiles[] = {
    {8, 2, 1150}, {8, 4, 1150}, {16, 2, 660}, {16, 4, 650}, {32, 2, 780}, {32, 4, 750}, {48, 2, 850}, {48, 4, 850}, {64, 2, 1050}, {64, 4, 951},
    {96, 2, 620}, {96, 3, 810}, {96, 4, 1190}, {128, 2, 730}, {128, 3, 1030}, {128, 4, 1370}, {256, 2, 670},
};

// Estimated nanoseconds of a product. The constants were fitted to a sweep over all plans of 4 shapes and 12 numbers of tokens;
// its choices took 0.3 % more than the fastest plans on the average.
inline int64_t prefill_time(const PrefillPlan& p, int turn_time, PrefillArgs a, const Device& device) {
  const int64_t blocks = divide(p, device.processors, a), slots = int64_t(p.residents()) * device.processors, area = p.tokens * p.groups;
  const int64_t turns = PrefillPlan::turns(p.tokens, a.k_blocks);
  const bool alone = p.split != 1 && p.residents() > 1 && blocks * std::max(1, p.split) <= device.processors;
  const int64_t turn = alone ? turn_time * 7 / 8 : turn_time;  // a lone thread block is faster
  if (p.split > 1) {
    // Clusters do not fill every processor: those of a GPC that do not make up a whole one stay idle.
    const int64_t usable = slots * (p.split < 4 ? 97 : 87) / 100 / p.split * p.split;
    const int64_t waves = (blocks * p.split + usable - 1) / usable, share = (turns + p.split - 1) / p.split * turn;
    return 1230 + waves * (share + 2110 + area * 53 / 5);
  }
  const int64_t rest = a.tiles - a.whole, whole = (a.whole + blocks - 1) / blocks * turns, shared = (rest * turns + blocks - 1) / blocks;
  // Those who share stand at different inputs: what they read together is all of x and W, which the L2 cache may not hold.
  const bool spread = int64_t(a.m) * a.k * 2 + int64_t(a.n) * a.k / 2 > 40'000'000;
  const int64_t exchange = rest > 0 ? 3740 + 7 * area / 2 * ((blocks + rest - 1) / rest) : 0;
  const int64_t leave = PrefillPlan::box_bytes(p.tokens, p.groups) > 0 ? 2400 : 2500;  // what a tile's results cost
  return 1230 + (whole + (spread ? shared * 11 / 10 : shared)) * turn + leave * std::max<int64_t>(a.tiles, blocks) / blocks + exchange;
}

struct Choice {
  PrefillPlan plan;
  int64_t time;
};

inline Choice choose_prefill(const PrefillArgs& a, int bits, const Device& device) {
  Choice best = {};
  for (const Tile& t : kTiles) {
    if (t.tokens > 8 && t.tokens >= 2 * a.m) break;
    for (int split = 0; split <= std::min(8, PrefillPlan::turns(t.tokens, a.k_blocks)); ++split) {  // every thread block of a cluster must have a part of K
      PrefillPlan p = {t.tokens, t.groups, 0, split};
      p.stages = prefill_stages(p, bits, device);
      if (p.stages == 0 || split == 7) continue;  // clusters of 7 have not been tried
      const int64_t time = prefill_time(p, t.turn, a, device);
      if (best.plan.tokens == 0 || time < best.time) best = {p, time};
    }
  }
  return best;
}

inline Path choose_path(const PrefillArgs& a, int bits, const Device& device) {
  const bool wgmma = device.capability == 90 && a.k % 8 == 0;  // TMA wants rows of x 16-byte aligned
  // Measured on an H100: from three tokens on, large weights are read faster in narrow tiles.
  if (wgmma && a.m > 2 && a.m <= 8 && int64_t(a.n) * a.k * bits / 8 >= 24'000'000) return Path::prefill;
  if (a.m <= (wgmma ? 8 : 64)) {
    DecodeArgs one = a;
    one.m = std::min(a.m, 1);  // where shared memory cannot hold a single token of x, there is no decoding
    return choose_decode(one, bits, device).k_warps > 0 ? Path::decode : Path::dense;
  }
  if (!wgmma) return Path::dense;
  // Measured on an H200 from 1024 tokens on: dequantizing writes 1600 weights a nanosecond, and cuBLAS does 2950 multiply-adds
  // a nanosecond and processor.
  const int64_t weights = int64_t(a.n) * a.k, dense = weights / 1600 + weights / (2950 * device.processors) * a.m;
  if (a.m < 1024) return Path::prefill;
  const int64_t own = choose_prefill(a, bits, device).time;
  // From half a millisecond on the clock falls under our load; under that of cuBLAS it has in `dense`.
  return dense < (own > 500'000 ? own * 53 / 50 : own) ? Path::dense : Path::prefill;
}

}  // namespace woq
