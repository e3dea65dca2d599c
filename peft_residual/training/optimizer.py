"""An optimizer with a learning rate for each part of an adapter: prompt embedding, network, trained heads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ..encoder import _LIVE, ResidualPromptEncoder
from ..peft_model.learning_rate import recommended_learning_rates


def create_residual_optimizer(
    model: PeftModel,
    optimizer_cls: type[torch.optim.Optimizer] = torch.optim.AdamW,
    *,
    learning_rate: float | None = None,
    encoder_learning_rate: float | None = None,
    modules_to_save_learning_rate: float = 1e-3,
    weight_decay: float = 1e-5,
    encoder_weight_decay: float | None = None,
    **optimizer_kwargs: Any,
) -> torch.optim.Optimizer:
    """Create an optimizer with a parameter group for each part of a residual adapter.

    AdamW and a weight decay of 1e-5 are those of Razdaibiedina et al. (2023). The optimizer contains every parameter
    that requires a gradient, once, and no other. Biases and norms have no weight decay.

    Args:
        model ([`~peft.PeftModel`]): A model with a trainable residual adapter.
        optimizer_cls (`type`): An optimizer class such as `torch.optim.AdamW` or transformers' `Adafactor` (with
            `relative_step=False, scale_parameter=False`).
        learning_rate (`float`, *optional*): For the prompt embedding. Defaults to what suits the adapter: 0.3 as in
            the paper, 0.01 for `"SUPERPOS"`, 0.15 in units of the model's embeddings (`encoder_scale`).
        encoder_learning_rate (`float`, *optional*): For the network. Defaults to `learning_rate`, in units of the
            embeddings to 0.004 / 0.15 of it. See the measurements in `docs/hyperparameters.md`.
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
    recommended, of_network = _recommended(model)
    if learning_rate is None:
        learning_rate = recommended
    rates = {
        "prompt": learning_rate,
        "encoder": learning_rate * of_network / recommended
        if encoder_learning_rate is None
        else encoder_learning_rate,
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

    def __new__(cls, groups: Any = None, **kwargs: Any) -> Any:
        """With groups of parameters, the optimizer: the Trainer of transformers 4 calls the class, without a model.

        Can go when 5.0 is the oldest transformers.
        """
        if groups is None:
            return super().__new__(cls)
        return create_residual_optimizer(_module_of(groups), **kwargs)  # type: ignore[arg-type]

    def __call__(self, model: PeftModel, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimizer of `model`."""
        return create_residual_optimizer(model, **kwargs)


def _recommended(model: nn.Module) -> tuple[float, float]:
    """The recommended rates of the adapter that is trained."""
    encoders = [module for module in model.modules() if isinstance(module, ResidualPromptEncoder)]
    trained = next((encoder for encoder in encoders if encoder.is_trainable), None)
    return (1.0, 1.0) if trained is None else recommended_learning_rates(trained.config)


def _module_of(groups: list[dict[str, Any]]) -> nn.Module:
    """A module with these parameters: the encoders that own them, and the others."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    encoders = [encoder for encoder in list(_LIVE) if any(encoder.embedding.weight is p for p in parameters)]
    owned = {id(parameter) for encoder in encoders for parameter in encoder.parameters()}
    return nn.ModuleList([*encoders, nn.ParameterList(p for p in parameters if id(p) not in owned)])


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
