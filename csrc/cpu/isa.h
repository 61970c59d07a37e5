// Which of the compiled kernels this processor runs.
#pragma once
#include "kernels.h"

namespace woq {

constexpr int kLevels = 6;

// The kernels of a level, or null where this binary or this processor has none: 0 portable, 1 AVX2, 2 AVX2 with VNNI,
// 3 AVX-512, 4 AVX-512 with VNNI, 5 AVX-512 with VNNI and BF16.
const Kernels* level(int number);

// Whether the processor has AMX tiles for bf16: then torch's matrix product is the fastest there is for many tokens.
bool has_amx_bf16();

}  // namespace woq
