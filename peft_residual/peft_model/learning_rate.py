"""A warning at the first optimizer step that trains a prompt with a learning rate far too small for it."""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakSet

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..config import ResidualPromptTuningConfig
from ..encoder import ResidualPromptEncoder


# A soft prompt that moves by less than this at each step hardly moves at all: PEFT's own comparison on MetaMathQA has
# 23 % at 1e-3 and 6 % at 1e-4.
SMALLEST_LEARNING_RATE = 1e-3


def published_learning_rate(config: ResidualPromptTuningConfig) -> str:
    """Which learning rate the prompt has in the paper of the config's network, for messages."""
    if config.mixes_vocabulary:
        return "SuperPos-Prompt (PMLR 262) uses 0.01."
    return "Razdaibiedina et al. (2023) use 0.3."


_unseen: WeakSet[ResidualPromptEncoder] = WeakSet()
_hooks: list[Any] = []


def watch_learning_rate(encoder: ResidualPromptEncoder) -> None:
    """Warn at the first step of an optimizer that trains this encoder's prompt at a rate far too small for it.

    The Trainer's default is such a rate. Whichever trainer or loop it is, an optimizer's step is where it shows.
    """
    _unseen.add(encoder)
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_warn_of_small_rates))


def _warn_of_small_rates(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    watched = [encoder for encoder in list(_unseen) if encoder.is_trainable]
    if not watched:
        return
    rates = {
        id(p): group.get("initial_lr", group.get("lr")) for group in optimizer.param_groups for p in group["params"]
    }
    for encoder in watched:
        prompt = encoder.embedding.weight
        if id(prompt) not in rates:
            continue
        _unseen.discard(encoder)
        rate = rates[id(prompt)]
        if isinstance(rate, float) and rate < SMALLEST_LEARNING_RATE:
            warnings.warn(
                f"A residual prompt is trained with learning rate {rate:g}, which hardly moves it (the Trainer's "
                f"default is 5e-5). Set `learning_rate`; {published_learning_rate(encoder.config)}",
                stacklevel=2,
            )
