#include "pack.h"

#include <algorithm>

#include "kernels.h"

namespace woq {
namespace {

// One input of the 16 rows of a block. Rows past the end come out as 0.
using Lane = uint32_t[kBlock];

void read_dense(const Codes& c, int64_t column, int64_t row, int rows, Lane& out) {
  const int64_t bit = column * c.bits, shift = bit % 32;
  const uint32_t* words = static_cast<const uint32_t*>(c.data) + bit / 32 * c.rows + row;
  const uint32_t mask = (1u << c.bits) - 1;
  if (rows == kBlock)  // a constant count, which compilers turn into vectors
    for (int r = 0; r < kBlock; ++r) out[r] = words[r] >> shift & mask;
  else
    for (int r = 0; r < rows; ++r) out[r] = words[r] >> shift & mask;
  if (shift + c.bits > 32)  // the code's high bits open the next word
    for (int r = 0; r < rows; ++r) out[r] |= words[c.rows + r] << (32 - shift) & mask;
}

void read_bytes(const Codes& c, int64_t column, int64_t row, int rows, Lane& out) {
  const uint8_t* codes = static_cast<const uint8_t*>(c.data) + row * c.columns + column;
  for (int r = 0; r < rows; ++r) out[r] = codes[r * c.columns];
}

// Puts input `i` of a unit into its place.
void put(uint32_t* unit, int bits, int i, const Lane& codes) {
  const int quad = i / 4, byte = i % 4 * 8;
  const auto into = [&](int word, int shift, uint32_t mask, int from) {
    uint32_t* to = unit + word * kBlock;
    for (int r = 0; r < kBlock; ++r) to[r] |= (codes[r] >> from & mask) << shift;
  };
  switch (bits) {
    case 8: return into(quad, byte, 255, 0);
    case 4: return into(quad / 2, byte + 4 * (quad % 2), 15, 0);
    case 2: return into(quad / 4, byte + 2 * (quad % 4), 3, 0);
    default: into(quad / 4, byte + 2 * (quad % 4), 3, 0), into(2, byte + quad, 1, 2);
  }
}

}  // namespace

void pack_blocks(const Codes& c, uint32_t* words, int stored_bits, int64_t units, int64_t first, int64_t last) {
  const int64_t unit_words = int64_t(stored_bits) * kBlock;
  for (int64_t block = first; block < last; ++block) {
    const int64_t row = block * kBlock;
    const int rows = static_cast<int>(std::clamp<int64_t>(c.rows - row, 0, kBlock));
    for (int64_t u = 0; u < units; ++u) {
      uint32_t* unit = words + (block * units + u) * unit_words;
      std::fill(unit, unit + unit_words, 0u);
      for (int i = 0; i < kUnit; ++i) {
        const int64_t place = u * kUnit + i, column = c.order ? c.order[place] : place;
        if (column < 0 || column >= c.columns) continue;
        Lane codes = {};
        c.bits ? read_dense(c, column, row, rows, codes) : read_bytes(c, column, row, rows, codes);
        put(unit, stored_bits, i, codes);
      }
    }
  }
}

}  // namespace woq
