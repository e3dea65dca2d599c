"""What `learning.py` compares: a run, and the methods that it can be of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from embedded.tasks import MODEL, TASKS
from peft import LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from transformers.optimization import Adafactor

from peft_residual import ResidualPromptTuningConfig, create_residual_optimizer


WEIGHT_DECAY = 1e-5  # of Razdaibiedina et al. (2023), the same for all


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        task, method (`str`): Names in `TASKS` and `METHODS`.
        learning_rate (`float`): Of what the method trains.
        seed (`int`): Of the training rows, their order and the start.
        tokens (`int`): Virtual tokens.
        shots (`int`, *optional*): Training rows per class; the task's own training split when None.
        init (`str`): `prompt_tuning_init`, for methods that start from the vocabulary.
        steps, batch_size (`int`): Training steps and rows in each.
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
    """AdamW over everything that takes gradients."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=learning_rate, weight_decay=WEIGHT_DECAY, fused=True)


def residual_adamw(encoder_learning_rate: float | None = None) -> Callable[..., torch.optim.Optimizer]:
    """AdamW with the network at a rate of its own, whatever the prompt's; at the prompt's when None."""

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
    """Adafactor at a fixed rate, without scaling it by the size of the parameters."""
    fixed = {"scale_parameter": False, "relative_step": False}
    return create_residual_optimizer(model, Adafactor, learning_rate=learning_rate, weight_decay=WEIGHT_DECAY, **fixed)


def warm_up_and_decay(step: int, steps: int) -> float:
    """A tenth of the steps up, the others down to zero, both linearly."""
    return min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))


@dataclass(frozen=True)
class Method:
    """One way to adapt the frozen model.

    Args:
        config (`Callable`): A run in, a PEFT config out.
        optimizer (`Callable`): The model and a learning rate in, an optimizer out.
        learning_rate (`float`): Where a suite tries one only: the best of those tried on development tasks.
        schedule (`Callable`, *optional*): The step and the number of steps in, a factor of the rate out.
    """

    config: Callable[[Run], PeftConfig]
    optimizer: Callable[[PeftModel, float], torch.optim.Optimizer] = adamw
    learning_rate: float = 0.3
    schedule: Callable[[int, int], float] | None = None


def _start(run: Run) -> dict[str, Any]:
    """What says how a prompt starts, for PEFT's class and this package's alike."""
    if run.init != "TEXT":
        return {"prompt_tuning_init": run.init}
    text = TASKS[run.task].description
    return {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": text, "tokenizer_name_or_path": str(MODEL)}


def _size(run: Run) -> dict[str, Any]:
    return {"task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": run.tokens}


def prompt_tuning(run: Run) -> PeftConfig:
    """PEFT's, in front of the encoder's input only."""
    return PromptTuningConfig(num_transformer_submodules=1, **_size(run), **_start(run))


def residual(**fields: Any) -> Method:
    """Residual prompt tuning, all at one learning rate, with fields of its config."""

    def config(run: Run) -> PeftConfig:
        return ResidualPromptTuningConfig(prompt_tuning_init_seed=run.seed, **_size(run), **_start(run), **fields)

    return Method(config, residual_adamw())


def at(learning_rate: float, method: Method, **changes: Any) -> Method:
    """The method with the rate that suited it on development tasks, and other changes."""
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

# Other ways to change the paper's form, and to train.
SETTINGS = {
    "shared, M=128": at(0.3, residual(encoder_hidden_size=128)),
    "zero start": at(0.3, residual(**PER_TOKEN, encoder_zero_init=True)),
    "zero start, norm first": at(0.03, residual(**{**ZERO, **PER_TOKEN})),
    "network at 0.01": at(3.0, residual(**PER_TOKEN), optimizer=residual_adamw(0.01)),
    "zero start, norm first, network at 0.01": at(
        3.0, residual(**{**ZERO, **PER_TOKEN}), optimizer=residual_adamw(0.01)
    ),
    "warm-up, linear decay": at(0.3, residual(**PER_TOKEN), schedule=warm_up_and_decay),
    "Adafactor": at(0.3, residual(**PER_TOKEN), optimizer=adafactor),
    "prompt tuning, warm-up, linear decay": at(3.0, Method(prompt_tuning), schedule=warm_up_and_decay),
}
METHODS |= SETTINGS
