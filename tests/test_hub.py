"""The Hub: pushing and pulling with the real client, against a server of our own; what goes wrong on the way."""

import json
import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import tiny_t5
from hub_server import TOKEN, Hub
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from scenarios import SCENARIOS, outputs_of

from peft_residual import save_as_prompt_tuning


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

# Runs in a process of its own, since the client reads where the Hub is when it is imported: one text of code per line.
CLIENT = """
import contextlib, io, json, sys
sys.path.insert(0, "tests")
names = {}
for line in sys.stdin:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            exec(json.loads(line), names)
            error = ""
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
    print(json.dumps([error, out.getvalue(), err.getvalue()]), flush=True)
"""
COMMON = """
import copy, os, time, torch
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM
time.sleep = lambda seconds: None  # between tries
BASE = {base!r}
base = AutoModelForSeq2SeqLM.from_pretrained(BASE)
batch = {{name: torch.tensor(rows) for name, rows in {batch}.items()}}
def load(adapter, **kwargs):
    return PeftModel.from_pretrained(copy.deepcopy(base), adapter, **kwargs)
def show(model):
    with torch.no_grad():
        print(model.eval()(**batch).logits.tolist())
def command(*argv):
    from peft_residual_cli import main
    print(main([str(arg) for arg in argv]))
"""


class Client:
    """A process that has the Hub at `url`."""

    def __init__(self, url, cache, start):
        env = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
        env |= {"HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(cache), "HF_TOKEN": TOKEN}
        env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-c", CLIENT]
        self.process = subprocess.Popen(command, stdin=-1, stdout=-1, stderr=subprocess.DEVNULL, text=True, env=env)
        self(start)

    def __call__(self, code, fails=False):
        """Run code there; return what it printed, or with `fails` the error and what went to stderr."""
        self.process.stdin.write(json.dumps(textwrap.dedent(code)) + "\n")
        self.process.stdin.flush()
        error, out, err = json.loads(self.process.stdout.readline())
        assert bool(error) == fails, error + err
        return error + err if fails else out

    def command(self, *argv):
        """Run the command line there; (exit code, what it printed, what it complained)."""
        self.process.stdin.write(json.dumps(f"command(*{list(map(str, argv))!r})") + "\n")
        self.process.stdin.flush()
        error, out, err = json.loads(self.process.stdout.readline())
        assert not error and "Traceback" not in err, error + err
        *lines, code = out.splitlines()
        return int(code), "\n".join(lines), err


@pytest.fixture(scope="module")
def hub():
    hub = Hub()
    yield hub
    hub.server.shutdown()


@pytest.fixture(autouse=True)
def no_faults(hub):
    yield
    hub.faults.clear()


@pytest.fixture(scope="module")
def adapter(base_folder, tmp_path_factory):
    """A saved adapter, and what its model computes."""
    folder = tmp_path_factory.mktemp("adapter")
    model = SCENARIOS["t5"].model(type(tiny_t5()).from_pretrained(base_folder))
    model.save_pretrained(folder)
    return folder, outputs_of(model, SCENARIOS["t5"].batch())


def start_client(hub, base_folder, folder, start):
    batch = {name: tensor.tolist() for name, tensor in SCENARIOS["t5"].batch().items()}
    client = Client(hub.url, folder, start + COMMON.format(base=str(base_folder), batch=batch))
    yield client
    client.process.kill()
    client.process.wait(timeout=30)


@pytest.fixture(scope="module")
def client(hub, base_folder, tmp_path_factory):
    """With this package."""
    yield from start_client(hub, base_folder, tmp_path_factory.mktemp("hf"), "import peft_residual\n")


@pytest.fixture(scope="module")
def stock(hub, base_folder, tmp_path_factory):
    """Without this package, and with another cache."""
    yield from start_client(hub, base_folder, tmp_path_factory.mktemp("hf-stock"), "")


def logits(printed):
    return torch.tensor(json.loads(printed.splitlines()[-1]))


def code_of(card, number):
    """A code block of a card, for the base model and the repository of these tests."""
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[number]
    return code.replace('"path/to/the/base/model"', "BASE")


# --- pushing and pulling ---------------------------------------------------------------------------------------------


def test_a_model_is_pushed_and_its_card_tells_how_to_load_it_with_and_without_this_package(
    client, stock, hub, adapter
):
    folder, expected = adapter
    client(f"load({str(folder)!r}).push_to_hub('someone/full')")
    _, files = hub.files("someone/full")
    assert files.keys() == {WEIGHTS, CONFIG, "README.md"} and files[WEIGHTS][0] == (folder / WEIGHTS).read_bytes()
    text = files["README.md"][0].decode()
    card = ModelCard(text)
    assert card.data.library_name == "peft" and "residual-prompt-tuning" in card.data.tags
    assert "More Information Needed" not in text and "| encoder_hidden_size | 8 |" in text
    assert "@inproceedings{razdaibiedina-etal-2023-residual" in text
    with_package, without = (code_of(text, i).replace("path/or/id", "someone/full") for i in (0, 1))
    assert torch.allclose(logits(client(with_package + "show(model)")), expected, rtol=0, atol=1e-6)
    assert torch.allclose(logits(stock(without + "show(model)")), expected, rtol=0, atol=1e-6)
    assert stock("import sys; print('peft_residual' in sys.modules)") == "False\n"


def test_a_merged_model_is_pushed_and_stock_peft_pulls_it(client, stock, hub, adapter):
    folder, expected = adapter
    client(f"""
        model = load({str(folder)!r})
        peft_residual.convert_to_prompt_tuning(model)
        model.push_to_hub("someone/merged")
    """)
    text = hub.files("someone/merged")[1]["README.md"][0].decode()
    assert "residual-prompt-tuning" in ModelCard(text).data.tags and "| encoder_hidden_size | 8 |" in text
    only = code_of(text, 0).replace("path/or/id", "someone/merged")
    assert torch.allclose(logits(stock(only + "show(model)")), expected, rtol=0, atol=1e-6)


def test_a_revision_is_pulled(client, hub, adapter, tmp_path):
    folder, expected = adapter
    client(f"load({str(folder)!r}).push_to_hub('someone/versions')")
    first, _ = hub.files("someone/versions")
    client(f"""
        from scenarios import SCENARIOS, train
        model = load({str(folder)!r}, is_trainable=True)
        train(model, SCENARIOS["t5"], steps=2)
        model.push_to_hub("someone/versions")
        model.push_to_hub("someone/versions", revision="next")
    """)
    assert torch.equal(logits(client(f"show(load('someone/versions', revision={first!r}))")), expected)
    assert not torch.equal(logits(client("show(load('someone/versions'))")), expected)
    assert not torch.equal(logits(client("show(load('someone/versions', revision='next'))")), expected)
    client(f"""
        from peft_residual import save_as_prompt_tuning
        save_as_prompt_tuning("someone/versions", {str(tmp_path / "merged")!r}, revision={first!r}, token={TOKEN!r})
    """)
    merged = load_file(tmp_path / "merged" / "adapter_model.safetensors")["prompt_embeddings"]
    assert torch.equal(merged, load_file(folder / "adapter_model.safetensors")["prompt_embeddings"])


def test_what_a_user_wrote_into_the_card_on_the_hub_outlives_the_next_push(client, hub, adapter):
    folder, _ = adapter
    client(f"load({str(folder)!r}).push_to_hub('someone/edited')")
    _, files = hub.files("someone/edited")
    card = ModelCard(files["README.md"][0].decode())
    card.data.license, card.text = "mit", card.text + "\nTrained by hand.\n"
    hub.commit("someone/edited", "main", {**files, "README.md": (str(card).encode(), "0" * 40)})
    client(f"load({str(folder)!r}).push_to_hub('someone/edited')")
    text = hub.files("someone/edited")[1]["README.md"][0].decode()
    assert ModelCard(text).data.license == "mit" and "\nTrained by hand.\n" in text
    assert text.count("## How to load") == 1


def test_the_trainer_pushes_every_save_and_a_card_with_its_results(client, hub, tmp_path):
    client(f"""
        from trainers import STEPS, make_trainer
        from transformers import TrainerCallback
        class Wait(TrainerCallback):
            # The Trainer's next push writes over the files that an unfinished one is uploading.
            def on_step_begin(self, args, state, control, **kwargs):
                if trainer.push_in_progress is not None:
                    trainer.push_in_progress.wait_until_done()
        settings = dict(push_to_hub=True, hub_model_id="someone/trained", hub_strategy="every_save")
        trainer = make_trainer(
            {str(tmp_path / "out")!r}, eval_strategy="steps", eval_steps=STEPS, hub_always_push=True, **settings
        )
        trainer.add_callback(Wait())
        trainer.train()
        trainer.push_to_hub()
        model = trainer.model
    """)
    trees = [tree for _, tree in hub.repos["someone/trained"]["main"]]
    weights = [tree[WEIGHTS][0] for tree in trees if WEIGHTS in tree]
    saved = [(tmp_path / f"out/checkpoint-{n}" / WEIGHTS).read_bytes() for n in (4, 8)]
    assert set(weights) == set(saved)
    text = trees[-1]["README.md"][0].decode()
    card = ModelCard(text)
    assert card.data.library_name == "peft"
    assert {"generated_from_trainer", "residual-prompt-tuning"} <= set(card.data.tags)
    for part in ("- Loss: ", "- learning_rate: 0.1", "| encoder_dropout | 0.3 |", "@inproceedings{razdaibiedina"):
        assert part in text, part


def test_the_command_line_pushes_pulls_and_exports(client, hub, adapter, tmp_path):
    folder, _ = adapter
    code, out, _ = client.command("push", folder, "someone/by-command", "--private")
    assert code == 0 and out.startswith(f"{hub.url}/someone/by-command/commit/")
    assert "someone/by-command" in hub.private
    assert client.command("merge", folder, tmp_path / "merged")[0] == 0
    assert client.command("push", tmp_path / "merged", "someone/by-command", "--revision", "merged")[0] == 0
    values = json.loads(client.command("check", "someone/by-command", "--json")[1])
    assert values["is_valid"] and values["peft_type"] == "RESIDUAL_PROMPT_TUNING"
    values = json.loads(client.command("check", "someone/by-command", "--revision", "merged", "--json")[1])
    assert values["is_valid"] and values["peft_type"] == "PROMPT_TUNING"
    assert client.command("inspect", "someone/by-command", "--no-base", "--revision", "merged")[0] == 0
    assert client.command("merge", "someone/by-command", tmp_path / "again")[0] == 0
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "merged" / WEIGHTS).read_bytes()
    revision, _ = hub.files("someone/by-command", "merged")
    arguments = ["tensors", "someone/by-command", tmp_path / "prompt.npy", "--revision", revision]
    assert client.command("export", *arguments)[0] == 0
    code, _, err = client.command("merge", "someone/by-command", tmp_path / "no", "--revision", "gone")
    assert code == 1 and "gone" in err and not (tmp_path / "no").exists()


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_wrong_token_is_said_and_nothing_is_made(client, hub, adapter, tmp_path):
    folder, _ = adapter
    error = client(f"load({str(folder)!r}).push_to_hub('someone/refused', token='hf_wrong')", fails=True)
    assert "401" in error and "Invalid credentials" in error
    hub.create("someone/there")
    merged = tmp_path / "merged"
    client("os.environ['HF_TOKEN'] = 'hf_wrong'")
    try:
        for argv in (
            ["push", folder, "someone/refused"],
            ["check", "someone/there"],
            ["merge", "someone/there", merged],
        ):
            code, out, err = client.command(*argv)
            assert code == 1 and "Invalid credentials" in out + err
    finally:
        client(f"os.environ['HF_TOKEN'] = {TOKEN!r}")
    assert "someone/refused" not in hub.repos and not merged.exists()


def test_a_missing_repository_is_said(client, tmp_path):
    assert "someone/nothing" in client("load('someone/nothing')", fails=True)
    code, _, err = client.command("merge", "someone/nothing", tmp_path / "merged")
    assert code == 1 and "`someone/nothing` is not a local folder, and the Hub gave no" in err and "404" in err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("request_name", ("upload", "save"))
def test_a_connection_that_drops_during_a_push_commits_nothing(request_name, client, hub, adapter):
    folder, _ = adapter
    repo = f"someone/dropped-{request_name}"
    hub.faults[request_name] = "drop"
    client(f"load({str(folder)!r}).push_to_hub({repo!r})", fails=True)
    code, _, err = client.command("push", folder, repo)
    assert code == 1 and "disconnected" in err.lower()
    assert hub.files(repo)[1] == {}
    hub.faults.clear()
    assert client.command("push", folder, repo)[0] == 0 and WEIGHTS in hub.files(repo)[1]


@pytest.mark.parametrize("fault", ("drop", "truncate", "damage"))
@pytest.mark.parametrize("kind", ("full", "merged"))
def test_a_download_that_breaks_off_or_is_damaged_is_said_and_nothing_is_written(
    fault, kind, client, hub, adapter, tmp_path
):
    folder, _ = adapter
    source = folder if kind == "full" else save_as_prompt_tuning(folder, tmp_path / "merged")
    repo, out = f"someone/{fault}-{kind}", tmp_path / "prompt.npy"
    assert client.command("push", source, repo)[0] == 0
    hub.faults["resolve" if fault == "drop" else WEIGHTS] = fault
    code, _, err = client.command("export", "tensors", repo, out)
    assert code == 1 and "peft-residual: error: " in err and not list(tmp_path.glob("*prompt*"))
    assert ("its hash is not the one" if fault == "damage" else "The Hub did not give") in err
    assert client.command("check", repo)[0] == 1
    if kind == "full":
        client(f"load({repo!r})", fails=True)
    hub.faults.clear()
    if fault == "damage":  # what the message says to do
        os.unlink(re.search(r"`(.+?)` is damaged", err).group(1))
    assert client.command("export", "tensors", repo, out)[0] == 0 and out.is_file()
