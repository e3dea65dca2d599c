"""SuperGLUE (Wang et al. 2019): texts and label words as in T5, with its cleaning of MultiRC, ReCoRD and WSC."""

from __future__ import annotations

import re

from text_to_text.tasks import Task


FALSE_TRUE = ("False", "True")


def superglue(subset: str, columns: tuple[str, ...], words: tuple[str, ...] | None, **options) -> Task:
    return Task("aps/super_glue", subset, "3de24cf8022e94f4ee4b9d55a6f539891524d646", columns, words, **options)


def multirc(row: dict) -> str:
    text = f"multirc question: {row['question']} answer: {row['answer']} paragraph: {row['paragraph']}"
    return re.sub(r"</?b>", "", text.replace("<br>", " "))


def record(row: dict) -> str:
    """Turn the bullet points after the passage into sentences. The passage is last, so only it is truncated."""
    passage = re.sub(r"([.?!\"'])\n@highlight\n", r"\1 ", row["passage"]).replace("\n@highlight\n", ". ")
    return f"record query: {row['query']} entities: {', '.join(row['entities'])} passage: {passage}"


def mark(text: str, span: str, index: int, left: str, right: str) -> str:
    """Put marks around `span`, which starts at word `index`, or around that word if the data is wrong."""
    start = re.match(rf"(?:\S+\s+){{0,{index}}}", text).end()
    found = re.compile(rf"(?<!\w){re.escape(span)}(?!\w)", re.IGNORECASE).search(text, start)
    found = found or re.compile(r"\S+|$").search(text, start)
    return f"{text[: found.start()]}{left}{found[0]}{right}{text[found.end() :]}"


def wsc_referent(row: dict) -> str:
    return "wsc: " + mark(row["text"], row["span2_text"], row["span2_index"], "*", "*")


def wsc_fixed(row: dict) -> str:
    """Put stars around the noun and hashes around the pronoun, the later one first: the other index stays valid."""
    spans = [(row["span1_index"], row["span1_text"], "*"), (row["span2_index"], row["span2_text"], "#")]
    text = row["text"]
    for index, span, sign in sorted(spans, reverse=True):
        text = mark(text, span, index, f"{sign} ", f" {sign}")
    return f"wsc text: {text}"


WSC_COLUMNS = ("text", "span1_text", "span1_index", "span2_text", "span2_index")

SUPERGLUE = {
    "boolq": superglue("boolq", ("passage", "question"), FALSE_TRUE, prefix="boolq"),
    "cb": superglue(
        "cb",
        ("hypothesis", "premise"),
        ("entailment", "contradiction", "neutral"),
        prefix="cb",
        metrics=("accuracy", "macro_f1"),
    ),
    "copa": superglue("copa", ("choice1", "choice2", "premise", "question"), ("choice1", "choice2"), prefix="copa"),
    "multirc": superglue(
        "multirc",
        ("question", "answer", "paragraph", "idx"),
        FALSE_TRUE,
        text=multirc,
        group=lambda row: (row["idx"]["paragraph"], row["idx"]["question"]),
        metrics=("f1a", "question_exact_match"),
    ),
    "record": superglue(
        "record",
        ("query", "entities", "passage"),
        None,
        label="answers",
        text=record,
        answers=lambda row: row["answers"],
        target_length=48,
        metrics=("token_f1", "exact_match"),
    ),
    "rte": superglue("rte", ("hypothesis", "premise"), ("entailment", "not_entailment"), prefix="rte"),
    "wic": superglue("wic", ("sentence1", "sentence2", "word"), FALSE_TRUE, prefix="wic"),
    # The answer is the referent. Rows whose noun is not the referent are dropped: they have no correct answer.
    "wsc": superglue(
        "wsc",
        WSC_COLUMNS,
        None,
        text=wsc_referent,
        answers=lambda row: [row["span1_text"]],
        target_length=24,
        keep=lambda row: row["label"] == 1,
        metrics=("referent_match",),
    ),
    "wsc.fixed": superglue("wsc.fixed", WSC_COLUMNS, FALSE_TRUE, text=wsc_fixed),
}
