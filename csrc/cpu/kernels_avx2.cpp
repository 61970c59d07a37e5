#if defined(__x86_64__)
#include "isa_avx2.h"
#include "table.h"

const woq::Kernels woq::kernels_avx2 = woq::table_named("avx2");
#endif
