// Host side of the decode kernel, as the op registration sees it.
#pragma once

#include <cuda_runtime.h>

#include "decode_args.h"

namespace woq {

// One launch on `stream`; `bits` 2, 3, 4 or 8; a.m at most kDecodeTokens; the plan's shared memory must fit.
template <int BITS>
cudaError_t launch_decode(const DecodeArgs& a, bool is_bf16, int row_blocks, bool hopper, bool early_start, cudaStream_t stream);

}  // namespace woq
