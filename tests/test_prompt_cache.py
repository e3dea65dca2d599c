"""With the prompt's keys and values computed once, everything comes out as without."""

import copy

import pytest
import torch
from conftest import make_config, tiny_bert, tiny_gpt2, tiny_llama, tiny_opt
from hosts import HAS_TUPLES, needs_filled_caches
from peft import get_peft_model
from scenarios import SCENARIOS, Scenario, make_batch, train
from transformers import BertLMHeadModel

from peft_residual import convert_to_prompt_tuning
from peft_residual.compat import assists_from_embeddings
from peft_residual.peft_model.base_model import accepts


def tiny_sliding():
    """A Mistral whose window is shorter than prompt and text."""
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {key: getattr(tiny_llama().config, key) for key in ("vocab_size", "hidden_size", "intermediate_size")}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    return MistralForCausalLM(MistralConfig(**sizes, **heads, **ids, sliding_window=8)).eval()


BASES = {"gpt2": tiny_gpt2, "llama": tiny_llama, "opt": tiny_opt, "mistral": tiny_sliding}


def make_model(name="llama", **overrides):
    if name in ("gpt2", "opt") and HAS_TUPLES:
        pytest.skip("GPT-2 and OPT of this transformers return tuples, and run without the prompt cache")
    scenario = Scenario("CAUSAL_LM", BASES[name], SCENARIOS["llama"].labels)
    model = scenario.model(num_virtual_tokens=6, **overrides)
    return model.eval()


class Counter:
    """Counts the positions that go through the first layer of a model."""

    def __init__(self, model):
        self.seen = 0
        layer = next(m for n, m in model.base_model.named_modules() if n.endswith(("layers.0", "h.0")))
        layer.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        self.seen += hidden.shape[0] * hidden.shape[1]

    def during(self, run):
        self.seen = 0
        with torch.no_grad():
            result = run()
        return self.seen, result


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("name", BASES)
def test_logits_of_the_text_are_the_same_and_the_prompt_is_computed_once(name, padding_side):
    model, batch = make_model(name), make_batch(padding_side=padding_side)
    if name == "mistral":  # with padding it runs as without a cache
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    if not accepts(model.base_model, "logits_to_keep"):
        pytest.skip(f"{name} of this transformers computes all logits")
    counter = Counter(model)

    def run():
        return model(**batch, logits_to_keep=7).logits[batch["attention_mask"].bool()]

    count, expected = counter.during(run)
    assert count == 6 * (6 + 7)
    model.enable_prompt_cache()
    assert counter.during(run)[0] == 6 + 6 * 7
    count, logits = counter.during(run)
    assert count == 6 * 7
    assert (logits - expected).norm() <= 1e-5 * expected.norm()
    model.disable_prompt_cache()
    assert counter.during(run)[0] == 6 * (6 + 7)


@needs_filled_caches
@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "top_k": 5}, {"repetition_penalty": 1.3}])
@pytest.mark.parametrize("name", BASES)
def test_generation_is_the_same(name, settings):
    model, batch = make_model(name), make_batch(padding_side="left")
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, **settings}
    counter = Counter(model)

    def run():
        torch.manual_seed(1)
        return model.generate(**batch, **settings)

    expected, without = run(), counter.seen
    model.enable_prompt_cache()
    run()
    counter.seen = 0
    generated, count = run(), counter.seen
    assert torch.equal(generated, expected)
    assert count == without - 6 * 6 or name == "mistral"


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
    ],
)
def test_what_cannot_go_on_from_a_cache_runs_without(settings):
    if "prompt_lookup_num_tokens" in settings and not assists_from_embeddings():
        pytest.skip("this transformers cannot start prompt lookup from embeddings")
    model, batch = make_model(), make_batch(rows=1, padding_side="left")
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, **settings}

    def run():
        torch.manual_seed(1)
        return model.generate(**batch, **settings)

    expected = run()
    model.enable_prompt_cache()
    assert torch.equal(run(), expected)


def test_everything_but_the_texts_own_logits_is_as_without():
    model, batch = make_model(), make_batch()
    runs = [
        lambda: model(**batch).logits,
        lambda: model(**batch, labels=batch["input_ids"]).loss,
        lambda: model(**batch, logits_to_keep=8).logits,
        lambda: model(**batch, logits_to_keep=2, output_hidden_states=True).hidden_states[0],
        lambda: model(**batch, logits_to_keep=2, adapter_names=["__base__"] * 6).logits,
    ]
    with torch.no_grad():
        expected = [run() for run in runs]
        model.enable_prompt_cache()
        assert all(torch.equal(run(), output) for run, output in zip(runs, expected))


def changes():
    def prompt(model):
        with torch.no_grad():
            model.prompt_encoder["default"].embedding.weight.mul_(1.5)

    def base(model):
        with torch.no_grad():
            model.base_model.lm_head.weight.mul_(1.5)
            model.base_model.model.layers[0].mlp.down_proj.weight.mul_(1.5)

    def training(model):
        train(model, SCENARIOS["llama"], steps=1)
        model.eval()

    def adapter(model):
        model.add_adapter("other", make_config(task_type="CAUSAL_LM", num_virtual_tokens=3))
        model.set_adapter("other")

    def merging(model):
        convert_to_prompt_tuning(model)

    def casting(model):
        model.base_model.double()

    return [prompt, base, training, adapter, merging, casting]


@pytest.mark.parametrize("change", changes(), ids=lambda change: change.__name__)
def test_any_change_is_noticed(change):
    model, batch = make_model(), make_batch()
    model.enable_prompt_cache()
    with torch.no_grad():
        model(**batch, logits_to_keep=1)
    change(model)
    with torch.no_grad():
        cached = model(**batch, logits_to_keep=1).logits
        model.disable_prompt_cache()
        if change.__name__ == "merging":  # stock prompt tuning from here on; this batch has no padding on the left
            assert cached.shape[1] == 1
        assert torch.allclose(cached, model(**batch, logits_to_keep=1).logits, atol=1e-5)


def test_copies_have_a_cache_of_their_own():
    model, batch = make_model(), make_batch()
    model.enable_prompt_cache()
    with torch.no_grad():
        expected = model(**batch, logits_to_keep=1).logits
        assert torch.allclose(copy.deepcopy(model)(**batch, logits_to_keep=1).logits, expected, atol=1e-5)


def test_it_is_not_used_where_the_prompt_is_trained_or_dropout_is_on():
    model, batch = make_model(), make_batch()
    model.enable_prompt_cache()
    counter = Counter(model)
    counter.during(lambda: model(**batch, logits_to_keep=1))
    model(**batch, logits_to_keep=1).logits.sum().backward()
    assert model.prompt_encoder["default"].embedding.weight.grad.any()
    model.train()
    assert counter.during(lambda: model(**batch, logits_to_keep=1))[0] == 6 * (6 + 7)


def test_a_model_that_reads_in_both_directions_is_refused():
    model = get_peft_model(BertLMHeadModel(tiny_bert("MaskedLM").config), make_config(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="'bert' is bidirectional"):
        model.enable_prompt_cache()
