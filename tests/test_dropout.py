"""The base model's dropout is switched off for training, the adapter's is not."""

import pytest
import torch
from conftest import make_config, tiny_bart, tiny_bert, tiny_gpt2, tiny_llama, tiny_opt, tiny_t5
from peft import get_peft_model

from peft_residual import disable_base_dropout


BASES = {
    "t5": ("SEQ_2_SEQ_LM", tiny_t5),
    "bart": ("SEQ_2_SEQ_LM", tiny_bart),
    "gpt2": ("CAUSAL_LM", tiny_gpt2),
    "llama": ("CAUSAL_LM", lambda: tiny_llama(attention_dropout=0.2)),
    "opt": ("CAUSAL_LM", tiny_opt),
    "bert": ("SEQ_CLS", lambda: tiny_bert("SequenceClassification")),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", BASES)
def test_two_passes_in_train_mode_are_identical_without_dropout_of_the_frozen_model(name, checkpointing):
    task_type, build = BASES[name]
    model = get_peft_model(build(), make_config(task_type=task_type)).train()
    if checkpointing:
        model.base_model.gradient_checkpointing_enable()
    ids = torch.randint(3, 64, (2, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if task_type == "SEQ_2_SEQ_LM":
        batch["labels"] = ids[:, :4].contiguous()
    dropping = [m for m in model.base_model.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
    assert not torch.equal(model(**batch).logits, model(**batch).logits), "dropout is on"
    with disable_base_dropout(model):
        assert model.training and model.base_model.training
        assert torch.equal(model(**batch).logits, model(**batch).logits)
    assert not torch.equal(model(**batch).logits, model(**batch).logits), "and on again"
    assert all(module.p > 0 for module in dropping)


def test_only_dropout_is_switched_off():
    """A module may have a number named `p` that is no probability."""
    model = get_peft_model(tiny_t5(), make_config())
    model.base_model.distance = torch.nn.PairwiseDistance(p=2.0)
    disable_base_dropout(model)
    assert model.base_model.distance.norm == 2.0
    model.base_model.distance.p = 2.0
    disable_base_dropout(model)
    assert model.base_model.distance.p == 2.0


def test_dropout_of_the_adapter_stays():
    model = get_peft_model(tiny_t5(), make_config(encoder_dropout=0.5)).train()
    disable_base_dropout(model)
    assert not torch.equal(model.prompt_encoder["default"](), model.prompt_encoder["default"]())
