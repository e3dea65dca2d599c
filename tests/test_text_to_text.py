"""The T5 example: every task from rows in the Hub's schema to scores, its splits, metrics and bad data."""

import dataclasses
import json
import logging
import sys
from pathlib import Path
from random import Random

import pytest
from datasets import Dataset
from hub_rows import CASES, RECORD, SIMILARITY_TEXTS, hub_splits
from source import lines_of_code
from transformers import AutoTokenizer


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

from embedded.tasks import MODEL  # noqa: E402
from text_to_text import data, metrics  # noqa: E402
from text_to_text.data import TASKS, load_texts  # noqa: E402
from text_to_text.metrics import METRICS  # noqa: E402
from text_to_text.superglue import mark  # noqa: E402


def save(splits, folder):
    """A file per split, named as on the Hub."""
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def both(rows):
    return {"train": rows, "validation": rows}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


# --- tasks ----------------------------------------------------------------------------------------------------------


def test_every_task_of_the_original_is_there():
    assert set(TASKS) - set(CASES) == {f"embedded/{name}" for name in data.EMBEDDED}
    assert {"aspect", "same_words", "agreement"}.isdisjoint(data.EMBEDDED)  # kept for one last look


@pytest.mark.parametrize("name", CASES)
def test_data_is_pinned_to_a_commit(name):
    assert len(TASKS[name].revision) == 40 and int(TASKS[name].revision, 16)


@pytest.mark.parametrize("name", CASES)
def test_rows_of_the_hub_become_texts_and_perfect_answers_score_one(name, tmp_path, monkeypatch):
    """`load_dataset` takes a folder of the repository's name before it asks the Hub."""
    task = TASKS[name]
    subset = task.subset or "default"
    save(hub_splits(name, copies=8), tmp_path / task.repo / subset)
    splits = "".join(f"\n  - split: {s}\n    path: {subset}/{s}-*" for s in hub_splits(name))
    readme = f"---\nconfigs:\n- config_name: {subset}\n  data_files:{splits}\n---\n"
    (tmp_path / task.repo / "README.md").write_text(readme)
    monkeypatch.chdir(tmp_path)

    texts = load_texts(task)
    assert set(texts) == {"train", "validation", "test"}
    for split in texts.values():
        assert set(split["source"]) == {CASES[name][2]}
    expected = task.words
    if name == "glue/stsb":
        expected = SIMILARITY_TEXTS
    elif name == "super_glue/record":
        expected = ["Ann", "Bob", "Rome"]
    elif name == "super_glue/wsc":
        expected = ["Mark"]
    assert set(texts["train"]["target"]) == set(expected)
    for metric in task.metrics:
        rows = texts["test"]
        assert METRICS[metric](rows["target"], rows, task.words) == pytest.approx(1.0), metric
        assert METRICS[metric](["no label word"] * len(rows), rows, task.words) == 0.0, metric


@pytest.mark.parametrize("name", ["glue/mnli", "super_glue/multirc", "super_glue/record", "classification/imdb"])
@pytest.mark.parametrize("kind", ["parquet", "json"])
def test_a_local_folder_gives_the_same_texts(name, kind, tmp_path):
    splits = hub_splits(name)
    folder = save(splits, tmp_path / "data")
    if kind == "json":  # plain ids, without names of classes
        folder = tmp_path / "json"
        folder.mkdir()
        for split, rows in splits.items():
            (folder / f"{split}.json").write_text("\n".join(json.dumps(row) for row in rows))
    texts = load_texts(TASKS[name], data_dir=folder)
    assert texts["test"]["source"][0] == CASES[name][2]
    total = sum(len(rows) for rows in texts.values())
    extra = 2 if name == "super_glue/record" else 0  # training has a row for each answer
    assert total == sum(len(rows) for rows in splits.values()) + extra


@pytest.mark.parametrize("name", data.EMBEDDED)
def test_the_embedded_tasks_keep_their_splits(name):
    raw = data.embedded.load_task(name)
    texts = load_texts(TASKS[f"embedded/{name}"], max_train_samples=5)
    assert sorted(texts["test"]["source"]) == sorted(raw["test"]["text"])
    assert sorted(texts["validation"]["target"]) == sorted(raw["validation"]["label"])
    assert len(texts["train"]) == 5


def test_a_pronoun_is_marked_where_it_stands_and_not_where_it_stood_before():
    assert mark("it ran and it hid", "it", 3, "*", "*") == "it ran and *it* hid"
    assert mark('"Good for him," he said.', "him", 2, "*", "*") == '"Good for *him*," he said.'
    assert mark("they want to use it now", "it", 3, "*", "*") == "they want to use *it* now"  # an index one too low
    assert mark("the big dog ran", "The big dog", 0, "* ", " *") == "* the big dog * ran"
    assert mark("a sit it", "it", 1, "#", "#") == "a sit #it#"
    assert mark("a b c", "x", 1, "#", "#") == "a #b# c"  # a span that is not there: the word is


# --- splits and few-shot --------------------------------------------------------------------------------------------


def folder_of(name, tmp_path, copies=8):
    return save(hub_splits(name, copies), tmp_path / "data")


def test_validation_is_halved_and_the_halves_are_the_same_for_every_seed(tmp_path):
    rows = [{"sentence": f"row {i}", "label": i % 2, "idx": i} for i in range(20)]
    folder = save(both(Dataset.from_list(rows)), tmp_path / "data")
    one, other = (load_texts(TASKS["glue/sst2"], data_dir=folder, seed=seed) for seed in (0, 1))
    halves = [set(one[split]["source"]) for split in ("validation", "test")]
    assert [len(half) for half in halves] == [10, 10] and not halves[0] & halves[1]
    assert one["validation"].to_list() == other["validation"].to_list()
    assert one["test"].to_list() == other["test"].to_list()
    assert one["train"].to_list() != other["train"].to_list()


def test_the_answers_of_a_question_stay_in_one_half(tmp_path):
    texts = load_texts(TASKS["super_glue/multirc"], data_dir=folder_of("super_glue/multirc", tmp_path))
    halves = [set(texts[split]["group"]) for split in ("validation", "test")]
    assert [len(half) for half in halves] == [4, 4] and not halves[0] & halves[1]
    few = load_texts(TASKS["super_glue/multirc"], data_dir=tmp_path / "data", max_eval_samples=1)
    assert len(few["test"]) == 2  # one whole question


def test_without_a_validation_split_a_part_of_train_is_taken_and_test_is_left_whole(tmp_path):
    splits = {
        split: Dataset.from_list([{"text": f"{split} {i}", "label": i % 2} for i in range(50)])
        for split in ("train", "test")
    }
    texts = load_texts(TASKS["classification/imdb"], data_dir=save(splits, tmp_path / "data"))
    assert [len(texts[split]) for split in ("train", "validation", "test")] == [45, 5, 50]
    assert not set(texts["train"]["source"]) & set(texts["validation"]["source"])
    assert all("test" in source for source in texts["test"]["source"])


def test_k_rows_of_each_class_are_taken_and_a_small_class_is_named(tmp_path, caplog):
    rows = [
        {"premise": f"{i}", "hypothesis": "", "label": 0 if i < 10 else 1 if i < 18 else 2, "idx": i}
        for i in range(20)
    ]
    folder = save(both(Dataset.from_list(rows)), tmp_path / "data")
    with caplog.at_level(logging.WARNING):
        texts = load_texts(TASKS["super_glue/cb"], data_dir=folder, k_per_class=5)
    targets = list(texts["train"]["target"])
    assert {word: targets.count(word) for word in targets} == {"entailment": 5, "contradiction": 5, "neutral": 2}
    assert "Class 'neutral' has 2 rows, not 5: all are taken." in caplog.text
    other = load_texts(TASKS["super_glue/cb"], data_dir=folder, k_per_class=5, seed=1)
    assert set(other["train"]["source"]) != set(texts["train"]["source"])
    assert len(texts["validation"]) == 10  # few-shot is about training rows


def test_free_answers_are_few_in_all_and_training_has_a_row_for_each(tmp_path):
    folder = folder_of("super_glue/record", tmp_path)
    texts = load_texts(TASKS["super_glue/record"], data_dir=folder, k_per_class=6)
    assert len({row["source"] + str(row["group"]) for row in texts["train"]}) == 6
    assert len(texts["train"]) == sum({row["group"]: len(row["answers"]) for row in texts["train"]}.values())
    assert len(texts["validation"]) == len(set(texts["validation"]["group"])) == 12


def test_only_rows_that_name_the_referent_ask_for_it(tmp_path):
    texts = load_texts(TASKS["super_glue/wsc"], data_dir=folder_of("super_glue/wsc", tmp_path))
    assert [len(texts[split]) for split in ("train", "validation", "test")] == [8, 4, 4]


# --- tokens ---------------------------------------------------------------------------------------------------------


def test_target_lengths_are_counted_where_words_are_fixed(tokenizer):
    assert data.longest_target(TASKS["embedded/topic"], tokenizer) == 2
    words = dataclasses.replace(TASKS["embedded/topic"], words=("sun", "the film was good"))
    assert data.longest_target(words, tokenizer) == 5
    assert data.longest_target(TASKS["super_glue/record"], tokenizer) == 48
    with pytest.raises(ValueError, match="The tokenizer cannot encode 'Ω', so no answer could be correct"):
        data.longest_target(dataclasses.replace(words, words=("sun", "Ω")), tokenizer)


# --- metrics, by hand -----------------------------------------------------------------------------------------------

YES_NO = ("no", "yes")


def rows(*targets, groups=None, answers=None):
    return {"target": list(targets), "group": groups, "answers": answers}


def test_accuracy_forgives_case_and_spaces_only():
    assert metrics.accuracy(["Yes", " no ", "yes.", ""], rows("yes", "no", "yes", "no")) == 0.5


def test_f1_counts_an_unknown_answer_as_the_other_class():
    truth = rows("yes", "yes", "yes", "no", "no")
    # 2 right, 1 missed, 1 wrongly claimed: 2 * 2 / (2 * 2 + 1 + 1)
    assert metrics.f1(["yes", "yes", "no", "yes", "no"], truth, YES_NO) == pytest.approx(4 / 6)
    assert metrics.f1(["yes", "yes", "blue", "blue", "no"], truth, YES_NO) == pytest.approx(4 / 6)
    assert metrics.f1(["no"] * 5, truth, YES_NO) == 0.0


def test_macro_f1_is_the_mean_over_classes_and_unknown_answers_are_no_class():
    words = ("a", "b", "c")
    # F1 of a: 2/3, of b: 0, of c: 2/3
    assert metrics.macro_f1(["a", "a", "c", "c"], rows("a", "b", "b", "c"), words) == pytest.approx(4 / 9)
    # a: one of two found, none claimed wrongly: 2/3; b: 1. A fourth class with F1 0 would make it 5/9.
    assert metrics.macro_f1(["a", "?", "b"], rows("a", "a", "b"), words) == pytest.approx(5 / 6)
    assert metrics.macro_f1(["?", "?"], rows("a", "b"), words) == 0.0


def test_matthews_correlation_is_negative_where_answers_are_turned_around():
    truth = rows("yes", "yes", "yes", "no")
    # tp 2, fn 1, fp 0, tn 1: (2*1 - 0*1) / sqrt(2*3*1*2)
    assert metrics.matthews(["yes", "yes", "no", "no"], truth, YES_NO) == pytest.approx(2 / 12**0.5)
    assert metrics.matthews(["no", "no", "no", "yes"], truth, YES_NO) == pytest.approx(-1.0)
    assert metrics.matthews(["?"] * 4, truth, YES_NO) == 0.0
    right_or_unknown = metrics.matthews(["yes", "?", "?", "no"], truth, YES_NO)
    assert 0 < right_or_unknown < metrics.matthews(["yes", "yes", "?", "no"], truth, YES_NO) < 1


def test_correlations_of_similarities():
    truth = rows("1.0", "2.0", "3.0")
    assert metrics.pearson(["2.0", "4.0", "3.0"], truth) == pytest.approx(0.5)  # (-1)(-1) + 1*0 + 0*1 over 2
    assert metrics.spearman(["1.0", "3", "5.0"], truth) == pytest.approx(1.0)
    assert metrics.pearson(["3.0", "2.0", "1.0"], truth) == pytest.approx(-1.0)


def test_what_is_no_similarity_counts_as_minus_one_and_nothing_is_ever_nan():
    truth = rows("0.0", "2.0", "4.0")
    for garbage in ("much", "nan", "inf", "-3", "7.0", "1e9", ""):
        assert metrics.pearson(["0.0", "2.0", garbage], truth) == metrics.pearson(["0.0", "2.0", "same"], truth) < 0
    assert metrics.pearson(["2.0"] * 3, truth) == metrics.spearman(["x"] * 3, truth) == 0.0
    assert metrics.pearson(["1.0", "2.0"], rows("3.0", "3.0")) == 0.0


def test_multirc_counts_answers_in_f1a_and_whole_questions_in_exact_match():
    truth = rows("True", "False", "True", "True", "False", groups=["q1", "q1", "q2", "q2", "q3"])
    predictions = ["True", "False", "True", "False", "False"]
    assert METRICS["f1a"](predictions, truth, ("False", "True")) == pytest.approx(4 / 5)  # 2 right, 1 missed
    assert metrics.question_exact_match(predictions, truth) == pytest.approx(2 / 3)
    scattered = [0, 2, 4, 1, 3]  # rows of a question need not be neighbours
    shuffled = rows(*(truth["target"][i] for i in scattered), groups=[truth["group"][i] for i in scattered])
    assert metrics.question_exact_match([predictions[i] for i in scattered], shuffled) == pytest.approx(2 / 3)


def test_record_takes_the_best_answer_on_normalized_text():
    answers = [["Barack Obama", "Obama"], ["the White House"], ["Rome"]]
    truth = rows("Barack Obama", "the White House", "Rome", answers=answers)
    assert metrics.exact_match(["obama.", "White house", "Paris"], truth) == pytest.approx(2 / 3)
    # "president obama": 2/3 with "obama" (1/2 with the other answer); "house" in "white house": 2/3; nothing: 0
    assert metrics.token_f1(["President Obama", "house", ""], truth) == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert metrics.token_f1(["a a a", "white white house", "rome"], truth) == pytest.approx((0 + 4 / 5 + 1) / 3)


def test_metrics_follow_their_published_definitions():
    """Each definition written down once more, in plain words, on random answers."""
    rng = Random(0)
    for _ in range(50):
        truth = [rng.choice(["True", "False"]) for _ in range(12)]
        guess = [rng.choice(["True", "False"]) for _ in range(12)]
        chosen, right = ({i for i, word in enumerate(side) if word == "True"} for side in (guess, truth))
        precision, recall = (len(chosen & right) / max(1, len(side)) for side in (chosen, right))
        table = rows(*truth, groups=[str(i // 3) for i in range(12)])
        f1a = 2 * precision * recall / (precision + recall) if chosen & right else 0.0  # MultiRC: over all answers
        assert METRICS["f1a"](guess, table, ("False", "True")) == pytest.approx(f1a)
        questions = [set(range(start, start + 3)) for start in range(0, 12, 3)]
        exact = sum(question & chosen == question & right for question in questions) / 4
        assert metrics.question_exact_match(guess, table) == pytest.approx(exact)

        words, answer = ([rng.choice("uvwx") for _ in range(rng.randint(1, 4))] for _ in range(2))
        common = sum(min(words.count(letter), answer.count(letter)) for letter in "uvwx")
        precision, recall = common / len(words), common / len(answer)
        f1 = 2 * precision * recall / (precision + recall) if common else 0.0  # SQuAD and ReCoRD: over bags of words
        table = rows("", answers=[[" ".join(answer), "zzz"]])
        assert metrics.token_f1([" ".join(words)], table) == pytest.approx(f1)


def test_a_referent_is_named_by_its_words_without_determiners():
    def right(prediction, referent):
        return metrics.referent_match([prediction], rows(referent)) == 1.0

    assert right("the bunny", "Bunny") and right("fuzzy bunny", "the bunny") and right("bunny", "fuzzy bunny")
    assert not right("Bob", "Bob's hat") and not right("cat", "dog")
    assert not right("", "dog") and not right("the", "dog")


# --- bad input ------------------------------------------------------------------------------------------------------


GOOD = {"sentence": ["good", "bad"] * 4, "label": [1, 0] * 4, "idx": list(range(8))}


@pytest.mark.parametrize(
    "splits, message",
    [
        ({"train": GOOD}, "There is no split 'validation'. There are: train"),
        (
            both({"text": ["good"], "label": [1]}),
            "The train split has no column 'sentence'. It has: text, label",
        ),
        (
            both({"sentence": ["good"], "idx": [0]}),
            "The train split has no column 'label'. It has: sentence, idx",
        ),
        (
            {"train": GOOD, "validation": {"sentence": ["good"], "label": [-1], "idx": [0]}},
            r"Column 'label' holds -1, expected 0 to 1 or one of negative, positive.*hide their test labels",
        ),
        (
            {"train": {"sentence": ["good"], "label": [2], "idx": [0]}, "validation": GOOD},
            "Column 'label' holds 2, expected 0 to 1",
        ),
        (
            both({"sentence": ["good"], "label": ["fine"], "idx": [0]}),
            "Column 'label' holds 'fine', expected 0 to 1 or one of negative, positive",
        ),
        (
            {"train": GOOD, "validation": {"sentence": ["good"], "label": [1], "idx": [0]}},
            "The validation split is empty",
        ),
    ],
)
def test_bad_data_is_refused(splits, message, tmp_path):
    folder = save({name: Dataset.from_dict(rows) for name, rows in splits.items()}, tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        load_texts(TASKS["glue/sst2"], data_dir=folder)


def test_an_empty_folder_and_a_similarity_out_of_range_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no \.parquet, \.json or \.jsonl file"):
        load_texts(TASKS["glue/sst2"], data_dir=tmp_path)
    with pytest.raises(ValueError, match=r"holds -1\.0, expected a similarity from 0 to 5"):
        TASKS["glue/stsb"].answers_of({"label": -1.0})
    with pytest.raises(ValueError, match="Row 0 has no answer in 'answers'"):
        data.write(TASKS["super_glue/record"], Dataset.from_list([{**RECORD, "answers": []}]))


# --- size -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((EXAMPLES / "text_to_text").glob("*.py")), ids=lambda path: path.name)
def test_a_file_is_read_in_one_sitting(path):
    assert lines_of_code(path) <= 150


def test_lines_of_code_are_counted_right(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        '"""Doc\nstring."""\n\nx = """a\nb"""  # two lines\n# comment\ndef f():\n    """Doc."""\n    return 1\n'
    )
    assert lines_of_code(path) == 4
