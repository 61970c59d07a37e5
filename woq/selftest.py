"""`woq doctor --selftest`: every backend that runs here, over everything it claims, against float64.

Loading a model checks the layers it has (`woq.selfcheck`); this checks what no model at hand may have, so that the owner
of a device can tell in one command whether its kernels are right, and post the answer.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from woq.backends import BACKENDS, load, why_not
from woq.backends.base import Target
from woq.device import available_devices
from woq.doctor import DTYPES, diagnose
from woq.scales import DoubleQuant, encode
from woq.weights import CODEBOOKS, GPTQ_V1, GPTQ_V2, QuantizedWeight, WeightSpec

IN_FEATURES, OUT_FEATURES = 512, 80
GROUPS = (32, 128, IN_FEATURES)
TOKENS = (1, 3, 17)  # decode; and prefill that fills no tile
# A few roundings of the dtype; float32 is held to what tf32 gives.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Row:
    """One product. error: ||result - exact|| / ||exact||; infinite where the kernel raised, and `raised` says what."""

    backend: str
    device: str
    dtype: str
    data_type: str
    bits: int
    group_size: int
    sym: bool
    desc_act: bool
    scale_dtype: str
    double_quant: bool
    tokens: int
    error: float
    tolerance: float
    milliseconds: float
    raised: str = ""

    @property
    def passed(self) -> bool:
        """Whether rounding explains the error; not a number is no pass."""
        return self.error <= self.tolerance


def grid() -> list[WeightSpec]:
    """Every width, group, symmetry and order, scales in float16 and in bfloat16; every other data type; scales as codes."""
    choices = itertools.product(
        range(2, 9), GROUPS, (True, False), (False, True), (torch.float16, torch.bfloat16)
    )
    whole = [
        WeightSpec(
            IN_FEATURES, OUT_FEATURES, bits, group, sym, desc_act, scale_dtype, GPTQ_V1 if sym else GPTQ_V2
        )
        for bits, group, sym, desc_act, scale_dtype in choices
        if not (desc_act and group == IN_FEATURES)  # one group has no order
    ]
    plain = [s for s in whole if not s.desc_act and s.scale_dtype == torch.float16]
    floats = [replace(s, data_type="int_float_zeros") for s in plain if not s.sym]
    of_4_bits = [s for s in plain if s.bits == 4]
    books = [replace(s, data_type=name) for s in of_4_bits if s.sym for name in CODEBOOKS]
    coded = [replace(s, double_quant=DoubleQuant()) for s in (*of_4_bits, *books)]
    return whole + floats + books + coded


def targets() -> list[Target]:
    """Every device here, in every dtype a model may run in."""
    return [Target(torch.device(device), dtype) for device in available_devices() for dtype in DTYPES]


def run_selftest(where: Iterable[Target] | None = None) -> list[Row]:
    """Run every backend, those that must be asked for by name too, on every spec that it does not refuse."""
    rows = []
    for target in targets() if where is None else where:
        for spec in grid():
            names = [entry.name for entry in BACKENDS if why_not(entry.name, spec, target) is None]
            if names:
                weight = sample(spec)
                rows += [row for name in names for row in _run(name, weight, target)]
    return rows


def sample(spec: WeightSpec) -> QuantizedWeight:
    """A fixed random weight in which every mistake shows.

    Zero points lie near the middle and differ between neighbours: with activations of one sign, a zero point off by
    one or in the wrong place moves the result by a tenth or more at 8 bits too, where rounding would hide it otherwise.
    """
    g = torch.Generator().manual_seed(0)
    n, k, middle = spec.out_features, spec.in_features, 1 << (spec.bits - 1)
    spread = 0 if spec.sym else max(1, middle // 8)
    codes = torch.randint(0, 2 * middle, (n, k), generator=g)
    zeros = middle + torch.randint(-spread, spread + 1, (n, spec.groups), generator=g)
    scales = ((torch.rand(n, spec.groups, generator=g) + 0.5) / middle).to(spec.scale_dtype)
    order = torch.randperm(k, generator=g).div(spec.group_size, rounding_mode="floor").to(torch.int32)
    if spec.data_type == "int_float_zeros":
        zeros = (zeros + torch.rand(n, spec.groups, generator=g)).to(spec.scale_dtype)
    else:
        zeros = (zeros * (not spec.is_codebook)).to(torch.uint8)
    coded = None
    if spec.double_quant is not None:
        coded = encode(scales, spec.double_quant)
        scales = coded.decode(spec.double_quant, spec.scale_dtype)
    return QuantizedWeight(
        spec, codes.to(torch.uint8), scales, zeros, order if spec.desc_act else None, coded
    )


def _run(name: str, weight: QuantizedWeight, target: Target) -> list[Row]:
    """One backend on one weight, for every number of tokens."""
    spec, backend = weight.spec, load(name)
    exact_weight = weight.dequantize(torch.float64).t()
    rows, state = [], None
    for tokens in TOKENS:
        x = torch.rand(tokens, spec.in_features, generator=torch.Generator().manual_seed(tokens))
        x = x.to(target.dtype)
        raised, error, started = "", math.inf, time.perf_counter()
        try:
            state = backend.prepare(weight.pack(), target) if state is None else state
            started = time.perf_counter()
            got = backend.apply(x.to(target.device), state).cpu()  # to the CPU: waits for the device
        except RuntimeError as failure:  # what torch, oneDNN and drivers raise; the report is about it
            raised = str(failure)
        else:
            error = _distance(got, x.double() @ exact_weight)
        rows.append(
            Row(
                name,
                str(target.device),
                _short(target.dtype),
                spec.data_type,
                spec.bits,
                spec.group_size,
                spec.sym,
                spec.desc_act,
                _short(spec.scale_dtype),
                spec.double_quant is not None,
                tokens,
                error,
                TOLERANCE[target.dtype],
                (time.perf_counter() - started) * 1e3,
                raised,
            )
        )
    return rows


def _distance(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Summary:
    """All products of one backend, device, dtype, data type and width."""

    backend: str
    device: str
    dtype: str
    data_type: str
    bits: int
    cases: int
    failed: int
    worst_error: float
    tolerance: float
    milliseconds: float


def summarize(rows: Iterable[Row]) -> list[Summary]:
    """One line for each backend, device, dtype, data type and width: cases, failures, the worst error, the median time."""
    kinds: dict[tuple[str, str, str, str, int], list[Row]] = {}
    for row in rows:
        kinds.setdefault((row.backend, row.device, row.dtype, row.data_type, row.bits), []).append(row)
    return [
        Summary(
            *kind,
            cases=len(of),
            failed=sum(not row.passed for row in of),
            worst_error=max((row.error for row in of), key=lambda error: (math.isnan(error), error)),
            tolerance=of[0].tolerance,
            milliseconds=sorted(row.milliseconds for row in of)[len(of) // 2],
        )
        for kind, of in sorted(kinds.items(), key=lambda item: item[0])
    ]


def report(rows: list[Row]) -> dict[str, object]:
    """What to post, ready for JSON: versions, machine, devices, the summary, and every failure in full."""
    found = diagnose()
    return {
        "versions": found.versions,
        "machine": found.machine,
        "devices": found.devices,
        "passed": bool(rows) and all(row.passed for row in rows),
        "summary": [asdict(line) for line in summarize(rows)],
        "failures": [asdict(row) for row in rows if not row.passed],
    }
