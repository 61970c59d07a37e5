// Prefill's multiplication for tiles of 16 tokens and more: wgmma with the weights as the operand held in registers.
//
// Each thread turns its codes into A fragments, exactly (code - zero), rounds them once with the scale to the activations' dtype, and
// issues wgmma. Fragments are held twice: while the tensor cores read one set, the next is made. What this gives up over decode:
// a weight is rounded to 16 bits before it is multiplied, as any dequantize-then-matmul would, but for few tokens, see `late`.
#pragma once

#include "dequant.cuh"
#include "prefill_args.h"
#include "reduce.cuh"
#include "wgmma.cuh"

namespace woq {

#if HOPPER_WGMMA
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
  static constexpr bool at_once = false;  // a stage has been read only when `run` says so, in the next turn
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

  __device__ Multiplier(const PrefillArgs& a, const uint8_t*, uint32_t, int warp, int lane)
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

}  // namespace woq
