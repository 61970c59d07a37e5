"""Calibration data: every kind of source, packing, padding, and the errors on the way."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.tiny_models import POSITIONS, VOCABULARY
from woq.calibration import (
    Batch,
    CalibrationWarning,
    calibration_batches,
    describe,
    fingerprint,
    warn_if_small,
)
from woq.calibration.batches import pack
from woq.calibration.sources import DATASETS, SHUFFLE_BUFFER, shuffled
from woq.errors import CalibrationError

EOS = 2


class Letters:
    """A tokenizer with one token a character: ord - 90, so that "a" is 7."""

    eos_token_id = EOS

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [max(3, ord(c) - 90) for c in text]}


def batches(source: Any, **options: Any) -> list[Batch]:
    """`calibration_batches` with a tokenizer, few samples, and shortage of data no matter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        return calibration_batches(
            source, **{"tokenizer": Letters(), "num_samples": 4, "seq_len": 8, **options}
        )


def rows(found: list[Batch]) -> list[list[int]]:
    """All samples' ids."""
    return [row for batch in found for row in batch.input_ids.tolist()]


# --- packing ----------------------------------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.integers(3, 99), min_size=1, max_size=20), min_size=1, max_size=10),
    st.integers(1, 16),
    st.integers(1, 8),
)
def test_packed_rows_are_the_joined_documents_cut(
    documents: list[list[int]], seq_len: int, count: int
) -> None:
    joined: list[int] = []
    for i, document in enumerate(documents):
        joined += ([EOS] if i else []) + document
    found = [row.ids.tolist() for row in pack(map(torch.tensor, documents), seq_len, count, EOS)]
    if len(joined) < seq_len:
        assert found == [joined]
    else:
        whole = min(count, len(joined) // seq_len)
        assert found == [joined[i * seq_len : (i + 1) * seq_len] for i in range(whole)]


def test_pack_reads_no_more_than_it_needs() -> None:
    def endless() -> Iterator[Tensor]:
        while True:
            yield torch.arange(5)

    assert len(pack(endless(), 7, 3)) == 3


def test_separator_is_not_doubled() -> None:
    (row,) = pack(iter([torch.tensor([5, EOS]), torch.tensor([6])]), 3, 1, EOS)
    assert row.ids.tolist() == [5, EOS, 6]


def test_shuffle_is_a_permutation_set_by_the_seed() -> None:
    texts = [str(i) for i in range(SHUFFLE_BUFFER + 50)]
    once, again, other = (list(shuffled(iter(texts), seed)) for seed in (1, 1, 2))
    assert once == again
    assert once != other
    assert sorted(once) == sorted(texts) == sorted(other)


# --- sources ----------------------------------------------------------------------------------------------------


def test_texts_are_packed_full_and_the_same_by_seed() -> None:
    texts = ["abcdef", "ghijkl", "mnopqr", "stuvwx", "  ", "yzabcd"]
    once, again, other = (batches(texts, seed=seed) for seed in (1, 1, 3))
    assert [b.attention_mask for b in once] == [None]
    assert once[0].input_ids.shape == (4, 8)
    assert fingerprint(once) == fingerprint(again) != fingerprint(other)
    assert EOS in once[0].input_ids


def test_num_samples_are_used_whatever_the_batch_size() -> None:
    """neural-compressor runs none where num_samples <= batch_size, and one batch too few otherwise."""
    for batch_size in (1, 3, 4, 100):
        found = batches(["abcdefgh" * 20], num_samples=4, batch_size=batch_size)
        assert len(rows(found)) == 4
        assert max(len(b.input_ids) for b in found) <= batch_size


def test_less_than_a_window_is_used_and_said() -> None:
    with pytest.warns(CalibrationWarning, match="gave 1 samples of up to 2048 tokens, 128 were asked for"):
        found = calibration_batches(["abc"], tokenizer=Letters())
    assert rows(found) == [[7, 8, 9]]


def test_padding_keeps_a_text_a_row_and_masks_the_rest() -> None:
    (batch,) = batches(["abcdefghijk", "abc"], padding=True, pad_token_id=1)
    by_length = sorted(zip(batch.input_ids.tolist(), batch.attention_mask.tolist(), strict=True))
    assert by_length[0] == ([7, 8, 9, 1, 1, 1, 1, 1], [True] * 3 + [False] * 5)
    assert by_length[1] == (list(range(7, 15)), [True] * 8)
    assert batch.tokens == 11
    assert batch.attention_mask.dtype == torch.bool


EQUAL_ROWS = [[3, 4, 5], [6, 7, 8]]


@pytest.mark.parametrize(
    "source",
    [
        torch.tensor(EQUAL_ROWS),
        torch.tensor(EQUAL_ROWS, dtype=torch.int32),
        EQUAL_ROWS,
        tuple(torch.tensor(row) for row in EQUAL_ROWS),
        [{"input_ids": row} for row in EQUAL_ROWS],
        [{"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, 3)} for row in EQUAL_ROWS],
        {"input_ids": EQUAL_ROWS, "attention_mask": [[1, 1, 1], [1, 1, 1]]},
        DataLoader(TensorDataset(torch.tensor(EQUAL_ROWS))),
        DataLoader(TensorDataset(torch.tensor(EQUAL_ROWS), torch.tensor(EQUAL_ROWS)), batch_size=2),
        DataLoader(torch.tensor(EQUAL_ROWS), batch_size=2),
        DataLoader([{"input_ids": torch.tensor(row)} for row in EQUAL_ROWS]),
        [((torch.tensor([row]), torch.ones(1, 3)), torch.tensor([2])) for row in EQUAL_ROWS],
        [Batch(torch.tensor(EQUAL_ROWS))],
        (row for row in EQUAL_ROWS),
    ],
    ids=lambda source: type(source).__name__,
)
def test_rows_of_one_length_are_used_as_they_are(source: Any) -> None:
    found = batches(source)
    assert rows(found) == EQUAL_ROWS
    assert all(b.attention_mask is None and b.input_ids.dtype == torch.int64 for b in found)


def test_longer_rows_are_cut_and_a_single_long_row_is_a_stream() -> None:
    assert rows(batches([list(range(3, 23)), list(range(30, 50))])) == [
        list(range(3, 11)),
        list(range(30, 38)),
    ]
    assert rows(batches(torch.arange(3, 30)[None])) == [
        list(range(3, 11)),
        list(range(11, 19)),
        list(range(19, 27)),
    ]
    assert rows(batches(list(range(3, 20)))) == [list(range(3, 11)), list(range(11, 19))]


def test_ragged_rows_are_packed_without_what_is_masked() -> None:
    source = [
        {"input_ids": [5, 6, 0, 0], "attention_mask": [1, 1, 0, 0]},
        {"input_ids": [7, 8, 9], "attention_mask": [1, 1, 1]},
    ]
    assert rows(batches(source, seq_len=3)) == [[5, 6, EOS], [7, 8, 9]]
    (padded,) = batches(source, seq_len=3, padding=True, pad_token_id=0)
    assert padded.input_ids.tolist() == [[5, 6, 0], [7, 8, 9]]
    assert padded.attention_mask.tolist() == [[True, True, False], [True] * 3]


@pytest.mark.parametrize("style", ["dict", "tuple"])
def test_masks_of_equal_rows_are_kept(style: str) -> None:
    ids, mask = torch.tensor([[1, 5, 6], [7, 8, 9]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    source = [{"input_ids": ids, "attention_mask": mask}] if style == "dict" else [(ids, mask)]
    (batch,) = batches(source)
    assert torch.equal(batch.input_ids, ids)
    assert torch.equal(batch.attention_mask, mask.bool())


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("column", ["text", "prompt", "code", "content"])
def test_files(tmp_path: Path, kind: str, column: str) -> None:
    texts = ["abcdefgh", "ijklmnop"]
    path = tmp_path / f"data{kind}"
    records = [{"other": 1, column: text} for text in texts]
    if kind == ".txt":
        path.write_text("\n".join(texts))
    elif kind == ".jsonl":
        path.write_text("\n".join(map(json.dumps, records)))
    elif kind == ".json":
        path.write_text(json.dumps(records))
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        from pyarrow import Table

        parquet.write_table(Table.from_pylist(records), path)
    for source in (path, str(path)):
        found = batches(source, num_samples=2)
        assert found[0].input_ids.shape == (2, 8)
        assert found[0].source == path.name
        assert {7, 15} <= set(found[0].input_ids.flatten().tolist())


def test_a_parquet_file_may_hold_ids(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import Table

    parquet.write_table(
        Table.from_pylist([{"input_ids": row} for row in EQUAL_ROWS]), tmp_path / "ids.parquet"
    )
    assert rows(batches(tmp_path / "ids.parquet")) == EQUAL_ROWS


def test_a_datasets_dataset() -> None:
    datasets = pytest.importorskip("datasets")
    assert rows(batches(datasets.Dataset.from_dict({"input_ids": EQUAL_ROWS}))) == EQUAL_ROWS
    texts = datasets.Dataset.from_dict({"text": ["abcdefgh", None, "abcdefgh"]})
    assert rows(batches(texts, num_samples=1)) == [list(range(7, 15))]


@pytest.mark.parametrize("name", [*DATASETS, "NeelNanda/pile-10k"])
def test_a_dataset_by_name_is_streamed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []

    def load_dataset(path: str, config: str | None, **options: Any) -> Iterator[dict[str, str]]:
        asked.append((path, options))
        while True:  # endless: reading it all would hang
            yield {"text": "abcdefgh\n", "sentence": "abcdefgh"}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    found = batches(name, num_samples=3)
    assert found[0].input_ids.shape == (3, 8)
    path, options = asked[0]
    assert path == (DATASETS[name].path if name in DATASETS else name)
    assert options["streaming"]
    assert options["split"] == "train"


def test_an_unreachable_dataset_says_what_to_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(
        CalibrationError, match=r"'wikitext2' cannot be loaded: Couldn't reach.*\n.*list of texts"
    ):
        batches("wikitext2")


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "holds no text"),
        ([" ", ""], "holds no text"),
        (5, "int is no calibration source"),
        ([1.5], "sample 0 is 1.5"),
        ([[1, 2], None], "sample 1 is None"),
        ([[3], []], "sample 1 is empty"),
        ([[3, 4], [5, -1]], "sample 1: token id -1 at position 1"),
        ([[3, 4], [5, VOCABULARY]], f"sample 1: token id {VOCABULARY} at position 1.*below the vocabulary's {VOCABULARY}"),
        (torch.rand(2, 3), "sample 0 is torch.float32"),
        (torch.ones(2, 3, dtype=torch.bool), "sample 0 is torch.bool"),
        (torch.ones(2, 3, 4, dtype=torch.int64), r"sample 0 is torch.int64 \[2, 3, 4\]"),
        ([{"input_ids": [3, 4], "attention_mask": [1]}], r"attention_mask is torch.int64 \[1\]"),
        ([{"input_ids": [3, 4], "attention_mask": [1, 2]}], "expected 0 and 1"),
        ([{"input_ids": [3, 4], "attention_mask": [0, 0]}], "leaves no token"),
        ([{"label": 1}], r"columns \['label'\]"),
        (["abc", [1, 2]], "sample 1 is no text"),
        ([[1, 2], "abc"], "sample 1 is a text"),
        (["abc\u3042"], "token id .*below the vocabulary's"),
        ("no/such/file.jsonl", "'no/such/file.jsonl' does not exist"),
        (Path("no/such/folder"), "does not exist"),
        ("Once upon a time", "no file and no data set name"),
    ],
)  # fmt: skip
def test_unusable_sources(source: Any, message: str, tiny_model: Callable[[str], nn.Module]) -> None:
    with pytest.raises(CalibrationError, match=message):
        batches(source, model=tiny_model("llama"))


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", b"{"), ("a.txt", b"\xff\xfe"), ("a.parquet", b"PAR1"), ("a.csv", b"a")]
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=f"calibration file '{name}'"):
        batches(tmp_path / name)


def test_texts_need_a_tokenizer_and_sampling_a_model() -> None:
    with pytest.raises(CalibrationError, match="need a tokenizer"):
        batches(["abc"], tokenizer=None)
    with pytest.raises(CalibrationError, match="from a model"):
        batches("self")
    with pytest.raises(CalibrationError, match="tokenizer 'no/such/tokenizer' cannot be loaded"):
        batches(["abc"], tokenizer=Path("no/such/tokenizer"))


@pytest.mark.parametrize("option", ["num_samples", "seq_len", "batch_size"])
def test_options_must_be_positive(option: str) -> None:
    with pytest.raises(CalibrationError, match=f"{option}=0"):
        batches(["abc"], **{option: 0})


def test_seq_len_is_capped_to_the_model(
    tiny_model: Callable[[str], nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    found = batches(["abcdefgh" * 100], model=tiny_model("gpt2"), seq_len=2048, num_samples=1)
    assert found[0].input_ids.shape == (1, POSITIONS)
    assert f"cut to the {POSITIONS} positions" in caplog.text
    assert f"1 samples x {POSITIONS}" in caplog.text


# --- what is told -----------------------------------------------------------------------------------------------


def test_few_tokens_are_warned_of_where_it_matters() -> None:
    warn_if_small(1000, 135_000_000)  # a warning would be an error here
    warn_if_small(128 * 2048, 8_000_000_000)
    with pytest.warns(CalibrationWarning, match=r"1,000 calibration tokens .* 8\.0 billion .* 262,144"):
        warn_if_small(1000, 8_000_000_000)


def test_describe_is_one_line() -> None:
    mask = torch.tensor([[True] * 3 + [False]])
    found = [
        Batch(torch.ones(2, 4, dtype=torch.int64), source="a.txt"),
        Batch(torch.ones(1, 4), mask, "a.txt"),
    ]
    assert describe(found) == "3 samples x 4 = 11 tokens, padded from a.txt"


def test_fingerprint_sees_ids_masks_and_shapes() -> None:
    ids = torch.arange(6).view(2, 3)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    variants = [
        [Batch(ids)],
        [Batch(ids, mask)],
        [Batch(ids + 1)],
        [Batch(ids.view(3, 2))],
        [Batch(ids[:1]), Batch(ids[1:])],
    ]
    assert len({fingerprint(v) for v in variants}) == len(variants)
    assert fingerprint([Batch(ids)]) == fingerprint([Batch(ids.int(), torch.ones_like(ids))])


def test_import_loads_neither_datasets_nor_transformers() -> None:
    check = "import sys, woq.calibration, woq.evaluation; print({'datasets', 'transformers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
