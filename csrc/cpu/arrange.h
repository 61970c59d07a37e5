// Activations as the kernels want them: columns in the weight's order, groups padded, words of tokens side by side.
#pragma once
#include "kernels.h"

namespace woq {
namespace {

constexpr int kGroup = kMaxUnits * kUnit;

// One group of one token as floats.
struct Group {
  alignas(64) float values[kGroup];
};

template <class T> inline void gather(T* to, const T* x, const Input& in, int64_t from, int n) {
  if (in.order == nullptr) {
    const int64_t left = in.columns - from;
    const int there = left < n ? (left < 0 ? 0 : static_cast<int>(left)) : n;
    __builtin_memcpy(to, x + from, there * sizeof(T));
    __builtin_memset(to + there, 0, (n - there) * sizeof(T));
  } else {
    const int32_t* order = in.order + from;
    for (int i = 0; i < n; ++i) to[i] = order[i] < 0 ? T(0) : x[order[i]];
  }
}

inline void read(Group& group, const Input& in, int64_t token, int64_t from, int n) {
  const int64_t start = token * in.columns;
  if (in.dtype == Dtype::f32) return gather(group.values, static_cast<const float*>(in.x) + start, in, from, n);
  alignas(64) uint16_t halves[kGroup];
  gather(halves, static_cast<const uint16_t*>(in.x) + start, in, from, n);
  for (int i = 0; i < n; i += Isa::lanes)
    Isa::store(group.values + i, in.dtype == Dtype::f16 ? Isa::from_f16(halves + i) : Isa::from_bf16(halves + i));
}

struct Sum {
  static Isa::F of(Isa::F v, Isa::F sum) { return Isa::add(v, sum); }
  static float of(float v, float sum) { return v + sum; }
};

struct Largest {  // magnitude; what is no number counts as none
  static Isa::F of(Isa::F v, Isa::F most) { return Isa::larger(Isa::as_float(Isa::both(Isa::as_bits(v), Isa::all(0x7fffffffu))), most); }
  static float of(float v, float most) { return v > most ? v : most; }
};

// Always in the same order, whatever the vectors' width and the number of threads.
template <class Combine> inline float over(const float* v, int n) {
  constexpr int kVectors = kUnit / Isa::lanes;
  Isa::F part[kVectors] = {};
  for (int i = 0; i < n; i += kUnit)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) part[j] = Combine::of(Isa::load(v + i + j * Isa::lanes), part[j]);
#pragma GCC unroll 4
  for (int half = kVectors / 2; half > 0; half /= 2)
#pragma GCC unroll 4
    for (int j = 0; j < half; ++j) part[j] = Combine::of(part[j + half], part[j]);
  alignas(64) float last[Isa::lanes];
  Isa::store(last, part[0]);
#pragma GCC unroll 4
  for (int half = Isa::lanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int j = 0; j < half; ++j) last[j] = Combine::of(last[j + half], last[j]);
  return last[0];
}

inline void put(uint32_t* to, const uint32_t* words, int count, int width) {
  if (width == 1) {
    __builtin_memcpy(to, words, count * sizeof(uint32_t));
  } else {
    for (int i = 0; i < count; ++i) to[i * width] = words[i];
  }
}

// Rounds the group to int8 in steps of its largest magnitude / 127. Returns the sum in steps.
inline float to_int8(uint32_t* words, const float* v, int n, float& step) {
  const float top = over<Largest>(v, n), whole = over<Sum>(v, n);
  const float inverse = top > 0 ? 127.f / top : 0.f;
  constexpr float kMagic = 12582912.f;  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
  uint32_t all = 0;  // of what is not finite, anything, but without overflow
  alignas(64) int8_t steps[kGroup];
  for (int i = 0; i < n; i += kUnit) {
    uint32_t unit = 0;
    for (int j = 0; j < kUnit; ++j) {
      const int32_t rounded = __builtin_bit_cast(int32_t, v[i + j] * inverse + kMagic) - 0x4b400000;
      steps[i + j] = static_cast<int8_t>(rounded);
      unit += rounded;
    }
    all += unit;
  }
  __builtin_memcpy(words, steps, n);
  // Infinite or no numbers must not come out finite: a sum that is not finite says that there is one.
  step = whole - whole == 0 ? top / 127.f : whole - whole;
  return static_cast<float>(static_cast<int32_t>(all));
}

template <Kind kind> inline void arrange_token(const Weight& w, const float* v, float& whole, float& step, uint32_t (&words)[kGroup]) {
  const int n = w.units * kUnit;
  if constexpr (kind == Kind::i8) {
    whole = to_int8(words, v, n, step);
    if (w.format == Format::book) step *= w.book_scale / 127.f;
  } else {
    whole = over<Sum>(v, n);
    step = 1;
  }
  if constexpr (kind == Kind::f32) __builtin_memcpy(words, v, n * sizeof(float));
  if constexpr (kind == Kind::bf16) {
    uint32_t bits[kGroup];
    __builtin_memcpy(bits, v, n * sizeof(float));
    for (int q = 0; q < n / 4; ++q)
      for (int s = 0; s < 2; ++s) words[2 * q + s] = bits[4 * q + s] >> 16 | (bits[4 * q + s + 2] & 0xffff0000u);
  }
}

template <Kind kind> inline void arrange_group(const Weight& w, const Input& in, const Arranged& a, const Tile& tile, int64_t g) {
  const int n = w.units * kUnit, per_group = w.units * words_per_unit(kind);
  const int64_t at = tile.offset * w.groups + g * tile.width;
  Group group;
  alignas(64) uint32_t words[kGroup];
  for (int place = 0; place < tile.width; ++place) {
    if (place < tile.count)
      read(group, in, tile.first + place, g * n, n);
    else
      group = {};
    arrange_token<kind>(w, group.values, a.sums[at + place], a.steps[at + place], words);
    put(a.words + at * per_group + place, words, per_group, tile.width);
  }
}

// Groups first .. last, counted over all tiles: a tile's places are written together, as they share cache lines.
template <Kind kind> inline void arrange_groups(const Weight& w, const Input& in, const Arranged& a, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) arrange_group<kind>(w, in, a, a.tiles[i / w.groups], i % w.groups);
}

inline void arrange(const Weight& w, const Input& in, Kind kind, const Arranged& a, int64_t first, int64_t last) {
  switch (kind) {
    case Kind::f32: return arrange_groups<Kind::f32>(w, in, a, first, last);
    case Kind::bf16: return arrange_groups<Kind::bf16>(w, in, a, first, last);
    case Kind::i8: return arrange_groups<Kind::i8>(w, in, a, first, last);
  }
}

}  // namespace
}  // namespace woq
