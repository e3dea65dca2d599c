"""`PromptCache`: a prompt's keys and values in a frozen causal model, reused until a weight changes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ..compat import cache_name
from .base_model import accepts


class PromptCache:
    """Keys and values of one prompt.

    In a causal model they do not depend on the text that follows, so every batch can continue from them.
    """

    def __init__(self) -> None:
        self._cache: Any = None
        self._made_from: tuple[Tensor, tuple[tuple[int, int, int], ...]] | None = None

    def for_batch(self, base_model: Any, prompt: Tensor, batch_size: int) -> Any:
        """Keys and values for every row, in a new cache that the model may append to.

        Args:
            base_model (`transformers.PreTrainedModel`): The frozen causal model.
            prompt (`torch.Tensor`): `[P, H]`, as the model sees it.
            batch_size (`int`): Rows, `B`.

        Returns:
            `transformers.DynamicCache`: Of length `P`; None if the model keeps anything but keys and values, such as
            the states of recurrent layers.
        """
        from transformers import DynamicCache

        key = tuple((id(t), t.data_ptr(), t._version) for t in (*base_model.parameters(), *base_model.buffers()))
        if self._made_from is None or self._made_from[1] != key or not torch.equal(self._made_from[0], prompt):
            dtype = base_model.get_input_embeddings().weight.dtype
            few = {"logits_to_keep": 1} if accepts(base_model, "logits_to_keep") else {}
            outputs = base_model(inputs_embeds=prompt.to(dtype).unsqueeze(0), use_cache=True, **few)
            self._cache, self._made_from = outputs.get(cache_name()), (prompt.clone(), key)
        kinds = {type(layer).__name__ for layer in getattr(self._cache, "layers", ())}
        if type(self._cache) is not DynamicCache or kinds - {"DynamicLayer", "DynamicSlidingWindowLayer"}:
            return None
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(batch_size)
        return cache
