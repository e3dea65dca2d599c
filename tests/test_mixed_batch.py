"""A different prompt per row: each row of a mixed batch gets what it gets alone with its own adapter."""

import pytest
import torch
from conftest import make_config, sharpen, tiny_bart, tiny_gpt2, tiny_t5
from hosts import STOCK_GENERATION
from peft import PromptTuningConfig, get_peft_model
from scenarios import SCENARIOS, Scenario, make_batch, train

from peft_residual import convert_to_prompt_tuning


SCENARIOS = {
    **SCENARIOS,
    "gpt2-sequence": Scenario("SEQ_CLS", lambda: tiny_gpt2_classifier(), lambda ids: {"labels": ids[:, 0] % 3}),
    "bart": Scenario("SEQ_2_SEQ_LM", lambda: steady_bart(), SCENARIOS["t5"].labels),
}
NAMES = ["first", "__base__", "plain", "second", "merged", "first"]


def steady_bart():
    """BART without the dropout of layers, which may leave out the one that reads the prompt."""
    base = sharpen(tiny_bart(), 8.0)
    base.model.encoder.layerdrop = base.model.decoder.layerdrop = 0.0
    return base


def tiny_gpt2_classifier():
    from transformers import GPT2ForSequenceClassification

    return GPT2ForSequenceClassification(tiny_gpt2(num_labels=3).config).eval()


def make_model(name):
    """Two residual adapters of other lengths and networks, a merged and a plain one."""
    scenario = SCENARIOS[name]
    common = {"task_type": scenario.task_type}
    model = get_peft_model(scenario.build(), make_config(**common, prompt_tuning_init_seed=0), adapter_name="merged")
    train(model, scenario, steps=2)
    convert_to_prompt_tuning(model, adapter_name="merged")
    for adapter, config in {
        "first": make_config(**common, num_virtual_tokens=6, prompt_tuning_init_seed=1),
        "second": make_config(**common, num_virtual_tokens=2, encoder_reparameterization_type="LSTM1"),
        "plain": PromptTuningConfig(**common, num_virtual_tokens=3, num_transformer_submodules=1),
    }.items():
        model.add_adapter(adapter, config)
        model.set_adapter(adapter)
        if adapter != "plain":
            train(model, scenario, steps=2)
    model.set_adapter("first")
    return model.eval()


def alone(model, adapter, batch, row, run):
    """What a row gets alone, without padding, with its adapter made the active one."""
    kept = batch["attention_mask"][row].bool()
    single = {name: value[row : row + 1][:, kept] for name, value in batch.items()}
    if adapter == "__base__":
        with model.disable_adapter():
            return run(model, single)
    model.set_adapter(adapter)
    return run(model, single)


def logits(model, batch):
    with torch.no_grad():
        outputs = model(**batch)
    name = next(n for n in ("logits", "end_logits", "last_hidden_state") if n in outputs)
    return outputs[name]


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_causal_rows_get_the_logits_that_they_get_alone(name, padding_side):
    model, batch = make_model(name), make_batch(padding_side=padding_side)
    mixed = logits(model, {**batch, "adapter_names": NAMES})[:, -7:]
    for row, adapter in enumerate(NAMES):
        expected = alone(model, adapter, batch, row, logits)[0]
        kept = batch["attention_mask"][row].bool()
        assert torch.allclose(mixed[row][kept], expected[-int(kept.sum()) :], atol=1e-5), adapter


@pytest.mark.parametrize("name", ["bert-sequence", "gpt2-sequence"])
def test_classified_rows_go_through_their_own_heads(name):
    model, batch = make_model(name), make_batch()
    mixed = logits(model, {**batch, "adapter_names": NAMES})
    expected = torch.cat([alone(model, adapter, batch, row, logits) for row, adapter in enumerate(NAMES)])
    assert torch.allclose(mixed, expected, atol=1e-5)
    heads = [model.base_model.get_submodule(n) for n in ("classifier", "score") if hasattr(model.base_model, n)]
    assert not torch.equal(*(heads[0].modules_to_save[n].weight for n in ("first", "second")))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["bert-token", "bert-question", "bert-features"])
def test_outputs_line_up_with_the_tokens_of_each_row(name):
    model, batch = make_model(name), make_batch()
    mixed = logits(model, {**batch, "adapter_names": NAMES})
    assert mixed.shape[:2] == (6, 7)
    for row, adapter in enumerate(NAMES):
        kept = batch["attention_mask"][row].bool()
        expected = alone(model, adapter, batch, row, logits)[0]  # stock PEFT's, of "plain", has the prompt's too
        assert torch.allclose(mixed[row][kept], expected[-int(kept.sum()) :], atol=1e-5), adapter


@pytest.mark.parametrize("name", ["t5", "bart", "bert-token", "llama", "bert-sequence"])
def test_the_loss_of_a_mixed_batch_is_that_of_its_rows(name):
    model, batch = make_model(name), make_batch(rows=2)
    batch |= SCENARIOS[name].labels(batch["input_ids"])
    for names in (["second", "first"], ["__base__", "first"]):
        mixed = model(**batch, adapter_names=names).loss
        losses, counts = [], []
        for row, adapter in enumerate(names):
            single = {key: value[row : row + 1] for key, value in batch.items()}
            if adapter == "__base__":
                with model.disable_adapter():
                    losses.append(model(**single).loss)
            else:
                model.set_adapter(adapter)
                losses.append(model(**single).loss)
            labels = single.get("labels", torch.zeros(1, 1))
            predicted = labels[:, 1:] if name == "llama" and adapter == "__base__" else labels
            counts.append(int((predicted != -100).sum()))
        expected = sum(loss * count for loss, count in zip(losses, counts)) / sum(counts)
        assert torch.allclose(mixed, expected, atol=1e-5), names


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"do_sample": False, "num_return_sequences": 1}])
@pytest.mark.parametrize("name", ["t5", "bart", "gpt2", "llama"])
def test_generated_rows_are_those_that_each_adapter_generates_alone(name, settings):
    model, batch = make_model(name), make_batch(padding_side="left" if name in ("gpt2", "llama") else "right")
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, **settings}

    def generate(model, batch):
        stock = {} if "adapter_names" in batch else STOCK_GENERATION
        return model.generate(**batch, **settings, **stock)[:, -6:]

    mixed = generate(model, {**batch, "adapter_names": NAMES})
    expected = torch.cat([alone(model, adapter, batch, row, generate) for row, adapter in enumerate(NAMES)])
    assert torch.equal(mixed, expected)
    assert len({tuple(row) for row in expected.tolist()}) > 2, "the prompts matter"


def test_beams_go_through_the_head_of_their_row():
    model = get_peft_model(tiny_t5(tie_word_embeddings=False), make_config(modules_to_save=["lm_head"]), "first")
    model.add_adapter("second", make_config(modules_to_save=["lm_head"], num_virtual_tokens=2))
    for adapter in ("first", "second"):
        torch.nn.init.normal_(model.base_model.lm_head.modules_to_save[adapter].weight)
    model.eval()
    batch, names = make_batch(rows=3), ["first", "__base__", "second"]

    def generate(model, batch):
        return model.generate(**batch, num_beams=3, num_return_sequences=2, max_new_tokens=5, min_new_tokens=5)

    mixed = generate(model, {**batch, "adapter_names": names})
    expected = torch.cat([alone(model, adapter, batch, row, generate) for row, adapter in enumerate(names)])
    assert torch.equal(mixed, expected)


def test_a_mixed_batch_needs_no_mask_and_works_while_a_plain_prompt_is_active():
    model = make_model("llama")
    ids = make_batch()["input_ids"][:2].clamp(min=3)
    expected = logits(model, {"input_ids": ids, "adapter_names": ["first", "second"]})
    model.set_adapter("plain")
    assert torch.equal(logits(model, {"input_ids": ids, "adapter_names": ["first", "second"]}), expected)
    with model.disable_adapter():
        base = logits(model, {"input_ids": ids, "adapter_names": ["first", "second"]})
    assert torch.allclose(base, logits(model.base_model, {"input_ids": ids}), atol=1e-6)


def test_gradients_reach_the_adapter_of_each_row():
    model, batch = make_model("t5"), make_batch(rows=2)
    model.set_adapter("first")
    prompt = model.prompt_encoder["first"].embedding.weight
    for names, reached in ((["second", "first"], True), (["second", "plain"], False)):
        prompt.grad = None
        model.zero_grad()
        labels = batch["input_ids"][:, :3].contiguous()
        loss = model(**batch, labels=labels, adapter_names=names).loss
        if reached:
            loss.backward()
        assert (prompt.grad is not None and bool(prompt.grad.any())) == reached


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["first", "nobody"], r"'nobody', but the adapters are \['first', 'merged', 'plain', 'second'\]"),
        (["first"], r"one name for each of the 2 rows, got \['first'\]"),
        ("first", "one name for each of the 2 rows, got 'first'"),
        (["first", None], "contains None, but"),
    ],
)
@pytest.mark.parametrize("method", ["__call__", "generate"])
def test_names_that_do_not_fit_are_refused(names, words, method):
    model = make_model("llama")
    with pytest.raises(ValueError, match=words):
        getattr(model, method)(input_ids=torch.ones(2, 3, dtype=torch.long), adapter_names=names)
