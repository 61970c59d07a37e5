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

// Always in the same order, whatever the vectors' width and the number of threads.
inline float sum(const float* v, int n) {
  float part[kUnit] = {};
  for (int i = 0; i < n; i += kUnit)
    for (int j = 0; j < kUnit; ++j) part[j] += v[i + j];
  for (int half = kUnit / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) part[j] += part[j + half];
  return part[0];
}

inline float largest(const float* v, int n) {
  float part[kUnit] = {};
  for (int i = 0; i < n; i += kUnit)
    for (int j = 0; j < kUnit; ++j) {
      const float magnitude = v[i + j] < 0 ? -v[i + j] : v[i + j];
      part[j] = magnitude > part[j] ? magnitude : part[j];
    }
  for (int half = kUnit / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) part[j] = part[j] > part[j + half] ? part[j] : part[j + half];
  return part[0];
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
  const float top = largest(v, n), whole = sum(v, n);
  const float inverse = top > 0 ? 127.f / top : 0.f;
  constexpr float kMagic = 12582912.f;  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
  int32_t total[kUnit] = {};
  alignas(64) int8_t steps[kGroup];
  for (int i = 0; i < n; i += kUnit)
    for (int j = 0; j < kUnit; ++j) {
      const int32_t rounded = __builtin_bit_cast(int32_t, v[i + j] * inverse + kMagic) - 0x4b400000;
      steps[i + j] = static_cast<int8_t>(rounded);
      total[j] += rounded;
    }
  int32_t all = 0;
  for (int j = 0; j < kUnit; ++j) all += total[j];
  __builtin_memcpy(words, steps, n);
  // Infinite or no numbers must not come out finite: a sum that is not finite says that there is one.
  step = whole - whole == 0 ? top / 127.f : whole - whole;
  return static_cast<float>(all);
}

template <Kind kind> inline void arrange_token(const Weight& w, const Input& in, const Arranged& a, const Tile& tile, int place) {
  const int n = w.units * kUnit, per_group = w.units * words_per_unit(kind);
  uint32_t* words = a.words + tile.offset * w.groups * per_group + place;
  float* sums = a.sums + tile.offset * w.groups + place;
  float* steps = a.steps + tile.offset * w.groups + place;
  Group group;
  alignas(64) uint32_t packed[kGroup];
  for (int64_t g = 0; g < w.groups; ++g, words += per_group * tile.width, sums += tile.width, steps += tile.width) {
    if (place < tile.count)
      read(group, in, tile.first + place, g * n, n);
    else
      __builtin_memset(group.values, 0, sizeof group.values);
    const float* v = group.values;
    if constexpr (kind == Kind::i8) {
      *sums = to_int8(packed, v, n, *steps);
      if (w.format == Format::book) *steps *= w.book_scale / 127.f;
    } else {
      *sums = sum(v, n);
      *steps = 1;
    }
    if constexpr (kind == Kind::f32) __builtin_memcpy(packed, v, n * sizeof(float));
    if constexpr (kind == Kind::bf16) {
      uint32_t bits[kGroup];
      __builtin_memcpy(bits, v, n * sizeof(float));
      for (int q = 0; q < n / 4; ++q)
        for (int s = 0; s < 2; ++s) packed[2 * q + s] = bits[4 * q + s] >> 16 | (bits[4 * q + s + 2] & 0xffff0000u);
    }
    put(words, packed, per_group, tile.width);
  }
}

inline void arrange(const Weight& w, const Input& in, Kind kind, const Arranged& a, int tile, int place) {
  switch (kind) {
    case Kind::f32: return arrange_token<Kind::f32>(w, in, a, a.tiles[tile], place);
    case Kind::bf16: return arrange_token<Kind::bf16>(w, in, a, a.tiles[tile], place);
    case Kind::i8: return arrange_token<Kind::i8>(w, in, a, a.tiles[tile], place);
  }
}

}  // namespace
}  // namespace woq
