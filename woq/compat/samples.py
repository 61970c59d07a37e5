"""Calibration data as other libraries hand it over: batches of token ids from a loader, to rows one by one."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from woq.calibration.sources import RawIds, open_source
from woq.errors import CalibrationError


def token_rows(source: Any) -> Iterator[Tensor]:
    """The rows of token ids in a loader's batches, int64 [L] each, without what an attention mask leaves out.

    Raises CalibrationError where the source yields texts, or nothing that holds ids.
    """
    _, records = open_source(source, 1)
    for index, record in enumerate(records):
        if not isinstance(record, RawIds):
            raise CalibrationError(
                f"calibration sample {index} is a text", hint="a loader of token ids: tokenize it first"
            )
        ids = torch.as_tensor(record.ids).long()
        yield ids if record.mask is None else ids[torch.as_tensor(record.mask).bool()]


def windows(source: Any, count: int, length: int, *, full: bool, seed: int = 0) -> list[Tensor]:
    """`count` rows of at most `length` tokens; from a longer one a window at a place drawn from `seed`.

    full: only rows that have `length` tokens are taken. Raises CalibrationError where none are left.
    """
    draw = random.Random(seed)
    long_enough = (row for row in token_rows(source) if len(row) >= (length if full else 1))
    found = []
    for row in itertools.islice(long_enough, count):
        start = draw.randint(0, max(0, len(row) - length))
        found.append(row[start : start + length])
    if not found:
        raise CalibrationError(
            f"the loader holds no sample of {length} tokens" if full else "the loader holds no sample",
            hint="a smaller length, or rows of any length" if full else "batches of token ids",
        )
    return found
