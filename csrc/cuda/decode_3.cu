#include "decode_launch.cuh"

template cudaError_t woq::launch_decode<3>(const DecodeArgs&, bool, int, bool, bool, cudaStream_t);
