// From a checkpoint's codes to the kernels' layout (kernels.h): once a layer.
#pragma once
#include <cstdint>

namespace woq {

// Codes as they stand in a checkpoint: dense words [ceil(columns / 32) * bits, rows] where `bits` is set, code i of a
// column in bits i * bits of its words; else bytes [rows, columns].
struct Codes {
  const void* data;
  int bits;
  int64_t rows, columns;
  const int32_t* order;  // which column comes where, -1 for padding; null: as they are, then padding
};

// Blocks first .. last of 16 rows each, `units` units of 32 inputs; stored with 2, 3, 4 or 8 bits.
void pack_blocks(const Codes& codes, uint32_t* words, int stored_bits, int64_t units, int64_t first, int64_t last);

}  // namespace woq
