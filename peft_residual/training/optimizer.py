"""An optimizer with a learning rate for each part of an adapter: prompt embedding, network, trained heads."""

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

    The defaults are those of Razdaibiedina et al. (2023): AdamW, learning rate 0.3, weight decay 1e-5. The optimizer
    contains every parameter that requires a gradient, once, and no other. Biases and norms have no weight decay.

    Args:
        model ([`~peft.PeftModel`]): A model with a trainable residual adapter.
        optimizer_cls (`type`): An optimizer class such as `torch.optim.AdamW` or transformers' `Adafactor` (with
            `relative_step=False, scale_parameter=False`).
        learning_rate (`float`): For the prompt embedding. For `"SUPERPOS"`, which trains mixing weights, use 0.01.
        encoder_learning_rate (`float`, *optional*): For the network. Defaults to `learning_rate`; a far smaller one
            works better, see the measurements in `docs/hyperparameters.md`.
        modules_to_save_learning_rate (`float`): For trained heads; the prompt's learning rate is too high for them.
        weight_decay (`float`): For the prompt embedding and trained heads.
        encoder_weight_decay (`float`, *optional*): For the network. Defaults to `weight_decay`.
        optimizer_kwargs: Further arguments of the optimizer class, such as `betas`.

    Returns:
        `torch.optim.Optimizer`: Each group has a `name`: `"prompt"`, `"encoder"`, `"encoder_no_decay"`,
        `"modules_to_save"` or `"modules_to_save_no_decay"`. Empty groups are left out. A learning rate scheduler
        scales the rate of each group.

    Raises:
        ValueError: If a learning rate is not positive, a weight decay is negative, or no residual adapter is
            trainable.
    """
    rates = {
        "prompt": learning_rate,
        "encoder": learning_rate if encoder_learning_rate is None else encoder_learning_rate,
        "modules_to_save": modules_to_save_learning_rate,
    }
    encoder_decay = weight_decay if encoder_weight_decay is None else encoder_weight_decay
    decays = {"prompt": weight_decay, "encoder": encoder_decay, "modules_to_save": weight_decay}
    for part, rate in rates.items():
        if not rate > 0:
            raise ValueError(
                f"The learning rate of {part!r} must be above 0, got {rate!r}. To freeze a part, call "
                "`requires_grad_(False)` on it."
            )
        if not decays[part] >= 0:
            raise ValueError(f"The weight decay of {part!r} must be at least 0, got {decays[part]!r}.")

    groups: dict[str, dict[str, Any]] = {}
    for part, name, parameter in _trainable_parameters(model):
        shape = getattr(parameter, "ds_shape", parameter.shape)  # under ZeRO-3 the parameter itself is empty
        decays_too = part == "prompt" or (len(shape) > 1 and "norm" not in name.lower() and "bias" not in name)
        group, decay = (part, decays[part]) if decays_too else (f"{part}_no_decay", 0.0)
        settings = {"params": [], "name": group, "lr": rates[part], "weight_decay": decay}
        groups.setdefault(group, settings)["params"].append(parameter)
    if "prompt" not in groups:
        raise ValueError(
            f"`model` ({type(model).__name__}) has no residual adapter that is trainable. Build it with "
            "ResidualPromptTuningConfig, or load it with `is_trainable=True` and make it active."
        )
    return optimizer_cls(list(groups.values()), **optimizer_kwargs)


class ResidualOptimizerFactory:
    """Lets a Trainer use [`create_residual_optimizer`] without subclassing it.

    ```python
    Trainer(model, args, optimizer_cls_and_kwargs=(ResidualOptimizerFactory, {"learning_rate": 0.3}), ...)
    ```

    The keyword arguments are those of `create_residual_optimizer`. The Trainer's own `learning_rate` and
    `weight_decay` are not used.
    """

    def __call__(self, model: PeftModel, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimizer of `model`."""
        return create_residual_optimizer(model, **kwargs)


def _trainable_parameters(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yield the part, the name and the tensor of each trainable parameter."""
    encoders = [name for name, module in model.named_modules() if isinstance(module, ResidualPromptEncoder)]
    embeddings = {f"{encoder}.embedding.weight" for encoder in encoders}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name in embeddings:
            yield "prompt", name, parameter
        elif any(name.startswith(f"{encoder}.") for encoder in encoders):
            yield "encoder", name, parameter
        else:
            yield "modules_to_save", name, parameter
