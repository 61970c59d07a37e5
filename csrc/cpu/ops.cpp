// torch.ops.woq.cpu_linear, cpu_pack and cpu_level, registered through PyTorch's stable ABI: one binary serves every torch
// from 2.11 on and every Python. Shapes are checked in Python (woq/backends/cpu.py), where an error can name the layer; what
// is checked here is what would otherwise read out of bounds. Threads are torch's own.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <vector>

#include "isa.h"
#include "pack.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using woq::Dtype;
using woq::Format;
using woq::Kind;

constexpr int64_t kGrain = 1 << 18;         // multiplications below which another thread costs more than it brings
constexpr int64_t kArrangeGrain = 1 << 12;  // activations likewise

constexpr int64_t kCacheBytes = 1 << 20;  // of a thread, for a panel of dequantized weights
constexpr int64_t kMatmulFrom = 32;       // tokens from which dequantizing and AMX are faster, where there is AMX

Dtype dtype_of(const Tensor& t, const char* what) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::BFloat16: return Dtype::bf16;
    default: STD_TORCH_CHECK(false, "woq: ", what, " must be float32, float16 or bfloat16"); return Dtype::f32;
  }
}

const woq::Kernels& kernels(int64_t wanted) {
  static const int best = [] {
    int number = woq::kLevels - 1;
    while (number > 0 && woq::level(number) == nullptr) --number;
    return number;
  }();
  const woq::Kernels* found = woq::level(wanted < 0 ? best : static_cast<int>(wanted));
  STD_TORCH_CHECK(found != nullptr, "woq: this processor has no kernels of level ", wanted);
  return *found;
}

uint16_t to_bf16(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// A codebook's values, or 0, 1, 2 ..: from 2 bits on every entry stands where its low bits say.
void fill_tables(woq::Weight& w, const std::optional<Tensor>& table) {
  w.book_scale = 0;
  for (int i = 0; i < 16; ++i) {
    w.table[i] = table ? static_cast<const float*>(table->data_ptr())[i] : static_cast<float>(i & ((1 << std::min(w.bits, 4)) - 1));
    w.book_scale = std::max(w.book_scale, std::fabs(w.table[i]));
  }
  for (int i = 0; i < 32; ++i) w.table_bf16[i] = to_bf16(w.table[i % 16]);
  for (int i = 0; i < 16; ++i) w.table_i8[i] = table ? static_cast<int8_t>(std::lrint(w.table[i] / w.book_scale * 127)) : 0;
}

woq::Weight describe(const Tensor& weight, const Tensor& scales, const std::optional<Tensor>& zeros, const std::optional<Tensor>& table, int64_t rows,
                     int64_t bits, double zero) {
  STD_TORCH_CHECK(bits == 2 || bits == 3 || bits == 4 || bits == 8, "woq: bits must be 2, 3, 4 or 8, got ", bits);
  STD_TORCH_CHECK(weight.dim() == 4 && weight.is_contiguous() && weight.scalar_type() == ScalarType::Int && weight.size(3) == bits * woq::kBlock,
                  "woq: weight must be int32 [blocks, groups, units, 16 * bits]");
  STD_TORCH_CHECK(weight.size(0) % 2 == 0 && rows <= weight.size(0) * woq::kBlock && rows > 0, "woq: weight does not hold ", rows, " rows");
  STD_TORCH_CHECK(weight.size(2) >= 1 && weight.size(2) <= woq::kMaxUnits, "woq: a group has at most ", woq::kMaxUnits, " units");
  const auto by_row = [&](const Tensor& t) {
    return t.is_contiguous() && t.dim() == 3 && t.size(0) == weight.size(0) && t.size(1) == weight.size(1) && t.size(2) == woq::kBlock;
  };
  STD_TORCH_CHECK(by_row(scales), "woq: scales must be [blocks, groups, 16]");
  STD_TORCH_CHECK(!zeros || (by_row(*zeros) && (zeros->scalar_type() == ScalarType::Byte || zeros->scalar_type() == ScalarType::Float)),
                  "woq: zeros must be uint8 or float32 [blocks, groups, 16]");
  STD_TORCH_CHECK(!table || (bits == 4 && table->is_contiguous() && table->numel() == 16 && table->scalar_type() == ScalarType::Float),
                  "woq: a table must hold 16 float32 values of 4-bit codes");
  woq::Weight w = {};
  w.words = static_cast<const uint32_t*>(weight.data_ptr());
  w.scales = scales.data_ptr(), w.scale_dtype = dtype_of(scales, "scales");
  w.zeros = zeros ? zeros->data_ptr() : nullptr, w.zeros_are_bytes = zeros && zeros->scalar_type() == ScalarType::Byte;
  w.zero = static_cast<float>(zero);
  w.format = table ? Format::book : bits == 2 ? Format::bits2 : bits == 3 ? Format::bits3 : bits == 4 ? Format::bits4 : Format::bits8;
  w.bits = static_cast<int>(bits), w.rows = rows, w.groups = weight.size(1), w.units = static_cast<int>(weight.size(2));
  fill_tables(w, table);
  return w;
}

// Tokens first .. last in as few tiles as there can be, of nearly the same size; the last ones are narrower where they may be.
std::vector<woq::Tile> divide(const woq::Kernels& k, int64_t first, int64_t last) {
  const int widest = *std::max_element(k.widths, k.widths + 6);
  std::vector<woq::Tile> tiles;
  int64_t number = (last - first + widest - 1) / widest;
  for (int offset = 0; first < last; --number) {
    const int64_t left = last - first, even = (left + number - 1) / number;
    const int width = *std::find_if(k.widths, k.widths + 6, [even](int w) { return w >= even; });
    const int count = static_cast<int>(std::min<int64_t>(width, left));
    tiles.push_back({static_cast<int>(first), count, width, offset});
    offset += width, first += count;
  }
  return tiles;
}

// Shaped like x, but for the last dimension.
Tensor shaped_like(const Tensor& x, int64_t last) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = last;
  return torch::stable::new_empty(x, shape);
}

// Up to so many tiles the weight is unpacked for each anew, in registers: that takes less than the way through a buffer.
// Measured; where vectors are short, three bits take too many instructions for it.
size_t direct_tiles(const woq::Kernels& k, const woq::Weight& w, Kind kind) {
  if (k.lanes >= 16) return 4;
  return kind == Kind::i8 && w.format == woq::Format::bits3 ? 1 : 2;
}

// Tokens first .. last: arranged, then multiplied with all rows.
void run(const woq::Kernels& k, const woq::Weight& w, Kind kind, const woq::Input& in, const woq::Output& y, int64_t first, int64_t last) {
  const std::vector<woq::Tile> tiles = divide(k, first, last);
  const int places = tiles.back().offset + tiles.back().width;
  const int64_t inputs = w.groups * w.units * woq::kUnit;
  // Not a tensor: making one takes longer than a small layer's product.
  const int64_t words = places * w.groups * w.units * woq::words_per_unit(kind), sums = places * w.groups;
  const std::unique_ptr<uint32_t[]> scratch(new uint32_t[words + 2 * sums]);
  float* floats = reinterpret_cast<float*>(scratch.get() + words);
  const woq::Arranged a = {scratch.get(), floats, floats + sums, tiles.data(), static_cast<int>(tiles.size()), places};
  const int64_t groups = a.tile_count * w.groups;
  torch::stable::parallel_for(0, groups, kArrangeGrain * groups / (places * inputs) + 1,
                              [&](int64_t begin, int64_t end) { k.arrange(w, in, kind, a, begin, end); });
  const int64_t tile_rows = 2 * k.lanes, row_tiles = (w.rows + tile_rows - 1) / tile_rows;
  const int64_t grain = kGrain / (inputs * tile_rows * places) + 1;
  const bool direct = tiles.size() <= direct_tiles(k, w, kind);
  torch::stable::parallel_for(0, row_tiles, grain, [&](int64_t begin, int64_t end) {
    if (!direct) return k.panel(w, kind, a, begin, end, y);
    for (int64_t row_tile = begin; row_tile < end; ++row_tile)
      for (const woq::Tile& tile : tiles) {
        const int64_t at = tile.offset * w.groups;
        const woq::Arranged one = {a.words + at * w.units * woq::words_per_unit(kind), a.sums + at, a.steps + at, &tile, 1, tile.width};
        k.direct(w, kind, one, row_tile, row_tile + 1, y);
      }
  });
}

// x with its columns in the weight's order, 0 in the padding.
Tensor in_order(const Tensor& x, const woq::Input& in, int64_t inputs) {
  if (in.order == nullptr && in.columns == inputs) return x;
  Tensor ordered = shaped_like(x, inputs);
  const uint16_t* from = static_cast<const uint16_t*>(in.x);
  uint16_t* to = static_cast<uint16_t*>(ordered.data_ptr());
  torch::stable::parallel_for(0, x.numel() / in.columns, kGrain / inputs + 1, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token)
      for (int64_t i = 0; i < inputs; ++i) {
        const int64_t column = in.order ? in.order[i] : i;
        to[token * inputs + i] = column < 0 || column >= in.columns ? 0 : from[token * in.columns + column];
      }
  });
  return ordered;
}

// Many bf16 tokens: some rows of the weight at a time become bf16, as many as the caches hold, and torch multiplies them.
Tensor through_matmul(const woq::Kernels& k, const woq::Weight& w, const Tensor& x, const woq::Input& in) {
  const int64_t inputs = w.groups * w.units * woq::kUnit, tile_rows = 2 * k.lanes;
  const Tensor ordered = in_order(x, in, inputs);
  const int64_t tiles = (w.rows + tile_rows - 1) / tile_rows;
  const int64_t fit = kCacheBytes * torch::stable::get_num_threads() / (inputs * tile_rows * 2) + 1, at_once = std::min(tiles, fit);
  Tensor y = shaped_like(x, w.rows);
  Tensor panel = torch::stable::new_empty(x, {inputs, at_once * tile_rows});
  uint16_t* out = static_cast<uint16_t*>(panel.data_ptr());
  for (int64_t first = 0; first < tiles; first += at_once) {
    const int64_t count = std::min(at_once, tiles - first), rows = std::min(count * tile_rows, w.rows - first * tile_rows);
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      k.dequantize(w, first + begin, first + end, out + begin * tile_rows, at_once * tile_rows);
    });
    Tensor part = torch::stable::narrow(panel, 1, 0, rows), to = torch::stable::narrow(y, y.dim() - 1, first * tile_rows, rows);
    torch::stable::copy_(to, torch::stable::matmul(ordered, part));
  }
  return y;
}

// x [..., columns] -> [..., out_features]
Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& scales, std::optional<Tensor> zeros, std::optional<Tensor> table,
              std::optional<Tensor> order, int64_t out_features, int64_t bits, double zero, bool int8, int64_t level, int64_t matmul_from) {
  STD_TORCH_CHECK(x.dim() > 0 && x.is_contiguous() && x.is_cpu(), "woq: x must be contiguous, on the CPU, and no scalar");
  const int64_t columns = x.size(x.dim() - 1), tokens = x.numel() / std::max<int64_t>(columns, 1);
  const woq::Kernels& k = kernels(level);
  const woq::Weight w = describe(weight, scales, zeros, table, out_features, bits, zero);
  const int64_t inputs = w.groups * w.units * woq::kUnit;
  STD_TORCH_CHECK(!order || (order->is_contiguous() && order->numel() == inputs && order->scalar_type() == ScalarType::Int),
                  "woq: order must be int32 [", inputs, "]");
  STD_TORCH_CHECK(columns > 0 && (order || columns <= inputs), "woq: x has ", columns, " columns, the weight ", inputs);
  const woq::Input in = {x.data_ptr(), dtype_of(x, "x"), columns, order ? static_cast<const int32_t*>(order->data_ptr()) : nullptr};
  const Kind kind = int8 ? Kind::i8 : k.has_bf16 && in.dtype == Dtype::bf16 ? Kind::bf16 : Kind::f32;
  const int64_t many = matmul_from >= 0 ? matmul_from : woq::has_amx_bf16() && level < 0 ? kMatmulFrom : INT64_MAX;
  if (in.dtype == Dtype::bf16 && tokens >= std::max<int64_t>(many, 1)) return through_matmul(k, w, x, in);
  Tensor y = shaped_like(x, out_features);
  const woq::Output out = {y.data_ptr(), in.dtype};
  for (int64_t first = 0; first < tokens; first += woq::kMaxTokens)
    run(k, w, kind, in, out, first, std::min<int64_t>(first + woq::kMaxTokens, tokens));
  return y;
}

// codes: int32 [words, rows], dense with `bits` bits, or uint8 [rows, columns].
Tensor pack(const Tensor& codes, std::optional<Tensor> order, int64_t rows, int64_t columns, int64_t bits, int64_t stored_bits, int64_t groups, int64_t units) {
  const bool dense = codes.scalar_type() == ScalarType::Int;
  STD_TORCH_CHECK(codes.dim() == 2 && codes.is_contiguous() && codes.is_cpu(), "woq: codes must be a contiguous matrix on the CPU");
  STD_TORCH_CHECK(bits >= 1 && bits <= 8 && (stored_bits == 2 || stored_bits == 3 || stored_bits == 4 || stored_bits == 8) && bits <= stored_bits,
                  "woq: ", bits, " bits cannot be stored in ", stored_bits);
  STD_TORCH_CHECK(dense ? codes.size(1) == rows && codes.size(0) == (columns + 31) / 32 * bits
                        : codes.scalar_type() == ScalarType::Byte && codes.size(0) == rows && codes.size(1) == columns,
                  "woq: codes do not hold ", rows, " x ", columns, " of ", bits, " bits");
  const int64_t inputs = groups * units * woq::kUnit;
  STD_TORCH_CHECK(!order || (order->is_contiguous() && order->numel() == inputs && order->scalar_type() == ScalarType::Int),
                  "woq: order must be int32 [", inputs, "]");
  const int64_t blocks = (rows + 2 * woq::kBlock - 1) / (2 * woq::kBlock) * 2;
  Tensor words = torch::stable::new_empty(codes, {blocks, groups, units, woq::kBlock * stored_bits}, ScalarType::Int);
  const woq::Codes from = {codes.data_ptr(), dense ? static_cast<int>(bits) : 0, rows, columns,
                           order ? static_cast<const int32_t*>(order->data_ptr()) : nullptr};
  uint32_t* to = static_cast<uint32_t*>(words.data_ptr());
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    woq::pack_blocks(from, to, static_cast<int>(stored_bits), groups * units, begin, end);
  });
  return words;
}

// Whether this processor has kernels of level `number`: isa.h.
bool has_level(int64_t number) { return woq::level(static_cast<int>(number)) != nullptr; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(woq, m) {
  m.def("cpu_linear(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor? table, Tensor? order, int out_features, int bits, "
        "float zero, bool int8, int level, int matmul_from) -> Tensor");
  m.def("cpu_pack(Tensor codes, Tensor? order, int rows, int columns, int bits, int stored_bits, int groups, int units) -> Tensor");
  m.def("cpu_has_level(int number) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(woq, CPU, m) {
  m.impl("cpu_linear", TORCH_BOX(&linear));
  m.impl("cpu_pack", TORCH_BOX(&pack));
}

STABLE_TORCH_LIBRARY_IMPL(woq, CompositeExplicitAutograd, m) { m.impl("cpu_has_level", TORCH_BOX(&has_level)); }
