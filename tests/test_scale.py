"""The unit `s` of prompt and network: `E' = s·(e + φ(e))`."""

import copy
import json

import pytest
import torch
from conftest import make_config, tiny, tiny_llama, tiny_t5
from peft import PeftConfig, PeftModel, get_peft_model

from peft_residual import (
    ResidualPromptTuningConfig,
    convert_to_prompt_tuning,
    create_residual_optimizer,
    get_prompt_tensor,
    inspect_prompt,
)


SCALED = {"encoder_scale": None, "encoder_layer_norm": False, "encoder_zero_init": True, "prompt_tuning_init_seed": 3}


def build(base=None, **options):
    values = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3, **SCALED, **options}
    return get_peft_model(base or tiny_llama(), make_config(**values))


def train(model, steps=3):
    optimizer = create_residual_optimizer(model, learning_rate=0.1, encoder_learning_rate=0.01)
    ids = torch.randint(5, 64, (2, 6), generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_the_projected_prompt_is_that_of_the_formula():
    encoder = train(build(encoder_scale=0.25)).prompt_encoder["default"]
    e, weights = encoder.embedding.weight, encoder.network.state_dict()
    hidden = torch.relu(e @ weights["down.weight"].T + weights["down.bias"])
    expected = 0.25 * (e + hidden @ weights["up.weight"].T + weights["up.bias"])
    assert weights["up.weight"].any()
    torch.testing.assert_close(encoder(), expected)
    torch.testing.assert_close(encoder.prompt_embedding, 0.25 * e)


def test_none_measures_what_the_embedding_module_returns_and_records_it(tmp_path):
    base = tiny("Gemma2", head_dim=8)  # multiplies its embeddings by √H
    rows = base.get_input_embeddings()(torch.arange(64)).detach()
    config = make_config(task_type="CAUSAL_LM", num_virtual_tokens=3, **SCALED)
    model = get_peft_model(base, config)
    assert config.encoder_scale == pytest.approx(rows.square().mean().sqrt().item(), rel=1e-6)
    prompt = get_prompt_tensor(model)
    distances = torch.cdist(prompt, rows, compute_mode="donot_use_mm_for_euclid_dist")
    assert distances.amin(1).max() < 1e-3  # starts at words
    assert model.prompt_encoder["default"].embedding.weight.square().mean().sqrt().item() == pytest.approx(1, abs=0.3)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["encoder_scale"] == config.encoder_scale


def test_the_same_settings_take_the_same_course_with_embeddings_of_any_scale():
    """A model whose embeddings are 16 times as long, and divided by 16 inside, learns the same prompt times 16."""
    small, large = tiny_llama(), tiny_llama()
    large.load_state_dict(small.state_dict())
    with torch.no_grad():
        large.get_input_embeddings().weight.mul_(16)
    large.model.layers[0].register_forward_pre_hook(lambda module, args: (args[0] / 16, *args[1:]))
    first, second = (get_prompt_tensor(train(build(base), steps=5)) for base in (small, large))
    torch.testing.assert_close(second, first * 16, rtol=1e-4, atol=1e-4)


def test_saved_loaded_resumed_and_merged_adapters_have_the_same_prompt(tmp_path):
    base = tiny_llama()
    model = train(build(copy.deepcopy(base)))
    prompt = get_prompt_tensor(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert torch.equal(get_prompt_tensor(loaded), prompt)
    assert torch.equal(get_prompt_tensor(train(loaded)), get_prompt_tensor(train(model)))
    frozen = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(get_prompt_tensor(frozen), prompt)
    convert_to_prompt_tuning(frozen)
    assert torch.equal(frozen.prompt_encoder["default"].embedding.weight, prompt)


def test_an_adapter_that_was_saved_before_there_was_a_unit_has_none(tmp_path):
    model = build(encoder_scale=1.0)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    del values["encoder_scale"]
    path.write_text(json.dumps(values))
    assert PeftConfig.from_pretrained(tmp_path).encoder_scale == 1.0
    assert torch.equal(get_prompt_tensor(PeftModel.from_pretrained(tiny_llama(), tmp_path)), get_prompt_tensor(model))


def test_a_config_that_was_saved_before_a_model_was_built_still_measures(tmp_path):
    make_config(task_type="CAUSAL_LM", **SCALED).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert config.encoder_scale is None
    get_peft_model(tiny_llama(), config)
    assert config.encoder_scale > 0


def test_an_adapter_without_its_unit_is_refused(tmp_path):
    build().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "encoder_scale": None}))
    with pytest.raises(ValueError, match="`encoder_scale` is None"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_a_changed_unit_is_found_when_an_adapter_is_loaded(tmp_path):
    build().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "encoder_scale": 2.0}))
    with pytest.raises(ValueError, match=r"'encoder_scale': 2\.0"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_inspection_compares_in_the_models_units():
    report = inspect_prompt(build())
    torch.testing.assert_close(report.embedding, report.projected)
    assert report.distance_from_initialization.max() == 0
    assert report.network_share.max() < 1e-6


@pytest.mark.parametrize("value", (0, -1.0, float("inf"), float("nan"), True, "auto"))
def test_values_that_cannot_be_right_are_refused(value):
    with pytest.raises(ValueError, match="`encoder_scale` must be a positive number"):
        ResidualPromptTuningConfig(task_type="CAUSAL_LM", encoder_scale=value)


def test_a_base_model_without_weights_cannot_be_measured():
    with torch.device("meta"):
        base = tiny_llama()
    with pytest.raises(ValueError, match="`encoder_scale`=None measures"):
        build(base, prompt_tuning_init="RANDOM")


def test_mixing_weights_have_no_unit():
    superpos = {"encoder_reparameterization_type": "SUPERPOS", "encoder_layer_norm": True, "encoder_zero_init": False}
    with pytest.warns(UserWarning, match="`encoder_scale`=None has no effect"):
        model = build(tiny_t5(), task_type="SEQ_2_SEQ_LM", **superpos)
    assert model.prompt_encoder["default"].config.scale == 1.0
