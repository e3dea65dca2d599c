"""GLUE (Wang et al. 2018), with the label words and texts that T5 was trained with."""

from __future__ import annotations

from dataclasses import replace

from text_to_text.tasks import Task


def glue(subset: str, columns: tuple[str, ...], words: tuple[str, ...] | None, **options) -> Task:
    return Task("nyu-mll/glue", subset, "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c", columns, words, **options)


def similarity(row: dict) -> list[str]:
    """Round a score from 0 to 5 to steps of 0.2, so that most scores are a class (T5, section 2.4)."""
    if not 0 <= row["label"] <= 5:
        raise ValueError(f"Column 'label' holds {row['label']!r}, expected a similarity from 0 to 5.")
    return [f"{round(row['label'] * 5) / 5:.1f}"]


PAIR = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "neutral", "contradiction")
MNLI = glue("mnli", ("hypothesis", "premise"), ENTAILMENT, prefix="mnli", validation="validation_matched")

GLUE = {
    "cola": glue("cola", ("sentence",), ("unacceptable", "acceptable"), prefix="cola", metrics=("matthews",)),
    "sst2": glue("sst2", ("sentence",), ("negative", "positive"), prefix="sst2"),
    "mrpc": glue("mrpc", PAIR, ("not_equivalent", "equivalent"), prefix="mrpc", metrics=("accuracy", "f1")),
    "qqp": glue(
        "qqp",
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        prefix="qqp",
        metrics=("accuracy", "f1"),
    ),
    "stsb": glue(
        "stsb", PAIR, None, prefix="stsb", answers=similarity, target_length=8, metrics=("pearson", "spearman")
    ),
    "mnli": MNLI,
    "mnli_mismatched": replace(MNLI, validation="validation_mismatched"),
    "qnli": glue("qnli", ("question", "sentence"), ("entailment", "not_entailment"), prefix="qnli"),
    "rte": glue("rte", PAIR, ("entailment", "not_entailment"), prefix="rte"),
    "wnli": glue("wnli", PAIR, ("not_entailment", "entailment"), prefix="wnli"),
}
