"""What a text-to-text task is: where its rows come from, how a row becomes text, what counts as right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Task:
    """One data set, as text in and text out.

    The text is written as in T5 (Raffel et al. 2020, appendix D): prefix, then name and value of each column, as in
    "rte sentence1: ... sentence2: ...".

    Args:
        repo (`str`): Data set on the Hub.
        subset (`str`, *optional*): Its configuration.
        revision (`str`): The commit that is loaded.
        columns (`tuple[str, ...]`): Columns that the text is made of, in order.
        words (`tuple[str, ...]`, *optional*): The word for each class id; None where answers are free text.
        metrics (`tuple[str, ...]`): Names of `metrics.METRICS`; the first one selects.
        prefix (`str`): First word of the text.
        label (`str`): Column with the class id, or the label word itself.
        text (`Callable`, *optional*): Row to text, where T5's general form does not do.
        answers (`Callable`, *optional*): Row to all its right answers, where they are free text.
        target_length (`int`, *optional*): Tokens of the longest answer, where they are free text.
        keep (`Callable`, *optional*): Says which rows are used.
        group (`Callable`, *optional*): Row to what it is scored together with.
        train (`str`): Split to train on.
        validation (`str`, *optional*): Split to select on. None: a part of the training split.
        test (`str`, *optional*): Split to report on. None: half of the validation split, since test labels are hidden.
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
        """The text that the model reads."""
        if self.text:
            return self.text(row)
        return " ".join([self.prefix, *(f"{column}: {row[column]}" for column in self.columns)])

    def answers_of(self, row: dict) -> list[str]:
        """The texts that the model may answer."""
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
        """The same task, with `metric` as the one that selects."""
        if metric is None:
            return self
        if metric not in self.metrics:
            raise ValueError(f"The task has no metric {metric!r}. It has: {', '.join(self.metrics)}.")
        return replace(self, metrics=(metric, *(name for name in self.metrics if name != metric)))
