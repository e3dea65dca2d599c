"""Reports what a trained prompt consists of: norms, the network's share, distances, the nearest words.

`P` is the number of virtual tokens, `H` the width of the embeddings, `V` the number of rows of the vocabulary, `k` the
number of neighbors.
"""

from __future__ import annotations

import copy
import json
import os
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, PromptTuningConfig
from torch import Tensor, nn

from ..config import ResidualPromptTuningConfig
from ..encoder import ResidualPromptEncoder
from ..peft_model.base_model import special_ids
from ..storage.checkpoint import EMBEDDING_KEY
from ..storage.saved_adapter import read_adapter
from ..word_embeddings import look_up
from .nearest import NearestTokens, check_k, has_embedding, in_parts, nearest_tokens, prompts_of, vocabulary_of


@dataclass(frozen=True)
class PromptReport:
    """What [`inspect_prompt`] found. Tensors are float32, on the CPU.

    Attributes:
        name (`str`): The adapter's name or folder.
        projected (`torch.Tensor`): The projected prompt `[P, H]`.
        embedding (`torch.Tensor`, *optional*): The prompt embedding `[P, H]`. None for plain prompt tuning, and for
            SUPERPOS, where it holds weights.
        norms (`torch.Tensor`): `[P]`, Euclidean norms of the projected tokens.
        embedding_norms (`torch.Tensor`, *optional*): `[P]`.
        network_share (`torch.Tensor`, *optional*): `[P]`, the network's share of each projected token: `‖n‖ / (‖n‖ +
            ‖e‖)` with the network's output `n` and the skip `e` (zero without a skip).
        similarity (`torch.Tensor`): `[P, P]`, cosine similarities of the projected tokens.
        vocabulary_norms (`torch.Tensor`, *optional*): `[V]`, ascending; None without a base model.
        distance_from_initialization (`torch.Tensor`, *optional*): `[P]`, Euclidean, between the prompt embedding (the
            projected prompt if that is None) and its initialization, which is recomputed from the config, its seed and
            the base model.
        initialization_error (`str`, *optional*): Why `distance_from_initialization` is None.
        nearest (`dict`): `nearest["projected"]["cosine"]` and so on; empty without a base model.
    """

    name: str
    projected: Tensor
    embedding: Tensor | None
    norms: Tensor
    embedding_norms: Tensor | None
    network_share: Tensor | None
    similarity: Tensor
    vocabulary_norms: Tensor | None
    distance_from_initialization: Tensor | None
    initialization_error: str | None
    nearest: dict[str, dict[str, NearestTokens]]

    @property
    def norm_ranks(self) -> Tensor | None:
        """`[P]`: the share of the vocabulary with a smaller norm than each token; None without a base model."""
        if self.vocabulary_norms is None:
            return None
        return torch.searchsorted(self.vocabulary_norms, self.norms) / len(self.vocabulary_norms)

    @property
    def vocabulary_norm_quantiles(self) -> dict[str, float] | None:
        """Quantiles of the vocabulary's norms: 0, 0.05, 0.5, 0.95 and 1; None without a base model."""
        if self.vocabulary_norms is None:
            return None
        at = [0.0, 0.05, 0.5, 0.95, 1.0]
        index = (torch.tensor(at) * (len(self.vocabulary_norms) - 1)).round().long()
        return dict(zip(map(str, at), self.vocabulary_norms[index].tolist()))

    def to_dict(self) -> dict[str, Any]:
        """Everything but the prompts themselves, as JSON values; of the vocabulary's norms, the quantiles."""
        return {
            "name": self.name,
            "num_virtual_tokens": len(self.projected),
            "token_dim": self.projected.shape[1],
            "norms": self.norms.tolist(),
            "embedding_norms": _to_list(self.embedding_norms),
            "norm_ranks": _to_list(self.norm_ranks),
            "vocabulary_norm_quantiles": self.vocabulary_norm_quantiles,
            "network_share": _to_list(self.network_share),
            "distance_from_initialization": _to_list(self.distance_from_initialization),
            "initialization_error": self.initialization_error,
            "similarity": self.similarity.tolist(),
            "nearest": {
                prompt: {metric: found.to_dict() for metric, found in of_prompt.items()}
                for prompt, of_prompt in self.nearest.items()
            },
        }

    def to_json(self) -> str:
        """`to_dict` as a JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def __str__(self) -> str:
        """A table for a terminal: one row for each virtual token, a column for everything that is known."""
        off_diagonal = self.similarity - 2 * torch.eye(len(self.similarity))
        numbers: list[tuple[str, Tensor | None, str]] = [
            ("norm", self.norms, "{:.2f}"),
            ("norm rank", self.norm_ranks, "{:.0%}"),
            ("embedding norm", self.embedding_norms, "{:.2f}"),
            ("network share", self.network_share, "{:.0%}"),
            ("from initialization", self.distance_from_initialization, "{:.2f}"),
            ("closest other", off_diagonal.max(dim=1).values if len(self.similarity) > 1 else None, "{:.2f}"),
        ]
        columns = [["token", *map(str, range(len(self.norms)))]]
        columns += [[name, *map(text.format, values.tolist())] for name, values, text in numbers if values is not None]
        columns = [[text.rjust(max(map(len, column))) for text in column] for column in columns]
        for prompt, of_prompt in self.nearest.items():
            found = of_prompt["cosine"]
            pairs = [zip(tokens, values) for tokens, values in zip(found.tokens, found.values.tolist())]
            texts = ["  ".join(f"{token} {value:.2f}" for token, value in row) for row in pairs]
            column = [f"nearest to {prompt} (cosine)", *texts]
            columns.append([text.ljust(max(map(len, column))) for text in column])
        lines = [f"{self.name}: {len(self.projected)} virtual tokens of width {self.projected.shape[1]}"]
        if self.vocabulary_norms is not None:
            count, median = len(self.vocabulary_norms), self.vocabulary_norms.median()
            lines.append(f"Vocabulary: {count:,} rows, median norm {median:.2f}.")
        if self.initialization_error:
            lines.append(f"The distance from the initialization is not known: {self.initialization_error}")
        return "\n".join([*lines, "", *("  ".join(row).rstrip() for row in zip(*columns))])


def inspect_prompt(
    model_or_path: PeftModel | str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    k: int = 5,
    adapter_name: str | None = None,
    **hub_kwargs: Any,
) -> PromptReport:
    """Report what a residual or plain prompt consists of.

    Args:
        model_or_path ([`~peft.PeftModel`], `str` or `os.PathLike`): A model, or the folder or Hub id of a saved
            adapter. Without a model there is no vocabulary to compare with and no initialization.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The base model's: shows tokens instead of ids, and excludes
            the rows past its end.
        k (`int`): Neighbors of each virtual token.
        adapter_name (`str`, *optional*): A model's adapter; the active one when None.
        hub_kwargs: `revision`, `subfolder`, `token` and the like for a folder or Hub id, as in `from_pretrained`.

    Returns:
        [`PromptReport`]: `print` it, or use `to_dict()`, `to_json()` and its tensors.

    Raises:
        ValueError: If there is no such adapter, it is damaged, or `k` is below 1.
    """
    check_k(k)
    vocabulary_norms, initial, nearest = None, None, {}
    if isinstance(model_or_path, PeftModel):
        model = model_or_path
        name, config, projected, embedding = prompts_of(model, adapter_name)
        nearest = nearest_tokens(model, tokenizer, k, adapter_name=name)
        table: Any = model.word_embeddings
        rows = vocabulary_of(table, tokenizer)
        norms = [look_up(table, part).norm(dim=1) for part in in_parts(rows)]
        vocabulary_norms = torch.cat(norms).sort().values
        initial, initialization_error = _initial_prompt(config, model)
    else:
        saved = read_adapter(model_or_path, **hub_kwargs)
        name, config, projected = str(model_or_path), saved.config, saved.projected.float()
        embedding = saved.state[EMBEDDING_KEY].float() if has_embedding(config) else None
        initialization_error = "it takes the base model."
    unit = nn.functional.normalize(projected, dim=1)
    trained = projected if embedding is None else embedding
    return PromptReport(
        name=name,
        projected=projected,
        embedding=embedding,
        norms=projected.norm(dim=1),
        embedding_norms=None if embedding is None else embedding.norm(dim=1),
        network_share=None if embedding is None else network_share(config, embedding, projected),
        similarity=unit @ unit.T,
        vocabulary_norms=vocabulary_norms,
        distance_from_initialization=None if initial is None else (trained - initial).norm(dim=1),
        initialization_error=initialization_error,
        nearest=nearest,
    )


def network_share(config: Any, embedding: Tensor, projected: Tensor) -> Tensor:
    """The network's share `[P]` of each projected token `[P, H]`, as in [`PromptReport`]."""
    # Without a network the embedding is the projected prompt: all skip.
    has_skip = config.has_skip or torch.equal(embedding, projected)
    skipped = embedding if has_skip else torch.zeros_like(projected)
    added, kept = (projected - skipped).norm(dim=1), skipped.norm(dim=1)
    return added / (added + kept).clamp_min(torch.finfo(added.dtype).tiny)


def _initial_prompt(config: PromptTuningConfig, model: Any) -> tuple[Tensor | None, str | None]:
    """The initialization of the prompt embedding (of the projected prompt if there is none), or None and why not."""
    if not isinstance(config, ResidualPromptTuningConfig):
        return None, "a plain prompt's initialization is not recorded."
    if config.prompt_tuning_init_seed is None and config.prompt_tuning_init not in ("TEXT", "PROMPT"):
        return None, "the config has no `prompt_tuning_init_seed`."
    try:
        encoder = ResidualPromptEncoder(copy.deepcopy(config), model.word_embeddings, special_ids(model.base_model))
    except (ValueError, OSError) as error:  # its tokenizer or its source is missing
        return None, str(error)
    return (encoder.prompt_embedding if has_embedding(config) else encoder.eval().project()).detach(), None


def _to_list(values: Tensor | None) -> list[float] | None:
    return None if values is None else values.tolist()
