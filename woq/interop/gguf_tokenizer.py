"""A tokenizer.json as the metadata that llama.cpp reads.

Two families are known. SentencePiece's BPE with byte fallback becomes model "llama", which picks merges by the score of
the token they make: the rank of its first merge. Byte-level BPE becomes model "gpt2" with its merges, and llama.cpp must
be told the name of the splitting before them ("pre"): told from the pattern, refused where it is none of these, because
a wrong one tokenizes wrongly and says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from woq.errors import CheckpointError
from woq.tensor_files import read_json

_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {_LLAMA3: "llama-bpe", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def add_tokenizer(writer: Any, folder: Path, vocabulary: int) -> None:
    """Give a `gguf.GGUFWriter` the tokenizer in `folder`, or say that there is none.

    vocabulary: rows of the model's embeddings; ids that the tokenizer does not use are filled up. Raises
    CheckpointError for a tokenizer that cannot be told exactly.
    """
    import gguf

    file = folder / "tokenizer.json"
    if not file.exists():
        writer.add_tokenizer_model("no_vocab")
        return
    raw = read_json(file)
    model = raw.get("model")
    if not isinstance(model, Mapping) or model.get("type") != "BPE":
        raise CheckpointError(
            f"{file}: only BPE tokenizers are written to GGUF", hint="remove it to write none"
        )
    tokens, types = _tokens(raw, vocabulary)
    byte_level = not model.get("byte_fallback", False)
    if byte_level:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(splitting(raw, file))
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, model))
        writer.add_add_space_prefix(_prepends(raw.get("normalizer")))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    gguf.SpecialVocab(folder, load_merges=byte_level, n_vocab=len(tokens)).add_to_gguf(writer, quiet=True)


def _tokens(raw: Mapping[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    """Every id's text and type."""
    model = raw["model"]
    texts: dict[int, str] = {index: text for text, index in model["vocab"].items()}
    types = {index: BYTE if _BYTE.fullmatch(text) else NORMAL for index, text in texts.items()}
    for added in raw.get("added_tokens", []):
        texts[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added.get("special") else USER_DEFINED
        if added["content"] == model.get("unk_token"):
            types[added["id"]] = UNKNOWN
    count = max(vocabulary, max(texts) + 1)
    return [texts.get(i, f"[PAD{i}]") for i in range(count)], [types.get(i, UNUSED) for i in range(count)]


def _scores(tokens: list[str], model: Mapping[str, Any]) -> list[float]:
    """The higher, the earlier a token is made; what no merge makes comes last."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault("".join(pair), rank)
    last = float(len(model["merges"]))
    return [-float(ranks[token]) if token in ranks else -last for token in tokens]


def _prepends(normalizer: Any) -> bool:
    steps = normalizer.get("normalizers", [normalizer]) if isinstance(normalizer, Mapping) else []
    return any(step.get("type") == "Prepend" for step in steps)


def splitting(raw: Mapping[str, Any], file: Path) -> str:
    """llama.cpp's name of how the text is cut before merging. Raises CheckpointError where it has none known here."""
    before = raw.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    kinds = [step.get("type") for step in steps]
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and patterns[0] in PATTERNS:
        return PATTERNS[patterns[0]]
    raise CheckpointError(
        f"{file}: how it splits text ({kinds}) has no name in llama.cpp that is known here",
        hint="remove the tokenizer to write none, or convert with llama.cpp's own script",
    )
