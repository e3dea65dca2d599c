"""Downstream tasks for the embedded model, as text-to-text tasks.

The model was pretrained on texts of the same kind, but not on these tasks. No instruction says what to do, and the
labels are words that were never labels in pretraining. Without a prompt the model therefore answers something else.
Some tasks also combine skills in a new way: `topic` (of the second sentence, while the first one has another topic),
`entailment` (from three facts instead of two), `majority` (of two kinds of words) and `agreement` (of two reviews).

Tasks, splits and budgets were fixed before any methods were compared. Methods and their settings may be chosen on the
development tasks. The other three tasks (`development=False`) are held out.

Validation and test rows are the same for every seed and training size; these only select the training rows.

    python examples/embedded/tasks.py

prints the sizes of all tasks, and the results of the model without a prompt.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from datasets import Dataset, DatasetDict


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `embedded`

from embedded import world


MODEL = Path(__file__).resolve().parent / "model"


@dataclass(frozen=True)
class Task:
    """A downstream task.

    Args:
        description (`str`): The question of the task.
        make (`Callable`): Takes a `random.Random` and returns the texts of a row and its outcome.
        labels (`dict`): The label word of each outcome. Rows with other outcomes are not used.
        development (`bool`): Whether methods and settings may be chosen on this task.
        train_size, validation_size, test_size (`int`): Rows per split, with equally many per label.
        metric (`str`): `exact_match`, the share of rows whose generated text is the label.
    """

    description: str
    make: Callable[[Random], tuple]
    labels: dict
    development: bool = True
    train_size: int = 1000
    validation_size: int = 200
    test_size: int = 500
    metric: str = "exact_match"

    @property
    def chance(self) -> float:
        return 1 / len(self.labels)


def majority(rng: Random) -> tuple[str, str]:
    """A list of animals and foods; of which are there more?"""
    few = rng.randint(1, 2)
    kinds = rng.sample(["animal", "food"], 2)
    many = few + rng.randint(1, 2)
    words = rng.sample(world.CATEGORIES[kinds[0]], many) + rng.sample(world.CATEGORIES[kinds[1]], few)
    rng.shuffle(words)
    return " ".join(words), kinds[0]


def last_topic(rng: Random) -> tuple[str, str]:
    """Two sentences on two topics; what is the second about?"""
    first, second = rng.sample(list(world.TOPICS), 2)
    return f"{world.topic_sentence(rng, first)} . {world.topic_sentence(rng, second)}", second


def entailment(rng: Random) -> tuple[str, str, bool]:
    return world.entailment(rng, people=3)


def word_in_context(rng: Random) -> tuple[str, str, bool]:
    first, second, _, same = world.word_in_context(rng)
    return first, second, same


TASKS = {
    "sentiment": Task("is the review positive?", world.review, {True: "sun", False: "rain"}),
    "topic": Task(
        "what is the second sentence about?",
        last_topic,
        {"sport": "north", "food": "south", "music": "east", "money": "west"},
    ),
    "entailment": Task("does the last part follow from the others?", entailment, {True: "gold", False: "silver"}),
    "word_in_context": Task(
        "does the word that both parts share mean the same?", word_in_context, {True: "tea", False: "milk"}
    ),
    "question_answering": Task(
        "is the answer to the question yes?", world.yes_no_question, {True: "stone", False: "sand"}
    ),
    "counting": Task(
        "how many of three things are liked?",
        world.several_reviews,
        {0: "moon", 1: "star", 2: "cloud", 3: "storm"},
    ),
    "majority": Task("more animals than foods?", majority, {"animal": "cotton", "food": "leather"}),
    "aspect": Task(
        "is the aspect named last liked?", world.aspect_review, {True: "king", False: "queen"}, development=False
    ),
    "same_words": Task(
        "do both lists hold the same words?", world.same_words, {True: "iron", False: "wood"}, development=False
    ),
    "agreement": Task(
        "do both opinions agree?", world.two_reviews, {True: "paper", False: "glass"}, development=False
    ),
}


def load_task(name: str, train_size: int | None = None, seed: int = 0) -> DatasetDict:
    """Build the splits of a task.

    Args:
        name (`str`): One of `TASKS`.
        train_size (`int`, *optional*): Training rows, a multiple of the number of labels. Default: the task's own.
        seed (`int`): Selects the training rows. Validation and test rows do not depend on it.

    Returns:
        `datasets.DatasetDict`: Splits train, validation and test, with the columns text and label, both strings.
        Labels are balanced in each split, and no text occurs twice.

    Raises:
        ValueError: If there is no such task, or `train_size` is not a multiple of the number of labels.
    """
    if name not in TASKS:
        raise ValueError(f"`name` must be one of {', '.join(TASKS)}, got {name!r}.")
    task = TASKS[name]
    train_size = task.train_size if train_size is None else train_size
    if train_size < 1 or train_size % len(task.labels):
        raise ValueError(
            f"`train_size` of {name!r} must be a positive multiple of its {len(task.labels)} labels, got {train_size}."
        )
    seen: set[str] = set()
    test = _rows(task, Random(f"{name} test"), task.test_size, seen)
    validation = _rows(task, Random(f"{name} validation"), task.validation_size, seen)
    train = _rows(task, Random(f"{name} train {seed}"), train_size, seen)
    splits = {"train": train, "validation": validation, "test": test}
    return DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()})


def _rows(task: Task, rng: Random, size: int, seen: set[str]) -> list[dict[str, str]]:
    """Draw `size` rows with texts that are not in `seen`, and add these texts to `seen`."""
    left = dict.fromkeys(task.labels, size // len(task.labels))
    rows = []
    while len(rows) < size:
        *parts, outcome = task.make(rng)
        text = " | ".join(part.removesuffix(" .") for part in parts)
        if left.get(outcome, 0) and text not in seen:
            seen.add(text)
            left[outcome] -= 1
            rows.append({"text": text, "label": task.labels[outcome]})
    return rows


def without_prompt(name: str, model, tokenizer, split: str = "validation") -> tuple[float, float]:
    """Return exact match of the generated texts, and the accuracy if only the label words are compared."""
    import torch

    task, rows = TASKS[name], load_task(name)[split]
    words = list(task.labels.values())
    label_ids = [tokenizer(word)["input_ids"][0] for word in words]
    inputs = tokenizer(list(rows["text"]), return_tensors="pt", padding=True)
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    answers = tokenizer.batch_decode(output, skip_special_tokens=True)
    exact = sum(answer == label for answer, label in zip(answers, rows["label"], strict=True))
    with torch.no_grad():
        start = torch.full((len(rows), 1), model.config.decoder_start_token_id)
        logits = model(**inputs, decoder_input_ids=start).logits[:, 0, label_ids]
    restricted = sum(words[i] == label for i, label in zip(logits.argmax(-1).tolist(), rows["label"], strict=True))
    return exact / len(rows), restricted / len(rows)


def main() -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    model = AutoModelForSeq2SeqLM.from_pretrained(MODEL).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    print("| task | for | train / validation / test | chance | exact match | among labels |")
    print("|---|---|---|---|---|---|")
    for name, task in TASKS.items():
        exact, restricted = without_prompt(name, model, tokenizer)
        sizes = f"{task.train_size} / {task.validation_size} / {task.test_size}"
        use = "development" if task.development else "held out"
        print(f"| {name} | {use} | {sizes} | {task.chance:.1%} | {exact:.1%} | {restricted:.1%} |")


if __name__ == "__main__":
    main()
