#include "prefill_launch.cuh"

template cudaError_t woq::launch_prefill<8>(const DecodeArgs&, bool, int, bool, cudaStream_t);
