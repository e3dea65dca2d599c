"""Rows of every data set of the T5 example, in the Hub's schema, and what the model should read."""

import sys
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, List, Value


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from text_to_text.data import find_task


STRING, INT, FLOAT = Value("string"), Value("int32"), Value("float32")
PAIR = {"sentence1": "one .", "sentence2": "two ."}
PREMISE = {"premise": "it rains .", "hypothesis": "it is wet ."}
WSC = {
    "text": "Mark told Pete many lies about himself , which Pete included in his book .",
    "span1_text": "Mark",
    "span1_index": 0,
    "span2_text": "himself",
    "span2_index": 6,
}
RECORD = {
    "passage": 'Ann met Bob in "Rome"\n@highlight\nIt rained\n@highlight\nBob left',
    "query": "@placeholder left",
    "entities": ["Ann", "Bob", "Rome"],
    "entity_spans": {"text": ["Ann", "Bob", "Rome"], "start": [0, 8, 16], "end": [3, 11, 20]},
}
MULTIRC = {
    "paragraph": "<b>Sent 1: </b>A dog ran.<br><b>Sent 2: </b>It hid.",
    "question": "Who ran?",
    "answer": "A dog",
}

# Task: names of the Hub's classes (None: no ClassLabel), a row without its label, what the model reads.
CASES = {
    "glue/cola": (["unacceptable", "acceptable"], {"sentence": "they go ."}, "cola sentence: they go ."),
    "glue/sst2": (["negative", "positive"], {"sentence": "a joy "}, "sst2 sentence: a joy "),
    "glue/mrpc": (["not_equivalent", "equivalent"], PAIR, "mrpc sentence1: one . sentence2: two ."),
    "glue/qqp": (
        ["not_duplicate", "duplicate"],
        {"question1": "why ?", "question2": "how ?"},
        "qqp question1: why ? question2: how ?",
    ),
    "glue/stsb": (None, PAIR, "stsb sentence1: one . sentence2: two ."),
    "glue/mnli": (
        ["entailment", "neutral", "contradiction"],
        PREMISE,
        "mnli hypothesis: it is wet . premise: it rains .",
    ),
    "glue/mnli_mismatched": (
        ["entailment", "neutral", "contradiction"],
        PREMISE,
        "mnli hypothesis: it is wet . premise: it rains .",
    ),
    "glue/qnli": (
        ["entailment", "not_entailment"],
        {"question": "who ?", "sentence": "Ann ."},
        "qnli question: who ? sentence: Ann .",
    ),
    "glue/rte": (["entailment", "not_entailment"], PAIR, "rte sentence1: one . sentence2: two ."),
    "glue/wnli": (["not_entailment", "entailment"], PAIR, "wnli sentence1: one . sentence2: two ."),
    "super_glue/boolq": (
        ["False", "True"],
        {"question": "is it red", "passage": "It is."},
        "boolq passage: It is. question: is it red",
    ),
    "super_glue/cb": (
        ["entailment", "contradiction", "neutral"],
        PREMISE,
        "cb hypothesis: it is wet . premise: it rains .",
    ),
    "super_glue/copa": (
        ["choice1", "choice2"],
        {"premise": "It rained.", "choice1": "I got wet.", "choice2": "I ran.", "question": "effect"},
        "copa choice1: I got wet. choice2: I ran. premise: It rained. question: effect",
    ),
    "super_glue/multirc": (
        ["False", "True"],
        MULTIRC,
        "multirc question: Who ran? answer: A dog paragraph: Sent 1: A dog ran. Sent 2: It hid.",
    ),
    "super_glue/record": (
        None,
        RECORD,
        'record query: @placeholder left entities: Ann, Bob, Rome passage: Ann met Bob in "Rome" It rained. Bob left',
    ),
    "super_glue/rte": (["entailment", "not_entailment"], PREMISE, "rte hypothesis: it is wet . premise: it rains ."),
    "super_glue/wic": (
        ["False", "True"],
        {"word": "place", **PAIR, "start1": 0, "start2": 0, "end1": 3, "end2": 3},
        "wic sentence1: one . sentence2: two . word: place",
    ),
    "super_glue/wsc": (
        ["False", "True"],
        WSC,
        "wsc: Mark told Pete many lies about *himself* , which Pete included in his book .",
    ),
    "super_glue/wsc.fixed": (
        ["False", "True"],
        WSC,
        "wsc text: * Mark * told Pete many lies about # himself # , which Pete included in his book .",
    ),
    "classification/imdb": (["neg", "pos"], {"text": "fine"}, "imdb text: fine"),
    "classification/ag_news": (
        ["World", "Sports", "Business", "Sci/Tech"],
        {"text": "they won"},
        "ag_news text: they won",
    ),
    "classification/yelp_review_full": (
        ["1 star", "2 star", "3 stars", "4 stars", "5 stars"],
        {"text": "so so"},
        "yelp_review_full text: so so",
    ),
    "classification/yahoo_answers_topics": (
        [
            "Society & Culture",
            "Science & Mathematics",
            "Health",
            "Education & Reference",
            "Computers & Internet",
            "Sports",
            "Business & Finance",
            "Entertainment & Music",
            "Family & Relationships",
            "Politics & Government",
        ],
        {"id": 0, "question_title": "why?", "question_content": "", "best_answer": "so"},
        "yahoo_answers_topics question_title: why? question_content:  best_answer: so",
    ),
    "classification/dbpedia_14": (
        [
            "Company",
            "EducationalInstitution",
            "Artist",
            "Athlete",
            "OfficeHolder",
            "MeanOfTransportation",
            "Building",
            "NaturalPlace",
            "Village",
            "Animal",
            "Plant",
            "Album",
            "Film",
            "WrittenWork",
        ],
        {"title": "Oak", "content": " A tree."},
        "dbpedia_14 title: Oak content:  A tree.",
    ),
    "classification/amazon_polarity": (
        ["negative", "positive"],
        {"title": "Good", "content": "I like it."},
        "amazon_polarity title: Good content: I like it.",
    ),
}
SIMILARITIES = [0.0, 1.66, 2.8, 5.0]
SIMILARITY_TEXTS = ["0.0", "1.6", "2.8", "5.0"]


def hub_rows(name, copies=2):
    """Rows with every label, `copies` times."""
    classes, row, _ = CASES[name]
    if name == "glue/stsb":
        rows = [{**row, "label": label} for label in SIMILARITIES]
    elif name == "super_glue/record":
        rows = [{**row, "answers": answers} for answers in (["Bob"], ["Ann", "Bob"], ["Rome"])]
    else:
        rows = [{**row, find_task(name).label: label} for label in range(len(classes))]
    rows = [dict(row) for _ in range(copies) for row in rows]
    for i, row in enumerate(rows):
        if name == "super_glue/multirc":
            row["idx"] = {"paragraph": i // 4, "question": i // 2, "answer": i}
        elif name == "super_glue/record":
            row["idx"] = {"passage": i, "query": i}
        elif not name.startswith("classification"):
            row["idx"] = i
    return rows


def hub_features(name):
    classes, row, _ = CASES[name]
    features = {column: INT if isinstance(value, int) else STRING for column, value in row.items()}
    if name == "glue/stsb":
        features["label"] = FLOAT
    elif name == "super_glue/record":
        features |= {"entities": List(STRING), "answers": List(STRING), "idx": {"passage": INT, "query": INT}}
        features["entity_spans"] = {"text": List(STRING), "start": List(INT), "end": List(INT)}
    else:
        features[find_task(name).label] = ClassLabel(names=classes)
    if name == "super_glue/multirc":
        features["idx"] = {"paragraph": INT, "question": INT, "answer": INT}
    elif not name.startswith("classification") and "idx" not in features:
        features["idx"] = INT
    return Features(features)


def hub_splits(name, copies=2):
    task = find_task(name)
    rows = Dataset.from_list(hub_rows(name, copies), features=hub_features(name))
    return {split: rows for split in (task.train, task.validation, task.test) if split}
