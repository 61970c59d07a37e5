"""One folder on every device: whatever algorithm made it and wherever, each backend gives the same logits.

Devices that are there are used. Those that are not are stood in for where a stand-in says something: a device whose
tensors are the CPU's (the whole way from INC_TARGET_DEVICE and device_map to the layers), and torch's XPU kernels by
strict decoders of their layouts. CUDA and Triton kernels have no stand-in here: without a GPU those cells skip.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.backends.xpu_standin import device_on_cpu, xpu_on_cpu
from tests.tiny_models import TINY_ARCHITECTURES, VOCABULARY
from woq import AutoModelForCausalLM, quantize_folder
from woq.algorithms import ALGORITHMS
from woq.backends import BACKENDS, why_not
from woq.backends.base import Target
from woq.configs import config_from_dict
from woq.device import DEVICES, available_devices
from woq.errors import ConfigError
from woq.linear import QuantLinear
from woq.progress import Progress
from woq.tensor_files import TensorFolder
from woq.weights import WeightSpec

WRITERS = DEVICES
READERS = [entry.name for entry in BACKENDS]
FEW = {"num_samples": 4, "seq_len": 24, "iters": 2}


def ids(seed: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(seed))


def config(algorithm: str) -> Any:
    """The algorithm with little data."""
    plain = config_from_dict({"quant_method": algorithm})
    few = {name: value for name, value in FEW.items() if name in type(plain).model_fields}
    return config_from_dict({"quant_method": algorithm, "group_size": 32, **few})


@pytest.fixture(scope="module")
def float_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float") / "llama"
    TINY_ARCHITECTURES["llama"]().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def written(float_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """(algorithm, writer) -> folder; INC_TARGET_DEVICE in capitals chose the device."""
    folders = {}
    for algorithm in ALGORITHMS:
        for writer in WRITERS:
            target = tmp_path_factory.mktemp(algorithm) / writer
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("INC_TARGET_DEVICE", writer.upper())
                with there(writer, patch) as stand_in:
                    report = quantize_folder(
                        float_folder, target, config(algorithm), [ids(2)], progress=Progress()
                    )
            assert report.device.partition(":")[0] == writer
            if stand_in is not None:
                assert stand_in.asked  # tensors were put there, not left where they lay
            folders[algorithm, writer] = target
    return folders


def there(device: str, patch: pytest.MonkeyPatch) -> AbstractContextManager[Any]:
    """`device`, or its stand-in."""
    if device in available_devices():
        return nullcontext()
    spare(patch)
    return device_on_cpu(device, patch)


def spare(patch: pytest.MonkeyPatch) -> None:
    """A stand-in has no streams, no memory to ask about and no Triton."""
    patch.setattr("woq.algorithms.gathering.can_walk", lambda *_: False)
    patch.setattr("woq.algorithms.kernels.kernels_on", lambda _: False)


def logits(folder: Path, **options: Any) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    used = {module.backend for module in model.modules() if isinstance(module, QuantLinear)}
    assert used == {options["backend"]}
    with torch.no_grad():
        device = next(model.parameters()).device
        result: Tensor = model(ids(1).to(device)).logits
    return result.float().cpu()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_same_logits(
    algorithm: str,
    writer: str,
    reader: str,
    written: dict[tuple[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = written[algorithm, writer]
    exact = logits(folder, device_map="cpu", backend="reference", dtype="float32")
    plain = logits(folder, device_map="cpu", backend="reference", dtype="bfloat16")
    device, machine = reading_device(reader, monkeypatch)
    with machine:
        got = logits(folder, device_map=device, backend=reader, dtype="bfloat16")
    rounding = float((plain - exact).norm())
    assert float((got - exact).norm()) <= 2 * rounding + 1e-3 * float(exact.norm())


def reading_device(reader: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, AbstractContextManager[Any]]:
    """A device for `reader`, and what stands in for it; skips the test where there is neither."""
    spec = WeightSpec(64, 64, 4, 32, True)
    reasons = {}
    for device in available_devices():
        reasons[device] = why_not(reader, spec, Target(torch.device(device), torch.bfloat16))
        if reasons[device] is None:
            return device, nullcontext()
    if reader == "xpu":
        return "xpu", xpu_on_cpu(monkeypatch)
    pytest.skip("; ".join(f"on {device} {reader} {reason}" for device, reason in reasons.items()))


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_device_leaves_no_trace_in_the_files(
    algorithm: str, writer: str, written: dict[tuple[str, str], Path]
) -> None:
    """The same tensors, by name, shape and dtype; where the arithmetic was the CPU's, the same to the bit."""
    ours, theirs = (TensorFolder(written[algorithm, device]) for device in ("cpu", writer))
    assert list(ours.index) == list(theirs.index)
    for name in ours.index:
        here, there_ = ours.read(name), theirs.read(name)
        assert (here.shape, here.dtype, there_.device.type) == (there_.shape, there_.dtype, "cpu")
        assert writer in available_devices() or torch.equal(here, there_)


@pytest.mark.parametrize("device", ["xpu", "cuda"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_device_map_without_the_device(algorithm: str, device: str, float_folder: Path) -> None:
    """Told at once, before anything is loaded or quantized."""
    if device in available_devices():
        pytest.skip(f"{device} is here")
    with pytest.raises(ConfigError, match=rf"device='{device}' cannot be used here\n.*available: .*'cpu'"):
        AutoModelForCausalLM.from_pretrained(
            float_folder, quantization_config=config(algorithm), calibration=[ids(2)], device_map=device
        )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_device_map_xpu_quantizes_and_runs(
    algorithm: str, float_folder: Path, written: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call, as neural-compressor's users know it: quantize, then answer, both on the XPU."""
    monkeypatch.setenv("INC_TARGET_DEVICE", "xpu")
    if "xpu" in available_devices():
        machine: AbstractContextManager[Any] = nullcontext()
    else:
        spare(monkeypatch)
        machine = xpu_on_cpu(monkeypatch)
    with machine as kernels:
        model = AutoModelForCausalLM.from_pretrained(
            float_folder,
            quantization_config=config(algorithm),
            calibration=[ids(2)],
            device_map="xpu",
            backend="xpu",
            dtype="bfloat16",
            progress=Progress(),
        )
        assert model.quantization_report.device.startswith("xpu")
        with torch.no_grad():
            out = model(ids(1).to(next(model.parameters()).device)).logits
    assert torch.isfinite(out).all()
    if kernels is not None:
        assert kernels.calls  # the answers came from the kernels' stand-ins
