// AVX-512 F, BW, DQ and VL; the dot products of VNNI and BF16 where the compiler is told that they are there.
#pragma once
#include <immintrin.h>

#include "kernels.h"

namespace woq {
namespace {

struct Isa {
  using F = __m512;
  using I = __m512i;
  static constexpr int lanes = 16;
  static constexpr int widths[6] = {1, 2, 3, 4, 8, 12};
  static constexpr bool indexes_by_low_bits = true;  // a table's index need not be masked
#if defined(__AVX512VNNI__)
  static constexpr bool has_dot4 = true;
  // Not by its intrinsic, which works on vectors of another type: gcc then keeps sums in memory.
  static I dot4(I acc, I codes, I x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(x));
    return acc;
  }
#else
  static constexpr bool has_dot4 = false;
  static I dot4(I acc, I codes, I x);  // declared for the branches that are not taken
#endif
#if defined(__AVX512BF16__)
  static constexpr bool has_bf16 = true;
  static F dot_bf16(F acc, I w, I x) { return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)x); }
#else
  static constexpr bool has_bf16 = false;
  static F dot_bf16(F acc, I w, I x);
#endif

  struct Table {
    F floats;
    I halves, bytes;
  };
  static Table table(const Weight& w) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.table_i8));
    return {_mm512_loadu_ps(w.table), _mm512_loadu_si512(w.table_bf16), _mm512_broadcast_i32x4(bytes)};
  }

  static I load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static void store(uint32_t* p, I v) { _mm512_storeu_si512(p, v); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static I broadcast(const uint32_t* p) { return _mm512_set1_epi32(static_cast<int>(*p)); }
  static F broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static I all(uint32_t v) { return _mm512_set1_epi32(static_cast<int>(v)); }
  static F all(float v) { return _mm512_set1_ps(v); }
  static F as_float(I v) { return _mm512_castsi512_ps(v); }
  static I as_bits(F v) { return _mm512_castps_si512(v); }
  static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  static I both(I a, I b) { return _mm512_and_si512(a, b); }
  static I either(I a, I b) { return _mm512_or_si512(a, b); }
  static I differ(I a, I b) { return _mm512_xor_si512(a, b); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F subtract(F a, F b) { return _mm512_sub_ps(a, b); }
  static F multiply(F a, F b) { return _mm512_mul_ps(a, b); }
  static F larger(F a, F b) { return _mm512_max_ps(a, b); }  // b where one is no number
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
  template <int N> static I right(I v) { return N == 0 ? v : _mm512_srli_epi32(v, N); }
  template <int N> static I left(I v) { return N == 0 ? v : _mm512_slli_epi32(v, N); }

  template <int B> static I byte(I v) {
    if constexpr (B == 3) return right<24>(v);
    return both(right<8 * B>(v), all(255u));
  }
  static F lookup(I index, const Table& t) { return _mm512_permutexvar_ps(index, t.floats); }
  // bf16 by the low 5 bits of every 16-bit half.
  static I lookup_bf16(I index, const Table& t) { return _mm512_permutexvar_epi16(index, t.halves); }
  static I lookup_bytes(I index, const Table& t) { return _mm512_shuffle_epi8(t.bytes, index); }

  static I add_pairs(I acc, I codes, I x) {
    acc = _mm512_add_epi16(acc, _mm512_maddubs_epi16(codes, x));
    asm("" : "+v"(acc));  // as in isa_avx2.h
    return acc;
  }
  static I add_halves(I acc, I pairs) { return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1))); }
  static I dot4_signed(I acc, I w, I x) {
    const I with_sign = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), _mm512_setzero_si512(), x);
    return add_halves(acc, _mm512_maddubs_epi16(_mm512_abs_epi8(w), with_sign));
  }

  static F from_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static F from_bf16(const uint16_t* p) {
    return as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
  }
  static F from_bytes(const uint8_t* p) {
    return to_float(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static void to_f16(uint16_t* p, F v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static void to_bf16(uint16_t* p, F v) {
#if defined(__AVX512BF16__)  // but it takes subnormal numbers for 0, as all bf16 arithmetic of these processors does
    return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
#endif
    const I bits = as_bits(v);
    const I rounded = add(add(bits, all(0x7fffu)), both(right<16>(bits), all(1u)));
    const I kept = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), all(0x7fc00000u));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(right<16>(kept)));
  }
  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
};

}  // namespace
}  // namespace woq
