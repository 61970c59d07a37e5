"""Input embeddings as a packed weight: only the rows that are looked up are dequantized.

What it gives up: rows are unpacked by torch operators on every call, whatever the device. For a prompt of a thousand tokens that is
a thousand rows; a weight of a hundred thousand rows stays packed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from woq import packing
from woq.errors import QuantizationError
from woq.weights import GPTQ_V2, PackedWeight, QuantizedWeight


@dataclass(frozen=True, eq=False)
class _Rows:
    """words: int32 [N, W], a row's codes dense; scales, zeros: [N, G]."""

    words: Tensor
    scales: Tensor
    zeros: Tensor


class QuantEmbedding(nn.Module):
    """Rows of `dequantize(packed)`, in place of an `nn.Embedding`, times its `embed_scale` where it has one."""

    def __init__(self, packed: PackedWeight, replaced: nn.Embedding) -> None:
        """replaced: what stood there; its weight may be on the meta device. Raises QuantizationError where it does more
        than look up and scale."""
        super().__init__()
        self.packed = packed
        self.num_embeddings, self.embedding_dim = packed.spec.out_features, packed.spec.in_features
        # Has no values: it moves with the model, and so says in which dtype rows are given out.
        self.anchor = nn.Parameter(torch.empty(0, dtype=replaced.weight.dtype), requires_grad=False)
        self.factor = embedding_factor(replaced)
        self._rows: _Rows | None = None

    def forward(self, ids: Tensor) -> Tensor:
        """ids: integers [...] -> [..., embedding_dim] in the model's dtype."""
        if self._rows is None or self._rows.words.device != ids.device:
            self._rows = _arrange(self.packed.to(ids.device))
        flat, rows, spec = ids.reshape(-1), self._rows, self.packed.spec
        codes = packing.unpack_dense(rows.words[flat].t().contiguous(), spec.bits, spec.in_features).t()
        picked = replace(spec, out_features=len(flat), layout=GPTQ_V2, double_quant=None)
        weight = QuantizedWeight(picked, codes.contiguous(), rows.scales[flat], rows.zeros[flat])
        found = weight.dequantize(self.anchor.dtype).view(*ids.shape, spec.in_features)
        if self.factor is None:
            return found
        return found * torch.as_tensor(self.factor, dtype=found.dtype, device=found.device)

    def extra_repr(self) -> str:
        spec = self.packed.spec
        return f"{spec.out_features}, {spec.in_features}, bits={spec.bits}, group_size={spec.group_size}, {spec.data_type}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        del keep_vars  # nothing here is trained
        for name, tensor in self.packed.tensors().items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: dict[str, Any],
        strict: bool,
        *lists: list[str],
    ) -> None:
        del metadata
        names = self.packed.tensors().keys()
        own = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        if own:
            self.packed = PackedWeight.from_tensors(self.packed.spec, own, prefix.removesuffix("."))
            self._rows = None
        elif strict:
            lists[0].extend(prefix + name for name in names)


def embedding_factor(module: nn.Embedding) -> Tensor | float | None:
    """What a look-up is multiplied by (Gemma, BART: `embed_scale`), or None.

    Raises QuantizationError for an embedding that does something else: tried on its first rows, where it has any.
    """
    factor: Tensor | float | None = getattr(module, "embed_scale", None)
    if not module.weight.is_meta:
        ids = torch.arange(min(3, module.num_embeddings), device=module.weight.device)
        with torch.no_grad():
            rows = module.weight[ids]
            told = (
                rows
                if factor is None
                else rows * torch.as_tensor(factor, dtype=rows.dtype, device=rows.device)
            )
            if not torch.equal(module(ids), told):
                raise QuantizationError(
                    f"the input embeddings, a {type(module).__name__}, do more than look up and scale",
                    hint="leave quant_embeddings off",
                )
    return factor


def _arrange(packed: PackedWeight) -> _Rows:
    """Row after row, whatever the layout was."""
    weight = packed.unpack()
    words = packing.pack_dense(weight.codes.t(), packed.spec.bits).t().contiguous()
    return _Rows(words, weight.scales, weight.zeros)
