"""The warning about small learning rates: one for each prompt, and the hook that gives it is not kept."""

import warnings

import pytest
import torch
from conftest import make_config, tiny_t5
from peft import PeftModel, get_peft_model

from peft_residual.peft_model import learning_rate


def step(model, rate):
    """One optimizer step; the messages that it warned with."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    return [str(warning.message) for warning in caught if "hardly moves it" in str(warning.message)]


@pytest.fixture(autouse=True)
def nothing_waits():
    learning_rate._waiting.clear()


@pytest.mark.parametrize(("rate", "count"), [(5e-5, 1), (0.3, 0)])
def test_the_first_step_with_a_small_rate_warns_and_the_hook_is_removed(rate, count):
    model = get_peft_model(tiny_t5(), make_config())
    assert learning_rate._hooks
    assert len(step(model, rate)) == count
    assert not learning_rate._hooks and not learning_rate._waiting
    assert step(model, rate) == []


def test_steps_of_other_models_do_not_count():
    model = get_peft_model(tiny_t5(), make_config())
    other = torch.nn.Linear(2, 2)
    assert step(other, 5e-5) == [] and learning_rate._hooks
    assert len(step(model, 5e-5)) == 1


def test_a_model_that_is_gone_keeps_no_hook():
    model = get_peft_model(tiny_t5(), make_config())
    del model.prompt_encoder["default"]
    step(torch.nn.Linear(2, 2), 0.1)
    assert not learning_rate._hooks


def test_an_adapter_for_inference_waits_until_it_is_trained(tmp_path):
    get_peft_model(tiny_t5(), make_config()).save_pretrained(tmp_path)
    learning_rate._waiting.clear()
    loaded = PeftModel.from_pretrained(tiny_t5(), tmp_path)
    assert not learning_rate._waiting
    loaded.set_requires_grad("default")
    assert len(step(loaded, 5e-5)) == 1
    resumed = PeftModel.from_pretrained(tiny_t5(), tmp_path, is_trainable=True)
    assert len(step(resumed, 5e-5)) == 1
