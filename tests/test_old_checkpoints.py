"""Adapters that earlier versions wrote load bit for bit: weights, prompts, outputs, and what is saved again."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from peft_residual import get_prompt_tensor
from peft_residual.storage.validation import check_adapter


FOLDER = Path(__file__).parent / "data" / "adapters_0.1.0"
WRITER = runpy.run_path(str(FOLDER / "write.py"))
ADAPTERS = {**WRITER["ADAPTERS"], f"{WRITER['MERGED']}-merged": WRITER["ADAPTERS"][WRITER["MERGED"]]}
EXPECTED = load_file(FOLDER / "expected.safetensors")
IS_SAME_MACHINE = json.loads((FOLDER / "machine.json").read_text()) == WRITER["machine"]()


def assert_same_result(found, expected):
    """Bit for bit where it was computed; other processors and other versions of torch round differently."""
    if IS_SAME_MACHINE:
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def load(name, **options):
    return PeftModel.from_pretrained(WRITER["build_base"](ADAPTERS[name][0]), FOLDER / name, **options)


def test_every_adapter_of_the_folder_is_loaded():
    assert {path.parent.name for path in FOLDER.glob("*/adapter_config.json")} == set(ADAPTERS)


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in ADAPTERS), *((name, {"is_trainable": True}) for name in WRITER["ADAPTERS"])],
    ids=str,
)
def test_prompt_and_logits_are_those_of_the_version_that_wrote_the_adapter(name, options):
    model = load(name, **options)
    assert_same_result(get_prompt_tensor(model), EXPECTED[f"{name}.prompt"])
    assert_same_result(WRITER["logits"](model), EXPECTED[f"{name}.logits"])


@pytest.mark.parametrize("name", ADAPTERS)
def test_saving_again_writes_the_same_tensors_and_settings(name, tmp_path):
    load(name).save_pretrained(tmp_path)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (FOLDER / name, tmp_path))
    assert before.keys() == after.keys()
    assert_same_result(after.pop("prompt_embeddings"), before.pop("prompt_embeddings"))
    assert all(torch.equal(before[key], tensor) and before[key].dtype == tensor.dtype for key, tensor in after.items())
    before, after = (json.loads((folder / "adapter_config.json").read_text()) for folder in (FOLDER / name, tmp_path))
    if "init_vocab_size" in before:  # the former name of the field
        assert before.pop("init_vocab_size") == after["prompt_tuning_init_vocab_size"] == WRITER["INIT_VOCAB_SIZE"]
    changing = {"peft_version", "base_model_name_or_path", "auto_mapping"}
    assert {key: value for key, value in before.items() if after[key] != value and key not in changing} == {}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_old_adapter_is_valid(name):
    report = check_adapter(FOLDER / name)
    assert report.findings == () and "init_vocab_size" not in "".join(report.notes)
