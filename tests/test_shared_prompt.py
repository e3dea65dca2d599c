"""The prompt computed once per batch gives the loss, logits and gradients of the prompt computed with each row."""

import pytest
import torch
from conftest import make_config, tiny_bert, tiny_gpt2, tiny_llama
from hosts import needs_checkpointed_caches
from peft import get_peft_model
from trainers import make_trainer
from transformers import (
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from peft_residual import disable_base_dropout
from peft_residual.compat import cache_name, takes_cache_objects
from peft_residual.peft_model.shared_prompt import can_share


P, B, L = 6, 4, 7


def tiny_opt():
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2}
    return OPTForCausalLM(OPTConfig(vocab_size=64, num_attention_heads=2, max_position_embeddings=64, **sizes))


def tiny_mistral(**options):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_key_value_heads": 1}
    return MistralForCausalLM(MistralConfig(vocab_size=64, num_attention_heads=2, **sizes, **options))


def prompted(base, **options):
    if not takes_cache_objects(base):
        pytest.skip(f"{type(base).__name__} of this transformers takes tuples, and every row runs the prompt")
    model = get_peft_model(base, make_config(task_type="CAUSAL_LM", num_virtual_tokens=P, **options))
    disable_base_dropout(model)
    return model.train()


def batch(side="none"):
    ids = torch.randint(5, 64, (B, L), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(1, B) if side != "none" else ():
        padding = slice(0, row) if side == "left" or (side == "both" and row % 2) else slice(L - row, L)
        ids[row, padding], mask[row, padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def run(model, inputs, share, loss=lambda outputs: outputs.loss):
    """Outputs and the gradient of every trained parameter."""
    model.share_prompt(share)
    model.zero_grad()
    outputs = model(**inputs)
    loss(outputs).backward()
    return outputs, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def compare(model, inputs, **options):
    expected, expected_gradients = run(model, inputs, False, **options)
    found, gradients = run(model, inputs, True, **options)
    assert gradients.keys() == expected_gradients.keys() and gradients
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm() <= 2e-5 * gradient.norm() + 1e-9, name
    return found, expected


@pytest.mark.parametrize("build", (tiny_llama, tiny_gpt2, tiny_opt, tiny_mistral))
@pytest.mark.parametrize("side", ("none", "left", "right", "both"))
def test_loss_logits_and_gradients_are_those_of_the_usual_way(build, side, shared):
    options = {"sliding_window": None} if build is tiny_mistral else {}
    model, inputs = prompted(build(**options)), batch(side)
    found, expected = compare(model, inputs)
    assert len(shared) == 1
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)
    # Padding in front of the text is moved in front of the prompt; what a model computes there is of no use.
    before = (inputs["attention_mask"].cumsum(-1) == 0).sum(-1, keepdim=True)
    real = torch.arange(P + L) >= before
    real[:, -L:] &= inputs["attention_mask"].bool() | (real[:, -L:] & (before > 0)) | (inputs["attention_mask"] > 0)
    torch.testing.assert_close(found.logits[real], expected.logits[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ("none", "left", "both"))
def test_a_loss_of_the_users_own_gets_the_same_gradients(side, shared):
    """As trainers compute it that pass no labels; the last virtual token predicts the first one of the text."""
    model, inputs = prompted(tiny_llama()), batch(side)
    inputs.pop("labels")
    weights = torch.randn(B, P + L, 64, generator=torch.Generator().manual_seed(2))
    before = (inputs["attention_mask"].cumsum(-1) == 0).sum(-1)
    for row in range(B):
        weights[row, : before[row]] = 0
    compare(model, inputs, loss=lambda outputs: (outputs.logits * weights).sum())
    assert len(shared) == 1


def test_labels_of_the_last_tokens_alone_and_accumulated_batches(shared):
    model, inputs = prompted(tiny_llama()), batch("both")
    inputs["labels"][:, :-2] = -100
    found, expected = compare(model, {**inputs, "num_items_in_batch": torch.tensor(11)})
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)


def test_positions_given_by_the_user_are_kept(shared):
    model, inputs = prompted(tiny_llama()), batch()
    found, expected = compare(model, {**inputs, "position_ids": torch.arange(L).expand(B, -1) * 2})
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert len(shared) == 1


def test_embeddings_and_no_mask_are_taken_too(shared):
    model, inputs = prompted(tiny_llama()), batch()
    ids = inputs.pop("input_ids")
    inputs.pop("attention_mask")
    found, expected = compare(model, {**inputs, "inputs_embeds": model.word_embeddings(ids).detach()})
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)


def test_a_trained_head_gets_the_same_gradients(shared):
    model = prompted(tiny_llama(), modules_to_save=["lm_head"])
    compare(model, batch("left"))
    assert len(shared) == 1


@needs_checkpointed_caches
@pytest.mark.parametrize("build", (tiny_llama, tiny_gpt2, tiny_opt))
@pytest.mark.parametrize("side", ("left", "right"))
def test_gradient_checkpointing_runs_layers_again_and_changes_nothing(build, side, shared):
    model = prompted(build())
    expected, expected_gradients = run(model, batch(side), False)
    model.base_model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    layer = next(m for m in model.base_model.modules() if hasattr(m, "_can_checkpoint_with_cache"))
    found, gradients = run(model, batch(side), True)
    assert len(shared) == 1
    assert layer.gradient_checkpointing and not layer._can_checkpoint_with_cache
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name
    assert found.get(cache_name()) is None
    attention = next(module for name, module in model.base_model.named_modules() if name.endswith("attn"))
    calls = []
    attention.register_forward_hook(lambda *_: calls.append(1))
    model.share_prompt(True)
    model(**batch(side)).loss.backward()
    assert len(calls) == 4  # prompt and text, each in the forward and in the backward pass


@pytest.mark.parametrize("side", ("none", "left", "both"))
@pytest.mark.parametrize("kept", (1, 3, L))
def test_logits_of_the_last_tokens_are_those_of_the_usual_way(side, kept, shared):
    model, inputs = prompted(tiny_llama()), batch(side)
    inputs.pop("labels")
    is_text = inputs["attention_mask"][:, -kept:].bool()
    found, expected = compare(
        model, {**inputs, "logits_to_keep": kept}, loss=lambda o: o.logits[is_text].square().sum()
    )
    assert len(shared) == 1 and found.logits.shape == (B, kept, 64)
    torch.testing.assert_close(found.logits[is_text], expected.logits[is_text], rtol=1e-5, atol=1e-5)


def test_all_logits_can_be_asked_for_by_name(shared):
    found, expected = compare(prompted(tiny_llama()), {**batch(), "logits_to_keep": 0})
    assert len(shared) == 1 and found.logits.shape == expected.logits.shape == (B, P + L, 64)


def test_tuples_and_no_cache_are_what_was_asked_for(shared):
    model = prompted(tiny_llama())
    model.share_prompt(True)
    outputs = model(**batch(), return_dict=False, use_cache=False)
    assert isinstance(outputs, tuple) and len(outputs) == 2 and outputs[1].shape == (B, P + L, 64)
    assert model(**batch())[cache_name()].get_seq_length() == P + L


# --- where it is not done -------------------------------------------------------------------------------------------


def test_by_default_long_prompts_are_shared_and_short_ones_are_not(shared):
    model = prompted(tiny_llama())
    model(**batch())
    assert not shared
    model = get_peft_model(tiny_llama(), make_config(task_type="CAUSAL_LM", num_virtual_tokens=20))
    model(**batch())
    assert len(shared) == 1
    model(**{name: value[:1] for name, value in batch().items()})  # saves nothing
    model(**{name: value.repeat(1, 15) for name, value in batch().items()})  # saves too little
    model.share_prompt(False)
    model(**batch())
    assert len(shared) == 1


@pytest.mark.parametrize(
    ("build", "change"),
    [
        (lambda: tiny_mistral(sliding_window=5), None),
        (tiny_llama, lambda model: model.base_model.gradient_checkpointing_enable({"use_reentrant": True})),
        (tiny_gpt2, lambda model: setattr(model.base_model.transformer.drop, "p", 0.5)),
        (tiny_llama, lambda model: setattr(model.base_model.model.layers[0].self_attn, "attention_dropout", 0.5)),
    ],
    ids=("window", "reentrant checkpointing", "dropout module", "attention dropout"),
)
def test_where_it_would_not_be_exact_the_usual_way_is_taken(build, change, shared):
    model = prompted(build())
    model.share_prompt(True)
    if change:
        change(model)
    assert not can_share(model.base_model, model.batch_prompt(B), batch())
    model(**batch()).loss.backward()
    assert not shared


def test_left_padding_needs_a_model_that_takes_positions(shared):
    base = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2))
    model = prompted(base)
    for side, count in (("left", 0), ("none", 1)):
        found, expected = compare(model, batch(side))
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)
        assert len(shared) == count


def test_dropout_does_not_matter_in_evaluation(shared):
    model = prompted(tiny_gpt2()).eval()
    model.base_model.transformer.drop.p = 0.5
    model.share_prompt(True)
    model(**batch())
    assert len(shared) == 1


def test_rows_with_adapters_of_their_own_are_not_shared(shared):
    model = prompted(tiny_llama())
    model.add_adapter("other", make_config(task_type="CAUSAL_LM", num_virtual_tokens=P))
    model.share_prompt(True)
    model(**batch(), adapter_names=["default", "other"] * 2)
    assert not shared


def test_a_single_virtual_token_and_hidden_states_are_not_shared(shared):
    model = get_peft_model(tiny_llama(), make_config(task_type="CAUSAL_LM", num_virtual_tokens=1))
    model.share_prompt(True)
    model(**batch())
    prompted_model = prompted(tiny_llama())
    prompted_model.share_prompt(True)
    assert len(prompted_model(**batch(), output_hidden_states=True).hidden_states) == 3
    assert not shared


def test_a_bidirectional_model_with_a_causal_head_is_not_shared(shared):
    model = get_peft_model(
        BertLMHeadModel(tiny_bert("").config), make_config(task_type="CAUSAL_LM", num_virtual_tokens=P)
    )
    model.share_prompt(True)
    model(**batch())
    assert not shared


# --- trainers -------------------------------------------------------------------------------------------------------


def test_a_trainer_gets_the_same_losses_and_the_same_prompt(shared, tmp_path):
    losses, prompts = [], []
    for share in (False, True):
        config = {"encoder_dropout": 0.0, "num_virtual_tokens": P}
        settings = {"max_steps": 20, "gradient_accumulation_steps": 2, "learning_rate": 0.01}
        trainer = make_trainer(tmp_path / str(share), "llama", config=config, **settings)
        trainer.model.share_prompt(share)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        losses[-1].append(trainer.evaluate()["eval_loss"])
        prompts.append(trainer.model.get_prompt_embedding_to_save("default"))
    assert len(shared) == 40 + 2 and len(losses[0]) == 21
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert (prompts[1] - prompts[0]).norm() <= 1e-5 * prompts[0].norm()
