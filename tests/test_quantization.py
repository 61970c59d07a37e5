"""The loop on every architecture: what it makes in memory, on disk, offloaded or not, is one and the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.tiny_models import TINY_ARCHITECTURES, VOCABULARY
from woq import GPTQConfig, QuantConfig, RtnConfig, quantize, quantize_folder, save_pretrained
from woq.algorithms import ALGORITHMS
from woq.algorithms.gptq import Gptq
from woq.blocks import find_blocks
from woq.configs import CONFIGS, CalibratedConfig
from woq.errors import CalibrationError, QuantizationError
from woq.head import shares_embeddings
from woq.linear import QuantLinear
from woq.progress import Progress
from woq.replay import BlockInputs

TinyModel = Callable[[str], nn.Module]
QUIET = Progress()


def calibration(samples: int = 4, length: int = 24, seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (samples, length), generator=generator)]


def config_of(method: str, **fields: Any) -> QuantConfig:
    cls = CONFIGS[method]
    data = {"num_samples": 4, "seq_len": 24} if issubclass(cls, CalibratedConfig) else {}
    return cls(**{"group_size": 32, **data, **fields})


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        t.dtype == other[n].dtype and torch.equal(t, other[n]) for n, t in one.items()
    )


@pytest.fixture(scope="module")
def float_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`float_folder(arch)`: the tiny model saved by transformers, once."""
    made: dict[str, Path] = {}

    def folder(arch: str) -> Path:
        if arch not in made:
            made[arch] = tmp_path_factory.mktemp(arch) / "float"
            TINY_ARCHITECTURES[arch]().save_pretrained(made[arch])
        return made[arch]

    return folder


# --- in memory, on disk, offloaded -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ALGORITHMS)
@pytest.mark.parametrize("arch", TINY_ARCHITECTURES)
def test_every_way_gives_the_same_tensors(
    arch: str, method: str, float_folder: Callable[[str], Path], tiny_model: TinyModel, tmp_path: Path
) -> None:
    config, source = config_of(method), float_folder(arch)
    for offload in ("never", "always"):
        quantize_folder(source, tmp_path / offload, config, calibration(), offload=offload, progress=QUIET)
    model = tiny_model(arch)
    report = quantize(model, config, calibration())
    save_pretrained(model, tmp_path / "memory")
    made = {way: tensors(tmp_path / way) for way in ("never", "always", "memory")}
    assert same(made["never"], made["always"])
    assert same(made["never"], made["memory"])
    assert report.plan.coverage > 0.98
    assert {layer.layer for layer in report.layers} == set(report.plan.specs)
    assert all(0 < layer.loss < 0.1 for layer in report.layers)
    texts = {way: (tmp_path / way / "quantize_config.json").read_text() for way in made}
    assert texts["never"] == texts["always"] == texts["memory"]


def test_dropout_is_off(tiny_model: TinyModel) -> None:
    states = []
    for training in (False, True):
        model = tiny_model("gpt2").train(training)
        quantize(model, config_of("gptq"), calibration())
        assert not model.training
        states.append(model.state_dict())
    assert same(*states)


@pytest.mark.parametrize("method", ALGORITHMS)
def test_twice_is_the_same_to_the_byte(
    method: str, float_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    for run in "ab":
        quantize_folder(
            float_folder("mixtral"), tmp_path / run, config_of(method), calibration(), progress=QUIET
        )
    names = sorted(p.name for p in (tmp_path / "a").iterdir() if not p.name.startswith("quantization_"))
    assert names == sorted(
        p.name for p in (tmp_path / "b").iterdir() if not p.name.startswith("quantization_")
    )
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_self_sampled_calibration_is_repeatable(tiny_model: TinyModel) -> None:
    states = []
    for _ in range(2):
        model = tiny_model("llama")
        quantize(model, GPTQConfig(group_size=32, num_samples=4, seq_len=16))
        states.append(model.state_dict())
    assert same(*states)


@pytest.mark.parametrize("arch", TINY_ARCHITECTURES)
def test_each_block_is_calibrated_on_what_it_will_get(
    arch: str, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inputs an algorithm sees are those that the finished model gives the block: the blocks before are quantized,
    and its arguments are its own (gemma3's masks differ from block to block)."""
    given: list[tuple[Tensor, dict[str, Any]]] = []
    real = Gptq.quantize_block

    def recording(self: Gptq, block: nn.Module, specs: Any, inputs: BlockInputs) -> Any:
        given.append((inputs.hidden[0].clone(), dict(inputs.calls[0].kwargs)))
        return real(self, block, specs, inputs)

    monkeypatch.setattr(Gptq, "quantize_block", recording)
    model: Any = tiny_model(arch)
    ids = calibration()
    quantize(model, config_of("gptq", bits=3), ids)
    _, blocks = find_blocks(model)
    got: list[tuple[Tensor, dict[str, Any]]] = []
    for block in blocks:
        block.register_forward_pre_hook(
            lambda _, args, kwargs: got.append((args[0] if args else kwargs["hidden_states"], kwargs)),
            with_kwargs=True,
        )
    with torch.no_grad():
        model(ids[0], use_cache=False)
    assert len(given) == len(got) == len(blocks)
    for (hidden, arguments), (expected, due) in zip(given, got, strict=True):
        assert torch.allclose(hidden, expected, rtol=1e-4, atol=1e-4)
        for name, value in arguments.items():
            assert (value is None) == (due[name] is None), name
            assert not isinstance(value, Tensor) or torch.equal(value, due[name]), name
    if arch == "gemma3":  # sliding, full, sliding
        assert [arguments["attention_mask"] is None for _, arguments in given] == [False, True, False]


# --- GPTQ in the loop --------------------------------------------------------------------------------------------

LOOP = {
    "default": {},
    "stored": {"act_group_aware": False},
    "true_sequential": {"true_sequential": True},
    "desc_act": {"desc_act": True},
    "static_groups": {"desc_act": True, "static_groups": True},
    "act_group_aware": {"act_group_aware": True},
}


def distance(model: Any, reference: Tensor, ids: Tensor) -> float:
    with torch.no_grad():
        logits = model(ids).logits
    return float((logits - reference).square().mean())


@pytest.mark.parametrize("order", LOOP.values(), ids=LOOP)
def test_gptq_beats_rounding_on_the_whole_model(order: dict[str, Any], tiny_model: TinyModel) -> None:
    ids = calibration(16, 48)[0]
    with torch.no_grad():
        reference = tiny_model("llama")(ids).logits
    lost = {}
    for name, config in (
        ("rtn", RtnConfig(bits=3, group_size=32)),
        ("gptq", GPTQConfig(bits=3, group_size=32, num_samples=16, seq_len=48, **order)),
    ):
        model = tiny_model("llama")
        quantize(model, config, [ids])
        lost[name] = distance(model, reference, ids)
    assert lost["gptq"] < 0.9 * lost["rtn"]


def test_padding_is_no_data(tiny_model: TinyModel) -> None:
    """Samples of several lengths: what stands under the mask changes no code."""
    rows = [calibration(1, n, n)[0][0] for n in (20, 9, 24, 13)]
    states = []
    for pad in (0, 77):
        model = tiny_model("llama")
        config = GPTQConfig(
            group_size=32, num_samples=4, seq_len=24, padding=True, pad_token_id=pad, batch_size=4
        )
        report = quantize(model, config, rows)
        assert {layer.tokens for layer in report.layers} == {20 + 9 + 24 + 13}
        states.append({n: t for n, t in model.state_dict().items() if n.endswith("qweight")})
    assert same(*states)


def test_experts_without_tokens_are_rounded_and_say_so(tiny_model: TinyModel) -> None:
    model = tiny_model("mixtral")
    with pytest.warns(UserWarning, match="1 samples"):
        report = quantize(
            model, GPTQConfig(group_size=32, num_samples=4, seq_len=2), [torch.tensor([[5, 9]])]
        )
    without = [layer for layer in report.layers if layer.tokens == 0]
    assert without
    assert all("no calibration token reached it: rounded to nearest" in layer.note for layer in without)
    assert len(report.notes) == len(without)


# --- the head ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ALGORITHMS)
@pytest.mark.parametrize("arch", ["gemma3", "llama"])
def test_head(arch: str, method: str, tiny_model: TinyModel) -> None:
    """gemma3 ties its head to the embeddings, llama does not: both keep their embeddings, in float."""
    model: Any = tiny_model(arch)
    tied = shares_embeddings(model, model.get_output_embeddings())
    assert tied == (arch == "gemma3")
    embeddings = model.get_input_embeddings().weight.clone()
    with torch.no_grad():
        reference = model(calibration()[0]).logits
    report = quantize(model, config_of(method, bits=8, quant_lm_head=True), calibration())
    assert report.layers[-1].layer == "lm_head"
    assert isinstance(model.lm_head, QuantLinear)
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    assert not model.config.tie_word_embeddings
    assert distance(model, reference, calibration()[0]) < 1e-2 * float(reference.square().mean())


def test_no_head_to_quantize(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    with pytest.raises(QuantizationError, match="LlamaForCausalLM has no output head"):
        quantize(model, RtnConfig(group_size=32, quant_lm_head=True))


# --- errors say where, and leave the model alone -----------------------------------------------------------------


def test_nan_weight_names_block_and_linear(tiny_model: TinyModel) -> None:
    for config in (RtnConfig(group_size=32), GPTQConfig(group_size=32, num_samples=4, seq_len=24)):
        model = tiny_model("llama")
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
        with pytest.raises(
            (QuantizationError, CalibrationError), match=r"^model\.layers\.1: .*(NaN|not finite)"
        ):
            quantize(model, config, calibration() if config.quant_method == "gptq" else None)


def test_infinite_activations_name_block_and_layer(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[5] = float("inf")
    with pytest.raises(CalibrationError, match=r"^model\.layers\.1: "):
        quantize(model, config_of("gptq"), calibration())


def test_bad_calibration_changes_nothing(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for bad, message in (
        ([], "holds no text and no token ids"),
        ([torch.tensor([[5, VOCABULARY]])], f"sample 0: token id {VOCABULARY} at position 1"),
        ([torch.full((1, 4), float("nan"))], "expected a row of integer token ids|float"),
        (["text without a tokenizer"], "tokenizer"),
    ):
        with pytest.raises(CalibrationError, match=message):
            quantize(model, config_of("gptq"), bad)
    assert same(model.state_dict(), before)


def test_progress_hears_of_every_block_and_layer(tiny_model: TinyModel) -> None:
    heard: list[str] = []

    class Listening(Progress):
        def step(self, detail: str = "") -> None:
            heard.append(detail)

        def layer(self, report: Any) -> None:
            heard.append(report.layer)

    quantize(tiny_model("gpt2"), RtnConfig(group_size=32, quant_lm_head=True), progress=Listening())
    blocks = [h for h in heard if h.count(".") == 2]
    assert blocks == ["transformer.h.0", "transformer.h.1"]
    assert heard.count("lm_head") == 2
    assert len(heard) == 2 * (4 + 1) + 2
