"""The T5 example's script: three methods, the best epoch, interruption, bad arguments."""

import dataclasses
import json
import os
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from fresh_process import run_script, start_script
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, TrainerCallback


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPT = EXAMPLES / "text_to_text" / "train.py"
sys.path.insert(0, str(EXAMPLES))

from embedded.tasks import MODEL  # noqa: E402
from text_to_text import metrics, train  # noqa: E402
from text_to_text.data import TASKS, load_texts  # noqa: E402
from text_to_text.interruption import exit_with_command, is_complete  # noqa: E402


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def run(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, options)])
    train.main()


@pytest.mark.parametrize("method", ["residual", "prompt_tuning", "fine_tuning"])
def test_smoke(method, tmp_path, monkeypatch, tokenizer, capsys):
    out = tmp_path / "out"
    run(monkeypatch, "--smoke", "--method", method, "--output_dir", out)
    scores = json.loads((out / "scores.json").read_text())
    assert [entry["step"] for entry in scores["epochs"]] == [4, 8]
    assert {"loss", "accuracy"} < set(scores["best"]) and scores["best"] in scores["epochs"]
    assert scores["arguments"]["method"] == method
    assert (out / "scores.png").stat().st_size > 5000
    assert f"test {scores['test']['accuracy']:.4f}" in capsys.readouterr().out

    if method == "fine_tuning":
        model = AutoModelForSeq2SeqLM.from_pretrained(out / "trained")
        assert scores["arguments"]["learning_rate"] == 3e-4
    else:
        model = AutoModelForSeq2SeqLM.from_pretrained(MODEL, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, out / ("merged" if method == "residual" else "trained"))
        assert scores["arguments"]["learning_rate"] == 0.3
    assert (out / "merged").exists() == (method == "residual")
    texts = load_texts(TASKS["embedded/sentiment"], max_eval_samples=16)["test"]
    inputs = tokenizer(list(texts["source"]), return_tensors="pt", padding=True)
    answers = tokenizer.batch_decode(model.eval().generate(**inputs, max_length=3), skip_special_tokens=True)
    assert metrics.accuracy(answers, texts) == scores["test"]["accuracy"]


def test_the_script_runs_from_anywhere(tmp_path):
    result = run_script(SCRIPT, "--smoke", "--output_dir", tmp_path / "out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "embedded/sentiment, residual: epoch" in result.stdout
    assert PeftConfig.from_pretrained(tmp_path / "out" / "merged").peft_type.value == "PROMPT_TUNING"


def test_an_output_folder_is_replaced_only_if_asked_and_only_its_checkpoints_are_deleted(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-8").mkdir()
    (tmp_path / "checkpoint-8" / "stale").touch()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match=r"exists\. Choose another folder, or pass --overwrite"):
        run(monkeypatch, "--smoke", "--output_dir", tmp_path)
    run(monkeypatch, "--smoke", "--output_dir", tmp_path, "--overwrite")
    assert (tmp_path / "notes.txt").exists() and (tmp_path / "checkpoint-8").exists()
    assert not (tmp_path / "checkpoint-8" / "stale").exists()


def make_trainer(folder, tokenizer, **options):
    """Two steps per epoch."""
    args = train.Arguments(max_train_samples=16, max_eval_samples=8, num_epochs=6, output_dir=folder, **options)
    task = TASKS["embedded/sentiment"]
    return train.make_trainer(args, task, train.load_data(args, task, tokenizer), tokenizer)


@pytest.mark.parametrize(
    "scores, best, epochs",
    [([-0.9, -0.2, -0.5, -0.6], 2, 4), ([0.0, 0.0, -0.1], 1, 3), ([-0.3, -0.2, -0.1, 0.0, 0.1, 0.2], 6, 6)],
    ids=["negative", "zero", "rising"],
)
def test_a_negative_or_zero_score_can_be_the_best(scores, best, epochs, tmp_path, tokenizer):
    """Training stops after two epochs that are no better, and the best model is back."""
    trainer = make_trainer(tmp_path, tokenizer, patience=2)
    remaining = iter(scores)
    trainer.compute_metrics = lambda prediction: {"accuracy": next(remaining)}
    trainer.train()
    assert trainer.state.epoch == epochs
    assert trainer.state.best_metric == scores[best - 1] and trainer.state.best_global_step == 2 * best
    state = load_file(tmp_path / f"checkpoint-{2 * best}" / "adapter_model.safetensors")
    encoder = trainer.model.prompt_encoder["default"].state_dict()
    raw = next(tensor for key, tensor in state.items() if key.endswith("embedding.weight"))
    assert torch.equal(encoder["embedding.weight"], raw)


def test_patience_goes_on_where_it_was(tmp_path, tokenizer):
    for scores, resume in (([0.5, 0.4], None), ([0.3], str(tmp_path / "checkpoint-4"))):
        trainer = make_trainer(tmp_path, tokenizer, patience=2)
        remaining = iter(scores)
        trainer.compute_metrics = lambda prediction, remaining=remaining: {"accuracy": next(remaining)}
        if resume is None:
            trainer.args.num_train_epochs = 2
        trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.epoch == 3


def test_prompts_are_trained_without_the_frozen_models_dropout(tmp_path):
    base = AutoModelForSeq2SeqLM.from_pretrained(MODEL, dropout_rate=0.1)
    base.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path)
    for method, expected in {"residual": 0.0, "prompt_tuning": 0.0, "fine_tuning": 0.1}.items():
        model = train.make_model(train.Arguments(model=str(tmp_path), method=method))
        found = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
        assert found == {expected}, method


def test_room_for_the_prompt_is_reserved_before_texts_are_cut(tmp_path, tokenizer):
    long = "the film was good " * 30
    (tmp_path / "train.json").write_text("\n".join(json.dumps({"text": long, "label": 1}) for _ in range(4)))
    shutil.copy(tmp_path / "train.json", tmp_path / "test.json")
    task = dataclasses.replace(TASKS["classification/imdb"], words=("rain", "sun"), text=lambda row: row["text"])
    whole = tokenizer(long)["input_ids"]
    for method, room in {"residual": 30, "prompt_tuning": 30, "fine_tuning": 40}.items():
        args = train.Arguments(method=method, data_dir=tmp_path, max_source_length=40, num_virtual_tokens=10)
        for split in train.load_data(args, task, tokenizer).values():
            assert split[0]["input_ids"] == [*whole[: room - 1], tokenizer.eos_token_id], method


def test_ctrl_c_waits_for_the_step_and_saves_it(tmp_path, tokenizer):
    class PressAtStep3(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGINT)

    trainer = make_trainer(tmp_path, tokenizer)
    trainer.add_callback(PressAtStep3())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert is_complete(tmp_path / "checkpoint-3") and trainer.state.global_step == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a second one stops at once


def test_interrupted_before_the_first_checkpoint(tmp_path, capsys):
    (tmp_path / "checkpoint-5").mkdir()  # torn: without the state that is written last
    with pytest.raises(SystemExit, match="130"):
        exit_with_command(tmp_path)
    assert "Interrupted before the first checkpoint" in capsys.readouterr().out


def test_interrupting_leaves_a_whole_checkpoint_and_says_how_to_go_on(tmp_path, monkeypatch):
    """Ctrl-C as a terminal sends it; going on ends where a run without interruption ends."""
    out = tmp_path / "out"
    options = ["--max_train_samples", "32", "--max_eval_samples", "16", "--num_epochs", "20", "--patience", "20"]
    process = start_script(SCRIPT, *options, "--output_dir", out, "--overwrite", cwd=tmp_path)
    while not list(out.glob("checkpoint-*/trainer_state.json")) and process.is_running():
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    result = process.wait()
    assert result.returncode == 130, result.stderr
    assert "Press again to stop at once" in result.stdout and "Traceback" not in result.stderr
    go_on = shlex.split(result.stdout.strip().splitlines()[-1])
    assert go_on[0] == "python" and "--overwrite" not in go_on and go_on[-2] == "--resume_from_checkpoint"
    steps = json.loads((Path(go_on[-1]) / "trainer_state.json").read_text())["global_step"]
    assert 0 < steps < 80 and Path(go_on[-1]).name == f"checkpoint-{steps}"
    assert not (out / "scores.json").exists()

    monkeypatch.setattr(sys, "argv", go_on[1:])
    train.main()
    resumed = json.loads((out / "scores.json").read_text())
    run(monkeypatch, *options, "--output_dir", tmp_path / "straight")
    straight = json.loads((tmp_path / "straight" / "scores.json").read_text())
    assert len(resumed["epochs"]) == 20
    assert [resumed[key] for key in ("epochs", "best", "test")] == [
        straight[key] for key in ("epochs", "best", "test")
    ]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--task", "glue/sst"], r"There is no task 'glue/sst'. There are: embedded/sentiment, .*glue/sst2"),
        (["--task", "embedded/aspect"], "There is no task 'embedded/aspect'"),
        (["--metric", "f1"], "The task has no metric 'f1'. It has: accuracy."),
        (["--learning_rate", "0"], "`learning_rate` must be above 0, got 0.0"),
        (["--learning_rate", "nan"], "`learning_rate` must be above 0, got nan"),
        (["--k_per_class", "0"], "`k_per_class` must be above 0, got 0"),
        (["--patience", "0"], "`patience` must be above 0, got 0"),
        (["--encoder_learning_rate", "0"], "`encoder_learning_rate` must be above 0, got 0.0"),
        (
            ["--method", "prompt_tuning", "--encoder_hidden_size", "50"],
            "`encoder_hidden_size` has no effect with `method` prompt_tuning",
        ),
        (
            ["--method", "prompt_tuning", "--encoder_zero_init", "True"],
            "`encoder_zero_init` has no effect with `method` prompt_tuning",
        ),
        (
            ["--method", "fine_tuning", "--num_virtual_tokens", "5"],
            "`num_virtual_tokens` has no effect with `method` fine_tuning",
        ),
        (["--max_source_length", "11"], "`max_source_length` 11 leaves no room for text beside 10 virtual tokens"),
        (["--resume_from_checkpoint", "nowhere"], "`resume_from_checkpoint` nowhere is not a complete checkpoint"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(options, message, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, "--output_dir", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_a_method_that_is_none(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--method", "lora")
    assert "invalid choice: 'lora'" in capsys.readouterr().err
