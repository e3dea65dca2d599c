"""Initializations of the prompt embedding: functions that return `[P, H]`, float32, on the CPU.

`P` is the number of virtual tokens, `H` the width of the embeddings, `V` the number of rows of the embedding table.
For a network that mixes rows of the vocabulary, `P` is the number of these rows (`config.num_initial_rows`). Rows are
read by calling the embedding module, because some models scale their embeddings there.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .config import ResidualPromptTuningConfig
from .registry import INITIALIZATIONS
from .storage.files import read_prompt
from .word_embeddings import look_up, num_rows


Initializer = Callable[..., Tensor]

# Rows that BERT and Gemma reserve: they were never trained.
_UNUSED_TOKEN = re.compile(r"[\[<]unused_?\d+[\]>]")


def register_initialization(name: str, *, samples_vocabulary: bool = False) -> Callable[[Initializer], Initializer]:
    """Register an initialization under a name that `prompt_tuning_init` then accepts.

    The decorated function takes the config, the model's word embedding module and a `torch.Generator`, and returns a
    tensor `[config.total_virtual_tokens, config.token_dim]`. It is called for a new adapter, not for a loaded one.

    Args:
        name (`str`): The value of `prompt_tuning_init`.
        samples_vocabulary (`bool`): Whether the function also takes `exclude_ids`, the set of token ids that it must
            not sample: padding, special and unused tokens.

    Raises:
        ValueError: If the name is taken by another function.
    """
    return INITIALIZATIONS.add(name, samples_vocabulary=samples_vocabulary)


def initialize_prompt(
    config: ResidualPromptTuningConfig,
    word_embeddings: nn.Module,
    generator: torch.Generator,
    special_ids: Collection[int] = (),
) -> Tensor:
    """Initialize the prompt embedding `[P, H]`, float32, as `config.prompt_tuning_init` says.

    `special_ids` are the special token ids of the base model, which are never sampled.

    Raises:
        ValueError: If the prompt cannot be made, or has another shape.
    """
    entry = INITIALIZATIONS[config.prompt_tuning_init]
    options = {}
    if entry.samples_vocabulary:
        options["exclude_ids"] = excluded_ids(config, word_embeddings) | set(special_ids)
    prompt = entry.builder(config, word_embeddings, generator, **options)
    expected = (config.num_initial_rows, config.token_dim)
    if tuple(prompt.shape) != expected:
        raise ValueError(
            f"prompt_tuning_init={config.prompt_tuning_init!r} made a prompt of shape {tuple(prompt.shape)}, expected "
            f"{expected} (virtual tokens, token_dim). Its source must have the width of the model's embeddings."
        )
    return prompt.detach().to("cpu", torch.float32, copy=True)


def random_sources(config: ResidualPromptTuningConfig) -> tuple[torch.Generator, int]:
    """The generator for the prompt embedding, and the seed for the network, of another stream of random numbers."""
    seed = config.prompt_tuning_init_seed
    generator = torch.Generator().manual_seed(torch.initial_seed() if seed is None else seed)
    return generator, int(torch.randint(2**62, (), generator=generator, device="cpu"))


def most_common_token_ids(texts: Iterable[str], tokenizer: Any, limit: int = 5000) -> list[int]:
    """Find the most common token ids of texts, for a tokenizer whose ids are not ordered by frequency.

    BERT's vocabulary, for example, begins with a thousand unused rows. Pass the result as
    `ResidualPromptTuningConfig(prompt_tuning_init_token_ids=...)`.

    Args:
        texts (`Iterable[str]`): Texts of the domain, such as the training inputs.
        tokenizer (`PreTrainedTokenizerBase`): The base model's tokenizer.
        limit (`int`): The largest number of ids to return.

    Returns:
        `list[int]`: Distinct ids without special tokens, the most common first; ties by id.

    Raises:
        ValueError: If the texts contain no ordinary token, or `limit` is below 1.
    """
    if limit < 1:
        raise ValueError(f"`limit` must be an integer of at least 1, got {limit!r}.")
    if isinstance(texts, str):
        raise ValueError("`texts` must be a list of texts, got one string. Put it in a list.")
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(tokenizer(text, add_special_tokens=False)["input_ids"])
    for special in tokenizer.all_special_ids:
        counts.pop(special, None)
    if not counts:
        raise ValueError("`texts` contains no ordinary token to count. Give texts of your domain.")
    return [token_id for token_id, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:limit]]


def sample_rows(
    word_embeddings: nn.Module,
    count: int,
    *,
    candidates: Sequence[int],
    exclude_ids: Collection[int] = (),
    generator: torch.Generator | None = None,
    count_field: str = "num_virtual_tokens",
) -> Tensor:
    """Initialize a prompt with distinct rows of the embedding table.

    Lester et al. (2021), section 3.2. `candidates` is shuffled once and excluded rows are then skipped, so that
    excluding a row does not change which other rows are sampled.

    Args:
        word_embeddings (`torch.nn.Module`): The embedding module of `V` rows; not modified.
        count (`int`): Number of rows to sample, `P`.
        candidates (`Sequence[int]`): Rows to sample from.
        exclude_ids (`Collection[int]`): Rows never sampled: padding, special and unused tokens.
        generator (`torch.Generator`, *optional*): Source of randomness; the global one when None.
        count_field (`str`): The config field that `count` comes from, for the error message.

    Returns:
        `torch.Tensor`: `[P, H]`, float32, on the CPU, detached.

    Raises:
        ValueError: If fewer than `P` rows remain.
    """
    exclude_ids = set(exclude_ids)
    order = torch.randperm(len(candidates), generator=generator).tolist()
    sampled = [candidates[i] for i in order if candidates[i] not in exclude_ids][:count]
    if len(sampled) < count:
        raise ValueError(
            f"`{count_field}`={count} needs as many distinct rows of the vocabulary, but only {len(sampled)} of "
            f"{len(candidates)} are usable (padding, special and unused ones are not). Lower `{count_field}`, raise "
            "`prompt_tuning_init_vocab_size`, or use another `prompt_tuning_init`."
        )
    return look_up(word_embeddings, sampled)


def excluded_ids(config: ResidualPromptTuningConfig, word_embeddings: nn.Module) -> set[int]:
    """Rows that no initialization may sample: the padding row and, with a tokenizer, its special and unused tokens.

    With `config.tokenizer_name_or_path` these are the tokenizer's special and reserved tokens, and the rows past its
    end, which pad the table to a round size.
    """
    ids = set()
    padding = getattr(word_embeddings, "padding_idx", None)
    if padding is not None:
        ids.add(padding)
    if config.tokenizer_name_or_path:
        tokenizer = config.load_tokenizer()
        ids.update(tokenizer.all_special_ids)
        ids.update(i for token, i in tokenizer.get_vocab().items() if _UNUSED_TOKEN.fullmatch(token))
        ids.update(range(len(tokenizer), num_rows(word_embeddings)))
    return ids


@register_initialization("RANDOM")
def random_uniform(
    config: ResidualPromptTuningConfig, word_embeddings: nn.Module, generator: torch.Generator
) -> Tensor:
    """Uniform in ±0.5 (Lester et al., 2021, section 3.2)."""
    return torch.rand(config.total_virtual_tokens, config.token_dim, generator=generator) - 0.5


@register_initialization("SAMPLE_VOCAB", samples_vocabulary=True)
def sample_vocabulary(
    config: ResidualPromptTuningConfig,
    word_embeddings: nn.Module,
    generator: torch.Generator,
    exclude_ids: Collection[int],
) -> Tensor:
    """Distinct rows of the whole table."""
    options = {"candidates": range(num_rows(word_embeddings)), "exclude_ids": exclude_ids, "generator": generator}
    return _sample(config, word_embeddings, config.num_initial_rows, **options)


@register_initialization("COMMON_VOCAB", samples_vocabulary=True)
def sample_common_vocabulary(
    config: ResidualPromptTuningConfig,
    word_embeddings: nn.Module,
    generator: torch.Generator,
    exclude_ids: Collection[int],
) -> Tensor:
    """Distinct rows among the most common ones (Lester et al., 2021, section 3.2: among 5,000)."""
    options = {"candidates": _common_ids(config, word_embeddings), "exclude_ids": exclude_ids, "generator": generator}
    return _sample(config, word_embeddings, config.num_initial_rows, **options)


def _common_ids(config: ResidualPromptTuningConfig, word_embeddings: nn.Module) -> Sequence[int]:
    rows, ids = num_rows(word_embeddings), config.prompt_tuning_init_token_ids
    if ids is not None and max(ids) >= rows:
        raise ValueError(
            f"`prompt_tuning_init_token_ids` contains {max(ids)}, but the model's table has {rows} rows. Count the "
            "ids with the base model's own tokenizer."
        )
    common = range(rows) if ids is None else list(dict.fromkeys(ids))
    return common[: config.prompt_tuning_init_vocab_size]


def _sample(config: ResidualPromptTuningConfig, word_embeddings: nn.Module, count: int, **options: Any) -> Tensor:
    count_field = "encoder_hidden_size" if config.mixes_vocabulary else "num_virtual_tokens"
    return sample_rows(word_embeddings, count, count_field=count_field, **options)


@register_initialization("TEXT")
def from_text(config: ResidualPromptTuningConfig, word_embeddings: nn.Module, generator: torch.Generator) -> Tensor:
    """The rows of a text, repeated to the prompt's length as PEFT does. A longer text is cut, with a warning."""
    count = config.total_virtual_tokens
    ids = config.load_tokenizer()(config.prompt_tuning_init_text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(
            f"`prompt_tuning_init_text`={config.prompt_tuning_init_text!r} has no tokens. Give a text of at least one."
        )
    if len(ids) > count:
        warnings.warn(
            f"`prompt_tuning_init_text` has {len(ids)} tokens, of which the first {count} (`num_virtual_tokens`) are "
            "used. Shorten the text or use more virtual tokens.",
            stacklevel=2,
        )
    return look_up(word_embeddings, [ids[i % len(ids)] for i in range(count)])


@register_initialization("CLASS_LABELS", samples_vocabulary=True)
def from_class_labels(
    config: ResidualPromptTuningConfig,
    word_embeddings: nn.Module,
    generator: torch.Generator,
    exclude_ids: Collection[int],
) -> Tensor:
    """One row per label word, the mean over its tokens, then common vocabulary (Lester et al., 2021, section 3.2)."""
    tokenizer = config.load_tokenizer()
    rows: list[Tensor] = []
    taken: set[int] = set()
    for label in config.prompt_tuning_init_class_labels or []:
        ids = tokenizer(label, add_special_tokens=False)["input_ids"]
        if not ids or tokenizer.unk_token_id in ids:
            raise ValueError(
                f"`prompt_tuning_init_class_labels` contains {label!r}, which the tokenizer does not know. Use "
                "another word."
            )
        rows.append(look_up(word_embeddings, ids).mean(dim=0, keepdim=True))
        if len(ids) == 1:
            taken.update(ids)
    rest = config.total_virtual_tokens - len(rows)
    if rest:
        options = {"candidates": _common_ids(config, word_embeddings), "generator": generator}
        rows.append(_sample(config, word_embeddings, rest, exclude_ids={*exclude_ids, *taken}, **options))
    return torch.cat(rows)


@register_initialization("PROMPT")
def from_saved_prompt(
    config: ResidualPromptTuningConfig, word_embeddings: nn.Module, generator: torch.Generator
) -> Tensor:
    """A saved projected prompt, from an adapter's folder or a tensor file; never cut or padded."""
    path = str(config.prompt_tuning_init_state_dict_path)
    prompt, tokens_per_submodule = read_prompt(path)
    # For encoder-decoder models PEFT keeps a second set of rows, for the decoder, that it never uses.
    if tokens_per_submodule is not None and config.num_transformer_submodules == 1:
        prompt = prompt[:tokens_per_submodule]
    expected = (config.total_virtual_tokens, config.token_dim)
    if tuple(prompt.shape) != expected:
        raise ValueError(
            f"`prompt_tuning_init_state_dict_path`={path!r} contains a prompt of {prompt.shape[0]} tokens of width "
            f"{prompt.shape[1]}, expected {expected[0]} (`num_virtual_tokens`) of width {expected[1]} (the model's). "
            f"Set num_virtual_tokens={prompt.shape[0]}, and use the base model that the prompt was trained for."
        )
    return prompt
