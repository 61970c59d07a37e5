// Decode's products of one or two tokens: exact integers, which takes the fewest instructions a weight.
//
// What bounds decoding is making the tensor cores' operands. As bytes, four codes of a row are one AND of a word (dequant.cuh),
// and nothing is added to them; and of an MMA's eight columns most are empty. So x is made integer too, three digits a value, in
// columns of their own:
//
//     x = unit * (d0 + 256 d1 + 65536 d2),  digits in -128 .. 127,  unit = 2^(e - 22)
//
// where 2^e is the least power of two above the largest |x| among the 128 inputs of a pair of blocks. No weight is rounded; x is, to
// 2^-23 of that largest value, so that bf16 is exact down to 2^-15 of it. Products of digits and codes are exact in int32
// and their sums stay below 2^22: accumulators that begin as the bits of 1.5 * 2^23 end as the bits of that plus the sum,
// as a float, and need no conversion. Once a group they are put together and scaled:
//
//     total += scale * unit * (sum digits code - zero * sum digits)
//
// If a value of x is infinite or NaN, `unit` is NaN and with it all of the token's results.
//
// Column 4 t + d of an MMA is digit d of its token t; column 4 t + 3 is not used. So lane l holds digits 0 and 1 of token l % 4 / 2
// if l is even, digit 2 if it is odd, and `store` adds the two.
#pragma once

#include "reduce.cuh"

namespace woq {

template <class T, int BITS, int UNITS>
struct DigitTurn {
  using C = Codes<T, BITS>;
  static constexpr int residents = 2;           // thread blocks a processor must have registers for
  static constexpr int zero_bits = 0x4B400000;  // 1.5 * 2^23: where accumulators begin
  float total[kRowTiles][2];                    // upper and lower row of a tile

  // Where this lane's digits lie, and the sums and units of its token; a token past m repeats the last and is dropped.
  struct Input {
    uint32_t digits, sums, units;
    int block_bytes, tokens;
    __device__ Input(const DecodeArgs& a, const DecodeLayout& layout, uint32_t base, int lane) : block_bytes(layout.x_stride), tokens(a.m) {
      const int column = lane / 4 & (4 * a.m - 1), token = min(lane % 4 / 2, a.m - 1);
      digits = base + layout.x + column * kBlock + lane % 4 * 16;
      sums = base + layout.x_sums + token * 16;
      units = base + layout.x_units + token * 4;
    }
  };

  // With act-order, the columns of x that a thread's part takes: those of the first part are read before x is waited for.
  struct Order {
    int part, columns[8][2];
    __device__ Order(const DecodeArgs& a, int first, int last) : part(-1) {
      if (a.order != nullptr) read(a, first, last, threadIdx.x % parts(first, last));
    }
    __device__ void read(const DecodeArgs& a, int first, int last, int column) {
      if (part == column) return;
      part = column;
      const Part p{0, column};
      int k = (first + p.block()) * kBlock + 2 * p.c();
#pragma unroll
      for (int i = 0; i < 8; ++i, k += 8) {
        const int2 two = first + p.block() < last && k < a.k ? *reinterpret_cast<const int2*>(a.order + k) : make_int2(-1, -1);
        columns[i][0] = two.x, columns[i][1] = two.y;
      }
    }
  };

  // x[:, 64 first .. 64 last), zero beyond k, to shared memory: digits as [block][column][lane % 4][four words], and for every
  // pair of blocks and token its `unit` and the sums of its four times 32 inputs, in units. `barrier` has not been used.
  __device__ static void stage(const DecodeArgs& a, const DecodeLayout& layout, uint8_t* shared, uint32_t barrier, int first, int last, Order order) {
    const int columns = parts(first, last);
    if (a.order != nullptr) whole_rows(a, smem_address(shared) + layout.x_whole, barrier);
    Part part{int(threadIdx.x) / columns, int(threadIdx.x) % columns};
    while (part.token < a.m) {
      uint32_t values[4][2] = {};
      if (a.order != nullptr) {
        order.read(a, first, last, part.column);
        load(values, order, Shared{smem_address(shared) + layout.x_whole + part.token * a.k * 2});
      } else if (first + part.block() < last) {
        load(values, a, part.token, (first + part.block()) * kBlock + 2 * part.c());
      }
      put(a, layout, shared, part, values);
      for (part.column += blockDim.x; part.column >= columns; part.column -= columns) ++part.token;
    }
    __syncthreads();
  }

  // Add UNITS units of one group, from unit `from` (0 or 1) of the slice's block `first` on, whose weights lie at `block`;
  // UNITS == 4 is `blocks` <= 2 blocks.
  __device__ void chunk(const DecodeArgs& a, const uint8_t* block, int blocks, int from, const uint8_t* group, const Input& x, int first, int lane) {
    const int pair = first / 2 * x.tokens;
    const float4 sums = read<float4>(Shared{x.sums + pair * 16});
    float unit = read<float>(Shared{x.units + pair * 4}), sum;
    if constexpr (UNITS == 4) sum = (sums.x + sums.y) + (sums.z + sums.w);
    else if constexpr (UNITS == 2) sum = first % 2 ? sums.z + sums.w : sums.x + sums.y;
    else sum = first % 2 ? (from ? sums.w : sums.z) : (from ? sums.y : sums.x);
    float second = 256.f;  // what a digit of this lane's second column is worth
    if (lane % 2) unit *= 65536.f, sum = 0.f, second = 0.f;
    int codes[kRowTiles][4];
#pragma unroll
    for (int i = 0; i < kRowTiles * 4; ++i) codes[i / 4][i % 4] = zero_bits;
#pragma unroll
    for (int b = 0; b < (UNITS == 4 ? 2 : 1); ++b)
      if (b < blocks) multiply(codes, block + b * C::block_bytes, from, x.digits + (first + b) * x.block_bytes, lane);
    const GroupScales<kRowTiles> g(a, group, 0.f, 0, lane);
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        constexpr float times[2] = {1.f, Bytes<BITS>::lower};
        const float product = value(codes[t][2 * half]) + second * value(codes[t][2 * half + 1]) - g.zero[2 * t + half] * (times[half] * sum);
        total[t][half] += g.scale[2 * t + half] * (unit / times[half]) * product;
      }
  }

  __device__ void store(const DecodeArgs& a, float* partial, int stride, int lane) const {
    const int token = lane % 4 / 2;
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float v = total[t][half] + __shfl_xor_sync(0xFFFFFFFF, total[t][half], 1);
        if (token < a.m && lane % 2 == 0) partial[token * stride + 16 * t + 8 * half + lane / 4] = v;
      }
  }

 private:
  __device__ static float value(int bits) { return __int_as_float(bits) - __int_as_float(zero_bits); }

  // What a thread cuts at a time: 16 inputs of a block, every fourth pair. Eight neighbours share a token's pair of blocks.
  struct Part {
    int token, column;
    __device__ int block() const { return column / 4; }
    __device__ int c() const { return column % 4; }
  };
  // Of a token, a number of whole pairs of blocks.
  __device__ static int parts(int first, int last) { return (last - first + 1) / 2 * 8; }

  // Pairs of inputs, from k on (which is even, as their number is) every eighth, zero beyond the last: [16 inputs each][first or
  // second eight].
  __device__ static void load(uint32_t (&values)[4][2], const DecodeArgs& a, int token, int k) {
    const auto* x = static_cast<const uint16_t*>(a.x) + static_cast<int64_t>(token) * a.k;
#pragma unroll
    for (int i = 0; i < 8; ++i, k += 8)
      if (k < a.k) values[i / 2][i % 2] = *reinterpret_cast<const uint32_t*>(x + k);
  }

  // The same from a row that is in shared memory, in the weight's order.
  __device__ static void load(uint32_t (&values)[4][2], const Order& order, Shared row) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (order.columns[i][0] >= 0)
        values[i / 2][i % 2] = read<uint16_t>(row + 2 * order.columns[i][0]) | uint32_t(read<uint16_t>(row + 2 * order.columns[i][1])) << 16;
  }

  // All of x to shared memory: any column may be wanted. Rows are multiples of 16 bytes.
  __device__ static void whole_rows(const DecodeArgs& a, uint32_t to, uint32_t barrier) {
#if HOPPER
    if (threadIdx.x < 32) {
      if (elect()) {
        barrier_expect(barrier, a.m * a.k * 2);
        for (int row = 0; row < a.m; ++row)
          bulk_copy(to + row * a.k * 2, static_cast<const uint8_t*>(a.x) + static_cast<int64_t>(row) * a.k * 2, a.k * 2, barrier, keep_policy());
      }
      __syncwarp();
    }
    barrier_wait(barrier, 0);
#endif
  }

  // The part's digits to shared memory; of its pair of blocks one thread writes the unit, and of a block one the sums.
  __device__ static void put(const DecodeArgs& a, const DecodeLayout& layout, uint8_t* shared, Part part, const uint32_t (&values)[4][2]) {
    const uint32_t pair = 0xFFu << (threadIdx.x & 24);
    const int block = part.block(), place = block / 2 * a.m + part.token;
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) most = __vmaxu2(most, values[i / 2][i % 2] & 0x7FFF7FFF);
    most = max(most & 0xFFFF, most >> 16);
#pragma unroll
    for (int other = 1; other < 8; other *= 2) most = max(most, __shfl_xor_sync(pair, most, other));
    const uint32_t exponent = max(__float_as_uint(Float16<T>::value(most)) >> 23, 22u);  // e + 126; less than 2^-104 counts as that
    uint4 digits[3];
    int sums[2] = {};
    cut(digits, sums, values, __uint_as_float((275 - exponent) << 23));
#pragma unroll
    for (int other = 1; other < 4; other *= 2)
#pragma unroll
      for (int half = 0; half < 2; ++half) sums[half] += __shfl_xor_sync(pair, sums[half], other);
    uint8_t* to = shared + layout.x + block * layout.x_stride + 4 * part.token * kBlock + part.c() * 16;
#pragma unroll
    for (int d = 0; d < 3; ++d) *reinterpret_cast<uint4*>(to + d * kBlock) = digits[d];
    if (part.c() == 0) reinterpret_cast<float2*>(shared + layout.x_sums)[2 * place + block % 2] = make_float2(sums[0], sums[1]);
    if (part.column % 8 == 0) {
      const float unit = exponent == 255 ? __uint_as_float(0x7FFFFFFF) : __uint_as_float((exponent - 21) << 23);
      reinterpret_cast<float*>(shared + layout.x_units)[place] = unit;
    }
  }

  // 16 values times `scale` to integers below 2^22, those to digits in the order of Bytes<BITS>, and the sums of both halves of the block.
  __device__ static void cut(uint4 (&digits)[3], int (&sums)[2], const uint32_t (&values)[4][2], float scale) {
    constexpr uint32_t bias = 0x808080;  // 128 added at each digit makes bytes of digits: 128 + digit
    const auto whole = [scale](uint32_t bits) {
      return __float_as_uint(fmaf(Float16<T>::value(bits & 0xFFFF), scale, __uint_as_float(zero_bits))) - zero_bits + bias;
    };
    uint32_t words[3][4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      constexpr bool eights = Bytes<BITS>::right_in_byte;  // else a word's bytes come from neighbouring sixteens
      const uint32_t one = eights ? values[w][0] : values[w / 2 * 2][w % 2], two = eights ? values[w][1] : values[w / 2 * 2 + 1][w % 2];
      const uint32_t v[4] = {whole(one), whole(two), whole(one >> 16), whole(two >> 16)};
      sums[w / 2] += static_cast<int>(v[0] + v[1] + v[2] + v[3] - 4 * bias);
      const uint32_t left = __byte_perm(v[0], v[1], 0x5140), right = __byte_perm(v[2], v[3], 0x5140);
      words[0][w] = __byte_perm(left, right, 0x5410) ^ 0x80808080;
      words[1][w] = __byte_perm(left, right, 0x7632) ^ 0x80808080;
      words[2][w] = __byte_perm(__byte_perm(v[0], v[1], 0x0062), __byte_perm(v[2], v[3], 0x0062), 0x5410) ^ 0x80808080;
    }
#pragma unroll
    for (int d = 0; d < 3; ++d) digits[d] = make_uint4(words[d][0], words[d][1], words[d][2], words[d][3]);
  }

  // One block (UNITS == 1: half `from` of it) times the digits at `x`.
  __device__ static void multiply(int (&codes)[kRowTiles][4], const uint8_t* block, int from, uint32_t x, int lane) {
    const uint4 right = read<uint4>(Shared{x});
    uint32_t words[kRowTiles][C::words];
#pragma unroll
    for (int half = UNITS == 1 ? from : 0; half < (UNITS == 1 ? from + 1 : 2); ++half) {
      if (BITS == 8 || UNITS == 1 || half == 0)
#pragma unroll
        for (int t = 0; t < kRowTiles; ++t) C::load(words[t], block, t, half, lane);
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t) {
        uint32_t fragment[4];
        Bytes<BITS>::fragment(fragment, words[t], half);
        mma(codes[t], fragment, half ? right.z : right.x, half ? right.w : right.y);
      }
    }
  }
};

}  // namespace woq
