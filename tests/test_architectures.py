"""A prompt of words is those words, on every architecture: right, or refused by name, and never silently wrong."""

import functools

import oracle
import pytest
import torch
import zoo
from hosts import skip_before
from peft import PeftModel, get_peft_model
from transformers import EsmConfig, EsmForTokenClassification

from peft_residual import ResidualPromptTuningConfig
from peft_residual.peft_model.base_model import SWITCH, check_reads_embeddings


pytestmark = skip_before((5, 23), "other models and other ways to generate: not compared yet")

# One member of each family: rotary, absolute and relative positions, sliding windows, experts, state spaces, hybrids,
# multi-query attention, classes that generate from ids alone, encoder-decoder and bidirectional models.
FAMILIES = {
    "CAUSAL_LM": (
        "llama gpt2 opt bloom mistral gemma2 gemma3_text qwen3_moe mixtral mamba mamba2 falcon_h1 jamba lfm2 bamba "
        "nemotron_h gpt_bigcode ctrl openai-gpt xlnet mllama deepseek_v3 rwkv bert"
    ).split(),
    "SEQ_2_SEQ_LM": "t5 bart led pegasus prophetnet umt5 fsmt".split(),
    "SEQ_CLS": "bert roberta distilbert longformer llama xlnet".split(),
    "TOKEN_CLS": "bert roberta deberta-v2 longformer".split(),
    "QUESTION_ANS": "bert roberta electra".split(),
}
CASES = [
    pytest.param(kind, name, task, id=f"{task}-{kind}", marks=() if kind in FAMILIES[task] else pytest.mark.full)
    for task in zoo.MAPPINGS
    for kind, name in zoo.members(task)
    if kind not in zoo.NOT_BUILT[task]
]


@pytest.mark.parametrize(("kind", "name", "task"), CASES)
def test_a_prompt_of_words_is_those_words(kind, name, task):
    found = oracle.verdicts(zoo.build(kind, name), task)
    for check, (verdict, message) in found.items():
        assert verdict in (oracle.RIGHT, oracle.REFUSED, oracle.NOT_APPLICABLE), f"{check}: {verdict} {message}"
    assert found["build"][0] == oracle.REFUSED or found["forward"][0] == oracle.RIGHT


def test_every_family_is_a_member_of_the_zoo():
    for task, kinds in FAMILIES.items():
        assert set(kinds) <= dict(zoo.members(task)).keys() - zoo.NOT_BUILT[task]


# --- models that read ids


def gemma3n():
    return zoo.build("gemma3n_text", "Gemma3nForCausalLM")


def esm(token_dropout=True):
    sizes = {name: zoo.SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "pad_token_id")}
    layers = {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "mask_token_id": 3,
        "position_embedding_type": "rotary",
    }
    return EsmForTokenClassification(EsmConfig(**sizes, **layers, token_dropout=token_dropout))


READING = {"CAUSAL_LM": gemma3n, "TOKEN_CLS": esm}


@pytest.mark.parametrize("task", READING)
def test_a_model_that_reads_ids_is_refused_unless_the_check_is_off(task, monkeypatch, tmp_path):
    config = functools.partial(ResidualPromptTuningConfig, task_type=task, num_virtual_tokens=2)
    base = READING[task]()
    with pytest.raises(ValueError, match=f"{type(base).__name__} reads the ids .* differ by .*{SWITCH}=0"):
        get_peft_model(base, config())
    monkeypatch.setenv(SWITCH, "0")
    model = get_peft_model(base, config())
    model.save_pretrained(tmp_path)
    monkeypatch.delenv(SWITCH)
    with pytest.raises(ValueError, match="reads the ids"):
        PeftModel.from_pretrained(READING[task](), tmp_path)


def test_the_check_keeps_modes_and_random_state():
    base = esm(token_dropout=False).train()
    base.esm.encoder.eval()
    before, state = {name: module.training for name, module in base.named_modules()}, torch.get_rng_state()
    check_reads_embeddings(base)
    assert {name: module.training for name, module in base.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state)
