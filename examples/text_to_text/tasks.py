"""The definition of a text-to-text task: its rows, how a row becomes text, and which answers are correct."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Task:
    """One data set as a text-to-text task.

    Texts are written as in T5 (Raffel et al. 2020, appendix D): a prefix, then name and value of each column, such as
    "rte sentence1: ... sentence2: ...".

    Args:
        repo (`str`): Data set on the Hub.
        subset (`str`, *optional*): Configuration of the data set.
        revision (`str`): Commit of the data set.
        columns (`tuple[str, ...]`): Columns that the text is made of, in order.
        words (`tuple[str, ...]`, *optional*): The label word of each class id. None if answers are free text.
        metrics (`tuple[str, ...]`): Names in `metrics.METRICS`; the first one selects the best epoch.
        prefix (`str`): First word of the text.
        label (`str`): Column with the class id, or the label word itself.
        text (`Callable`, *optional*): Maps a row to its text, if T5's general format does not apply.
        answers (`Callable`, *optional*): Maps a row to all its correct answers, if they are free text.
        target_length (`int`, *optional*): Maximum number of tokens of an answer, if answers are free text.
        keep (`Callable`, *optional*): Returns whether a row is used.
        group (`Callable`, *optional*): Maps a row to a key; rows with the same key are scored together.
        train (`str`): Split to train on.
        validation (`str`, *optional*): Split that selects the best epoch. None: a part of the training split.
        test (`str`, *optional*): Split to report on. None: half of the validation split, if test labels are hidden.
    """

    repo: str
    subset: str | None
    revision: str
    columns: tuple[str, ...]
    words: tuple[str, ...] | None
    metrics: tuple[str, ...] = ("accuracy",)
    prefix: str = ""
    label: str = "label"
    text: Callable[[dict], str] | None = None
    answers: Callable[[dict], list[str]] | None = None
    target_length: int | None = None
    keep: Callable[[dict], bool] | None = None
    group: Callable[[dict], Any] | None = None
    train: str = "train"
    validation: str | None = "validation"
    test: str | None = None

    def source_of(self, row: dict) -> str:
        """Return the input text of a row."""
        if self.text:
            return self.text(row)
        return " ".join([self.prefix, *(f"{column}: {row[column]}" for column in self.columns)])

    def answers_of(self, row: dict) -> list[str]:
        """Return the correct answers of a row."""
        if self.answers:
            return self.answers(row)
        label = row[self.label]
        if label in self.words:
            return [label]
        if not isinstance(label, int) or not 0 <= label < len(self.words):
            raise ValueError(
                f"Column {self.label!r} holds {label!r}, expected 0 to {len(self.words) - 1} or one of "
                f"{', '.join(self.words)}. Benchmarks hide their test labels (-1): use a split that has labels."
            )
        return [self.words[label]]

    def selected_by(self, metric: str | None) -> Task:
        """Return the same task with `metric` as the first one, which selects the best epoch."""
        if metric is None:
            return self
        if metric not in self.metrics:
            raise ValueError(f"The task has no metric {metric!r}. It has: {', '.join(self.metrics)}.")
        return replace(self, metrics=(metric, *(name for name in self.metrics if name != metric)))
