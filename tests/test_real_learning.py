"""The comparison on real models: packed rows, what counts as correct, chosen rates, resumed runs."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from peft import get_peft_model


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "examples/benchmarks")]

import real_data  # noqa: E402
import real_learning  # noqa: E402
from real_data import Row, Task, load_task, packed_logits  # noqa: E402
from real_methods import METHODS, PLAIN_TEXT, SCALED, Place, Run  # noqa: E402


ROWS = [Row((7, 8, 9), (10, 11)), Row((12,), (13,)), Row((5, 6, 7, 8, 20), (10, 14))]
TASK = Task("colors", ((10, 11), (10, 14), (13,)), {"train": ROWS * 8, "validation": ROWS, "test": ROWS}, "is it")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("method", METHODS)
def test_packed_rows_have_the_logits_of_each_row_alone(method, folder):
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(vocab_size=256), METHODS[method].config(0, Place(folder, "is it", 2))).eval()
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


def test_only_labels_of_the_task_are_compared_token_by_token(monkeypatch):
    logits = torch.zeros(5, 64)
    logits[:, 60] = 9.0  # no label has this token
    logits[0, 10] = logits[1, 11] = 1.0  # correct
    logits[2, 10] = 1.0  # 13 would be correct
    logits[3, 10] = logits[4, 11] = 1.0  # correct, then wrong
    monkeypatch.setattr(real_data, "packed_logits", lambda model, rows: (logits, None))
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
    run = Run(write_data(tmp_path), SCALED, 0.1, seed=0, steps=6, batch_size=4)
    records = []
    for method in (SCALED, PLAIN_TEXT, "LoRA", "prefix tuning", SCALED):
        record = real_learning.train(replace(run, method=method), folder)
        assert not record["diverged"] and record["trained"] > 0 and 0 <= record["test"] <= 1
        del record["seconds"]
        records.append(record)
    assert records[0] == records[-1]
    diverged = real_learning.train(replace(run, method="LoRA", learning_rate=math.inf), folder)
    assert diverged["diverged"] and diverged["test"] == 0


def test_the_best_rate_is_repeated_with_more_seeds_and_nothing_runs_twice(folder, tmp_path, monkeypatch, capsys):
    calls = []

    def train(run, model, evaluation_rows):
        calls.append(run)
        return {"validation": 1.0 if run.learning_rate == 0.07 else 0.5, "test": run.seed / 10}

    def run_all(kind, runs, work, path, processes):
        return {run: work(run) for run in runs} | found

    found = {}
    monkeypatch.setattr(real_learning, "train", train)
    monkeypatch.setattr(real_learning, "run_all", lambda *args: found.update(run_all(*args)) or found)
    options = ["--model", folder, "--datasets", "a/trec", "--methods", SCALED, "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["real_learning.py", *options])
    real_learning.main()
    assert [(run.learning_rate, run.seed) for run in calls[4:]] == [(0.07, 1), (0.07, 2)]
    line = json.loads(capsys.readouterr().out)
    assert line == {"task": "trec", "method": SCALED, "learning_rate": 0.07, "test": [0.0, 0.1, 0.2]}
