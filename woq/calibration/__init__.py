"""Calibration data: texts, files, data sets, loaders or token ids in; checked token batches out.

    open_source (sources.py) -> texts and rows -> pack or pad (batches.py) -> list[Batch]
    "self" (sampling.py)     -> rows the model wrote itself ------------------^

The default is `"self"`: it needs no network and no licence. Everything asked for is used: where data runs short, that
is said, never papered over.
"""

from __future__ import annotations

import functools
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from woq.calibration.batches import (
    Batch,
    CalibrationWarning,
    Sample,
    checked_sample,
    describe,
    fingerprint,
    openings_of,
    pack,
    to_batches,
    vocabulary_size,
    warn_if_small,
)
from woq.calibration.sampling import Progress, sample_from_model
from woq.calibration.sources import OFFLINE_HINT, RawIds, open_source, shuffled
from woq.errors import CalibrationError

__all__ = [
    "Batch",
    "CalibrationWarning",
    "calibration_batches",
    "describe",
    "fingerprint",
    "sample_from_model",
    "warn_if_small",
]

log = logging.getLogger(__name__)


def calibration_batches(  # noqa: PLR0913 - the knobs users know from INC, IPEX and transformers
    source: Any = None,
    *,
    tokenizer: Any = None,
    model: nn.Module | None = None,
    num_samples: int = 128,
    seq_len: int = 2048,
    batch_size: int = 8,
    seed: int = 42,
    padding: bool = False,
    pad_token_id: int | None = None,
    own_samples: int = 0,
    progress: Progress | None = None,
) -> list[Batch]:
    """At most `num_samples` samples of at most `seq_len` tokens, `batch_size` to a batch.

    source: None or "self" (text sampled from `model`); a list of texts; token ids (an integer tensor [n, L], a list of
        rows, of 1-D tensors, of dicts with input_ids and maybe attention_mask, or of `Batch`); the path of a .txt, .jsonl, .json
        or .parquet file; a `DataLoader` that yields tensors, tuples or dicts; a `datasets.Dataset`; or a data set's
        name: wikitext2, c4, c4-new, ptb, ptb-new, or any id on the Hugging Face hub. Tables: column input_ids, text,
        prompt, code or content.
    Texts are shuffled by `seed`, joined with the tokenizer's eos between documents, and cut into windows. With
    `padding` each text is a sample of its own, cut to `seq_len`, padded on the right and masked. Rows of token ids
    are used in the order given: as they are where all have one length (a single long row is cut into windows), else
    packed or padded like texts. `seq_len` is capped to what the model has positions for.
    `own_samples` more are written by `model`: every other one goes on with some tokens of the data (`openings_of`).
    `tokenizer` may be a folder's or a hub model's name. `progress(done, total)` counts tokens while the
    model writes text.

    Raises CalibrationError on anything unusable, naming sample and value; warns (CalibrationWarning) where there is
    less data than asked for.
    """
    if min(num_samples, seq_len, batch_size) < 1:
        raise CalibrationError(f"{num_samples=}, {seq_len=} and {batch_size=} must be at least 1")
    seq_len = _capped(seq_len, model)
    tokenizer = _loaded(tokenizer)
    write = functools.partial(_written, seq_len, model, tokenizer)
    if source is None or (isinstance(source, str) and source == "self"):
        label = "text sampled from the model itself"
        samples = write(num_samples, seed, progress)
    else:
        label, records = open_source(source, seq_len)
        read = _Reader(tokenizer, vocabulary_size(model), num_samples, seq_len, padding)
        samples = read.samples(records, seed)
    if not samples:
        raise CalibrationError(
            f"calibration source ({label}) holds no text and no token ids", hint=OFFLINE_HINT
        )
    pad = _pad_id(pad_token_id, tokenizer)
    batches = to_batches(samples, batch_size, pad, label)
    if own_samples:
        written = _own_text(write, samples, own_samples, seq_len, seed, progress)
        batches += to_batches(written, batch_size, pad, "the model itself")
    _report(batches, num_samples + own_samples, seq_len, model)
    return batches


def _own_text(
    write: Callable[..., list[Sample]],
    data: Sequence[Sample],
    count: int,
    seq_len: int,
    seed: int,
    progress: Progress | None,
) -> list[Sample]:
    """In turn, samples that go on with some tokens of `data`, to stay with what the user cares for, and samples that begin
    as the model's texts do, whose beginnings the data may lack."""
    going_on = count // 2

    def after(done: int) -> Progress | None:
        return None if progress is None else lambda more, _: progress(done * seq_len + more, count * seq_len)

    samples: list[Sample] = []
    if going_on:
        openings = openings_of(data, going_on, seq_len, seed)
        samples = write(going_on, seed, after(0), openings)
    begun = write(count - going_on, seed + 1, after(going_on))
    return [sample for pair in itertools.zip_longest(samples, begun) for sample in pair if sample is not None]


def _written(
    seq_len: int,
    model: nn.Module | None,
    tokenizer: Any,
    count: int,
    seed: int,
    progress: Progress | None,
    openings: Tensor | None = None,
) -> list[Sample]:
    """Samples that the model writes, going on with `openings` where there are some."""
    if model is None:
        raise CalibrationError("text can only be sampled from a model, and none was given", hint=OFFLINE_HINT)
    rows = sample_from_model(
        model,
        num_samples=count,
        seq_len=seq_len,
        seed=seed,
        openings=openings,
        tokenizer=tokenizer,
        progress=progress,
    )
    return [Sample(row) for row in rows]


class _Reader:
    """Records to samples, under the options of one call."""

    def __init__(
        self, tokenizer: Any, vocab_size: int | None, num_samples: int, seq_len: int, padding: bool
    ) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.num_samples, self.seq_len, self.padding = num_samples, seq_len, padding
        self.separator: int | None = getattr(tokenizer, "eos_token_id", None)

    def samples(self, records: Iterator[str | RawIds], seed: int) -> list[Sample]:
        first = next(records, None)
        if first is None:
            return []
        records = itertools.chain([first], records)
        if isinstance(first, str):
            return self._packed_or_cut(self._tokenized(shuffled(_texts(records), seed)))
        rows = self._rows(records)
        head = list(itertools.islice(rows, self.num_samples))
        lengths = {len(row.ids) for row in head}
        if len(lengths) == 1 and (len(head) > 1 or lengths.pop() <= self.seq_len):
            return [row.cut(self.seq_len) for row in head]
        return self._packed_or_cut(itertools.chain(head, rows))

    def _packed_or_cut(self, rows: Iterator[Sample]) -> list[Sample]:
        documents = (row.counted() for row in rows)
        if self.padding:
            return [Sample(ids[: self.seq_len]) for ids in itertools.islice(documents, self.num_samples)]
        return pack(documents, self.seq_len, self.num_samples, self.separator)

    def _tokenized(self, texts: Iterator[str]) -> Iterator[Sample]:
        if self.tokenizer is None:
            raise CalibrationError("texts need a tokenizer, and none was given", hint="pass tokenizer=...")
        for index, text in enumerate(texts):
            encoded = self.tokenizer(text, verbose=False)
            ids = encoded["input_ids"] if isinstance(encoded, Mapping) else encoded
            if len(ids) > 0:
                yield checked_sample(ids, None, index, self.vocab_size)

    def _rows(self, records: Iterator[str | RawIds]) -> Iterator[Sample]:
        for index, record in enumerate(records):
            if isinstance(record, str):
                raise CalibrationError(f"calibration sample {index} is a text among token ids: pass one kind")
            yield checked_sample(record.ids, record.mask, index, self.vocab_size)


def _texts(records: Iterator[str | RawIds]) -> Iterator[str]:
    for index, record in enumerate(records):
        if not isinstance(record, str):
            raise CalibrationError(f"calibration sample {index} is no text among texts: pass one kind")
        yield record


def _capped(seq_len: int, model: nn.Module | None) -> int:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text, "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < seq_len:
        log.info("seq_len %d is cut to the %d positions this model has", seq_len, positions)
        return positions
    return seq_len


def _loaded(tokenizer: Any) -> Any:
    """`tokenizer` itself, or the one that a name stands for (transformers' GPTQConfig takes both)."""
    if not isinstance(tokenizer, str | Path):
        return tokenizer
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        raise CalibrationError(f"tokenizer {str(tokenizer)!r} cannot be loaded: {error}") from error


def _pad_id(pad_token_id: int | None, tokenizer: Any) -> int:
    """The id under the mask: never seen by a statistic, but the embedding looks it up."""
    choices = (
        pad_token_id,
        getattr(tokenizer, "pad_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    )
    return next((choice for choice in choices if choice is not None), 0)


def _report(batches: Sequence[Batch], num_samples: int, seq_len: int, model: nn.Module | None) -> None:
    log.info("calibration: %s", describe(batches))
    found = sum(len(b.input_ids) for b in batches)
    if found < num_samples:
        warnings.warn(
            f"calibration data gave {found} samples of up to {seq_len} tokens, {num_samples} were asked for; "
            "going on with these",
            CalibrationWarning,
            stacklevel=3,
        )
    if model is not None:
        warn_if_small(sum(b.tokens for b in batches), sum(p.numel() for p in model.parameters()))
