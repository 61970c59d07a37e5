// Host side of the prefill kernel.
#pragma once

#include <cuda_runtime.h>

#include "decode_args.h"

namespace woq {

// y for any number of tokens on sm_90a. `tokens` is the tile: 16, 32, 64 or 128. Uses a.stages and a.split of the plan.
// a.x must be 16-byte aligned and a.k a multiple of 8 (TMA's rules).
template <int BITS>
cudaError_t launch_prefill(const DecodeArgs& a, bool is_bf16, int tokens, bool early_start, cudaStream_t stream);

}  // namespace woq
