"""A warning if the first optimizer step trains a prompt with a learning rate that is far too small for it."""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakSet

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..config import ResidualPromptTuningConfig
from ..encoder import ResidualPromptEncoder


# A prompt that moves by less than this at each step hardly moves: PEFT's own comparison on MetaMathQA has an accuracy
# of 23 % at 1e-3 and of 6 % at 1e-4.
SMALLEST_LEARNING_RATE = 1e-3

_waiting: WeakSet[ResidualPromptEncoder] = WeakSet()  # trainable, and no optimizer step seen yet
_seen: WeakSet[ResidualPromptEncoder] = WeakSet()
_hooks: list[Any] = []


def recommended_learning_rates(config: ResidualPromptTuningConfig) -> tuple[float, float]:
    """Learning rates of prompt and network to start with.

    SuperPos-Prompt (PMLR 262) uses 0.01, Razdaibiedina et al. (2023) use 0.3. In units of the model's embeddings, see
    `docs/hyperparameters.md`.
    """
    if config.mixes_vocabulary:
        return 0.01, 0.01
    return (0.3, 0.3) if config.encoder_scale == 1 else (0.15, 0.004)


def published_learning_rate(config: ResidualPromptTuningConfig) -> str:
    """Where the recommended learning rate of the prompt is from, for messages."""
    rate, _ = recommended_learning_rates(config)
    if config.mixes_vocabulary:
        return f"SuperPos-Prompt (PMLR 262) uses {rate:g}."
    if config.encoder_scale != 1:
        return f"In units of the embeddings (`encoder_scale`), {rate:g} is a good start."
    return f"Razdaibiedina et al. (2023) use {rate:g}."


def watch_learning_rate(encoder: ResidualPromptEncoder) -> None:
    """Check the learning rate at the first step of an optimizer that trains this encoder.

    The Trainer's default is too small, and the first optimizer step is the one place that every trainer and loop goes
    through. The hook is process-wide, as torch has no other, and is removed once it has seen every encoder.
    """
    if encoder in _seen:
        return
    _waiting.add(encoder)
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_check_step))


def _check_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    rates = {
        id(p): group.get("initial_lr", group.get("lr")) for group in optimizer.param_groups for p in group["params"]
    }
    for encoder in list(_waiting):
        prompt = encoder.embedding.weight
        if id(prompt) not in rates:
            continue
        _waiting.discard(encoder)
        _seen.add(encoder)
        rate = rates[id(prompt)]
        if isinstance(rate, float) and rate < SMALLEST_LEARNING_RATE:
            warnings.warn(
                f"A residual prompt is trained with learning rate {rate:g}, which hardly moves it (the Trainer's "
                f"default is 5e-5). Set `learning_rate`; {published_learning_rate(encoder.config)}",
                stacklevel=2,
            )
    if not _waiting and _hooks:
        _hooks.pop().remove()
