#include "isa_portable.h"
#include "table.h"

const woq::Kernels woq::kernels_portable = woq::table_named("portable");
