"""The runs and methods that `real_learning.py` compares, each with four learning rates around its published one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

from peft_residual import ResidualPromptTuningConfig, create_residual_optimizer


WEIGHT_DECAY = 1e-5
TOKENS = 10  # virtual tokens, where no text determines their number


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        task, method (`str`): Names of a data set and in `METHODS`.
        learning_rate (`float`): One of the method's rates.
        seed (`int`): Seed of the order of training rows and of the initialization.
        steps, batch_size (`int`): Training steps, and rows per step.
    """

    task: str
    method: str
    learning_rate: float
    seed: int
    steps: int = 150
    batch_size: int = 8


@dataclass(frozen=True)
class Place:
    """What a config needs to know besides the run.

    Args:
        model (`str`): The model's folder or Hub id, also of its tokenizer.
        instruction (`str`): The text of `prompt_tuning_init="TEXT"`.
        instruction_tokens (`int`): Its number of tokens.
    """

    model: str
    instruction: str
    instruction_tokens: int


def adamw(model: PeftModel, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW over all trainable parameters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=learning_rate, weight_decay=WEIGHT_DECAY)


def residual_adamw(share: float = 1.0) -> Callable[[PeftModel, float], torch.optim.Optimizer]:
    """AdamW whose rate for the network is this share of the prompt's."""

    def optimizer(model: PeftModel, learning_rate: float) -> torch.optim.Optimizer:
        return create_residual_optimizer(
            model,
            learning_rate=learning_rate,
            encoder_learning_rate=share * learning_rate,
            weight_decay=WEIGHT_DECAY,
        )

    return optimizer


@dataclass(frozen=True)
class Method:
    """One way to adapt the frozen model.

    Args:
        config (`Callable`): Takes the run's seed and the place, and returns a PEFT config.
        rates (`tuple`): Learning rates to search.
        optimizer (`Callable`): Takes a model and a learning rate and returns an optimizer.
    """

    config: Callable[[int, Place], PeftConfig]
    rates: tuple[float, ...]
    optimizer: Callable[[PeftModel, float], torch.optim.Optimizer] = field(default=adamw)


def size(tokens: int = TOKENS) -> dict[str, Any]:
    """The fields that all prompt methods have."""
    return {"task_type": "CAUSAL_LM", "num_virtual_tokens": tokens}


def text(place: Place) -> dict[str, Any]:
    """Initialization with the instruction, as long as the instruction."""
    return {
        **size(place.instruction_tokens),
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": place.instruction,
        "tokenizer_name_or_path": place.model,
    }


def vocabulary(place: Place) -> dict[str, Any]:
    """Initialization with sampled rows of the vocabulary."""
    return {**size(), "prompt_tuning_init": "SAMPLE_VOCAB"}


def residual(init: Callable[[Place], dict[str, Any]], rates: tuple[float, ...], share: float, **fields: Any) -> Method:
    """Residual prompt tuning with the given fields."""

    def config(seed: int, place: Place) -> PeftConfig:
        return ResidualPromptTuningConfig(**init(place), prompt_tuning_init_seed=seed, **fields)

    return Method(config, rates, residual_adamw(share))


PLAIN = "prompt tuning"
PLAIN_TEXT = "prompt tuning, text"
PAPER = "residual (paper)"
SCALED = "residual, scaled"
SCALED_TEXT = "residual, scaled, text"

# In units of the embeddings' root mean square: no LayerNorm, which would have a scale of its own.
UNITS = {
    "encoder_scale": None,
    "encoder_hidden_size": 128,
    "encoder_layer_norm": False,
    "encoder_zero_init": True,
}
UNIT_RATES = (0.007, 0.07, 0.7, 7.0)
DECADES = (0.001, 0.01, 0.1, 1.0)

METHODS = {
    PLAIN: Method(lambda seed, place: PromptTuningConfig(**vocabulary(place)), DECADES),
    PLAIN_TEXT: Method(lambda seed, place: PromptTuningConfig(**text(place)), DECADES),
    "P-tuning": Method(lambda seed, place: PromptEncoderConfig(**size()), (0.0001, 0.001, 0.01, 0.1)),
    "prefix tuning": Method(lambda seed, place: PrefixTuningConfig(**size()), DECADES),
    "SuperPos": residual(
        vocabulary, DECADES, 1.0, encoder_reparameterization_type="SUPERPOS", encoder_hidden_size=128
    ),
    PAPER: residual(vocabulary, DECADES, 1.0),
    "residual, per token": residual(vocabulary, DECADES, 1.0, encoder_shared=False, encoder_hidden_size=128),
    SCALED: residual(vocabulary, UNIT_RATES, 1 / 37, **UNITS),
    SCALED_TEXT: residual(text, UNIT_RATES, 1 / 37, **UNITS),
    "LoRA": Method(
        lambda seed, place: LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
        (0.0001, 0.001, 0.01, 0.1),
    ),
}
