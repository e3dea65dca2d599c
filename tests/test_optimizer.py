"""An optimizer with a learning rate for each part, and gradients that accumulate as in one big batch."""

import pytest
import torch
from conftest import make_config, tiny_bart, tiny_t5
from hosts import skip_before
from peft import PromptTuningConfig, get_peft_model
from scenarios import SCENARIOS
from trainers import Rows, arguments
from transformers import Adafactor, Trainer

from peft_residual import ResidualOptimizerFactory, create_residual_optimizer, disable_base_dropout


def names_of(model, optimizer):
    """Group name to the names of its parameters."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {group["name"]: sorted(names[id(p)] for p in group["params"]) for group in optimizer.param_groups}


def test_every_trainable_parameter_is_in_one_group_and_no_other_is():
    scenario = SCENARIOS["bert-sequence"]
    model = get_peft_model(scenario.build(), make_config(task_type="SEQ_CLS"))
    model.add_adapter("other", make_config(task_type="SEQ_CLS"))
    groups = names_of(model, create_residual_optimizer(model))
    encoder, head = "prompt_encoder.default.", "base_model.classifier.modules_to_save.default."
    assert groups == {
        "prompt": [f"{encoder}embedding.weight"],
        "encoder": [f"{encoder}network.down.weight", f"{encoder}network.up.weight"],
        "encoder_no_decay": [
            f"{encoder}network.{leaf}" for leaf in ("down.bias", "norm.bias", "norm.weight", "up.bias")
        ],
        "modules_to_save": [f"{head}weight"],
        "modules_to_save_no_decay": [f"{head}bias"],
    }
    trainable = sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert sorted(name for members in groups.values() for name in members) == trainable


def test_per_token_biases_and_norms_do_not_decay():
    model = get_peft_model(tiny_t5(), make_config(encoder_shared=False))
    groups = names_of(model, create_residual_optimizer(model))
    assert [name.split("network.")[1] for name in groups["encoder"]] == ["down.weight", "up.weight"]


def test_rates_and_decays_reach_their_groups():
    model = SCENARIOS["bert-sequence"].model()
    optimizer = create_residual_optimizer(
        model,
        learning_rate=0.5,
        encoder_learning_rate=0.01,
        modules_to_save_learning_rate=0.002,
        weight_decay=0.1,
        encoder_weight_decay=0.2,
        betas=(0.8, 0.9),
    )
    found = {g["name"]: (g["lr"], g["weight_decay"], g["betas"]) for g in optimizer.param_groups}
    assert found["prompt"] == (0.5, 0.1, (0.8, 0.9))
    assert found["encoder"] == (0.01, 0.2, (0.8, 0.9))
    assert found["encoder_no_decay"][:2] == (0.01, 0.0)
    assert found["modules_to_save"][:2] == (0.002, 0.1)
    same = create_residual_optimizer(model, learning_rate=0.5)
    assert {g["name"]: g["lr"] for g in same.param_groups}["encoder"] == 0.5


@pytest.mark.parametrize(
    "fields, prompt, network",
    [
        ({}, 0.3, 0.3),
        ({"encoder_reparameterization_type": "SUPERPOS"}, 0.01, None),
        ({"encoder_scale": None}, 0.15, 0.004),
        ({"encoder_scale": 2.0}, 0.15, 0.004),
    ],
)
def test_without_rates_the_adapter_determines_them(fields, prompt, network):
    model = get_peft_model(tiny_t5(), make_config(**fields))
    rates = {group["name"]: group["lr"] for group in create_residual_optimizer(model).param_groups}
    assert rates["prompt"] == prompt and rates.get("encoder") == network
    if network is not None:  # the proportion stays
        rates = {g["name"]: g["lr"] for g in create_residual_optimizer(model, learning_rate=2 * prompt).param_groups}
        assert rates["encoder"] == pytest.approx(2 * network)


@pytest.mark.parametrize(
    "optimizer_cls, kwargs",
    [(torch.optim.AdamW, {}), (Adafactor, {"relative_step": False, "scale_parameter": False})],
)
def test_trainer_takes_the_factory_and_schedules_each_group(optimizer_cls, kwargs, tmp_path):
    settings = {"optimizer_cls": optimizer_cls, "learning_rate": 0.2, "encoder_learning_rate": 0.01, **kwargs}
    trainer = Trainer(
        get_peft_model(tiny_t5(), make_config()),
        arguments(tmp_path, lr_scheduler_type="linear", warmup_steps=0, max_steps=4, save_strategy="no"),
        train_dataset=Rows(SCENARIOS["t5"]),
        optimizer_cls_and_kwargs=(ResidualOptimizerFactory, settings),
    )
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.create_optimizer()
    assert {g["name"]: g["lr"] for g in trainer.optimizer.param_groups}["encoder"] == 0.01
    trainer.train()
    assert all(not torch.equal(p, start[n]) for n, p in trainer.model.named_parameters() if p.requires_grad)
    assert all(group["lr"] == 0 for group in trainer.optimizer.param_groups)


@pytest.mark.parametrize(
    "setting", ["learning_rate", "encoder_learning_rate", "modules_to_save_learning_rate", "weight_decay"]
)
def test_rates_that_cannot_be_right_are_refused(setting):
    with pytest.raises(ValueError, match="got -1"):
        create_residual_optimizer(SCENARIOS["t5"].model(), **{setting: -1})


def test_a_model_without_a_trainable_residual_adapter_is_refused():
    plain = get_peft_model(tiny_t5(), PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match=r"no residual adapter.*is_trainable=True"):
        create_residual_optimizer(plain)


# --- loss scale -----------------------------------------------------------------------------------------------------


@skip_before((5, 0), "the Trainer does not tell T5 and BART the number of target tokens")
@pytest.mark.parametrize("build", [tiny_t5, tiny_bart])
def test_accumulated_gradients_are_those_of_one_big_batch(build, tmp_path):
    """Rows of different label lengths: a mean of means would not do."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (1, 5, 2, 7, 3, 1, 6, 4):
        ids = torch.randint(3, 64, (6,), generator=generator)
        labels = torch.full((7,), -100)
        labels[:length] = torch.randint(3, 64, (length,), generator=generator)
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})

    gradients = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        model = get_peft_model(build(), make_config(prompt_tuning_init_seed=0))
        disable_base_dropout(model)
        settings = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        settings |= {"max_steps": 1, "save_strategy": "no", "max_grad_norm": 0.0}
        trainer = Trainer(model, arguments(tmp_path, **settings), train_dataset=rows)
        seen = []
        parameter = model.prompt_encoder["default"].embedding.weight
        parameter.register_post_accumulate_grad_hook(lambda p, seen=seen: seen.append(p.grad.clone()))
        trainer.train()
        gradients.append(seen[-1])
    relative = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert relative <= 1e-5
