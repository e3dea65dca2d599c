"""What PEFT users know works with a residual adapter, for all six task types."""

import copy
import pickle
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from conftest import WIDTH, make_config, tiny_gpt2, tiny_t5
from hosts import STOCK_GENERATION
from peft import PeftModel, PromptTuningConfig, TaskType, get_peft_model
from scenarios import SCENARIOS, fresh, outputs_of, train
from transformers import GenerationConfig

from peft_residual import (
    ResidualPromptEncoder,
    ResidualPromptTuningConfig,
    convert_to_prompt_tuning,
    save_as_prompt_tuning,
)
from peft_residual.compat import cache_name
from peft_residual.peft_model.base_model import fill_in_sizes


P = 4


@pytest.fixture(params=SCENARIOS)
def scenario(request):
    return SCENARIOS[request.param]


def adapter_tensors(model, adapter_name="default"):
    return peft.get_peft_model_state_dict(model, adapter_name=adapter_name)


def assert_same_tensors(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def test_training_changes_prompt_and_network_and_nothing_else(scenario):
    base = scenario.build()
    before = {k: v.clone() for k, v in base.state_dict().items()}
    model = get_peft_model(base, make_config(task_type=scenario.task_type))
    start = {k: v.clone() for k, v in model.prompt_encoder["default"].state_dict().items()}
    train(model, scenario, steps=2)

    assert isinstance(model.prompt_encoder["default"], ResidualPromptEncoder)
    for leaf, tensor in model.prompt_encoder["default"].state_dict().items():
        assert not torch.equal(tensor, start[leaf]), f"{leaf} was not trained"
    for name, tensor in model.base_model.state_dict().items():
        if "modules_to_save" not in name:
            assert torch.equal(tensor, before[name.replace("original_module.", "")]), f"{name} is frozen"


def test_save_load_and_save_again_lose_nothing(scenario, tmp_path):
    base = scenario.build()
    model = scenario.model(fresh(base))
    batch = scenario.batch(labels=False) | ({"decoder_input_ids": torch.ones(2, 1).long()} if scenario is T5 else {})
    expected = outputs_of(model, batch)
    model.save_pretrained(tmp_path / "first")
    loaded = PeftModel.from_pretrained(fresh(base), tmp_path / "first")
    assert torch.equal(outputs_of(loaded, batch), expected)

    loaded.save_pretrained(tmp_path / "second")
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second
    first, second = ((tmp_path / name / "adapter_config.json").read_text() for name in ("first", "second"))
    assert first == second


T5 = SCENARIOS["t5"]


def test_loaded_adapter_is_frozen_and_projects_once(tmp_path):
    T5.model().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(T5.build(), tmp_path)
    assert model.get_nb_trainable_parameters()[0] == 0
    encoder = model.prompt_encoder["default"]
    encoder.project = encoder.network.forward = None  # any further use of the network would fail
    assert outputs_of(model, T5.batch()).isfinite().all()
    model.train()  # not even its dropout may act on a frozen prompt
    assert torch.equal(encoder(), encoder())


def test_frozen_adapter_notices_that_its_weights_were_replaced(tmp_path):
    model = T5.model()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(T5.build(), tmp_path)
    before = outputs_of(loaded, T5.batch())
    other = T5.model(prompt_tuning_init_seed=5)
    loaded.prompt_encoder.load_state_dict(other.prompt_encoder.state_dict())
    after = outputs_of(loaded, T5.batch())
    assert not torch.equal(before, after)
    assert torch.equal(loaded.prompt_encoder["default"](), other.prompt_encoder["default"]().detach())


def test_training_goes_on_from_a_loaded_adapter_as_if_it_had_never_stopped(scenario, tmp_path):
    base = scenario.build()
    model = scenario.model(fresh(base), encoder_reparameterization_type="MLP2")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh(base), tmp_path, is_trainable=True)
    assert loaded.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    assert loaded.training and loaded.prompt_encoder.training
    assert not loaded.peft_config["default"].inference_mode
    train(model, scenario, steps=3)
    train(loaded, scenario, steps=3)
    assert_same_tensors(adapter_tensors(loaded), adapter_tensors(model))


def test_loading_for_training_needs_no_source_of_the_start(tokenizer_folder, tmp_path):
    model = T5.model(
        prompt_tuning_init="TEXT", prompt_tuning_init_text="good film", tokenizer_name_or_path=tokenizer_folder
    )
    model.peft_config["default"].tokenizer_name_or_path = "/gone"
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(T5.build(), tmp_path, is_trainable=True)
    assert_same_tensors(adapter_tensors(loaded), adapter_tensors(model))
    loaded.load_adapter(tmp_path, "second", is_trainable=True)
    assert_same_tensors(adapter_tensors(loaded, "second"), adapter_tensors(model))


@pytest.mark.parametrize("auto", ["AutoPeftModelForSeq2SeqLM", "AutoPeftModelForCausalLM"])
def test_auto_classes_build_base_and_adapter(auto, tmp_path):
    scenario = SCENARIOS["t5" if "Seq2Seq" in auto else "gpt2"]
    base = scenario.build()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    model = scenario.model(base)
    model.save_pretrained(tmp_path / "adapter")
    for is_trainable in (False, True):
        loaded = getattr(peft, auto).from_pretrained(tmp_path / "adapter", is_trainable=is_trainable)
        assert torch.equal(outputs_of(loaded, scenario.batch()), outputs_of(model, scenario.batch()))


def test_config_is_found_by_peft(tmp_path):
    config = make_config(encoder_dropout=0.25)
    config.save_pretrained(tmp_path)
    assert '"peft_type": "RESIDUAL_PROMPT_TUNING"' in (tmp_path / "adapter_config.json").read_text()
    for found in (peft.PeftConfig.from_pretrained(tmp_path), peft.get_peft_config(config.to_dict())):
        assert type(found) is ResidualPromptTuningConfig
        assert found == config
        assert found.peft_type == "RESIDUAL_PROMPT_TUNING"
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING["RESIDUAL_PROMPT_TUNING"] is ResidualPromptTuningConfig


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_deepcopy_and_pickle_make_an_equal_and_separate_model(scenario, copied, tmp_path):
    model = scenario.model()
    twin = copied(model)
    assert torch.equal(outputs_of(twin, scenario.batch()), outputs_of(model, scenario.batch()))
    before = adapter_tensors(model)
    train(twin, scenario, steps=1)
    assert_same_tensors(adapter_tensors(model), before)
    assert not torch.equal(adapter_tensors(twin)["prompt_embeddings"], before["prompt_embeddings"])


@pytest.mark.parametrize("is_trainable", [False, True])
def test_low_cpu_mem_usage_loads_the_same(scenario, is_trainable, tmp_path):
    base = scenario.build()
    model = scenario.model(fresh(base))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh(base), tmp_path, low_cpu_mem_usage=True, is_trainable=is_trainable)
    assert torch.equal(outputs_of(loaded, scenario.batch()), outputs_of(model, scenario.batch()))
    trainable = model.get_nb_trainable_parameters()[0] if is_trainable else 0
    assert loaded.get_nb_trainable_parameters()[0] == trainable


@pytest.mark.parametrize("name", ["embedding", "dense", "0", "network", "weight", "prompt_encoder", "down"])
def test_adapter_names_that_occur_in_keys_are_safe(name, tmp_path):
    scenario = SCENARIOS["bert-features"]
    base = scenario.build()
    config = {"encoder_reparameterization_type": "MLP2", "modules_to_save": ["pooler"]}  # keys: pooler.dense.weight
    model = scenario.model(fresh(base), adapter_name=name, **config)
    expected = scenario.model(fresh(base), adapter_name="safe", **config)
    model.save_pretrained(tmp_path)
    assert_same_tensors(adapter_tensors(model, name), adapter_tensors(expected, "safe"))
    for loaded_name in (name, "other"):
        loaded = PeftModel.from_pretrained(fresh(base), tmp_path / name, adapter_name=loaded_name)
        assert_same_tensors(adapter_tensors(loaded, loaded_name), adapter_tensors(model, name))


def test_trained_heads_are_saved_and_loaded(tmp_path):
    scenario = SCENARIOS["bert-sequence"]
    base = scenario.build()
    model = scenario.model(fresh(base))
    assert not torch.equal(
        model.base_model.classifier.modules_to_save["default"].weight,
        model.base_model.classifier.original_module.weight,
    )
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh(base), tmp_path)
    assert torch.equal(outputs_of(loaded, scenario.batch()), outputs_of(model, scenario.batch()))


# --- several adapters -----------------------------------------------------------------------------------------


def plain_config(task_type="SEQ_2_SEQ_LM"):
    return PromptTuningConfig(task_type=task_type, num_virtual_tokens=P)


def trainable_adapters(model):
    return {
        name for name, encoder in model.prompt_encoder.items() if any(p.requires_grad for p in encoder.parameters())
    }


def test_residual_and_plain_adapters_live_in_one_model(tmp_path):
    base = tiny_t5()
    model = T5.model(fresh(base), adapter_name="one")
    model.add_adapter("two", make_config(num_virtual_tokens=7, prompt_tuning_init_seed=3))
    model.add_adapter("plain", plain_config())
    alone = {"one": T5.model(fresh(base)), "plain": get_peft_model(fresh(base), plain_config())}
    alone["plain"].prompt_encoder["default"].load_state_dict(model.prompt_encoder["plain"].state_dict())
    for name, expected in alone.items():
        model.set_adapter(name)
        assert torch.equal(outputs_of(model, T5.batch()), outputs_of(expected, T5.batch()))
        ids = T5.batch()["input_ids"]
        assert torch.equal(model.generate(input_ids=ids), expected.generate(input_ids=ids))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(fresh(base), tmp_path / "plain", adapter_name="plain")
    again.load_adapter(tmp_path / "one", "one")
    again.load_adapter(tmp_path / "two", "two")
    for name in ("one", "two", "plain"):
        model.set_adapter(name)
        again.set_adapter(name)
        assert torch.equal(outputs_of(again, T5.batch()), outputs_of(model, T5.batch()))


def test_only_the_active_residual_adapter_is_trainable():
    model = get_peft_model(tiny_t5(), make_config(), adapter_name="one")
    model.add_adapter("two", make_config())
    assert trainable_adapters(model) == {"one"}
    count = model.get_nb_trainable_parameters()[0]
    model.set_adapter("two")
    assert trainable_adapters(model) == {"two"}
    assert model.get_nb_trainable_parameters()[0] == count
    model.set_adapter("one", inference_mode=True)
    assert trainable_adapters(model) == set()
    model.set_adapter("two")
    model.set_requires_grad("two", False)
    assert trainable_adapters(model) == set()
    model.set_requires_grad(["two"])
    assert trainable_adapters(model) == {"two"}
    with pytest.warns(UserWarning, match="two was active"):
        model.delete_adapter("two")
    assert trainable_adapters(model) == {"one"}


def test_adapters_loaded_for_inference_stay_frozen_when_they_become_active(tmp_path):
    T5.model().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_t5(), tmp_path)
    model.load_adapter(tmp_path, "second")
    model.load_adapter(tmp_path, "third", is_trainable=True)
    assert trainable_adapters(model) == set()
    model.set_adapter("second")
    assert trainable_adapters(model) == set()
    model.set_adapter("third")
    assert trainable_adapters(model) == {"third"}


def test_deleted_adapter_is_gone_and_the_rest_works():
    model = T5.model(adapter_name="one")
    expected = outputs_of(model, T5.batch())
    model.add_adapter("two", make_config())
    model.delete_adapter("two")
    assert list(model.peft_config) == list(model.prompt_encoder) == ["one"]
    assert torch.equal(outputs_of(model, T5.batch()), expected)


def test_disable_adapter_gives_the_base_model_in_forward_and_generate(scenario):
    base = scenario.build()
    batch = scenario.batch()
    expected = outputs_of(fresh(base), batch)
    model = scenario.model(fresh(base))
    with_prompt = outputs_of(model, batch)
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    with model.disable_adapter():
        with model.disable_adapter():
            pass
        assert torch.equal(outputs_of(model, batch), expected)
        if scenario.task_type in ("SEQ_2_SEQ_LM", "CAUSAL_LM"):
            inputs = {k: v[:1] for k, v in scenario.batch(labels=False).items()}
            generated = model.generate(**inputs, max_new_tokens=8)
            assert torch.equal(generated, fresh(base).generate(**inputs, max_new_tokens=8))
    assert torch.equal(outputs_of(model, batch), with_prompt)
    assert grads == {name: p.requires_grad for name, p in model.named_parameters()}


# --- generate -------------------------------------------------------------------------------------------------

GENERATION = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 5},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beams-several": {"num_beams": 4, "num_return_sequences": 2},
}


@pytest.mark.parametrize("mode", GENERATION)
@pytest.mark.parametrize("name", ["t5", "gpt2", "llama"])
def test_generate_gives_what_the_merged_adapter_gives_in_peft(name, mode):
    scenario = SCENARIOS[name]
    model = scenario.model()
    ids = scenario.batch()["input_ids"][:1].repeat(2, 1)  # no padding, where PEFT itself is right
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 6, **GENERATION[mode]}
    torch.manual_seed(3)
    live = model.generate(**kwargs)
    convert_to_prompt_tuning(model)
    torch.manual_seed(3)
    assert torch.equal(live, model.generate(**kwargs, **STOCK_GENERATION))
    assert live.shape[0] == 2 * GENERATION[mode].get("num_return_sequences", 1)


def test_lengths_of_generation_count_the_text_only():
    model = SCENARIOS["gpt2"].model()
    model.base_model.generation_config.eos_token_id = None
    ids = SCENARIOS["gpt2"].batch()["input_ids"][:1]
    assert model.generate(ids, max_length=11).shape == (1, 11)
    assert model.generate(input_ids=ids, max_new_tokens=3).shape == (1, 10)
    config = copy.deepcopy(model.base_model.generation_config)
    config.max_length = 12
    assert model.generate(ids, generation_config=config).shape == (1, 12)
    assert config.max_length == 12
    model.generation_config = config
    assert model.generate(ids).shape == (1, 12)
    assert torch.equal(model.generate(ids)[:, :7], ids)
    del model.generation_config
    model.base_model.generation_config.max_length = 13
    assert model.generate(ids, generation_config=GenerationConfig(do_sample=False)).shape == (1, 13)
    with pytest.raises(ValueError, match="`max_length`=5 includes the 7 tokens"):
        model.generate(ids, max_length=5)


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_generate_infers_the_mask_as_transformers_does(name):
    model = SCENARIOS[name].model()
    batch = {k: v.flip(1) if name == "llama" else v for k, v in SCENARIOS[name].batch(labels=False).items()}
    expected = model.generate(**batch, max_new_tokens=5)
    ids = batch["input_ids"]
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=5), expected)
    assert torch.equal(model.generate(input_ids=ids, generation_config=GenerationConfig(max_new_tokens=5)), expected)
    model.base_model.generation_config.pad_token_id = None
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=5, pad_token_id=0), expected)


@pytest.mark.parametrize("argument", sorted({"past_key_values", cache_name()}))
def test_manual_decoding_with_a_cache_equals_one_pass(argument):
    model = SCENARIOS["llama"].model()
    ids = SCENARIOS["llama"].batch()["input_ids"][:1]
    with torch.no_grad():
        whole = model(input_ids=ids).logits[:, P:]
        first = model(input_ids=ids[:, :4], use_cache=True)
        mask = torch.ones_like(ids)
        rest = model(input_ids=ids[:, 4:], attention_mask=mask, **{argument: first[cache_name()]})
    torch.testing.assert_close(torch.cat([first.logits[:, P:], rest.logits], dim=1), whole, rtol=1e-5, atol=1e-5)


# --- where PEFT itself is wrong -------------------------------------------------------------------------------


def test_token_classification_scores_input_tokens_only():
    scenario = SCENARIOS["bert-token"]
    model = scenario.model()
    batch = scenario.batch()
    outputs = model(**batch)
    assert outputs.logits.shape == (2, 7, 3)
    expected = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), batch["labels"].flatten())
    torch.testing.assert_close(outputs.loss, expected)
    loss, logits = model(**batch, return_dict=False)[:2]
    assert torch.equal(loss, outputs.loss) and torch.equal(logits, outputs.logits)


def test_question_answering_counts_positions_in_the_input():
    scenario = SCENARIOS["bert-question"]
    model = scenario.model()
    batch = scenario.batch()
    outputs = model(**batch)
    assert outputs.start_logits.shape == outputs.end_logits.shape == (2, 7)
    train(model, scenario, steps=150)
    model.eval()
    outputs = model(**batch)
    assert outputs.start_logits.argmax(-1).tolist() == batch["start_positions"].tolist()
    assert outputs.end_logits.argmax(-1).tolist() == batch["end_positions"].tolist()
    beyond = {**batch, "start_positions": torch.tensor([1, 99]), "end_positions": torch.tensor([3, 99])}
    only_first = {name: value[:1] for name, value in batch.items()}
    torch.testing.assert_close(model(**beyond).loss, model(**only_first).loss)


def test_features_line_up_with_the_input():
    scenario = SCENARIOS["bert-features"]
    model = scenario.model()
    assert model(**scenario.batch()).last_hidden_state.shape == (2, 7, 16)


def test_loading_with_a_live_config_leaves_the_live_model_alone(tmp_path):
    model = T5.model()
    model.save_pretrained(tmp_path)
    expected = outputs_of(model, T5.batch())
    loaded = PeftModel.from_pretrained(tiny_t5(), tmp_path, config=model.peft_config["default"])
    assert not model.peft_config["default"].inference_mode
    assert model.get_nb_trainable_parameters()[0] > 0
    assert torch.equal(outputs_of(model, T5.batch()), expected)
    assert loaded.peft_config["default"].inference_mode


def test_right_padded_rows_are_classified_as_alone_by_a_decoder():
    from transformers import GPT2ForSequenceClassification

    scenario = SCENARIOS["gpt2"]
    base = GPT2ForSequenceClassification(tiny_gpt2(num_labels=3).config).eval()
    model = get_peft_model(base, make_config(task_type=TaskType.SEQ_CLS)).eval()
    batch = scenario.batch(labels=False)
    left = {name: value.roll(2, dims=1) for name, value in batch.items()}
    with torch.no_grad():
        alone = model(input_ids=batch["input_ids"][1:, :5], attention_mask=torch.ones(1, 5).long()).logits
        for padded in (batch, left, {"input_ids": batch["input_ids"]}):
            torch.testing.assert_close(model(**padded).logits[1:], alone, rtol=1e-5, atol=1e-6)


def test_a_users_own_subclass_keeps_its_methods():
    class Own(peft.PeftModelForSeq2SeqLM):
        def hello(self):
            return "hello"

    base = tiny_t5()
    model = Own(fresh(base), make_config())
    assert model.hello() == "hello"
    expected = get_peft_model(base, make_config())
    expected.prompt_encoder.load_state_dict(model.prompt_encoder.state_dict())
    assert torch.equal(outputs_of(model, T5.batch()), outputs_of(expected, T5.batch()))
    with pytest.raises(TypeError, match=r"PeftModel does not .*get_peft_model"):
        PeftModel(tiny_t5(), make_config())


@pytest.mark.parametrize("dtypes", [[torch.bfloat16], [torch.float16], [torch.bfloat16, torch.float32]], ids=str)
def test_an_adapter_cast_with_its_model_serves_what_it_saves(dtypes, tmp_path):
    base = tiny_t5()
    T5.model(fresh(base)).save_pretrained(tmp_path / "full")
    model = PeftModel.from_pretrained(fresh(base), tmp_path / "full")
    for dtype in dtypes:
        model.to(dtype)
        base.to(dtype)
    live = outputs_of(model, T5.batch())
    model.save_pretrained(tmp_path / "cast")
    assert torch.equal(outputs_of(PeftModel.from_pretrained(fresh(base), tmp_path / "cast"), T5.batch()), live)
    convert_to_prompt_tuning(model)
    assert torch.equal(outputs_of(model, T5.batch()), live)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_copy_of_a_model_that_was_trained_on_serves_the_trained_prompt(low_cpu_mem_usage, tmp_path):
    base = tiny_t5()
    T5.model(fresh(base)).save_pretrained(tmp_path / "full")
    model = PeftModel.from_pretrained(
        fresh(base), tmp_path / "full", is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
    )
    train(model, T5, steps=3)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.requires_grad_(False)
        assert torch.equal(outputs_of(twin, T5.batch()), outputs_of(model, T5.batch()))
        twin.save_pretrained(tmp_path / "twin")
        PeftModel.from_pretrained(fresh(base), tmp_path / "twin")


def test_weights_that_were_replaced_without_a_trace_are_still_saved_rightly(tmp_path):
    model = T5.model()
    model.save_pretrained(tmp_path / "full")
    loaded = PeftModel.from_pretrained(tiny_t5(), tmp_path / "full")
    loaded.prompt_encoder["default"].embedding.weight.data.mul_(2)
    loaded.save_pretrained(tmp_path / "changed")
    PeftModel.from_pretrained(tiny_t5(), tmp_path / "changed")


def test_a_network_with_a_random_buffer_of_its_own_is_saved_as_it_runs(own_names, tmp_path):
    from peft_residual import register_reparameterization

    class Features(torch.nn.Module):
        def __init__(self, width):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(width))
            self.register_buffer("features", torch.randn(width, width), persistent=False)
            self.register_buffer("order", torch.arange(width))

        def forward(self, prompt):
            return (prompt @ self.features * self.scale)[:, self.order]

    register_reparameterization("FEATURES")(lambda config: Features(config.token_dim))
    base = tiny_t5()
    config = make_config(encoder_reparameterization_type="FEATURES", prompt_tuning_init_seed=1)
    model = get_peft_model(fresh(base), config).eval()
    live = model.prompt_encoder["default"]()
    assert torch.equal(adapter_tensors(model)["prompt_embeddings"], live.detach())
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(fresh(base), tmp_path).prompt_encoder["default"](), live)
    model.to(torch.bfloat16)
    assert model.prompt_encoder["default"]().dtype == torch.float32


def test_a_saved_config_starts_a_new_adapter_that_is_trainable(tmp_path):
    T5.model(prompt_tuning_init_seed=1).save_pretrained(tmp_path)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="inference_mode=True"):
        model = get_peft_model(tiny_t5(), config)
    assert model.get_nb_trainable_parameters()[0] > 0
    assert model.prompt_encoder["default"].embedding.weight.abs().max() > 0


def test_a_default_device_does_not_reach_the_encoder():
    base = tiny_t5()
    with torch.device("meta"):
        encoder = ResidualPromptEncoder(make_config(token_dim=16), base.shared)
    assert {p.device.type for p in encoder.parameters()} == {"cpu"}


def test_heads_follow_when_a_deleted_adapter_makes_another_one_active(tmp_path):
    scenario = SCENARIOS["bert-sequence"]
    scenario.model().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(scenario.build(), tmp_path)
    model.add_adapter("new", make_config(task_type="SEQ_CLS"))
    model.set_adapter("new")
    with pytest.warns(UserWarning, match="was active"):
        model.delete_adapter("new")
    assert model.get_nb_trainable_parameters()[0] == 0


def test_an_encoders_output_without_the_prompt_is_not_used():
    model = T5.model()
    batch = T5.batch(labels=False) | {"decoder_input_ids": torch.ones(2, 1).long()}
    expected = outputs_of(model, batch)
    with torch.no_grad():
        bare = model.base_model.encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    with pytest.warns(UserWarning, match="`encoder_outputs` do not contain the prompt"):
        assert torch.equal(outputs_of(model, batch | {"encoder_outputs": bare}), expected)
    del batch["decoder_input_ids"]
    with pytest.warns(UserWarning, match="`encoder_outputs` do not contain the prompt"):
        assert torch.equal(model.generate(**batch, encoder_outputs=bare), model.generate(**batch))


# --- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task, name", [("bert-sequence", "classifier"), ("bert-question", "qa_outputs")])
def test_an_adapter_named_like_a_trained_head_is_refused(task, name):
    scenario = SCENARIOS[task]
    with pytest.raises(ValueError, match=f"`adapter_name`='{name}'.*another name"):
        get_peft_model(scenario.build(), make_config(task_type=scenario.task_type), adapter_name=name)


def test_masks_of_another_form_are_refused():
    model = SCENARIOS["llama"].model()
    ids = SCENARIOS["llama"].batch()["input_ids"]
    for mask in (torch.ones(2, 1, 7, 7), {"full_attention": torch.ones(2, 7)}):
        with pytest.raises(ValueError, match="`attention_mask` must be a tensor of two dimensions"):
            model(input_ids=ids, attention_mask=mask)


def test_unsafe_serialization_warns_and_is_safe(tmp_path):
    """Old training scripts pass it: an error at the first checkpoint would cost the run."""
    model = T5.model()
    with pytest.warns(UserWarning, match="`safe_serialization=False` is ignored"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.rglob("*.bin"))
    loaded = PeftModel.from_pretrained(tiny_t5(), tmp_path)
    assert torch.equal(loaded.prompt_encoder["default"](), model.eval().prompt_encoder["default"]())


def test_failed_load_leaves_no_adapter_behind(tmp_path):
    model = T5.model()
    model.save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"damaged.*[Ss]ave"):
        model.load_adapter(tmp_path, "second")
    with pytest.raises(ValueError, match=r"damaged.*[Ss]ave"):
        PeftModel.from_pretrained(tiny_t5(), tmp_path)
    assert list(model.peft_config) == ["default"]


def test_a_load_that_fails_late_leaves_no_adapter_behind(tmp_path):
    model = T5.model()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"encoder_activation": "relu"', '"encoder_activation": "tanh"'))
    expected = outputs_of(model, T5.batch())
    with pytest.raises(ValueError, match="other settings"):
        model.load_adapter(tmp_path, "second")
    assert list(model.peft_config) == list(model.prompt_encoder) == ["default"]
    assert torch.equal(outputs_of(model, T5.batch()), expected)


def test_pickled_weights_are_not_read(tmp_path):
    model = T5.model()
    model.save_pretrained(tmp_path)
    torch.save(adapter_tensors(model), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    for load in (
        lambda: PeftModel.from_pretrained(tiny_t5(), tmp_path),
        lambda: model.load_adapter(tmp_path, "second"),
    ):
        with pytest.raises(ValueError, match="pickle"):
            load()


@pytest.mark.parametrize(
    "other",
    [
        {"encoder_reparameterization_type": "MLP2"},
        {"encoder_hidden_size": 9},
        {"encoder_layer_norm": False},
        {"num_virtual_tokens": 5},
        {"encoder_shared": False},
    ],
)
def test_resuming_into_another_network_names_every_leaf(other, tmp_path):
    T5.model().save_pretrained(tmp_path)
    model = T5.model(**other)
    before = adapter_tensors(model)
    with pytest.raises(ValueError, match=r"expected .*, found .*") as error:
        model.load_adapter(tmp_path, "default", is_trainable=True)
    assert_same_tensors(adapter_tensors(model), before)
    if "num_virtual_tokens" in other:
        assert "embedding.weight: expected [5, 16], found [4, 16]" in str(error.value)


@pytest.mark.parametrize("other", [{"encoder_activation": "tanh"}, {"encoder_residual": False}])
def test_resuming_with_other_settings_of_the_same_shapes_is_refused(other, tmp_path):
    T5.model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="other settings"):
        T5.model(**other).load_adapter(tmp_path, "default", is_trainable=True)


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_checkpoint_without_network_is_refused(is_trainable, tmp_path):
    from safetensors.torch import save_file

    model = T5.model()
    model.save_pretrained(tmp_path)
    save_file({"prompt_embeddings": torch.zeros(4, 16)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"without the prompt embedding and its network.*PROMPT"):
        PeftModel.from_pretrained(tiny_t5(), tmp_path, is_trainable=is_trainable)


def test_unknown_checkpoint_version_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    T5.model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["residual_prompt_tuning.format_version"] += 1
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"version 2.*reads 1.*Upgrade"):
        PeftModel.from_pretrained(tiny_t5(), tmp_path)


def test_packed_rows_are_refused():
    model = SCENARIOS["llama"].model()
    ids = SCENARIOS["llama"].batch()["input_ids"]
    with pytest.raises(ValueError, match="packing"):
        model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]).expand(2, -1))


def test_loading_another_adapter_leaves_the_one_that_is_trained_trainable(tmp_path):
    scenario = SCENARIOS["bert-sequence"]
    scenario.model().save_pretrained(tmp_path)
    model = scenario.model()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("classifier" in name for name in trainable)
    model.load_adapter(tmp_path, adapter_name="other")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable


def test_a_load_that_fails_leaves_the_trained_adapter_trainable(tmp_path, monkeypatch):
    scenario = SCENARIOS["bert-sequence"]
    scenario.model().save_pretrained(tmp_path)
    model = scenario.model()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}

    def fail(*args, **kwargs):
        raise OSError("the disk is gone")

    monkeypatch.setattr("peft.peft_model.set_peft_model_state_dict", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        model.load_adapter(tmp_path, adapter_name="other")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable


# --- what a prompt changes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("merge_and_unload", "unload"))
def test_unloading_says_which_export_does_what_is_wanted(name):
    model = SCENARIOS["llama"].model()
    with pytest.raises(AttributeError, match=r"save_as_prompt_tuning.+save_as_vocabulary.+get_base_model"):
        getattr(model, name)()


@pytest.mark.parametrize("scenario, name", (("llama", "generate_batch"), ("t5", "get_encoder")))
def test_methods_of_the_base_model_that_would_run_without_the_prompt_are_refused(scenario, name):
    model = SCENARIOS[scenario].model()
    if not hasattr(model.base_model, name):
        pytest.skip(f"this transformers has no `{name}`")
    with pytest.raises(AttributeError, match=rf"`{name}` is not available with a prompt.+disable_adapter"):
        getattr(model, name)
    with model.disable_adapter():
        assert getattr(model, name) == getattr(model.base_model, name)
    assert model.can_generate() and not hasattr(model, "no_such_attribute")


def test_a_base_model_without_a_config_needs_no_sizes():
    """A module of the user's own has none; the width is that of its embeddings."""
    base = SCENARIOS["llama"].build()
    config = make_config(task_type="CAUSAL_LM")
    fill_in_sizes(config, SimpleNamespace(get_input_embeddings=base.get_input_embeddings))
    assert (config.token_dim, config.num_layers, config.num_attention_heads) == (WIDTH, 1, 1)


SMALL = {"vocab_size": 64}
OTHER_NAMES = {
    "DistilBertForSequenceClassification": {"dim": WIDTH, "hidden_dim": 32, "n_layers": 2, "n_heads": 2},
    "MptForCausalLM": {"d_model": WIDTH, "n_heads": 2, "n_layers": 2, "max_seq_len": 64},
    "MambaForCausalLM": {"hidden_size": WIDTH, "num_hidden_layers": 2, "state_size": 4},
    "XGLMForCausalLM": {"d_model": WIDTH, "ffn_dim": 32, "num_layers": 2, "attention_heads": 2},
    # The embeddings are narrower than the layers.
    "AlbertForSequenceClassification": {
        "hidden_size": 32,
        "embedding_size": WIDTH,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    },
}


@pytest.mark.parametrize("architecture", OTHER_NAMES)
def test_sizes_are_found_under_any_name(architecture, tmp_path):
    model_class = getattr(transformers, architecture)
    base = model_class(model_class.config_class(**SMALL, **OTHER_NAMES[architecture])).eval()
    task_type = "CAUSAL_LM" if "Causal" in architecture else "SEQ_CLS"
    model = get_peft_model(copy.deepcopy(base), make_config(task_type=task_type, num_virtual_tokens=3)).eval()
    assert model.active_peft_config.token_dim == WIDTH
    ids = torch.randint(5, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = model(**batch).logits
    model.save_pretrained(tmp_path / "adapter")
    save_as_prompt_tuning(model, tmp_path / "merged")
    for folder in ("adapter", "merged"):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / folder).eval()
        torch.testing.assert_close(loaded(**batch).logits, expected)
