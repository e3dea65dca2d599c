"""An optimizer with a learning rate for each part of an adapter: prompt, network, heads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ..encoder import ResidualPromptEncoder


def create_residual_optimizer(
    model: PeftModel,
    optimizer_cls: type[torch.optim.Optimizer] = torch.optim.AdamW,
    *,
    learning_rate: float = 0.3,
    encoder_learning_rate: float | None = None,
    modules_to_save_learning_rate: float = 1e-3,
    weight_decay: float = 1e-5,
    encoder_weight_decay: float | None = None,
    **optimizer_kwargs: Any,
) -> torch.optim.Optimizer:
    """Create an optimizer with a parameter group for each part of a residual adapter.

    The defaults are those of Razdaibiedina et al. (2023): AdamW, learning rate 0.3, weight decay 1e-5, and the
    network's own if given. Only parameters that take gradients are in it, each once; biases and norms do not decay.

    Args:
        model ([`~peft.PeftModel`]): With a trainable residual adapter.
        optimizer_cls (`type`): An optimizer class such as `torch.optim.AdamW` or transformers' `Adafactor` (with
            `relative_step=False, scale_parameter=False`).
        learning_rate (`float`): Of the raw prompt. For SUPERPOS, whose raw prompt are weights, give 0.01.
        encoder_learning_rate (`float`, *optional*): Of the network; the prompt's when None. Its own, far smaller, is
            better: `docs/hyperparameters.md` has the measurements.
        modules_to_save_learning_rate (`float`): Of heads that are trained along, which the prompt's would ruin.
        weight_decay (`float`): Of the raw prompt and of heads.
        encoder_weight_decay (`float`, *optional*): Of the network; the prompt's when None.
        optimizer_kwargs: Further arguments of the optimizer class, such as `betas`.

    Returns:
        `torch.optim.Optimizer`: Its groups carry a `name`: `"prompt"`, `"encoder"`, `"modules_to_save"`, the last two
        also followed by `"_no_decay"`. Empty groups are left out. Schedulers scale each group's rate.

    Raises:
        ValueError: If a rate is not positive, a decay is negative, or no residual adapter is trainable.
    """
    rates = {
        "prompt": learning_rate,
        "encoder": learning_rate if encoder_learning_rate is None else encoder_learning_rate,
        "modules_to_save": modules_to_save_learning_rate,
    }
    decays = {
        "prompt": weight_decay,
        "encoder": weight_decay if encoder_weight_decay is None else encoder_weight_decay,
        "modules_to_save": weight_decay,
    }
    for part, rate in rates.items():
        if not rate > 0:
            raise ValueError(
                f"The learning rate of {part!r} must be above 0, got {rate!r}. To freeze it, use "
                "`requires_grad_(False)`."
            )
        if not decays[part] >= 0:
            raise ValueError(f"The weight decay of {part!r} must be at least 0, got {decays[part]!r}.")

    members: dict[str, list[nn.Parameter]] = {}
    for part, name, parameter in _trainable_parts(model):
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves parameters empty
        decaying = part == "prompt" or (len(shape) > 1 and "norm" not in name.lower() and "bias" not in name)
        members.setdefault(part if decaying else f"{part}_no_decay", []).append(parameter)
    if "prompt" not in members:
        raise ValueError(
            f"`model` ({type(model).__name__}) has no residual adapter that is trainable. Build it with "
            "ResidualPromptTuningConfig, or load it with `is_trainable=True` and make it active."
        )
    groups = [
        {
            "params": parameters,
            "name": name,
            "lr": rates[name.removesuffix("_no_decay")],
            "weight_decay": 0.0 if name.endswith("_no_decay") else decays[name],
        }
        for name, parameters in members.items()
    ]
    return optimizer_cls(groups, **optimizer_kwargs)


class ResidualOptimizerFactory:
    """[`create_residual_optimizer`] for the Trainer, without a subclass of it.

    ```python
    Trainer(model, args, optimizer_cls_and_kwargs=(ResidualOptimizerFactory, {"learning_rate": 0.3}), ...)
    ```

    The keyword arguments are those of `create_residual_optimizer`; the Trainer's own `learning_rate` and
    `weight_decay` are not used.
    """

    def __call__(self, model: PeftModel, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimizer of `model`."""
        return create_residual_optimizer(model, **kwargs)


def _trainable_parts(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Each trainable parameter once: the part that it belongs to, its name, itself."""
    encoders = {
        f"{name}.": module for name, module in model.named_modules() if isinstance(module, ResidualPromptEncoder)
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        prefix = next((prefix for prefix in encoders if name.startswith(prefix)), None)
        if prefix is None:
            yield "modules_to_save", name, parameter
        else:
            yield ("prompt" if name == f"{prefix}embedding.weight" else "encoder"), name, parameter
