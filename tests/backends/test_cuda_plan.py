"""The CUDA dispatch (csrc/cuda/plan.h) on the host: for any size it picks a launch that the kernels accept and that fits."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "csrc/cuda"
PROGRAM = r"""
#include <cstdio>
#include "plan.h"
using namespace woq;
bool power_of_two(int v) { return v > 0 && (v & (v - 1)) == 0; }
int main() {
  const Device devices[] = {{132, 232448, 90}, {108, 166912, 80}, {84, 101376, 86}, {128, 101376, 89}};
  long cases = 0, bad = 0, unfit = 0;
  for (const Device& device : devices)
    for (int bits : {2, 3, 4, 8})
      for (int stride : {128, 192})
        for (int n : {1, 64, 65, 200, 4096, 6144, 11008, 28672, 152064})
          for (int k : {1, 64, 72, 128, 1000, 4096, 11008, 14336, 53248})
            for (int group : {32, 96, 128, (k + 31) / 32 * 32})
              for (int m : {1, 2, 3, 5, 8, 9, 16, 17, 32, 33, 100, 256, 1000, 8192}) {
                PrefillArgs a = {};
                a.m = m, a.n = n, a.k = k;
                a.row_groups = (n + 63) / 64, a.k_blocks = (k + 63) / 64, a.groups = (k + group - 1) / group;
                a.group_units = group / 32, a.scale_stride = stride;
                ++cases;
                const Path path = choose_path(a, bits, device);
                if (path == Path::prefill) {
                  const PrefillPlan p = choose_prefill(a, bits, device).plan;
                  PrefillArgs cut = a;
                  const int64_t blocks = divide(p, device.processors, cut), turns = PrefillPlan::turns(p.tokens, a.k_blocks), rest = cut.tiles - cut.whole;
                  // Where tiles are shared out, whole ones come in full waves, and every thread block then has a turn of what is left, or nobody.
                  const bool shared_out = p.split != 1 ? rest == 0 && p.split <= turns
                                                      : rest >= 0 && cut.whole % blocks == 0 && (rest == 0 || rest * turns >= blocks);
                  const bool fine = p.tokens >= 8 && p.tokens <= 256 && p.split >= 0 && p.split <= 8 && p.stages >= 2 && p.stages <= kMostStages &&
                                    p.shared_bytes(bits) <= device.shared_limit / p.residents() && blocks >= 1 && shared_out;
                  if (!fine) { ++bad; std::printf("prefill: bits %d n %d k %d m %d: %d %d %d %d\n", bits, n, k, m, p.tokens, p.groups, p.stages, p.split); }
                }
                if (path != Path::decode) continue;
                a.m = m < kDecodeTokens ? m : kDecodeTokens;
                static const int column = 0;
                for (const int* order : {(const int*)nullptr, &column}) {
                  if (order != nullptr && !reorders(a, order, bits, device)) continue;
                  a.order = order;
                  DecodePlan p = choose_decode(a, bits, device);
                  while (p.k_warps == 0 && a.m > 1) a.m /= 2, p = choose_decode(a, bits, device);
                  if (p.k_warps == 0) { ++unfit; continue; }
                  apply(p, a);
                  // With zero points no more waves of thread blocks than without, or as few stages as there can be, or K cut further.
                  DecodeArgs symmetric = a;
                  symmetric.scale_stride = 128;
                  const DecodePlan plain = choose_decode(symmetric, bits, device);
                  apply(plain, symmetric);
                  const auto waves = [&](const DecodeArgs& v, const DecodePlan& q) {
                    const int residents = std::min((device.shared_limit + 1024) / (DecodeLayout::of(bits, v).total + 1024), 16 / (v.k_warps * v.row_warps));
                    return (q.row_blocks * q.split + residents * device.processors - 1) / (residents * device.processors);
                  };
                  const bool shared = p.stages == 2 || p.split > plain.split || waves(a, p) <= waves(symmetric, plain);
                  const bool fine = shared && DecodeLayout::of(bits, a).total <= device.shared_limit && p.k_warps * p.row_warps <= kMaxWarps &&
                                    power_of_two(p.row_warps) && power_of_two(p.split) && p.split <= 8 && 64 * p.row_warps / p.split >= 4 &&
                                    p.stages >= 2 && p.stages <= 10 && p.row_blocks >= 1 && (device.capability >= 90 || p.split == 1) &&
                                    p.row_blocks * p.row_warps < a.row_groups + p.row_warps && p.split <= a.k_blocks;
                  if (!fine) { ++bad; std::printf("bits %d n %d k %d group %d m %d on %d%s\n", bits, n, k, group, m, device.capability, order ? " in order" : ""); }
                }
              }
  std::printf("%ld cases, %ld bad, %ld do not fit\n", cases, bad, unfit);
  return bad != 0 || unfit != 0;
}
"""


def test_every_size_gets_a_launch_that_fits(tmp_path: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    (tmp_path / "main.cpp").write_text(PROGRAM)
    binary = tmp_path / "main"
    built = subprocess.run(
        [compiler, "-std=c++17", "-O1", f"-I{SOURCE}", str(tmp_path / "main.cpp"), "-o", str(binary)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(binary)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout[-2000:]
