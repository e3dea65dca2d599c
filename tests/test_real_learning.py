"""The comparison on real models: packed rows, what counts as correct, chosen rates, resumed runs."""

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from peft import get_peft_model


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "examples/benchmarks")]

import real_data  # noqa: E402
import real_learning  # noqa: E402
import real_report  # noqa: E402
from real_data import Row, Task, load_task, packed_logits  # noqa: E402
from real_methods import METHODS, PLAIN, PLAIN_TEXT, RECOMMENDED, SCALED, Place, Run  # noqa: E402


ROWS = [Row((7, 8, 9), (10, 11)), Row((12,), (13,)), Row((5, 6, 7, 8, 20), (10, 14))]
TASK = Task("colors", ((10, 11), (10, 14), (13,)), {"train": ROWS * 8, "validation": ROWS, "test": ROWS}, "is it")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(vocab_size=256).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("method", METHODS)
def test_packed_rows_have_the_logits_of_each_row_alone(method, folder, monkeypatch):
    torch.manual_seed(0)
    model = get_peft_model(
        tiny_llama(vocab_size=256), METHODS[method].config(Place(0, folder, "is it", "is it red fast"))
    ).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            torch.nn.init.normal_(parameter)
    logits, targets = packed_logits(model, ROWS)
    assert targets.tolist() == [10, 11, 13, 10, 14]
    alone = []
    for row in ROWS:
        ids = torch.tensor([row.text + row.label[:-1]])
        full = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        alone.append(full[-len(row.label) :])
    torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-4, atol=1e-4)
    every_logit = []
    monkeypatch.setattr(
        real_data, "packed_logits", lambda *args: every_logit.append(packed_logits(*args)) or every_logit[-1]
    )
    real_data.accuracy(model, TASK, ROWS, size=2)  # two passes over one computed prompt
    torch.testing.assert_close(torch.cat([one[0] for one in every_logit]), logits.detach(), rtol=1e-4, atol=1e-4)


def test_only_labels_of_the_task_are_compared_token_by_token(monkeypatch):
    logits = torch.zeros(5, 64)
    logits[:, 60] = 9.0  # no label has this token
    logits[0, 10] = logits[1, 11] = 1.0  # correct
    logits[2, 10] = 1.0  # 13 would be correct
    logits[3, 10] = logits[4, 11] = 1.0  # correct, then wrong
    monkeypatch.setattr(real_data, "packed_logits", lambda model, rows, cache: (logits, None))
    assert real_data.count_correct(None, TASK, ROWS) == 1
    logits[4, 14] = 2.0
    logits[2, 13] = 2.0
    assert real_data.count_correct(None, TASK, ROWS) == 3


def write_data(folder, labels=("good", "bad")):
    for split in ("train", "validation", "test"):
        rows = [{"text": f"this film is {word}", "label": labels[i % 2]} for i, word in enumerate(["red", "fast"] * 4)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


def test_data_are_read_from_files(tmp_path, tokenizer):
    task = load_task(write_data(tmp_path), tokenizer, longest=3)
    assert len(task.splits["train"]) == 8 and all(len(row.text) == 3 for row in task.splits["train"])
    assert task.labels == tuple((tokenizer.convert_tokens_to_ids(word),) for word in ("bad", "good"))
    assert "bad, good" in task.instruction


def test_a_label_that_begins_like_another_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="beginning of another"):
        load_task(write_data(tmp_path, ("good", "good bad")), tokenizer)


def test_a_run_is_repeatable_leaves_the_base_model_alone_and_reports_divergence(folder, tmp_path):
    (tmp_path / "films").mkdir()
    write_data(tmp_path / "films")
    run = Run("tiny", "films", SCALED, 0.1, seed=0, steps=6, batch_size=4)
    records = []
    for method in (SCALED, PLAIN_TEXT, "LoRA", "prefix tuning", SCALED):
        record = real_learning.train(replace(run, method=method), folder, tmp_path)
        assert not record["diverged"] and record["trained"] > 0 and 0 <= record["test"] <= 1
        del record["seconds"]
        records.append(record)
    assert records[0] == records[-1]
    diverged = real_learning.train(replace(run, method="LoRA", learning_rate=math.inf), folder, tmp_path)
    assert diverged["diverged"] and diverged["test"] == 0


@pytest.mark.parametrize("method, rate", [(PLAIN_TEXT, 3.0), (SCALED, 0.15)])
def test_the_best_or_the_fixed_rate_is_repeated_with_more_seeds_and_nothing_runs_twice(
    method, rate, folder, tmp_path, monkeypatch, capsys
):
    calls = []

    def train(run, model, data):
        calls.append(run)
        return {"validation": run.learning_rate, "test": run.seed / 10}

    def run_all(kind, runs, train, path, processes):
        found.update({run: train(run) for run in runs if run not in found})
        return found

    found = {}
    monkeypatch.setattr(real_learning, "train", train)
    monkeypatch.setattr(real_learning, "run_all", run_all)
    options = ["--model", folder, "--datasets", "trec", "--methods", method, "--output", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", ["real_learning.py", *options])
    real_learning.main()
    assert [(run.learning_rate, run.seed) for run in calls[4:]] == [(rate, 1), (rate, 2)]
    assert len(calls) == 6
    line = json.loads(capsys.readouterr().out)
    assert line == {"task": "trec", "method": method, "learning_rate": rate, "test": [0.0, 0.1, 0.2]}


def test_examples_follow_the_instruction_one_of_each_label_in_turn(tokenizer):
    rows = [Row((7, 8), (13,)), Row((7, 9), (13,)), Row((5, 6), (10, 11)), Row(tuple(range(4, 60)), (10, 14))]
    task = replace(TASK, splits={**TASK.splits, "train": rows})
    text = task.with_examples(tokenizer, seed=0, longest=14)
    length = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert text.startswith(task.instruction) and length <= 14
    labels = [tokenizer.decode(label) for label in task.labels]
    assert [sum(line.endswith(label) for line in text.split("\n")) for label in labels] == [1, 0, 2]  # one is too long
    assert text.split("\n")[0].endswith(labels[0])
    assert task.with_examples(tokenizer, seed=1, longest=14) != task.with_examples(tokenizer, seed=0, longest=0)


def records_of(method, tasks=("a", "b"), offset=0.0):
    """Runs of a whole search: the second rate is the best one on validation, and seeds differ on test."""
    rates = METHODS[method].rates
    best = METHODS[method].fixed_rate or rates[1]
    for task in tasks:
        for rate, seed in [(rate, 0) for rate in rates] + [(best, seed) for seed in (1, 2)]:
            validation = 0.8 if rate == best else 0.4
            curve = [(30, 0.5), (75, 0.9 if method == RECOMMENDED else 0.6)]
            results = {"validation": validation, "test": 0.7 + offset + seed / 100, "curve": curve, "trained": 10}
            yield {**asdict(Run("m", task, method, rate, seed)), **results, "diverged": False, "seconds": 1.0}


def test_the_page_compares_complete_methods_at_fixed_and_at_best_rates(tmp_path):
    records = [*records_of(RECOMMENDED, offset=0.05), *records_of(PLAIN), *records_of(PLAIN_TEXT, offset=0.01)]
    records += records_of("LoRA", tasks=("a",))
    found = real_report.Results(records)
    assert found.methods == [RECOMMENDED, PLAIN, PLAIN_TEXT]  # LoRA has not run everywhere
    assert found.test(PLAIN)["b"] == pytest.approx([70, 71, 72])
    unfinished = real_report.Results([r for r in records if (r["method"], r["task"], r["seed"]) != (PLAIN, "a", 2)])
    assert unfinished.test(RECOMMENDED)["b"] == pytest.approx([75, 76]), "on the seeds that all have run"
    assert found.by_rate(PLAIN) == pytest.approx([40, 80, 40, 40])
    assert found.steps_to_plain(RECOMMENDED, "a") == 0.5 and found.steps_to_plain(PLAIN, "a") == 1.0
    page = real_report.page(found)
    assert "| over prompt tuning | +5.0 ± 0.0* | +5.0 ± 0.0* | +5.0 ± 0.0* |" in page
    assert "Not run yet on every data set: prompt tuning, examples, LoRA" in page
    with open(tmp_path / "learning-decoder.jsonl", "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    (tmp_path / "README.md").write_text("<!-- learning-decoder -->\n<!-- /learning-decoder -->\n")
    script = [sys.executable, str(ROOT / "examples/benchmarks/real_report.py"), str(tmp_path)]
    subprocess.run([*script, "--include", str(tmp_path / "README.md")], check=True)
    assert real_report.summary_table(found) in (tmp_path / "README.md").read_text()
    assert (tmp_path / "learning-decoder.md").exists() and (tmp_path / "learning-decoder-rates.png").exists()
