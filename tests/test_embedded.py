"""The embedded model and its tasks: small, deterministic, and a field where counting words does not help."""

import json
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

from embedded import pretrain, skills, tasks  # noqa: E402


RELATIONAL = [
    "entailment",
    "word_in_context",
    "question_answering",
    "aspect",
    "same_words",
    "agreement",
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tasks.MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForSeq2SeqLM.from_pretrained(tasks.MODEL).float().eval()


@pytest.fixture(scope="module")
def data():
    return {name: tasks.load_task(name) for name in tasks.TASKS}


def test_model_folder_is_small():
    assert sum(path.stat().st_size for path in tasks.MODEL.iterdir()) <= 5_000_000


def test_model_has_a_row_for_every_token_and_no_dropout(model, tokenizer):
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.dropout_rate == 0.0
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)


def test_tokenizer_ends_with_eos_and_falls_back_to_characters(tokenizer):
    ids = tokenizer("the film was good zyx7")["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.unk_token_id not in ids
    assert len(ids) == 4 + len("zyx7") + 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the film was good zyx7"


def test_saved_tokenizer_neither_truncates_nor_pads_by_itself():
    saved = json.loads((tasks.MODEL / "tokenizer.json").read_text())
    assert saved["truncation"] is None and saved["padding"] is None


def test_token_ids_follow_frequency(tokenizer):
    counts = Counter(w for pair in skills.mixture(Random(1), 20_000) for text in pair for w in text.split())
    ids = {word: tokenizer(word)["input_ids"][0] for word in ("the", "film", "hot")}
    assert counts["the"] > counts["film"] > counts["hot"]
    assert ids["the"] < ids["film"] < ids["hot"]


@pytest.mark.parametrize("name", tasks.TASKS)
def test_splits_are_balanced_and_disjoint(name, data):
    task, splits = tasks.TASKS[name], data[name]
    assert list(splits) == ["train", "validation", "test"]
    texts = [text for split in splits.values() for text in split["text"]]
    assert len(set(texts)) == len(texts) == task.train_size + task.validation_size + task.test_size
    for split in splits.values():
        assert split.column_names == ["text", "label"]
        counts = Counter(split["label"])
        assert set(counts) == set(task.labels.values()) and len(set(counts.values())) == 1


def test_the_seed_chooses_training_rows_only(data):
    again, other = tasks.load_task("entailment"), tasks.load_task("entailment", train_size=20, seed=1)
    assert all(again[split].to_list() == data["entailment"][split].to_list() for split in again)
    assert other["train"].num_rows == 20
    assert other["test"].to_list() == again["test"].to_list()
    assert not set(other["train"]["text"]) & set(again["train"]["text"][:20])


def test_rows_do_not_depend_on_the_process():
    """A row written down once: a change of the world changes every figure that was measured on it."""
    assert tasks.load_task("entailment", train_size=2)["train"].to_list() == ENTAILMENT_ROWS


def test_labels_never_stood_for_an_outcome_but_are_ordinary_answers():
    labels = {label for task in tasks.TASKS.values() for label in task.labels.values()}
    assert labels <= set(skills.HELD_OUT_LABELS)
    assert labels.isdisjoint(skills.LABELS)
    for judgement in skills.JUDGEMENTS.values():
        assert labels.isdisjoint(label for verbaliser in judgement.labels for label in verbaliser)
    answers = Counter(word for _, target in skills.mixture(Random(0), 20_000) for word in target.split())
    assert min(answers[label] for label in labels) >= 5


def test_tasks_share_no_label_and_some_are_held_out():
    labels = [label for task in tasks.TASKS.values() for label in task.labels.values()]
    assert len(set(labels)) == len(labels)
    assert sum(not task.development for task in tasks.TASKS.values()) == 3


def test_every_text_is_in_the_vocabulary_and_short(data, tokenizer):
    for name, splits in data.items():
        for split in splits.values():
            rows = tokenizer(list(split["text"]))["input_ids"]
            assert not any(tokenizer.unk_token_id in row for row in rows), name
            assert max(map(len, rows)) <= pretrain.MAX_INPUT, name
            assert all(len(row) == 2 for row in tokenizer(list(split["label"]))["input_ids"]), name


@pytest.mark.parametrize("name", RELATIONAL)
def test_counting_words_does_not_solve_relational_tasks(name, data):
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    train, test = data[name]["train"], data[name]["test"]
    counter = CountVectorizer(token_pattern=r"\S+")
    bags = counter.fit_transform(train["text"])
    classifier = LogisticRegression(C=0.1, max_iter=500).fit(bags, train["label"])
    assert abs(classifier.score(counter.transform(test["text"]), test["label"]) - 0.5) < 0.08


def test_unknown_task():
    with pytest.raises(ValueError, match=r"`name` must be one of sentiment, .*got 'sentiments'"):
        tasks.load_task("sentiments")


def test_uneven_training_size():
    with pytest.raises(
        ValueError, match=r"`train_size` of 'topic' must be a positive multiple of its 4 labels, got 10"
    ):
        tasks.load_task("topic", train_size=10)


def test_model_answers_what_it_was_pretrained_on(model, tokenizer):
    rng = Random(7)
    for skill in ("sentiment", "entailment", "word in context", "question"):
        texts, targets = zip(*(skills.SKILLS[skill][-1](rng) for _ in range(100)), strict=True)
        inputs = tokenizer(list(texts), return_tensors="pt", padding=True)
        answers = tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=10), skip_special_tokens=True)
        assert sum(a == b for a, b in zip(answers, targets, strict=True)) >= 90, skill


def test_model_does_not_solve_the_tasks_without_a_prompt(model, tokenizer):
    for name in ("sentiment", "entailment"):
        exact, _ = tasks.without_prompt(name, model, tokenizer)
        assert exact < 0.05, name


def test_pretraining_refuses_to_overwrite(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--output", str(tmp_path)])
    with pytest.raises(SystemExit):
        pretrain.main()
    assert "--overwrite" in capsys.readouterr().err


def test_pretraining_writes_a_model_that_loads(tmp_path, monkeypatch):
    torch.manual_seed(0)
    output = tmp_path / "model"
    options = f"--output {output} --steps 2 --batch_size 4 --evaluate 2 --threads {torch.get_num_threads()}"
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *options.split()])
    pretrain.main()
    assert AutoModelForSeq2SeqLM.from_pretrained(output).dtype == torch.bfloat16
    assert len(AutoTokenizer.from_pretrained(output)) > 500
    assert (output / "pretraining.json").exists() and [path.name for path in tmp_path.iterdir()] == ["model"]


ENTAILMENT_ROWS = [
    {"text": "mia has chairs . kate has hats . finn keeps boxes | finn has hats", "label": "silver"},
    {"text": "nick owns clocks . finn keeps chairs . dora has bottles | dora keeps bottles", "label": "gold"},
]
