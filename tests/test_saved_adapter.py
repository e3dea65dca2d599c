"""Reading an adapter: once, into one object, which becomes the model's."""

import pytest
import torch
from conftest import make_config, tiny_t5
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open
from scenarios import SCENARIOS

import peft_residual.encoder
from peft_residual.storage import files
from peft_residual.storage.saved_adapter import read_adapter


@pytest.fixture
def folder(tmp_path):
    SCENARIOS["t5"].model().save_pretrained(tmp_path)
    return tmp_path


def test_loading_opens_the_weights_once_and_once_more_for_pefts_own_read(folder, monkeypatch):
    from peft.utils import save_and_load

    opened = []
    pefts = save_and_load.safe_load_file
    monkeypatch.setattr(files, "safe_open", lambda path, **options: opened.append(path) or safe_open(path, **options))
    monkeypatch.setattr(
        save_and_load, "safe_load_file", lambda path, **options: opened.append(path) or pefts(path, **options)
    )
    model = PeftModel.from_pretrained(tiny_t5(), folder)
    assert len(opened) == 2
    model.load_adapter(folder, "second")
    assert len(opened) == 4
    model.load_adapter(folder, "default", is_trainable=True)
    assert len(opened) == 6


def test_loading_reads_the_config_once(folder, monkeypatch):
    read = []
    original = PeftConfig.from_json_file
    monkeypatch.setattr(PeftConfig, "from_json_file", lambda path: read.append(path) or original(path))
    values = files.read_config
    for module in (files, peft_residual.storage.saved_adapter):
        monkeypatch.setattr(module, "read_config", lambda path: read.append(path) or values(path))
    PeftModel.from_pretrained(tiny_t5(), folder)
    assert len(read) == 1


def test_loading_initializes_nothing(folder, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("called")

    monkeypatch.setattr(peft_residual.encoder, "initialize_prompt", fail)
    monkeypatch.setattr(peft_residual.encoder, "build_network", fail)
    torch.manual_seed(3)
    expected = torch.rand(4)
    base = tiny_t5()
    torch.manual_seed(3)
    PeftModel.from_pretrained(base, folder).load_adapter(folder, "second")
    assert torch.equal(torch.rand(4), expected)


def test_what_is_read_is_what_was_saved(folder):
    saved = read_adapter(folder)
    encoder = saved.build_encoder()
    assert torch.equal(encoder(), saved.projected) and not encoder.is_trainable
    assert saved.heads == {} and saved.config.task_type == "SEQ_2_SEQ_LM"


# --- the config -----------------------------------------------------------------------------------------------------


def test_a_given_config_becomes_the_models_own(folder):
    config = PeftConfig.from_pretrained(folder)
    model = PeftModel.from_pretrained(tiny_t5(), folder, config=config)
    assert model.peft_config["default"] is config and model.prompt_encoder["default"].config is config
    assert config.inference_mode and config.token_dim == 16


def test_a_config_that_another_model_uses_is_copied(folder):
    trained = get_peft_model(tiny_t5(), make_config())
    config = trained.peft_config["default"]
    loaded = PeftModel.from_pretrained(tiny_t5(), folder, config=config)
    assert loaded.peft_config["default"] is not config and loaded.peft_config["default"].inference_mode
    assert not config.inference_mode and trained.peft_config["default"] is config


def test_a_failed_load_leaves_the_given_config_as_it_was(folder):
    config = PeftConfig.from_pretrained(folder)
    before = config.to_dict()
    with pytest.raises(ValueError, match="width"):
        PeftModel.from_pretrained(tiny_t5(d_model=32), folder, config=config)
    assert config.to_dict() == before
