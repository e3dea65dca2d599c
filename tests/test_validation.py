"""Damaged adapters: loading raises a descriptive error, and nothing in them is executed, followed or written."""

import json
import os
import pickle
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from damage import (
    JSON_TYPES,
    ONLY_RESIDUAL,
    PICKLE,
    WAYS,
    Bomb,
    change_tensors,
    header_length,
    read_config,
    write_config,
)
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from scenarios import SCENARIOS, fresh

from peft_residual import register_reparameterization, save_as_prompt_tuning
from peft_residual.storage.validation import check_adapter


TASKS = ("t5", "llama", "bert-sequence")
KINDS = ("residual", "merged")
COUNT = 200  # with `--full`
HANDFUL = 2 * len(WAYS)
# What to do, or which value would be right.
REMEDY = re.compile("again|Use |Leave|Upgrade|Set it|must be|Must be|expected|Known:|only valid")


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """A valid adapter of each task and kind in its own folder, and the base models."""
    root = tmp_path_factory.mktemp("valid")
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
    ("seed", "way", "task", "kind"),
    [pytest.param(*damage, marks=[pytest.mark.full] if damage[0] >= HANDFUL else []) for damage in damages()],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_damaged_adapter_raises_a_descriptive_error(seed, way, task, kind, valid, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(valid.root / task / kind, folder)
    way(folder, random.Random(seed))
    before = snapshot(tmp_path)
    report = check_adapter(folder)
    messages = list(report.findings)
    assert messages and not report.is_valid
    if kind == "residual":  # a merged one is loaded by PEFT alone
        with pytest.raises((ValueError, OSError)) as error:
            PeftModel.from_pretrained(fresh(valid.bases[task]), folder)
        assert type(error.value) in (ValueError, OSError)
        messages.append(str(error.value))
    for message in messages:
        assert str(folder) in message
        assert REMEDY.search(message), message
    assert snapshot(tmp_path) == before
    str(report).encode("utf-8", "backslashreplace"), report.to_json()


def test_there_are_two_hundred_of_all_kinds_and_a_handful_of_all_kinds():
    all_damages = list(damages())
    assert len(all_damages) == 200
    for chosen in (all_damages, all_damages[:HANDFUL]):
        assert {way for _, way, _, _ in chosen} == set(WAYS)
        assert {(task, kind) for _, _, task, kind in chosen} == {(task, kind) for task in TASKS for kind in KINDS}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_adapters_are_valid_before_they_are_damaged(task, kind, valid):
    folder = valid.root / task / kind
    report = check_adapter(folder)
    assert report.is_valid and report.findings == ()
    assert (report.num_virtual_tokens, report.token_dim) == (4, 16)
    assert report.task_type == SCENARIOS[task].task_type
    assert (report.peft_type, report.format_version, report.network) == (
        ("RESIDUAL_PROMPT_TUNING", 1, "MLP1") if kind == "residual" else ("PROMPT_TUNING", None, None)
    )
    assert report.shapes == {key: list(t.shape) for key, t in load_file(folder / "adapter_model.safetensors").items()}
    assert report.sizes == {path.name: path.stat().st_size for path in folder.iterdir() if path.suffix != ".md"}
    PeftModel.from_pretrained(fresh(valid.bases[task]), folder)


def test_the_table_of_json_types_has_every_field(valid):
    assert JSON_TYPES.keys() == read_config(valid.root / "t5" / "residual").keys()


# --- single cases ---------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(valid, tmp_path):
    """A copy of the valid residual BERT adapter, with a head of three labels."""
    return Path(shutil.copytree(valid.root / "bert-sequence" / "residual", tmp_path / "adapter"))


@pytest.mark.parametrize(
    "changes",
    [
        {"base_model_name_or_path": "../trap"},
        {"tokenizer_name_or_path": "../trap"},
        {"prompt_tuning_init": "PROMPT", "prompt_tuning_init_state_dict_path": "../trap/prompt.npy"},
        {"prompt_tuning_init": "PROMPT", "prompt_tuning_init_state_dict_path": "/dev/zero"},
        {"revision": "../../x", "peft_version": "../../x"},
    ],
)
def test_a_path_in_a_config_is_not_followed(changes, adapter, valid, monkeypatch):
    trap = adapter.parent / "trap"
    trap.mkdir()
    (trap / "prompt.npy").write_bytes(pickle.dumps(Bomb(adapter.parent / "executed")))
    write_config(adapter, **changes)
    before = snapshot(adapter.parent)
    monkeypatch.chdir(adapter)
    assert check_adapter(adapter).is_valid
    loaded = PeftModel.from_pretrained(fresh(valid.bases["bert-sequence"]), adapter)
    saved = load_file(adapter / "adapter_model.safetensors")["prompt_embeddings"]
    assert torch.equal(loaded.get_prompt_embedding_to_save("default"), saved)
    assert snapshot(adapter.parent) == before


def test_a_pickle_beside_valid_weights_is_not_read_and_is_mentioned(adapter, valid):
    torch.save({"prompt_embeddings": Bomb(adapter.parent / "executed")}, adapter / PICKLE)
    report = check_adapter(adapter)
    assert report.is_valid and any(PICKLE in note and "delete it" in note for note in report.notes)
    PeftModel.from_pretrained(fresh(valid.bases["bert-sequence"]), adapter)
    assert not (adapter.parent / "executed").exists()


def test_fields_of_the_future_are_mentioned(adapter):
    write_config(adapter, a_field_of_the_future=1)
    report = check_adapter(adapter)
    assert report.is_valid and "a_field_of_the_future" in "".join(report.notes)


@pytest.mark.parametrize("name", ("../../x", "/tmp/x", "a.b", "a\\b", ""))
def test_an_adapter_name_that_is_a_path_is_refused(name, adapter, valid):
    """PEFT saves an adapter to the folder of its name."""
    with pytest.raises(ValueError, match=r"`adapter_name`=.*without dots and slashes"):
        PeftModel.from_pretrained(fresh(valid.bases["bert-sequence"]), adapter, adapter_name=name)


HEAD = "base_model.classifier.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(HEAD), f"{HEAD}: expected [3, 16], found nothing"),
        (lambda tensors: tensors.update({HEAD: torch.ones(5, 16)}), f"{HEAD}: expected [3, 16], found [5, 16]"),
        (lambda tensors: tensors.update({"base_model.x": torch.ones(1)}), "base_model.x: expected nothing, found [1]"),
    ],
)
def test_a_head_that_is_not_the_models_is_refused_by_name(change, words, adapter, valid):
    change_tensors(adapter, change)
    with pytest.raises(ValueError, match=re.escape(words)):
        PeftModel.from_pretrained(fresh(valid.bases["bert-sequence"]), adapter)
    model = PeftModel.from_pretrained(
        fresh(valid.bases["bert-sequence"]), valid.root / "bert-sequence" / "residual", adapter_name="valid"
    )
    with pytest.raises(ValueError, match=re.escape(words)):
        model.load_adapter(adapter, "second")
    assert list(model.peft_config) == ["valid"]


def test_a_head_of_another_size_can_be_left_out(adapter, valid):
    change_tensors(adapter, lambda tensors: tensors.update({HEAD: torch.ones(5, 16)}))
    base = fresh(valid.bases["bert-sequence"])
    model = PeftModel.from_pretrained(base, adapter, ignore_mismatched_sizes=True)
    assert model.base_model.classifier.modules_to_save["default"].weight.shape == (3, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_whose_head_is_missing_is_not_valid(kind, valid, tmp_path):
    folder = shutil.copytree(valid.root / "bert-sequence" / kind, tmp_path / "adapter")
    change_tensors(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if "classifier" in key])
    (finding,) = check_adapter(folder).findings
    assert "nothing of `modules_to_save`=['classifier', 'score']" in finding


def test_every_flipped_bit_of_a_header_is_found(valid, tmp_path):
    """Each bit of the shortest header, the one of a merged prompt."""
    folder = Path(shutil.copytree(valid.root / "t5" / "merged", tmp_path / "adapter"))
    weights = folder / "adapter_model.safetensors"
    data = weights.read_bytes()
    passed = []
    for bit in range(8 * (8 + header_length(data))):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        weights.write_bytes(damaged)
        if check_adapter(folder).is_valid:
            passed.append((bit, bytes(damaged[8 : bit // 8 + 9])))
    assert passed == []


def test_an_adapter_in_a_subfolder_is_checked_and_loaded_there(adapter, valid):
    torch.save({}, adapter / PICKLE)
    report = check_adapter(adapter.parent, subfolder="adapter")
    assert report.is_valid and report.num_virtual_tokens == 4 and PICKLE in "".join(report.notes)
    PeftModel.from_pretrained(fresh(valid.bases["bert-sequence"]), adapter.parent, subfolder="adapter")
    change_tensors(adapter, lambda tensors: tensors["prompt_embeddings"].fill_(float("nan")))
    assert not check_adapter(adapter.parent, subfolder="adapter").is_valid
    with pytest.raises(ValueError, match="NaN"):
        PeftModel.from_pretrained(fresh(valid.bases["bert-sequence"]), adapter.parent, subfolder="adapter")


def test_an_embedding_table_in_the_weight_file_belongs_to_the_adapter(adapter, valid):
    base = fresh(valid.bases["bert-sequence"])
    table = {"base_model.bert.embeddings.word_embeddings.weight": torch.ones(64, 16)}
    change_tensors(adapter, lambda tensors: tensors.update(table))
    assert check_adapter(adapter).is_valid
    PeftModel.from_pretrained(base, adapter)
    assert base.get_input_embeddings().weight.eq(1).all()


@pytest.mark.parametrize("field", ("num_virtual_tokens", "encoder_hidden_size"))
def test_a_size_beyond_any_memory_is_refused_before_anything_is_built(field, adapter, valid):
    write_config(adapter, **{field: 2**31 - 1})
    base = valid.bases["bert-sequence"]
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.raises(ValueError, match="2147483647"):
        PeftModel.from_pretrained(base, adapter)
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert [name for name, tensor in base.state_dict().items() if not torch.equal(tensor, before[name])] == []


def test_a_damaged_adapter_of_another_kind_is_left_to_peft(tmp_path, valid):
    """With the package, PEFT says of others' folders what it says without it."""
    (tmp_path / "adapter_config.json").write_text("{")
    for load in (PeftModel.from_pretrained, lambda base, folder: PeftConfig.from_pretrained(folder)):
        with pytest.raises(json.JSONDecodeError):
            load(fresh(valid.bases["t5"]), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(KeyError, match="peft_type"):
        PeftModel.from_pretrained(fresh(valid.bases["t5"]), tmp_path)


def test_a_damaged_adapter_is_not_merged(adapter, tmp_path):
    change_tensors(adapter, lambda tensors: tensors["prompt_embeddings"].fill_(float("nan")))
    with pytest.raises(ValueError, match="NaN or infinite numbers in prompt_embeddings"):
        save_as_prompt_tuning(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_custom_network_is_checked_once_it_is_built(valid, tmp_path, own_names):
    """It may not be buildable without numbers, so the check of its file does not try."""

    @register_reparameterization("SCALE")
    def scale(config):
        module = torch.nn.Linear(config.token_dim, config.token_dim)
        module.weight.data.mul_(1 / module.weight.detach().norm().item())  # no `item` without numbers
        return module

    task = SCENARIOS["t5"]
    model = task.model(fresh(valid.bases["t5"]), encoder_reparameterization_type="SCALE")
    model.save_pretrained(tmp_path / "adapter")
    assert check_adapter(tmp_path / "adapter").is_valid
    change_tensors(
        tmp_path / "adapter",
        lambda tensors: tensors.update({"residual_prompt_tuning.network.weight": torch.ones(2, 2)}),
    )
    with pytest.raises(ValueError, match=r"network.weight: expected \[16, 16\], found \[2, 2\]"):
        PeftModel.from_pretrained(fresh(valid.bases["t5"]), tmp_path / "adapter")
    assert not check_adapter(tmp_path / "adapter").is_valid
