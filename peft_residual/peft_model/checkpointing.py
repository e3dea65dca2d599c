"""Lets gradient checkpointing and a shared prompt work together.

transformers runs a checkpointed layer without the cache, since running it again in the backward pass would update the
cache a second time. The cache here gives the same answer both times, so such layers may read and fill it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import DynamicLayer, GradientCheckpointingLayer


def checkpointed_layers(base_model: nn.Module) -> list[nn.Module] | None:
    """The layers that are checkpointed; None if one of them cannot be run with a cache."""
    found = [module for module in base_model.modules() if getattr(module, "gradient_checkpointing", False)]
    layers: list[nn.Module] = [module for module in found if isinstance(module, GradientCheckpointingLayer)]
    # Models have the attribute too, and leave checkpointing to their layers.
    owners = [module for module in found if module not in layers]
    if any(not any(layer in layers for layer in owner.modules()) for owner in owners):
        return None
    for layer in layers:
        function = getattr(layer, "_gradient_checkpointing_func", None)
        # Reentrant checkpoints compute no gradient for the prompt's keys and values.
        is_reentrant = (
            not isinstance(function, functools.partial) or function.keywords.get("use_reentrant") is not False
        )
        if is_reentrant or not hasattr(layer, "_can_checkpoint_with_cache"):
            return None
    return layers


@contextmanager
def with_cache(base_model: nn.Module, layers: list[nn.Module]) -> Iterator[None]:
    """Run checkpointed layers with the cache that the base model is given. Nothing changes without such layers."""
    # Models with this attribute pass no cache to their layers.
    owners = [module for module in base_model.modules() if layers and hasattr(module, "gradient_checkpointing")]
    changes = [(layer, "_can_checkpoint_with_cache", True) for layer in layers]
    changes += [(owner, "gradient_checkpointing", False) for owner in owners if owner not in layers]
    before = [(vars(module), name, vars(module).get(name)) for module, name, _ in changes]
    for module, name, value in changes:
        vars(module)[name] = value
    try:
        yield
    finally:
        for attributes, name, former in before:
            del attributes[name]
            if former is not None:
                attributes[name] = former


class RepeatableLayer(DynamicLayer):
    """One layer's keys and values `[B, heads, length, width]`. Running the model's layer again changes nothing.

    Args:
        keys, values (`torch.Tensor`, *optional*): What is in front of the keys and values of every update, which is
            not kept. Without them the last update is kept.
    """

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        super().__init__()
        self.is_prefix = keys is not None
        if keys is not None and values is not None:
            self.lazy_initialization(keys, keys)
            self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return all keys and values of the layer."""
        if self.is_prefix and self.keys is not None and self.values is not None:
            return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states, value_states
        return key_states, value_states
