"""Reads the base model's word embeddings: by calling their module, because some models scale their embeddings there.

`V` is the number of rows of the table, `H` their width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .storage.sharded import gathered


def look_up(word_embeddings: nn.Module, token_ids: Sequence[int]) -> Tensor:
    """Read rows through the embedding module: `[len(token_ids), H]`, float32, on the CPU, detached."""
    device = next(word_embeddings.parameters()).device
    with torch.no_grad(), gathered(word_embeddings.parameters()):
        return word_embeddings(torch.tensor(token_ids, device=device)).to("cpu", torch.float32)


def num_rows(word_embeddings: nn.Module) -> int:
    """Rows of the embedding table, `V`."""
    return int(getattr(word_embeddings, "num_embeddings", 0)) or next(word_embeddings.parameters()).shape[0]


def vocabulary_sample(word_embeddings: nn.Module, size: int = 4096) -> Tensor:
    """About `size` rows of the vocabulary at equal distances: `[., H]`, float32, on the CPU, detached."""
    rows = num_rows(word_embeddings)
    return look_up(word_embeddings, range(0, rows, max(1, rows // size)))


def embedding_scale(word_embeddings: nn.Module) -> float:
    """The root mean square of the word embeddings' entries.

    Raises:
        ValueError: If it cannot be measured (weights on the meta device), or is zero or not finite.
    """
    if any(parameter.is_meta for parameter in word_embeddings.parameters()):
        raise ValueError(
            "`encoder_scale`=None measures the base model's word embeddings, which have no weights yet (meta device). "
            "Load the weights first, or set `encoder_scale` to a number."
        )
    scale = vocabulary_sample(word_embeddings).square().mean().sqrt().item()
    if not 0 < scale < math.inf:
        raise ValueError(
            f"`encoder_scale`=None measures the base model's word embeddings, whose root mean square is {scale}. The "
            "base model is damaged or was not loaded."
        )
    return scale
