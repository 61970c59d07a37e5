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
};

inline Path choose_path(const DecodeArgs& a, int64_t m, const Device& device) {
  const bool wgmma = device.capability == 90 && a.k % 8 == 0;
  if (m <= (wgmma ? 8 : 64)) return Path::decode;
  return wgmma ? Path::prefill : Path::dense;
}

inline void apply(const DecodePlan& p, DecodeArgs& a) {
  a.k_warps = p.k_warps, a.row_warps = p.row_warps, a.stages = p.stages, a.split = p.split;
}

inline DecodePlan choose_decode(const DecodeArgs& a, int bits, const Device& device) {
  DecodePlan p = {8, 1, 4, 1, a.row_groups};
  const int turn = blocks_per_turn(bits);
  if (device.capability >= 90) {
    // Enough row items for every processor, split K by as little as fills them; one item should be several stages long.
    while (p.split < 8 && a.row_groups * p.split < device.processors * 3 / 4) p.split *= 2;
  }
  while (p.k_warps > 1 && p.k_warps * turn * p.split > a.k_blocks) p.k_warps /= 2;
  // Shared memory is what a large slice of x takes: widen the split, then give up stages and warps.
  DecodeArgs trial = a;
  apply(p, trial);
  while (DecodeLayout::of(bits, trial).total > device.shared_limit) {
    if (device.capability >= 90 && p.split < 8) p.split *= 2;
    else if (p.stages > 2) --p.stages;
    else if (p.k_warps > 1) p.k_warps /= 2;
    else return {0, 0, 0, 0, 0};
    apply(p, trial);
  }
  return p;
}

inline PrefillPlan choose_prefill(const DecodeArgs& a, const Device& device) {
  PrefillPlan p = {16, 6, 1};
  while (p.tokens < a.m && p.tokens < 256) p.tokens *= 2;
  const int tiles = (a.row_groups + 1) / 2 * ((a.m + p.tokens - 1) / p.tokens);
  const int wanted = p.tokens <= 64 ? 2 * device.processors : device.processors;
  while (p.split < 8 && tiles * p.split * 2 <= wanted * 5 / 4 && a.k_blocks / (p.split * 2) >= 8) p.split *= 2;
  return p;
}

}  // namespace woq
