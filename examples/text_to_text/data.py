"""Load a task: read its rows, split them, select few-shot rows, write them as texts, tokenize them."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from pathlib import Path
from random import Random

from datasets import Dataset, DatasetDict, Features, List, Value, disable_caching, load_dataset
from transformers import PreTrainedTokenizerBase


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `embedded` and `text_to_text`

from embedded import tasks as embedded
from text_to_text.classification import CLASSIFICATION
from text_to_text.glue import GLUE
from text_to_text.metrics import normalize
from text_to_text.superglue import SUPERGLUE
from text_to_text.tasks import Task


EMBEDDED = {
    name: Task("embedded", name, "", ("text",), tuple(task.labels.values()), text=lambda row: row["text"], test="test")
    for name, task in embedded.TASKS.items()
    if task.development  # the other tasks are held out
}
FAMILIES = {"embedded": EMBEDDED, "glue": GLUE, "super_glue": SUPERGLUE, "classification": CLASSIFICATION}
TASKS = {f"{family}/{name}": task for family, tasks in FAMILIES.items() for name, task in tasks.items()}

# Validation and test rows are the same for every seed.
SPLIT_SEED = 0
FEATURES = Features(
    {"source": Value("string"), "target": Value("string"), "answers": List(Value("string")), "group": Value("string")}
)
logger = logging.getLogger(__name__)


def find_task(name: str) -> Task:
    if name not in TASKS:
        raise ValueError(f"There is no task {name!r}. There are: {', '.join(TASKS)}.")
    return TASKS[name]


def load_texts(
    task: Task,
    data_dir: Path | None = None,
    k_per_class: int | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    seed: int = 0,
) -> DatasetDict:
    """Load a task as texts, in three splits with labels.

    Args:
        task (`Task`): One of `TASKS`.
        data_dir (`Path`, *optional*): Folder with files per split, such as `train.json` or
            `validation-00000-of-00001.parquet`, in the Hub's schema. Used instead of the Hub.
        k_per_class (`int`, *optional*): Training rows per class, or in total if answers are free text.
        max_train_samples (`int`, *optional*): Maximum number of training rows.
        max_eval_samples (`int`, *optional*): Maximum number of rows of each other split, or of questions, if a
            question has several rows.
        seed (`int`): Selects the training rows. Validation and test rows do not depend on it.

    Returns:
        `datasets.DatasetDict`: The splits train, validation and test, with the columns source (the model's input),
        target (the output to learn), answers (all correct outputs) and group (equal for rows that are scored
        together).

    Raises:
        ValueError: If a split or column is missing, a split is empty, or a label is not in the task's list.
    """
    disable_caching()  # the cache does not notice changes of the code that writes the texts
    splits = read(task, data_dir, seed)
    for split in (task.train, task.validation, task.test):
        if split is not None:
            check(task, split, splits)
    train = splits[task.train]
    if task.validation is None:
        parts = train.train_test_split(min(2000, max(1, len(train) // 10)), seed=SPLIT_SEED)
        train, validation = parts["train"], write(task, parts["test"])
    else:
        validation = write(task, splits[task.validation])
    if task.test is None:
        groups = shuffled_groups(validation)
        half = len(groups) // 2
        validation, test = rows_of(validation, groups[:half]), rows_of(validation, groups[half:])
    else:
        test = write(task, splits[task.test])
    data = DatasetDict(
        train=sample(task, write(task, train).shuffle(seed=seed), k_per_class, max_train_samples),
        validation=rows_of(validation, shuffled_groups(validation)[:max_eval_samples]),
        test=rows_of(test, shuffled_groups(test)[:max_eval_samples]),
    )
    for split, rows in data.items():
        if len(rows) == 0:
            raise ValueError(f"The {split} split is empty. Give it rows that the task can use.")
    return data


def read(task: Task, data_dir: Path | None, seed: int) -> DatasetDict:
    """Read the raw splits: generated, from files, or from the Hub."""
    if data_dir is None and task.repo == "embedded":
        return embedded.load_task(task.subset, seed=seed)
    if data_dir is None:
        return load_dataset(task.repo, task.subset, revision=task.revision)
    files: dict[str, list[str]] = {}
    for path in sorted(Path(data_dir).glob("*")):
        if path.suffix in (".parquet", ".json", ".jsonl"):
            files.setdefault(path.name.split("-")[0].split(".")[0], []).append(str(path))
    if not files:
        raise ValueError(
            f"`data_dir` {data_dir} holds no .parquet, .json or .jsonl file. It needs one for each split."
        )
    kind = "parquet" if next(iter(files.values()))[0].endswith(".parquet") else "json"
    return load_dataset(kind, data_files=files)


def check(task: Task, split: str, splits: DatasetDict) -> None:
    if split not in splits:
        raise ValueError(f"There is no split {split!r}. There are: {', '.join(splits)}.")
    missing = [column for column in (*task.columns, task.label) if column not in splits[split].column_names]
    if missing:
        raise ValueError(
            f"The {split} split has no column {', '.join(map(repr, missing))}. It has: "
            f"{', '.join(splits[split].column_names)}."
        )


def write(task: Task, rows: Dataset) -> Dataset:
    """Write rows as texts; the target is one of the answers."""

    def as_text(row: dict, index: int) -> dict:
        answers = task.answers_of(row)
        if not answers:
            raise ValueError(f"Row {index} has no answer in {task.label!r}. Use a split that has answers.")
        group = task.group(row) if task.group else index
        return {"source": task.source_of(row), "target": answers[0], "answers": answers, "group": str(group)}

    if task.keep:
        rows = rows.filter(task.keep)
    return rows.map(as_text, with_indices=True, remove_columns=rows.column_names, features=FEATURES, desc="as text")


def shuffled_groups(rows: Dataset) -> list[str]:
    groups = list(dict.fromkeys(rows["group"]))
    Random(SPLIT_SEED).shuffle(groups)
    return groups


def rows_of(rows: Dataset, groups: list[str]) -> Dataset:
    wanted = set(groups)
    return rows.select([i for i, group in enumerate(rows["group"]) if group in wanted])


def sample(task: Task, rows: Dataset, k_per_class: int | None, max_samples: int | None) -> Dataset:
    """Select the first rows, in total or of each class, and repeat a row for each of its answers."""
    if k_per_class is not None:
        classes = rows["target"] if task.words else ["any"] * len(rows)
        taken, chosen = Counter(), []
        for i, name in enumerate(classes):
            if taken[name] < k_per_class:
                taken[name] += 1
                chosen.append(i)
        for name in task.words or ["any"]:
            if taken[name] < k_per_class:
                logger.warning("Class %r has %d rows, not %d: all are taken.", name, taken[name], k_per_class)
        rows = rows.select(chosen)
    if max_samples is not None:
        rows = rows.select(range(min(max_samples, len(rows))))

    def per_answer(batch: dict) -> dict:
        copies = [(i, answer) for i, answers in enumerate(batch["answers"]) for answer in answers]
        columns = {name: [values[i] for i, _ in copies] for name, values in batch.items()}
        return {**columns, "target": [answer for _, answer in copies]}

    return rows.map(per_answer, batched=True, desc="one row per answer") if task.answers else rows


def longest_target(task: Task, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the maximum number of tokens of an answer, including the end token."""
    if task.target_length:
        return task.target_length
    ids = [tokenizer(word)["input_ids"] for word in task.words]
    lost = [word for word, row in zip(task.words, ids, strict=True) if normalize(word) != _decoded(tokenizer, row)]
    if lost:
        raise ValueError(f"The tokenizer cannot encode {', '.join(map(repr, lost))}, so no answer could be correct.")
    return max(map(len, ids))


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return normalize(tokenizer.decode(ids, skip_special_tokens=True))


def tokenize(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, max_source: int, max_target: int) -> DatasetDict:
    """Add input_ids, attention_mask and labels. The text columns stay, because the metrics need them."""

    def encode(batch: dict) -> dict:
        inputs = tokenizer(batch["source"], truncation=True, max_length=max_source)
        labels = tokenizer(text_target=batch["target"], truncation=True, max_length=max_target)["input_ids"]
        return {**inputs, "labels": labels}

    return data.map(encode, batched=True, desc="tokenize")
