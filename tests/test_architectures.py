"""A prompt of words is those words, on every architecture: right, or refused by name, and never silently wrong."""

import functools

import oracle
import pytest
import torch
import transformers
import zoo
from hosts import skip_before, skip_where_transformers_fails
from peft import PeftModel, get_peft_model
from transformers import EsmConfig, EsmForTokenClassification

from peft_residual import ResidualPromptTuningConfig
from peft_residual.peft_model.base_model import SWITCH, check_reads_embeddings


# One member of each family: rotary, absolute and relative positions, sliding windows, experts, state spaces, hybrids,
# multi-query attention, classes that generate from ids alone, encoder-decoder and bidirectional models.
FAMILIES = {
    "causal": (
        "llama gpt2 opt bloom mistral gemma2 gemma3_text qwen3_moe mixtral mamba mamba2 falcon_h1 jamba lfm2 bamba "
        "nemotron_h gpt_bigcode doge ctrl openai-gpt bert-generation xlnet gemma3 prophetnet deepseek_v3 rwkv bert"
    ).split(),
    "image-text": "llava qwen2_5_vl mllama paligemma kosmos-2.5 t5gemma2".split(),
    "encoder-decoder": "t5 bart led pegasus prophetnet umt5 fsmt qwen2_audio".split(),
    "sequence": "bert roberta distilbert longformer llama xlnet".split(),
    "token": "bert roberta deberta-v2 longformer".split(),
    "question": "bert roberta electra".split(),
    "base": "bert llama t5 bart".split(),
}
# On older versions, Gemma 3's own cache gives other tokens, and the others end with an error.
ONLY_NEWER = {"bert-generation", "gemma3", "qwen2_5_vl", "qwen2_audio"}
only_newer = skip_before((5, 23), "older versions fail, or are not right themselves")


def marks(group, kind):
    if kind not in FAMILIES[group]:
        return pytest.mark.full
    return only_newer if kind in ONLY_NEWER else ()


CASES = [
    pytest.param(kind, name, group, id=f"{group}-{kind}", marks=marks(group, kind))
    for group in zoo.GROUPS
    for kind, name in zoo.members(group)
    if kind not in zoo.NOT_BUILT[group]
]


@pytest.mark.parametrize(("kind", "name", "group"), CASES)
def test_a_prompt_of_words_is_those_words(kind, name, group):
    with skip_where_transformers_fails():  # sizes of the zoo's models follow the newest configurations
        base = zoo.build(kind, name)
    found = oracle.verdicts(base, zoo.task_type(group, base))
    for check, (verdict, message) in found.items():
        assert verdict in (oracle.RIGHT, oracle.REFUSED, oracle.NOT_APPLICABLE), f"{check}: {verdict} {message}"
    assert found["build"][0] == oracle.REFUSED or found["forward"][0] == oracle.RIGHT


@skip_before((5, 23), "some members of the families are missing")
def test_every_family_is_a_member_of_the_zoo():
    for group, kinds in FAMILIES.items():
        assert set(kinds) <= dict(zoo.members(group)).keys() - zoo.NOT_BUILT[group]


# --- images

IMAGE_TOKENS = {
    "llava": 49,
    "aya_vision": 49,
    "cohere2_vision": 49,
    "deepseek_vl": 196,
    "internvl": 256,
}


@only_newer
@pytest.mark.parametrize("kind", IMAGE_TOKENS)
def test_an_image_is_read_behind_the_prompt(kind):
    base = zoo.build(kind, dict(zoo.members("image-text"))[kind])
    base.config.image_token_id = 90
    base.generation_config.eos_token_id = None
    model = oracle.Oracle(base, "CAUSAL_LM", stock=False).model
    size = base.config.vision_config.image_size
    size = size if isinstance(size, int) else size[0]
    text = torch.tensor([[21] + [90] * IMAGE_TOKENS[kind] + [32, 43, 51]])
    words = torch.cat([torch.tensor([oracle.WORDS]), text], dim=1)
    images = [torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    settings = {"max_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        expected, other = (
            base(input_ids=words, pixel_values=image).logits[:, len(oracle.WORDS) :] for image in images
        )
        found = model(input_ids=text, pixel_values=images[0]).logits[:, len(oracle.WORDS) :]
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, other, rtol=0.01, atol=0.01)
    tokens = base.generate(words, pixel_values=images[0], **settings)[:, words.shape[1] :]
    assert torch.equal(model.generate(text, pixel_values=images[0], **settings)[:, text.shape[1] :], tokens)


# --- models of the wrong kind


@pytest.mark.parametrize(("group", "kind", "other"), [("causal", "llama", "t5"), ("encoder-decoder", "t5", "llama")])
def test_a_task_type_for_another_kind_of_model_is_refused(group, kind, other, tmp_path):
    names = {**dict(zoo.members("causal")), **dict(zoo.members("encoder-decoder"))}
    config = functools.partial(ResidualPromptTuningConfig, task_type=zoo.GROUPS[group][0], num_virtual_tokens=2)
    error = f"task_type='{config.keywords['task_type']}', and .*{'T5' if other == 't5' else 'Llama'}.* Use task_type="
    with pytest.raises(ValueError, match=error):
        get_peft_model(zoo.build(other, names[other]), config())
    get_peft_model(zoo.build(kind, names[kind]), config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=error):
        PeftModel.from_pretrained(zoo.build(other, names[other]), tmp_path)


def test_an_encoder_decoder_model_without_a_head_takes_a_prompt():
    """Its decoder gets ids of its own; heads for classification make them of those of the text, and are refused."""
    names = dict(zoo.members("base"))
    for kind in ("bart", "led", "t5"):
        get_peft_model(zoo.build(kind, names[kind]), ResidualPromptTuningConfig(task_type="FEATURE_EXTRACTION"))


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
    if task == "CAUSAL_LM" and not hasattr(transformers, "Gemma3nForCausalLM"):
        pytest.skip("this transformers has no Gemma 3n")
    base = READING[task]()
    with pytest.raises(ValueError, match=f"{type(base).__name__} reads the ids .* (differ by|fails) .*{SWITCH}=0"):
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
