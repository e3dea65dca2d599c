"""The command line: what it prints, its exit codes, and that a mistake is answered in words."""

import json
import re
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from conftest import tiny_bert, tiny_gpt2, tiny_t5
from fresh_process import run_python
from peft import PeftModel
from safetensors.torch import load_file
from scenarios import SCENARIOS

from peft_residual_cli import COMMANDS, main


@pytest.fixture
def adapter(base_folder, tmp_path):
    """A saved residual adapter that names its base model."""
    base = type(tiny_t5()).from_pretrained(base_folder)
    SCENARIOS["t5"].model(base).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def run(capsys):
    """Run the command line and return (exit code, what it printed, what it complained)."""

    def run(*argv):
        code = main([str(arg) for arg in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


# --- commands --------------------------------------------------------------------------------------------------------


def test_check_says_what_a_whole_adapter_is(run, adapter, base_folder):
    code, out, _ = run("check", adapter)
    assert code == 0 and out.startswith(f"{adapter}: valid\n")
    assert "RESIDUAL_PROMPT_TUNING" in out and "format: 1" in out
    assert f"base model: {base_folder}" in out and "4 virtual tokens of width 16" in out
    code, out, _ = run("check", adapter, "--json")
    values = json.loads(out)
    assert code == 0 and values["is_valid"] and values["format_version"] == 1 and values["findings"] == []
    assert values["sizes"]["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").stat().st_size


def test_check_of_a_damaged_adapter_says_what_is_wrong_and_returns_1(run, adapter):
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    code, out, _ = run("check", adapter)
    assert code == 1 and "NOT VALID" in out and "finding: " in out and "Save or download it again" in out
    code, out, _ = run("check", adapter, "--json")
    assert code == 1 and json.loads(out)["is_valid"] is False and len(json.loads(out)["findings"]) == 1


def test_inspect_finds_the_base_model_that_the_adapter_names(run, adapter, base_folder, tokenizer):
    code, out, _ = run("inspect", adapter, "-k", 2, "--json")
    values = json.loads(out)
    assert code == 0 and values["name"] == str(adapter) and values["distance_from_initialization"] is not None
    tokens = values["nearest"]["projected"]["cosine"]["tokens"]
    assert [len(of_token) for of_token in tokens] == [2] * 4
    assert {token for of_token in tokens for token in of_token} <= set(tokenizer.get_vocab())
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace(str(base_folder), "someone/some-model"))
    assert json.loads(run("inspect", adapter, "-k", 2, "--json", "--base", base_folder)[1]) == values


def test_inspect_goes_on_without_a_base_model_that_is_not_there(run, adapter, base_folder):
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace(str(base_folder), str(base_folder / "gone")))
    code, out, err = run("inspect", adapter, "--json")
    assert code == 0 and json.loads(out)["nearest"] == {}
    assert err.startswith("peft-residual: no base model, therefore no words: ") and "gone" in err
    code, out, err = run("inspect", adapter, "--base", base_folder / "gone")
    assert (code, out) == (1, "") and err.startswith("peft-residual: error: ") and "gone" in err


def test_inspect_needs_no_base_model(run, adapter):
    code, out, err = run("inspect", adapter, "--no-base")
    assert code == 0 and err == "" and "nearest" not in out and "4 virtual tokens of width 16" in out


def test_inspect_shows_ids_where_there_is_no_tokenizer(run, adapter, base_folder, tmp_path):
    type(tiny_t5()).from_pretrained(base_folder).save_pretrained(tmp_path / "bare")
    code, out, err = run("inspect", adapter, "--base", tmp_path / "bare", "-k", 1, "--json")
    assert code == 0 and "no tokenizer" in err
    assert re.fullmatch(r"#\d+", json.loads(out)["nearest"]["embedding"]["cosine"]["tokens"][0][0])


def test_inspect_does_not_mind_a_head_of_another_size(run, tmp_path):
    SCENARIOS["bert-sequence"].model().save_pretrained(tmp_path / "adapter")  # three labels
    tiny_bert(num_labels=5).save_pretrained(tmp_path / "base")
    assert run("inspect", tmp_path / "adapter", "--base", tmp_path / "base")[0] == 0


def test_inspect_draws_pictures(run, adapter, tmp_path):
    assert run("inspect", adapter, "--no-base", "--plot", tmp_path / "prompt.png")[0] == 0
    assert (tmp_path / "prompt.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = run("inspect", adapter, "--no-base", "--plot", tmp_path / "prompt.foo")
    assert code == 1 and "foo" in err


def test_merge_writes_a_plain_adapter(run, adapter, base_folder, tmp_path):
    code, out, _ = run("merge", adapter, tmp_path / "merged")
    assert code == 0 and str(tmp_path / "merged") in out
    base = type(tiny_t5()).from_pretrained(base_folder)
    prompt = PeftModel.from_pretrained(base, tmp_path / "merged").get_prompt_embedding_to_save("default")
    assert torch.equal(prompt, load_file(adapter / "adapter_model.safetensors")["prompt_embeddings"])
    code, _, err = run("merge", adapter, tmp_path / "merged")
    assert code == 1 and "exists" in err and "pass --overwrite to replace it" in err
    code, out, _ = run("merge", adapter, tmp_path / "merged", "--overwrite", "--json")
    assert code == 0 and json.loads(out)["save_directory"] == str(tmp_path / "merged")
    assert run("check", tmp_path / "merged")[0] == 0


@pytest.mark.filterwarnings("ignore:PEFT .* itself generates wrong tokens")
def test_export_writes_each_format(run, adapter, tmp_path):
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    base = type(tiny_gpt2()).from_pretrained(tmp_path / "gpt2")
    SCENARIOS["gpt2"].model(base).save_pretrained(tmp_path / "causal")
    out = tmp_path / "out"
    assert run("export", "tensors", adapter, out / "prompt.safetensors")[0] == 0
    prompt = load_file(out / "prompt.safetensors")["prompt_embeddings"]
    assert torch.equal(prompt, load_file(adapter / "adapter_model.safetensors")["prompt_embeddings"])
    assert run("export", "prefix-tuning", tmp_path / "causal", out / "prefix")[0] == 0
    assert PeftModel.from_pretrained(base, out / "prefix").peft_config["default"].peft_type == "PREFIX_TUNING"


def test_export_to_a_vocabulary_says_its_size_first(run, adapter, base_folder, tmp_path):
    arguments = ("export", "vocabulary", adapter, tmp_path / "checkpoint", "--token-format", "<mood_{i}>")
    code, out, _ = run(*arguments, "--dry-run")
    assert code == 0 and re.search(r"[\d,]+ bytes to write, [\d,]+ bytes free", out)
    assert not (tmp_path / "checkpoint").exists()
    code, out, err = run(*arguments, "--json")
    values = json.loads(out)
    assert code == 0 and values["prefix"].startswith("<mood_0><mood_1>")
    assert f"{values['size']:,} bytes to write" in err
    assert (tmp_path / "checkpoint" / "soft_prompts.json").is_file()
    code, _, err = run(*arguments)
    assert code == 1 and "exists" in err and "pass --overwrite to replace it" in err


def test_export_names_the_base_model_that_it_misses(run, adapter, tmp_path):
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": None}))
    code, _, err = run("export", "vocabulary", adapter, tmp_path / "out")
    assert code == 1 and "--base" in err and not (tmp_path / "out").exists()


def test_card_takes_results_from_the_command_line_or_from_a_checkpoint(run, adapter):
    assert run("card", adapter, "--metric", "accuracy=0.93", "--metric", "f1=0.5")[0] == 0
    assert "| accuracy | 0.93 |\n| f1 | 0.5 |" in (adapter / "README.md").read_text()
    logs = [
        {"step": 4, "eval_loss": 9.0},
        {"step": 8, "loss": 3.0},
        {"step": 8, "eval_loss": 2.5, "eval_runtime": 1.0},
    ]
    (adapter / "trainer_state.json").write_text(json.dumps({"global_step": 8, "log_history": logs}))
    assert run("card", adapter)[0] == 0
    text = (adapter / "README.md").read_text()
    assert "| loss | 2.5 |" in text and "accuracy" not in text and "9" not in text.partition("## Results")[2]
    (adapter / "trainer_state.json").write_text("{}")
    code, _, err = run("card", adapter)
    assert code == 1 and "trainer_state.json" in err and (adapter / "README.md").read_text() == text


def test_push_of_an_adapter_that_is_not_whole_does_not_reach_for_the_hub(run, adapter):
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    code, out, _ = run("push", adapter, "someone/some-adapter")  # offline: an attempt would be another error
    assert code == 1 and "NOT VALID" in out


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_a_revision_of_a_folder_is_an_error(run, adapter):
    code, _, err = run("check", adapter, "--revision", "main")
    assert code == 1 and "--revision=main" in err


@pytest.mark.parametrize("argv", (["inspect"], ["inspect", "--no-base"], ["merge"]))
@pytest.mark.parametrize("source", ("nowhere", "someone/some-adapter", "not an id!", ""))
def test_an_adapter_that_is_nowhere_is_an_error_in_words(argv, source, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(argv[0], source, *(["out"] if argv == ["merge"] else argv[1:]))
    assert (code, out) == (1, "") and err.startswith("peft-residual: error: ") and err.count("\n") <= 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "argv",
    (
        [],
        ["frobnicate"],
        ["check"],
        ["merge", "a"],
        ["inspect", "a", "-k", "many"],
        ["inspect", "a", "--base", "b", "--no-base"],
        ["export", "onnx", "a", "b"],
        ["export", "tensors", "a", "b.npy", "--dry-run"],
        ["export", "prefix-tuning", "a", "b", "--token-format", "<{i}>"],
        ["export", "tensors", "a", "b.npy", "--base", "c"],
        ["export", "prompt-tuning", "a", "b"],
        ["card", "a", "--metric", "accuracy"],
        ["card", "a", "--metric", "=0.5"],
        ["push", "a"],
    ),
)
def test_a_wrong_command_line_returns_2_and_the_usage(argv, capsys):
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == 2 and "usage: peft-residual" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_has_worked_examples(name, capsys):
    if name == "train":
        pytest.importorskip("trl")  # its parser prints the help
    with pytest.raises(SystemExit) as error:
        main([name, "--help"])
    text = capsys.readouterr().out
    examples = re.findall(rf"^ +(peft-residual {name} .+)$", text, re.M)
    assert error.value.code == 0 and len(examples) >= 2
    assert name in COMMANDS and f"usage: peft-residual {name}" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_the_help_are_right_command_lines(name, capsys):
    """They name no adapter of ours, so that they end with an error in words and not with the usage."""
    for example in re.findall(rf"^ +peft-residual ({name} .+)$", COMMANDS[name].__doc__, re.M):
        assert main(example.split()) == 1
        assert "usage" not in capsys.readouterr().err


def test_ctrl_c_is_answered_without_a_traceback(run, monkeypatch):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "check", lambda parser: parser.add_argument("adapter") and interrupted)
    assert run("check", "adapter") == (130, "", "peft-residual: interrupted\n")


def test_the_command_runs_as_a_process(adapter, tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "peft_residual", "check", str(adapter), "--json"]
    good = subprocess.run(command, capture_output=True, text=True, check=False)
    assert good.returncode == 0 and json.loads(good.stdout)["is_valid"]
    run_module = 'import runpy; runpy.run_module("peft_residual", run_name="__main__", alter_sys=True)'
    bad = run_python(run_module, "inspect", tmp_path / "nowhere")
    assert (bad.returncode, bad.stdout) == (1, "")
    assert "peft-residual: error: " in bad.stderr and "Traceback" not in bad.stderr


def test_the_version_names_the_hosts(capsys):
    with pytest.raises(SystemExit) as error:
        main(["--version"])
    out = capsys.readouterr().out
    assert error.value.code == 0 and out.startswith(f"peft-residual {version('peft-residual')} (peft ")
    assert f"transformers {version('transformers')}," in out


# --- how soon it answers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--help"], "merge"),
        (["check", "--help"], "peft-residual check adapter"),
        (["--version"], f"transformers {version('transformers')}"),
        (["--verion"], "usage: peft-residual"),
        (["merge", "adapter", "merged", "--overwite"], "unrecognized arguments: --overwite"),
        (["murge"], "invalid choice: 'murge'"),
    ],
)
def test_help_and_mistyped_options_import_nothing_that_takes_time(argv, words):
    """A second is the bar; what would break it is an import, whatever else the machine does."""
    code = (
        "import sys, time; from peft_residual_cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n"
        "    heavy = {'torch', 'peft', 'transformers', 'peft_residual', 'trl', 'numpy', 'huggingface_hub'}\n"
        "    assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "    assert time.process_time() <= 1\n"
    )
    result = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False)
    assert result.returncode in (0, 2), result.stderr
    assert words in result.stdout + result.stderr and "Traceback" not in result.stderr
