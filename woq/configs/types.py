"""The types of config fields: what values they allow, and which spellings of a value they take.

dtypes and devices are strings, so that reading a config needs no torch; torch's own objects are taken by their `str()`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

_SHORT_DTYPES = {"float32": "fp32", "float": "fp32", "float16": "fp16", "half": "fp16", "bfloat16": "bf16"}
_WEIGHT_DTYPES = {"fp4_e2m1_bnb": "fp4"}


def _torch_name(value: Any) -> Any:
    """A torch.dtype, a torch.device or its string as our string: torch.float16 and "float16" become "fp16"."""
    if not isinstance(value, str) and type(value).__module__ != "torch":
        return value
    name = str(value).removeprefix("torch.").lower()
    return _SHORT_DTYPES.get(name, name)


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    return pattern


def _name_or_pattern(entry: str) -> str:
    if entry.startswith("re:"):
        _compiles(entry.removeprefix("re:"))
    return entry


def from_dynamic(rules: Any) -> Any:
    """GPTQModel's `dynamic` as overrides: "+:regex" changes a layer, "-:regex" leaves it in float."""
    if not isinstance(rules, Mapping):
        return rules
    return {
        str(key).removeprefix("-:").removeprefix("+:"): {"skip": True} if str(key).startswith("-:") else rule
        for key, rule in rules.items()
    }


def _groups(names: Any) -> Any:
    """A flat list of names is one group."""
    if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
        return (tuple(names),)
    return names


def _one_or_more(names: Any) -> Any:
    return (names,) if isinstance(names, str) else names


# Integers are strict: True is no number of samples, and 4.5 no number of bits.
Count = Annotated[int, Field(ge=1, strict=True)]
Bits = Annotated[int, Field(ge=2, le=8, strict=True)]
AutoBits = Annotated[str, Field(pattern=r"^auto:[1-8](\.\d+)?$")]
BitChoices = Annotated[tuple[Bits, ...], Field(min_length=1)]
GroupSize = Literal[-1] | Count
ScaleDtype = Annotated[Literal["fp16", "bf16", "fp32"], BeforeValidator(_torch_name)]
ComputeDtype = Annotated[Literal["fp32", "bf16", "fp16", "int8"], BeforeValidator(_torch_name)]
WordDtype = Annotated[Literal["int8", "int16", "int32", "int64"], BeforeValidator(_torch_name)]
WeightDtype = Annotated[
    Literal["int", "nf4", "fp4", "fp4_e2m1"], BeforeValidator(lambda v: _WEIGHT_DTYPES.get(str(v), v))
]
Device = Annotated[
    Literal["auto", "cpu", "cuda", "xpu"] | Annotated[str, Field(pattern=r"^(cuda|xpu):\d+$")],
    BeforeValidator(_torch_name),
]
Packing = Literal["gptq", "inc_plain"]
RaggedPolicy = Literal["error", "pad", "smaller", "skip"]
Pattern = Annotated[str, AfterValidator(_compiles)]
NameOrPattern = Annotated[str, AfterValidator(_name_or_pattern)]
NameGroups = Annotated[tuple[tuple[str, ...], ...], BeforeValidator(_groups)]
Names = Annotated[tuple[str, ...], BeforeValidator(_one_or_more)]
