"""A row of a left-padded batch gets from a causal model what it gets alone."""

import pytest
import torch
from conftest import VOCAB_SIZE, make_config, tiny_gpt2, tiny_llama, tiny_opt
from hosts import TRANSFORMERS
from peft import PromptTuningConfig, get_peft_model
from scenarios import SCENARIOS, outputs_of, relative_difference
from transformers import (
    LongformerConfig,
    LongformerForSequenceClassification,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    RobertaConfig,
    RobertaForCausalLM,
)

from peft_residual.compat import assists_from_embeddings


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
    if "prompt_lookup_num_tokens" in options and not assists_from_embeddings():
        pytest.skip("this transformers cannot start prompt lookup from embeddings")
    model.base_model.generation_config.eos_token_id = VOCAB_SIZE  # no token; older prompt lookups fail with None
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


# --- models with an encoder


@pytest.mark.parametrize("name", ["t5", "bert-sequence", "bert-token", "bert-question", "bert-features"])
def test_padding_before_the_text_changes_nothing_in_models_with_relative_positions(name):
    model = SCENARIOS[name].model()
    embeddings = getattr(getattr(model.base_model, "bert", model.base_model), "embeddings", None)
    if hasattr(embeddings, "position_embeddings"):
        embeddings.position_embeddings.weight.data.zero_()  # what is left does not depend on absolute positions
    right = SCENARIOS[name].batch(labels=name == "t5")
    left = {key: value.clone() for key, value in right.items()}
    for key in ("input_ids", "attention_mask"):
        left[key][1] = right[key][1].roll(2)
    outputs = [outputs_of(model, batch) for batch in (right, left)]
    if name in ("bert-token", "bert-question", "bert-features"):
        outputs = [outputs[0][1, :-2], outputs[1][1, 2:]]
    assert relative_difference(*outputs) <= 1e-5


def test_answer_positions_and_token_labels_follow_the_padding():
    for name in ("bert-question", "bert-token"):
        model, right = SCENARIOS[name].model(), SCENARIOS[name].batch()
        model.base_model.bert.embeddings.position_embeddings.weight.data.zero_()
        right = {key: value[1:] for key, value in right.items()}
        if name == "bert-question":
            right |= {"start_positions": torch.tensor([1]), "end_positions": torch.tensor([3])}
            left = {key: value.roll(2) if value.ndim == 2 else value + 2 for key, value in right.items()}
        else:
            right["labels"][0, -2:] = -100
            left = {key: value.roll(2) for key, value in right.items()}
        torch.testing.assert_close(model(**left).loss, model(**right).loss)


def test_a_bidirectional_architecture_with_a_causal_head_needs_padding_after_the_text():
    base = RobertaForCausalLM(RobertaConfig(**TINY, is_decoder=True))
    model = get_peft_model(base, make_config(task_type="CAUSAL_LM")).eval()
    with pytest.raises(ValueError, match=r"'roberta' numbers positions .* `tokenizer.padding_side = 'right'`"):
        model(**padded_batch())


TINY = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize("given", [False, True])
def test_global_attention_gets_columns_for_the_prompt(given):
    config = LongformerConfig(**TINY, attention_window=4, max_position_embeddings=64)
    model = get_peft_model(LongformerForSequenceClassification(config), make_config(task_type="SEQ_CLS")).eval()
    ids = torch.randint(3, 64, (2, 6))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if given:
        inputs["global_attention_mask"] = torch.zeros_like(ids)
    prompted = model.prepend_prompt(model.batch_prompt(2), inputs)["global_attention_mask"]
    assert prompted.shape == (2, P + 6) and prompted.sum(dim=1).tolist() == [0 if given else 1] * 2
    assert model(**inputs).logits.shape == (2, 2)


def test_token_types_reach_a_decoder_that_has_them():
    model = get_peft_model(tiny_gpt2(), make_config(task_type="CAUSAL_LM")).eval()
    ids = torch.randint(3, 64, (1, 5))
    types = torch.tensor([[7, 7, 9, 9, 9]])
    prompt = model.prompt_encoder["default"]().detach()
    embeds = torch.cat([prompt[None], model.word_embeddings(ids)], dim=1)
    with torch.no_grad():
        expected = model.base_model(
            inputs_embeds=embeds, token_type_ids=torch.cat([torch.zeros(1, P).long(), types], dim=1)
        ).logits
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=types).logits
    torch.testing.assert_close(found, expected)
    llama = get_peft_model(tiny_llama(), make_config(task_type="CAUSAL_LM"))
    with pytest.warns(UserWarning, match="llama does not use `token_type_ids`"):
        llama(input_ids=ids, token_type_ids=types)


def test_images_are_refused_where_their_positions_come_from_ids():
    rope = {"type" if TRANSFORMERS < (5, 0) else "rope_type": "default", "mrope_section": [1, 1, 2]}
    text = {**TINY, "num_key_value_heads": 1, "rope_scaling" if TRANSFORMERS < (5, 0) else "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 16, "out_hidden_size": 16, "intermediate_size": 32, "num_heads": 2}
    config = Qwen2_5_VLConfig(**(text if TRANSFORMERS < (4, 52) else {"text_config": text}), vision_config=vision)
    base = Qwen2_5_VLForConditionalGeneration(config)
    model = get_peft_model(base, make_config(task_type="CAUSAL_LM")).eval()
    ids = torch.randint(3, 64, (1, 5))
    assert model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.shape[1] == P + 5
    with pytest.raises(
        ValueError, match=r"Qwen2_5_VLForConditionalGeneration computes .* pixel_values, image_grid_thw"
    ):
        model(input_ids=ids, pixel_values=torch.zeros(4, 1176), image_grid_thw=torch.tensor([[1, 2, 2]]))
    model.share_prompt(True)  # other ways than the usual one do not get around it
    model.enable_prompt_cache()
    images = {"pixel_values": torch.zeros(4, 1176), "image_grid_thw": torch.tensor([[1, 2, 2]])}
    for run in (model, model.generate):
        with pytest.raises(ValueError, match="computes the positions of images"):
            run(input_ids=ids, **images)
    model.share_prompt(False)
    with pytest.raises(ValueError, match="`position_ids` must have two dimensions"):
        model(input_ids=ids, position_ids=torch.zeros(3, 1, 5, dtype=torch.long))
