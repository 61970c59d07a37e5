// What the compiled kernels take and give; no torch here, and nothing with code, so that a file compiled for one
// instruction set can never lend a function to another (ops.cpp picks the table of functions at run time).
//
// A weight [N, K] is stored in blocks of 16 rows and units of 32 inputs. A unit of a block is `bits` times 16 words of 32
// bits: lane r of a word belongs to row r of the block, and its bytes to the inputs of a *quad*, four neighbours. So one
// vector load, a shift and a mask give four inputs of 8 or 16 rows: what an int8 dot product wants as it is, and what a
// table or a conversion widens. Quad q, input b of the quad (input 4 q + b of the unit) stands in
//   8 bits: word q,     bits 8 b ..
//   4 bits: word q / 2, bits 8 b + 4 (q % 2) ..
//   2 bits: word q / 4, bits 8 b + 2 (q % 4) ..
//   3 bits: two words as for 2 bits with the lower two bits; the top bit in word 2, bit 8 b + q
// Every group is padded to whole units, with activations of zero.
#pragma once
#include <cstdint>

namespace woq {

enum class Kind { f32, bf16, i8 };                 // what a word of arranged activations holds: 1 float, 2 bf16, 4 int8
enum class Format { bits2, bits3, bits4, bits8, book };  // book: 4-bit codes that stand for the values of a table
enum class Dtype { f32, bf16, f16 };

constexpr int kBlock = 16;      // rows
constexpr int kUnit = 32;       // inputs
constexpr int kMaxUnits = 4;    // of a group
constexpr int kMaxTokens = 128; // that one call arranges and multiplies at a time

constexpr int words_per_unit(Kind kind) { return kind == Kind::f32 ? 32 : kind == Kind::bf16 ? 16 : 8; }

struct Weight {
  const uint32_t* words;  // [blocks, groups, units, bits, 16]
  const void* scales;     // [blocks, groups, 16] of scale_dtype
  const void* zeros;      // the same shape, uint8 or float; null: `zero` everywhere
  Dtype scale_dtype;
  bool zeros_are_bytes;
  float zero;
  Format format;
  int bits;       // of storage
  int64_t rows;   // N
  int64_t groups; // along K
  int units;      // of a group
  float table[16];         // the value of every code, of those with 2 or 3 bits repeatedly
  uint16_t table_bf16[32]; // twice the same
  int8_t table_i8[16];     // of a codebook only: times 127 / book_scale, rounded
  float book_scale;        // the largest magnitude in the table
};

struct Input {
  const void* x;  // [tokens, columns]
  Dtype dtype;
  int64_t columns;
  const int32_t* order;  // [groups * units * 32]: which column comes where, -1 for padding; null: as they are, then padding
};

// A few tokens that are multiplied together: `width` places, of which the first `count` are in use.
struct Tile {
  int first, count, width, offset;  // offset: of the first place among all places
};

// Activations in the order in which the kernels meet them; places of a tile are neighbours.
struct Arranged {
  uint32_t* words;  // of a tile, from offset * groups * units * words_per_unit: [groups * units * words_per_unit, width]
  float* sums;      // of a tile, from offset * groups: [groups, width], the sum over each group, in steps for int8
  float* steps;     // the same shape: what one step of an int8 activation is worth
  const Tile* tiles;
  int tile_count;
  int places;
};

struct Output {
  void* y;  // [tokens, rows]
  Dtype dtype;
};

struct Kernels {
  const char* name;
  int lanes;  // rows in a vector; a row tile is two vectors
  bool has_bf16;
  int widths[6];  // of token tiles, ascending, then zeros
  // Groups first .. last of the activations, counted over all tiles.
  void (*arrange)(const Weight&, const Input&, Kind, const Arranged&, int64_t first, int64_t last);
  // Rows tiles first .. last. `direct` unpacks the weight as it multiplies, for the tokens of the first tile; `panel` unpacks a
  // group into a buffer first and runs all tiles over it.
  void (*direct)(const Weight&, Kind, const Arranged&, int64_t first, int64_t last, const Output&);
  void (*panel)(const Weight&, Kind, const Arranged&, int64_t first, int64_t last, const Output&);
  // Row tiles first .. last as bf16, inputs in the weight's order: out[input * stride + row - first row].
  void (*dequantize)(const Weight&, int64_t first, int64_t last, uint16_t* out, int64_t stride);
};

extern const Kernels kernels_portable;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx2_vnni, kernels_avx512, kernels_avx512_vnni, kernels_avx512_bf16;
#endif

}  // namespace woq
