"""Model cards: right about the adapter, code that runs, and what a user wrote stays."""

import re

import pytest
import torch
from conftest import make_config
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel, PromptTuningConfig, get_peft_model
from scenarios import SCENARIOS, fresh, outputs_of

from peft_residual import save_as_prefix_tuning, save_as_prompt_tuning
from peft_residual.storage.model_card import update_card


def blocks(card):
    """The Python code of a card."""
    return re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)


def run(code, base, adapter):
    """Run a card's code for a base model and an adapter; return its model."""
    names = {}
    code = code.replace("path/to/the/base/model", str(base)).replace("path/or/id", str(adapter))
    exec(code, names)
    return names["model"]


@pytest.fixture
def saved(tmp_path):
    """Save a scenario's base model and adapter; (model, base folder, adapter folder, card)."""

    def save(name, **overrides):
        scenario, base_folder, folder = SCENARIOS[name], tmp_path / "base", tmp_path / "adapter"
        scenario.build().save_pretrained(base_folder)
        model = scenario.model(type(scenario.build()).from_pretrained(base_folder), **overrides)
        model.save_pretrained(folder)
        return model, base_folder, folder, ModelCard.load(folder / "README.md")

    return save


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_code_of_a_card_loads_the_adapter_with_and_without_this_package(name, saved):
    model, base, folder, card = saved(name)
    assert ["import peft_residual" in code for code in blocks(card)] == [True, False]
    for code in blocks(card):
        loaded = run(code, base, folder)
        expected = model.get_prompt_embedding_to_save("default")
        assert torch.equal(loaded.get_prompt_embedding_to_save("default"), expected)
        if name in ("t5", "bert-sequence"):  # where stock PEFT gives outputs of the same positions
            batch = SCENARIOS[name].batch()
            assert torch.allclose(outputs_of(loaded, batch), outputs_of(model, batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("export", (save_as_prompt_tuning, save_as_prefix_tuning))
def test_the_card_of_an_export_needs_peft_alone_and_tells_what_was_trained(export, saved, tmp_path):
    model, base, _, _ = saved("gpt2")
    card = ModelCard.load(export(model, tmp_path / "out") / "README.md")
    (code,) = blocks(card)
    assert "peft_residual" not in code and "residual-prompt-tuning" in card.data.tags
    assert "| encoder_reparameterization_type | MLP1 |" in card.text and "razdaibiedina" in card.text
    batch = SCENARIOS["gpt2"].batch(labels=False)
    expected, found = outputs_of(model, batch), outputs_of(run(code, base, tmp_path / "out"), batch)
    assert torch.allclose(found[0, -7:], expected[0, -7:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("network, method", [("SUPERPOS", "[SuperPos-Prompt]"), ("NONE", "prompt tuning")])
def test_a_card_names_the_method_that_trained_the_prompt_and_cites_no_other(network, method, saved, tmp_path):
    model, _, _, card = saved("gpt2", encoder_reparameterization_type=network)
    export = ModelCard.load(save_as_prompt_tuning(model, tmp_path / "out") / "README.md")
    for text in (card.text, export.text):
        assert f"trained with {method}" in text and "razdaibiedina" not in text


def test_a_card_of_several_adapters_loads_them_all(saved):
    model, base, folder, _ = saved("t5")
    model.add_adapter("other", make_config(num_virtual_tokens=3))
    model.save_pretrained(folder)
    card = ModelCard.load(folder / "README.md")
    assert "| num_virtual_tokens | 4 | 3 |" in card.text
    assert set(run(blocks(card)[0], base, folder).peft_config) == {"default", "other"}


def test_a_base_model_from_the_hub_is_named_and_a_local_path_is_not(saved):
    model, base, folder, card = saved("gpt2")
    assert card.data.base_model is None and str(base.parent) not in str(card)
    card.data.base_model, card.data.tags = str(base), [f"base_model:adapter:{base}"]  # as PEFT writes them
    card.save(folder / "README.md")
    model.save_pretrained(folder)
    assert ModelCard.load(folder / "README.md").content.count(str(base.parent)) == 0
    assert "`base`" in card.text and card.data.pipeline_tag == "text-generation"
    model.peft_config["default"].base_model_name_or_path = "someone/some-model"
    model.peft_config["default"].revision = "v1"
    model.save_pretrained(folder)
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "someone/some-model"
    assert "base_model:adapter:someone/some-model" in card.data.tags
    assert 'from_pretrained("someone/some-model", revision="v1")' in card.text


def test_a_plain_adapter_of_pefts_own_is_not_said_to_be_residual(tmp_path):
    config = PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4, num_transformer_submodules=1)
    get_peft_model(SCENARIOS["t5"].build(), config).save_pretrained(tmp_path)
    card = ModelCard.load(update_card(tmp_path))
    assert "residual-prompt-tuning" not in card.data.tags and "Residual" not in card.text


# --- an existing card ------------------------------------------------------------------------------------------------


def test_what_a_user_wrote_stays_and_results_of_older_weights_go(saved):
    model, _, folder, card = saved("t5")
    card.data.license, card.data.tags = "mit", [*card.data.tags, "moods"]
    card.text = card.text.replace("# Soft prompt", "# Moods\n\nBy hand.") + "\nThanks.\n"
    card.save(folder / "README.md")
    update_card(folder, results={"accuracy": 0.93})
    update_card(folder)
    assert "| accuracy | 0.93 |" in (folder / "README.md").read_text()
    model.save_pretrained(folder)
    again = ModelCard.load(folder / "README.md")
    assert again.data.license == "mit" and "moods" in again.data.tags
    assert "# Moods\n\nBy hand." in again.text and "\nThanks.\n" in again.text
    assert again.text.count("## How to load") == 1 and "accuracy" not in again.text
    model.save_pretrained(folder)
    assert (folder / "README.md").read_text() == str(again)


def test_an_export_keeps_what_its_card_says_of_the_training(saved, tmp_path):
    _, _, folder, _ = saved("t5")
    merged = save_as_prompt_tuning(folder, tmp_path / "merged")
    text = (merged / "README.md").read_text()
    update_card(merged, results={"accuracy": 0.5})
    assert (merged / "README.md").read_text().startswith(text.rstrip())


def test_an_empty_form_is_replaced_and_one_that_was_filled_in_is_not(saved):
    model, _, folder, _ = saved("t5")
    form = ModelCard.from_template(ModelCardData(), model_description="")
    for text, stays in ((form.text, False), (form.text.replace("# Model Card for Model ID", "# Moods"), True)):
        form.text = text
        form.save(folder / "README.md")
        model.save_pretrained(folder)
        assert ("More Information Needed" in (folder / "README.md").read_text()) == stays


def test_a_damaged_card_is_named_and_costs_no_adapter(saved):
    model, _, folder, _ = saved("t5")
    expected = outputs_of(model, SCENARIOS["t5"].batch())
    damaged = "---\ntags: [\n---\nBy hand.\n"
    (folder / "README.md").write_text(damaged)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"card was not updated.*README.md"):
        model.save_pretrained(folder)
    assert (folder / "README.md").read_text() == damaged
    loaded = PeftModel.from_pretrained(fresh(model.get_base_model()), folder)
    assert torch.equal(outputs_of(loaded, SCENARIOS["t5"].batch()), expected)
    with pytest.raises(ValueError, match="damaged metadata"):
        update_card(folder)
