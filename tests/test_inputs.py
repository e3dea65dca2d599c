"""A row of a left-padded batch gets from a causal model what it gets alone."""

import pytest
import torch
from conftest import make_config, tiny_gpt2, tiny_llama, tiny_opt
from peft import PromptTuningConfig, get_peft_model
from scenarios import SCENARIOS, relative_difference


P = 4
LENGTHS = (3, 9, 6)


BASES = {"llama": tiny_llama, "gpt2": tiny_gpt2, "opt": tiny_opt}


@pytest.fixture(params=BASES)
def model(request):
    return get_peft_model(BASES[request.param](), make_config(task_type="CAUSAL_LM")).eval()


def rows():
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 64, (1, length), generator=generator) for length in LENGTHS]


def padded_batch():
    ids, mask = torch.zeros(2, len(LENGTHS), max(LENGTHS)).long()
    for i, row in enumerate(rows()):
        ids[i, -row.shape[1] :] = row
        mask[i, -row.shape[1] :] = 1
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def test_logits_are_those_of_the_row_alone(model):
    logits = model(**padded_batch()).logits
    for i, row in enumerate(rows()):
        alone = model(input_ids=row, attention_mask=torch.ones_like(row)).logits
        assert relative_difference(logits[i, -row.shape[1] :], alone[0, P:]) <= 1e-5


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}], ids=str
)
def test_generations_are_those_of_the_row_alone(model, options):
    model.base_model.generation_config.eos_token_id = None
    batches = [padded_batch()]
    if "prompt_lookup_num_tokens" in options:  # transformers takes one row at a time there
        batches = [{name: value[i : i + 1] for name, value in padded_batch().items()} for i in range(len(LENGTHS))]
    together = torch.cat([model.generate(**batch, max_new_tokens=12, **options) for batch in batches])
    for i, row in enumerate(rows()):
        alone = model.generate(row, max_new_tokens=12, **{k: v for k, v in options.items() if k == "num_beams"})
        assert torch.equal(together[i, max(LENGTHS) :], alone[0, row.shape[1] :])


def test_loss_and_gradient_do_not_depend_on_padding(model):
    row = rows()[0]
    gradients = []
    for padding in (0, 5):
        ids = torch.nn.functional.pad(row, (padding, 0))
        mask = torch.nn.functional.pad(torch.ones_like(row), (padding, 0))
        labels = ids.masked_fill(mask == 0, -100)
        model.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        gradients.append(model.prompt_encoder["default"].embedding.weight.grad.clone())
    assert relative_difference(gradients[1], gradients[0]) <= 1e-4


@torch.no_grad()
def test_plain_prompt_tuning_stays_as_peft_has_it():
    model = get_peft_model(tiny_llama(), make_config(task_type="CAUSAL_LM")).eval()
    model.add_adapter("plain", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
    model.set_adapter("plain")
    stock = get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)).eval()
    state = {k.replace("plain", "default"): v for k, v in model.state_dict().items() if "encoder.default" not in k}
    stock.load_state_dict({**state, "word_embeddings.weight": model.word_embeddings.weight})
    assert torch.equal(model(**padded_batch()).logits, stock(**padded_batch()).logits)
    assert torch.equal(model.generate(**padded_batch()), stock.generate(**padded_batch()))


def test_positions_given_by_the_user_are_moved_behind_the_prompt():
    model = SCENARIOS["llama"].model()
    batch = padded_batch()
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(**batch).logits[:, P:]
        logits = model(**batch, position_ids=positions).logits[:, P:]
        moved = model(**batch, position_ids=positions * 2).logits[:, P:]
    attended = batch["attention_mask"].bool()
    assert relative_difference(logits[attended], expected[attended]) <= 1e-6
    assert relative_difference(moved[attended], expected[attended]) > 1e-2
