"""What every quantization config has: the shared fields, the layer rules, and the ways in and out of a dict.

A config is a frozen Pydantic model, one class per algorithm; a field is declared once, here or in the one class that
has it. Peers' names are accepted through the tables of `aliases.py`. Reading a config imports no torch: dtypes and
devices are strings ("fp16", "int32", "cuda:1"), and torch's own objects are accepted by their `str()`.

What it gives up: `model_copy(update=...)` is Pydantic's and checks nothing; build a new config instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_serializer,
    model_validator,
)

from woq.configs.aliases import aliases_of, canonical
from woq.configs.explain import explain
from woq.configs.peers import from_transformers
from woq.configs.types import (
    AutoBits,
    BitChoices,
    Bits,
    ComputeDtype,
    Count,
    Device,
    GroupSize,
    NameGroups,
    NameOrPattern,
    Names,
    Packing,
    Pattern,
    RaggedPolicy,
    ScaleDtype,
    WeightDtype,
    WordDtype,
    from_dynamic,
)
from woq.errors import ConfigError


def _default_packing(data: dict[str, Any]) -> Packing:
    standard = data.get("compression_dtype") == "int32" and data.get("compression_dim") == 1
    return "gptq" if standard else "inc_plain"


@dataclass(frozen=True)
class LayerSettings:
    """How one linear is quantized; `group_size` may still be -1 (one group per output channel)."""

    bits: int
    group_size: int
    sym: bool
    weight_dtype: Literal["int", "nf4", "fp4", "fp4_e2m1"] = "int"


class Override(BaseModel):
    """What a rule changes for the layers it matches; None keeps the config's own value."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: Bits | None = None
    group_size: GroupSize | None = None
    sym: bool | None = None
    weight_dtype: WeightDtype | None = None
    skip: bool = False


class QuantConfig(BaseModel):
    """The fields that all algorithms share. Raises ConfigError for a wrong value, an unknown or a contradictory one."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=False,
    )
    takes_codebooks: ClassVar[bool] = False

    quant_method: str
    """Name of the algorithm."""
    bits: Bits | AutoBits = 4
    """Width of a code, 2 to 8; or an average for the blocks, "auto:3.5", from which every group of linears that share an
    input gets its own by how much it suffers on the calibration data."""
    bit_choices: BitChoices = (2, 3, 4, 8)
    """The widths that bits="auto:..." chooses from."""
    group_size: GroupSize = 128
    """Input features that share a scale and a zero point; -1 for one group per output channel."""
    group_dim: Literal[1] = 1
    """The dimension that groups run along: in_features, always."""
    sym: bool = True
    """Symmetric: the zero point is fixed at 2^(bits-1). Asymmetric ranges get a zero point each."""
    weight_dtype: WeightDtype = "int"
    """Integer codes, or a 4-bit codebook: nf4, fp4 (bitsandbytes') or fp4_e2m1."""
    scale_dtype: ScaleDtype = "fp16"
    """What scales are stored in; they are rounded to it before codes are computed."""
    compute_dtype: ComputeDtype | None = None
    """What activations may be rounded to when the model runs: "int8" is faster on CPUs (docs/cpu.md). None: not at all.
    Recorded for the folder; `from_pretrained(..., compute_dtype=...)` overrules it."""
    compression_dtype: WordDtype = "int32"
    """The word that codes are packed into."""
    compression_dim: Literal[0, 1] = 1
    """1 packs along in_features, 0 along out_features."""
    packing: Packing = Field(default_factory=_default_packing)
    """The layout on disk; left out, "gptq" for int32 words along dimension 1, else "inc_plain"."""
    ignore: tuple[NameOrPattern, ...] = ()
    """Modules to leave in float: names (whole dotted parts, anywhere in the path) or "re:" + a regex for re.match."""
    quant_lm_head: bool = False
    """Quantize the output head too; embeddings tied to it are untied."""
    quant_embeddings: bool = False
    """Quantize the input embeddings too, to nearest; a head tied to them keeps a weight of its own. Read by woq alone."""
    overrides: Annotated[dict[Pattern, Override], BeforeValidator(from_dynamic)] = {}
    """Rules by regex, matched with re.match on the module's full name; the first that matches wins."""
    on_ragged_group: RaggedPolicy = "error"
    """Where group_size does not divide in_features: refuse, let the last group be short, take the largest
    group_size / 2^i that divides, or leave the layer in float."""
    blocks: str | None = None
    """Dotted name of the ModuleList of repeated blocks; None: the one that holds most parameters."""
    modules_in_block_to_quantize: NameGroups | None = None
    """Linears to quantize, by name inside a block, in groups quantized one after the other; None: all."""
    min_coverage: float = Field(0.5, gt=0, le=1)
    """Smallest share of the blocks' weights that must be quantized for the run to count as a success."""
    device: Device = "auto"
    """Where quantization runs."""

    if not TYPE_CHECKING:  # type checkers keep Pydantic's own signature, with every field in it

        def __init__(self, **data: Any) -> None:
            try:
                super().__init__(**data)
            except ValidationError as error:
                raise explain(type(self), error, aliases=aliases_of(type(self).model_fields)) from None

    @model_validator(mode="before")
    @classmethod
    def _accept_peers_names(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        return canonical(cls.__name__, from_transformers(cls.__name__, data))

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.packing == "gptq" and (self.compression_dtype, self.compression_dim) != ("int32", 1):
            raise self._refusal(
                f"packing='gptq' with compression_dtype={self.compression_dtype!r}, "
                f"compression_dim={self.compression_dim}",
                "packing='gptq' with compression_dtype='int32', compression_dim=1, or packing='inc_plain' with any",
            )
        self._check_data_type("", self._settings(Override()))
        for pattern, rule in self.overrides.items():
            if not rule.skip:
                self._check_data_type(f"overrides[{pattern!r}]: ", self._settings(rule))
        return self

    def _check_data_type(self, where: str, settings: LayerSettings) -> None:
        got = f"{where}weight_dtype={settings.weight_dtype!r}"
        if settings.weight_dtype == "int":
            return
        if not self.takes_codebooks:
            raise self._refusal(got, "'int' (RtnConfig takes the others)")
        if self.average_bits is not None:
            raise self._refusal(f"{got} with bits={self.bits!r}", "bits=4: a codebook has one width")
        if settings.bits != 4:
            raise self._refusal(f"{got} with bits={settings.bits}", "bits=4, or weight_dtype='int'")
        if not settings.sym:
            raise self._refusal(f"{got} with sym=False", "sym=True: a codebook has no zero points")

    @classmethod
    def _refusal(cls, got: str, allowed: str) -> ConfigError:
        return ConfigError(f"{cls.__name__}: {got} is not possible; allowed: {allowed}")

    @property
    def run_time_order(self) -> bool:
        """Whether layers need a g_idx to run: no, unless the algorithm reorders input features across groups."""
        return False

    @property
    def average_bits(self) -> float | None:
        """The budget that bits="auto:..." names; None where every layer's width is given."""
        return float(self.bits.removeprefix("auto:")) if isinstance(self.bits, str) else None

    @property
    def widest_bits(self) -> int:
        """The width of layers that no rule gives one; the largest that may be chosen, where it is to be chosen."""
        return max(self.bit_choices) if isinstance(self.bits, str) else self.bits

    def for_layer(self, name: str) -> LayerSettings | None:
        """Settings of the linear with this full dotted name; None where a rule leaves it in float.

        `quant_lm_head` is not looked at: which module is the head is the model's to say.
        """
        if self.skip_reason(name) is not None:
            return None
        _, rule = self.override(name)
        return self._settings(rule)

    def _settings(self, rule: Override) -> LayerSettings:
        return LayerSettings(
            bits=self.widest_bits if rule.bits is None else rule.bits,
            group_size=self.group_size if rule.group_size is None else rule.group_size,
            sym=self.sym if rule.sym is None else rule.sym,
            weight_dtype=self.weight_dtype if rule.weight_dtype is None else rule.weight_dtype,
        )

    def skip_reason(self, name: str) -> str | None:
        """Which rule leaves the module with this full dotted name in float, or None."""
        for entry in self.ignore:
            if entry.startswith("re:"):
                matches = re.match(entry.removeprefix("re:"), name) is not None
            else:
                matches = f".{entry}." in f".{name}."
            if matches:
                return f"in ignore: {entry!r}"
        pattern, rule = self.override(name)
        return f"skipped by overrides[{pattern!r}]" if rule.skip else None

    def override(self, name: str) -> tuple[str, Override]:
        """The first rule that matches this full dotted name, by its pattern; ("", nothing changed) where none does."""
        for pattern, rule in self.overrides.items():
            if re.match(pattern, name):
                return pattern, rule
        return "", Override()

    def to_dict(self) -> dict[str, Any]:
        """Every field, JSON-serialisable. A dataset or tokenizer that is no string becomes None."""
        return self.model_dump(mode="json")

    def to_diff_dict(self) -> dict[str, Any]:
        """`quant_method` and the fields that differ from their defaults."""
        defaults = type(self)(quant_method=self.quant_method).to_dict()
        return {k: v for k, v in self.to_dict().items() if k == "quant_method" or v != defaults[k]}

    def to_json_string(self, use_diff: bool = True) -> str:
        """JSON text of `to_diff_dict()`, or of `to_dict()` with use_diff=False (transformers' signature)."""
        data = self.to_diff_dict() if use_diff else self.to_dict()
        return json.dumps(data, indent=2) + "\n"  # not sorted: overrides have an order

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The config that `to_dict`, `to_diff_dict` or a peer wrote. Raises ConfigError."""
        return cls(**data)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The config written in `text`. Raises ConfigError for a wrong value or text that is no JSON object."""
        return cls.from_dict(json_object(text))


def json_object(text: str) -> dict[str, Any]:
    """`text` as a dict. Raises ConfigError where it is anything else."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"a config is no valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"a config is a JSON object, got {type(data).__name__}")
    return data


class CalibratedConfig(QuantConfig):
    """The fields of algorithms that look at data."""

    dataset: Any = None
    """Texts, token ids, a file, a DataLoader or a data set's name; None: text sampled from the model itself."""
    num_samples: Count = 128
    """Calibration samples of `seq_len` tokens."""
    seq_len: Count = 2048
    """Tokens in a sample."""
    own_samples: int = Field(0, ge=0, strict=True)
    """Samples beside them that the model writes itself, every other one going on with some tokens of the data: against
    learning a small calibration set by heart."""
    batch_size: Count = 8
    """Samples run at once."""
    seed: int = Field(42, strict=True)
    """Of every random choice: same seed, same bytes."""
    tokenizer: Any = None
    """A tokenizer, its folder or its hub id; None: the model's own."""
    padding: bool = False
    """One text a sample, padded to seq_len and masked out of every statistic. False packs texts end to end."""
    pad_token_id: int | None = Field(None, ge=0, strict=True)
    """What to pad with; None: the tokenizer's."""
    true_sequential: bool = Field(default_factory=lambda data: data.get("quant_method") == "gptq")
    """Inside a block, quantize group after group of linears, each on the outputs of those already quantized; what GPTQ
    does unless told otherwise."""
    distill_iters: int = Field(0, ge=0, strict=True)
    """Steps of tuning scales and norms end to end against the float model's predictions, once all blocks are quantized;
    0: none. The whole model must be in memory."""
    distill_lr: float = Field(default_factory=lambda data: 3e-3 if data.get("bits") in (2, 3) else 1e-3, gt=0)
    """Learning rate of that, relative to a scale; what coarse grids gain by is too much for fine ones."""

    @field_serializer("dataset", "tokenizer")
    def _only_names(self, value: Any) -> str | None:
        return value if isinstance(value, str) else None


class FoldingConfig(CalibratedConfig):
    """The fields of algorithms that rescale a linear's inputs."""

    folding: bool = True
    """Fold the scales into what produces the inputs, where the block's output provably stays the same."""
    absorb_layer_dict: dict[str, Names] = {}
    """Producer -> linears that take its output, by name inside a block; empty: found by shape."""


class TrainedConfig(CalibratedConfig):
    """The fields of algorithms that train by gradient."""

    iters: int = Field(
        default_factory=lambda data: 50 if data.get("quant_method") == "teq" else 200, ge=0, strict=True
    )
    """Training steps a block: 200, but 50 for TEQ, which starts from a search; 0 trains nothing."""
    lr: float | None = Field(None, gt=0)
    """Learning rate; None: the algorithm's own."""
