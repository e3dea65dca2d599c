"""Files are written completely or not at all: a kill at any moment leaves the old artifact or the new one."""

import itertools
import os
import random
import signal
import threading
import time

import pytest
import torch
from conftest import make_config, tiny_llama
from peft import PeftModel, get_peft_model
from scenarios import SCENARIOS, fresh, outputs_of, train
from text_tokenizers import characters_behind_a_space
from tqdm import tqdm

from peft_residual import save_as_prefix_tuning, save_as_prompt_tuning, save_as_vocabulary
from peft_residual.export import save_prompt_tensor
from peft_residual.storage import atomic as writing


T5 = SCENARIOS["t5"]

# --- kill -9 --------------------------------------------------------------------------------------------------------


def fork():
    """As `os.fork`, with a lock of the child's own for progress bars.

    tqdm's lock is shared between processes. A process that is killed while it holds the lock never releases it, and
    all others that show a progress bar would wait forever.
    """
    child = os.fork()
    if not child:
        kinds = [tqdm]
        for kind in kinds:
            kind.set_lock(threading.RLock())
            kinds += kind.__subclasses__()
    return child


def save(model, path):
    model.save_pretrained(path)


def save_words(model, path):
    save_as_vocabulary(model, characters_behind_a_space(), path, overwrite=True)


def overwriting(export):
    return lambda model, path: export(model, path, overwrite=True)


WRITERS = {  # how an artifact is written, and the lengths of the two prompts that are written in turns
    "saved": (save, (4, 4)),
    "merged": (overwriting(save_as_prompt_tuning), (4, 6)),
    "prefix": (overwriting(save_as_prefix_tuning), (4, 6)),
    "words": (save_words, (4, 6)),
    "prompt.npy": (overwriting(save_prompt_tensor), (4, 6)),
}


def contents(path):
    """The bytes of every file that belongs to an artifact, by file name."""
    if path.is_file():
        return {path.name: path.read_bytes()}
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != "README.md")
    return {file.name: file.read_bytes() for file in files if not file.parent.name.startswith(".")}


class Artifact:
    """Two models and a way to write them; what each writes, and how long that takes."""

    def __init__(self, name, folder):
        self.name, self.folder = name, folder
        self.write, lengths = WRITERS[name]
        self.models, self.versions = [], []
        for i, length in enumerate(lengths):
            config = make_config(task_type="CAUSAL_LM", num_virtual_tokens=length)
            model = get_peft_model(tiny_llama(vocab_size=104), config).eval()
            torch.nn.init.constant_(model.prompt_encoder["default"].embedding.weight, i)
            start = time.monotonic()
            self.write(model, folder / f"version-{i}" / name)
            self.seconds = time.monotonic() - start
            self.models.append(model)
            self.versions.append(contents(folder / f"version-{i}" / name))

    def write_in_turns(self, path, descriptor):
        for model in itertools.cycle(self.models):
            self.write(model, path)
            os.write(descriptor, b".")

    def version_at(self, path):
        """Which of the two is there: never anything else, nor anything beside it that has a name of its own."""
        assert [path.name for path in path.parent.iterdir() if not path.name.startswith(".")] == [self.name]
        found = contents(path)
        assert found in self.versions, f"{self.name} is neither the old one nor the new one"
        return self.versions.index(found)


@pytest.mark.parametrize("trials", [20, pytest.param(50, marks=pytest.mark.full)])
def test_kills_leave_no_half_artifact(trials, tmp_path):
    moments, seen = random.Random(0), set()
    artifacts = [Artifact(name, tmp_path) for name in WRITERS]
    for trial, artifact in zip(range(trials), itertools.cycle(artifacts)):
        path = tmp_path / str(trial) / artifact.name
        reading, writing = os.pipe()
        child = fork()
        if not child:
            try:
                artifact.write_in_turns(path, writing)
            finally:
                os._exit(1)
        os.read(reading, 1)  # one is there: from now on there is always one
        time.sleep(moments.uniform(0, artifact.seconds))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        os.close(reading), os.close(writing)
        seen.add((artifact.name, artifact.version_at(path)))
    assert len(seen) > 5, "kills found old and new ones"


def killed_after_renames(count, write):
    """Run `write` in a fork that dies at its n-th renaming or deleting of a file; returns whether it came that far."""
    child = fork()
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
        writing._exchange_in_one_step = dying(writing._exchange_in_one_step)
        try:
            write()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


@pytest.mark.parametrize("name", WRITERS)
def test_a_kill_before_any_rename_leaves_the_old_or_the_new_artifact(name, tmp_path):
    artifact, seen = Artifact(name, tmp_path), []
    old, new = artifact.models
    for count in range(100):
        path = tmp_path / str(count) / name
        artifact.write(old, path)
        was_killed = killed_after_renames(count, lambda path=path: artifact.write(new, path))
        seen.append(artifact.version_at(path))
        if not was_killed:
            break
    assert list(dict.fromkeys(seen)) == [0, 1]


def test_a_save_with_other_settings_leaves_old_new_or_what_nothing_loads(tmp_path):
    base, batch = T5.build(), T5.batch()
    models = [T5.model(base=fresh(base), encoder_activation=activation) for activation in ("relu", "tanh")]
    live = [outputs_of(model, batch) for model in models]
    seen = []
    for count in range(20):
        out = tmp_path / str(count)
        models[0].save_pretrained(out)
        (out / "optimizer.pt").write_text("a trainer's own")
        was_killed = killed_after_renames(count, lambda out=out: models[1].save_pretrained(out))
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
