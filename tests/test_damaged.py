"""Two hundred damaged adapters: each is refused in words, and nothing in them is executed, followed or written."""

import os
import random
import re
import shutil
from types import SimpleNamespace

import pytest
from damage import JSON_TYPES, ONLY_RESIDUAL, WAYS, read_config
from peft import PeftModel
from safetensors.torch import load_file
from scenarios import SCENARIOS, fresh

from peft_residual import save_as_prompt_tuning
from peft_residual.validation import check_adapter


TASKS = ("t5", "llama", "bert-sequence")
KINDS = ("residual", "merged")
COUNT = 200
# What to do, or which value would be right.
REMEDY = re.compile("again|Use |Leave|Upgrade|Set it|must be|expected|Known:|only valid")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A whole adapter of each task and kind in a folder of its own, and the base models."""
    root = tmp_path_factory.mktemp("whole")
    bases = {task: SCENARIOS[task].build() for task in TASKS}
    for task in TASKS:
        model = SCENARIOS[task].model(fresh(bases[task]), prompt_tuning_init="RANDOM")
        model.save_pretrained(root / task / "residual")
        save_as_prompt_tuning(model, root / task / "merged")
    return SimpleNamespace(root=root, bases=bases)


def snapshot(folder):
    """Every path below a folder with its bytes, or where it points to."""
    paths = sorted(folder.rglob("*"))
    return {
        path: os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
        for path in paths
    }


def damages():
    """(seed, way, task, kind): every way in turn."""
    for seed in range(COUNT):
        way = WAYS[seed % len(WAYS)]
        rng = random.Random(seed)
        kind = "residual" if way in ONLY_RESIDUAL or rng.random() < 0.7 else "merged"
        yield seed, way, rng.choice(TASKS), kind


@pytest.mark.parametrize(
    ("seed", "way", "task", "kind"), damages(), ids=lambda value: getattr(value, "__name__", None)
)
def test_a_damaged_adapter_is_refused_in_words(seed, way, task, kind, whole, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(whole.root / task / kind, folder)
    way(folder, random.Random(seed))
    before = snapshot(tmp_path)
    report = check_adapter(folder)
    messages = list(report.findings)
    assert messages and not report.is_whole
    if kind == "residual":  # a merged one is loaded by PEFT alone
        with pytest.raises((ValueError, OSError)) as error:
            PeftModel.from_pretrained(fresh(whole.bases[task]), folder)
        assert type(error.value) in (ValueError, OSError)
        messages.append(str(error.value))
    for message in messages:
        assert str(folder) in message
        assert REMEDY.search(message), message
    assert snapshot(tmp_path) == before
    str(report).encode("utf-8", "backslashreplace"), report.to_json()


def test_there_are_two_hundred_of_all_kinds():
    all_damages = list(damages())
    assert len(all_damages) == 200
    assert {way for _, way, _, _ in all_damages} == set(WAYS)
    assert {(task, kind) for _, _, task, kind in all_damages} == {(task, kind) for task in TASKS for kind in KINDS}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_adapters_are_whole_before_they_are_damaged(task, kind, whole):
    folder = whole.root / task / kind
    report = check_adapter(folder)
    assert report.is_whole and report.findings == ()
    assert (report.num_virtual_tokens, report.token_dim) == (4, 16)
    assert report.task_type == SCENARIOS[task].task_type
    assert (report.peft_type, report.format_version, report.network) == (
        ("RESIDUAL_PROMPT_TUNING", 1, "MLP1") if kind == "residual" else ("PROMPT_TUNING", None, None)
    )
    assert report.shapes == {key: list(t.shape) for key, t in load_file(folder / "adapter_model.safetensors").items()}
    assert report.sizes == {path.name: path.stat().st_size for path in folder.iterdir() if path.suffix != ".md"}
    PeftModel.from_pretrained(fresh(whole.bases[task]), folder)


def test_the_table_of_json_types_has_every_field(whole):
    assert JSON_TYPES.keys() == read_config(whole.root / "t5" / "residual").keys()
