#include "isa.h"

namespace woq {

#if defined(__x86_64__)
namespace {

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}

}  // namespace

const Kernels* level(int number) {
  switch (number) {
    case 0: return &kernels_portable;
    case 1: return has_avx2() ? &kernels_avx2 : nullptr;
    case 2: return has_avx2() && __builtin_cpu_supports("avxvnni") ? &kernels_avx2_vnni : nullptr;
    case 3: return has_avx512() ? &kernels_avx512 : nullptr;
    case 4: return has_avx512() && __builtin_cpu_supports("avx512vnni") ? &kernels_avx512_vnni : nullptr;
    case 5:
      return has_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") ? &kernels_avx512_bf16
                                                                                                          : nullptr;
    default: return nullptr;
  }
}

bool has_amx_bf16() { return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16"); }
#else
bool has_amx_bf16() { return false; }

const Kernels* level(int number) { return number == 0 ? &kernels_portable : nullptr; }
#endif

}  // namespace woq
