"""Tasks over a data set of prompts and labels: perplexity of the labels, classification, summaries.

AutoGPTQ's three tasks, with its parameters. A model is anything with transformers' `forward` and `generate`. What
differs from AutoGPTQ: perplexity is over all label tokens alike (not a mean of batches' means), labels are as long as
they tokenize to, and which samples are drawn follows `seed`.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from woq.errors import ConfigError

Columns = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Batch:
    """Token ids [n, L], padded on the left, their mask, and each row's label: its ids and its text."""

    input_ids: Tensor
    attention_mask: Tensor
    label_ids: list[list[int]]
    labels: list[str]


@dataclass(frozen=True)
class Options:
    """How a data set becomes batches.

    load_fn(name, **load_fn_kwargs) gives a `datasets` table or a dict of columns; None: `datasets.load_dataset`.
    preprocess_fn(columns, **preprocess_fn_kwargs) gives the prompt and the label column. num_samples are drawn by
    `seed`. A sample of more than sample_max_len tokens loses the start of its prompt, or with truncate_prompt=False the
    end of its label, and is dropped when nothing of that is left. A batch has at most block_max_len tokens, padding
    included (or one sample). add_eos_token: to the label.
    """

    load_fn: Callable[..., Any] | None = None
    preprocess_fn: Callable[..., Columns] | None = None
    num_samples: int = 128
    sample_max_len: int = 1024
    block_max_len: int = 2048
    add_eos_token: bool = False
    truncate_prompt: bool = True
    load_fn_kwargs: Mapping[str, Any] | None = None
    preprocess_fn_kwargs: Mapping[str, Any] | None = None
    seed: int = 42


class Task(ABC):
    """A data set, a model and a metric. options: the fields of `Options`."""

    merge: bool = False  # whether the label belongs to what the model reads

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        data_name_or_path: str,
        prompt_col_name: str,
        label_col_name: str,
        device: str | torch.device | None = None,
        **options: Any,
    ) -> None:
        """Raises ConfigError for unknown options and for columns that are not there."""
        unknown = options.keys() - Options.__dataclass_fields__.keys()
        if unknown:
            raise ConfigError(
                f"{type(self).__name__} takes no {sorted(unknown)}",
                hint=f"options: {list(Options.__dataclass_fields__)}",
            )
        self.model, self.tokenizer = model, tokenizer
        self.device = torch.device(device) if device is not None else model.device
        self.options = Options(**options)
        columns = _columns(data_name_or_path, self.options)
        missing = {prompt_col_name, label_col_name} - columns.keys()
        if missing:
            raise ConfigError(f"the data has no column {sorted(missing)}", hint=f"columns: {sorted(columns)}")
        pairs = list(zip(columns[prompt_col_name], columns[label_col_name], strict=True))
        self.batches = list(self._batches(pairs))
        if not self.batches:
            raise ConfigError("no sample is left", hint="a larger sample_max_len, or data with labels")

    def _batches(self, pairs: list[tuple[str, str]]) -> Iterator[Batch]:
        rows = sorted(filter(None, map(self._row, pairs)), key=lambda row: len(row[0]))
        held: list[tuple[list[int], list[int], str]] = []
        for row in rows:
            if held and (len(held) + 1) * len(row[0]) > self.options.block_max_len:
                yield self._padded(held)
                held = []
            held.append(row)
        if held:
            yield self._padded(held)

    def _row(self, pair: tuple[str, str]) -> tuple[list[int], list[int], str] | None:
        """(what the model reads, the label's ids, the label), or None where the label was cut away."""
        prompt, label = (list(self.tokenizer(text, verbose=False)["input_ids"]) for text in pair)
        if self.options.add_eos_token:
            label.append(self.tokenizer.eos_token_id)
        excess = len(prompt) + len(label) - self.options.sample_max_len
        if excess > 0 and self.options.truncate_prompt:
            prompt = prompt[excess:]
        elif excess > 0:
            label = label[:-excess]
        if not label or not prompt:
            return None
        return (prompt + label if self.merge else prompt), label, pair[1]

    def _padded(self, rows: list[tuple[list[int], list[int], str]]) -> Batch:
        longest = max(len(ids) for ids, _, _ in rows)
        pads = [longest - len(ids) for ids, _, _ in rows]
        ids = [[self.pad] * pad + row[0] for pad, row in zip(pads, rows, strict=True)]
        mask = [[0] * pad + [1] * (longest - pad) for pad in pads]
        return Batch(
            torch.tensor(ids, device=self.device),
            torch.tensor(mask, device=self.device),
            [label for _, label, _ in rows],
            [text for _, _, text in rows],
        )

    @property
    def pad(self) -> int:
        """The id under the mask."""
        choices = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(int(choice) for choice in choices if choice is not None)

    def _generated(self, batch: Batch, generation_config: Any) -> list[list[str]]:
        """The texts that the model goes on with: for each row, as many as `num_return_sequences`."""
        if generation_config.pad_token_id is None:
            generation_config.pad_token_id = self.pad
        output = self.model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            generation_config=generation_config,
        )
        new = output[:, batch.input_ids.shape[1] :]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        each = len(texts) // len(batch.labels)
        return [texts[i : i + each] for i in range(0, len(texts), each)]

    @abstractmethod
    def run(self) -> dict[str, Any]:
        """The metric over all samples."""


class LanguageModelingTask(Task):
    """Perplexity of the labels after their prompts."""

    merge = True

    @torch.no_grad()
    def run(self) -> dict[str, float]:
        """{"ppl": ...}."""
        total, count = 0.0, 0
        for batch in self.batches:
            logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            for row, label in zip(logits, batch.label_ids, strict=True):
                target = torch.tensor(label, device=row.device)
                scored = row[-len(label) - 1 : -1].float()
                total += float(F.cross_entropy(scored, target, reduction="sum"))
                count += len(label)
        return {"ppl": math.exp(total / count)}


class SequenceClassificationTask(Task):
    """The class closest to what the model writes; of several written, the class that most of them are closest to."""

    def __init__(
        self, model: Any, tokenizer: Any, classes: Sequence[str], *data: Any, **options: Any
    ) -> None:
        """classes: what labels may be. data, options: as `Task` has them."""
        super().__init__(model, tokenizer, *data, **options)
        self.classes = [name.lower().strip() for name in classes]
        self.max_new_tokens = max(len(tokenizer(name)["input_ids"]) for name in classes)
        strange = {
            text for b in self.batches for text in b.labels if text.lower().strip() not in self.classes
        }
        if strange:
            raise ConfigError(f"labels {sorted(strange)[:5]} are no class", hint=f"classes: {self.classes}")

    @torch.no_grad()
    def run(self, generation_config: Any = None) -> dict[str, float]:
        """{"acc": ...}. generation_config: several `num_return_sequences` ask for self-consistency."""
        config = _own_copy(generation_config)
        config.max_new_tokens = self.max_new_tokens
        right = seen = 0
        for batch in self.batches:
            for texts, label in zip(self._generated(batch, config), batch.labels, strict=True):
                votes = Counter(closest(text.lower().strip(), self.classes) for text in texts)
                right += votes.most_common(1)[0][0] == label.lower().strip()
                seen += 1
        return {"acc": right / seen}


class TextSummarizationTask(Task):
    """ROUGE-1, -2 and -L of what the model writes against the labels (the package `rouge`)."""

    @torch.no_grad()
    def run(self, generation_config: Any = None) -> dict[str, dict[str, float]]:
        """{"rouge-1": {"r", "p", "f"}, "rouge-2": ..., "rouge-l": ...}; one summary a sample is scored."""
        try:
            from rouge import Rouge
        except ImportError as error:
            raise ConfigError("ROUGE needs the package rouge", hint="pip install rouge") from error
        config = _own_copy(generation_config, max_new_tokens=128)
        config.num_return_sequences = 1
        written, labels = list[str](), list[str]()
        for batch in self.batches:
            written += [texts[0].lower().strip() or "." for texts in self._generated(batch, config)]
            labels += [label.lower().strip() for label in batch.labels]
        scores: dict[str, dict[str, float]] = Rouge().get_scores(written, labels, avg=True, ignore_empty=True)
        return scores


def _own_copy(generation_config: Any, **defaults: Any) -> Any:
    """The user's generation config, not to be changed; without one, greedy."""
    from transformers import GenerationConfig

    if generation_config is None:
        return GenerationConfig(num_beams=1, do_sample=False, num_return_sequences=1, **defaults)
    return GenerationConfig(**generation_config.to_dict())


def _columns(name: str, options: Options) -> Columns:
    """The preprocessed columns of the samples drawn."""
    if options.load_fn is not None:
        table = options.load_fn(name, **(options.load_fn_kwargs or {}))
    else:
        from datasets import load_dataset

        table = load_dataset(name, **(options.load_fn_kwargs or {}))
    columns = _split(table)
    count = len(next(iter(columns.values())))
    drawn = random.Random(options.seed).sample(range(count), min(count, options.num_samples))
    columns = {key: [values[i] for i in drawn] for key, values in columns.items()}
    if options.preprocess_fn is not None:
        return options.preprocess_fn(columns, **(options.preprocess_fn_kwargs or {}))
    return columns


def _split(table: Any) -> dict[str, list[Any]]:
    """A table's columns; of a data set with splits, the one for evaluation."""
    if not hasattr(table, "column_names"):
        return {key: list(values) for key, values in table.items()}
    if isinstance(table, Mapping):  # a DatasetDict
        table = table[
            next(split for split in ("evaluation", "validation", "test", "train", *table) if split in table)
        ]
    return {key: list(table[key]) for key in table.column_names}


def closest(text: str, choices: Iterable[str]) -> str:
    """The choice with the smallest edit distance (Levenshtein) to `text`; the first of equals."""
    return min(choices, key=lambda choice: edit_distance(text, choice))


def edit_distance(one: str, other: str) -> int:
    """Levenshtein's: insertions, deletions and substitutions from one to the other."""
    above = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        row = [i]
        for j, b in enumerate(other, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (a != b)))
        above = row
    return above[-1]
