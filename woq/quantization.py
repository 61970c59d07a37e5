"""The one loop: plan, calibrate, then block by block quantize, write back, run again, and hand on.

A model in memory becomes a quantized one in place. With a writer, each block goes to disk and its memory is freed; if
the model's blocks were offloaded to disk to begin with, host memory stays near one block plus the activations.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from woq.algorithms import build
from woq.algorithms.base import Algorithm, LayerResult
from woq.algorithms.rtn import quantize_embedding
from woq.blocks import borrowed, find_blocks, linears, materialize, release, write_back
from woq.calibration import Batch, calibration_batches, describe, fingerprint
from woq.capture import Capture, capture, head_inputs, verify_replay
from woq.configs import CalibratedConfig, QuantConfig
from woq.device import quantization_device
from woq.distill import distill
from woq.errors import CalibrationError, ConfigError, QuantizationError
from woq.head import input_embeddings, output_head, untie
from woq.linear import QuantLinear
from woq.mixed_precision import choose_bits
from woq.moe import unfuse_experts
from woq.phases import phase
from woq.plan import Plan, make_plan
from woq.progress import Progress
from woq.replay import BlockInputs, Following, advance
from woq.report import LayerReport, Report
from woq.saving import describe as describe_model
from woq.saving import dtype_of, identity, packed_state, settle_floats
from woq.weights import PackedWeight, WeightSpec
from woq.writer import FolderWriter

_FEW_SAMPLES, _FEW_TOKENS = 16, 512  # to choose widths on, where the algorithm itself takes no data


def quantize(
    model: nn.Module,
    config: QuantConfig,
    calibration: Any = None,
    *,
    tokenizer: Any = None,
    device: str | None = None,
    progress: Progress | None = None,
    writer: FolderWriter | None = None,
) -> Report:
    """Quantize a transformers causal LM: its linears become `QuantLinear`s, or files.

    Args:
        model: in memory, or with its blocks offloaded by accelerate.
        calibration: anything `calibration_batches` takes. None: `config.dataset`, and without one, text sampled from
            the model itself. Not looked at by an algorithm that needs no data.
        tokenizer: needed where calibration is text. None: `config.tokenizer`.
        device: what quantizes ("cpu", "cuda", "xpu"). None: `config.device`, then INC_TARGET_DEVICE, then the best.
        writer: takes every block as it is finished; the model is left without them. Blocks it already holds are not
            quantized again.

    A model quantized in memory says so in its `config.quantization_config`, and `woq.save_pretrained` saves it.
    Raises the errors of `woq.errors`; what concerns configuration, shapes or data, before anything is changed.
    """
    model.eval()  # dropout would calibrate on noise
    run = _Run(model, config, quantization_device(device or config.device), progress or Progress(), writer)
    run.prepare(calibration, tokenizer)
    run.all_blocks()
    if writer is None:
        model_config: Any = model.config
        model_config.quantization_config = describe_model(model, run.report)
    return run.report


class _Run:
    """One call of `quantize`: what the steps share."""

    def __init__(
        self,
        model: nn.Module,
        config: QuantConfig,
        device: torch.device,
        progress: Progress,
        writer: FolderWriter | None,
    ) -> None:
        self.model, self.config, self.device = model, config, device
        self.progress, self.writer = progress, writer
        self.algorithm: Algorithm[Any] = build(config)
        self.distill_iters = config.distill_iters if isinstance(config, CalibratedConfig) else 0
        if self.distill_iters and writer is not None:
            raise ConfigError(
                "distill_iters trains through the whole model, which block by block from disk to disk never is in memory",
                hint="quantize it in memory: woq.quantize(model, config), or offload='never'; or leave distill_iters at 0",
            )
        self.path, self.blocks = find_blocks(model, config.blocks)
        self.head = output_head(model) if config.quant_lm_head else None
        quantized = [*self.blocks] if self.head is None else [*self.blocks, self.head[1]]
        self.homes = [next(module.parameters()).device for module in quantized]  # before anything is moved
        self.embeddings = input_embeddings(model) if config.quant_embeddings else None
        self.report = Report(config, self._plan(config), str(device))
        self.batches: Sequence[Batch] = []
        self.outside: list[tuple[Tensor, torch.device]] = []  # what was brought to the device, and from where
        self.captured: Capture | None = None
        self.inputs: BlockInputs | None = None
        plan = self.report.plan
        progress.say(
            f"{len(self.blocks)} blocks in {self.path!r}, {len(plan.specs)} linears, {plan.coverage:.1%} of the blocks' weights"
        )
        for name, what in plan.adjusted.items():
            progress.say(f"{name}: {what}")

    def _plan(self, config: QuantConfig) -> Plan:
        return make_plan(config, self.path, self.blocks, self.head, self.embeddings)

    def prepare(self, calibration: Any, tokenizer: Any) -> None:
        """Gather data, capture every block's arguments, prove that replaying works, and tell the writer."""
        started = time.perf_counter()
        if self.algorithm.needs_data or self.config.average_bits is not None:
            self.batches = self._calibration(_data_settings(self.config), calibration, tokenizer)
            self.report.calibration = describe(self.batches)
            self.progress.say(f"calibration: {self.report.calibration}")
        if self.embeddings is not None:
            self._quantize_embeddings(*self.embeddings)
        if self.batches:
            self._capture()
        if self.config.average_bits is not None:
            self._choose_bits()
        if self.writer is not None:
            data = fingerprint(self.batches) if self.batches else "none"
            made = {"config": self.config.to_dict(), "data": data, "model": identity(self.model)}
            self.writer.begin({**made, "device": self.device.type})
        self.report.seconds += time.perf_counter() - started

    def _calibration(self, config: CalibratedConfig, source: Any, tokenizer: Any) -> Sequence[Batch]:
        self.progress.stage("calibration data", 1)
        return calibration_batches(
            config.dataset if source is None else source,
            tokenizer=config.tokenizer if tokenizer is None else tokenizer,
            model=self.model,
            num_samples=config.num_samples,
            seq_len=config.seq_len,
            batch_size=config.batch_size,
            seed=config.seed,
            padding=config.padding,
            pad_token_id=config.pad_token_id,
            own_samples=config.own_samples,
            progress=self.progress.at,
        )

    def _capture(self) -> None:
        """Block 0 stays on the device: the loop begins with it."""
        self._bring_outside()
        materialize(self.blocks[0], self.device)
        first = Batch(self.batches[0].input_ids[:1], None)
        verify_replay(
            self.model,
            self.blocks,
            first,
            capture(self.model, self.blocks, [first], self.device),
            self.device,
        )
        self.captured = capture(self.model, self.blocks, self.batches, self.device)
        masks = [None if b.attention_mask is None else b.attention_mask.bool() for b in self.batches]
        self.inputs = BlockInputs(self.device, self.captured.hidden, self.captured.calls[0], masks)
        if self.algorithm.needs_float_stream or self.distill_iters:
            self.inputs.float_hidden = list(self.captured.hidden)

    def _quantize_embeddings(self, name: str, embeddings: nn.Embedding) -> None:
        """First of all, so that calibration sees what the blocks will be given."""
        started = time.perf_counter()
        found, result = quantize_embedding(name, embeddings, self.report.plan.specs[name], self.config)
        head: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        self._untie("the output head", head)
        parent, _, own = name.rpartition(".")
        setattr(self.model.get_submodule(parent), own, found)
        self.report.layers.append(_layer_report(name, result, time.perf_counter() - started))
        self.progress.layer(self.report.layers[-1])

    def _untie(self, name: str, head: Any) -> None:
        if head is not None and untie(self.model, head):
            self.report.untied_head = True
            self.progress.say(f"{name} shared its weight with the embeddings: it is now its own")

    def _choose_bits(self) -> None:
        """From here on the config gives every layer its width."""
        assert self.inputs is not None and self.captured is not None
        named = [(f"{self.path}.{i}", block) for i, block in enumerate(self.blocks)]
        self.config, choice = choose_bits(
            self.config, self.report.plan, named, self.inputs, self.captured.calls, self.progress
        )
        self.algorithm = build(self.config)
        self.report.config, self.report.mixed_precision = self.config, choice
        self.report.plan = self._plan(self.config)
        counts = ", ".join(
            f"{n} of {bits} bits" for bits, n in sorted(Counter(choice.widths.values()).items())
        )
        self.progress.say(f"{choice.average:.3f} bits a weight of {choice.asked:g} allowed: {counts}")
        if not self.algorithm.needs_data:
            self.inputs = self.captured = None

    def _bring_outside(self) -> None:
        """Everything but the blocks onto the device: embeddings, norms, the head."""
        inside = {id(m) for block in self.blocks for m in block.modules()}
        for module in self.model.modules():
            if id(module) not in inside:
                for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    if not tensor.is_meta:
                        self.outside.append((tensor, tensor.device))
                        tensor.data = tensor.data.to(self.device)

    def _return_outside(self) -> None:
        for tensor, home in self.outside:
            tensor.data = tensor.data.to(home)

    # --- the loop ------------------------------------------------------------------------------------------------

    def all_blocks(self) -> None:
        """Quantize, or take from the writer, block after block, and the head where asked for."""
        self.progress.stage("quantizing", len(self.blocks) + (self.head is not None))
        for i, block in enumerate(self.blocks):
            name = f"{self.path}.{i}"
            if self.captured is not None and self.inputs is not None:
                self.inputs.calls = self.captured.calls[i]
            self._one(i, name, block)
            self.progress.step(name)
        if self.distill_iters:
            self._distill()
        if self.head is not None:
            name, head = self.head
            self._untie(name, head)
            if self.inputs is not None and self.captured is not None:
                self.inputs = head_inputs(
                    self.model, self.blocks, head, self.batches, self.inputs, self.captured
                )
            self._one(len(self.blocks), name, head)
            self.progress.step(name)
        if self.writer is None:
            self._return_outside()

    def _distill(self) -> None:
        """End to end, once all blocks are quantized and in memory."""
        config = self.config
        assert self.captured is not None and self.inputs is not None and isinstance(config, CalibratedConfig)
        started = time.perf_counter()
        _, head = output_head(self.model)
        finished = head_inputs(
            self.model, self.blocks, head, self.batches, self.inputs.in_float(), self.captured
        )
        self.progress.stage("tuning end to end", 1)
        dtype, homes = dtype_of(self.model), [next(b.parameters()).device for b in self.blocks]
        self.model.to(self.device, torch.float32)
        teacher = [hidden.float() for hidden in finished.hidden]
        before, after = distill(
            self.model, head, self.batches, teacher, config.distill_iters, config.distill_lr, config.seed
        )
        self.model.to(dtype)
        for block, home in zip(self.blocks, homes, strict=True):
            block.to(home)
        if self.head is not None:  # its data is what the tuned model hands on
            self.inputs.hidden = self.captured.hidden
            for block, calls in zip(self.blocks, self.captured.calls, strict=True):
                self.inputs.calls = calls
                self.inputs.hidden = advance(block, self.inputs, self.captured.hidden[0].device)
        self.progress.say(f"end to end: held-out KL divergence {before:.4g} -> {after:.4g}")
        self.report.seconds += time.perf_counter() - started

    def _one(self, index: int, name: str, block: nn.Module) -> None:
        started = time.perf_counter()
        home = self.homes[index]
        materialize(block, self.device)
        unfuse_experts(block)
        specs = self.report.plan.of_block(name)
        restored = self.writer is not None and self.writer.has_block(index)
        if (
            self.inputs is not None
            and self.inputs.float_hidden is not None
            and (restored or not self.algorithm.runs_float_stream)
        ):
            with _naming(name), phase("forward"):
                floats = self.inputs.in_float()
                self.inputs.float_outputs = advance(block, floats, floats.hidden[0].device)
        if restored:
            packed, reports = self._restore(index, name, block, specs)
        else:
            with _naming(name), self._following(index):
                results = self.algorithm.quantize_block(block, specs, self.inputs)
            with phase("pack"):
                packed = {layer: result.weight.pack().to("cpu") for layer, result in results.items()}
            if settle_floats(block, packed, self._dtype()) and self.inputs is not None:
                self.inputs.outputs = None
            seconds = (time.perf_counter() - started) / max(len(results), 1)
            reports = [_layer_report(f"{name}.{n}".rstrip("."), r, seconds) for n, r in results.items()]
            if self.writer is not None:
                record = {"layers": [asdict(r) for r in reports]}
                self.writer.write_block(index, packed_state(block, name, packed, self._dtype()), record)
        for report in reports:
            self.progress.layer(report)
        self.report.layers += reports
        if self.inputs is not None and index < len(self.blocks):
            with _naming(name), phase("forward"):
                if self.inputs.outputs is None:
                    self.inputs.outputs = advance(block, self.inputs, self.inputs.hidden[0].device)
                self.inputs.hidden, self.inputs.outputs = self.inputs.outputs, None
            self.inputs.float_hidden, self.inputs.float_outputs = self.inputs.float_outputs, None
        if self.writer is not None:
            release(block)
        else:
            self._install(name, block, packed, self.device if home.type == "meta" else home)
        self.report.seconds += time.perf_counter() - started

    @contextmanager
    def _following(self, index: int) -> Iterator[None]:
        """The block after this one at hand, for an algorithm that looks at it."""
        if not self.algorithm.needs_following or index + 1 >= len(self.blocks):
            yield
            return
        assert self.inputs is not None and self.captured is not None  # who looks ahead needs data
        following = self.blocks[index + 1]
        with borrowed(following, self.device):
            self.inputs.following = Following(following, self.captured.calls[index + 1])
            yield
            self.inputs.following = None

    def _restore(
        self, index: int, name: str, block: nn.Module, specs: Mapping[str, WeightSpec]
    ) -> tuple[dict[str, PackedWeight], list[LayerReport]]:
        """Bring the block to where quantizing it had brought it: the same numbers, so the same next block."""
        assert self.writer is not None
        tensors, record = self.writer.read_block(index)
        own = {key.removeprefix(name).removeprefix("."): value for key, value in tensors.items()}
        modules, packed = linears(block), {}
        for layer, spec in specs.items():
            prefix = f"{layer}." if layer else ""
            parts = {p: own.pop(prefix + p) for p in spec.packed_shapes()}
            packed[layer] = PackedWeight.from_tensors(spec, parts, f"{name}.{layer}")
            write_back(modules[layer], packed[layer].to(self.device).unpack().dequantize())
        block.load_state_dict(own, strict=False)  # biases and norms: scales may have been folded into them
        return packed, [LayerReport(**layer) for layer in record["layers"]]

    def _install(
        self, name: str, block: nn.Module, packed: Mapping[str, PackedWeight], home: torch.device
    ) -> None:
        modules = linears(block)
        for layer, weight in packed.items():
            bias = modules[layer].bias
            quantized = QuantLinear(weight, None if bias is None else bias.detach().to(home))
            parent, _, own = f"{name}.{layer}".rstrip(".").rpartition(".")
            setattr(self.model.get_submodule(parent), own, quantized)
        if "" not in packed:
            block.to(home)

    def _dtype(self) -> torch.dtype | None:
        """What float tensors are saved in: the checkpoint's own dtype, whatever quantization computed in."""
        dtype = getattr(self.model.config, "dtype", None)
        return dtype if isinstance(dtype, torch.dtype) else None


def _data_settings(config: QuantConfig) -> CalibratedConfig:
    """How calibration data is drawn, also for an algorithm that needs some only to choose widths."""
    if isinstance(config, CalibratedConfig):
        return config
    return CalibratedConfig(quant_method=config.quant_method, num_samples=_FEW_SAMPLES, seq_len=_FEW_TOKENS)


@contextmanager
def _naming(block: str) -> Iterator[None]:
    """Inside a block linears go by their short names: say in an error which block it was."""
    try:
        yield
    except (CalibrationError, QuantizationError) as error:
        raise type(error)(f"{block}: {error.message}", hint=error.hint) from error


def _layer_report(name: str, result: LayerResult, seconds: float) -> LayerReport:
    spec = result.weight.spec
    return LayerReport(
        layer=name,
        bits=spec.bits,
        group_size=spec.group_size,
        sym=spec.sym,
        loss=result.loss,
        tokens=result.tokens,
        damping=result.damping,
        seconds=round(seconds, 4),
        note=result.note,
    )
