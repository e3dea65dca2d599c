"""The check before training finds what spoils a soft prompt silently, and is silent when all is well."""

import warnings
from types import SimpleNamespace

import pytest
import torch
import trainers
from conftest import WIDTH, make_config, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from peft import PromptTuningConfig, get_peft_model
from scenarios import SCENARIOS
from trainers import Rows, arguments
from transformers import Trainer

from peft_residual import (
    ResidualOptimizerFactory,
    TrainingSetupCallback,
    check_training_setup,
    create_residual_optimizer,
    disable_base_dropout,
    register_reparameterization,
)


def make_model(base=None, **config):
    """A model of which nothing is to be found."""
    if config.get("encoder_reparameterization_type") not in ("SUPERPOS", "NONE"):  # which have no norm to switch off
        config["encoder_layer_norm"] = False
    model = get_peft_model(tiny_t5() if base is None else base, make_config(**config))
    disable_base_dropout(model)
    return model


def make_args(**values):
    return SimpleNamespace(**{"learning_rate": 0.3, **values})


def found(model, args=None, processing_class=None, **kwargs):
    """Severity and subject of every finding; each names a remedy."""
    findings = check_training_setup(model, make_args() if args is None else args, processing_class, **kwargs)
    assert all(finding.remedy.endswith(".") and finding.remedy in str(finding) for finding in findings)
    return [(finding.severity, finding.subject) for finding in findings]


def test_nothing_is_found_where_all_is_well(tokenizer):
    assert found(make_model(), processing_class=tokenizer, max_source_length=100) == []


def test_nothing_of_the_model_changes(tmp_path):
    model = make_model(base=tiny_t5(), encoder_dropout=0.5)
    model.train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = torch.get_rng_state()
    check_training_setup(model, arguments(tmp_path))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.training and torch.equal(torch.get_rng_state(), before)


# --- learning rates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "severities"),
    [(0.0, ["error"]), (-1.0, ["error"]), (5e-5, ["warning"]), (1e-3, []), (0.3, []), (10.0, []), (30.0, ["warning"])],
)
def test_learning_rates_that_do_not_suit_a_prompt(rate, severities):
    assert found(make_model(), make_args(learning_rate=rate)) == [(s, "learning_rate") for s in severities]


def test_the_optimizer_counts_and_not_the_arguments():
    model = make_model()
    optimizer = create_residual_optimizer(model, learning_rate=0.3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step == 0 else 1.0)  # warm-up
    assert scheduler.get_last_lr()[0] == 0
    assert found(model, make_args(learning_rate=5e-5), optimizer=optimizer) == []


def test_a_head_that_is_trained_at_the_rate_of_a_prompt():
    model = make_model(tiny_bert("SequenceClassification"), task_type="SEQ_CLS")
    assert found(model) == [("warning", "modules_to_save")]
    assert found(model, optimizer=create_residual_optimizer(model)) == []


# --- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [tiny_t5, lambda: tiny_llama(attention_dropout=0.2)])
def test_dropout_of_the_frozen_model(base):
    task_type = "SEQ_2_SEQ_LM" if base is tiny_t5 else "CAUSAL_LM"
    model = get_peft_model(base(), make_config(encoder_layer_norm=False, task_type=task_type))
    assert found(model) == [("warning", "dropout")]
    disable_base_dropout(model)
    assert found(model) == []


@pytest.mark.parametrize("factor", [1e-2, 1e2])
def test_a_prompt_far_from_the_vocabulary(factor):
    model = make_model(encoder_reparameterization_type="NONE")
    assert found(model) == []
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.mul_(factor)
    assert found(model) == [("warning", "prompt norm")]


def test_the_second_half_of_a_prompt_that_only_the_first_half_is_used_of():
    model = make_model(num_virtual_tokens=2, num_transformer_submodules=2)
    (finding,) = check_training_setup(model, make_args())
    assert finding.severity == "warning" and "Rows [2, 3] " in finding.message


def test_weights_that_get_no_gradient(own_names):
    @register_reparameterization("UNUSED")
    def unused(config):
        network = torch.nn.Linear(WIDTH, WIDTH)
        network.extra = torch.nn.Linear(1, 1)
        return network

    (finding,) = check_training_setup(make_model(encoder_reparameterization_type="UNUSED"), make_args())
    assert "network.extra.weight, network.extra.bias" in finding.message


@pytest.mark.parametrize("kind", ["MLP1", "MLP2", "LSTM1", "LSTM2", "LSTM", "TRANSFORMER", "SUPERPOS", "NONE"])
def test_all_built_in_networks_pass(kind):
    args = make_args(learning_rate=0.01 if kind == "SUPERPOS" else 0.3)
    assert found(make_model(encoder_reparameterization_type=kind), args) == []


def test_a_network_that_starts_at_zero_passes():
    model = make_model(encoder_zero_init=True)
    assert found(model) == []


def test_a_frozen_adapter():
    model = make_model()
    model.prompt_encoder["default"].requires_grad_(False)
    assert found(model) == [("error", "model")]


def test_sharded_weights_are_not_read():
    model = make_model()
    model.prompt_encoder["default"].embedding.weight.ds_id = 0  # as DeepSpeed ZeRO-3 marks its parameters
    assert found(model) == [("info", "model")]


def test_a_model_without_a_residual_adapter_is_refused():
    plain = get_peft_model(tiny_t5(), PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3))
    for model in (plain, torch.nn.DataParallel(make_model())):
        with pytest.raises(ValueError, match=f"{type(model).__name__}.*no active residual adapter"):
            check_training_setup(model, make_args())


# --- tokenizer, arguments, lengths ----------------------------------------------------------------------------------


def test_padding(tokenizer):
    causal = make_model(tiny_gpt2(), task_type="CAUSAL_LM")
    right = SimpleNamespace(padding_side="right", pad_token_id=0)
    left = SimpleNamespace(padding_side="left", pad_token_id=0)
    generates = make_args(predict_with_generate=True)
    assert found(causal, generates, right) == [("warning", "padding_side")]
    assert found(causal, generates, left) == found(causal, make_args(), right) == []
    assert found(make_model(), generates, right) == []
    assert found(make_model(), generates, left) == [("warning", "padding_side")]
    assert found(causal, make_args(), SimpleNamespace(pad_token_id=None)) == [("error", "tokenizer")]
    assert found(causal, generates, SimpleNamespace(tokenizer=right)) == [("warning", "padding_side")], "a processor's"


@pytest.mark.parametrize("name", ["bf16_full_eval", "fp16_full_eval"])
def test_evaluation_that_casts_the_prompt(name):
    assert found(make_model(), make_args(**{name: True})) == [("warning", name)]
    assert found(make_model(), make_args(**{name: False})) == []


@pytest.mark.parametrize("name", ["packing", "padding_free"])
def test_rows_that_pack_several_texts(name):
    assert found(make_model(), make_args(**{name: True})) == [("error", name)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_label_smoothing_is_found_where_the_trainer_cannot_do_it(name, tmp_path):
    """The Trainer itself fails on each of these."""
    trainer = trainers.make_trainer(tmp_path, name, label_smoothing_factor=0.1)
    assert ("error", "label_smoothing_factor") in found(trainer.model, trainer.args)
    if "labels" in SCENARIOS[name].batch():
        with pytest.raises((AttributeError, RuntimeError, ValueError, IndexError)):
            trainer.train()


def test_texts_that_leave_no_room_for_the_prompt(tokenizer):
    model = make_model(tiny_gpt2(), task_type="CAUSAL_LM")  # 64 positions, 4 for the prompt
    assert found(model, max_source_length=60) == []
    (finding,) = check_training_setup(model, make_args(), max_source_length=61)
    assert finding.severity == "error" and finding.remedy == "Truncate texts to 60 tokens."
    assert found(model, make_args(max_length=61)) == [("error", "max_source_length")]
    assert tokenizer.model_max_length == 64
    assert found(model, processing_class=tokenizer) == [("warning", "max_source_length")]
    assert found(make_model(), max_source_length=10_000) == [], "T5's positions are relative"


# --- in the Trainer -------------------------------------------------------------------------------------------------


def make_trainer(folder, factory=None, callback=None, **overrides):
    model = make_model(prompt_tuning_init_seed=0)
    settings = {"max_steps": 2, "save_strategy": "no", **overrides}
    return Trainer(
        model,
        arguments(folder, **settings),
        train_dataset=Rows(SCENARIOS["t5"]),
        callbacks=[callback] if callback else None,
        optimizer_cls_and_kwargs=(ResidualOptimizerFactory, factory) if factory else None,
    )


@pytest.mark.parametrize(("rate", "severity"), [(0.0, "error"), (1e-4, "warning"), (0.3, "warning"), (0.01, None)])
def test_rates_of_weights_for_the_vocabulary_are_held_against_their_own_paper(rate, severity):
    model = make_model(encoder_reparameterization_type="SUPERPOS")
    findings = [f for f in check_training_setup(model, make_args(learning_rate=rate)) if f.subject == "learning_rate"]
    assert [f.severity for f in findings] == ([severity] if severity else [])
    assert all("SuperPos-Prompt (PMLR 262) uses 0.01" in f.remedy for f in findings)


def test_the_callback_warns_once_of_what_the_trainer_really_does(tmp_path):
    callback = TrainingSetupCallback()
    trainer = make_trainer(tmp_path, callback=callback, learning_rate=20.0)
    with pytest.warns(UserWarning, match="warning: learning_rate: .* 20 is above 10"):
        trainer.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer.train()
        again = TrainingSetupCallback()
        make_trainer(tmp_path, {"learning_rate": 0.3}, again, learning_rate=20.0).train()
    assert again.findings == []


def test_the_callback_stops_before_the_first_step_on_an_error(tmp_path):
    trainer = make_trainer(tmp_path, callback=TrainingSetupCallback())
    prompt = trainer.model.prompt_encoder["default"].embedding.weight
    start = prompt.detach().clone()
    trainer.args.packing = True
    with pytest.raises(ValueError, match=r"error: packing: .*Set `packing=False`"):
        trainer.train()
    assert torch.equal(prompt, start)


# --- without the check ----------------------------------------------------------------------------------------------


def test_the_trainers_default_learning_rate_is_warned_of_without_any_callback(tmp_path):
    trainer = make_trainer(tmp_path, learning_rate=5e-5, warmup_steps=1)
    with pytest.warns(UserWarning, match="learning rate 5e-05, which hardly moves it") as seen:
        trainer.train()
    assert sum("hardly moves" in str(warning.message) for warning in seen) == 1


def test_a_fitting_learning_rate_is_not_warned_of(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make_trainer(tmp_path, learning_rate=0.3, warmup_steps=1).train()
        model, other = make_model(), torch.nn.Linear(2, 2)
        torch.optim.AdamW(other.parameters(), lr=5e-5).step()  # another model's rate is none of our business
        create_residual_optimizer(model).step()
