// Host side of the prefill kernel.
#pragma once

#include <cuda_runtime.h>

#include "prefill_args.h"

namespace woq {

// y for any number of tokens on sm_90a; `a` as divide() left it. a.x must be 16-byte aligned and a.k a multiple of 8 (TMA's rules).
template <int BITS>
cudaError_t launch_prefill(const PrefillArgs& a, bool is_bf16, const PrefillPlan& plan, int blocks, bool early_start, cudaStream_t stream);

}  // namespace woq
