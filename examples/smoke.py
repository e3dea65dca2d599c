"""Run an example in seconds and offline, with a tiny model of random weights and a few generated rows.

    python examples/smoke.py causal_lm.py --output_dir build/smoke

Models and data sets are saved in the layout and with the columns of the real ones. Options after the script's name are
passed on to it.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


GOOD, BAD = ["great", "lovely", "fun", "brilliant"], ["dull", "awful", "slow", "boring"]
THINGS = ["film", "book", "song", "meal", "game", "trip"]
TOPICS = {
    "World": ["war", "vote", "treaty", "president"],
    "Sports": ["match", "goal", "team", "coach"],
    "Business": ["stock", "market", "price", "bank"],
    "Science": ["robot", "planet", "chip", "software"],
}
PEOPLE, FIRMS, PLACES = ["anna smith", "ben", "carla jones", "dan"], ["acme", "globex corp"], ["paris", "new york"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = ["the", "a", "was", "is", "new", "in", "work", "##s", "for", "Topic", ":"]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}


def _tokenizer(folder: Path, **options) -> int:
    """Save a WordPiece tokenizer and return its size. "works" has two tokens."""
    lists = [GOOD, BAD, THINGS, TOPICS, *TOPICS.values(), " ".join(PEOPLE + FIRMS + PLACES).split()]
    vocabulary = dict.fromkeys([*SPECIAL, *WORDS, *(word for words in lists for word in words)])
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    if "cls_token" in options:
        ends = [("[CLS]", 2), ("[SEP]", 3)]
        backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
        **options,
    )
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def tiny_bert(folder: Path) -> str:
    """Save a BERT without a head and its tokenizer, and return the folder."""
    size = _tokenizer(folder, cls_token="[CLS]", sep_token="[SEP]")
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=size, **SIZES)).save_pretrained(folder)
    return str(folder)


def tiny_llama(folder: Path) -> str:
    """Save a Llama and its tokenizer, and return the folder."""
    size = _tokenizer(folder, eos_token="[SEP]")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=size, bos_token_id=None, eos_token_id=3, num_key_value_heads=1, **SIZES)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def tiny_chat_llama(folder: Path) -> str:
    """Save a Llama whose tokenizer has a chat template, and return the folder."""
    tiny_llama(folder)
    turn = "{{ message['role'] + ' : ' + message['content'] + ' [SEP] ' }}"
    template = f"{{% for message in messages %}}{turn}{{% endfor %}}"
    _tokenizer(
        folder, eos_token="[SEP]", chat_template=template + "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    return str(folder)


def embedded_t5(folder: Path) -> str:
    """Return the folder of the embedded model."""
    return str(Path(__file__).parent / "embedded" / "model")


def _splits(make_row, features: Features) -> DatasetDict:
    rng = random.Random(0)
    sizes = {"train": 64, "validation": 32, "test": 32}
    return DatasetDict(
        {name: Dataset.from_list([make_row(rng) for _ in range(n)], features=features) for name, n in sizes.items()}
    )


def reviews() -> DatasetDict:
    """Rows with the columns of SST-2: sentence, label."""

    def row(rng: random.Random) -> dict:
        label = rng.randrange(2)
        return {"sentence": f"the {rng.choice(THINGS)} was {rng.choice([BAD, GOOD][label])}", "label": label}

    return _splits(row, Features({"sentence": Value("string"), "label": ClassLabel(names=["negative", "positive"])}))


def news() -> DatasetDict:
    """Rows with the columns of AG News: text, label."""

    def row(rng: random.Random) -> dict:
        label = rng.randrange(len(TOPICS))
        words = list(TOPICS.values())[label]
        return {"text": f"a new {rng.choice(words)} for the {rng.choice(words)}", "label": label}

    return _splits(row, Features({"text": Value("string"), "label": ClassLabel(names=list(TOPICS))}))


def named_entities() -> DatasetDict:
    """Rows with the columns of CoNLL-2003: tokens, ner_tags."""
    names = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"]

    def row(rng: random.Random) -> dict:
        parts = [(rng.choice(PEOPLE), 1), ("works", 0), ("for", 0), (rng.choice(FIRMS), 3), ("in", 0)]
        tokens, tags = [], []
        for text, tag in [*parts, (rng.choice(PLACES), 5)]:
            words = text.split()
            tokens += words
            tags += [tag, *[tag + 1] * (len(words) - 1)] if tag else [0]
        return {"tokens": tokens, "ner_tags": tags}

    return _splits(row, Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=names))}))


def questions() -> DatasetDict:
    """Rows with a prompt and a completion."""

    def row(rng: random.Random) -> dict:
        good = rng.randrange(2)
        return {"prompt": f"the food was {['bad', 'good'][good]}", "completion": ["rain", "sun"][good]}

    return _splits(row, Features({"prompt": Value("string"), "completion": Value("string")}))


def chats() -> DatasetDict:
    """Conversations of one or two turns."""

    def turn(rng: random.Random) -> list[dict]:
        topic = rng.choice(list(TOPICS))
        question = {"role": "user", "content": f"a new {rng.choice(TOPICS[topic])} Topic :"}
        return [question, {"role": "assistant", "content": topic}]

    message = {"role": Value("string"), "content": Value("string")}
    return _splits(
        lambda rng: {"messages": turn(rng) + turn(rng) * rng.randrange(2)}, Features({"messages": List(message)})
    )


def system_prompt(folder: Path) -> list[str]:
    """Save a text to compress, and return the options to use it."""
    (folder / "system.txt").write_text("the film was great the game was fun " * 3)
    return ["--text", str(folder / "system.txt"), "--num_virtual_tokens", "4", "--text_column", "sentence"]


# For each script: its model, its rows, and its options or what saves files for them.
SCRIPTS = {
    "sequence_classification.py": (tiny_bert, reviews, ["--subset", "default"]),
    "token_classification.py": (tiny_bert, named_entities, []),
    "causal_lm.py": (tiny_llama, news, []),
    "sft.py": (tiny_llama, news, []),
    "finetune.py": (tiny_chat_llama, chats, ["--instruction", "the new Topic :", "--max_new_tokens", "4"]),
    "finetune_seq2seq.py": (embedded_t5, questions, ["--instruction", "the food was", "--max_new_tokens", "4"]),
    "compress_prompt.py": (tiny_llama, reviews, system_prompt),
}


def options(script: str, folder: Path) -> list[str]:
    """Save a tiny model and a few rows for a script to a folder, and return the options to use them."""
    save_model, make_rows, more = SCRIPTS[script]
    model = save_model(folder / "model")
    data, own_rows = folder / "data", script.startswith("finetune")
    for split, rows in make_rows().items():
        rows.to_json(data / f"{split}.jsonl") if own_rows else rows.to_parquet(data / f"{split}.parquet")
    names = {"--train_file": data / "train.jsonl", "--validation_file": data / "validation.jsonl"}
    files = [str(word) for item in names.items() for word in item] if own_rows else ["--dataset", str(data)]
    more = more(folder) if callable(more) else more
    return ["--model", model, *files, "--max_steps", "4", "--batch_size", "8", *more]


def main() -> None:
    script, *given = sys.argv[1:] or [""]
    if script not in SCRIPTS:
        sys.exit(f"There is no script {script!r} to run. Name one of {', '.join(SCRIPTS)}; its options may follow.")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).parent / script), *options(script, Path(folder)), *given]
        sys.exit(subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}).returncode)


if __name__ == "__main__":
    main()
