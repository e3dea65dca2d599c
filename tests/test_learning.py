"""The comparison of methods: what it calls exact match, how it pairs, chooses and counts, the page that it writes."""

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fresh_process import run_script
from scipy import stats


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "examples/benchmarks")]

import learning  # noqa: E402
import learning_report  # noqa: E402
from learning_methods import METHODS, PAPER, PLAIN, RECOMMENDED, SETTINGS, ZERO_START, Run  # noqa: E402
from learning_statistics import Measurements, cells, difference  # noqa: E402


RUN = Run("sentiment", PLAIN, 0.3, seed=0, steps=2)


def cell(method=PLAIN, task="topic", rate=0.1, test=(0.5, 0.6), validation=0.5, curve=(0.1, 0.5), **changes):
    values = {"task": task, "method": method, "learning_rate": rate, "tokens": 10, "shots": None, "init": "RANDOM"}
    values |= {"steps": 10, "batch_size": 8, "seeds": list(range(len(test))), "test": list(test)}
    values |= {"validation": validation, "curve_steps": [5, 10], "curve": list(curve), "ms_per_step": 2.0}
    return {**values, "trained": 1280, **changes}


# --- training ---------------------------------------------------------------------------------------------------


def test_exact_match_counts_the_rows_whose_generated_text_is_the_label():
    base, _ = learning.frozen_model()
    split = {name: tensor[:40] for name, tensor in learning.split_of("sentiment", "validation").items()}
    config = METHODS[PLAIN].config(RUN)
    torch.manual_seed(0)
    model = learning.get_peft_model(base, config)
    found = 0
    for seed in range(4):  # an untrained prompt answers anything: make what it says the label of half of the rows
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.prompt_encoder["default"].embedding.weight, std=5.0)
        texts = {name: split[name] for name in ("input_ids", "attention_mask")}
        answers = model.eval().generate(**texts, max_new_tokens=2, do_sample=False)[:, 1:]
        is_word = answers[:, :1] != base.config.eos_token_id
        labels = torch.where((torch.arange(40)[:, None] % 2 == 0) & is_word, answers, split["labels"])
        expected = (answers == labels).all(-1).float().mean().item()
        assert learning.exact_match(model, {**split, "labels": labels}) == pytest.approx(expected)
        found += expected > 0
    assert found == 4


@pytest.mark.parametrize("method", (PLAIN, "LoRA", "SuperPos", RECOMMENDED))
def test_a_run_is_the_same_each_time(method):
    first, again, other = (learning.train(replace(RUN, method=method, seed=seed)) for seed in (0, 0, 1))
    for record in (first, again, other):
        del record["seconds_per_step"]
    assert first == again
    assert first != other


def test_methods_of_a_seed_see_the_same_rows_in_the_same_order(monkeypatch):
    seen = []
    rows_of = learning.rows_of
    monkeypatch.setattr(
        learning, "rows_of", lambda split, indices: (seen.append(indices.tolist()), rows_of(split, indices))[1]
    )
    for method in (PLAIN, "prefix tuning", RECOMMENDED):
        learning.train(replace(RUN, method=method))
    assert seen[:2] == seen[2:4] == seen[4:6]
    assert len(set(seen[0] + seen[1])) == 16


def test_few_shots_are_that_many_rows_of_each_class():
    labels = learning.split_of("topic", "train", 5, 0)["labels"][:, 0]
    assert labels.unique(return_counts=True)[1].tolist() == [5, 5, 5, 5]


def test_the_network_of_the_zero_start_keeps_its_rate_whatever_the_prompts():
    base, _ = learning.frozen_model()
    for rate in (0.0003, 3.0):
        model = learning.get_peft_model(copy.deepcopy(base), METHODS[ZERO_START].config(RUN))
        rates = {group["name"]: group["lr"] for group in METHODS[ZERO_START].optimizer(model, rate).param_groups}
        assert rates == {"prompt": rate, "encoder": 0.01, "encoder_no_decay": 0.01}


def test_held_out_tasks_are_all_that_are_not_for_development():
    assert set(learning.HELD_OUT) == {"aspect", "same_words", "agreement"}
    runs = [run for runs in learning.suites().values() for run in runs]
    assert {run.seed for run in runs} == {0, 1, 2, 3, 4}
    assert {run.tokens for run in runs} == {10, 100} and {run.shots for run in runs} == {None, 5, 20, 100}
    assert {run.method for run in runs} == set(METHODS) and set(SETTINGS) < set(METHODS)


def test_finished_runs_are_read_and_not_trained_again(tmp_path, monkeypatch):
    records = learning.run_all([RUN], tmp_path, processes=1)
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text() + '{"task": "senti')  # killed while the next one was written
    monkeypatch.setattr(learning, "train", None)  # nothing may be trained: a pool could not even send this
    assert learning.run_all([RUN], tmp_path, processes=1) == {RUN: json.loads(json.dumps(records[RUN]))}
    assert len(path.read_text().splitlines()) == 1


def test_runs_of_other_methods_are_not_taken_for_finished(tmp_path, monkeypatch):
    learning.run_all([], tmp_path, processes=1)
    changed = tmp_path / "learning_methods.py"
    changed.write_text("METHODS = {}")
    monkeypatch.setattr(learning.learning_methods, "__file__", str(changed))
    learning.run_all([], tmp_path, processes=1)
    assert len(list(tmp_path.glob("runs-*.jsonl"))) == 2


# --- statistics -------------------------------------------------------------------------------------------------


def test_cells_join_seeds_in_order():
    records = [
        {
            **cell(),
            "seed": seed,
            "test": accuracy,
            "validation": accuracy,
            "curve": [(5, accuracy)],
            "seconds_per_step": 0.1,
        }
        for seed, accuracy in ((1, 0.25), (0, 0.75))
    ]
    (joined,) = cells(records)
    assert joined["seeds"] == [0, 1] and joined["test"] == [0.75, 0.25]
    assert joined["validation"] == 0.5 and joined["curve"] == [0.5] and joined["ms_per_step"] == 100


def test_the_best_rate_is_chosen_on_validation_rows():
    found = Measurements(
        [cell(rate=0.1, validation=0.6, test=(0.2, 0.2)), cell(rate=1.0, validation=0.5, test=(0.9, 0.9))]
    )
    assert found.best(PLAIN, "topic")["learning_rate"] == 0.1
    assert found.at_best(PLAIN) == {"topic": [20.0, 20.0]}


def test_mean_and_spread_are_over_rates():
    found = Measurements([cell(rate=rate, test=(accuracy, accuracy)) for rate, accuracy in ((0.1, 0.2), (1.0, 0.6))])
    assert found.mean() == pytest.approx(40)
    assert found.spread_over_rates(PLAIN) == pytest.approx(20)


def test_steps_are_counted_to_the_final_accuracy_of_prompt_tuning():
    found = Measurements([cell(), cell(PAPER, curve=(0.5, 0.4)), cell(RECOMMENDED, curve=(0.2, 0.49))])
    assert found.steps_to_plain(PLAIN) == {"topic": 1.0}
    assert found.steps_to_plain(PAPER) == {"topic": 0.5}
    assert found.steps_to_plain(RECOMMENDED) == {"topic": None}


def test_the_interval_of_a_difference_is_that_of_a_paired_t_test():
    first, second = [61.0, 70.0, 64.0, 69.0, 58.0], [60.0, 66.0, 65.0, 62.0, 57.0]
    mean, width = difference({"a": first}, {"a": second})
    interval = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (mean - width, mean + width) == pytest.approx((interval.low, interval.high))
    both = difference({"a": first, "b": [0.0] * 5}, {"a": second, "b": [0.0] * 5})
    assert both == pytest.approx((mean / 2, width / 2))


def test_only_a_difference_above_its_interval_gets_a_star():
    assert learning_report.verdict(2.0, 1.9) == "+2.0 ± 1.9*"
    assert learning_report.verdict(-2.0, 2.1) == "-2.0 ± 2.1"
    assert learning_report.verdict(2.0, float("inf")) == "+2.0"


def test_the_command_trains_and_writes_a_page_that_says_what_it_is(tmp_path):
    result = run_script(learning.__file__, "--smoke", "--processes", "1", "--output", tmp_path)
    assert result.returncode == 0, result.stderr
    printed = result.stdout
    page = (tmp_path / "learning.md").read_text()
    assert page in printed and "--smoke" in page and "these figures mean nothing" in page
    assert all(f"| {method} | " in page for method in learning.PROMPTS)
    assert all((tmp_path / f"learning-{name}.png").stat().st_size > 5000 for name in ("rates", "curves"))


# --- the page -----------------------------------------------------------------------------------------------------


def test_the_page_and_the_readme_show_the_measurements_that_are_kept():
    measured = json.loads((ROOT / "docs/learning.json").read_text())
    assert (ROOT / "docs/learning.md").read_text() == learning_report.page(measured)
    readme = (ROOT / "README.md").read_text()
    summary = learning_report.summary_table(Measurements(measured["suites"]["rates"]))
    assert learning_report.include(readme, "learning", summary) == readme


def test_measurements_that_are_kept_are_whole():
    suites = json.loads((ROOT / "docs/learning.json").read_text())["suites"]
    for name, runs in learning.suites().items():
        wanted = {(run.task, run.method, run.learning_rate, run.tokens, run.shots, run.init) for run in runs}
        fields = ("task", "method", "learning_rate", "tokens", "shots", "init")
        assert {tuple(found[field] for field in fields) for found in suites[name]} == wanted
        assert all(found["seeds"] == [0, 1, 2, 3, 4] for found in suites[name])


def test_a_page_without_marks_is_refused():
    with pytest.raises(ValueError, match="<!-- learning -->"):
        learning_report.include("no marks", "learning", "table")
