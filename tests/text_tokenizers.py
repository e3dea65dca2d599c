"""Small tokenizers of the kinds that differ in what they do at the start of a text."""

import string
import tempfile

import pytest
import transformers
from hosts import TRANSFORMERS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors


BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
CHARACTERS = ["▁", *string.ascii_letters, *string.digits, *string.punctuation]


# Sizes are multiples of 8: kernels take a last, narrower block of columns apart, to other last bits.
def with_ids(words, size):
    """A vocabulary of the words in order, filled up with others."""
    return {word: i for i, word in enumerate([*words, *(f"<unused{i}>" for i in range(size - len(words)))])}


def bytes_tokenizer(tokenizer_class="GPT2Tokenizer", **settings):
    """GPT-2 (OPT with `add_bos_token`), Qwen: 264 ids."""
    ids = with_ids(["<|endoftext|>", *BYTES, "he"], 264)
    if TRANSFORMERS < (5, 0):
        if settings:
            pytest.skip("transformers 4 makes OPT's tokenizer from files only")
        with tempfile.TemporaryDirectory() as folder:
            files = models.BPE(ids, [("h", "e")]).save(folder)
            return getattr(transformers, f"{tokenizer_class}Fast")(*files)
    return getattr(transformers, tokenizer_class)(vocab=ids, merges=[("h", "e")], **settings)


def bytes_behind_a_start_token():
    """Llama 3: a special token starts each text. 264 ids."""
    backend = Tokenizer(models.BPE(with_ids(["<s>", *BYTES], 264), []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    template = processors.TemplateProcessing(
        single="<s>:0 $A:0", pair="<s>:0 $A:0 <s>:1 $B:1", special_tokens=[("<s>", 0)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


def characters_behind_a_space():
    """Llama 2: gives the first word of a text a space, and a word behind a special token none. 104 ids."""
    _skip_without_tables()
    ids = with_ids(["<unk>", "<s>", "</s>", *CHARACTERS, "he"], 104)
    return transformers.LlamaTokenizer(vocab=ids, merges=[("h", "e")])


def characters():
    """Gemma: 104 ids, one of which the class adds."""
    _skip_without_tables()
    ids = with_ids(["<pad>", "<eos>", "<bos>", "<unk>", *CHARACTERS, "he"], 103)
    return transformers.GemmaTokenizer(vocab=ids, merges=[("h", "e")])


def pieces_with_an_end_token():
    """T5: gives each word a space, ends each text with a special token. 104 ids."""
    _skip_without_tables()
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return transformers.T5Tokenizer(vocab=[*special, *((c, -3.0) for c in CHARACTERS)], extra_ids=6)


def _skip_without_tables():
    if TRANSFORMERS < (5, 0):
        pytest.skip("transformers 4 makes this tokenizer from a SentencePiece file only")
