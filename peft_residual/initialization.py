"""Ways to start a prompt: small functions, randomness in as a generator, `[P, H]` in float32 on the CPU out.

Letters used below: `P` virtual tokens, `H` width of the embeddings, `V` rows of the embedding table. Where the network
mixes rows of the vocabulary, the start draws those, and `P` is `config.num_initial_rows`. Rows are read by calling the
embedding module, since that is what the model's own inputs go through (some models scale there).
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
from .storage.checkpoint import read_prompt
from .storage.sharded import gathered


Initializer = Callable[[ResidualPromptTuningConfig, nn.Module, torch.Generator], Tensor]

# Rows that BERT and Gemma reserve: never trained, so never a good start.
_UNUSED_TOKEN = re.compile(r"[\[<]unused_?\d+[\]>]")


def register_initialization(name: str) -> Callable[[Initializer], Initializer]:
    """Register a way to start a prompt under a name that `prompt_tuning_init` then accepts.

    The decorated function takes the config, the model's word embedding module and a `torch.Generator`, and returns a
    tensor `[config.total_virtual_tokens, config.token_dim]`. It runs for a new adapter, not for a loaded one.

    Args:
        name (`str`): The value of `prompt_tuning_init`.

    Raises:
        ValueError: If the name is taken by another function.
    """
    return INITIALIZATIONS.add(name)


def initialize_prompt(
    config: ResidualPromptTuningConfig, word_embeddings: nn.Module, generator: torch.Generator
) -> Tensor:
    """Make the rows that a prompt starts from, as `config.prompt_tuning_init` says.

    Returns:
        `torch.Tensor`: `[P, H]`, float32, on the CPU, detached: the raw prompt, or the rows that the network mixes.

    Raises:
        ValueError: If the start cannot be made, or has another shape.
    """
    prompt = INITIALIZATIONS[config.prompt_tuning_init].builder(config, word_embeddings, generator)
    expected = (config.num_initial_rows, config.token_dim)
    if tuple(prompt.shape) != expected:
        raise ValueError(
            f"prompt_tuning_init={config.prompt_tuning_init!r} made a prompt of shape {tuple(prompt.shape)}, expected "
            f"{expected} (virtual tokens, token_dim). Its source must have the width of the model's embeddings."
        )
    return prompt.detach().to("cpu", torch.float32, copy=True)


def most_common_token_ids(texts: Iterable[str], tokenizer: Any, limit: int = 5000) -> list[int]:
    """Count the token ids of texts: what "most common" means for a tokenizer that is not ordered by frequency.

    BERT's WordPiece table, for one, begins with a thousand unused rows. Pass the result as
    `ResidualPromptTuningConfig(prompt_tuning_init_token_ids=...)`.

    Args:
        texts (`Iterable[str]`): Texts of the domain; the training inputs will do.
        tokenizer (`PreTrainedTokenizerBase`): The base model's tokenizer.
        limit (`int`): How many ids to return at most.

    Returns:
        `list[int]`: Distinct ids without special tokens, the most common first; ties by id.

    Raises:
        ValueError: If the texts hold no ordinary token, or `limit` is below 1.
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
        raise ValueError("`texts` holds no ordinary token to count. Give texts of your domain.")
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
    """Start a prompt from distinct rows of the embedding table.

    Lester et al. (2021), section 3.2. The draw is one shuffle of `candidates`, from which excluded rows are passed
    over, so that excluding a row does not change the others that are drawn.

    Args:
        word_embeddings (`torch.nn.Module`): The embedding module of `V` rows; never modified.
        count (`int`): Rows to draw, `P`.
        candidates (`Sequence[int]`): Rows to draw from.
        exclude_ids (`Collection[int]`): Rows never drawn: padding, special and unused tokens.
        generator (`torch.Generator`, *optional*): Source of randomness; the global one when None.
        count_field (`str`): The config field that `count` comes from, for the error message.

    Returns:
        `torch.Tensor`: `[P, H]`, float32, on the CPU, detached.

    Raises:
        ValueError: If fewer than `P` rows remain.
    """
    exclude_ids = set(exclude_ids)
    order = torch.randperm(len(candidates), generator=generator).tolist()
    drawn = [candidates[i] for i in order if candidates[i] not in exclude_ids][:count]
    if len(drawn) < count:
        raise ValueError(
            f"`{count_field}`={count} needs as many distinct rows of the vocabulary, but only {len(drawn)} of "
            f"{len(candidates)} are usable (padding, special and unused ones are not). Lower `{count_field}`, raise "
            "`init_vocab_size`, or use another `prompt_tuning_init`."
        )
    return look_up(word_embeddings, drawn)


def look_up(word_embeddings: nn.Module, token_ids: Sequence[int]) -> Tensor:
    """Read rows through the embedding module: `[len(token_ids), H]`, float32, on the CPU, detached."""
    device = next(word_embeddings.parameters()).device
    with torch.no_grad(), gathered(word_embeddings.parameters()):
        return word_embeddings(torch.tensor(token_ids, device=device)).to("cpu", torch.float32)


def excluded_ids(config: ResidualPromptTuningConfig, word_embeddings: nn.Module) -> set[int]:
    """Rows that no start may draw: the padding row, the model's special ids and, with a tokenizer, all of its own.

    The tokenizer (`config.tokenizer_name_or_path`) adds its special and reserved tokens, and the rows past its end
    that pad the table to a round size.
    """
    ids = set(config.model_special_ids)
    padding = getattr(word_embeddings, "padding_idx", None)
    if padding is not None:
        ids.add(padding)
    if config.tokenizer_name_or_path:
        tokenizer = _tokenizer(config)
        ids.update(tokenizer.all_special_ids)
        ids.update(i for token, i in tokenizer.get_vocab().items() if _UNUSED_TOKEN.fullmatch(token))
        ids.update(range(len(tokenizer), num_rows(word_embeddings)))
    return ids


def num_rows(word_embeddings: nn.Module) -> int:
    """Rows of the embedding table, `V`."""
    return int(getattr(word_embeddings, "num_embeddings", 0)) or next(word_embeddings.parameters()).shape[0]


def _tokenizer(config: ResidualPromptTuningConfig) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **(config.tokenizer_kwargs or {}))


@register_initialization("RANDOM")
def random_uniform(
    config: ResidualPromptTuningConfig, word_embeddings: nn.Module, generator: torch.Generator
) -> Tensor:
    """Uniform in ±0.5 (Lester et al., 2021, section 3.2)."""
    return torch.rand(config.total_virtual_tokens, config.token_dim, generator=generator) - 0.5


@register_initialization("SAMPLE_VOCAB")
def sample_vocabulary(
    config: ResidualPromptTuningConfig, word_embeddings: nn.Module, generator: torch.Generator
) -> Tensor:
    """Distinct rows of the whole table."""
    return _sample(config, word_embeddings, generator, config.num_initial_rows, range(num_rows(word_embeddings)))


@register_initialization("COMMON_VOCAB")
def sample_common_vocabulary(
    config: ResidualPromptTuningConfig, word_embeddings: nn.Module, generator: torch.Generator
) -> Tensor:
    """Distinct rows among the `init_vocab_size` most common ones (Lester et al., 2021, section 3.2: 5,000)."""
    return _sample_common(config, word_embeddings, generator, config.num_initial_rows)


def _sample_common(
    config: ResidualPromptTuningConfig,
    word_embeddings: nn.Module,
    generator: torch.Generator,
    count: int,
    taken: Collection[int] = (),
) -> Tensor:
    rows = num_rows(word_embeddings)
    ids = config.prompt_tuning_init_token_ids
    if ids is not None and max(ids) >= rows:
        raise ValueError(
            f"`prompt_tuning_init_token_ids` holds {max(ids)}, but the model's table has {rows} rows. Count the "
            "ids with the base model's own tokenizer."
        )
    common = list(dict.fromkeys(ids)) if ids is not None else range(rows)
    return _sample(config, word_embeddings, generator, count, common[: config.init_vocab_size], taken)


def _sample(
    config: ResidualPromptTuningConfig,
    word_embeddings: nn.Module,
    generator: torch.Generator,
    count: int,
    candidates: Sequence[int],
    taken: Collection[int] = (),
) -> Tensor:
    return sample_rows(
        word_embeddings,
        count,
        candidates=candidates,
        exclude_ids=excluded_ids(config, word_embeddings) | set(taken),
        generator=generator,
        count_field="encoder_hidden_size" if config.mixes_vocabulary else "num_virtual_tokens",
    )


@register_initialization("TEXT")
def from_text(config: ResidualPromptTuningConfig, word_embeddings: nn.Module, generator: torch.Generator) -> Tensor:
    """The rows of a text, repeated to length as PEFT does; cut, with a warning, if it is longer."""
    count = config.total_virtual_tokens
    ids = _tokenizer(config)(config.prompt_tuning_init_text, add_special_tokens=False)["input_ids"]
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


@register_initialization("CLASS_LABELS")
def from_class_labels(
    config: ResidualPromptTuningConfig, word_embeddings: nn.Module, generator: torch.Generator
) -> Tensor:
    """One row per label word, the mean over its tokens, then common vocabulary (Lester et al., 2021, section 3.2)."""
    tokenizer = _tokenizer(config)
    rows: list[Tensor] = []
    taken: set[int] = set()
    for label in config.prompt_tuning_init_class_labels or []:
        ids = tokenizer(label, add_special_tokens=False)["input_ids"]
        if not ids or tokenizer.unk_token_id in ids:
            raise ValueError(
                f"`prompt_tuning_init_class_labels` holds {label!r}, which the tokenizer does not know. Use another "
                "word."
            )
        rows.append(look_up(word_embeddings, ids).mean(dim=0, keepdim=True))
        if len(ids) == 1:
            taken.update(ids)
    rest = config.total_virtual_tokens - len(rows)
    if rest:
        rows.append(_sample_common(config, word_embeddings, generator, rest, taken))
    return torch.cat(rows)


@register_initialization("PROMPT")
def from_saved_prompt(
    config: ResidualPromptTuningConfig, word_embeddings: nn.Module, generator: torch.Generator
) -> Tensor:
    """A saved prompt as the frozen model saw it, from an adapter's folder or a tensor file; never cut or padded."""
    path = str(config.prompt_tuning_init_state_dict_path)
    prompt, tokens_per_submodule = read_prompt(path)
    # PEFT keeps a second set of rows for the decoder of an encoder-decoder model and never uses it.
    if tokens_per_submodule is not None and config.num_transformer_submodules == 1:
        prompt = prompt[:tokens_per_submodule]
    expected = (config.total_virtual_tokens, config.token_dim)
    if tuple(prompt.shape) != expected:
        raise ValueError(
            f"`prompt_tuning_init_state_dict_path`={path!r} holds a prompt of {prompt.shape[0]} tokens of width "
            f"{prompt.shape[1]}, expected {expected[0]} (`num_virtual_tokens`) of width {expected[1]} (the model's). "
            f"Set num_virtual_tokens={prompt.shape[0]}, and use the base model that the prompt was trained for."
        )
    return prompt
