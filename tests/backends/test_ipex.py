"""IPEX's kernels get what their layouts ask for; and where IPEX is installed (`make test-ipex`), they run.

Its environment is another one: IPEX 2.8 wants torch 2.8. The last tests drive it from here, and skip where it is not.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, library

from tests.backends.test_cpu_torch import inputs, random_weight
from tests.backends.xpu_standin import decode_int4
from tests.tiny_models import VOCABULARY
from woq import AutoModelForCausalLM, GPTQConfig, QuantConfig, RtnConfig, quantize, save_pretrained
from woq.backends import BACKENDS, choose, load
from woq.backends.base import Target
from woq.backends.ipex import IpexBackend, arrange_xpu, cpu_arguments, missing
from woq.errors import BackendError
from woq.weights import WeightSpec

CPU, XPU = torch.device("cpu"), torch.device("xpu")
REPOSITORY = Path(__file__).resolve().parents[2]
PYTHON = REPOSITORY / ".venv-ipex/bin/python"
READY = REPOSITORY / ".venv-ipex/.ready"


@pytest.mark.parametrize("desc_act", [False, True], ids=["in order", "desc_act"])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("n", "k", "group_size"), [(16, 64, 32), (33, 128, 64), (7, 96, 96)])
def test_what_the_cpu_is_given(n: int, k: int, group_size: int, sym: bool, desc_act: bool) -> None:
    weight = random_weight(WeightSpec(k, n, 4, group_size, sym, desc_act and group_size < k))
    words, scales, zeros, bias, g_idx, batch, group, *modes = cpu_arguments(weight)
    assert (words.dtype, words.shape, words.is_contiguous()) == (torch.uint8, (n, k // 2), True)
    assert (scales.dtype, scales.shape) == (torch.float32, weight.scales.shape)
    assert (zeros is None) == sym and (g_idx is None) == (weight.g_idx is None)
    assert (bias, batch, modes) == (None, None, [0, -1, False, 0])
    assert group == (-1 if group_size == k else group_size)
    codes = np.empty((n, k), np.int64)
    codes[:, 0::2], codes[:, 1::2] = words.numpy() & 15, words.numpy() >> 4
    groups = np.arange(k) // group_size if g_idx is None else g_idx.numpy()
    zero = np.full((n, weight.spec.groups), 8) if zeros is None else zeros.numpy()
    decoded = (codes - zero[:, groups]) * scales.double().numpy()[:, groups]
    assert torch.equal(torch.from_numpy(decoded), weight.dequantize(torch.float64))


@contextmanager
def xpu_kernel() -> Iterator[None]:
    """`torch_ipex::mm_int4` on CPU tensors, strict about oneDNN's layout, as IPEX's own tests call it."""

    def mm_int4(
        x: Tensor, weight: Tensor, scale: Tensor, zp: Tensor, group: int, g_idx: Tensor | None = None
    ) -> Tensor:
        k, n = weight.shape[0] * 8, weight.shape[1]
        assert x.shape[1] == k and x.is_contiguous() and x.dtype == torch.float16 and g_idx is None
        assert weight.dtype == torch.int32 and weight.stride() == (1, k // 8)
        assert scale.dtype == torch.float16 and scale.shape == (k // group, n) and scale.stride() == (n, 1)
        assert zp.dtype == torch.int8 and zp.tolist() == [8]
        exact = decode_int4(weight.t(), group, scale, zp.expand(k // group, n))
        return (x.double() @ exact.t()).half()

    operators = library.Library("torch_ipex", "FRAGMENT")
    operators.define(
        "mm_int4(Tensor input, Tensor weight, Tensor scale, Tensor zp, int gs, Tensor? g_idx=None) -> Tensor"
    )
    operators.impl("mm_int4", mm_int4, "CPU")
    try:
        yield
    finally:
        operators._destroy()


@pytest.mark.parametrize("desc_act", [False, True], ids=["in order", "desc_act"])
@pytest.mark.parametrize(("n", "k", "group_size"), [(16, 64, 32), (33, 256, 128), (1, 64, 64)])
def test_what_the_xpu_is_given(
    n: int, k: int, group_size: int, desc_act: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines: list[str] = []

    @contextmanager
    def compute_eng(engine: str) -> Iterator[None]:
        engines.append(engine)
        yield

    monkeypatch.setattr(torch.xpu, "compute_eng", compute_eng, raising=False)
    monkeypatch.setattr(torch.xpu, "XPUComputeEng", SimpleNamespace(ONEDNN="onednn"), raising=False)
    weight = random_weight(WeightSpec(k, n, 4, group_size, True, desc_act and group_size < k))
    assert IpexBackend().why_not(weight.spec, Target(XPU, torch.float16)) == missing()
    state = arrange_xpu(weight)
    with xpu_kernel():
        for x in inputs(k):
            half = x.to(torch.float16) if x.is_contiguous() else x.half()
            got = IpexBackend().apply(half, state)
            want = half.double() @ weight.dequantize(torch.float64).t()
            assert got.shape == want.shape
            assert torch.allclose(
                got.double(), want, rtol=2e-3, atol=2e-3 * float(want.abs().amax() if want.numel() else 1)
            )
    assert set(engines) == {"onednn"}


ON_CPU, ON_XPU = Target(CPU, torch.float32), Target(XPU, torch.float16)
REFUSED = [
    (WeightSpec(64, 16, 8, 32, True), ON_CPU, "for 4 bits, not 8"),
    (WeightSpec(192, 16, 4, 96, True), ON_CPU, "power of two.*not 96"),
    (WeightSpec(80, 16, 4, 32, True), ON_CPU, "divide in_features"),
    (WeightSpec(62, 16, 4, 62, True), ON_CPU, "multiple of 4 .*not 62 and 16"),
    (WeightSpec(64, 1, 4, 32, True), ON_CPU, "not 64 and 1"),
    (WeightSpec(64, 16, 4, 32, False), ON_XPU, "asymmetric weights with zero point 8"),
    (WeightSpec(64, 16, 4, 32, True), Target(XPU, torch.bfloat16), "float16 activations"),
    (WeightSpec(64, 16, 4, 32, True, scale_dtype=torch.bfloat16), ON_XPU, "float16 activations and scales"),
    (WeightSpec(64, 16, 4, 16, True), ON_XPU, "power of two from 32"),
    (WeightSpec(96, 16, 4, 96, True), ON_XPU, "power of two from 32"),
]


@pytest.mark.parametrize(("spec", "target", "reason"), REFUSED)
def test_reasons(spec: WeightSpec, target: Target, reason: str) -> None:
    told = load("ipex").why_not(spec, target)
    assert told is not None
    assert re.search(reason, told)


def test_missing_or_of_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert "is not installed" in (missing() or "")
    monkeypatch.setattr(metadata, "version", lambda name: "1.13.100")
    assert f"1.13.100 does not run under torch {torch.__version__}" in (missing() or "")
    monkeypatch.setattr(metadata, "version", lambda name: torch.__version__)
    assert missing() is None


def test_it_is_never_chosen_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("woq.backends.ipex.missing", lambda: None)
    spec = WeightSpec(64, 16, 4, 32, True)
    assert choose(spec, ON_CPU, "ipex").name == "ipex"
    assert choose(spec, ON_CPU).name != "ipex"
    monkeypatch.setattr("woq.backends.BACKENDS", tuple(e for e in BACKENDS if e.name == "ipex"))
    with pytest.raises(BackendError):
        choose(spec, ON_CPU)


# --- in IPEX's own environment ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`run("woq", folders...)`: the file that tests/ipex_reader.py writes there."""
    if not READY.exists():
        pytest.skip("`make test-ipex` makes the environment of IPEX 2.8; it is not here")

    def call(mode: str, *folders: Path) -> Path:
        out = tmp_path_factory.mktemp("ipex") / mode
        environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        if mode == "ipex":
            environment["PYTHONPATH"] = str(REPOSITORY / ".venv-ipex/legacy")
        command = [str(PYTHON), "-W", "ignore", "-m", "tests.ipex_reader", mode, str(out), *map(str, folders)]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return out

    return call


FOLDERS: dict[str, QuantConfig] = {
    "sym": RtnConfig(group_size=32),
    "asym": RtnConfig(group_size=32, sym=False),
    "channel": RtnConfig(group_size=-1),
    "desc_act": GPTQConfig(group_size=32, desc_act=True, num_samples=4, seq_len=24),
}


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, run: Callable[..., Path]
) -> dict[str, tuple[Path, Any]]:
    """Folders of a small model with their quantized models, and token ids beside each."""
    from tests.tiny_models import TINY_ARCHITECTURES

    made = {}
    for name, config in FOLDERS.items():
        model: Any = TINY_ARCHITECTURES["llama"]()
        model.config.architectures = [type(model).__name__]  # as a model that was loaded says
        quantize(model, config, None if isinstance(config, RtnConfig) else [ids(2)])
        folder = tmp_path_factory.mktemp("folders") / name
        save_pretrained(model, folder)
        save_file({"ids": ids(1)}, folder / "ids.tensors")
        made[name] = (folder, model)
    return made


@pytest.fixture(scope="module")
def checkpoints(
    tmp_path_factory: pytest.TempPathFactory, run: Callable[..., Path]
) -> dict[str, tuple[Path, Any]]:
    """What `woq.compat.ipex.gptq` writes: IPEX's own form, in which it reads asymmetric layers right too."""
    from tests.tiny_models import TINY_ARCHITECTURES
    from woq.compat.ipex import gptq

    made = {}
    for name, how in {
        "asym": {},
        "desc_act": {"act_order": True},
        "float32": {"scale_dtype": torch.float32},
    }.items():
        folder = tmp_path_factory.mktemp("checkpoints") / name
        model: Any = TINY_ARCHITECTURES["llama"]()
        gptq(model, [ids(2)], 32, nsamples=4, save_dir=folder, **how)
        save_file({"ids": ids(1)}, folder / "ids.tensors")
        made[name] = (folder, model)
    return made


def ids(seed: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(seed))


def distances(out: Path, folders: dict[str, tuple[Path, Any]]) -> dict[str, dict[str, float]]:
    """folder -> dtype -> ||theirs - ours|| / ||ours||, ours in float32 by the reference."""
    found: dict[str, dict[str, float]] = {}
    theirs = load_file(out)
    for name, (_, model) in folders.items():
        with torch.no_grad():
            ours = model(ids(1)).logits
        for dtype in ("float32", "bfloat16"):
            if f"{name} {dtype}" in theirs:  # IPEX may not run bfloat16 on this processor
                off = theirs[f"{name} {dtype}"] - ours
                found.setdefault(name, {})[dtype] = float(off.norm() / ours.norm())
    return found


def bfloat16_itself(folder: Path, ours: Any) -> float:
    """How far bfloat16 alone moves the logits: the folder on the reference."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map="cpu", backend="reference", dtype="bfloat16"
    )
    with torch.no_grad():
        want = ours(ids(1)).logits
        return float((model(ids(1)).logits.float() - want).norm() / want.norm())


@pytest.mark.slow
def test_folders_on_backend_ipex(run: Callable[..., Path], folders: dict[str, tuple[Path, Any]]) -> None:
    out = run("woq", *(folder for folder, _ in folders.values()))
    for name, off in distances(out, folders).items():
        assert off["float32"] < 1e-4, name
        assert off["bfloat16"] < 2 * bfloat16_itself(*folders[name]), name


@pytest.mark.slow
def test_folders_through_ipex_llm_optimize(
    run: Callable[..., Path], folders: dict[str, tuple[Path, Any]]
) -> None:
    """Symmetric folders are read right. IPEX knows no gptq_v2: an asymmetric one is read with zero points off by one."""
    out = run("ipex", *(folder for folder, _ in folders.values()))
    for name, off in distances(out, folders).items():
        if name == "asym":
            assert off["float32"] > 0.1
            continue
        assert off["float32"] < 1e-3, name
        assert off.get("bfloat16", 0) < 2 * bfloat16_itself(*folders[name]), name


@pytest.mark.slow
def test_gptq_checkpoints_through_ipex_llm_optimize(
    run: Callable[..., Path], checkpoints: dict[str, tuple[Path, Any]]
) -> None:
    out = run("ipex", *(folder for folder, _ in checkpoints.values()))
    for name, off in distances(out, checkpoints).items():
        assert off["float32"] < 1e-3, name
        assert off.get("bfloat16", 0) < 2 * bfloat16_itself(*checkpoints[name]), name


@pytest.mark.slow
def test_its_kernels_over_the_grid(run: Callable[..., Path]) -> None:
    rows = json.loads(run("selftest").read_text())
    assert len(rows) > 100
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16", "float16"}
    assert [row for row in rows if not row["passed"]] == []


def test_the_stand_in_sees_a_wrong_layout() -> None:
    weight = random_weight(WeightSpec(64, 16, 4, 32, True))
    state = arrange_xpu(weight)
    with xpu_kernel(), pytest.raises(AssertionError):
        torch.ops.torch_ipex.mm_int4(
            torch.ones(1, 64).half(), state.weight.contiguous(), state.scales, state.zeros, 32
        )
