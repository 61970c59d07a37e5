// From stored words to what a multiplication takes, a quad (4 inputs of every row) at a time. kernels.h has the layout.
#pragma once
#include "kernels.h"

namespace woq {
namespace {

using F = Isa::F;
using I = Isa::I;

// Steps of a quad: one for each word of arranged activations.
template <Kind kind> constexpr int kSteps = words_per_unit(kind) / 8;

template <Format format> constexpr int kBits = format == Format::bits2 ? 2 : format == Format::bits3 ? 3 : format == Format::bits8 ? 8 : 4;

template <Format format> constexpr bool kFourBits = format == Format::bits4 || format == Format::book;

// A unit is unpacked in parts of kQuads quads, so that the code for one part is short.
template <Format format> constexpr int kQuads = format == Format::bits2 || format == Format::bits3 ? 4 : 2;
template <Format format> constexpr int kParts = 8 / kQuads<format>;

// Where part `part` of the unit at `unit` begins (the lower two of three bits).
template <Format format> inline const uint32_t* part_of(const uint32_t* unit, int part) {
  return unit + part * kQuads<format> * (format == Format::bits3 ? 2 : kBits<format>) / 8 * kBlock;
}

// The vector that holds quad Q of the part at `p`, not unpacked.
template <Format format, int Q> inline I raw(const uint32_t* p) {
  return Isa::load(p + Q * (format == Format::bits3 ? 2 : kBits<format>) / 8 * kBlock);
}

// Quad Q as bytes. tops: the plane of top bits, moved so that the part's come first; of 3 bits only.
template <Format format, int Q> inline I bytes(const uint32_t* p, I tops) {
  if constexpr (format == Format::bits8) {
    return raw<format, Q>(p);
  } else if constexpr (kFourBits<format>) {
    return Isa::both(Isa::right<4 * (Q % 2)>(raw<format, Q>(p)), Isa::all(0x0f0f0f0fu));
  } else {
    const I low = Isa::both(Isa::right<2 * Q>(raw<format, Q>(p)), Isa::all(0x03030303u));
    if constexpr (format == Format::bits2) return low;
    const I top = Q < 2 ? Isa::left<Q < 2 ? 2 - Q : 0>(tops) : Isa::right<Q < 2 ? 0 : Q - 2>(tops);
    return Isa::either(low, Isa::both(top, Isa::all(0x04040404u)));
  }
}

template <Format format> inline I top_bits(const uint32_t* unit, int part) {
  if constexpr (format != Format::bits3) return I{};
  const I plane = Isa::load(unit + 2 * kBlock);
  return part == 0 ? plane : Isa::right<4>(plane);
}

// Whether a table is indexed by words that were only shifted: the bits above a code select among equal entries.
template <Kind kind, Format format>
constexpr bool kByTable = Isa::indexes_by_low_bits && kind != Kind::i8 && (kFourBits<format> || format == Format::bits2);

// What all steps of quad Q start from.
template <Kind kind, Format format, int Q> inline I start(const uint32_t* p, I tops, const Isa::Table& table) {
  if constexpr (kByTable<kind, format>) return raw<format, Q>(p);
  const I quad = bytes<format, Q>(p, tops);
  if constexpr (kind == Kind::i8) {
    constexpr bool is_signed = !Isa::has_dot4;
    if constexpr (format == Format::book) {
      const I values = Isa::lookup_bytes(quad, table);
      return is_signed ? values : Isa::differ(values, Isa::all(0x80808080u));
    }
    if constexpr (format == Format::bits8 && is_signed) return Isa::differ(quad, Isa::all(0x80808080u));
  }
  return quad;
}

// What `start` has added to every code beyond what the checkpoint means by it.
template <Kind kind, Format format> constexpr float kOffset = kind != Kind::i8     ? 0.f
                                                              : format == Format::book ? (Isa::has_dot4 ? 128.f : 0.f)
                                                              : format == Format::bits8 ? (Isa::has_dot4 ? 0.f : -128.f)
                                                                                        : 0.f;

template <Format format, int Q> constexpr int kShift = format == Format::bits2 ? 2 * Q : 4 * (Q % 2);

// Two bytes, 16 bits apart, as bf16: 0 .. 255 are exact.
template <int S> inline I bytes_to_bf16(I quad) {
  const I low = Isa::as_bits(Isa::to_float(Isa::template byte<S>(quad)));
  const I high = Isa::as_bits(Isa::to_float(Isa::template byte<S + 2>(quad)));
  return Isa::either(Isa::template right<16>(low), high);
}

// Step S: f32: input S as float; bf16: inputs S and S + 2; i8: all four.
template <Kind kind, Format format, int Q, int S> inline I step(I quad, const Isa::Table& table) {
  if constexpr (kind == Kind::i8) {
    return quad;
  } else if constexpr (kind == Kind::f32) {
    if constexpr (kByTable<kind, format>)
      return Isa::as_bits(Isa::lookup(Isa::template right<8 * S + kShift<format, Q>>(quad), table));
    const I code = Isa::template byte<S>(quad);
    if constexpr (format == Format::book) return Isa::as_bits(Isa::lookup(code, table));
    return Isa::as_bits(Isa::to_float(code));
  } else {
    if constexpr (format == Format::bits8) return bytes_to_bf16<S>(quad);
    constexpr int shift = kByTable<kind, format> ? kShift<format, Q> : 0;
    return Isa::lookup_bf16(Isa::template right<8 * S + shift>(quad), table);
  }
}

}  // namespace
}  // namespace woq
