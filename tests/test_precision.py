"""Bases in other types, quantized, under autocast, with checkpointing, compiled: train, save and reload exactly."""

import math

import pytest
import torch
from conftest import make_config, tiny_llama, tiny_t5
from peft import PeftModel, get_peft_model
from scenarios import SCENARIOS, outputs_of
from trainers import Rows, arguments
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BitsAndBytesConfig, QuantoConfig, Trainer

from peft_residual import disable_base_dropout, get_prompt_tensor, save_as_prompt_tuning


WIDE = {
    "t5": (AutoModelForSeq2SeqLM, lambda: tiny_t5(d_model=64, d_kv=32, d_ff=64)),
    "llama": (AutoModelForCausalLM, lambda: tiny_llama(hidden_size=64, intermediate_size=64)),
}
BASES = {
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "bitsandbytes-8bit": {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
    "bitsandbytes-4bit": {
        "quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    },
    "quanto-int8": {"quantization_config": QuantoConfig(weights="int8"), "dtype": torch.float32},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each model of `WIDE`, saved in float32."""
    found = {}
    for name, (_, build) in WIDE.items():
        torch.manual_seed(0)
        found[name] = tmp_path_factory.mktemp(name)
        build().save_pretrained(found[name])
    return found


def weights_of(base):
    """A copy of every weight, unpacked where quanto packed it."""
    return {
        n: (p.dequantize() if type(p).__module__.startswith("optimum") else p).detach().clone()
        for n, p in base.named_parameters()
    }


def trained(model, batch, steps=2):
    """A few steps of AdamW; the loss of each."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    model.train()
    disable_base_dropout(model)
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", WIDE)
def test_a_base_in_another_type_trains_saves_and_reloads_exactly(name, base, folders, tmp_path):
    auto_class, _ = WIDE[name]
    scenario = SCENARIOS[name]

    def load():
        return auto_class.from_pretrained(folders[name], **BASES[base])

    model = get_peft_model(load(), make_config(task_type=scenario.task_type, prompt_tuning_init_seed=0))
    frozen = weights_of(model.base_model)
    start = get_prompt_tensor(model)
    losses = trained(model, scenario.batch())
    assert all(math.isfinite(loss) for loss in losses) and losses[0] != losses[1]
    assert not torch.equal(get_prompt_tensor(model), start)
    assert all(torch.equal(p, frozen[n]) for n, p in weights_of(model.base_model).items())
    assert {p.dtype for p in model.prompt_encoder.parameters()} == {torch.float32}

    model.save_pretrained(tmp_path / "adapter")
    save_as_prompt_tuning(model, tmp_path / "merged")
    live = outputs_of(model, scenario.batch())
    for folder in ("adapter", "merged"):
        loaded = PeftModel.from_pretrained(load(), tmp_path / folder)
        assert torch.equal(outputs_of(loaded, scenario.batch()), live), folder
    again = PeftModel.from_pretrained(load(), tmp_path / "adapter", is_trainable=True)
    assert torch.equal(get_prompt_tensor(again), get_prompt_tensor(model))
    trained(again, scenario.batch(), steps=1)


@pytest.mark.parametrize("name", ["t5", "llama", "bert-sequence"])
def test_trainer_under_bfloat16_autocast_saves_what_it_trained(name, tmp_path):
    scenario = SCENARIOS[name]
    model = get_peft_model(scenario.build(), make_config(task_type=scenario.task_type, encoder_dropout=0.2))
    settings = {"bf16": True, "max_steps": 3, "save_steps": 3}
    Trainer(model, arguments(tmp_path, **settings), train_dataset=Rows(scenario)).train()
    loaded = PeftModel.from_pretrained(scenario.build(), tmp_path / "checkpoint-3")
    assert torch.equal(get_prompt_tensor(loaded), get_prompt_tensor(model.eval()))
    assert get_prompt_tensor(loaded).dtype == torch.float32


# --- checkpointing and compilation ----------------------------------------------------------------------------------


def gradients(model, batch, run=None):
    model.zero_grad()
    loss = (model if run is None else run)(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_close(left, right):
    assert torch.allclose(left[0], right[0], rtol=1e-5)
    assert left[1].keys() == right[1].keys()
    for name, gradient in left[1].items():
        assert (gradient - right[1][name]).norm() <= 1e-4 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["t5", "gpt2", "llama", "bert-sequence", "bert-token"])
def test_gradient_checkpointing_gives_the_same_gradients(name, reentrant):
    model = SCENARIOS[name].model().train()
    disable_base_dropout(model)
    plain = gradients(model, SCENARIOS[name].batch())
    model.base_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ran = []
    layer = next(m for m in model.base_model.modules() if getattr(m, "gradient_checkpointing", False))
    layer.register_forward_hook(lambda *_: ran.append(True))
    assert_close(plain, gradients(model, SCENARIOS[name].batch()))
    assert len(ran) > 0


@pytest.mark.parametrize(
    "name, kind",
    [
        ("t5", "MLP1"),
        ("llama", "TRANSFORMER"),
        ("llama", "SUPERPOS"),
        ("gpt2", "NONE"),
        ("bert-sequence", "MLP2"),
        ("bert-token", "MLP1"),
        ("bert-question", "MLP1"),
    ],
)
def test_a_training_step_compiles_to_one_graph(name, kind):
    model = SCENARIOS[name].model(encoder_reparameterization_type=kind).train()
    disable_base_dropout(model)
    if name == "gpt2":
        model.base_model.loss_type = "ForCausalLM"  # else transformers warns, which breaks its own graph
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(gradients(model, SCENARIOS[name].batch()), gradients(model, SCENARIOS[name].batch(), compiled))
