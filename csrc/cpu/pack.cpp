#include "pack.h"

#include <algorithm>

#include "kernels.h"

// The loops below run over the 16 rows of a block; which vectors that takes is known when the library is loaded.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__SANITIZE_ADDRESS__)
#define WOQ_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define WOQ_CLONES
#endif
#define WOQ_INLINE __attribute__((always_inline)) inline

namespace woq {
namespace {

// One input of the 16 rows of a block. Rows past the end come out as 0.
using Lane = uint32_t[kBlock];

WOQ_INLINE void read_dense(const Codes& c, int64_t column, int64_t row, int rows, Lane& out) {
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

WOQ_INLINE void read_bytes(const Codes& c, int64_t column, int64_t row, int rows, Lane& out) {
  const uint8_t* codes = static_cast<const uint8_t*>(c.data) + row * c.columns + column;
  for (int r = 0; r < rows; ++r) out[r] = codes[r * c.columns];
}

WOQ_INLINE void add(uint32_t* to, const Lane& codes, int from, uint32_t mask, int shift) {
  for (int r = 0; r < kBlock; ++r) to[r] |= (codes[r] >> from & mask) << shift;
}

// Puts input `i` of a unit into its place.
WOQ_INLINE void put(uint32_t* unit, int bits, int i, const Lane& codes) {
  const int quad = i / 4, byte = i % 4 * 8;
  switch (bits) {
    case 8: return add(unit + quad * kBlock, codes, 0, 255, byte);
    case 4: return add(unit + quad / 2 * kBlock, codes, 0, 15, byte + 4 * (quad % 2));
    case 2: return add(unit + quad / 4 * kBlock, codes, 0, 3, byte + 2 * (quad % 4));
    default:
      add(unit + quad / 4 * kBlock, codes, 0, 3, byte + 2 * (quad % 4));
      add(unit + 2 * kBlock, codes, 2, 1, byte + quad);
  }
}

}  // namespace

WOQ_CLONES void pack_blocks(const Codes& c, uint32_t* words, int stored_bits, int64_t units, int64_t first, int64_t last) {
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
