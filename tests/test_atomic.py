"""Files appear whole or not at all: a kill at any moment leaves the old artefact or the new one, never half."""

import os
from pathlib import Path

import pytest
import torch
from conftest import make_config
from fresh_process import run_python
from peft import PeftModel
from scenarios import SCENARIOS, fresh, outputs_of, train

from peft_residual.storage import atomic as writing


T5 = SCENARIOS["t5"]

# --- kill -9 --------------------------------------------------------------------------------------------------------

# Saves and exports two models in turns, over and over, in one fork per trial; prints what each kill left behind.
KILLED_PROCESS = """
import itertools, os, random, signal, sys, time
sys.path[:0] = sys.argv[1:3]
import warnings; warnings.simplefilter("ignore")
import torch, transformers
transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()
from conftest import make_config, tiny_llama
from peft import get_peft_model
from text_tokenizers import characters_behind_a_space
from peft_residual import *
from peft_residual.export import save_prompt_tensor

torch.set_num_threads(1)
tokenizer = characters_behind_a_space()

def model(rows, weight):
    config = make_config(task_type="CAUSAL_LM", num_virtual_tokens=rows)
    model = get_peft_model(tiny_llama(vocab_size=104), config).eval()
    torch.nn.init.constant_(model.prompt_encoder["default"].embedding.weight, weight)
    return model

def save(model, out):
    model.save_pretrained(out)

def vocabulary(model, out):
    save_as_vocabulary(model, tokenizer, out, overwrite=True)

def overwriting(export):
    return lambda model, out: export(model, out, overwrite=True)

alike, unlike = [model(4, 0), model(4, 1)], [model(4, 0), model(6, 1)]
WRITERS = {
    "saved": (save, alike),
    "merged": (overwriting(save_as_prompt_tuning), unlike),
    "prefix": (overwriting(save_as_prefix_tuning), unlike),
    "words": (vocabulary, unlike),
    "prompt.npy": (overwriting(save_prompt_tensor), unlike),
}
SECONDS = {}
for name, (write, models) in WRITERS.items():
    for i, model in enumerate(models):  # what whole artefacts look like
        start = time.monotonic()
        write(model, f"{sys.argv[3]}/{i}/{name}")
        SECONDS[name] = time.monotonic() - start

moments = random.Random(0)
for trial, (name, (write, models)) in zip(range(int(sys.argv[4])), itertools.cycle(WRITERS.items())):
    out = f"{sys.argv[3]}/killed/{trial}/{name}"
    reading, writing_end = os.pipe()
    child = os.fork()
    if not child:
        for model in itertools.cycle(models):
            write(model, out)
            os.write(writing_end, b".")
    os.read(reading, 1)  # one is there: from now on there is always one
    time.sleep(moments.uniform(0, SECONDS[name]))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading), os.close(writing_end)
"""


def contents(path):
    """Every file of an artefact that is part of it, by its name."""
    if path.is_file():
        return {path.name: path.read_bytes()}
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != "README.md")
    return {file.name: file.read_bytes() for file in files if not file.parent.name.startswith(".")}


@pytest.mark.parametrize("count", [20, pytest.param(50, marks=pytest.mark.full)])
def test_kills_leave_no_half_artefact(count, tmp_path):
    tests = Path(__file__).parent
    run_python(KILLED_PROCESS, tests, tests.parent, tmp_path, count).check_returncode()
    trials = sorted((tmp_path / "killed").iterdir())
    assert len(trials) == count
    seen = set()
    for trial in trials:
        (artefact,) = (path for path in trial.iterdir() if not path.name.startswith("."))
        found = contents(artefact)
        versions = [i for i in "01" if contents(tmp_path / i / artefact.name) == found]
        assert versions, f"{artefact.name} is neither the old one nor the new one"
        seen.add((artefact.name, versions[0]))
    assert len(seen) > 5, "kills found old and new ones"


def killed_after_renames(tmp_path, count, write):
    """Run `write` in a fork that dies at its n-th renaming or deleting of a file; returns whether it came that far."""
    child = os.fork()
    if not child:
        done = 0

        def dying(function):
            def run(*args, **kwargs):
                nonlocal done
                if done == count:
                    os._exit(9)
                done += 1
                return function(*args, **kwargs)

            return run

        for name in ("replace", "rename", "unlink", "rmdir"):
            setattr(os, name, dying(getattr(os, name)))
        write()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_save_with_other_settings_leaves_old_new_or_what_nothing_loads(tmp_path):
    base, batch = T5.build(), T5.batch()
    models = [T5.model(base=fresh(base), encoder_activation=activation) for activation in ("relu", "tanh")]
    live = [outputs_of(model, batch) for model in models]
    seen = []
    for count in range(20):
        out = tmp_path / str(count)
        models[0].save_pretrained(out)
        (out / "optimizer.pt").write_text("a trainer's own")
        was_killed = killed_after_renames(tmp_path, count, lambda out=out: models[1].save_pretrained(out))
        assert (out / "optimizer.pt").read_text() == "a trainer's own"
        if not (out / "adapter_config.json").exists():
            with pytest.raises(ValueError, match=r"adapter_config\.json"):
                PeftModel.from_pretrained(fresh(base), out)
            seen.append("none")
        else:
            found = outputs_of(PeftModel.from_pretrained(fresh(base), out), batch)
            seen.append(["old", "new"][[torch.equal(found, one) for one in live].index(True)])
        if not was_killed:
            break
    assert list(dict.fromkeys(seen)) == ["old", "none", "new"]


# --- adapters -------------------------------------------------------------------------------------------------------


def test_saving_leaves_other_files_and_brings_the_model_card_up_to_date(tmp_path):
    model = T5.model()
    model.add_adapter("second", make_config())
    (tmp_path / "README.md").write_text("# My own words\n")
    (tmp_path / "trainer_state.json").write_text("{}")
    model.save_pretrained(tmp_path)
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    adapter = ["adapter_config.json", "adapter_model.safetensors"]
    assert files == sorted([*adapter, *(f"second/{name}" for name in adapter), "README.md", "trainer_state.json"])
    card = (tmp_path / "README.md").read_text()
    assert "# My own words" in card and "library_name: peft" in card


def test_a_failing_save_leaves_the_old_adapter(tmp_path):
    model = T5.model()
    model.save_pretrained(tmp_path)
    before = contents(tmp_path)
    train(model, T5, steps=1)
    with pytest.raises(ValueError, match=r"no `prompt_encoder.default.embedding.weight`"):
        model.save_pretrained(tmp_path, state_dict={"something": torch.zeros(1)})
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_only_the_main_process_writes(tmp_path):
    T5.model().save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        T5.model().save_pretrained(tmp_path / "file")


# --- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [True, False])
def test_a_folder_is_exchanged_with_or_without_help_of_the_system(at_once, tmp_path, monkeypatch):
    if not at_once:
        monkeypatch.setattr(writing, "_exchange_in_one_step", lambda new, old: False)
    out = tmp_path / "out"
    for text in ("old", "new"):
        with writing.new_folder(out, marker="marker", overwrite=True) as folder:
            (folder / "marker").write_text(text)
        assert (out / "marker").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_error_while_writing_leaves_nothing_or_what_was_there(tmp_path):
    out = tmp_path / "deep" / "out"
    for existing in (False, True):
        with pytest.raises(OSError, match="disk full"):
            with writing.new_folder(out, marker="marker", overwrite=True) as folder:
                (folder / "marker").write_text("half")
                raise OSError("disk full")
        assert out.exists() == existing
        out.mkdir(exist_ok=True)
        (out / "marker").write_text("old")
    assert (out / "marker").read_text() == "old"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_room_is_looked_for_where_the_folder_will_be(tmp_path):
    free = writing.check_room(tmp_path / "not" / "yet" / "there", 1)
    assert free > 1
    with pytest.raises(OSError, match="bytes are to be written") as error:
        writing.check_room(tmp_path, 2**62)
    assert error.value.errno == 28
