"""Finds the rows of the vocabulary that are nearest to each virtual token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, PromptTuningConfig
from torch import Tensor, nn

from ..config import ResidualPromptTuningConfig
from ..export.prompt_tuning import get_prompt_tensor
from ..export.shared import find_adapter
from ..word_embeddings import look_up, num_rows


METRICS = ("cosine", "euclidean")
_ROWS_AT_ONCE = 8192  # of the vocabulary


@dataclass(frozen=True)
class NearestTokens:
    """The rows of the vocabulary nearest to each virtual token, the nearest first.

    Attributes:
        prompt (`str`): `"embedding"` or `"projected"`.
        metric (`str`): `"cosine"` (similarity, larger is nearer) or `"euclidean"` (distance).
        ids (`torch.Tensor`): `[P, k]`, token ids.
        values (`torch.Tensor`): `[P, k]`, similarities or distances, float32.
        rows (`torch.Tensor`): `[P, k, H]`, the embeddings themselves, float32.
        tokens (`list[list[str]]`): The tokens; `"#7"` for id 7 without a tokenizer.
    """

    prompt: str
    metric: str
    ids: Tensor
    values: Tensor
    rows: Tensor
    tokens: list[list[str]]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the rows, as JSON values."""
        return {"ids": self.ids.tolist(), "values": self.values.tolist(), "tokens": self.tokens}


def nearest_tokens(
    model: PeftModel, tokenizer: Any = None, k: int = 5, *, adapter_name: str | None = None
) -> dict[str, dict[str, NearestTokens]]:
    """Find the rows of the vocabulary nearest to each virtual token (Lester et al., 2021, section 7).

    Rows are what the model's embedding module returns, with its scaling.

    Args:
        model ([`~peft.PeftModel`]): A model with a residual or plain prompt tuning adapter.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The base model's: shows tokens instead of ids, and excludes
            the rows past its end.
        k (`int`): Neighbors of each virtual token.
        adapter_name (`str`, *optional*): The adapter; the active one when None.

    Returns:
        `dict`: A [`NearestTokens`] each at `["projected"]["cosine"]`, `["projected"]["euclidean"]` and, if the report
        has a prompt embedding, the same at `["embedding"]`.

    Raises:
        ValueError: If there is no such adapter, or `k` is below 1.
    """
    check_k(k)
    _, _, projected, embedding = prompts_of(model, adapter_name)
    prompts = {"projected": projected, **({} if embedding is None else {"embedding": embedding})}
    return nearest_rows(prompts, model.word_embeddings, tokenizer, k)


def nearest_rows(
    prompts: dict[str, Tensor], table: Any, tokenizer: Any, k: int, metrics: tuple[str, ...] = METRICS
) -> dict[str, dict[str, NearestTokens]]:
    """As [`nearest_tokens`], for any prompts `[P, H]` by name, and some of the metrics."""
    vocabulary = vocabulary_of(table, tokenizer)
    nearness: dict[tuple[str, str], list[Tensor]] = {(p, metric): [] for p in prompts for metric in metrics}
    for part in in_parts(vocabulary):
        rows = look_up(table, part)
        unit = nn.functional.normalize(rows, dim=1)
        for name, prompt in prompts.items():
            if "cosine" in metrics:
                nearness[name, "cosine"].append(nn.functional.normalize(prompt, dim=1) @ unit.T)
            if "euclidean" in metrics:
                # Not computed from a matrix product, which is inaccurate for tokens near a row.
                distances = torch.cdist(prompt, rows, compute_mode="donot_use_mm_for_euclid_dist")
                nearness[name, "euclidean"].append(-distances)
    found: dict[str, dict[str, NearestTokens]] = {name: {} for name in prompts}
    for (name, metric), parts in nearness.items():
        values, ids = torch.cat(parts, dim=1).topk(min(k, len(vocabulary)))
        rows = look_up(table, ids.flatten().tolist()).unflatten(0, ids.shape)
        tokens = [_as_tokens(tokenizer, of_token) for of_token in ids.tolist()]
        found[name][metric] = NearestTokens(name, metric, ids, values if metric == "cosine" else -values, rows, tokens)
    return found


def prompts_of(model: PeftModel, adapter_name: str | None) -> tuple[str, PromptTuningConfig, Tensor, Tensor | None]:
    """Name, config, projected prompt and prompt embedding (if there is one) of an adapter."""
    name, config = find_adapter(model, adapter_name, PromptTuningConfig)
    encoder: Any = model.prompt_encoder[name]
    projected = get_prompt_tensor(model, name).detach().float().cpu()
    return name, config, projected, encoder.prompt_embedding.detach().float().cpu() if has_embedding(config) else None


def has_embedding(config: PromptTuningConfig) -> bool:
    """Whether an adapter has a prompt embedding that is comparable to words."""
    return isinstance(config, ResidualPromptTuningConfig) and not config.mixes_vocabulary


def vocabulary_of(word_embeddings: nn.Module, tokenizer: Any) -> range:
    """The rows of the vocabulary to compare with."""
    rows = num_rows(word_embeddings)
    return range(rows if tokenizer is None else min(rows, len(tokenizer)))


def in_parts(vocabulary: range) -> list[range]:
    """The same rows in parts, which limits the memory for comparisons."""
    return [vocabulary[start : start + _ROWS_AT_ONCE] for start in range(0, len(vocabulary), _ROWS_AT_ONCE)]


def _as_tokens(tokenizer: Any, ids: list[int]) -> list[str]:
    if tokenizer is None:
        return [f"#{i}" for i in ids]
    return [str(token) for token in tokenizer.convert_ids_to_tokens(ids)]


def check_k(k: Any) -> None:
    """Raise a `ValueError` unless `k` is an integer of at least 1."""
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"`k` must be an integer of at least 1, got {k!r}.")
