"""Token batches: the checked value that calibration hands on, and how rows of ids become it.

Rows are packed to one length by default: documents are joined and cut, so that every position is a token that counts
and no statistic has to know of padding. Padding exists for who asks for it, and then the mask says what counts.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from woq.embedding import QuantEmbedding
from woq.errors import CalibrationError

INTEGER_DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
ENOUGH_TOKENS = 128 * 2048  # what the GPTQ and AWQ papers calibrate on
_OPENING = 16  # tokens of the data that a sample of the model's own begins with
LARGE_MODEL = 1_000_000_000  # parameters; smaller models are done well by far less


class CalibrationWarning(UserWarning):
    """Calibration goes on, but with less or other data than asked for."""


@dataclass(frozen=True, eq=False)
class Batch:
    """What one forward pass is given.

    input_ids: int64 [B, L] on the CPU. attention_mask: bool [B, L], True where a token counts; None where all do.
    source: where the tokens came from, in words, for logs.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    source: str = ""

    @property
    def tokens(self) -> int:
        """How many tokens count."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())


@dataclass(frozen=True, eq=False)
class Sample:
    """One row of ids: int64 [L], with a bool [L] mask unless every token counts."""

    ids: Tensor
    mask: Tensor | None = None

    def counted(self) -> Tensor:
        """The ids that count."""
        return self.ids if self.mask is None else self.ids[self.mask]

    def cut(self, length: int) -> Sample:
        """The first `length` tokens."""
        return Sample(self.ids[:length], None if self.mask is None else self.mask[:length])


def vocabulary_size(model: nn.Module | None) -> int | None:
    """Rows of the model's input embedding: the bound of a token id. None without a model to ask."""
    embedding = model.get_input_embeddings() if model is not None else None  # type: ignore[operator]
    if embedding is None:
        return None
    return (
        embedding.num_embeddings if isinstance(embedding, QuantEmbedding) else int(embedding.weight.shape[0])
    )


def checked_sample(ids: Any, mask: Any, index: int, vocab_size: int | None) -> Sample:
    """Sample `index` from a row of ids and, where there is one, its mask.

    Raises CalibrationError, naming the sample and the value, unless ids are integers in [0, vocab_size), non-empty,
    and the mask is 0/1 of the same length with a token left.
    """
    where = f"calibration sample {index}"
    try:
        ids = torch.as_tensor(ids).cpu()
        mask = None if mask is None else torch.as_tensor(mask).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalibrationError(f"{where}: {ids!r:.80} is no row of token ids ({error})") from error
    if ids.numel() == 0:
        raise CalibrationError(f"{where} is empty", hint="leave empty samples out")
    if ids.dim() != 1 or ids.dtype not in INTEGER_DTYPES:
        raise CalibrationError(
            f"{where} is {ids.dtype} {list(ids.shape)}, expected a row of integer token ids"
        )
    ids = ids.to(torch.int64)
    check_range(ids, vocab_size, where)
    if mask is None:
        return Sample(ids)
    if mask.shape != ids.shape or not ((mask == 0) | (mask == 1)).all():
        raise CalibrationError(
            f"{where}: attention_mask is {mask.dtype} {list(mask.shape)}, expected 0 and 1 of shape {list(ids.shape)}"
        )
    if not mask.any():
        raise CalibrationError(f"{where}: attention_mask leaves no token", hint="leave empty samples out")
    return Sample(ids, None if mask.all() else mask.bool())


def check_range(ids: Tensor, vocab_size: int | None, where: str) -> None:
    """Raise CalibrationError on the first id of `ids` [L] outside [0, vocab_size)."""
    wrong = ids < 0 if vocab_size is None else (ids < 0) | (ids >= vocab_size)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        bound = "" if vocab_size is None else f" and below the vocabulary's {vocab_size}"
        raise CalibrationError(
            f"{where}: token id {int(ids[at])} at position {at}; ids must be at least 0{bound}",
            hint="token ids must come from this model's own tokenizer",
        )


def pack(
    documents: Iterable[Tensor], seq_len: int, num_samples: int, separator: int | None = None
) -> list[Sample]:
    """Join documents (int64 [any]) and cut the stream into at most `num_samples` rows of `seq_len`.

    `separator` goes between documents unless one ends with it already. Reads no more documents than it needs; a last
    incomplete row is dropped, unless it is all there is.
    """
    pieces: list[Tensor] = []
    total = 0
    for ids in documents:
        if pieces and separator is not None and pieces[-1][-1] != separator:
            pieces.append(torch.tensor([separator]))
            total += 1
        pieces.append(ids)
        total += len(ids)
        if total >= num_samples * seq_len:
            break
    if not pieces:
        return []
    stream = torch.cat(pieces)
    rows = min(num_samples, total // seq_len)
    if rows == 0:
        return [Sample(stream)]
    return [Sample(row) for row in stream[: rows * seq_len].view(rows, seq_len)]


def openings_of(samples: Sequence[Sample], count: int, seq_len: int, seed: int) -> Tensor:
    """int64 [count, P]: P neighbouring tokens (at most 16, and half of `seq_len`) from random places of random samples."""
    counted = [sample.counted() for sample in samples]
    length = max(1, min(_OPENING, seq_len // 2, *map(len, counted)))
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in torch.randint(len(counted), (count,), generator=generator).tolist():
        at = int(torch.randint(len(counted[i]) - length + 1, (1,), generator=generator))
        rows.append(counted[i][at : at + length])
    return torch.stack(rows)


def to_batches(samples: Sequence[Sample], batch_size: int, pad_token_id: int, source: str) -> list[Batch]:
    """Group samples, padding each batch on the right to its longest row; masks only where something is masked."""
    batches = []
    for start in range(0, len(samples), batch_size):
        rows = samples[start : start + batch_size]
        shape = (len(rows), max(len(row.ids) for row in rows))
        ids = torch.full(shape, pad_token_id, dtype=torch.int64)
        mask = torch.zeros(shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row.ids)] = row.ids
            mask[i, : len(row.ids)] = True if row.mask is None else row.mask
        batches.append(Batch(ids, None if mask.all() else mask, source))
    return batches


def warn_if_small(total_tokens: int, num_params: int) -> None:
    """Warn (CalibrationWarning) where a model is large enough for too little data to cost accuracy."""
    if num_params >= LARGE_MODEL and total_tokens < ENOUGH_TOKENS:
        warnings.warn(
            f"{total_tokens:,} calibration tokens for a model of {num_params / 1e9:.1f} billion parameters: published "
            f"results use {ENOUGH_TOKENS:,} (128 x 2048), fewer may cost accuracy; raise num_samples or seq_len",
            CalibrationWarning,
            stacklevel=2,
        )


def describe(batches: Sequence[Batch]) -> str:
    """One line on what is used: samples, their length, tokens that count, source."""
    samples = sum(len(b.input_ids) for b in batches)
    lengths = sorted({b.input_ids.shape[1] for b in batches})
    span = str(lengths[0]) if len(lengths) == 1 else f"{lengths[0]}-{lengths[-1]}"
    tokens = sum(b.tokens for b in batches)
    padded = ", padded" if any(b.attention_mask is not None for b in batches) else ""
    sources = ", ".join(dict.fromkeys(b.source for b in batches if b.source)) or "token ids"
    return f"{samples} samples x {span} = {tokens:,} tokens{padded} from {sources}"


def fingerprint(batches: Sequence[Batch]) -> str:
    """sha256 (hex) over every batch's shape, ids and mask: equal exactly where the model is given the same."""
    digest = hashlib.sha256()
    for batch in batches:
        ids = batch.input_ids.to(torch.int64).contiguous()
        mask = torch.ones_like(ids) if batch.attention_mask is None else batch.attention_mask
        digest.update(repr(tuple(ids.shape)).encode())
        digest.update(ids.numpy().tobytes())
        digest.update(mask.to(torch.uint8).contiguous().numpy().tobytes())
    return digest.hexdigest()
