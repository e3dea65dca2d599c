"""Tiny models, a tiny tokenizer and small configs for all tests: built from configs, seeded, without a network."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import settings

from peft_residual import ResidualPromptEncoder, ResidualPromptTuningConfig
from peft_residual.peft_model import causal_lm
from peft_residual.registry import INITIALIZATIONS, REPARAMETERIZATIONS


torch.set_num_threads(1)
for name, count in (("handful", 25), ("full", 500)):
    settings.register_profile(name, deadline=None, derandomize=True, max_examples=count, database=None)

VOCAB_SIZE = 64
WIDTH = 16
PAD, EOS, UNK = 0, 1, 2
SLOW = (
    "test_examples",
    "test_distributed",
    "test_learning",
    "test_architectures",
    "test_compile",
    "test_generation",
    "test_reproduce",
    "test_hub",
    "test_precision",
    "test_text_to_text_training",
    "test_train",
    "test_vocabulary",
    "test_atomic",
    "test_register",
)
BASE = {"vocab_size": VOCAB_SIZE, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": EOS}
WORDS = (
    "good bad great poor red green blue fast slow the a an of to in is was it this that film book song food place "
    "person cat dog bird fish one two three four five six seven eight nine ten yes no maybe up down left right sun"
).split()


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run long repetitions in full, and not a handful of each")


def pytest_configure(config):
    settings.load_profile("full" if config.getoption("--full") else "handful")


def pytest_collection_modifyitems(config, items):
    """Leave out what is marked `full`; run slow files first, so that no worker waits for one at the end.

    `--full` is an option, since `-m "not full"` by default would be lost with `-m gpu`.
    """
    if not config.getoption("--full"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("full")])
        items[:] = [item for item in items if not item.get_closest_marker("full")]
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture
def own_names(monkeypatch):
    """Remove the networks and initializations that a test registers."""
    for registry in (REPARAMETERIZATIONS, INITIALIZATIONS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))


@pytest.fixture
def shared(monkeypatch):
    """One entry for each batch whose rows shared a prompt."""
    calls = []
    original = causal_lm.shared_forward
    monkeypatch.setattr(causal_lm, "shared_forward", lambda *args: calls.append(1) or original(*args))
    return calls


# --- models ---------------------------------------------------------------------------------------------------


def sharpen(model, factor):
    """Scale the random weights up, so that what a model computes depends visibly on its input."""
    embeddings = model.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2 and parameter is not embeddings:
                parameter.mul_(factor)
    return model.eval()


def tiny_t5(**overrides):
    """A T5 (encoder-decoder, relative positions) with random weights, in eval mode."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
    values = {**BASE, **sizes, "decoder_start_token_id": PAD, **overrides}
    return sharpen(T5ForConditionalGeneration(T5Config(**values)), 4.0)


def tiny_gpt2(**overrides):
    """A GPT-2 (decoder, learned positions) with random weights, in eval mode."""
    from transformers import GPT2Config, GPT2LMHeadModel

    values = {**BASE, "n_positions": 64, "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "initializer_range": 0.08}
    return sharpen(GPT2LMHeadModel(GPT2Config(**{**values, **overrides})), 4.0)


def tiny_llama(**overrides):
    """A Llama (decoder, rotary positions, grouped heads) with random weights, in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.08,
    }
    return sharpen(LlamaForCausalLM(LlamaConfig(**{**BASE, **sizes, **overrides})), 4.0)


def tiny_bert(head="SequenceClassification", **overrides):
    """A BERT with random weights, in eval mode; `head` ends the class name, "" is the bare model."""
    import transformers

    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.08,
    }
    values = {**BASE, **sizes, **overrides}
    model_class = getattr(transformers, f"BertFor{head}" if head else "BertModel")
    return sharpen(model_class(transformers.BertConfig(**values)), 4.0)


def tiny_opt(**overrides):
    """An OPT (decoder, learned positions that follow the mask) with random weights, in eval mode."""
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": WIDTH, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "init_std": 0.3}
    return OPTForCausalLM(OPTConfig(**{**BASE, **sizes, **overrides}, word_embed_proj_dim=WIDTH)).eval()


def tiny_bart(**overrides):
    """A BART (encoder-decoder, learned positions) with every kind of dropout, in eval mode."""
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
    dropout = {"attention_dropout": 0.1, "activation_dropout": 0.1, "encoder_layerdrop": 0.3, "decoder_layerdrop": 0.3}
    values = {**BASE, **sizes, **heads, **dropout, "decoder_start_token_id": EOS, **overrides}
    return BartForConditionalGeneration(BartConfig(**values)).eval()


def tiny(architecture, **overrides):
    """A decoder of the Llama family: 2 layers, 4 heads that share 2 keys, in eval mode."""
    import transformers

    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
    }
    config = getattr(transformers, f"{architecture}Config")(**{**BASE, **sizes, **overrides})
    return getattr(transformers, f"{architecture.removesuffix('Text')}ForCausalLM")(config).eval()


# --- tokenizer ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A saved word-level tokenizer of `len(WORDS) + 5` ids: 3 special ones, 2 unused ones, then `WORDS` in order."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<pad>", "</s>", "<unk>", "<unused0>", "[unused1]", *WORDS]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    """The tokenizer of `tokenizer_folder`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="module")
def base_folder(tokenizer, tmp_path_factory):
    """A saved T5 with its tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    tiny_t5().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' : ' + message['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)


@pytest.fixture(scope="session")
def chat_folder(tokenizer_folder, tmp_path_factory):
    """A saved Llama with a tokenizer that has a chat template."""
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("chat")
    tiny_llama().save_pretrained(folder)
    chat_tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    chat_tokenizer.chat_template = CHAT_TEMPLATE
    chat_tokenizer.save_pretrained(folder)
    return str(folder)


# --- configs and encoders -------------------------------------------------------------------------------------


def make_config(**overrides):
    """A small valid config; any field can be set."""
    kind = overrides.get("encoder_reparameterization_type", "MLP1")
    values = {"task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": 4}
    if kind not in ("LSTM1", "LSTM2", "NONE"):
        values["encoder_hidden_size"] = 8  # those have no hidden layer, and refuse the option
    return ResidualPromptTuningConfig(**{**values, **overrides})


def make_table(rows=VOCAB_SIZE, width=WIDTH, padding_idx=None):
    """A random word embedding module."""
    return torch.nn.Embedding(rows, width, padding_idx=padding_idx)


def make_encoder(**overrides):
    """A `ResidualPromptEncoder` of width `token_dim` (16 unless set), initialized from a random table."""
    config = make_config(**{"token_dim": WIDTH, "prompt_tuning_init_seed": 0, **overrides})
    return ResidualPromptEncoder(config, make_table(width=config.token_dim))
