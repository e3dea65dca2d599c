"""Finds the dropout that a frozen base model applies in train mode."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def active_dropout(base_model: nn.Module) -> Iterator[tuple[nn.Module, str, float]]:
    """Find all dropout probabilities above 0 outside of trained heads, as (module, attribute, value)."""
    heads = [module for module in base_model.modules() if hasattr(module, "modules_to_save")]
    trained = {id(module) for head in heads for module in head.modules()}
    for module in base_model.modules():
        if id(module) in trained:
            continue
        names = [name for name in vars(module) if "dropout" in name or name in ("layerdrop", "drop_prob")]
        if isinstance(module, nn.modules.dropout._DropoutNd):
            names = ["p"]
        for name in names:
            value = getattr(module, name)
            if isinstance(value, float) and value > 0:
                yield module, name, value
