"""Vocabulary export: an ordinary checkpoint computes behind a prefix string what the live model computes."""

import json
import logging
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_config, tiny, tiny_bart, tiny_bert, tiny_gpt2, tiny_llama, tiny_opt, tiny_t5
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from scenarios import relative_difference
from text_tokenizers import (
    bytes_behind_a_start_token,
    bytes_tokenizer,
    characters,
    characters_behind_a_space,
    pieces_with_an_end_token,
)

from peft_residual import save_as_vocabulary
from peft_residual.peft_model.base_model import SWITCH


P = 4
TEXT = "hello world 1"
DiskUsage = namedtuple("DiskUsage", "total used free")


# --- every kind of model and tokenizer ------------------------------------------------------------------------------


CASES = {  # base model and tokenizer
    "gpt2, tied": (lambda: tiny_gpt2(vocab_size=264, n_positions=128), bytes_tokenizer),
    "llama 2, untied": (lambda: tiny_llama(vocab_size=104), characters_behind_a_space),
    "llama 2, tied, padded": (lambda: tiny_llama(vocab_size=128, tie_word_embeddings=True), characters_behind_a_space),
    "llama 3, untied": (lambda: tiny_llama(vocab_size=264, max_position_embeddings=128), bytes_behind_a_start_token),
    "qwen 2, tied": (lambda: tiny("Qwen2", vocab_size=264, tie_word_embeddings=True), bytes_tokenizer),
    "qwen 3, untied": (lambda: tiny("Qwen3", vocab_size=264), lambda: bytes_tokenizer("Qwen2Tokenizer")),
    "gemma 2, scaled": (lambda: tiny("Gemma2", vocab_size=104, hidden_size=24), characters),
    "gemma 3, scaled": (lambda: tiny("Gemma3Text", vocab_size=104, hidden_size=24), characters),
    "opt": (lambda: tiny_opt(vocab_size=264), lambda: bytes_tokenizer(add_bos_token=True)),
    "phi, bias in the output": (lambda: tiny("Phi", vocab_size=264), bytes_tokenizer),
    "t5, tied, padded": (lambda: tiny_t5(vocab_size=112), pieces_with_an_end_token),
    "t5 v1.1": (lambda: tiny_t5(vocab_size=104, tie_word_embeddings=False), pieces_with_an_end_token),
}


def prompted(base, task_type=None, name="default", rows=P):
    """A residual prompt as far from the vocabulary's rows as training takes it."""
    task_type = task_type or ("SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM")
    config = make_config(task_type=task_type, num_virtual_tokens=rows, prompt_tuning_init_seed=0)
    model = get_peft_model(base, config, adapter_name=name).eval()
    torch.nn.init.normal_(model.prompt_encoder[name].embedding.weight, generator=torch.Generator().manual_seed(5))
    return model


def case(name):
    build, make_tokenizer = CASES[name]
    base, tokenizer = build(), make_tokenizer()
    base.generation_config.eos_token_id = None
    return prompted(base), tokenizer


# Runs in a Python that has no PEFT.
ORDINARY_PROCESS = """
import json, sys
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
def find_all_but_peft(name, path=None, target=None):
    return None if name.split(".")[0] in ("peft", "peft_residual") else find_spec(name, path, target)
PathFinder.find_spec = staticmethod(find_all_but_peft)
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
torch.set_num_threads(1)
for path in sys.argv[2:]:
    seq2seq = AutoConfig.from_pretrained(path).is_encoder_decoder
    model = (AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM).from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    prefix = json.load(open(f"{path}/soft_prompts.json"))["default"]["prefix"]
    ids = tokenizer(prefix + sys.argv[1], return_tensors="pt").input_ids
    start = {"decoder_input_ids": torch.tensor([[0, 5, 6]])} if seq2seq else {}
    with torch.no_grad():
        logits = model(input_ids=ids, **start).logits
    generated = model.generate(ids, max_new_tokens=16, do_sample=False)
    sampled = model.generate(ids, max_new_tokens=50, do_sample=True, temperature=100.0, top_k=0)
    torch.save((ids, logits, generated, sampled), f"{path}/out.pt")
assert "peft" not in sys.modules
"""


def test_logits_and_generations_are_those_of_the_live_model_in_a_process_without_peft(tmp_path):
    expected, exports = {}, {}
    for name in CASES:
        model, tokenizer = case(name)
        ids = tokenizer(TEXT, return_tensors="pt").input_ids
        seq2seq = model.base_model.config.is_encoder_decoder
        start = {"decoder_input_ids": torch.tensor([[0, 5, 6]])} if seq2seq else {}
        with torch.no_grad():
            logits = model(input_ids=ids, **start).logits
        exports[name] = save_as_vocabulary(model, tokenizer, tmp_path / name)
        # Where the new words take padded rows: an untrained model would answer with those.
        taken = [i for i in exports[name].token_ids["default"] if i < logits.shape[-1]] or None
        generated = model.generate(ids, max_new_tokens=16, do_sample=False, suppress_tokens=taken)
        expected[name] = (tokenizer, ids, logits, generated if seq2seq else generated[:, ids.shape[1] :])
    command = [sys.executable, "-c", ORDINARY_PROCESS, TEXT, *(tmp_path / name for name in CASES)]
    subprocess.run(command, check=True)
    for name, (tokenizer, ids, live_logits, live_generated) in expected.items():
        found_ids, logits, generated, sampled = torch.load(tmp_path / name / "out.pt")
        new_ids = exports[name].token_ids["default"]
        assert found_ids[0].tolist() == new_ids + ids[0].tolist(), name
        found, live = logits[..., : len(tokenizer)], live_logits[..., : len(tokenizer)]
        if "scaled" in name:
            assert relative_difference(found, live) <= 1e-6, name
        else:
            assert torch.equal(found, live), name
        if len(live_generated) and live_generated.shape != generated.shape:
            generated, sampled = generated[:, found_ids.shape[1] :], sampled[:, found_ids.shape[1] :]
        assert torch.equal(generated, live_generated), name
        assert not set(sampled.flatten().tolist()) & set(new_ids), name


def test_new_rows_hold_the_prompt_and_nothing_in_the_output_layer(tmp_path):
    model, tokenizer = case("llama 2, tied, padded")
    before = model.base_model.get_input_embeddings().weight.clone()
    export = save_as_vocabulary(model, tokenizer, tmp_path / "out")
    ids = export.token_ids["default"]
    assert ids == [104, 105, 106, 107], "the padded rows serve"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    table, output = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    assert table.shape == output.shape == (128, 16)
    assert torch.equal(table[ids], model.prompt_encoder["default"]())
    assert not output[ids].any()
    assert torch.equal(table[:104], before[:104]) and torch.equal(output[:104], before[:104])
    # The model and the tokenizer that were given are what they were.
    assert torch.equal(model.base_model.get_input_embeddings().weight, before)
    assert model.base_model.config.tie_word_embeddings and model.base_model.generation_config.suppress_tokens is None
    assert len(tokenizer) == 104


def test_engines_are_told_not_to_generate_the_new_words(tmp_path):
    model, tokenizer = case("gpt2, tied")
    model.base_model.generation_config.suppress_tokens = [7]
    export = save_as_vocabulary(model, tokenizer, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings["suppress_tokens"] == [7, 264, 265, 266, 267]
    bias = json.loads((tmp_path / "out" / "logit_bias.json").read_text())
    assert bias == export.logit_bias == {"264": -100, "265": -100, "266": -100, "267": -100}


def test_several_prompts_are_chosen_by_their_prefixes(tmp_path):
    build, make_tokenizer = CASES["llama 3, untied"]
    tokenizer, model = make_tokenizer(), prompted(build(), name="long", rows=6)
    model.add_adapter("plain", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match=r"spells \['<task_0>', '<task_1>'\].*\{name\}"):
        save_as_vocabulary(model, tokenizer, tmp_path / "out", adapter_names=["long", "plain"])
    export = save_as_vocabulary(
        model, tokenizer, tmp_path / "out", adapter_names=["long", "plain"], token_format="<{name}{i}>"
    )
    assert export.prefixes["plain"] == "<plain0><plain1><s>"
    written = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for name, rows in (("long", 6), ("plain", 2), ("__base__", 0)):
        inputs = words(export.prefixes[name] + TEXT, return_tensors="pt")
        ids = tokenizer(TEXT, return_tensors="pt").input_ids
        with torch.no_grad():
            found = written(**inputs).logits[..., :264]
            if name == "__base__":
                live = model.base_model(input_ids=ids).logits
            else:
                model.set_adapter(name)
                live = model(input_ids=ids).logits
        assert found.shape[1] == rows + ids.shape[1]
        assert torch.equal(found, live), name
    assert words.decode(inputs.input_ids[0], skip_special_tokens=True) == TEXT


@pytest.mark.parametrize("name", ["llama 2, untied", "llama 3, untied", "gemma 3, scaled", "opt", "t5 v1.1"])
def test_a_text_is_tokenized_behind_a_prefix_as_it_is_alone(name, tmp_path):
    model, tokenizer = case(name)
    export = save_as_vocabulary(model, tokenizer, tmp_path / "out")
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("one", "two words", "12.5%", "a\nb", "über", TEXT * 20):
        alone = tokenizer(text).input_ids
        assert words(export.prefixes["default"] + text).input_ids == export.token_ids["default"] + alone
        assert words(export.prefixes["__base__"] + text).input_ids == alone


# --- before anything is written -------------------------------------------------------------------------------------


def test_size_and_room_are_told_before_anything_is_written(tmp_path, caplog):
    model, tokenizer = case("gpt2, tied")
    with caplog.at_level(logging.INFO, logger="peft_residual"):
        export = save_as_vocabulary(model, tokenizer, tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()
    assert f"{export.size:,} bytes to write, {export.free:,} bytes free" in caplog.text
    assert save_as_vocabulary(model, tokenizer, tmp_path / "out").prefixes == export.prefixes
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert 0 <= written - export.size < 4096, "the header"
    base_size = sum(parameter.nbytes for parameter in model.base_model.parameters())
    assert export.size == base_size + 264 * 16 * 4 + 2 * P * 16 * 4, "the output layer apart, and the new rows"


def test_a_disk_without_room_is_refused(tmp_path, monkeypatch):
    model, tokenizer = case("gpt2, tied")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(OSError, match=r"bytes are to be written and the disk has 1,000 free"):
        save_as_vocabulary(model, tokenizer, tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


class ReadsIds(transformers.GPT2LMHeadModel):
    """Makes more of its ids than embeddings."""

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        if input_ids is not None:
            inputs_embeds = self.get_input_embeddings()(input_ids) + input_ids.unsqueeze(-1) * torch.arange(16)
        return super().forward(inputs_embeds=inputs_embeds, **kwargs)


def test_architectures_that_cannot_be_right_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv(SWITCH, "0")
    tokenizer = bytes_tokenizer()
    cases = [
        (
            prompted(tiny_bart(vocab_size=264)),
            "BartForConditionalGeneration cannot have new tokens: its `final_logits_bias`",
        ),
        (prompted(ReadsIds(tiny_gpt2(vocab_size=264).config)), "ReadsIds.*computes other logits"),
        (prompted(tiny_bert("TokenClassification"), "TOKEN_CLS"), "task_type='TOKEN_CLS'"),
    ]
    for model, message in cases:
        with pytest.raises(ValueError, match=message):
            save_as_vocabulary(model, tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments_are_refused(tmp_path):
    model, tokenizer = case("gpt2, tied")
    head = get_peft_model(tiny_gpt2(), make_config(task_type="CAUSAL_LM", modules_to_save=["lm_head"]))

    def save(model=model, **options):
        return lambda: save_as_vocabulary(model, tokenizer, tmp_path / "out", **options)

    cases = [
        (save(head), r"modules_to_save=\['lm_head'\].*cannot select"),
        (save(adapter_names=["x"]), "There is no adapter 'x'"),
        (save(adapter_names=[]), "`adapter_names` is empty"),
        (save(token_format="<task>"), "spells"),
        (save(token_format="he"), "which the tokenizer already has"),
        (save(token_format="<{number}>"), r"may contain only `\{i\}` and `\{name\}`"),
        (save(token_format="{"), "only"),
        (save(model.base_model), "must be a PeftModel"),
        (save(prompted(tiny_gpt2(vocab_size=64))), r"ids up to \d+, and GPT2LMHeadModel has 64 rows"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    assert list(tmp_path.iterdir()) == []


def test_existing_folders_are_replaced_only_when_told_to_and_only_checkpoints(tmp_path):
    model, tokenizer = case("gpt2, tied")
    out = Path(save_as_vocabulary(model, tokenizer, tmp_path / "out").folder)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_as_vocabulary(model, tokenizer, out)
    save_as_vocabulary(model, tokenizer, out, token_format="<new_{i}>", overwrite=True)
    assert "<new_0>" in (out / "soft_prompts.json").read_text()
    (out / "config.json").unlink()
    with pytest.raises(FileExistsError, match=r"has no config\.json"):
        save_as_vocabulary(model, tokenizer, out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
