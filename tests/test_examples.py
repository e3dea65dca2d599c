"""The examples run, offline, and say what they should; what they save loads in stock PEFT."""

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from fresh_process import run_python, run_script, start_script
from peft import PeftModel
from safetensors.torch import load_file
from source import lines_of_code
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from peft_residual import get_prompt_tensor
from peft_residual.registry import REPARAMETERIZATIONS


ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
# To be copied into other projects: real models and data, and no import from this repository but the package.
COPIED = [
    "sequence_classification.py",
    "token_classification.py",
    "causal_lm.py",
    "sft.py",
    "finetune.py",
    "finetune_seq2seq.py",
    "compress_prompt.py",
]
SCRIPTS = [
    *COPIED,
    "by_feature/base.py",
    "by_feature/two_learning_rates.py",
    "by_feature/custom_network.py",
    "by_feature/several_adapters.py",
    "by_feature/prompt_transfer.py",
    "by_feature/progressive_prompts.py",
    "by_feature/resume.py",
]


@contextlib.contextmanager
def examples_importable():
    """Let this process import what examples import, and forget it and the networks that they register afterwards."""
    known = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(REPARAMETERIZATIONS, "_entries", dict(REPARAMETERIZATIONS._entries))
        patch.setattr(sys, "path", [str(EXAMPLES / "by_feature"), str(EXAMPLES), *sys.path])
        try:
            yield
        finally:
            for name, module in list(sys.modules.items()):
                if name not in known and str(getattr(module, "__file__", "")).startswith(str(EXAMPLES)):
                    del sys.modules[name]


def smoke_options(script, folder):
    """The options with which `smoke.py` runs a script."""
    with examples_importable():
        import smoke

        return smoke.options(script, folder)


def run(script, *args):
    """Run a script as `python script args` does, in this process, which has imported the libraries; what it prints.

    `--smoke` becomes the options of `smoke.py` where a script has no such option.
    """
    printed = io.StringIO()
    with examples_importable(), pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        if script in COPIED and args[0] == "--smoke":
            args = *smoke_options(script, args[args.index("--output_dir") + 1].parent), *args[1:]
        patch.setattr(sys, "argv", [script, *map(str, args)])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    return printed.getvalue()


def refuses(script, *args):
    """The message that a script ends with."""
    with pytest.raises(SystemExit) as error:
        run(script, *args)
    assert isinstance(error.value.code, str)
    return error.value.code


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Run a script with `--smoke`, once: its output folder and what it printed."""
    finished = {}

    def get(script):
        if script not in finished:
            out = tmp_path_factory.mktemp("examples") / "out"
            finished[script] = out, run(script, "--smoke", "--output_dir", out)
        return finished[script]

    return get


def loading_code(printed):
    return [line.strip() for line in printed.splitlines() if line.startswith("    model = ")]


def saved(printed, word):
    """The folders that a script says it saved."""
    lines = [line for line in printed.splitlines() if line.startswith(f"{word}: ")]
    return [Path(line.split(": ")[1].split(" (")[0]) for line in lines]


# --- all scripts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_trains_evaluates_saves_and_merges(script, smoke):
    out, printed = smoke(script)
    adapters, merged = saved(printed, "adapter to train on"), saved(printed, "merged")
    assert len(adapters) == len(merged) == len(loading_code(printed)) >= 1
    for adapter, plain in zip(adapters, merged, strict=True):
        assert adapter.is_relative_to(out) and plain.is_relative_to(out)
        assert json.loads((adapter / "adapter_config.json").read_text())["peft_type"] == "RESIDUAL_PROMPT_TUNING"
        assert json.loads((plain / "adapter_config.json").read_text())["peft_type"] == "PROMPT_TUNING"
        prompts = [load_file(folder / "adapter_model.safetensors")["prompt_embeddings"] for folder in (adapter, plain)]
        assert torch.equal(*prompts)


def test_what_the_scripts_say_loads_in_a_process_without_this_package(smoke):
    lines = [line for script in SCRIPTS for line in loading_code(smoke(script)[1])]
    classes = {line.split("(")[1] for line in lines}
    imports = ["import sys", "from peft import PeftModel"]
    imports += [f"from transformers import {name.split('.')[0]}" for name in sorted(classes)]
    code = "\n".join([*imports, *lines, "assert 'peft_residual' not in sys.modules", "print('loaded')"])
    result = run_python(code)
    assert result.stdout.endswith("loaded\n"), result.stderr


@pytest.mark.parametrize("script", COPIED)
def test_a_script_to_copy_imports_nothing_else_of_this_repository(script):
    lines = (EXAMPLES / script).read_text().splitlines()
    imported = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
    local = {path.stem for path in EXAMPLES.glob("*") if path.suffix in ("", ".py")}
    assert "peft_residual" in imported and not imported & local


def test_smoke_runs_a_script(tmp_path):
    printed = run_alone("smoke.py", "sequence_classification.py", "--output_dir", tmp_path / "out")
    assert "test accuracy" in printed and "first predictions after reloading" in printed
    assert "There is no script 'demo.py'" in refuses("smoke.py", "demo.py")


def test_an_output_folder_is_never_replaced_by_a_script_to_copy(tmp_path):
    for script in COPIED:
        needed = ["--train_file", "rows.jsonl", "--instruction", "a"] if script.startswith("finetune") else []
        assert "exists. Choose another folder" in refuses(script, "--output_dir", tmp_path, *needed)


@pytest.mark.parametrize("script", [*SCRIPTS, "common.py", "smoke.py", "demo.py"])
def test_a_script_has_at_most_150_lines_of_code(script):
    assert lines_of_code(EXAMPLES / script) <= 150


def test_every_script_is_listed():
    files = [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("by_feature/*.py")]
    found = {str(path.relative_to(EXAMPLES)) for path in files}
    assert found == {*SCRIPTS, "common.py", "smoke.py", "demo.py"}
    readme = (EXAMPLES / "README.md").read_text()
    assert [script for script in found if f"]({script})" not in readme] == []


# --- what each shows ------------------------------------------------------------------------------------------------


def eval_losses(out):
    state = json.loads((out / "trainer" / "checkpoint-4" / "trainer_state.json").read_text())
    return [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]


def test_sft_trainer_and_trainer_do_the_same(smoke):
    losses = eval_losses(smoke("sft.py")[0])
    assert losses == pytest.approx(eval_losses(smoke("causal_lm.py")[0]), rel=1e-5)
    assert len(losses) == 4 and losses[-1] < losses[0]


@pytest.mark.parametrize("script", ["finetune.py", "finetune_seq2seq.py"])
def test_own_rows_are_learned_answered_and_resumed(script, smoke):
    out, printed = smoke(script)
    losses = eval_losses(out)
    before, after = map(float, re.search(r"loss: ([\d.]+) with the instruction, ([\d.]+) after", printed).groups())
    assert before > after == pytest.approx(min(losses), abs=1e-4)
    assert re.search(r"generated answers equal to the row's: [\d.]+%; the first: '", printed)
    assert "first answer after reloading: ['" in printed and "peft-residual export vocabulary" in printed
    options = smoke_options(script, out.parent)
    again = run(script, *options, "--output_dir", out, "--max_steps", "6", "--resume")
    assert float(re.search(r"([\d.]+) after training", again)[1]) <= after + 1e-4


def test_each_turn_of_an_assistant_is_a_row_that_ends_with_it():
    with examples_importable():
        from finetune import turns
    messages = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user", "assistant")]
    rows = list(turns([{"messages": messages}, {"prompt": "a", "completion": "b"}]))
    assert [len(row["prompt"]) for row in rows] == [2, 4, 1]
    assert all(row["completion"][0]["role"] == "assistant" for row in rows)
    with pytest.raises(SystemExit, match=r"Change as_messages\(\)"):
        list(turns([{"text": "a"}]))


def test_a_word_has_its_tag_at_its_first_piece():
    with examples_importable():
        from token_classification import at_first_pieces
    assert at_first_pieces([3, 5, 0], [None, 0, 0, 1, 2, 2, None]) == [-100, 3, -100, 5, 0, -100, -100]


def test_entities_are_read_as_a_whole():
    with examples_importable():
        from token_classification import entities
    assert entities("O B-PER I-PER O B-LOC".split()) == {(1, 3, "PER"), (4, 5, "LOC")}
    assert entities("B-PER B-PER I-LOC".split()) == {(0, 1, "PER"), (1, 2, "PER"), (2, 3, "LOC")}
    assert entities("I-ORG I-ORG I-PER O".split()) == {(0, 2, "ORG"), (2, 3, "PER")}
    assert entities([]) == set()


def test_two_learning_rates_are_set_and_scheduled(smoke):
    _, printed = smoke("by_feature/two_learning_rates.py")
    groups = {line.split()[0]: float(line.split()[2]) for line in printed.splitlines() if line.endswith(" 1e-05")}
    assert groups == {"encoder": 0.01, "prompt": 0.3}
    assert (
        "step 2: learning_rate_encoder 0.005, learning_rate_encoder_no_decay 0.005, learning_rate_prompt 0.15"
        in printed
    )


def test_a_custom_network_is_loaded_by_its_name(smoke):
    assert "the prompt is the same" in smoke("by_feature/custom_network.py")[1]


def test_several_adapters_score_the_same_once_loaded(smoke):
    _, printed = smoke("by_feature/several_adapters.py")
    scores = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.count("%") == 2}
    assert set(scores) == {"sentiment", "entailment"}
    assert all(trained == loaded for trained, loaded in scores.values())
    prompts = [load_file(p / "adapter_model.safetensors")["prompt_embeddings"] for p in saved(printed, "merged")]
    assert not torch.equal(*prompts)


def test_prompt_transfer_starts_from_the_source(smoke):
    out, printed = smoke("by_feature/prompt_transfer.py")
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["prompt_tuning_init"] == "PROMPT"
    assert config["prompt_tuning_init_state_dict_path"] == str(out / "source")
    assert printed.count("90% from ") == 2


def test_earlier_prompts_never_change(smoke):
    out, printed = smoke("by_feature/progressive_prompts.py")
    tasks = ["entailment", "word_in_context", "question_answering"]
    scores = {line.split()[0]: line.split()[2:4] for line in printed.splitlines() if line.endswith("the same")}
    assert list(scores) == tasks
    assert all(then == now for then, now in scores.values())
    prompts = [load_file(out / "merged" / t / "adapter_model.safetensors")["prompt_embeddings"] for t in tasks]
    assert [len(prompt) for prompt in prompts] == [10, 20, 30]
    assert torch.equal(prompts[1][:10], prompts[0]) and torch.equal(prompts[2][:20], prompts[1])
    assert not torch.equal(prompts[1][10:], prompts[0])


def test_training_on_changes_new_rows_only(smoke):
    out, _ = smoke("by_feature/progressive_prompts.py")
    with examples_importable():
        import progressive_prompts
        from embedded.tasks import MODEL

        assert progressive_prompts.Progressive is REPARAMETERIZATIONS["PROGRESSIVE"].builder
        base, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(MODEL).float(), AutoTokenizer.from_pretrained(MODEL)
        model = PeftModel.from_pretrained(base, out / "adapters" / "word_in_context", is_trainable=True)
        before = get_prompt_tensor(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.3, weight_decay=0.5)
        batch = tokenizer(["the food was good"], text_target=["north"], return_tensors="pt")
        for _ in range(2):
            model(**batch).loss.backward()
            optimizer.step()
        after = get_prompt_tensor(model)
    assert torch.equal(before[:10], after[:10])
    assert not torch.isclose(before[10:], after[10:]).any(dim=1).all()


def test_resume_says_that_both_ways_end_the_same(smoke):
    _, printed = smoke("by_feature/resume.py")
    assert "weights at step 4, with and without interruption: same" in printed


def test_ctrl_c_says_how_to_go_on_and_going_on_works(tmp_path):
    out = tmp_path / "out"
    script = EXAMPLES / "by_feature" / "resume.py"
    options = ["--max_steps", "500", "--batch_size", "8", "--output_dir", out]
    process = start_script(script, *options)
    while not (out / "straight" / "checkpoint-100" / "trainer_state.json").exists():
        assert process.is_running()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    result = process.wait()
    assert result.returncode == 130
    command = shlex.split(result.stdout.splitlines()[-1])
    assert command[-2:] == ["--resume_from", str(out / "straight")]
    assert command[:2] == ["python", str(script)]
    go_on = run("by_feature/resume.py", *command[2:], "--max_steps", "102", "--smoke")
    assert "test exact match" in go_on


# --- bad input ------------------------------------------------------------------------------------------------------


def test_a_script_takes_a_model_and_data_from_disk(smoke, tmp_path):
    model = smoke("sequence_classification.py")[0].parent / "model"
    for split in ("train", "validation"):
        lines = [
            json.dumps({"review": f"the film was {w}", "stars": i % 2}) for i, w in enumerate(["dull", "fun"] * 8)
        ]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    options = ["--model", model, "--dataset", tmp_path, "--subset", "default", "--text_column", "review"]
    options += ["--label_column", "stars", "--max_steps", "2", "--output_dir", tmp_path / "out"]
    options += ["--num_virtual_tokens", "4"]  # of the five words that the data holds
    assert "no column 'sentence'" in refuses("sequence_classification.py", *options, "--text_column", "sentence")
    assert "Pass --label_names" in refuses("sequence_classification.py", *options)
    printed = run("sequence_classification.py", *options, "--label_names", "bad", "good")
    assert "test accuracy" in printed


@pytest.mark.parametrize(
    "script, options, words",
    [
        ("sequence_classification.py", ["--text_column", "txt"], "Split 'train' has no column 'txt'"),
        ("token_classification.py", ["--tags_column", "tags"], "Split 'train' has no column 'tags'"),
        ("sequence_classification.py", ["--label_names", "bad"], "expected 0 to 0: ['bad']"),
        ("causal_lm.py", ["--label_names", "World", "Sports"], "expected 0 to 1: ['World', 'Sports']"),
        ("token_classification.py", ["--label_names", "O", "B-PER"], "expected 0 to 1"),
        ("sft.py", ["--num_virtual_tokens", "60"], "--num_virtual_tokens 60 leaves no room for text in 64 tokens"),
        ("by_feature/base.py", ["--task", "weather"], "There is no task 'weather' for development"),
        ("by_feature/several_adapters.py", ["--task", "entailment"], "are both 'entailment'"),
        ("by_feature/progressive_prompts.py", ["--tasks", "topic", "topic"], "names a task twice"),
        ("by_feature/base.py", ["--task", "aspect"], "There is no task 'aspect' for development"),
    ],
)
def test_bad_input_is_refused(script, options, words, tmp_path):
    assert words in refuses(script, "--smoke", "--output_dir", tmp_path / "out", *options)


@pytest.mark.parametrize("script", ["sequence_classification.py", "sft.py", "by_feature/base.py"])
def test_a_learning_rate_of_0_is_refused(script, tmp_path):
    with pytest.raises(ValueError, match=r"must be above 0, got 0\.0"):
        run(script, "--smoke", "--output_dir", tmp_path / "out", "--learning_rate", "0")


def test_an_output_folder_is_replaced_only_when_asked_for_and_an_examples_own(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").touch()
    assert "pass --overwrite" in refuses("by_feature/base.py", "--smoke", "--output_dir", out)
    assert "not written by an example" in refuses("by_feature/base.py", "--smoke", "--output_dir", out, "--overwrite")
    assert (out / "thesis.tex").exists()


def test_splits_and_labels_are_checked():
    with examples_importable():
        from causal_lm import label_names
        from common import check_columns
    named = Features({"label": ClassLabel(names=["no", "yes"])})
    train = Dataset.from_dict({"label": [0, 1]}, features=named)
    hidden = Dataset.from_dict({"label": [0, -1]}, features=named)
    assert label_names(DatasetDict(train=train), "label", None) == ["no", "yes"]
    with pytest.raises(SystemExit, match="Row 1 of split 'test' has label -1, expected 0 to 1"):
        label_names(DatasetDict(train=train, test=hidden), "label", None)
    empty = Dataset.from_dict({"label": []}, features=Features({"label": Value("int64")}))
    with pytest.raises(SystemExit, match="Split 'validation' is empty"):
        check_columns(DatasetDict(train=train, validation=empty), ["label"])


def test_resuming_needs_a_checkpoint_with_its_state(tmp_path):
    assert "holds no checkpoint" in refuses("by_feature/resume.py", "--smoke", "--resume_from", tmp_path)
    assert "holds no checkpoint" in refuses("by_feature/resume.py", "--smoke", "--resume_from", tmp_path / "nowhere")
    checkpoint = tmp_path / "checkpoint-4"
    checkpoint.mkdir()
    (checkpoint / "adapter_model.safetensors").touch()
    assert "has no trainer_state.json" in refuses("by_feature/resume.py", "--smoke", "--resume_from", tmp_path)


# --- demo and benchmark ---------------------------------------------------------------------------------------------


def run_alone(script, *args):
    result = run_script(EXAMPLES / script, *args)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_demo_trains_resumes_merges_and_reloads(tmp_path):
    out = tmp_path / "demo"
    printed = run_alone("demo.py", "--smoke", "--output_dir", out)
    assert "Interrupted." in printed
    assert "in a process without peft_residual: same" in printed
    assert (out / "curves.png").stat().st_size > 5000
    assert (out / "merged" / "adapter_model.safetensors").exists()
    again = run_script(EXAMPLES / "demo.py", "--smoke", "--output_dir", out)
    assert again.returncode == 1 and "--overwrite" in again.stderr
    assert (out / "curves.png").exists()


@pytest.fixture(scope="module")
def cost(tmp_path_factory):
    """`cost.py --smoke`, run once: its JSON, its folder and what it printed."""
    out = tmp_path_factory.mktemp("cost")
    printed = run_alone("benchmarks/cost.py", "--smoke", "--threads", "1", "--output", out)
    return json.loads((out / "cost.json").read_text()), out, printed


def test_cost_measures_every_section_against_its_rivals(cost):
    sections = {name: [set(c["times"]) for c in comparisons] for name, comparisons in cost[0]["sections"].items()}
    methods = {"prompt tuning", "residual"}
    shared = {"residual", "Python loop", "P-tuning MLP, PEFT", "P-tuning LSTM, PEFT"}
    prefill = {
        "merged, prompt tuning in PEFT",
        "residual adapter",
        "exported prefix, PEFT",
        "prompt cache",
        "text alone",
    }
    assert sections["training step"] == [methods]
    assert sections["encoder"] == [shared, {"residual", "Python loop", "memory traffic alone"}]
    assert sections["inference"] == [prefill, prefill, {"one call, adapter_names", "a call for each adapter"}]
    writing, reading = sections["saving"]
    assert {"save: residual", "merge in place", "export: prefix", "export: vocabulary"} < writing
    assert {"load: prompt tuning, PEFT", "load: residual", "load: merged, PEFT"} < reading
    assert len(sections["growth"]) == 8 and sections["growth of a step"] == [methods] * 2
    assert len(sections["import"]) == 1


def test_cost_divides_medians_of_the_turns_it_keeps(cost):
    for comparison in [c for comparisons in cost[0]["sections"].values() for c in comparisons]:
        medians = {rival: statistics.median(times) for rival, times in comparison["times"].items()}
        first = next(iter(medians.values()))
        assert comparison["medians"] == medians and min(medians.values()) > 0
        assert comparison["ratios"] == {rival: median / first for rival, median in medians.items()}
        assert {len(times) for times in comparison["times"].values()} == {comparison["settings"]["repeats"]}
        assert comparison["difference"] is None or comparison["difference"] <= 1e-5
    memory = cost[0]["sections"]["training step"][0]
    assert memory["memory_ratios"]["residual"] == memory["memory"]["residual"] / memory["memory"]["prompt tuning"]


def test_cost_says_what_it_was_measured_with(cost):
    result, out, printed = cost
    assert result["hardware"]["torch"] == torch.__version__
    assert result["hardware"]["threads"] == 1 and result["hardware"]["seed"] == 0
    page = (out / "cost.md").read_text()
    assert page in printed and "cost.py --smoke" in page
    ratio = result["sections"]["training step"][0]["ratios"]["residual"]
    assert f"| {ratio:.3f} |" in page
    assert "](cost-growth.png)" in page and (out / "cost-growth.png").stat().st_size > 5000


def test_the_gpu_script_runs_on_a_cpu(tmp_path):
    command = ["bash", str(EXAMPLES / "benchmarks" / "gpu.sh"), "cpu"]
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=200)
    assert "residual, shared, logits at labels" in (tmp_path / "gpu_steps.txt").read_text()


def test_benchmarks_run_alone():
    sizes = ["--tokens", "4", "--width", "16", "--hidden", "8", "--repeats", "3", "--threads", "1"]
    printed = run_alone("benchmarks/encoder.py", *sizes)
    assert "| per token, P=4 H=16 M=8 | residual |" in printed
    assert float(printed.split("differ by ")[1].split()[0]) <= 1e-5
