"""What differs between versions of PEFT and transformers is met by name, and generated tokens are the right ones."""

import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_config, tiny, tiny_bert, tiny_gpt2, tiny_llama, tiny_opt
from fresh_process import run_python
from peft import get_peft_model
from scenarios import SCENARIOS
from transformers import BertLMHeadModel, CTRLConfig, CTRLLMHeadModel, DynamicCache, GenerationConfig

from peft_residual import compat, convert_to_prompt_tuning, save_as_prefix_tuning, save_as_prompt_tuning
from peft_residual.peft_model import causal_lm, generation


IDS = torch.arange(5, 12).unsqueeze(0)


def prompted(base):
    base.generation_config.eos_token_id = None
    return get_peft_model(base, make_config(task_type="CAUSAL_LM", prompt_tuning_init_seed=0)).eval()


@torch.no_grad()
def by_full_forwards(model, ids, count):
    """Greedy tokens, each from a pass over the whole text: no cache, and none of the code of `generate`."""
    for _ in range(count):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_opt, lambda: tiny("Mistral", sliding_window=6)])
def test_generated_tokens_are_those_of_full_forwards(build):
    model = prompted(build())
    assert torch.equal(model.generate(IDS, max_new_tokens=12), by_full_forwards(model, IDS, 12))


def test_a_cache_of_the_users_own_is_filled_and_continued_under_either_name():
    model = prompted(tiny_llama())
    expected = by_full_forwards(model, IDS, 6)
    for name in sorted({"past_key_values", compat.cache_name()}):
        cache = DynamicCache()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            outputs = model.generate(IDS, max_new_tokens=6, return_dict_in_generate=True, **{name: cache})
        assert torch.equal(outputs.sequences, expected)
        assert outputs[compat.cache_name()] is cache and cache.get_seq_length() == 4 + IDS.shape[1] + 5


def test_settings_that_equal_the_librarys_default_do_not_hide_the_models():
    model = prompted(tiny_llama())
    model.base_model.generation_config.max_length = 10
    assert model.generate(IDS).shape == (1, 10)
    assert model.generate(IDS, generation_config=GenerationConfig(do_sample=False)).shape == (1, 10)
    assert model.generate(IDS, max_length=20).shape == (1, 20)
    assert model.generate(IDS, generation_config=GenerationConfig(max_length=12)).shape == (1, 12)
    assert model.generate(IDS, generation_config=GenerationConfig(min_length=9, max_length=9)).shape == (1, 9)


# --- what a host cannot do is said by name ---------------------------------------------------------------------------


def test_a_prompt_cache_that_generate_cannot_use_is_said_and_the_tokens_are_the_same(monkeypatch):
    monkeypatch.setattr(causal_lm, "generates_from_a_filled_cache", lambda: False)
    model = prompted(tiny_llama())
    expected = model.generate(IDS, max_new_tokens=6)
    with pytest.warns(UserWarning, match=r"`generate` does not use the prompt cache.+transformers>=5.3"):
        model.enable_prompt_cache()
    assert torch.equal(model.generate(IDS, max_new_tokens=6), expected)


@pytest.mark.parametrize(
    "settings", [{"prompt_lookup_num_tokens": 2}, {"assistant_model": object()}, {"assistant_early_exit": 1}]
)
def test_assisted_generation_is_refused_where_transformers_fails(settings, monkeypatch):
    monkeypatch.setattr(generation, "assists_from_embeddings", lambda: False)
    with pytest.raises(ValueError, match=rf"`{next(iter(settings))}` with a prompt needs transformers 5.18"):
        prompted(tiny_llama()).generate(IDS, max_new_tokens=4, **settings)


def test_classes_that_prepare_no_embeddings_are_refused_where_transformers_fails(monkeypatch):
    monkeypatch.setattr(generation, "assists_from_embeddings", lambda: False)
    sizes = {"vocab_size": 64, "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "dff": 32}
    model = prompted(CTRLLMHeadModel(CTRLConfig(**sizes)))
    assert model(input_ids=IDS).logits.shape[1] == 4 + IDS.shape[1]
    with pytest.raises(ValueError, match=r"CTRLLMHeadModel cannot generate with a prompt .* transformers>=5.18"):
        model.generate(IDS, max_new_tokens=4)


def test_generation_in_both_directions_is_refused_where_transformers_is_wrong(monkeypatch):
    monkeypatch.setattr(generation, "generates_in_both_directions", lambda: False)
    with pytest.raises(ValueError, match=r"'bert' reads in both directions.*`is_decoder=True`.*transformers>=5.10"):
        prompted(BertLMHeadModel(tiny_bert("").config)).generate(IDS, max_new_tokens=4)


@pytest.mark.parametrize("number, is_right", [("4.51.3", False), ("4.57.6", True), ("5.0.0", False), ("5.10.4", True)])
def test_versions_that_generate_in_both_directions(number, is_right, monkeypatch):
    monkeypatch.setattr(compat, "version", lambda name: number)
    assert compat.generates_in_both_directions() is is_right


@pytest.mark.parametrize("model_type", ["bert-generation", "doge", "paligemma"])
def test_a_prompt_is_computed_with_its_text_where_an_older_transformers_is_not_exact(model_type, monkeypatch):
    base = SimpleNamespace(config=SimpleNamespace(model_type=model_type))  # which tells no more before 5.0
    for number, is_exact in (("4.57.6", False), ("5.10.4", False), ("5.18.0", True)):
        monkeypatch.setattr(compat, "version", lambda name, number=number: number)
        assert compat.is_wrong_with_a_filled_cache(base) is not is_exact


@pytest.mark.parametrize("is_broken", [False, True])
def test_every_export_that_stock_peft_generates_wrongly_from_says_so(is_broken, tmp_path, monkeypatch):
    """`cache` in place of `past_key_values` is what PEFT 0.21 does not know."""
    monkeypatch.setattr(compat, "cache_name", lambda: "cache" if is_broken else "past_key_values")
    causal, seq2seq = prompted(tiny_llama()), SCENARIOS["t5"].model()
    exports = [
        lambda: save_as_prompt_tuning(causal, tmp_path / "merged"),
        lambda: save_as_prefix_tuning(causal, tmp_path / "prefix"),
        lambda: convert_to_prompt_tuning(causal),
        lambda: save_as_prompt_tuning(seq2seq, tmp_path / "t5"),
    ]
    for export, is_causal in zip(exports, (True, True, True, False)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            export()
        messages = [str(w.message) for w in caught if "itself generates wrong tokens" in str(w.message)]
        assert len(messages) == (is_broken and is_causal)
        assert all("transformers<5.24" in message and "use_cache=False" in message for message in messages)


# --- import -----------------------------------------------------------------------------------------------------

IMPORT = """
import importlib.metadata, json, sys, warnings
versions, blocked = json.loads(sys.argv[1])
real = importlib.metadata.version
importlib.metadata.version = lambda name: versions.get(name) or real(name)
sys.modules.update(dict.fromkeys(blocked))  # importing one raises
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import peft_residual, peft_residual_cli
    import peft_residual.training
found = [str(w.message) for w in caught if "peft_residual was not tested" in str(w.message)]
print(json.dumps([found, peft_residual.__version__, [name for name in blocked if sys.modules[name]]]))
"""


def import_with(versions=None, blocked=()):
    result = run_python(IMPORT, json.dumps([versions or {}, list(blocked)]))
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "name, number", [("transformers", "6.1.0"), ("transformers", "5.99.0.dev0"), ("peft", "0.23.1")]
)
def test_a_newer_host_is_met_with_one_warning_that_names_the_tested_range(name, number):
    (message,), _, _ = import_with({name: number})
    oldest, newest = compat.TESTED[name]
    assert f"{name} {number} (tested: {oldest} to {newest})" in message


def test_tested_hosts_are_met_in_silence():
    assert import_with()[0] == []
    assert import_with({name: f"{newest}.9" for name, (_, newest) in compat.TESTED.items()})[0] == []


def test_datasets_is_not_needed():
    """Used by examples; the package must run without it."""
    assert import_with(blocked=["datasets"])[2] == []


def test_the_tested_range_begins_where_that_of_the_package_does():
    project = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text()
    assert f'    "{compat.REQUIREMENT}",\n' in project
    for name, (oldest, _) in compat.TESTED.items():
        assert re.search(rf'^    "{name}>={re.escape(oldest)}[,"]', project, re.MULTILINE)
