#if defined(__x86_64__)
#include "isa_avx512.h"
#include "table.h"

const woq::Kernels woq::kernels_avx512 = woq::table_named("avx512");
#endif
