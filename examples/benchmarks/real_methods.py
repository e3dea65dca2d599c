"""The runs and methods that `real_learning.py` compares, each with four learning rates, a decade apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

from peft_residual import ResidualPromptTuningConfig, create_residual_optimizer


WEIGHT_DECAY = 1e-5
TOKENS = 100  # virtual tokens, where no text determines their number: the usual number of prompt tuning


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        model (`str`): The name of the model's folder, or its Hub id.
        task, method (`str`): Names of a data set and in `METHODS`.
        learning_rate (`float`): One of the method's rates.
        seed (`int`): Seed of the order of training rows and of the initialization.
        rows (`int`): At most this number of rows of validation and test are evaluated.
        steps, batch_size (`int`): Training steps, and rows per step.
    """

    model: str
    task: str
    method: str
    learning_rate: float
    seed: int
    rows: int = 400
    steps: int = 150
    batch_size: int = 8


@dataclass(frozen=True)
class Place:
    """What a config needs to know of the run.

    Args:
        seed (`int`): The run's seed.
        model (`str`): The model's folder or Hub id, also of its tokenizer.
        instruction (`str`): The task's instruction.
        examples (`str`): The instruction, followed by training rows.
    """

    seed: int
    model: str
    instruction: str
    examples: str


def adamw(model: PeftModel, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW over all trainable parameters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=learning_rate, weight_decay=WEIGHT_DECAY)


def residual_adamw(model: PeftModel, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW with one rate for prompt and network, as in the paper."""
    return create_residual_optimizer(model, learning_rate=learning_rate, weight_decay=WEIGHT_DECAY)


def scaled_adamw(model: PeftModel, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW with the recommended proportion of the network's rate to the prompt's."""
    encoder_rate = learning_rate * ENCODER_RATE / PROMPT_RATE
    return create_residual_optimizer(
        model, learning_rate=learning_rate, encoder_learning_rate=encoder_rate, weight_decay=WEIGHT_DECAY
    )


@dataclass(frozen=True)
class Method:
    """One way to adapt the frozen model.

    Args:
        config (`Callable`): Takes the place and returns a PEFT config.
        rates (`tuple`): Learning rates to search.
        optimizer (`Callable`): Takes a model and a learning rate and returns an optimizer.
        fixed_rate (`float`, *optional*): A rate that was chosen on other data: it is reported instead of the best.
    """

    config: Callable[[Place], PeftConfig]
    rates: tuple[float, ...]
    optimizer: Callable[[PeftModel, float], torch.optim.Optimizer] = adamw
    fixed_rate: float | None = None


Init = Callable[[Place], dict[str, Any]]


def vocabulary(place: Place) -> dict[str, Any]:
    """Initialization with sampled rows of the vocabulary."""
    return {"task_type": "CAUSAL_LM", "num_virtual_tokens": TOKENS, "prompt_tuning_init": "SAMPLE_VOCAB"}


def text(place: Place) -> dict[str, Any]:
    """Initialization with the instruction, as long as the instruction."""
    return _text(place, place.instruction)


def examples(place: Place) -> dict[str, Any]:
    """Initialization with the instruction and training rows, as long as they are."""
    return _text(place, place.examples)


def _text(place: Place, text: str) -> dict[str, Any]:
    fields = {
        "task_type": "CAUSAL_LM",
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": text,
        "tokenizer_name_or_path": place.model,
    }
    length = ResidualPromptTuningConfig(num_virtual_tokens=None, **fields).num_virtual_tokens
    return {**fields, "num_virtual_tokens": length}


def prompt_tuning(init: Init) -> Method:
    """PEFT's prompt tuning."""
    return Method(lambda place: PromptTuningConfig(**init(place)), (0.003, 0.03, 0.3, 3.0))


def residual(init: Init, **fields: Any) -> Method:
    """Residual prompt tuning as in the paper, with changed fields."""

    def config(place: Place) -> PeftConfig:
        return ResidualPromptTuningConfig(**init(place), prompt_tuning_init_seed=place.seed, **fields)

    return Method(config, (0.001, 0.01, 0.1, 1.0), residual_adamw)


def scaled(init: Init) -> Method:
    """Residual prompt tuning in units of the embeddings' root mean square, from the initialized rows on."""
    units = {"encoder_scale": None, "encoder_norm_first": True, "encoder_zero_init": True}
    config = residual(init, encoder_hidden_size=128, **units).config
    return Method(config, (0.0015, 0.015, 0.15, 1.5), scaled_adamw, PROMPT_RATE)


PLAIN = "prompt tuning"
PLAIN_TEXT = "prompt tuning, instruction"
PLAIN_EXAMPLES = "prompt tuning, examples"
PAPER = "residual (paper)"
SCALED = "residual, scaled"
SCALED_TEXT = "residual, scaled, instruction"
RECOMMENDED = "residual (recommended)"
# In units of the embeddings; chosen on trec and cr.
PROMPT_RATE, ENCODER_RATE = 0.15, 0.004

# Finished runs are known by these names: a method that changes gets another one.
METHODS = {
    RECOMMENDED: scaled(examples),
    PLAIN: prompt_tuning(vocabulary),
    PLAIN_TEXT: prompt_tuning(text),
    PLAIN_EXAMPLES: prompt_tuning(examples),
    "LoRA": Method(
        lambda place: LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
        (0.0003, 0.003, 0.03, 0.3),
    ),
    SCALED_TEXT: scaled(text),
    SCALED: scaled(vocabulary),
    PAPER: residual(vocabulary),
    "P-tuning": Method(
        lambda place: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS),
        (0.0001, 0.001, 0.01, 0.1),
    ),
    "prefix tuning": Method(
        lambda place: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS),
        (0.001, 0.01, 0.1, 1.0),
    ),
    "SuperPos": residual(vocabulary, encoder_reparameterization_type="SUPERPOS", encoder_hidden_size=128),
}
