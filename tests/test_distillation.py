"""`distillation_loss`: the divergence of one adapter's predictions from another's."""

import copy

import pytest
import torch
import zoo
from conftest import make_config, sharpen, tiny_gpt2, tiny_llama
from peft import get_peft_model

from peft_residual.training import disable_base_dropout, distillation_loss


def tiny_prophetnet():
    """It has no `logits_to_keep`, and computes all logits."""
    return zoo.build("prophetnet", "ProphetNetForCausalLM")


@pytest.fixture(params=[tiny_llama, tiny_gpt2])
def model(request):
    return with_two_prompts(sharpen(request.param(), 4.0))


def with_two_prompts(base):
    model = get_peft_model(base, make_config(task_type="CAUSAL_LM", num_virtual_tokens=6), adapter_name="long")
    model.add_adapter("short", make_config(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_dropout=0.3))
    with torch.no_grad():
        for name in ("long", "short"):
            model.prompt_encoder[name].embedding.weight.normal_(generator=torch.Generator().manual_seed(len(name)))
    model.set_adapter("short")
    return model.eval()


def make_inputs(side):
    """Two rows of 7 and 4 tokens, of which the last 3 and 2 are compared."""
    rows, labels = [[9, 33, 21, 14, 7, 40, 18], [52, 31, 12, 45]], [3, 2]
    ids, marks = torch.zeros(2, 7, dtype=torch.long), torch.full((2, 7), -100)
    for row, text, count, mark in zip(ids, rows, labels, marks, strict=True):
        start = 7 - len(text) if side == "left" else 0
        row[start : start + len(text)] = torch.tensor(text)
        mark[start + len(text) - count : start + len(text)] = torch.tensor(text[-count:])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": marks}


def by_hand(model, inputs, teacher, student):
    """The same, row by row and without padding."""

    def predictions(name, text, count):
        if name is None:
            with model.disable_adapter():
                logits = model(input_ids=text).logits
        else:
            model.set_adapter(name)
            logits = model(input_ids=text).logits
        return logits[0, -count - 1 : -1].log_softmax(-1)

    found = []
    for ids, mask, labels in zip(*inputs.values(), strict=True):
        text, count = ids[mask.bool()][None], int((labels != -100).sum())
        wanted, own = (predictions(name, text, count) for name in (teacher, student))
        found += (wanted.exp() * (wanted - own)).sum(-1).tolist()
    model.set_adapter("short")
    return sum(found) / len(found)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("teacher", "student"), [("long", "short"), (None, "short"), ("long", None)])
def test_it_is_that_of_each_row_alone(teacher, student, side, cached, model):
    inputs = make_inputs(side)
    with torch.no_grad():
        expected = by_hand(model, inputs, teacher, student)
        if cached:
            model.enable_prompt_cache()
        found = distillation_loss(model, inputs, teacher=teacher, student=student)
    assert found.item() == pytest.approx(expected, rel=1e-4) and expected > 0.01
    assert distillation_loss(model, inputs, teacher="short", student="short").item() == pytest.approx(0, abs=1e-5)


def test_a_model_that_computes_all_logits():
    model, inputs = with_two_prompts(tiny_prophetnet()), make_inputs("right")
    with torch.no_grad():
        expected = by_hand(model, inputs, "long", "short")
        found = distillation_loss(model, inputs, teacher="long", student="short")
    assert found.item() == pytest.approx(expected, rel=1e-4) and expected > 0.001


def test_training_brings_the_student_to_the_teacher_and_changes_nothing_else(model):
    disable_base_dropout(model)
    before = {name: copy.deepcopy(parameter.data) for name, parameter in model.named_parameters()}
    inputs = make_inputs("right")
    optimizer = torch.optim.Adam(model.prompt_encoder["short"].parameters(), lr=0.02)
    first = distillation_loss(model.eval(), inputs, teacher="long", student="short").item()
    model.train()
    for _ in range(100):
        loss = distillation_loss(model, inputs, teacher="long", student="short")
        assert model.training and model.active_adapter == "short"
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    last = distillation_loss(model.eval(), inputs, teacher="long", student="short").item()
    assert 0 < last < 0.9 * first
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}
    assert changed and all(".short." in name for name in changed)


def test_modules_keep_their_own_modes(model):
    model.train()
    model.base_model.eval()
    distillation_loss(model, make_inputs("right"), teacher="long", student="short")
    assert model.training and not model.base_model.training and model.prompt_encoder["short"].training


def test_rows_without_labels_are_refused(model):
    inputs = make_inputs("right")
    inputs["labels"][:] = -100
    inputs["labels"][0, 0] = 9  # nothing predicts it
    with pytest.raises(ValueError, match="no label behind the first token"):
        distillation_loss(model, inputs, teacher="long", student="short")
