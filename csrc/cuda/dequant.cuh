// Packed codes to tensor-core fragments: the one place that knows how 2, 3, 4 and 8 bits lie in memory.
//
// A *block* is 64 output rows x 64 inputs. It is stored as ready A fragments of mma.m16n8k16 (and of wgmma m64k16, which
// has the same ones): for row tile t (16 rows) and lane l, BITS words that hold the lane's 32 codes. A code pair, two
// neighbours in k, sits BITS wide in the low and in the high half of a word, so that one shift and one lop3 move both
// into the top of a 16-bit float's mantissa:
//
//     exponent of 2^b | code << (mantissa - b)   ==   2^b + code,   exactly, in bf16 and in fp16
//
// No integer-to-float conversion and no subtraction: the offset 2^b is removed together with the zero point, once a group,
// on the fp32 sum. Eight bits do not fit bf16's seven mantissa bits; there a code is two nibbles, (256 + 16 high) and
// (16 + low), multiplied one after the other into the same accumulator: the tensor cores are idle anyway.
//
// Word order within a lane (pair p = 4 j + i belongs to register i of the fragment of k-step j, 16 inputs each):
//     4 bits: word j, pair i at bit 4 i                  2 bits: word j / 2, at bit 2 (4 (j % 2) + i)
//     8 bits: word 2 j + i / 2, at bit 8 (i % 2)         3 bits: see Threes
// Blocks are [t][lane][words] (3 bits: [t][lane][words 0 and 1], then [t][lane][word 2]; 8 bits: [t][half][lane][4 words]).
//
// The same words serve integer products (mma.m16n8k32, 8 bits an element) with fewer instructions still: in a word under one
// mask lie the codes of one row, a byte apart, and where the mask is not at the bottom of the bytes, all are multiplied by
// one power of two, which leaves with the row's scale. See Bytes.
#pragma once

#include "decode_args.h"
#include "ptx.cuh"

namespace woq {

constexpr int kRowTiles = 4;     // 16-row tiles in a block
constexpr int kGroupUnit = 32;   // group sizes are multiples of this: half a block

template <class T>
struct Float16;
template <>
struct Float16<__nv_bfloat16> {
  static constexpr int mantissa = 7, bias = 127;
  static constexpr bool is_bf16 = true;
  static constexpr uint32_t ones = 0x3F803F80;
  using Pair = __nv_bfloat162;
  __device__ static Pair twice(float v) { return __float2bfloat162_rn(v); }
  __device__ static __nv_bfloat16 round(float v) { return __float2bfloat16_rn(v); }
  __device__ static float value(uint32_t bits) { return __uint_as_float(bits << 16); }
  __device__ static uint32_t pack(float low, float high) {
    const Pair v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
};
template <>
struct Float16<__half> {
  static constexpr int mantissa = 10, bias = 15;
  static constexpr bool is_bf16 = false;
  static constexpr uint32_t ones = 0x3C003C00;
  using Pair = __half2;
  __device__ static Pair twice(float v) { return __float2half2_rn(v); }
  __device__ static __half round(float v) { return __float2half_rn(v); }
  __device__ static float value(uint32_t bits) { return __half2float(__ushort_as_half(static_cast<unsigned short>(bits))); }
  __device__ static uint32_t pack(float low, float high) {
    const Pair v = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
};

// (a & b) | c in one instruction; the compiler makes two of it when b and c are constants.
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

__device__ __forceinline__ uint32_t shift(uint32_t word, int left) { return left >= 0 ? word << left : word >> -left; }

// Three bits: 24 of a lane's 32 codes are two to a byte, at bits 0 and 3. The other eight are in what that leaves of the bytes:
// their lower two bits in words 0 and 1, their upper ones in word 2.
//     pair 4 j + i, in byte j % 2 of both halves at bit 3 (i % 2):  word i / 2 for j < 2,  word 2 for j >= 2 and i < 2
struct Threes {
  __device__ static constexpr bool whole(int j, int i) { return j < 2 || i < 2; }
  __device__ static constexpr int word(int j, int i) { return j < 2 ? i / 2 : 2; }
  __device__ static constexpr int bit(int j, int i) { return 8 * (j % 2) + 3 * (i % 2); }
  // Of the others: words i % 2 and 2.
  __device__ static constexpr int lower_bits(int j) { return 8 * (j % 2) + 6; }
  __device__ static constexpr int upper_bit(int j, int i) { return 8 * (j % 2) + 6 + i % 2; }
};

// AT: the bit of the mantissa at which codes (or nibbles) stand. At the top the offset is smallest, so sums of codes lose the
// least; at 0 the first pair of a word needs no shift.
template <class T, int BITS, int AT = Float16<T>::mantissa - (BITS > Float16<T>::mantissa ? 4 : BITS)>
struct Codes {
  static constexpr bool split = BITS > Float16<T>::mantissa;         // 8 bits in bf16: two nibbles
  static constexpr int fragments = split ? 2 : 1;                    // MMAs a k-step
  static constexpr int exponent = Float16<T>::mantissa - AT;         // 2^exponent + code
  static constexpr float offset = float((split ? 17 : 1) << exponent);  // what the fragments add to every code
  static constexpr int words = BITS == 8 ? 4 : BITS;                 // held at a time: a block's, or half a block's for 8 bits
  static constexpr int block_bytes = kBlock * kBlock * BITS / 8;

  // Words of row tile `t`, and for 8 bits of inputs 32 half .. 32 half + 31. `block` is a pointer, or a place in shared memory.
  template <class Memory>
  __device__ static void load(uint32_t (&w)[words], Memory block, int t, int half, int lane) {
    if constexpr (BITS == 2 || BITS == 3) {
      const uint2 v = read<uint2>(block + (t * 32 + lane) * 8);
      w[0] = v.x, w[1] = v.y;
      if constexpr (BITS == 3) w[2] = read<uint32_t>(block + (1024 + (t * 32 + lane) * 4));
    } else {
      const int tile = BITS == 8 ? 2 * t + half : t;
      const uint4 v = read<uint4>(block + (tile * 32 + lane) * 16);
      w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
    }
  }

  // The A fragment of k-step j (0..3) of the block: 2^exponent + code in every element, or one nibble's share of that.
  template <int PART = 0>
  __device__ static void fragment(uint32_t (&a)[4], const uint32_t (&w)[words], int j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (BITS == 4) {
        a[i] = place<4, exponent>(w[j], 4 * i);
      } else if constexpr (BITS == 8) {
        const uint32_t word = w[2 * (j & 1) + i / 2];
        const int bit = 8 * (i % 2);
        if constexpr (!split) a[i] = place<8, exponent>(word, bit);
        else if constexpr (PART == 0) a[i] = place<4, exponent>(word, bit);
        else a[i] = place<4, exponent + 4>(word, bit + 4);
      } else if constexpr (BITS == 2) {
        a[i] = place<2, exponent>(w[j / 2], 2 * (4 * (j & 1) + i));
      } else if (Threes::whole(j, i)) {
        a[i] = place<3, exponent>(w[Threes::word(j, i)], Threes::bit(j, i));
      } else {
        const uint32_t lower = place<2, exponent>(w[i % 2], Threes::lower_bits(j));
        a[i] = and_or(shift(w[2], AT + 2 - Threes::upper_bit(j, i)), 0x10001u << (AT + 2), lower);
      }
    }
  }

  // A zero point as a pair of what `fragment` gives, offset included; of a split code, both nibbles' parts without it.
  __device__ static uint32_t twice(uint32_t zero) {
    if constexpr (split) {
      const auto v = Float16<T>::twice(float(zero));
      return *reinterpret_cast<const uint32_t*>(&v);
    } else {
      return power<exponent>() | (zero * 0x10001u) << AT;
    }
  }

 private:
  // 2^EXPONENT, twice.
  template <int EXPONENT>
  __device__ static constexpr uint32_t power() { return (uint32_t(Float16<T>::bias + EXPONENT) << Float16<T>::mantissa) * 0x10001u; }
  // WIDTH-bit field of both halves of `word`, from bit `from` on, under the exponent of 2^EXPONENT.
  template <int WIDTH, int EXPONENT>
  __device__ static uint32_t place(uint32_t word, int from) {
    return and_or(shift(word, AT - from), (((1u << WIDTH) - 1) * 0x10001u) << AT, power<EXPONENT>());
  }
};

// The same words as operands of integer products: A fragments of mma.m16n8k32, an unsigned byte an element.
//
// K-step s (0 or 1, 32 inputs) of a block. Which input a byte belongs to depends on the width alone, and x is laid out to match
// (decode_digits.cuh): lane 4 r + c holds, in byte 2 e + b of register 2 v + upper, for row r + 8 upper the input
//     16 j + 8 right + 2 c + e    with j = 2 s + v, right = b  for 4 and 8 bits,  j = 2 s + b, right = v  for 2 and 3
// times 1 in the upper rows and `lower` in the lower ones.
template <int BITS>
struct Bytes {
  static constexpr int lower = BITS == 8 ? 1 : 1 << BITS;
  static constexpr bool right_in_byte = BITS >= 4;

  __device__ static void fragment(uint32_t (&a)[4], const uint32_t (&w)[BITS == 8 ? 4 : BITS], int s) {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      if constexpr (BITS == 4) {
        a[2 * v] = w[2 * s + v] & 0x0F0F0F0F;
        a[2 * v + 1] = w[2 * s + v] & 0xF0F0F0F0;
      } else if constexpr (BITS == 8) {  // the words of half a block
        a[2 * v] = __byte_perm(w[2 * v], w[2 * v + 1], 0x6240);
        a[2 * v + 1] = __byte_perm(w[2 * v], w[2 * v + 1], 0x7351);
      } else if constexpr (BITS == 2) {
        a[2 * v] = (w[s] >> (4 * v)) & 0x03030303;
        a[2 * v + 1] = (w[s] >> (4 * v)) & 0x0C0C0C0C;
      } else if (s == 0 || v == 0) {
        a[2 * v] = w[s == 0 ? v : 2] & 0x07070707;
        a[2 * v + 1] = w[s == 0 ? v : 2] & 0x38383838;
      } else {
        a[2] = and_or(w[2] >> 4, 0x04040404, (w[0] >> 6) & 0x03030303);
        a[3] = and_or(w[2] >> 2, 0x20202020, (w[1] >> 3) & 0x18181818);
      }
    }
  }
};

// Scales of one group for the 64 rows of a block row: 64 x 16 bit, then (asymmetric weights) 64 x uint8 zero points, both
// ordered [row % 8][row / 16][(row / 8) % 2], so that a lane's eight values are one 16-byte and one 8-byte load.
constexpr int kScaleBytes = 2 * kBlock;
constexpr int kZeroBytes = kBlock;

__device__ __forceinline__ float scale_value(uint32_t bits16, bool is_bf16) {
  return is_bf16 ? __uint_as_float(bits16 << 16) : __half2float(__ushort_as_half(static_cast<unsigned short>(bits16)));
}

// A lane's scales and (offset + zero point)s of one group in TILES row tiles from `first` on: rows lane / 4 and lane / 4 + 8 of each.
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

}  // namespace woq
