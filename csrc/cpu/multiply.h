// The product: two vectors of rows times a few tokens, group by group.
//
//   y[m, n] = sum over groups of scale * step * (sum of code * x  -  zero * sum of x)
//
// The inner sum is float32 fused multiply-adds, bf16 dot products that add up in float32, or int8 dot products in int32.
#pragma once
#include "arrange.h"
#include "codes.h"

namespace woq {
namespace {

constexpr int kTileRows = 2 * Isa::lanes;

template <Kind kind> struct Sums {
  using type = F;
};
template <> struct Sums<Kind::i8> {
  using type = I;
};

template <int N> struct Index {
  static constexpr int value = N;
};
template <int N, class Body> __attribute__((always_inline)) inline void repeat(Body&& body) {
  static_assert(N == 1 || N == 2 || N == 4);
  body(Index<0>{});
  if constexpr (N > 1) body(Index<1>{});
  if constexpr (N > 2) body(Index<2>{}), body(Index<3>{});
}

// int8 without its own dot product: pairs add up in int16 for a unit where codes are narrow.
template <Kind kind, Format format> constexpr bool kPairs = kind == Kind::i8 && !Isa::has_dot4 && format != Format::bits8 && format != Format::book;

template <Kind kind, class S> __attribute__((always_inline)) inline S multiply_add(S sum, I w, I x) {
  if constexpr (kind == Kind::f32) {
    return Isa::fma(Isa::as_float(w), Isa::as_float(x), sum);
  } else if constexpr (kind == Kind::bf16) {
    return Isa::dot_bf16(sum, w, x);
  } else if constexpr (Isa::has_dot4) {
    return Isa::dot4(sum, w, x);
  } else {
    return Isa::dot4_signed(sum, w, x);
  }
}

// The sums over one group of code * x, for T tokens and both vectors; in several chains where tokens alone are too few.
template <Kind kind, bool in_pairs, int T> struct GroupSums {
  using S = typename Sums<kind>::type;
  static constexpr int kWays = in_pairs || T > 2 ? 1 : T == 2 ? 2 : 4;
  S sums[kWays][T][2] = {};
  I pairs[in_pairs ? T : 1][2] = {};

  // Word number W of a run: w times the T words at x.
  template <int W> __attribute__((always_inline)) void add(const I (&w)[2], const uint32_t* x) {
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      const I token = Isa::broadcast(x + t);
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        if constexpr (in_pairs)
          pairs[t][v] = Isa::add_pairs(pairs[t][v], w[v], token);
        else
          sums[W % kWays][t][v] = multiply_add<kind>(sums[W % kWays][t][v], w[v], token);
      }
    }
  }
  __attribute__((always_inline)) void end_unit() {
    if constexpr (in_pairs)
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) sums[0][t][v] = Isa::add_halves(sums[0][t][v], pairs[t][v]), pairs[t][v] = I{};
  }
  __attribute__((always_inline)) F total(int t, int v) const {
    S whole = sums[0][t][v];
    if constexpr (kWays == 2) whole = Isa::add(whole, sums[1][t][v]);
    if constexpr (kWays == 4) whole = Isa::add(Isa::add(whole, sums[1][t][v]), Isa::add(sums[2][t][v], sums[3][t][v]));
    if constexpr (kind == Kind::i8)
      return Isa::to_float(whole);
    else
      return whole;
  }
};

// Straight from the stored words of both vectors.
template <Kind kind, Format format, int T>
__attribute__((always_inline)) inline void add_stored(GroupSums<kind, kPairs<kind, format>, T>& sums, const uint32_t* const (&vectors)[2], const uint32_t* x, int units, const Isa::Table& table) {
  for (int unit = 0; unit < units; ++unit) {
    const uint32_t* words[2] = {vectors[0] + unit * kBits<format> * kBlock, vectors[1] + unit * kBits<format> * kBlock};
    for (int part = 0; part < kParts<format>; ++part) {
      const I tops[2] = {top_bits<format>(words[0], part), top_bits<format>(words[1], part)};
      repeat<kQuads<format>>([&](auto q) __attribute__((always_inline)) {
        constexpr int Q = decltype(q)::value;
        const I quad[2] = {start<kind, format, Q>(part_of<format>(words[0], part), tops[0], table),
                           start<kind, format, Q>(part_of<format>(words[1], part), tops[1], table)};
        repeat<kSteps<kind>>([&](auto s) __attribute__((always_inline)) {
          constexpr int S = decltype(s)::value, kWord = Q * kSteps<kind> + S;
          const I w[2] = {step<kind, format, Q, S>(quad[0], table), step<kind, format, Q, S>(quad[1], table)};
          sums.template add<kWord>(w, x + kWord * T);
        });
      });
      x += kQuads<format> * kSteps<kind> * T;
    }
    sums.end_unit();
  }
}

// From a panel [units * words_per_unit, 2, lanes], whatever format it was unpacked from.
template <Kind kind, bool in_pairs, int T>
__attribute__((always_inline)) inline void add_unpacked(GroupSums<kind, in_pairs, T>& sums, const uint32_t* panel, const uint32_t* x, int units) {
  for (int unit = 0; unit < units; ++unit) {
    for (int word = 0; word < words_per_unit(kind); word += 4, panel += 8 * Isa::lanes, x += 4 * T)
      repeat<4>([&](auto i) __attribute__((always_inline)) {
        constexpr int W = decltype(i)::value;
        const I w[2] = {Isa::load(panel + 2 * W * Isa::lanes), Isa::load(panel + (2 * W + 1) * Isa::lanes)};
        sums.template add<W>(w, x + W * T);
      });
    sums.end_unit();
  }
}

// Scales and zero points of one vector of rows in one group.
struct RowScales {
  F scale, zero;
};
template <Kind kind, Format format> inline RowScales row_scales(const Weight& w, int64_t row, int64_t group) {
  const int64_t at = (row / kBlock * w.groups + group) * kBlock + row % kBlock;
  RowScales r;
  const void* s = w.scales;
  r.scale = w.scale_dtype == Dtype::f32   ? Isa::load(static_cast<const float*>(s) + at)
            : w.scale_dtype == Dtype::f16 ? Isa::from_f16(static_cast<const uint16_t*>(s) + at)
                                          : Isa::from_bf16(static_cast<const uint16_t*>(s) + at);
  r.zero = w.zeros == nullptr   ? Isa::all(w.zero)
           : w.zeros_are_bytes ? Isa::from_bytes(static_cast<const uint8_t*>(w.zeros) + at)
                               : Isa::load(static_cast<const float*>(w.zeros) + at);
  r.zero = Isa::add(r.zero, Isa::all(kOffset<kind, format>));
  return r;
}

// out += scale * step * (sum - zero * sum of x)
template <Kind kind, bool in_pairs, int T>
__attribute__((always_inline)) inline void add_scaled(float* out, const GroupSums<kind, in_pairs, T>& sums, const RowScales (&rows)[2], const float* x_sums, const float* x_steps) {
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      float* place = out + (t * 2 + v) * Isa::lanes;
      const F shifted = Isa::fnma(rows[v].zero, Isa::broadcast(x_sums + t), sums.total(t, v));
      F scale = rows[v].scale;
      if constexpr (kind == Kind::i8) scale = Isa::multiply(scale, Isa::broadcast(x_steps + t));
      Isa::store(place, Isa::fma(scale, shifted, Isa::load(place)));
    }
}

template <class T> inline void store_some(void* y, int64_t at, const T* values, int64_t n) {
  __builtin_memcpy(static_cast<T*>(y) + at, values, n * sizeof(T));
}

// A row tile of one token to y, cut off at the last row.
inline void store_rows(const float* values, int64_t token, int64_t row, int64_t rows, const Output& out) {
  const int64_t left = rows - row, n = left < kTileRows ? left : kTileRows, at = token * rows + row;
  if (out.dtype == Dtype::f32) return store_some(out.y, at, values, n);
  alignas(64) uint16_t halves[kTileRows];
  for (int i = 0; i < kTileRows; i += Isa::lanes)
    out.dtype == Dtype::f16 ? Isa::to_f16(halves + i, Isa::load(values + i)) : Isa::to_bf16(halves + i, Isa::load(values + i));
  store_some(out.y, at, halves, n);
}

inline void store_tile(const float* values, const Tile& tile, int64_t row, int64_t rows, const Output& out) {
  for (int t = 0; t < tile.count; ++t) store_rows(values + t * kTileRows, tile.first + t, row, rows, out);
}

inline const uint32_t* stored(const Weight& w, int64_t row, int64_t group) {
  return w.words + ((row / kBlock * w.groups + group) * w.units) * w.bits * kBlock + row % kBlock;
}

}  // namespace
}  // namespace woq
