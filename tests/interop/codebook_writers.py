"""bitsandbytes', HQQ's and torchao's layouts, written from their documentation one number at a time.

Each returns the tensors and the float weight that they mean.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from tests.interop.foreign_writers import bit_string
from woq.codebooks import VALUES

Written = tuple[dict[str, Tensor], Tensor]


def bnb_4bit(
    rows: int, columns: int, name: str, block: int = 64, nested: bool = False, seed: int = 0
) -> Written:
    """Codes of the flat weight, the even one in a byte's high half; a scale a block of the flat weight."""
    generator = torch.Generator().manual_seed(seed)
    count = rows * columns
    codes = torch.randint(0, 16, (count,), generator=generator).tolist()
    blocks = -(-count // block)
    absmax = torch.rand(blocks, generator=generator) + 0.1
    state: dict[str, Any] = {
        "quant_type": name,
        "blocksize": block,
        "dtype": "float16",
        "shape": [rows, columns],
    }
    tensors: dict[str, Tensor] = {}
    if nested:
        table = torch.linspace(-1, 1, 256)
        levels = torch.randint(0, 256, (blocks,), generator=generator)
        steps = torch.rand(-(-blocks // 256), generator=generator)
        state |= {"nested_blocksize": 256, "nested_offset": 1.5, "nested_dtype": "float32"}
        absmax = torch.tensor([float(table[levels[i]] * steps[i // 256] + 1.5) for i in range(blocks)])
        tensors |= {"weight.absmax": levels.to(torch.uint8)}
        tensors |= {"weight.nested_quant_map": table, "weight.nested_absmax": steps}
    else:
        tensors["weight.absmax"] = absmax
    packed = [codes[i] << 4 | codes[i + 1] for i in range(0, count, 2)]
    text = json.dumps(state).encode()
    tensors |= {
        "weight": torch.tensor(packed, dtype=torch.uint8).unsqueeze(1),
        "weight.quant_map": torch.tensor(VALUES[name]),
        f"weight.quant_state.bitsandbytes__{name}": torch.tensor(list(text), dtype=torch.uint8),
    }
    values = [VALUES[name][code] * float(absmax[i // block]) for i, code in enumerate(codes)]
    return tensors, torch.tensor(values).reshape(rows, columns)


def llm_int8(rows: int, columns: int, seed: int = 0) -> Written:
    """Bytes and the largest magnitude of each row."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)
    scb = torch.rand(rows, generator=generator) + 0.5
    weight = torch.tensor([[int(q) * float(scb[n]) / 127 for q in row] for n, row in enumerate(codes)])
    return {"weight": codes, "SCB": scb, "weight_format": torch.zeros((), dtype=torch.uint8)}, weight


def hqq(rows: int, columns: int, bits: int, group_size: int, seed: int = 0, axis: int = 1) -> Written:
    """As transformers saves it: every setting a tensor; text as bytes."""
    generator = torch.Generator().manual_seed(seed)
    groups = rows * columns // group_size
    height, width = (groups, group_size) if axis else (group_size, groups)
    shared = (groups, 1) if axis else (1, groups)
    codes = torch.randint(0, 1 << bits, (height, width), generator=generator)
    scale = (torch.rand(shared, generator=generator) + 0.5).half()
    zero = (torch.rand(shared, generator=generator) * (1 << bits)).half()
    name, dtype = {8: ("8bit_u8", torch.uint8), 4: ("4bit_u8", torch.uint8), 2: ("2bit_u8", torch.uint8)}.get(
        bits, ("3bit_32", torch.int32)
    )
    each = 10 if bits == 3 else 8 // bits
    stretch_rows = -(-height // each)
    words = torch.zeros(stretch_rows, width, dtype=torch.int64)
    for r in range(height):
        stretch, row = divmod(r, stretch_rows)
        words[row] |= codes[r] << (bits * (each - 1 - stretch))
    tensors = {
        "W_q": words.to(dtype),
        "nbits": torch.tensor(bits, dtype=torch.int32),
        "group_size": torch.tensor(group_size, dtype=torch.int32),
        "shape": torch.tensor([rows, columns]),
        "axis": torch.tensor(axis, dtype=torch.int32),
        "packing": torch.tensor([ord(c) for c in name], dtype=torch.uint8),
        "scale": scale,
        "zero": zero,
        "quant_scale": torch.tensor(0, dtype=torch.uint8),
        "encoded_state_dict": torch.tensor(1, dtype=torch.uint8),
    }
    weight = (codes.float() - zero.float()) * scale.float()
    return tensors, weight.reshape(rows, columns)


def torchao(
    kind: str, rows: int, columns: int, group_size: int, seed: int = 0
) -> tuple[dict[str, Tensor], Tensor, str]:
    """The pieces of a tensor subclass, what they mean, and the metadata that says which class it is."""
    generator = torch.Generator().manual_seed(seed)
    groups = columns // group_size
    codes = torch.randint(0, 16, (rows, columns), generator=generator)
    scale = (torch.rand(rows, groups, generator=generator) + 0.5).half()
    zeros = torch.randint(0, 16, (rows, groups), generator=generator)
    whole, data = torch.empty(rows, columns), {"block_size": [1, group_size], "shape": [rows, columns]}
    if kind == "Int4Tensor":
        offsets = (torch.rand(rows, groups, generator=generator) - 0.5).half()
        for k in range(columns):
            g = k // group_size
            whole[:, k] = (codes[:, k] - 8) * scale[:, g].float() + offsets[:, g].float()
        signed = (codes - 8) % 16
        qdata = (signed[:, ::2] | signed[:, 1::2] << 4).to(torch.uint8)
        pieces = {"qdata": qdata, "scale": scale.t().contiguous(), "zero_point": offsets.t().contiguous()}
    else:
        for k in range(columns):
            g = k // group_size
            whole[:, k] = (codes[:, k] - zeros[:, g]) * scale[:, g].float()
        if kind == "Int4PlainInt32Tensor":
            qdata = torch.tensor([bit_string(row.tolist(), 4) for row in codes], dtype=torch.int32)
            pieces = {"qdata": qdata, "scale": scale.t().contiguous(), "zero_point": zeros.t().to(torch.int8)}
        else:
            data |= {
                "target_dtype": {"_type": "torch.dtype", "_data": "int4"},
                "activation_quantization": None,
            }  # type: ignore[dict-item]
            pieces = {
                "qdata": (codes - 8).to(torch.int8),
                "scale": scale,
                "zero_point": (zeros - 8).to(torch.int8),
            }
    told = json.dumps({"_type": kind, "_data": data, "_tensor_data_names": list(pieces)})
    return {f"_weight_{name}": tensor for name, tensor in pieces.items()}, whole, told
