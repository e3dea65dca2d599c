"""Rows as tokens: in the chat template, measured, and divided into rows to train and to validate on."""

from __future__ import annotations

import random
from typing import Any

from .options import TrainOptions
from .rows import Row


def in_chat(rows: list[Row], options: TrainOptions, tokenizer: Any) -> list[Row]:
    """The rows of a line as messages, if they are, or if the tokenizer has a chat template."""
    if tokenizer.chat_template:
        return [row.as_chat() if options.use_chat_template else row for row in rows]
    if any(row.is_chat for row in rows):
        raise ValueError(
            f"The tokenizer of `{options.model_name_or_path}` has no chat template, which `messages` need (line "
            f"{rows[0].line}). Use a model with one, set `chat_template_path`, or write `prompt` and `completion`."
        )
    return rows


def measure(
    lines: list[list[Row]], path: str, options: TrainOptions, tokenizer: Any, max_length: int
) -> tuple[list[list[Row]], int, list[int]]:
    """The lines whose rows all fit, how many others there are, and the length of each row in tokens."""
    lengths = [[_length(row, tokenizer) for row in rows] for rows in lines]
    fits = [max(found) <= max_length for found in lengths]
    if not all(fits) and not options.skip_long_rows:
        first = fits.index(False)
        raise ValueError(
            f"Line {lines[first][0].line} of `{path}` has {max(lengths[first])} tokens, more than `max_length`="
            f"{max_length} ({fits.count(False)} of {len(fits)} lines have). Shorten them, raise `max_length`, or set "
            "`skip_long_rows: true`."
        )
    if not any(fits):
        raise ValueError(f"Every line of `{path}` is longer than `max_length`={max_length} tokens. Raise it.")
    kept = [rows for rows, fit in zip(lines, fits) if fit]
    return kept, fits.count(False), [n for found, fit in zip(lengths, fits) if fit for n in found]


def _length(row: Row, tokenizer: Any) -> int:
    """Tokens of a row, as `SFTTrainer` makes them."""
    if isinstance(row.prompt, str) and isinstance(row.completion, str):
        return len(tokenizer(row.prompt + row.completion)["input_ids"]) + 1  # the end of the answer
    messages = [*row.prompt, *row.completion]
    try:
        return len(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"])
    except Exception as error:  # a template raises what it likes, about roles or their order
        raise ValueError(f"Line {row.line} does not fit the chat template: {error}. Change its messages.") from error


def split(lines: list[list[Row]], share: float, seed: int) -> tuple[list[list[Row]], list[list[Row]]]:
    """Lines to train and to validate on. A conversation is not divided."""
    if not share or len(lines) < 2:
        return lines, []
    order = random.Random(seed).sample(lines, len(lines))
    count = min(max(1, round(share * len(lines))), len(lines) - 1)
    return order[count:], order[:count]
