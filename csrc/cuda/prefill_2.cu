#include "prefill_launch.cuh"

template cudaError_t woq::launch_prefill<2>(const PrefillArgs&, bool, const PrefillPlan&, int, bool, cudaStream_t);
