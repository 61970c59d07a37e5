"""A causal LM as an ONNX decoder with a key-value cache, for ONNX Runtime: `woq export onnx`.

    inputs   input_ids int64 [batch, sequence], attention_mask int64 [batch, past + sequence],
             position_ids int64 [batch, sequence], past_key_values.<i>.key and .value [batch, heads, past, size]
    outputs  logits float32 [batch, sequence, vocabulary], present.<i>.key and .value

Computed in float32. Quantized linears are `com.microsoft.MatMulNBits` nodes; other weights are stored in half precision
where that loses nothing, and cast. The graph is traced from the model itself (`torch.export`), so no architecture is
known by name; what was written is run and compared with the model before it is put in place. What it gives up: experts
(their routing depends on values, which a trace cannot follow).
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from woq.errors import CheckpointError, ConfigError
from woq.export.matmul_nbits import NBitsLinear
from woq.linear import QuantLinear

MODEL, DATA = "model.onnx", "model.onnx.data"
_COPIED = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "*.model", "chat_template*")
_TOLERANCE = 1e-3  # of the logits' norm: float32 on both sides, in another order


def export_onnx(
    source: str | Path, target: str | Path, *, overwrite: bool = False, trust_remote_code: bool = False
) -> float:
    """Write the model in `source`, quantized or float, to the folder `target`; it appears whole or not at all.

    Returns how far the written model's logits are from the source's, as a share of their norm. Raises CheckpointError
    for a model that cannot be exported, for a layer that `MatMulNBits` cannot hold (by name), where `target` exists and
    `overwrite` is not set, and where the result computes something else; ConfigError where the packages are missing.
    """
    from woq.loading import resolve_folder
    from woq.modeling import AutoModelForCausalLM

    _need_packages()
    folder, destination = resolve_folder(source, {}), Path(target)
    if destination.exists() and not overwrite:
        raise CheckpointError(f"{destination} exists", hint="pass overwrite to replace it when all is done")
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="float32", device_map="cpu", backend="reference", trust_remote_code=trust_remote_code
    )
    ids, expected = _probe(model)
    partial = destination.with_name(f"{destination.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _trace(model).save(partial / MODEL, external_data=True)
        _write_rest(model, folder, partial)
        error = _check(partial, ids, expected)
        if overwrite:
            shutil.rmtree(destination, ignore_errors=True)
        partial.rename(destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return error


def exporter(source: Any, target: Path, *, overwrite: bool) -> tuple[str, ...]:
    """`export_onnx` as `woq convert --to onnx` calls it. The logits answer for every layer."""
    export_onnx(source.folder, target, overwrite=overwrite)
    return tuple(source.layers)


def _need_packages() -> None:
    import importlib.util

    missing = [
        name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise ConfigError(f"exporting to ONNX needs {missing}", hint="pip install 'woq[onnx]'")


# --- the graph ---------------------------------------------------------------------------------------------------


class _Decoder(nn.Module):
    """The model with its cache as plain tensors and its mask made from the two lengths."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        text = model.config.get_text_config()
        self.kinds = set(getattr(text, "layer_types", None) or ())
        self.window = getattr(text, "sliding_window", None)
        if self.kinds - {"full_attention", "sliding_attention"}:
            raise CheckpointError(f"attention of kinds {sorted(self.kinds)} cannot be exported")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        from transformers import DynamicCache

        cache = DynamicCache()
        for i, (key, value) in enumerate(past):
            cache.update(key, value, i)
        out = self.model(
            input_ids=input_ids,
            attention_mask=self._masks(attention_mask, input_ids.shape[1]),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return out.logits, [(layer.keys, layer.values) for layer in out.past_key_values.layers]

    def _masks(self, attention_mask: Tensor, new: int) -> Any:
        """What is added to attention scores, float32 [batch, 1, new, past + new]; by kind where layers differ."""
        columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        rows = columns[attention_mask.shape[1] - new :]
        behind = rows[:, None] - columns[None, :]
        full = (behind >= 0)[None, None] & attention_mask.bool()[:, None, None, :]
        near = full if self.window is None else full & (behind < self.window)[None, None]
        if "sliding_attention" not in self.kinds:
            return _additive(full if self.kinds else near)
        return {"full_attention": _additive(full), "sliding_attention": _additive(near)}


def _additive(allowed: Tensor) -> Tensor:
    return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)


class _HalfEmbedding(nn.Module):
    """An embedding whose table is stored in half precision."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight).float()


class _HalfLinear(nn.Module):
    """A linear whose weight is stored in half precision."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.float(), self.bias)


def _prepare(model: Any) -> None:
    """Put in place, for each module with a large weight, what the exporter is to see."""
    from woq.moe import UnfusedExperts, is_fused_experts

    halves: dict[int, nn.Parameter] = {}  # by the float weight: what is tied stays one tensor
    for name, module in list(model.named_modules()):
        if isinstance(module, UnfusedExperts) or is_fused_experts(module):
            raise CheckpointError(f"{name!r} routes tokens to experts: that cannot be exported to ONNX")
        if isinstance(module, QuantLinear):
            model.set_submodule(name, NBitsLinear(module.packed.unpack(), module.bias, name))
        elif type(module) in (nn.Embedding, nn.Linear):
            half = halves.setdefault(id(module.weight), _half(module.weight.detach()))
            if half.dtype == torch.float32:
                continue
            stored = _HalfEmbedding(half) if type(module) is nn.Embedding else _HalfLinear(half, module.bias)
            model.set_submodule(name, stored)


def _half(weight: Tensor) -> nn.Parameter:
    """`weight` in the first half precision that holds it exactly, else as it is."""
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(weight.to(dtype).to(weight.dtype), weight):
            return nn.Parameter(weight.to(dtype), requires_grad=False)
    return nn.Parameter(weight, requires_grad=False)


def _trace(model: Any) -> Any:
    """The ONNX program of `model`, whose modules are replaced on the way."""
    past = _cache_of(model)
    _prepare(model)
    decoder = _Decoder(model).eval()
    batch, new, length = 2, 3, past[0][0].shape[2]
    arguments = (
        torch.full((batch, new), 5),
        torch.ones(batch, length + new, dtype=torch.int64),
        torch.arange(length, length + new).expand(batch, new),
        past,
    )
    free, moving = torch.export.Dim.DYNAMIC, {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    shapes = (moving, moving, moving, [({0: free, 2: free}, {0: free, 2: free}) for _ in past])
    names = [f"{i}.{part}" for i in range(len(past)) for part in ("key", "value")]
    with torch.no_grad(), _quiet():
        traced = torch.export.export(decoder, arguments, dynamic_shapes=shapes, strict=False)
        program: Any = torch.onnx.export(
            traced,
            (),
            dynamo=True,
            optimize=False,  # ONNX Runtime does it when it loads, in a fraction of the time
            verbose=False,
            input_names=[
                "input_ids",
                "attention_mask",
                "position_ids",
                *(f"past_key_values.{n}" for n in names),
            ],
            output_names=["logits", *(f"present.{n}" for n in names)],
        )
    _tidy(program.model.graph)
    return program


def _tidy(graph: Any) -> None:
    """One copy of what is tied, and no Python stack beside every node: megabytes that nobody reads."""
    from onnx_ir.convenience import replace_all_uses_with

    for node in graph:
        node.metadata_props.clear()
    seen: dict[int, Any] = {}
    for name, value in list(graph.initializers.items()):
        tensor = getattr(value.const_value, "raw", None)
        if not isinstance(tensor, Tensor) or tensor.numel() == 0:
            continue
        first = seen.setdefault(tensor.data_ptr(), value)
        if first is not value and first.shape == value.shape and first.dtype == value.dtype:
            replace_all_uses_with(value, first)
            del graph.initializers[name]


def _cache_of(model: Any) -> list[tuple[Tensor, Tensor]]:
    """A cache of four tokens for two sequences, random: only its shapes matter, and running is how to learn them."""
    with torch.no_grad():
        out = model(input_ids=torch.full((2, 4), 5), use_cache=True)
    return [
        (torch.randn_like(layer.keys), torch.randn_like(layer.values)) for layer in out.past_key_values.layers
    ]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says about packages that nobody asked for and its own deprecations."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


# --- the folder --------------------------------------------------------------------------------------------------


def _write_rest(model: Any, source: Path, folder: Path) -> None:
    """What a model folder has beside its weights."""
    from woq.saving import model_dict

    text = json.dumps(model_dict(model), indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    model.generation_config.save_pretrained(folder)
    for pattern in _COPIED:
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)


def _probe(model: Any) -> tuple[Tensor, Tensor]:
    """Token ids [2, 12] and the model's logits for them."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return ids, model(input_ids=ids).logits


def _check(folder: Path, ids: Tensor, expected: Tensor) -> float:
    """Run what was written, in two steps through its cache. Raises CheckpointError where it computes something else."""
    from woq.export.runtime import OnnxCausalLM

    model = OnnxCausalLM(folder)
    first = model(ids[:, :7], use_cache=True)
    second = model(ids[:, 7:], past=first.past)
    error = float((torch.cat([first.logits, second.logits], 1) - expected).norm() / expected.norm())
    if not error <= _TOLERANCE:
        raise CheckpointError(
            f"the exported model's logits are off by {error:.3g} of their norm, float32 explains {_TOLERANCE:.0e}",
            hint="this architecture cannot be exported; please report it",
        )
    return error
