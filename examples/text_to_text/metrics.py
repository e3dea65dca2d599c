"""Metrics of generated texts, from 0 (or -1) to 1. Case and spaces are ignored when texts are compared.

An answer that is not a label word is wrong. In metrics that are computed from classes, such an answer counts as

- the other class in `f1` and `f1a` (as in T5), so that it is never better than the wrong label word;
- an additional class in `matthews` (as in T5), so that answers which are all invalid score 0 and not -1;
- no class in `macro_f1`: it lowers the recall of the row's class, but is not averaged as a class with F1 0;
- a score of -1 in `pearson` and `spearman` (as in T5), like a number outside 0 to 5.
"""

from __future__ import annotations

import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy import stats
from sklearn.metrics import f1_score, matthews_corrcoef


# All metrics take predictions, rows with the columns target, answers and group, and the label words.
Words = Sequence[str] | None
DETERMINERS = set(
    "a an few her his each every many much my our some that the their these this those which whose your".split()
)


def normalize(text: str) -> str:
    return " ".join(text.lower().split())


def normalize_answer(text: str) -> str:
    """Also remove punctuation and articles (SQuAD, Rajpurkar et al. 2016, section 6.1)."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def class_ids(texts: Sequence[str], words: Sequence[str]) -> np.ndarray:
    """Return the class of each text, or -1 if it is not a label word."""
    ids = {normalize(word): i for i, word in enumerate(words)}
    return np.array([ids.get(normalize(text), -1) for text in texts])


def accuracy(predictions: Sequence[str], rows: Mapping, words: Words = None) -> float:
    return _mean(normalize(a) == normalize(b) for a, b in zip(predictions, rows["target"], strict=True))


def f1(predictions: Sequence[str], rows: Mapping, words: Words) -> float:
    """F1 of the second class."""
    truth, guess = class_ids(rows["target"], words), class_ids(predictions, words)
    return float(f1_score(truth, np.where(guess < 0, 1 - truth, guess), zero_division=0.0))


def macro_f1(predictions: Sequence[str], rows: Mapping, words: Words) -> float:
    """Mean of the F1 of each class that occurs in rows or predictions."""
    truth, guess = class_ids(rows["target"], words), class_ids(predictions, words)
    labels = sorted({*truth.tolist(), *guess.tolist()} - {-1})
    return float(f1_score(truth, guess, labels=labels, average="macro", zero_division=0.0))


def matthews(predictions: Sequence[str], rows: Mapping, words: Words) -> float:
    return float(matthews_corrcoef(class_ids(rows["target"], words), class_ids(predictions, words)))


def pearson(predictions: Sequence[str], rows: Mapping, words: Words = None) -> float:
    return _correlation(stats.pearsonr, predictions, rows["target"])


def spearman(predictions: Sequence[str], rows: Mapping, words: Words = None) -> float:
    return _correlation(stats.spearmanr, predictions, rows["target"])


def question_exact_match(predictions: Sequence[str], rows: Mapping, words: Words = None) -> float:
    """Share of questions with only correct predictions (MultiRC, Khashabi et al. 2018)."""
    right = defaultdict(list)
    for prediction, target, group in zip(predictions, rows["target"], rows["group"], strict=True):
        right[group].append(normalize(prediction) == normalize(target))
    return _mean(all(answers) for answers in right.values())


def exact_match(predictions: Sequence[str], rows: Mapping, words: Words = None) -> float:
    """Share of predictions that equal one of the answers (ReCoRD, Zhang et al. 2018)."""
    return _best_over_answers(lambda a, b: float(a == b), predictions, rows["answers"])


def token_f1(predictions: Sequence[str], rows: Mapping, words: Words = None) -> float:
    """Mean F1 of the words of prediction and answer, for the best answer (ReCoRD, Zhang et al. 2018)."""

    def overlap(prediction: str, answer: str) -> float:
        ours, theirs = prediction.split(), answer.split()
        common = sum((Counter(ours) & Counter(theirs)).values())
        return 2 * common / (len(ours) + len(theirs)) if common else 0.0

    return _best_over_answers(overlap, predictions, rows["answers"])


def referent_match(predictions: Sequence[str], rows: Mapping, words: Words = None) -> float:
    """Share of predictions that name the referent: with its words, some of them, or additional ones (WSC in T5).

    "Bob" does not match "Bob's hat": either both have an apostrophe or none.
    """

    def match(prediction: str, referent: str) -> bool:
        ours, theirs = ({*normalize(text).split()} - DETERMINERS for text in (prediction, referent))
        return (
            bool(ours and theirs) and ("'" in prediction) == ("'" in referent) and (ours <= theirs or ours >= theirs)
        )

    return _mean(match(a, b) for a, b in zip(predictions, rows["target"], strict=True))


METRICS: dict[str, Callable[[Sequence[str], Mapping, Words], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
    "f1a": f1,  # MultiRC's F1 over all answers of all questions
    "question_exact_match": question_exact_match,
    "exact_match": exact_match,
    "token_f1": token_f1,
    "referent_match": referent_match,
}


def _mean(values) -> float:
    return float(np.mean(list(values)))


def _best_over_answers(score: Callable[[str, str], float], predictions: Sequence[str], answers) -> float:
    return _mean(
        max(score(normalize_answer(prediction), normalize_answer(answer)) for answer in right)
        for prediction, right in zip(predictions, answers, strict=True)
    )


def _correlation(correlate: Callable, predictions: Sequence[str], targets: Sequence[str]) -> float:
    """Return 0 if one side is constant: the correlation is then undefined, and NaN would stay the best score."""
    values = [_similarity(text) for text in predictions], [float(text) for text in targets]
    if any(len(set(side)) < 2 for side in values):
        return 0.0
    return float(correlate(*values)[0])


def _similarity(text: str) -> float:
    match = re.fullmatch(r"\d+(\.\d+)?", text.strip())
    return float(text) if match and float(text) <= 5 else -1.0
