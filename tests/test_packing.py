"""Packing and unpacking are inverses, for every width, word and length; a code out of range stays in its field."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from woq.packing import (
    WORD_BITS,
    dense_words,
    floor_words,
    pack_dense,
    pack_floor,
    unpack_dense,
    unpack_floor,
)

BITS = st.integers(2, 8)
SIZES = st.tuples(st.integers(1, 100), st.integers(1, 5))
SEEDS = st.integers(0, 2**31)


def random_codes(shape: tuple[int, int], bits: int, seed: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, shape, generator=generator).to(dtype)


def bits_of(words: list[int], width: int) -> list[int]:
    """The words as one little-endian bit string."""
    return [(word >> i) & 1 for word in words for i in range(width)]


@given(BITS, SIZES, SEEDS)
@settings(max_examples=150, deadline=None)
def test_dense_inverse(bits: int, size: tuple[int, int], seed: int) -> None:
    codes = random_codes(size, bits, seed)
    words = pack_dense(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (dense_words(size[0], bits), size[1])
    assert torch.equal(unpack_dense(words, bits, size[0]), codes)


@given(BITS, SIZES, SEEDS, st.sampled_from(sorted(WORD_BITS, key=str)))
@settings(max_examples=200, deadline=None)
def test_floor_inverse(bits: int, size: tuple[int, int], seed: int, word: torch.dtype) -> None:
    codes = random_codes(size, bits, seed).t()
    words = pack_floor(codes, bits, word)
    assert words.dtype == word
    assert words.shape == (size[1], floor_words(size[0], bits, word))
    assert torch.equal(unpack_floor(words, bits, size[0]), codes)


@given(BITS, st.integers(1, 70), SEEDS)
@settings(max_examples=60, deadline=None)
def test_dense_is_one_bit_string(bits: int, length: int, seed: int) -> None:
    """Code i in bits [i*b, i*b+b) of the column's words, the rest zero: the layout itself, not only its inverse."""
    codes = random_codes((length, 1), bits, seed)
    words = [int(w) & 0xFFFFFFFF for w in pack_dense(codes, bits).flatten()]
    expected = bits_of([int(c) for c in codes.flatten()], bits)
    got = bits_of(words, 32)
    assert got[: len(expected)] == expected
    assert not any(got[len(expected) :])


@pytest.mark.parametrize("word", sorted(WORD_BITS, key=str), ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
def test_floor_leaves_the_top_bits_unused(bits: int, word: torch.dtype) -> None:
    width, per_word = WORD_BITS[word], WORD_BITS[word] // bits
    codes = torch.full((1, per_word), (1 << bits) - 1, dtype=torch.uint8)
    got = int(pack_floor(codes, bits, word)) & ((1 << width) - 1)
    assert got == (1 << (per_word * bits)) - 1


@given(BITS, st.integers(0, 39), st.sampled_from([-1, -7, 256, 300, 1 << 20]))
@settings(max_examples=60, deadline=None)
def test_code_out_of_range_stays_in_its_field(bits: int, at: int, wrong: int) -> None:
    codes = random_codes((40, 2), bits, 0, torch.int32)
    codes[at, 1] = wrong
    expected = codes & ((1 << bits) - 1)
    dense = unpack_dense(pack_dense(codes, bits), bits, 40)
    assert torch.equal(dense, expected.to(torch.uint8))
    for word in WORD_BITS:
        floor = unpack_floor(pack_floor(codes.t(), bits, word), bits, 40)
        assert torch.equal(floor, expected.t().to(torch.uint8)), word


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_dense_takes_any_integer_dtype(dtype: torch.dtype) -> None:
    codes = random_codes((64, 3), 7, 1)
    assert torch.equal(pack_dense(codes.to(dtype), 7), pack_dense(codes, 7))


def test_four_bit_words_by_hand() -> None:
    codes = torch.arange(8, dtype=torch.uint8).unsqueeze(1)
    assert int(pack_dense(codes, 4)[0, 0]) == 0x76543210
    assert int(pack_floor(codes.t(), 4, torch.int16)[0, 1]) == 0x7654
    high = torch.full((8, 1), 15, dtype=torch.uint8)
    assert int(pack_dense(high, 4)[0, 0]) == -1  # the word's sign bit is a code's bit like any other
