#if defined(__x86_64__)
#include "isa_avx2.h"
#include "table.h"

const woq::Kernels woq::kernels_avx2_vnni = woq::table_named("avx2_vnni");
#endif
