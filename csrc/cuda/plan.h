// Which kernel a product gets, and how it is cut up: measured on an H200, for others a reasonable start.
#pragma once

#include <algorithm>

#include "decode_args.h"

namespace woq {

struct Device {
  int processors, shared_limit, capability;  // capability: 80, 90, ...
};

enum class Path { decode, prefill, dense };  // dense: dequantize, then cuBLAS

struct DecodePlan {
  int k_warps, row_warps, stages, split, row_blocks;  // see decode.cuh; k_warps == 0: it does not fit
};

struct PrefillPlan {
  int tokens, stages, split;  // see prefill.cuh
  int64_t cycles;             // estimated
};

inline void apply(const DecodePlan& p, DecodeArgs& a) {
  a.k_warps = p.k_warps, a.row_warps = p.row_warps, a.stages = p.stages, a.split = p.split;
}

// Measured on an H200 with 4 bits, group 128: the first entry that a product does not exceed is its plan. `blocks` is the
// number of thread blocks that stay and take one row item after the other, 0 for one item each.
struct DecodeEntry {
  int row_groups, k_blocks, tokens;
  int k_warps, row_warps, stages, split, blocks;
};
constexpr int kAny = 1 << 30;
constexpr DecodeEntry kDecodeTable[] = {
    // 4096 x 4096
    {80, 128, 1, 4, 1, 4, 4, 0}, {80, 128, 8, 2, 2, 2, 8, 0}, {80, 128, 32, 8, 1, 3, 2, 0},
    // 4096 x 14336
    {80, kAny, 4, 8, 1, 3, 2, 0}, {80, kAny, 8, 4, 1, 4, 2, 0}, {80, kAny, 32, 2, 4, 3, 8, 0},
    // 6144 x 4096
    {200, kAny, 2, 4, 2, 3, 4, 0}, {200, kAny, 8, 2, 4, 2, 8, 0}, {200, kAny, 32, 2, 2, 2, 4, 0},
    // 28672 x 4096
    {kAny, kAny, 4, 2, 2, 4, 1, 0}, {kAny, kAny, 8, 4, 1, 4, 2, 66}, {kAny, kAny, 32, 4, 2, 3, 2, 66},
};

inline DecodePlan choose_decode(const DecodeArgs& a, int bits, const Device& device) {
  DecodePlan p = {8, 1, 4, 1, 0};
  if (device.capability >= 90) {
    const DecodeEntry* e = kDecodeTable;
    while (a.row_groups > e->row_groups || a.k_blocks > e->k_blocks || a.m > e->tokens) ++e;
    p = {e->k_warps, e->row_warps, e->stages, e->split, e->blocks};
  }
  while (p.split > 1 && p.split * 2 > a.k_blocks) p.split /= 2;
  while (p.k_warps > 1 && (p.k_warps - 1) * blocks_per_turn(bits) * p.split >= a.k_blocks) p.k_warps /= 2;
  // Shared memory is what a large slice of x takes: widen the split, then give up stages and warps.
  DecodeArgs trial = a;
  apply(p, trial);
  while (DecodeLayout::of(bits, trial).total > device.shared_limit) {
    if (device.capability >= 90 && p.split < 8) p.split *= 2;
    else if (p.stages > 2) --p.stages;
    else if (p.row_warps > 1) p.row_warps /= 2;
    else if (p.k_warps > 1) p.k_warps /= 2;
    else return {0, 0, 0, 0, 0};
    apply(p, trial);
  }
  const int items = (a.row_groups + p.row_warps - 1) / p.row_warps;
  p.row_blocks = p.row_blocks == 0 ? items : std::min(p.row_blocks, items);
  return p;
}

// The least estimated time: waves of thread blocks, each its share of K plus what starting and adding up costs. The constants
// were fitted to an H200: a block of weights takes 600 cycles to dequantize and 8.25 a token to multiply.
inline PrefillPlan choose_prefill(const DecodeArgs& a, const Device& device) {
  PrefillPlan best = {0, 6, 1, 0};
  for (int tokens = 16; tokens <= 128; tokens *= 2) {
    if (tokens > 16 && tokens >= 2 * a.m) break;
    const int64_t tiles = int64_t((a.row_groups + 3) / 4) * ((a.m + tokens - 1) / tokens);
    for (int split = 1; split <= 4; split *= 2) {
      // Clusters do not fill every processor: those of a GPC that do not make up a whole one stay idle.
      const int64_t usable = split < 4 ? device.processors : device.processors * 7 / 8;
      const int64_t waves = (tiles * split + usable - 1) / usable;
      const int64_t share = (a.k_blocks + split - 1) / split * (600 + 33 * tokens / 4);
      const int64_t cycles = waves * (share + 2500 + (split > 1 ? 16 * tokens + 500 : 0));
      if (best.tokens == 0 || cycles < best.cycles) best = {tokens, 6, split, cycles};
    }
  }
  return best;
}

inline Path choose_path(const DecodeArgs& a, int bits, const Device& device) {
  const bool wgmma = device.capability == 90 && a.k % 8 == 0;  // TMA wants rows of x 16-byte aligned
  if (a.m <= (wgmma ? 16 : 64)) {
    DecodeArgs one = a;
    one.m = std::min(a.m, 1);  // where shared memory cannot hold a single token of x, there is no decoding
    return choose_decode(one, bits, device).k_warps > 0 ? Path::decode : Path::dense;
  }
  if (!wgmma) return Path::dense;
  // Dequantizing writes 800 weights a cycle, cuBLAS then does 1500 multiply-adds a cycle and processor.
  const int64_t weights = int64_t(a.n) * a.k, dense = weights / 800 + weights / (1500 * device.processors) * a.m;
  return a.m >= 256 && dense < choose_prefill(a, device).cycles ? Path::dense : Path::prefill;
}

}  // namespace woq
