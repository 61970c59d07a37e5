// Prefill's multiplication for the narrowest tiles, of 8 tokens: mma.sync on codes that are neither scaled nor rounded.
//
// With so few tokens what counts is instructions a weight. wgmma wants each warp's 16 rows times all inputs of a turn, so every
// code pair would need its zero point subtracted, and operands' addresses made; here the four warps of a warp group take two row
// tiles and half of the turn's inputs each. As in decode the tensor cores are given 2^b + code, and once a group
//     sums += scale * (products - (offset + zero) * sum x)
// where the sum of x is a product with ones. At the end of a tile pairs of warps, which have the same rows, add up.
#pragma once

#include "dequant.cuh"
#include "prefill_args.h"
#include "reduce.cuh"

namespace woq {

template <class T, int BITS, class L, bool ONE_GROUP>
struct NarrowMultiplier {
  using C = Codes<T, BITS>;
  static constexpr bool at_once = true;  // a stage has been read when `run` returns
  static constexpr int token_tiles = L::tokens / 8, row_tiles = 2, blocks = L::turn_blocks / 2;  // of a warp's turn
  static constexpr int units = ONE_GROUP ? 2 * blocks : 1;  // times 32 inputs that share scales

  const PrefillArgs& a;
  const uint8_t* shared;  // where `base` is
  const uint32_t base, pairs;  // pairs: where this warp hands sums over
  const int lane, group, part, first_tile;  // part: which half of a turn's inputs; first_tile: of its rows
  uint32_t x_row;  // ldmatrix: this lane's row (a token) and 8 inputs of a block, swizzled
  float products[row_tiles][token_tiles][4], inputs[token_tiles][4], totals[row_tiles][token_tiles][4];
  float sums[1][L::tokens / 2];  // of 16 rows, as wgmma would leave them

  __device__ NarrowMultiplier(const PrefillArgs& a, const uint8_t* shared, uint32_t base, int warp, int lane)
      : a(a), shared(shared), base(base), pairs(base + L::pairs(a.stages) + warp * 64 * L::tokens), lane(lane), group(warp / 4),
        part(warp % 2), first_tile(warp / 2 % 2 * row_tiles), x_row(lane % 8 * 128 + ((lane / 8) ^ (lane % 8)) * 16) {}

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < row_tiles * token_tiles * 4; ++i) totals[i / (token_tiles * 4)][i / 4 % token_tiles][i % 4] = 0.f;
  }

  template <class Release>
  __device__ void run(uint32_t stage, int turn, Release) {
    const int first_unit = L::halves * turn, own_unit = first_unit + 2 * blocks * part, first_group = group_of(a, first_unit);
    const uint32_t x = stage + blocks * part * L::x_block + x_row;
    const Shared weight{stage + L::x_bytes + group * L::weight_bytes + blocks * part * L::weight_block};
    const uint8_t* scales = shared + (stage - base) + L::scales + group * L::scale_room;
#pragma unroll
    for (int b = 0; b < blocks; ++b) {
      uint32_t words[row_tiles][C::words];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (BITS == 8 || half == 0)
#pragma unroll
          for (int t = 0; t < row_tiles; ++t) C::load(words[t], weight + b * L::weight_block, first_tile + t, half, lane);
        uint32_t right[token_tiles][4];
#pragma unroll
        for (int c = 0; c < token_tiles; ++c) load_matrices(right[c], (x + b * L::x_block + c * 1024) ^ (half * 64));
        if ((2 * b + half) % units == 0) begin_group();
#pragma unroll
        for (int j = 0; j < 2; ++j) step(words, right, 2 * half + j);
        if ((2 * b + half + 1) % units == 0) {
          const int number = min(group_of(a, own_unit + (2 * b + half) / units * units), a.groups - 1) - first_group;
          end_group(scales + number * a.scale_stride);
        }
      }
    }
  }

  // A warp keeps the row tile that wgmma would give it, and hands the other to its neighbour, which has the same rows.
  __device__ void end() {
    const uint32_t own = pairs + lane * 16, other = pairs + (1 - 2 * part) * token_tiles * 512 + lane * 16;
#pragma unroll
    for (int c = 0; c < token_tiles; ++c) {
      const float* v = totals[0][c];
      const float* w = totals[1][c];
      write(Shared{own + c * 512}, part ? make_float4(v[0], v[1], v[2], v[3]) : make_float4(w[0], w[1], w[2], w[3]));
    }
    join(4 * group);
#pragma unroll
    for (int c = 0; c < token_tiles; ++c) {
      const float4 v = read<float4>(Shared{other + c * 512});
      const float more[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[0][4 * c + e] = (part ? totals[1][c][e] : totals[0][c][e]) + more[e];
    }
    join(4 * group);  // before anything is handed over again
  }

 private:
  __device__ void begin_group() {
#pragma unroll
    for (int c = 0; c < token_tiles; ++c)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        inputs[c][e] = 0.f;
#pragma unroll
        for (int t = 0; t < row_tiles; ++t) products[t][c][e] = 0.f;
      }
  }
  // 16 inputs.
  __device__ void step(const uint32_t (&words)[row_tiles][C::words], const uint32_t (&right)[token_tiles][4], int j) {
    const uint32_t ones[4] = {Float16<T>::ones, Float16<T>::ones, Float16<T>::ones, Float16<T>::ones};
#pragma unroll
    for (int c = 0; c < token_tiles; ++c) mma<T>(inputs[c], ones, right[c][2 * (j & 1)], right[c][2 * (j & 1) + 1]);
#pragma unroll
    for (int t = 0; t < row_tiles; ++t) {
      uint32_t fragment[4];
      C::fragment(fragment, words[t], j);
#pragma unroll
      for (int c = 0; c < token_tiles; ++c) mma<T>(products[t][c], fragment, right[c][2 * (j & 1)], right[c][2 * (j & 1) + 1]);
      if constexpr (C::split) {
        C::template fragment<1>(fragment, words[t], j);
#pragma unroll
        for (int c = 0; c < token_tiles; ++c) mma<T>(products[t][c], fragment, right[c][2 * (j & 1)], right[c][2 * (j & 1) + 1]);
      }
    }
  }
  __device__ void end_group(const uint8_t* scales) {
    const GroupScales<row_tiles> g(a, scales, C::offset, first_tile, lane);
#pragma unroll
    for (int t = 0; t < row_tiles; ++t)
#pragma unroll
      for (int c = 0; c < token_tiles; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = 2 * t + e / 2;
          totals[t][c][e] += g.scale[row] * (products[t][c][e] - g.zero[row] * inputs[c][e]);
        }
  }
};

}  // namespace woq
