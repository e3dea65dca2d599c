"""Data sets of texts and labels for a decoder-only model, and one packed forward pass for many rows.

Rows are packed into one sequence without padding: the prompt first, each row behind it. A mask lets a row see the
prompt and itself. It is what a padded batch computes, for fewer tokens, and the same for every method.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, DatasetDict, load_dataset
from torch import Tensor
from transformers import Cache


@dataclass(frozen=True)
class Row:
    """A text and its label as token ids."""

    text: tuple[int, ...]
    label: tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """A data set for one model.

    Args:
        name (`str`): Its name in tables.
        labels (`tuple`): The token ids of each label.
        splits (`dict`): Lists of rows by split: `train`, `validation`, `test`.
        instruction (`str`): A text that says what to do, for `prompt_tuning_init="TEXT"`.
    """

    name: str
    labels: tuple[tuple[int, ...], ...]
    splits: dict[str, list[Row]]
    instruction: str

    def with_examples(self, tokenizer: Any, seed: int, longest: int = 128) -> str:
        """The instruction followed by training rows with their labels, one of each label in turn.

        Args:
            tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
            seed (`int`): Chooses the rows.
            longest (`int`): Tokens of the text. Rows that do not fit are skipped.
        """
        of_label: dict[tuple[int, ...], list[Row]] = {label: [] for label in self.labels}
        order = torch.randperm(len(self.splits["train"]), generator=torch.Generator().manual_seed(seed)).tolist()
        for i in order[:1000]:
            of_label[self.splits["train"][i].label].append(self.splits["train"][i])
        text = self.instruction
        for row in (row for turn in zip_longest(*of_label.values()) for row in turn if row is not None):
            longer = f"{text} {tokenizer.decode(row.text + row.label)}\n"
            if len(tokenizer(longer, add_special_tokens=False)["input_ids"]) <= longest:
                text = longer
        return text


def read(source: str) -> DatasetDict:
    """Load a folder with `train.jsonl`, `validation.jsonl` and `test.jsonl`, or a data set of the Hub."""
    if not Path(source).is_dir():
        return load_dataset(source)
    return load_dataset("json", data_files={split.stem: str(split) for split in sorted(Path(source).glob("*.jsonl"))})


def load_task(source: str, tokenizer: Any, longest: int = 64) -> Task:
    """Load a data set with the columns `text` and `label`; texts are cut to their last `longest` tokens.

    Args:
        source (`str`): A folder of JSONL files or a Hub id.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        longest (`int`): Tokens of a text, including the cue for the answer.
    """
    data = read(source)
    feature = data["train"].features["label"]
    names = feature.int2str if isinstance(feature, ClassLabel) else str

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    words = sorted({names(label) for label in data["train"]["label"]})
    labels = {word: ids(f" {word}") for word in words}
    prefixes = [word for word in words for other in labels.values() if other[: len(labels[word])] == labels[word]]
    if len(prefixes) > len(words):
        raise ValueError(
            f"{source}: a label is the beginning of another one, so that answers are ambiguous: {prefixes}"
        )
    splits = {
        split: [
            Row(ids(f"{row['text']}\nAnswer:")[-longest:], labels[names(row["label"])])
            for row in data[split]
            if names(row["label"]) in labels
        ]
        for split in ("train", "validation", "test")
    }
    shown = ", ".join(words[:12]) + (" and others" if len(words) > 12 else "")
    instruction = f"Read the text and answer with its label. The labels are: {shown}. Text:"
    return Task(Path(source).name, tuple(labels.values()), splits, instruction)


def packed_logits(model: Any, rows: Sequence[Row], cache: Cache | None = None) -> tuple[Tensor, Tensor]:
    """Compute the logits of every label token with a [`~peft.PeftModel`] of any method.

    Args:
        model (`PeftModel`): The model.
        rows (`Sequence[Row]`): The rows.
        cache (`Cache`, *optional*): The prompt's keys and values, which get longer by those of the rows. Computed if
            not given.

    Returns:
        `tuple`: Logits `[N, V]` in float32 and the `N` token ids that they should predict, row by row.
    """
    base = model.get_base_model()
    prompt = None
    if cache is None and model.active_peft_config.is_prompt_learning:
        found = model.get_prompt(1)
        prompt, cache = (found[0], None) if isinstance(found, Tensor) else (None, found)
    seen = 0 if cache is None else cache.get_seq_length()
    front = 0 if prompt is None else len(prompt)
    pieces = [row.text + row.label[:-1] for row in rows]
    ids = torch.tensor([token for piece in pieces for token in piece], device=base.device)
    embeds = base.get_input_embeddings()(ids)
    if prompt is not None:
        embeds = torch.cat([prompt.to(embeds.dtype), embeds])
    size = len(embeds)
    visible = torch.zeros(size, seen + size, dtype=torch.bool)
    visible[:, : seen + front] = True
    positions = [torch.arange(front)]
    kept, end = [], front
    for piece, row in zip(pieces, rows, strict=True):
        start, end = end, end + len(piece)
        visible[start:end, seen + start : seen + end] = True
        positions.append(torch.arange(len(piece)) + front)
        kept.append(torch.arange(end - len(row.label), end))
    visible[:, seen:] &= torch.ones(size, size, dtype=torch.bool).tril()
    mask = torch.zeros(visible.shape, dtype=embeds.dtype).masked_fill(~visible, torch.finfo(embeds.dtype).min)
    outputs = base(
        inputs_embeds=embeds[None],
        attention_mask=mask[None, None].to(base.device),
        position_ids=torch.cat(positions)[None].to(base.device) + seen,
        past_key_values=cache,
        logits_to_keep=torch.cat(kept).to(base.device),
    )
    targets = torch.tensor([token for row in rows for token in row.label], device=base.device)
    return outputs.logits[0].float(), targets


def prompt_cache(model: Any) -> Cache | None:
    """The keys and values of a [`~peft.PeftModel`]'s prompt, if it has one."""
    if not model.active_peft_config.is_prompt_learning:
        return None
    prompt = model.get_prompt(1)
    if not isinstance(prompt, Tensor):
        return prompt
    base = model.get_base_model()
    return base(inputs_embeds=prompt.to(base.dtype), use_cache=True, logits_to_keep=1).past_key_values


@torch.no_grad()
def accuracy(model: Any, task: Task, rows: Sequence[Row], size: int = 32) -> float:
    """The share of rows whose label greedy decoding gives when it may only write labels of the task."""
    model.eval()
    cache, correct = prompt_cache(model), 0
    front = 0 if cache is None else cache.get_seq_length()
    for start in range(0, len(rows), size):
        correct += count_correct(model, task, rows[start : start + size], cache)
        if cache is not None:
            cache.crop(front - cache.get_seq_length())
    model.train()
    return correct / len(rows)


def count_correct(model: Any, task: Task, rows: Sequence[Row], cache: Cache | None = None) -> int:
    """Number of rows in which every label token has the largest logit of those that may follow."""
    logits, _ = packed_logits(model, rows, cache)
    of_rows = zip(rows, logits.cpu().split([len(row.label) for row in rows]), strict=True)
    return sum(all(is_next(task, row, i, of_token) for i, of_token in enumerate(of_row)) for row, of_row in of_rows)


def is_next(task: Task, row: Row, position: int, logits: Tensor) -> bool:
    """Whether the label's token has the largest logit among the labels that begin alike."""
    may_follow = sorted(
        {
            label[position]
            for label in task.labels
            if label[:position] == row.label[:position] and len(label) > position
        }
    )
    return may_follow[int(logits[may_follow].argmax())] == row.label[position]


def batches(rows: Sequence[Row], size: int, steps: int, seed: int) -> Iterator[list[Row]]:
    """Training batches: every epoch in a new order."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * size // len(rows))
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(epochs)]).tolist()
    for step in range(steps):
        yield [rows[i] for i in order[step * size : (step + 1) * size]]
