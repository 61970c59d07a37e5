// AVX2, FMA and F16C; with -mavxvnni the int8 dot product of AVX-VNNI.
#pragma once
#include <immintrin.h>

#include "kernels.h"

namespace woq {
namespace {

struct Isa {
  using F = __m256;
  using I = __m256i;
  static constexpr int lanes = 8;
  static constexpr int widths[6] = {1, 2, 3, 4, 6, 0};
  static constexpr bool has_bf16 = false;
  static constexpr bool indexes_by_low_bits = false;
#if defined(__AVXVNNI__)
  static constexpr bool has_dot4 = true;
  static I dot4(I acc, I codes, I x) {  // as in isa_avx512.h
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(codes), "x"(x));
    return acc;
  }
#else
  static constexpr bool has_dot4 = false;
  static I dot4(I acc, I codes, I x);  // declared for the branches that are not taken
#endif
  static F dot_bf16(F acc, I w, I x);

  struct Table {
    F low, high;
    __m256i bytes;
  };
  static I lookup_bf16(I index, const Table& t);
  static Table table(const Weight& w) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.table_i8));
    return {_mm256_loadu_ps(w.table), _mm256_loadu_ps(w.table + 8), _mm256_broadcastsi128_si256(bytes)};
  }

  static I load(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const I*>(p)); }
  static void store(uint32_t* p, I v) { _mm256_storeu_si256(reinterpret_cast<I*>(p), v); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static I broadcast(const uint32_t* p) { return _mm256_set1_epi32(static_cast<int>(*p)); }
  static F broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static I all(uint32_t v) { return _mm256_set1_epi32(static_cast<int>(v)); }
  static F all(float v) { return _mm256_set1_ps(v); }
  static F as_float(I v) { return _mm256_castsi256_ps(v); }
  static I as_bits(F v) { return _mm256_castps_si256(v); }
  static F to_float(I v) { return _mm256_cvtepi32_ps(v); }
  static I both(I a, I b) { return _mm256_and_si256(a, b); }
  static I either(I a, I b) { return _mm256_or_si256(a, b); }
  static I differ(I a, I b) { return _mm256_xor_si256(a, b); }
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F subtract(F a, F b) { return _mm256_sub_ps(a, b); }
  static F multiply(F a, F b) { return _mm256_mul_ps(a, b); }
  static F larger(F a, F b) { return _mm256_max_ps(a, b); }  // b where one is no number
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
  template <int N> static I right(I v) { return N == 0 ? v : _mm256_srli_epi32(v, N); }
  template <int N> static I left(I v) { return N == 0 ? v : _mm256_slli_epi32(v, N); }

  // Byte B of every lane: a shuffle runs beside the shifts and the conversions.
  template <int B> static I byte(I v) {
    if constexpr (B == 0) return both(v, all(255u));
    if constexpr (B == 3) return right<24>(v);
    const char z = -128;
    return _mm256_shuffle_epi8(v, _mm256_setr_epi8(B, z, z, z, B + 4, z, z, z, B + 8, z, z, z, B + 12, z, z, z,  //
                                                   B, z, z, z, B + 4, z, z, z, B + 8, z, z, z, B + 12, z, z, z));
  }
  // index: 0 .. 15 in every lane.
  static F lookup(I index, const Table& t) {
    const F upper = as_float(_mm256_slli_epi32(index, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, index), _mm256_permutevar8x32_ps(t.high, index), upper);
  }
  // index: 0 .. 15 in every byte.
  static I lookup_bytes(I index, const Table& t) { return _mm256_shuffle_epi8(t.bytes, index); }

  // int16 += uint8 * int8 in pairs; codes below 16 cannot overflow it within a unit.
  static I add_pairs(I acc, I codes, I x) {
    acc = _mm256_add_epi16(acc, _mm256_maddubs_epi16(codes, x));
    asm("" : "+x"(acc));  // keeps sums in the order they are written in: reordered, they need more registers than there are
    return acc;
  }
  static I add_halves(I acc, I pairs) { return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))); }
  // int32 += int8 * int8 in quads: |w| is at most 128 and |x| 127, whose pairs fit int16.
  static I dot4_signed(I acc, I w, I x) {
    return add_halves(acc, _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)));
  }

  static F from_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static F from_bf16(const uint16_t* p) {
    return as_float(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
  }
  static F from_bytes(const uint8_t* p) {
    return to_float(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static void to_f16(uint16_t* p, F v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static void to_bf16(uint16_t* p, F v) {
    const I bits = as_bits(v);
    const I rounded = add(add(bits, all(0x7fffu)), both(right<16>(bits), all(1u)));
    const I kept = as_bits(_mm256_blendv_ps(as_float(rounded), as_float(all(0x7fc00000u)), _mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
    const I packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(right<16>(kept), right<16>(kept)), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
};

}  // namespace
}  // namespace woq
