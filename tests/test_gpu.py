"""What can only be seen on a GPU; skipped without one."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from scenarios import SCENARIOS, fresh, outputs_of, train
from transformers import T5Config, T5ForConditionalGeneration

from peft_residual import (
    ResidualPromptTuningConfig,
    create_residual_optimizer,
    disable_base_dropout,
    get_prompt_tensor,
    save_as_prompt_tuning,
)


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"


@pytest.mark.parametrize("kind", ["MLP1", "MLP2", "LSTM", "TRANSFORMER"])
def test_what_a_gpu_trained_is_what_is_saved(kind, tmp_path):
    scenario = SCENARIOS["t5"]
    model = scenario.model(encoder_reparameterization_type=kind, encoder_dropout=0.2).to(DEVICE)
    batch = {name: tensor.to(DEVICE) for name, tensor in scenario.batch().items()}
    optimizer = create_residual_optimizer(model)
    model.train()(**batch).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "adapter")
    save_as_prompt_tuning(model, tmp_path / "merged")
    live = get_prompt_tensor(model)
    loaded = [PeftModel.from_pretrained(fresh(model.base_model), tmp_path / n) for n in ("adapter", "merged")]
    assert torch.equal(get_prompt_tensor(loaded[0]), live)
    assert torch.equal(outputs_of(loaded[0], batch), outputs_of(loaded[1], batch))
    projected = model.eval().prompt_encoder["default"].project().cpu()
    assert torch.allclose(projected, live.cpu(), rtol=1e-3, atol=1e-3), "the GPU computes what is saved"


def test_a_model_trained_on_a_gpu_goes_on_on_the_cpu(tmp_path):
    scenario = SCENARIOS["llama"]
    model = scenario.model().to(DEVICE)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(fresh(model.base_model).cpu(), tmp_path, is_trainable=True)
    assert torch.equal(get_prompt_tensor(again), get_prompt_tensor(model).cpu())
    train(again, scenario, steps=1)


def test_twenty_steps_at_the_size_of_t5_base_in_bfloat16_compiled():
    sizes = {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12}
    base = T5ForConditionalGeneration(T5Config(**sizes, feed_forward_proj="gated-gelu", decoder_start_token_id=0))
    model = get_peft_model(base.to(torch.bfloat16), ResidualPromptTuningConfig(task_type="SEQ_2_SEQ_LM")).to(DEVICE)
    disable_base_dropout(model.train())
    optimizer = create_residual_optimizer(model, learning_rate=0.01)
    ids = torch.randint(3, 30000, (8, 128), device=DEVICE)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:1, :8].repeat(8, 1)}
    compiled = torch.compile(model, fullgraph=True)
    losses = []
    for _ in range(20):
        loss = compiled(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
