#include "prefill_launch.cuh"

template cudaError_t woq::launch_prefill<3>(const DecodeArgs&, bool, int, bool, cudaStream_t);
