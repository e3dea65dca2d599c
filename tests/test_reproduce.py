"""What reproduces published tables: it parses, builds, takes steps on stand-ins, goes on after an interruption."""

import json
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_llama
from fresh_process import run_python, start_script
from peft import PeftConfig, get_peft_model
from source import lines_of_code
from transformers import AutoTokenizer, GenerationConfig, HfArgumentParser, get_cosine_schedule_with_warmup

from peft_residual import ResidualPromptTuningConfig


ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

from embedded.tasks import MODEL  # noqa: E402
from reproduce import plan, results  # noqa: E402
from reproduce import table as driver  # noqa: E402
from text_to_text import train  # noqa: E402
from text_to_text.arguments import Arguments  # noqa: E402
from text_to_text.interruption import last_checkpoint  # noqa: E402


TABLES = [path.stem for path in sorted(plan.TABLES.glob("*.yaml"))]
CELLS = [(name, column) for name in TABLES for column in plan.load_table(name).columns]
EXPERIMENTS = sorted((EXAMPLES / "reproduce" / "metamathqa" / "experiments").glob("*/*"))
DOCUMENT = ROOT / "docs" / "reproducing-the-paper.md"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


# --- the tables that are shipped ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_both_methods_and_lengths_on_all_of_superglue(name, tmp_path):
    runs = plan.plan(plan.load_table(name), tmp_path)
    expected = {"superglue-t5-base": 120, "superglue-t5-large": 96}[name]
    assert len(runs) == expected and len({run.folder for run in runs}) == expected
    said = re.search(rf"\| `{name}` .*\| (\d+) \|", (ROOT / "docs" / "reproducing-the-paper.md").read_text())
    assert int(said[1]) == expected
    settings = [run.settings for run in runs]
    assert {(s["method"], s["num_virtual_tokens"]) for s in settings} == {
        (method, length) for method in ("residual", "prompt_tuning") for length in (10, 100)
    }
    assert {s["task"].removeprefix("super_glue/") for s in settings} == set(
        "boolq cb copa multirc record rte wic wsc".split()
    )
    assert {s["model"] for s in settings} == {name.replace("superglue-t5", "google-t5/t5")}
    assert {s["learning_rate"] for s in settings} == {0.3} and {s["weight_decay"] for s in settings} == {1e-5}


@pytest.mark.parametrize("name, column", CELLS)
def test_a_column_builds_and_takes_two_steps(name, column, tmp_path):
    run = next(run for run in plan.plan(plan.load_table(name), tmp_path) if run.column == column)
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses([*run.words, "--model", str(MODEL)])
    model, tokenizer = train.make_model(args), AutoTokenizer.from_pretrained(MODEL)
    batch = tokenizer(["the food was good", "the food was bad"], text_target=["sun", "rain"], return_tensors="pt")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=args.weight_decay)
    for _ in range(2):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert math.isfinite(loss.item())
    assert not any(torch.equal(old, new) for old, new in zip(before, trained, strict=True))
    assert model.get_prompt(1).shape[1] == int(column.split("-")[-1])


# --- the driver -----------------------------------------------------------------------------------------------------


@pytest.fixture
def own_table(tmp_path):
    """Write a table with two columns, a task and two seeds; any field can be set."""

    def make(**values):
        path = tmp_path / "mine.yaml"
        columns = {
            "ours": {"options": {"method": "residual"}, "published": {"embedded/sentiment": 70.04}},
            "theirs": {"options": {"method": "prompt_tuning"}},
        }
        options = {"max_train_samples": 32, "max_eval_samples": 16, "num_epochs": 20, "patience": 20}
        table = {"title": "Mine", "tasks": ["embedded/sentiment"], "seeds": [3, 4], "columns": columns}
        path.write_text(yaml.safe_dump({**table, "options": options, "source": "a book", **values}))
        return str(path)

    return make


@pytest.fixture
def launched(monkeypatch):
    """Instead of training, note the run and write the scores that a test wants; None fails."""
    runs = []

    def launch(run):
        runs.append((run.column, run.seed))
        results.write(run.folder / "settings.json", json.dumps(run.settings))
        score = launch.scores[run.column, run.seed]
        if score is None:
            return 1
        results.write(run.folder / "scores.json", json.dumps({"test": {"loss": 1.0, "accuracy": score}}))
        return 0

    monkeypatch.setattr(driver, "launch", launch)
    launch.scores = {("ours", 3): 0.7, ("ours", 4): 0.8, ("theirs", 3): 0.5, ("theirs", 4): 0.5}
    launch.runs = runs
    return launch


def test_a_table_has_mean_and_spread_over_seeds_beside_the_published_figure(own_table, launched, tmp_path, capsys):
    out = tmp_path / "out"
    driver.main([own_table(), "--output_dir", str(out)])
    text = (out / "table.md").read_text()
    assert "| task | metric | ours | ours, published | theirs |" in text
    assert "| embedded/sentiment | accuracy | 75.0 ± 7.1 (2) | 70.0 | 50.0 ± 0.0 (2) |" in text
    assert "| mean of all tasks |  | 75.0 | 70.0 | 50.0 |" in text
    assert "4 of 4 runs" in text and "Published: a book" in text and text in capsys.readouterr().out
    cell = json.loads((out / "table.json").read_text())["cells"][0]
    assert cell["test"] == {"3": {"accuracy": 70.0}, "4": {"accuracy": 80.0}}
    assert cell["mean"] == pytest.approx(75.0) and cell["published"] == 70.04


def test_what_is_finished_is_skipped_and_what_failed_is_tried_again(own_table, launched, tmp_path):
    launched.scores["theirs", 3] = None
    command = [own_table(), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"1 runs failed(.|\n)*theirs/embedded/sentiment/seed-3/log\.txt"):
        driver.main(command)
    assert launched.runs == [("ours", 3), ("theirs", 3), ("ours", 4), ("theirs", 4)]
    assert "50.0 (1)" in (tmp_path / "out" / "table.md").read_text()
    launched.runs.clear()
    launched.scores["theirs", 3] = 0.5
    driver.main(command)
    assert launched.runs == [("theirs", 3)]


def test_a_part_can_be_run_alone_and_the_table_shows_all_that_is_there(own_table, launched, tmp_path, capsys):
    command = [own_table(), "--output_dir", str(tmp_path / "out")]
    driver.main([*command, "--columns", "theirs", "--seeds", "4"])
    assert launched.runs == [("theirs", 4)]
    assert (
        f"| embedded/sentiment | accuracy | {results.number(None)} | 70.0 | 50.0 (1) |"
        in (tmp_path / "out" / "table.md").read_text()
    )
    driver.main([*command, "--dry_run"])
    assert launched.runs == [("theirs", 4)]
    printed = capsys.readouterr().out
    assert "Mine: 4 runs, 1 of them finished." in printed and printed.count("--method residual") == 2
    with pytest.raises(SystemExit, match=r"--seeds 7 is not in the table\. It has: 3, 4"):
        driver.main([*command, "--seeds", "7"])


def test_runs_with_other_settings_are_not_mixed_in(own_table, launched, tmp_path):
    out = tmp_path / "out"
    driver.main([own_table(), "--output_dir", str(out)])
    changed = own_table(options={"max_train_samples": 64})
    with pytest.raises(SystemExit, match=r"was started with max_train_samples=32, the table says 64\. Choose another"):
        driver.main([changed, "--output_dir", str(out)])


@pytest.mark.parametrize(
    "values, error, words",
    [
        ({"seeds": [0, 0]}, ValueError, "`seeds` must name at least one, and none twice"),
        ({"tasks": []}, ValueError, "`tasks` must name at least one"),
        ({"columns": {"a": {"option": {}}}}, ValueError, "Column 'a' has 'option'"),
        ({"columns": {"a": {"published": {"glue/rte": 1}}}}, ValueError, "Column 'a' has 'glue/rte'"),
        ({"sheds": [0]}, SystemExit, "must hold columns, options, seeds, source, tasks, title"),
        ({"options": {"learning_rat": 0}}, ValueError, "`learning_rate` must be above 0"),
        ({"options": {"rate": 0.1}}, ValueError, "--rate"),
        ({"tasks": ["glue/sst"], "columns": {"a": {}}}, ValueError, "There is no task 'glue/sst'"),
        ({"options": {"metric": "f1"}}, ValueError, "The task has no metric 'f1'"),
    ],
)
def test_a_bad_table_is_refused_before_anything_runs(values, error, words, own_table, launched, tmp_path):
    with pytest.raises(error, match=words):
        driver.main([own_table(**values), "--output_dir", str(tmp_path / "out")])
    assert launched.runs == [] and not (tmp_path / "out").exists()


def test_a_table_that_is_none():
    with pytest.raises(
        SystemExit, match=r"There is no table .glue.\. There are: superglue-t5-base, superglue-t5-large"
    ):
        plan.load_table("glue")


def test_an_interrupted_table_goes_on_where_it_was(own_table, tmp_path):
    """Ctrl-C as a terminal sends it: to the driver and to the run that it waits for."""
    columns = {"ours": {"options": {"method": "residual"}}}
    command = [own_table(columns=columns, seeds=[0]), "--output_dir", str(tmp_path / "out")]
    folder = tmp_path / "out" / "ours" / "embedded" / "sentiment" / "seed-0"
    process = start_script(driver.__file__, *command)
    while last_checkpoint(folder) is None and process.is_running():
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    result = process.wait()
    errors = result.stderr
    assert result.returncode == 1 and "Interrupted. The same command resumes from here." in errors, errors
    assert last_checkpoint(folder) is not None and not (folder / "scores.json").exists()
    assert "Traceback" not in errors + (folder / "log.txt").read_text()

    driver.main(command)
    scores = json.loads((folder / "scores.json").read_text())
    assert len(scores["epochs"]) == 20
    assert Path(scores["arguments"]["resume_from_checkpoint"]).parent == folder
    assert "1 of 1 runs" in (tmp_path / "out" / "table.md").read_text()


def test_scores_are_the_last_thing_that_a_run_writes(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise OSError("the disk is full")

    monkeypatch.setattr(train, "save_as_prompt_tuning", fails)
    monkeypatch.setattr(sys, "argv", ["train.py", "--smoke", "--output_dir", str(tmp_path / "out")])
    with pytest.raises(OSError, match="the disk is full"):
        train.main()
    assert (tmp_path / "out" / "trained").exists() and not (tmp_path / "out" / "scores.json").exists()


@pytest.mark.parametrize("path", sorted((EXAMPLES / "reproduce").glob("*.py")), ids=lambda path: path.name)
def test_a_file_is_read_in_one_sitting(path):
    assert lines_of_code(path) <= 150


# --- experiments of PEFT's comparison on MetaMathQA -----------------------------------------------------------------

# Fields of `TrainConfig` in the comparison's `utils.py`; any of them may stand in `training_params.json`.
TRAINING_PARAMS = set(
    "model_id dtype max_seq_length batch_size batch_size_eval max_steps eval_steps compile use_gc query_template seed "
    "grad_norm_clip optimizer_type optimizer_kwargs lr_scheduler use_amp autocast_adapter_dtype generation_kwargs "
    "attn_implementation init_kv_cache_prefix".split()
)


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda path: path.name)
def test_an_experiment_is_loaded_built_trained_evaluated_and_saved_as_the_comparison_does(folder, tmp_path):
    """A small Llama in bfloat16 instead of Llama-3.2-3B; what is done to it is what `run.py` does."""
    written = json.loads((folder / "adapter_config.json").read_text())
    params = json.loads((folder / "training_params.json").read_text())
    assert set(params) <= TRAINING_PARAMS
    assert f"lr_{params['optimizer_kwargs']['lr']}" in folder.name

    config = PeftConfig.from_pretrained(str(folder))
    assert isinstance(config, ResidualPromptTuningConfig)
    assert {name: config.to_dict()[name] for name in written} == written
    base = tiny_llama(vocab_size=512, max_position_embeddings=512).to(torch.bfloat16)
    model = get_peft_model(base, config, autocast_adapter_dtype=True)
    optimizer = getattr(torch.optim, params.get("optimizer_type", "AdamW"))(
        model.parameters(), **params["optimizer_kwargs"]
    )
    scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=1, num_training_steps=10)
    model.get_nb_trainable_parameters()
    ids = torch.randint(3, 512, (2, 6))
    padded = {"input_ids": ids, "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])}  # on the left
    with torch.inference_mode():  # before training, once: what it remembers must not come in training's way
        logits = model.eval()(**padded, pad_token_id=1).logits
        assert logits.shape[1] >= 6 and logits.isfinite().all()

    model.train()
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    for _ in range(3):  # the first one has a rate of 0
        optimizer.zero_grad()
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        loss = model(**batch, num_items_in_batch=12).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        assert loss.isfinite()
    assert not any(torch.equal(p, trained[name]) for name, p in model.named_parameters() if name in trained)

    with torch.inference_mode():
        limits = GenerationConfig(max_length=800, max_new_tokens=3, do_sample=False)
        answers = model.eval().generate(**padded, generation_config=limits, pad_token_id=1)
        alone = {name: tensor[:1, 2:] for name, tensor in padded.items()}
        answer = model.generate(**alone, generation_config=limits, pad_token_id=1)
    assert torch.equal(answers[0, -3:], answer[0, -3:])
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size > 0
    json.dumps(config.to_dict())


def test_the_comparison_is_run_as_the_document_says(tmp_path):
    """The document's command, on a stand-in of `run.py` that loads the experiment and its neighbour `data.py`."""
    command = next(line for line in DOCUMENT.read_text().splitlines() if line.startswith('python -c "import peft_r'))
    names = re.findall(r"experiments/(\S+)", command)
    assert len(names) == 1 and EXAMPLES / "reproduce" / "metamathqa" / "experiments" / names[0] in EXPERIMENTS
    shutil.copytree(EXPERIMENTS[0].parent, tmp_path / "experiments" / EXPERIMENTS[0].parent.name)
    (tmp_path / "data.py").touch()
    (tmp_path / "run.py").write_text(
        "import argparse, data\nfrom peft import PeftConfig\n"
        "parser = argparse.ArgumentParser()\nparser.add_argument('-v', action='store_true')\n"
        "parser.add_argument('path')\nargs = parser.parse_args()\n"
        "if __name__ == '__main__':\n    print(type(PeftConfig.from_pretrained(args.path)).__name__, args.v)\n"
    )
    python, option, code, *args = shlex.split(command)
    assert (python, option) == ("python", "-c")
    result = run_python(code, *args, cwd=tmp_path)
    assert result.stdout == "ResidualPromptTuningConfig True\n", result.stderr


def test_the_start_is_measured(monkeypatch, capsys):
    """A LayerNorm's output is as long as the root of the width; without one it is shorter."""
    monkeypatch.setattr(sys, "argv", ["start.py", "--tokens", "8", "--width", "64", "--hidden", "16"])
    runpy.run_path(str(EXAMPLES / "reproduce" / "start.py"), run_name="__main__")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [line[0] for line in lines] == ["True", "False"] and lines[0][2] == "8.0" and float(lines[1][2]) < 4


def test_the_document_has_the_names_of_all_tables_and_experiments():
    text = DOCUMENT.read_text()
    assert [name for name in [*TABLES, *(path.name for path in EXPERIMENTS)] if f"`{name}`" not in text] == []
