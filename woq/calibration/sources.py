"""What a user may pass as calibration data, turned into one stream of texts and rows of ids.

Everything is read lazily, so that a terabyte corpus costs no more than the samples taken from it. Files and data sets
are told apart by name alone; what a record holds is told by its type.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from woq.calibration.batches import Batch
from woq.errors import CalibrationError

TEXT_COLUMNS = ("text", "prompt", "code", "content")  # the first that exists is used
FILE_KINDS = (".txt", ".jsonl", ".json", ".parquet")
SHUFFLE_BUFFER = 10_000  # documents held while shuffling
CHARACTERS_PER_TOKEN = 5  # a passage of seq_len x this fills about one row
OFFLINE_HINT = 'pass a list of texts, a .txt/.jsonl/.parquet file, or "self" (text the model writes itself)'


@dataclass(frozen=True)
class RawIds:
    """A row of ids as the user gave it, not yet checked."""

    ids: Any
    mask: Any = None


@dataclass(frozen=True)
class HubDataset:
    """Where a data set with a short name lives. `lines`: its rows are lines of running text, not documents."""

    path: str
    name: str | None = None
    data_files: str | None = None
    revision: str | None = None
    column: str | None = None
    lines: bool = False


_C4 = HubDataset("allenai/c4", data_files="en/c4-train.00000-of-01024.json.gz")
_PTB = HubDataset(
    "ptb-text-only/ptb_text_only", revision="refs/convert/parquet", column="sentence", lines=True
)
DATASETS = {
    "wikitext2": HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1", lines=True),
    "c4": _C4,
    "c4-new": _C4,  # as in GPTQ: the -new variants differ in the validation split only
    "ptb": _PTB,
    "ptb-new": _PTB,
}


def open_source(source: Any, seq_len: int) -> tuple[str, Iterator[str | RawIds]]:
    """What `source` is in words, and its records in order.

    Raises CalibrationError where it cannot be opened, at once or when the records are read.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        if path.is_file():
            return path.name, _records(_read_file(path, CHARACTERS_PER_TOKEN * seq_len))
        name = str(source)
        if path.suffix in FILE_KINDS or isinstance(source, Path):
            raise CalibrationError(f"calibration file {name!r} does not exist", hint=OFFLINE_HINT)
        if any(c.isspace() for c in name):
            raise CalibrationError(
                f"calibration source {name!r:.80} is no file and no data set name",
                hint="wrap texts in a list",
            )
        return name, _records(_read_dataset(name, CHARACTERS_PER_TOKEN * seq_len))
    if isinstance(source, Tensor | Mapping) or _is_flat_ids(source):
        return "token ids", _records([source])
    if not isinstance(source, Iterable):
        raise CalibrationError(f"{type(source).__name__} is no calibration source", hint=OFFLINE_HINT)
    kind = "texts" if isinstance(source, list | tuple) and isinstance(next(iter(source), 0), str) else ""
    return kind or f"a {type(source).__name__}", _records(source)


def shuffled(texts: Iterator[str], seed: int) -> Iterator[str]:
    """`texts` in an order drawn from `seed`, holding SHUFFLE_BUFFER of them at a time."""
    draw = random.Random(seed)
    held: list[str] = []
    for text in texts:
        if len(held) < SHUFFLE_BUFFER:
            held.append(text)
            continue
        at = draw.randrange(SHUFFLE_BUFFER)
        yield held[at]
        held[at] = text
    draw.shuffle(held)
    yield from held


def _is_flat_ids(source: Any) -> bool:
    return (
        isinstance(source, list | tuple)
        and len(source) > 0
        and all(isinstance(entry, int) and not isinstance(entry, bool) for entry in source)
    )


def _records(items: Iterable[Any]) -> Iterator[str | RawIds]:
    for index, item in enumerate(items):
        yield from _record(item, index)


def _record(item: Any, index: int) -> Iterator[str | RawIds]:
    """The texts or rows in one entry of a source: a text, a row, a batch of rows, or a data loader's tuple or dict."""
    if isinstance(item, str):
        if item.strip():
            yield item
    elif isinstance(item, Batch):
        yield from _rows(item.input_ids, item.attention_mask)
    elif isinstance(item, Mapping):
        yield from _mapping_record(item, index)
    elif isinstance(item, list | tuple) and item and not isinstance(item[0], int):
        yield from _sequence_record(item, index)
    elif item is None or isinstance(item, bool | int | float | bytes):
        raise CalibrationError(
            f"calibration sample {index} is {item!r:.80}, expected a text or token ids", hint=OFFLINE_HINT
        )
    else:
        yield from _rows(item, None)


def _sequence_record(item: Sequence[Any], index: int) -> Iterator[str | RawIds]:
    """A data loader's batch: texts, (input_ids[, attention_mask], ...), ((input_ids, ...), labels), or lists of ids."""
    first = item[0]
    if isinstance(first, str):
        for text in item:
            yield from _record(text, index)
    elif isinstance(first, Tensor):
        yield from _rows(first, item[1] if len(item) > 1 and _is_mask_of(item[1], first) else None)
    elif isinstance(first, list | tuple) and first and isinstance(first[0], int):
        yield from _rows(item, None)
    else:
        yield from _record(first, index)


def _mapping_record(item: Mapping[str, Any], index: int) -> Iterator[str | RawIds]:
    if "input_ids" in item:
        yield from _rows(item["input_ids"], item.get("attention_mask"))
        return
    column = next((name for name in TEXT_COLUMNS if name in item), None)
    if column is None:
        raise CalibrationError(
            f"calibration sample {index} has the columns {sorted(map(str, item))}; "
            f"none of input_ids, {', '.join(TEXT_COLUMNS)}",
            hint="rename the column that holds the text, or pass a list of texts",
        )
    if item[column] is not None:  # tables have empty cells
        yield from _record(item[column], index)


def _rows(ids: Any, mask: Any) -> Iterator[RawIds]:
    """[L] is one row; [n, L], or a list of rows, are n."""
    nested = ids.dim() == 2 if isinstance(ids, Tensor) else _is_list_of_rows(ids)
    if not nested:
        yield RawIds(ids, mask)
        return
    if mask is not None and len(mask) != len(ids):
        raise CalibrationError(f"attention_mask has {len(mask)} rows, input_ids {len(ids)}")
    for i, row in enumerate(ids):
        yield RawIds(row, None if mask is None else mask[i])


def _is_list_of_rows(ids: Any) -> bool:
    return hasattr(ids, "__len__") and len(ids) > 0 and hasattr(ids[0], "__len__")


def _is_mask_of(value: Any, ids: Tensor) -> bool:
    """Whether a loader's second tensor is a mask rather than labels: same shape, nothing but 0 and 1."""
    return (
        isinstance(value, Tensor) and value.shape == ids.shape and bool(((value == 0) | (value == 1)).all())
    )


def _read_file(path: Path, passage: int) -> Iterator[Any]:
    if path.suffix not in FILE_KINDS:
        raise CalibrationError(f"calibration file {path.name!r}: kind not known", hint=f"one of {FILE_KINDS}")
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
        return
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix == ".txt":
                yield from _passages(file, passage)
            elif path.suffix == ".jsonl":
                yield from (json.loads(line) for line in file if line.strip())
            else:
                value = json.load(file)
                yield from value if isinstance(value, list) and not _is_flat_ids(value) else [value]
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or not JSON
        raise CalibrationError(f"calibration file {path.name!r} cannot be read: {error}") from error


def _read_parquet(path: Path) -> Iterator[Any]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
        names = file.schema_arrow.names
        wanted = [n for n in ("input_ids", "attention_mask") if "input_ids" in names and n in names]
        wanted = wanted or [n for n in TEXT_COLUMNS if n in names][:1] or names
        for batch in file.iter_batches(batch_size=256, columns=wanted):
            yield from batch.to_pylist()
    except (OSError, ArrowException) as error:
        raise CalibrationError(f"calibration file {path.name!r} cannot be read: {error}") from error


def _read_dataset(name: str, passage: int) -> Iterator[Any]:
    """Rows of the `train` split of a data set by its name on the Hugging Face hub, or of a local folder."""
    from datasets import load_dataset

    at = DATASETS.get(name, HubDataset(name))
    try:
        rows: Iterable[Any] = load_dataset(
            at.path, at.name, data_files=at.data_files, revision=at.revision, split="train", streaming=True
        )
        if at.column is not None:
            rows = ({"text": row[at.column]} for row in rows)
        yield from _passages((row["text"] for row in rows), passage) if at.lines else rows
    except CalibrationError:
        raise
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # no network, no such name, or a script that needs trust
        raise CalibrationError(
            f"data set {name!r} cannot be loaded: {error}",
            hint=f"{OFFLINE_HINT}; or download it first with the `datasets` library",
        ) from error


def _passages(lines: Iterable[str], size: int) -> Iterator[str]:
    """Running text cut at line ends into passages of about `size` characters, so that shuffling reaches all of it."""
    held: list[str] = []
    length = 0
    for line in lines:
        held.append(line if line.endswith("\n") else line + "\n")
        length += len(held[-1])
        if length >= size:
            yield "".join(held)
            held, length = [], 0
    if held:
        yield "".join(held)
