#include "prefill_launch.cuh"

template cudaError_t woq::launch_prefill<4>(const DecodeArgs&, bool, int, bool, cudaStream_t);
