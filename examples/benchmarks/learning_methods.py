"""The runs and methods that `learning.py` compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from embedded.tasks import MODEL, TASKS
from peft import LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from transformers.optimization import Adafactor

from peft_residual import ResidualPromptTuningConfig, create_residual_optimizer


WEIGHT_DECAY = 1e-5  # as in Razdaibiedina et al. (2023), for all methods


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        task, method (`str`): Names in `TASKS` and `METHODS`.
        learning_rate (`float`): Learning rate of the trained parameters.
        seed (`int`): Seed of the training rows, their order and the initialization.
        tokens (`int`): Number of virtual tokens.
        shots (`int`, *optional*): Training rows per class. None: the task's whole training split.
        init (`str`): `prompt_tuning_init`, for methods that have it.
        steps, batch_size (`int`): Training steps, and rows per step.
    """

    task: str
    method: str
    learning_rate: float
    seed: int
    tokens: int = 10
    shots: int | None = None
    init: str = "SAMPLE_VOCAB"
    steps: int = 200
    batch_size: int = 8


def adamw(model: PeftModel, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW over all trainable parameters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=learning_rate, weight_decay=WEIGHT_DECAY, fused=True)


def residual_adamw(encoder_learning_rate: float | None = None) -> Callable[..., torch.optim.Optimizer]:
    """AdamW with a separate learning rate for the network; None: that of the prompt."""

    def optimizer(model: PeftModel, learning_rate: float) -> torch.optim.Optimizer:
        return create_residual_optimizer(
            model,
            learning_rate=learning_rate,
            encoder_learning_rate=encoder_learning_rate,
            weight_decay=WEIGHT_DECAY,
            fused=True,
        )

    return optimizer


def adafactor(model: PeftModel, learning_rate: float) -> torch.optim.Optimizer:
    """Adafactor with a fixed learning rate."""
    fixed = {"scale_parameter": False, "relative_step": False}
    return create_residual_optimizer(model, Adafactor, learning_rate=learning_rate, weight_decay=WEIGHT_DECAY, **fixed)


def warm_up_and_decay(step: int, steps: int) -> float:
    """Linear warm-up in a tenth of the steps, then linear decay to zero."""
    return min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))


@dataclass(frozen=True)
class Method:
    """One way to adapt the frozen model.

    Args:
        config (`Callable`): Takes a run and returns a PEFT config.
        optimizer (`Callable`): Takes a model and a learning rate and returns an optimizer.
        learning_rate (`float`): The best one on development tasks, for suites with one rate per method.
        schedule (`Callable`, *optional*): Takes the step and the number of steps and returns a factor of the rate.
    """

    config: Callable[[Run], PeftConfig]
    optimizer: Callable[[PeftModel, float], torch.optim.Optimizer] = adamw
    learning_rate: float = 0.3
    schedule: Callable[[int, int], float] | None = None


def _init(run: Run) -> dict[str, Any]:
    """Initialization fields, for the configs of PEFT and of this package."""
    if run.init != "TEXT":
        return {"prompt_tuning_init": run.init}
    text = TASKS[run.task].description
    return {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": text, "tokenizer_name_or_path": str(MODEL)}


def _size(run: Run) -> dict[str, Any]:
    return {"task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": run.tokens}


def prompt_tuning(run: Run) -> PeftConfig:
    """PEFT's prompt tuning, in front of the encoder's input only."""
    return PromptTuningConfig(num_transformer_submodules=1, **_size(run), **_init(run))


def residual(**fields: Any) -> Method:
    """Residual prompt tuning with one learning rate and the given config fields."""

    def config(run: Run) -> PeftConfig:
        return ResidualPromptTuningConfig(prompt_tuning_init_seed=run.seed, **_size(run), **_init(run), **fields)

    return Method(config, residual_adamw())


def at(learning_rate: float, method: Method, **changes: Any) -> Method:
    """Return the method with its best rate on development tasks, and other changes."""
    return replace(method, learning_rate=learning_rate, **changes)


PLAIN = "prompt tuning"
PAPER = "residual (paper)"
ZERO_START = "residual, zero start"
RECOMMENDED = "residual (recommended)"

PER_TOKEN = {"encoder_shared": False, "encoder_hidden_size": 128}
ZERO = {"encoder_hidden_size": 128, "encoder_norm_first": True, "encoder_zero_init": True}

METHODS = {
    PLAIN: at(3.0, Method(prompt_tuning)),
    "P-tuning": at(0.03, Method(lambda run: PromptEncoderConfig(num_transformer_submodules=1, **_size(run)))),
    "prefix tuning": at(0.3, Method(lambda run: PrefixTuningConfig(**_size(run)))),
    "LoRA": at(0.003, Method(lambda run: LoraConfig(task_type="SEQ_2_SEQ_LM", r=8, lora_alpha=16))),
    "SuperPos": at(0.003, residual(encoder_reparameterization_type="SUPERPOS", encoder_hidden_size=128)),
    "network, no residual": at(0.03, residual(encoder_residual=False)),
    PAPER: at(0.3, residual()),
    ZERO_START: at(3.0, residual(**ZERO), optimizer=residual_adamw(0.01)),
    RECOMMENDED: at(0.3, residual(**PER_TOKEN)),
}

# Variations of the network and of the training.
SETTINGS = {
    "shared, M=128": at(0.3, residual(encoder_hidden_size=128)),
    "zero start": at(0.3, residual(**PER_TOKEN, encoder_zero_init=True)),
    "zero start, norm first": at(0.03, residual(**{**ZERO, **PER_TOKEN})),
    "zero start, in units of the embeddings": at(
        0.15, residual(**ZERO, encoder_scale=None), optimizer=residual_adamw(0.004)
    ),
    "network at 0.01": at(3.0, residual(**PER_TOKEN), optimizer=residual_adamw(0.01)),
    "zero start, norm first, network at 0.01": at(
        3.0, residual(**{**ZERO, **PER_TOKEN}), optimizer=residual_adamw(0.01)
    ),
    "warm-up, linear decay": at(0.3, residual(**PER_TOKEN), schedule=warm_up_and_decay),
    "Adafactor": at(0.3, residual(**PER_TOKEN), optimizer=adafactor),
    "prompt tuning, warm-up, linear decay": at(3.0, Method(prompt_tuning), schedule=warm_up_and_decay),
}
METHODS |= SETTINGS
