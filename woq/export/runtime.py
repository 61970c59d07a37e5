"""An exported folder in ONNX Runtime on the CPU, with as much of a transformers model's face as evaluation needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from woq.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Output:
    """logits float32 [batch, sequence, vocabulary]. past: the cache after it, in the order of the graph's inputs."""

    logits: Tensor
    past: list[Tensor] | None


class OnnxCausalLM(nn.Module):
    """The model in a folder that `woq export onnx` wrote."""

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        """threads: of one operator; None: as many as PyTorch has. Raises CheckpointError for a folder of another kind."""
        super().__init__()
        try:
            import onnxruntime
        except ImportError as error:
            raise ConfigError("running ONNX needs onnxruntime", hint="pip install 'woq[onnx]'") from error
        from transformers import AutoConfig

        from woq.export.onnx import MODEL

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        file = Path(folder) / MODEL
        try:
            self.session = onnxruntime.InferenceSession(
                str(file), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise CheckpointError(f"{file} cannot be run: {error}") from error
        self.config = AutoConfig.from_pretrained(folder)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        inputs = {entry.name: entry for entry in self.session.get_inputs()}
        needed = {"input_ids", "attention_mask", "position_ids"}
        if not needed <= inputs.keys():
            raise CheckpointError(f"{file} takes {sorted(inputs)}, expected {sorted(needed)} and a cache")
        self._past = {name: entry.shape for name, entry in inputs.items() if name not in needed}
        self._outputs = [entry.name for entry in self.session.get_outputs()]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past: list[Tensor] | None = None,
        use_cache: bool = False,
    ) -> Output:
        """input_ids [batch, sequence]; attention_mask [batch, past + sequence], left padding allowed; past: of an
        earlier output."""
        batch, new = input_ids.shape
        if past is None:
            past = [torch.zeros(batch, shape[1], 0, shape[3]) for shape in self._past.values()]
        if attention_mask is None:
            attention_mask = torch.ones(batch, past[0].shape[2] + new, dtype=torch.int64)
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -new:]
        feed = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}
        feed |= dict(zip(self._past, past, strict=True))
        names = self._outputs if use_cache else self._outputs[:1]
        logits, *present = self.session.run(names, {name: t.contiguous().numpy() for name, t in feed.items()})
        return Output(torch.from_numpy(logits), [torch.from_numpy(t) for t in present] if use_cache else None)

    def get_input_embeddings(self) -> nn.Module:
        """A stand-in that only says how many tokens there are."""
        size = self.session.get_outputs()[0].shape[-1]
        return nn.Embedding(size, 1, device="meta")

    def generate(
        self, input_ids: Tensor, max_new_tokens: int = 20, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Greedy continuation through the cache: [batch, sequence + max_new_tokens]; it does not stop at an eos."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        result, new, past = input_ids, input_ids, None
        for _ in range(max_new_tokens):
            out = self(new, mask, past, use_cache=True)
            new, past = out.logits[:, -1:].argmax(-1), out.past
            result = torch.cat([result, new], dim=1)
            mask = torch.cat([mask, torch.ones_like(new)], dim=1)
        return result
