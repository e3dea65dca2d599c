"""Logits computed only where labels are give the same loss and gradients as all logits."""

import pytest
import torch
from conftest import make_config, tiny_gpt2, tiny_llama
from hosts import TRANSFORMERS
from peft import get_peft_model
from trainers import make_trainer

from peft_residual import disable_base_dropout


P, B, L = 6, 3, 8


def batch(side):
    """Rows with labels on two tokens; padding on one side moves them."""
    ids = torch.randint(5, 64, (B, L), generator=torch.Generator().manual_seed(1))
    mask, labels = torch.ones_like(ids), torch.full_like(ids, -100)
    for row in range(B):
        padding = slice(0, row) if side == "left" else slice(L - row, L)
        mask[row, padding] = 0
        end = L if side == "left" else L - row
        labels[row, end - 2 : end] = ids[row, end - 2 : end]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def run(model, inputs, share, at_labels):
    model.share_prompt(share)
    model.compute_logits_at_labels(at_labels)
    model.zero_grad()
    outputs = model(**inputs)
    outputs.loss.backward()
    return outputs, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("build", (tiny_llama, tiny_gpt2))
@pytest.mark.parametrize("side, columns", (("left", 2), ("right", 4)))
@pytest.mark.parametrize("share", (False, True))
@pytest.mark.parametrize("items", (None, 7))
def test_loss_and_gradients_are_the_same(build, side, columns, share, items):
    if build is tiny_gpt2 and TRANSFORMERS < (4, 53):
        pytest.skip("GPT-2 of this transformers cannot run in float64")
    model = get_peft_model(build().double(), make_config(task_type="CAUSAL_LM", num_virtual_tokens=P))
    disable_base_dropout(model)
    inputs = batch(side)
    if items is not None:
        inputs["num_items_in_batch"] = torch.tensor(items)
    expected, expected_gradients = run(model.train(), inputs, False, False)
    found, gradients = run(model, inputs, share, True)
    assert expected.logits.shape == (B, P + L, 64)
    assert found.logits.shape == (B, columns, 64)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)
    assert gradients.keys() == expected_gradients.keys() and gradients
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name


@pytest.mark.parametrize("share", (False, True))
def test_without_labels_and_on_request_all_logits_are_there(share):
    model = get_peft_model(tiny_llama(), make_config(task_type="CAUSAL_LM", num_virtual_tokens=P)).eval()
    inputs = batch("left")
    model.share_prompt(share)
    model.compute_logits_at_labels()
    labels = inputs.pop("labels")
    assert model(**inputs).logits.shape == (B, P + L, 64)
    assert model(**inputs, labels=torch.full_like(labels, -100)).logits.shape == (B, P + L, 64)
    model.compute_logits_at_labels(False)
    assert model(**inputs, labels=labels).logits.shape == (B, P + L, 64)


def test_rows_with_and_without_a_prompt_are_right_too():
    model = get_peft_model(tiny_llama(), make_config(task_type="CAUSAL_LM", num_virtual_tokens=P)).eval()
    names = ["default", "__base__", "default"]
    expected = model(**batch("left"), adapter_names=names)
    model.compute_logits_at_labels()
    found = model(**batch("left"), adapter_names=names)
    assert found.logits.shape[1] < expected.logits.shape[1]
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)


def test_a_model_with_a_loss_of_its_own_is_refused():
    base = tiny_llama()
    base.loss_function = lambda logits, labels, **kwargs: logits.sum()
    model = get_peft_model(base, make_config(task_type="CAUSAL_LM", num_virtual_tokens=P))
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot compute logits at labels only"):
        model.compute_logits_at_labels()


def test_a_trainer_learns_the_same(tmp_path):
    losses = []
    for at_labels in (False, True):
        trainer = make_trainer(tmp_path / str(at_labels), "llama")
        trainer.model.compute_logits_at_labels(at_labels)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
