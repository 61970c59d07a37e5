// The same vectors as of AVX-512 with all its dot products, in the compilers' own vector types: runs on any processor, not
// fast, and lets every path of the kernels be tested where there is no AVX-512.
#pragma once
#include "kernels.h"

namespace woq {
namespace {

struct Isa {
  typedef float F __attribute__((vector_size(64)));
  typedef uint32_t I __attribute__((vector_size(64)));
  static constexpr int lanes = 16;
  static constexpr int widths[6] = {1, 2, 4, 0, 0, 0};
  static constexpr bool indexes_by_low_bits = true;
  static constexpr bool has_bf16 = true;
  static constexpr bool has_dot4 = true;

  using Table = const Weight&;
  static Table table(const Weight& w) { return w; }

  static I load(const uint32_t* p) { return get<I>(p); }
  static void store(uint32_t* p, I v) { __builtin_memcpy(p, &v, sizeof v); }
  static F load(const float* p) { return get<F>(p); }
  static void store(float* p, F v) { __builtin_memcpy(p, &v, sizeof v); }
  static I broadcast(const uint32_t* p) { return I{} + *p; }
  static F broadcast(const float* p) { return all(*p); }
  static I all(uint32_t v) { return I{} + v; }
  static F all(float v) { return as_float(all(__builtin_bit_cast(uint32_t, v))); }  // F{} + v would make -0 a 0
  static F as_float(I v) { return __builtin_bit_cast(F, v); }
  static I as_bits(F v) { return __builtin_bit_cast(I, v); }
  static F to_float(I v) {
    typedef int32_t S __attribute__((vector_size(64)));
    return __builtin_convertvector(__builtin_bit_cast(S, v), F);
  }
  static I both(I a, I b) { return a & b; }
  static I either(I a, I b) { return a | b; }
  static I differ(I a, I b) { return a ^ b; }
  static I add(I a, I b) { return a + b; }
  static F add(F a, F b) { return a + b; }
  static F subtract(F a, F b) { return a - b; }
  static F multiply(F a, F b) { return a * b; }
  static F larger(F a, F b) { return a > b ? a : b; }
  static F fma(F a, F b, F c) { return a * b + c; }
  static F fnma(F a, F b, F c) { return c - a * b; }
  template <int N> static I right(I v) { return v >> N; }
  template <int N> static I left(I v) { return v << N; }
  template <int B> static I byte(I v) { return (v >> (8 * B)) & 255u; }

  __attribute__((noinline)) static F lookup(I index, Table w) {
    F out;
    for (int i = 0; i < lanes; ++i) out[i] = w.table[index[i] & 15];
    return out;
  }
  __attribute__((noinline)) static I lookup_bf16(I index, Table w) {
    I out;
    for (int i = 0; i < lanes; ++i) out[i] = w.table_bf16[index[i] & 31] | uint32_t(w.table_bf16[index[i] >> 16 & 31]) << 16;
    return out;
  }
  __attribute__((noinline)) static I lookup_bytes(I index, Table w) {
    I out = {};
    for (int i = 0; i < lanes; ++i)
      for (int b = 0; b < 32; b += 8) out[i] |= uint32_t(uint8_t(w.table_i8[index[i] >> b & 15])) << b;
    return out;
  }
  __attribute__((noinline)) static I dot4(I acc, I codes, I x) {
    for (int i = 0; i < lanes; ++i)
      for (int b = 0; b < 32; b += 8) acc[i] += uint32_t(int32_t(codes[i] >> b & 255) * int32_t(int8_t(x[i] >> b & 255)));
    return acc;
  }
  __attribute__((noinline)) static F dot_bf16(F acc, I w, I x) {
    const I top = all(0xffff0000u);
    return as_float(w & top) * as_float(x & top) + (as_float(w << 16) * as_float(x << 16) + acc);
  }

  static I add_pairs(I acc, I codes, I x);  // declared for the branches that are not taken
  static I add_halves(I acc, I pairs);
  static I dot4_signed(I acc, I w, I x);

  static F from_f16(const uint16_t* p) {
    F out;
    for (int i = 0; i < lanes; ++i) out[i] = half(p[i]);
    return out;
  }
  static F from_bf16(const uint16_t* p) {
    I out;
    for (int i = 0; i < lanes; ++i) out[i] = uint32_t(p[i]) << 16;
    return as_float(out);
  }
  static F from_bytes(const uint8_t* p) {
    F out;
    for (int i = 0; i < lanes; ++i) out[i] = p[i];
    return out;
  }
  static void to_f16(uint16_t* p, F v) {
    for (int i = 0; i < lanes; ++i) p[i] = half(v[i]);
  }
  static void to_bf16(uint16_t* p, F v) {
    const I bits = as_bits(v);
    for (int i = 0; i < lanes; ++i) p[i] = v[i] != v[i] ? 0x7fc0 : (bits[i] + 0x7fff + (bits[i] >> 16 & 1)) >> 16;
  }
  static void prefetch(const void* p) { __builtin_prefetch(p); }

 private:
  template <class T> static T get(const void* p) {
    T v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  // Multiplying by 2^112 moves the exponent's bias, and makes subnormal numbers right on the way.
  static float half(uint16_t h) {
    const uint32_t magnitude = uint32_t(h & 0x7fff) << 13, sign = uint32_t(h & 0x8000) << 16;
    const float v = __builtin_bit_cast(float, magnitude) * 0x1p112f;
    const bool finite = (h & 0x7c00) != 0x7c00;
    return __builtin_bit_cast(float, (finite ? __builtin_bit_cast(uint32_t, v) : magnitude | 0x7f800000) | sign);
  }
  static uint16_t half(float v) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, v), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to infinity from 65520 on
    if (magnitude < 0x38800000)  // subnormal: adding 0.5 leaves the rounded bits at the bottom of the mantissa
      return uint16_t(sign | (__builtin_bit_cast(uint32_t, __builtin_bit_cast(float, magnitude) + 0.5f) - 0x3f000000));
    return uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
  }
};

}  // namespace
}  // namespace woq
