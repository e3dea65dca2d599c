"""`peft-residual train` and `init`: from rows to a merged adapter, and what is refused before anything is done."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from conftest import CHAT_TEMPLATE, tiny_t5
from fresh_process import Process
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_residual_cli import main
from peft_residual_cli.options import TRAINER_DEFAULTS, TrainOptions, template
from peft_residual_cli.rows import read_rows


ROOT = Path(__file__).resolve().parents[1]
TEXT = "this film is good or bad"
CHAT = [
    {"messages": [{"role": "user", "content": "this film is"}, {"role": "assistant", "content": answer}]}
    for answer in ("good", "bad", "great", "poor")
] * 6


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def write_rows(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_config(path, model, **values):
    chosen = {"model_name_or_path": str(model), "train_file": "train.jsonl", "output_dir": "output", "use_cpu": True}
    chosen |= {"prompt_tuning_init_text": TEXT, "encoder_hidden_size": 8, "disable_tqdm": True}
    Path(path).write_text(yaml.safe_dump({**chosen, **values}))


@pytest.fixture
def run(capsys):
    """Run the command line and return (exit code, what it printed, the last line that it complained)."""

    def run(*argv):
        code = main([str(arg) for arg in argv])
        captured = capsys.readouterr()
        complaints = [line for line in captured.err.splitlines() if line.startswith("peft-residual: ")]
        return code, captured.out, "".join(complaints)

    return run


# --- from rows to a merged adapter -----------------------------------------------------------------------------------


def test_three_commands_lead_from_rows_to_an_adapter_that_is_trained_merged_and_reloaded(run, folder, chat_folder):
    page = (ROOT / "docs" / "train.md").read_text()
    pip, train, inspect = map(shlex.split, page.partition("```bash\n")[2].partition("```")[0].splitlines())
    assert pip == ["pip", "install", "peft-residual[train]"]
    write_rows("rows.jsonl", CHAT)
    train[train.index("--model_name_or_path") + 1] = chat_folder
    train[train.index("--prompt_tuning_init_text") + 1] = TEXT
    code, out, _ = run(*train[1:], "--json", "--num_train_epochs", "4", "--use_cpu", "--disable_tqdm", "True")
    trained = json.loads(out)
    assert code == 0 and trained["step"] == 12  # 24 rows, of which 2 validate, 8 at a time
    code, out, _ = run(*inspect[1:], "--json")  # puts the merged adapter on the model
    assert code == 0 and len(json.loads(out)["nearest"]["projected"]["cosine"]["tokens"]) == 6
    assert run("check", trained["merged"])[0] == run("check", trained["adapter"])[0] == 0

    prompts = [load_file(f"{trained[name]}/adapter_model.safetensors") for name in ("adapter", "merged")]
    assert torch.equal(prompts[0]["prompt_embeddings"], prompts[1]["prompt_embeddings"])
    assert list(prompts[1]) == ["prompt_embeddings"] and len(prompts[1]["prompt_embeddings"]) == 6
    words = AutoTokenizer.from_pretrained(chat_folder)(TEXT)["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(chat_folder)
    start = base.get_input_embeddings().weight[words]
    assert not torch.allclose(prompts[1]["prompt_embeddings"], start, atol=0.01)
    # What was said to be learned is the loss of the reloaded prompt on the assistant's words.
    losses = [entry["eval_loss"] for entry in log_of("output") if "eval_loss" in entry]
    assert trained["eval_loss"] == min(losses) < losses[0]


def log_of(output):
    last = max(Path(output).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return json.loads((last / "trainer_state.json").read_text())["log_history"]


def test_the_loss_is_on_each_turn_of_the_assistant_after_what_was_said_before(run, folder, chat_folder):
    """The loss that is reported equals a loop over the rows, with the merged prompt."""
    messages = [
        {"role": "user", "content": "this film is"},
        {"role": "assistant", "content": "good"},
        {"role": "user", "content": "this book was slow and it is"},
        {"role": "assistant", "content": "poor poor"},
    ]
    write_rows("train.jsonl", CHAT[:4])
    write_rows("validation.jsonl", [{"messages": messages}, {"prompt": "a cat", "completion": "fast up"}])
    write_config("train.yaml", chat_folder, validation_file="validation.jsonl", max_steps=2, eval_steps=2)
    trained = json.loads(
        run("train", "train.yaml", "--json", "--eval_strategy", "steps", "--save_strategy", "steps")[1]
    )

    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(chat_folder), trained["merged"]).eval()
    rows = [
        messages[:2],
        messages,
        [{"role": "user", "content": "a cat"}, {"role": "assistant", "content": "fast up"}],
    ]
    total = count = 0
    for row in rows:
        given = tokenizer.apply_chat_template(row[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = tokenizer.apply_chat_template(row, return_dict=True)["input_ids"]
        labels = torch.tensor([[-100] * len(given) + ids[len(given) :]])
        learned = int((labels >= 0).sum())
        assert learned == len(row[-1]["content"].split()) + 1  # and the end of the turn
        total += model(input_ids=torch.tensor([ids]), labels=labels).loss.item() * learned
        count += learned
    assert trained["eval_loss"] == pytest.approx(total / count, abs=1e-4)


def test_flags_take_precedence_and_a_dry_run_says_what_would_happen(run, folder, chat_folder):
    write_rows("train.jsonl", CHAT)
    write_config("train.yaml", chat_folder, num_train_epochs=5, learning_rate="1e-1")
    before = sorted(folder.iterdir())
    code, out, _ = run("train", "train.yaml", "--num_train_epochs", "2", "--dry-run")
    assert code == 0 and sorted(folder.iterdir()) == before
    base = AutoModelForCausalLM.from_pretrained(chat_folder)
    assert f"{sum(p.numel() for p in base.parameters()):,} parameters, frozen" in out
    assert "6 virtual tokens that start from the instruction" in out
    assert (
        "22 to train on, 2 to validate on, 0 lines left out" in out and "10 to 10 a row" in out and "at most 58" in out
    )
    assert "steps      6 of 8 rows" in out and "0.1 for the prompt, 0.00266667 for its network" in out
    values = json.loads(run("train", "train.yaml", "--dry-run", "--json")[1])
    assert values["steps"] == 15 and values["longest"] == 10 and values["num_virtual_tokens"] == 6
    run("train", "train.yaml", "--max_steps", "1")
    trained = load_file("output/adapter/adapter_model.safetensors")
    assert values["trainable"] == sum(t.numel() for name, t in trained.items() if name.endswith(("weight", "bias")))


def test_long_rows_can_be_left_out_and_texts_need_no_template(run, folder, chat_folder, tokenizer):
    AutoModelForCausalLM.from_pretrained(chat_folder).save_pretrained("plain")
    tokenizer.save_pretrained("plain")
    write_rows("train.jsonl", [{"prompt": "a cat is" + " slow" * n, "completion": " fast"} for n in range(20)])
    write_config("train.yaml", "plain", max_length=10, skip_long_rows=True, validation_share=0)
    values = json.loads(run("train", "train.yaml", "--dry-run", "--json")[1])
    assert values["longest"] == 10 and (values["rows"], values["validation_rows"]) == (6, 0)
    assert run("train", "train.yaml", "--max_steps", "1", "--no_merge")[0] == 0
    assert not Path("output/merged").exists()
    Path("chat.jinja").write_text(CHAT_TEMPLATE)
    write_rows("train.jsonl", CHAT)
    more = ["--chat_template_path", "chat.jinja", "--output_dir", "other"]
    values = json.loads(run("train", "train.yaml", "--dry-run", "--json", *more)[1])
    assert values["longest"] == 10


def test_one_row_is_enough_without_validation(run, folder, chat_folder):
    write_rows("train.jsonl", CHAT[:1])
    write_config("train.yaml", chat_folder, validation_share=0)
    values = json.loads(run("train", "train.yaml", "--dry-run", "--json")[1])
    assert values["rows"] >= 1 and values["validation_rows"] == 0


def test_the_seed_decides_whatever_ran_before(run, folder, chat_folder):
    write_rows("train.jsonl", CHAT)
    write_config("train.yaml", chat_folder, max_steps=1)
    found = []
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        assert run("train", "train.yaml", "--output_dir", name, "--seed", seed)[0] == 0
        found.append(
            load_file(f"{name}/adapter/adapter_model.safetensors")["residual_prompt_tuning.network.down.weight"]
        )
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


# --- interrupted -----------------------------------------------------------------------------------------------------

COMMAND = "import sys; from peft_residual_cli import main; sys.exit(main(sys.argv[1:]))"


def test_ctrl_c_saves_says_how_to_resume_and_the_resumed_run_equals_a_straight_one(folder, chat_folder):
    write_rows("train.jsonl", CHAT)
    write_config("train.yaml", chat_folder, max_steps=400, save_strategy="no", eval_strategy="no", logging_steps=1)
    more = ["--load_best_model_at_end", "False"]
    process = Process(COMMAND, "train", "train.yaml", *more, cwd=folder)
    log = Path(process.output.name, "stdout")
    while not (log.exists() and "'loss'" in log.read_text()):
        assert process.is_running()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    result = process.wait()
    assert result.returncode == 130, result.stderr
    step = int(result.stdout.split("Interrupted at step ")[1].split(",")[0])
    assert 0 < step < 400 and Path(f"output/checkpoint-{step}/optimizer.pt").is_file()
    command = shlex.split(result.stdout.splitlines()[-1])
    assert command == ["peft-residual", "train", "train.yaml", *more, "--resume"]
    for argv in (command[1:], ["train", "train.yaml", *more, "--output_dir", "straight"]):
        ended = Process(COMMAND, *argv, "--max_steps", step + 3, cwd=folder).wait()
        assert ended.returncode == 0, ended.stderr
    one, other = (load_file(f"{name}/adapter/adapter_model.safetensors") for name in ("output", "straight"))
    assert all(torch.equal(one[key], other[key]) for key in one)


# --- refused before anything is done ---------------------------------------------------------------------------------


def lines(count, broken):
    """Rows of which one is another line."""
    return "\n".join([json.dumps(CHAT[0])] * (count - 1) + [broken]) + "\n"


FREE = namedtuple("Usage", "total used free")(10, 9, 1)
REFUSED = {
    "missing file": ({"train_file": "nowhere.jsonl"}, None, "there is no file `nowhere.jsonl`. Check the path"),
    "empty": ({}, "\n\n", "`train.jsonl` is empty. It needs one JSON object per line"),
    "bad JSON": ({}, lines(7, '{"messages": ['), "Line 7 of `train.jsonl` is not JSON: Expecting value (column 15)"),
    "missing column": ({}, lines(3, '{"text": "a"}'), "Line 3 of `train.jsonl` has no column `prompt`, but ['text']"),
    "no assistant turn": (
        {},
        lines(2, '{"messages": [{"role": "user", "content": "a"}]}'),
        "Line 2 of `train.jsonl` has nothing to learn: no message has the role `assistant`. Add its answer",
    ),
    "long rows": (
        {"max_length": 8},
        None,
        "Line 1 of `train.jsonl` has 10 tokens, more than `max_length`=8 (24 of 24 lines have). Shorten them",
    ),
    "no chat template": (
        {"model_name_or_path": "plain"},
        None,
        "has no chat template, which `messages` need (line 1)",
    ),
    "unknown key": ({"num_train_epoch": 1}, None, "`num_train_epoch` in train.yaml. Did you mean `num_train_epochs`?"),
    "wrong type": ({"num_virtual_tokens": "ten"}, None, "invalid int value: 'ten' (in train.yaml or"),
    "wrong type of TRL's": ({"max_steps": 2.5}, None, "argument --max_steps/--max-steps: invalid int value: '2.5'"),
    "unknown model": (
        {"model_name_or_path": "nowhere/model"},
        None,
        "`nowhere/model` cannot be read. Check the folder",
    ),
    "existing output": (
        {"output_dir": "plain"},
        None,
        "`plain` exists. Name another folder, or continue its run with",
    ),
    "no space": ({}, None, "free. Free some space or name another folder"),
    # beyond the common ones
    "empty answer": (
        {},
        lines(4, '{"prompt": "a", "completion": " "}'),
        "Line 4 of `train.jsonl` has nothing to learn",
    ),
    "not a row": ({}, lines(2, "[1]"), "Line 2 of `train.jsonl` is not a JSON object, but list"),
    "assistant first": (
        {},
        lines(2, '{"messages": [{"role": "assistant", "content": "a"}]}'),
        "Line 2 of `train.jsonl` starts with the assistant",
    ),
    "no messages": (
        {},
        lines(2, '{"messages": "a"}'),
        'Line 2 of `train.jsonl`: `messages` must be a list of {"role"',
    ),
    "tools": ({}, lines(2, '{"messages": [], "tools": [1]}'), "Line 2 of `train.jsonl` has `tools`"),
    "packing": ({"packing": True}, None, "`packing` in train.yaml cannot be set: a row has one prompt"),
    "nothing to resume": ({"resume": True}, None, "`output` has no checkpoint. Leave --resume out"),
    "a list": ({"train_file": ["a", "b"]}, None, "`train_file` in train.yaml must be one value, got ['a', 'b']"),
    "a share of 1": ({"validation_share": 1.0}, None, "`validation_share` must be at least 0 and below 1, got 1.0"),
    "one row": ({}, lines(1, json.dumps(CHAT[0])), "has one row, so none is left to validate on"),
    "a long prompt": (
        {"num_virtual_tokens": 64},
        None,
        "A prompt of 64 tokens leaves no room for rows in 64 positions",
    ),
    "too long": ({"max_length": 60}, None, "do not fit into the model's 64 positions. Set at most 58"),
    "encoder-decoder": ({"model_name_or_path": "t5"}, None, "is an encoder-decoder model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_broken_input_is_refused_in_one_line_with_a_remedy(name, run, folder, chat_folder, tokenizer, monkeypatch):
    changes, rows, words = REFUSED[name]
    if "plain" in changes.values():
        shutil.copytree(chat_folder, "plain")
        tokenizer.save_pretrained("plain")
        Path("plain/chat_template.jinja").unlink()
    if "t5" in changes.values():
        tiny_t5().save_pretrained("t5")
        tokenizer.save_pretrained("t5")
    if name == "no space":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: FREE)
    write_rows("train.jsonl", CHAT)
    if rows is not None:
        Path("train.jsonl").write_text(rows)
    write_config("train.yaml", chat_folder, **changes)
    before = sorted(folder.rglob("*"))
    start = time.process_time()
    code, out, complaint = run("train", "train.yaml")
    assert (code, out) == (1, "") and words in complaint and complaint.startswith("peft-residual: error: ")
    assert complaint.rstrip().count("\n") == 0
    assert sorted(folder.rglob("*")) == before
    assert time.process_time() - start <= 10


def test_a_file_of_another_kind_is_refused(run, folder):
    Path("list.yaml").write_text("- a\n")
    Path("broken.yaml").write_text("a: [\n")
    for path, words in (
        ("list.yaml", "must hold lines of `option: value`, got list"),
        ("broken.yaml", "`broken.yaml` is not YAML"),
        ("nowhere.yaml", "`peft-residual init nowhere.yaml` writes one"),
    ):
        code, _, complaint = run("train", path)
        assert code == 1 and words in complaint
    code, _, complaint = run("train")
    assert code == 1 and "the following arguments are required: --model_name_or_path" in complaint
    Path("binary.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_rows("binary.jsonl", "train_file")


def test_the_slowest_answer_of_a_new_process_takes_less_than_ten_seconds(folder, chat_folder):
    """An unknown key: TRL's config must be imported to know it."""
    write_rows("train.jsonl", CHAT)
    write_config("train.yaml", chat_folder, num_train_epoch=1)
    code = f"import resource\n{COMMAND}".replace("sys.exit(", "code = ").rstrip(")") + ")\n"
    code += "used = resource.getrusage(resource.RUSAGE_SELF); print(used.ru_utime + used.ru_stime)"
    result = subprocess.run([sys.executable, "-c", code, "train", "train.yaml"], capture_output=True, text=True)
    assert "Did you mean" in result.stderr and float(result.stdout.split()[-1]) <= 10


def test_without_trl_the_error_names_what_to_install(run, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.scripts.utils", None)
    code, _, complaint = run("train", "--help")
    assert code == 1 and complaint.endswith("needs TRL: pip install 'peft-residual[train]'.")


# --- init ------------------------------------------------------------------------------------------------------------


def test_init_writes_a_config_with_every_option_and_its_default(run, folder, chat_folder):
    code, out, _ = run("init")
    assert code == 0 and "peft-residual train train.yaml --dry-run" in out
    values = yaml.safe_load(Path("train.yaml").read_text())
    flags = {"resume", "dry_run", "json"}
    assert values.keys() == {f.name for f in fields(TrainOptions)} - flags | TRAINER_DEFAULTS.keys()
    required = {"model_name_or_path", "train_file", "output_dir"}
    assert all(values[f.name] == f.default for f in fields(TrainOptions) if f.name not in required | flags)
    assert all(values[name] == value for name, (value, _) in TRAINER_DEFAULTS.items())
    code, _, complaint = run("init")
    assert code == 1 and "exists" in complaint and "--overwrite" in complaint
    assert run("init", "--overwrite")[0] == 0
    write_rows("train.jsonl", CHAT)
    assert run("train", "train.yaml", "--model_name_or_path", chat_folder, "--use_cpu", "--dry-run")[0] == 0


def test_the_help_of_train_has_our_options(capsys):
    with pytest.raises(SystemExit) as error:
        main(["train", "--help"])
    out = capsys.readouterr().out
    assert error.value.code == 0 and all(f"--{f.name}" in out for f in fields(TrainOptions))
    assert template().count("\n#") >= len(fields(TrainOptions)) - 3
