// The two ways through a weight, for every kind of arithmetic, format and number of tokens; and the table that ops.cpp calls.
#pragma once
#include "multiply.h"

namespace woq {
namespace {

// Calls `run` with the width, one of Isa::widths, as a constant.
template <int N = 0, class Run> inline void with_width(int width, const Run& run) {
  if constexpr (N < 6 && Isa::widths[N] != 0) {
    if (width == Isa::widths[N]) return run(Index<Isa::widths[N]>{});
    with_width<N + 1>(width, run);
  }
}

constexpr int kAhead = 2048;  // bytes; the hardware's own prefetching stops at every page

// Fetches the weights that come `kAhead` later in the stream.
template <Format format> inline void fetch(const uint32_t* p, int units) {
  for (int line = 0; line < units * kBits<format>; ++line) Isa::prefetch(reinterpret_cast<const char*>(p) + kAhead + line * 64);
}

template <Kind kind, Format format, int T> void direct(const Weight& w, const Arranged& a, int64_t first, int64_t last, const Output& y) {
  const Isa::Table& table = Isa::table(w);
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t row = tile * kTileRows;
    alignas(64) float out[T * kTileRows] = {};
    const uint32_t* x = a.words;
    for (int64_t g = 0; g < w.groups; ++g, x += w.units * words_per_unit(kind) * T) {
      const uint32_t* const vectors[2] = {stored(w, row, g), stored(w, row + Isa::lanes, g)};
      fetch<format>(vectors[0], w.units);
      if constexpr (kTileRows > kBlock) fetch<format>(vectors[1], w.units);
      GroupSums<kind, kPairs<kind, format>, T> sums;
      add_stored<kind, format, T>(sums, vectors, x, w.units, table);
      const RowScales rows[2] = {row_scales<kind, format>(w, row, g), row_scales<kind, format>(w, row + Isa::lanes, g)};
      add_scaled(out, sums, rows, a.sums + g * T, a.steps + g * T);
    }
    store_tile(out, a.tiles[0], row, w.rows, y);
  }
}

template <Kind kind, Format format> void unpack(uint32_t* panel, const uint32_t* const (&vectors)[2], int units, const Isa::Table& table) {
  for (int unit = 0; unit < units; ++unit)
    for (int part = 0; part < kParts<format>; ++part, panel += kQuads<format> * kSteps<kind> * kTileRows)
      for (int v = 0; v < 2; ++v) {
        const uint32_t* words = vectors[v] + unit * kBits<format> * kBlock;
        const I tops = top_bits<format>(words, part);
        repeat<kQuads<format>>([&](auto q) __attribute__((always_inline)) {
          constexpr int Q = decltype(q)::value;
          const I quad = start<kind, format, Q>(part_of<format>(words, part), tops, table);
          repeat<kSteps<kind>>([&](auto s) __attribute__((always_inline)) {
            constexpr int S = decltype(s)::value;
            Isa::store(panel + ((Q * kSteps<kind> + S) * 2 + v) * Isa::lanes, step<kind, format, Q, S>(quad, table));
          });
        });
      }
}

// All tokens of one tile with an unpacked group.
template <Kind kind, bool in_pairs, int T>
void panel_tile(const uint32_t* panel, const Weight& w, const Arranged& a, const Tile& tile, int64_t g, const RowScales (&rows)[2], float* out) {
  const int64_t at = tile.offset * w.groups + g * T;
  GroupSums<kind, in_pairs, T> sums;
  add_unpacked(sums, panel, a.words + at * w.units * words_per_unit(kind), w.units);
  add_scaled(out + tile.offset * kTileRows, sums, rows, a.sums + at, a.steps + at);
}

template <Kind kind, bool in_pairs>
inline void panel_tiles(const uint32_t* panel, const Weight& w, const Arranged& a, int64_t g, const RowScales (&rows)[2], float* out) {
  for (int t = 0; t < a.tile_count; ++t) {
    const Tile& tile = a.tiles[t];
    const auto run = [&](auto width) { panel_tile<kind, in_pairs, decltype(width)::value>(panel, w, a, tile, g, rows, out); };
    with_width(tile.width, run);
  }
}

// Some row tiles at a time, so that a group's activations come from a farther cache once for all of them.
constexpr int kAtOnce = 4;
constexpr int kMaxPlaces = kMaxTokens + 16;

template <Kind kind, Format format> void panel(const Weight& w, const Arranged& a, int64_t first, int64_t last, const Output& y) {
  const Isa::Table& table = Isa::table(w);
  alignas(64) uint32_t panel[kMaxUnits * words_per_unit(kind) * kTileRows];
  alignas(64) float out[kAtOnce][kMaxPlaces * kTileRows];
  for (int64_t begin = first; begin < last; begin += kAtOnce) {
    const int count = last - begin < kAtOnce ? static_cast<int>(last - begin) : kAtOnce;
    for (int i = 0; i < count; ++i) __builtin_memset(out[i], 0, sizeof(float) * a.places * kTileRows);
    for (int64_t g = 0; g < w.groups; ++g)
      for (int i = 0; i < count; ++i) {
        const int64_t row = (begin + i) * kTileRows;
        const uint32_t* const vectors[2] = {stored(w, row, g), stored(w, row + Isa::lanes, g)};
        fetch<format>(vectors[0], w.units);
        if constexpr (kTileRows > kBlock) fetch<format>(vectors[1], w.units);
        unpack<kind, format>(panel, vectors, w.units, table);
        const RowScales rows[2] = {row_scales<kind, format>(w, row, g), row_scales<kind, format>(w, row + Isa::lanes, g)};
        panel_tiles<kind, kPairs<kind, format>>(panel, w, a, g, rows, out[i]);
      }
    for (int i = 0; i < count; ++i)
      for (int t = 0; t < a.tile_count; ++t)
        store_tile(out[i] + a.tiles[t].offset * kTileRows, a.tiles[t], (begin + i) * kTileRows, w.rows, y);
  }
}

template <Format format> void dequantize(const Weight& w, int64_t first, int64_t last, uint16_t* out, int64_t stride) {
  const Isa::Table& table = Isa::table(w);
  alignas(64) uint32_t panel[kMaxUnits * kUnit * kTileRows];
  const int inputs = w.units * kUnit;
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t row = tile * kTileRows;
    for (int64_t g = 0; g < w.groups; ++g) {
      unpack<Kind::f32, format>(panel, {stored(w, row, g), stored(w, row + Isa::lanes, g)}, w.units, table);
      for (int v = 0; v < 2; ++v) {
        const RowScales rows = row_scales<Kind::f32, format>(w, row + v * Isa::lanes, g);
        uint16_t* to = out + g * inputs * stride + (tile - first) * kTileRows + v * Isa::lanes;
        for (int k = 0; k < inputs; ++k) {
          const F code = Isa::as_float(Isa::load(panel + (2 * k + v) * Isa::lanes));
          Isa::to_bf16(to + k * stride, Isa::multiply(rows.scale, Isa::subtract(code, rows.zero)));
        }
      }
    }
  }
}

void run_dequantize(const Weight& w, int64_t first, int64_t last, uint16_t* out, int64_t stride) {
  switch (w.format) {
    case Format::bits2: return dequantize<Format::bits2>(w, first, last, out, stride);
    case Format::bits3: return dequantize<Format::bits3>(w, first, last, out, stride);
    case Format::bits4: return dequantize<Format::bits4>(w, first, last, out, stride);
    case Format::bits8: return dequantize<Format::bits8>(w, first, last, out, stride);
    case Format::book: return dequantize<Format::book>(w, first, last, out, stride);
  }
}

template <Kind kind, Format format> void direct_of_width(const Weight& w, const Arranged& a, int64_t first, int64_t last, const Output& y) {
  with_width(a.tiles[0].width, [&](auto width) { direct<kind, format, decltype(width)::value>(w, a, first, last, y); });
}

using Product = void (*)(const Weight&, const Arranged&, int64_t, int64_t, const Output&);

template <Kind kind> inline Product product(Format format, bool with_panel) {
  switch (format) {
    case Format::bits2: return with_panel ? panel<kind, Format::bits2> : direct_of_width<kind, Format::bits2>;
    case Format::bits3: return with_panel ? panel<kind, Format::bits3> : direct_of_width<kind, Format::bits3>;
    case Format::bits4: return with_panel ? panel<kind, Format::bits4> : direct_of_width<kind, Format::bits4>;
    case Format::bits8: return with_panel ? panel<kind, Format::bits8> : direct_of_width<kind, Format::bits8>;
    default: return with_panel ? panel<kind, Format::book> : direct_of_width<kind, Format::book>;
  }
}

inline Product product(Kind kind, Format format, bool with_panel) {
  if constexpr (Isa::has_bf16)
    if (kind == Kind::bf16) return product<Kind::bf16>(format, with_panel);
  return kind == Kind::i8 ? product<Kind::i8>(format, with_panel) : product<Kind::f32>(format, with_panel);
}

void run_direct(const Weight& w, Kind kind, const Arranged& a, int64_t first, int64_t last, const Output& y) {
  product(kind, w.format, false)(w, a, first, last, y);
}

void run_panel(const Weight& w, Kind kind, const Arranged& a, int64_t first, int64_t last, const Output& y) {
  product(kind, w.format, true)(w, a, first, last, y);
}

constexpr Kernels table_named(const char* name) {
  Kernels table = {name, Isa::lanes, Isa::has_bf16, {}, arrange, run_direct, run_panel, run_dequantize};
  for (int i = 0; i < 6; ++i) table.widths[i] = Isa::widths[i];
  return table;
}

}  // namespace
}  // namespace woq
