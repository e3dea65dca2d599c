"""Prefix export: stock PEFT computes from keys and values what the live model computes from the prompt."""

import pytest
import torch
import transformers
from conftest import make_config, tiny, tiny_gpt2, tiny_llama, tiny_opt, tiny_t5
from fresh_process import run_python
from hosts import STOCK_GENERATION, TRANSFORMERS
from peft import PeftConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from scenarios import SCENARIOS, fresh, relative_difference, train
from transformers import LlamaForCausalLM

from peft_residual import save_as_prefix_tuning


P = 4
LLAMA = SCENARIOS["llama"]


BASES = {
    "gpt2": tiny_gpt2,
    "llama": lambda: tiny("Llama"),
    "qwen2": lambda: tiny("Qwen2"),
    "qwen3": lambda: tiny("Qwen3", head_dim=12),
    "opt": tiny_opt,
    "gemma": lambda: tiny("Gemma", head_dim=8),
}
WINDOWED = {  # windows that are shorter than prompt and text, and than the prompt
    "mistral": lambda: tiny("Mistral", sliding_window=6),
    "qwen2 by layer": lambda: tiny("Qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "gemma2": lambda: tiny("Gemma2", sliding_window=3, head_dim=8),
    "gemma3": lambda: tiny("Gemma3Text", sliding_window=6, head_dim=8),
}
# They need another type of cache there, and are refused.
HYBRID = ("gemma2", "gemma3") if TRANSFORMERS < (4, 53) else ()


def prompted(base, **overrides):
    base.generation_config.eos_token_id = None  # so that 32 tokens are 32 tokens
    model = get_peft_model(base, make_config(task_type="CAUSAL_LM", prompt_tuning_init_seed=0, **overrides))
    train(model, LLAMA, steps=2)
    return model.eval()


def rows():
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 64, (1, length), generator=generator) for length in (3, 9)]


def padded_batch():
    """The rows, the first with padding in front of it, and positions that do not count the padding."""
    short, long = rows()
    ids = torch.cat([torch.nn.functional.pad(short, (6, 0)), long])
    mask = (torch.arange(9) >= torch.tensor([[6], [0]])).long()
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


@torch.no_grad()
def results_of(model, with_padding):
    """Logits and 32 greedy tokens of each row alone, and, if asked, of both in one batch."""
    batches = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows()]
    batches += [padded_batch()] if with_padding else []
    results = []
    for batch in batches:
        logits = model(**batch).logits[:, -batch["input_ids"].shape[1] :]
        batch.pop("position_ids", None)
        results.append((logits, model.generate(**batch, max_new_tokens=32, do_sample=False)))
    return results


# Runs in a fresh Python: stock PEFT only.
STOCK_PROCESS = """
import sys
import torch
from peft import PeftModel
torch.set_num_threads(1)
for path in sys.argv[1:]:
    base, batches = torch.load(f"{path}/in.pt", weights_only=False)
    model = PeftModel.from_pretrained(base, f"{path}/prefix").eval()
    results = []
    with torch.no_grad():
        for batch in batches:
            logits = model(**batch).logits
            batch.pop("position_ids", None)
            results.append((logits, model.generate(**batch, max_new_tokens=32, do_sample=False)))
    torch.save(results, f"{path}/out.pt")
assert not any(name.startswith("peft_residual") for name in sys.modules)
"""


@pytest.mark.filterwarnings("ignore:.*attends within a window")
def test_stock_peft_gives_logits_and_generations_of_the_live_model_without_this_package(tmp_path):
    expected = {}
    for name, build in {**BASES, **WINDOWED}.items():
        base = build()
        model = prompted(fresh(base))
        base.generation_config = model.base_model.generation_config
        if name in HYBRID:
            with pytest.raises(ValueError, match="cannot continue from the prompt's keys and values"):
                save_as_prefix_tuning(model, tmp_path / name / "prefix")
            continue
        save_as_prefix_tuning(model, tmp_path / name / "prefix")
        batches = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows()]
        batches += [padded_batch()] if name in BASES else []
        torch.save((base, batches), tmp_path / name / "in.pt")
        expected[name] = results_of(model, with_padding=name in BASES)
    run_python(STOCK_PROCESS, *(tmp_path / name for name in expected)).check_returncode()
    for name, live in expected.items():
        stock = torch.load(tmp_path / name / "out.pt")
        masks = [torch.ones(1, 3).bool(), torch.ones(1, 9).bool(), padded_batch()["attention_mask"].bool()]
        assert len(stock) == len(live) == (3 if name in BASES else 2)
        for (logits, generated), (live_logits, live_generated), mask in zip(stock, live, masks):
            assert relative_difference(logits[mask], live_logits[mask]) <= 1e-5, name
            if not STOCK_GENERATION:  # else it is PEFT that generates wrong tokens
                assert torch.equal(generated, live_generated), name


def test_prefix_has_the_layout_of_a_stock_adapter(tmp_path):
    model = prompted(tiny("Llama"))
    assert save_as_prefix_tuning(model, tmp_path / "prefix") == tmp_path / "prefix"
    config = PeftConfig.from_pretrained(tmp_path / "prefix")
    assert type(config) is PrefixTuningConfig and config.inference_mode
    assert (config.num_virtual_tokens, config.num_layers) == (P, 2)
    assert (config.num_attention_heads, config.token_dim) == (2, 8), "of the keys, not of the queries"
    tensors = load_file(tmp_path / "prefix" / "adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {"prompt_embeddings": (P, 2 * 2 * 8)}


def test_export_changes_nothing_in_the_model(tmp_path):
    base = tiny_gpt2()
    model = prompted(fresh(base)).train()
    model.base_model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    state = torch.get_rng_state()
    save_as_prefix_tuning(model, tmp_path / "prefix")
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert torch.equal(torch.get_rng_state(), state), "and no dropout was drawn"
    save_as_prefix_tuning(prompted(base), tmp_path / "again")
    files = [(tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in ("prefix", "again")]
    assert files[0] == files[1], "dropout was off"


def test_half_precision_is_kept(tmp_path):
    base = tiny("Llama").to(torch.bfloat16)
    model = prompted(fresh(base))
    save_as_prefix_tuning(model, tmp_path / "prefix")
    assert load_file(tmp_path / "prefix" / "adapter_model.safetensors")["prompt_embeddings"].dtype == torch.bfloat16
    stock = PeftModel.from_pretrained(base, tmp_path / "prefix").eval()
    with torch.no_grad():
        found, live = stock(input_ids=rows()[1]).logits, model(input_ids=rows()[1]).logits[:, P:]
    assert relative_difference(found, live) <= 0.03


def test_a_plain_prompt_and_another_adapter_than_the_first_are_exported_too(tmp_path):
    base = tiny("Llama")
    model = prompted(fresh(base))
    model.add_adapter("plain", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6))
    save_as_prefix_tuning(model, tmp_path / "prefix", adapter_name="plain")
    model.set_adapter("plain")
    stock = PeftModel.from_pretrained(base, tmp_path / "prefix").eval()
    with torch.no_grad():
        found, live = stock(input_ids=rows()[1]).logits, model(input_ids=rows()[1]).logits[:, 6:]
    assert relative_difference(found, live) <= 1e-5


def test_a_head_that_was_trained_along_is_taken_over(tmp_path):
    base = tiny("Llama")
    model = prompted(fresh(base), modules_to_save=["lm_head"])
    save_as_prefix_tuning(model, tmp_path / "prefix")
    stock = PeftModel.from_pretrained(base, tmp_path / "prefix").eval()
    with torch.no_grad():
        found, live = stock(input_ids=rows()[1]).logits, model(input_ids=rows()[1]).logits[:, P:]
    assert relative_difference(found, live) <= 1e-5


def test_a_window_is_named_with_what_it_means_for_padding(tmp_path):
    with pytest.warns(UserWarning, match="MistralForCausalLM attends within a window of 6 tokens.*Left-padded"):
        save_as_prefix_tuning(prompted(tiny("Mistral", sliding_window=6)), tmp_path / "prefix")


class LooksAtTheWholeText(LlamaForCausalLM):
    """What its prompt's positions compute depends on the text behind them."""

    def forward(self, inputs_embeds=None, **kwargs):
        return super().forward(inputs_embeds=inputs_embeds + inputs_embeds.mean(1, keepdim=True), **kwargs)


def test_models_whose_prompt_is_no_prefix_are_refused_by_name(tmp_path):
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    mla = tiny(
        "DeepseekV3",
        num_key_value_heads=4,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=6,
    )
    cases = [
        (tiny("Llama", rope_parameters=scaled), "LlamaForCausalLM has rotary positions of type 'dynamic'"),
        (mla, "DeepseekV3ForCausalLM leaves 4 keys and values of shapes"),
        (tiny("Mamba", state_size=4), "MambaForCausalLM (leaves 0|does not put its) keys and values"),
        (LooksAtTheWholeText(tiny("Llama").config).eval(), "LooksAtTheWholeText computes other logits"),
    ]
    if hasattr(transformers, "Qwen3NextConfig"):
        hybrid = tiny("Qwen3Next", num_experts=0, head_dim=8)
        cases.append((hybrid, "Qwen3NextForCausalLM does not put its keys and values"))
    for base, message in cases:
        model = get_peft_model(base, make_config(task_type="CAUSAL_LM"))
        with pytest.raises(ValueError, match=message):
            save_as_prefix_tuning(model, tmp_path / "prefix")
    assert list(tmp_path.iterdir()) == []


def test_other_tasks_and_existing_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"task_type='SEQ_2_SEQ_LM'.*save_as_prompt_tuning"):
        save_as_prefix_tuning(get_peft_model(tiny_t5(), make_config()), tmp_path / "prefix")
    model = prompted(tiny_llama())
    with pytest.raises(ValueError, match="There is no adapter 'x'"):
        save_as_prefix_tuning(model, tmp_path / "prefix", adapter_name="x")
    save_as_prefix_tuning(model, tmp_path / "prefix")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_as_prefix_tuning(model, tmp_path / "prefix")
    save_as_prefix_tuning(model, tmp_path / "prefix", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["prefix"]
