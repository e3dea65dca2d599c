"""What several exports need: the adapter that is meant, a model without dropout, a comparison of results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from peft import PeftModel, PromptTuningConfig
from torch import Tensor


Config = TypeVar("Config", bound=PromptTuningConfig)


def find_adapter(model: Any, adapter_name: str | None, config_class: type[Config]) -> tuple[str, Config]:
    """Return the name and the config of an adapter, the active one for None, after checking its type.

    Raises:
        ValueError: If there is no such adapter, several are active, or its config is not a `config_class`.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(f"`model` must be a PeftModel, got {type(model).__name__}. Unwrap it first.")
    if adapter_name is None:
        adapter_name = model.active_adapter
        if not isinstance(adapter_name, str):
            raise ValueError(
                f"`adapter_name` is None, and the active adapter is {adapter_name!r}. Name one of "
                f"{sorted(model.peft_config)}."
            )
    config = model.peft_config.get(adapter_name)
    if config is None:
        raise ValueError(f"There is no adapter {adapter_name!r}. The adapters are {sorted(model.peft_config)}.")
    if not isinstance(config, config_class):
        raise ValueError(
            f"Adapter {adapter_name!r} is configured by {type(config).__name__}, expected {config_class.__name__}. "
            "Name another adapter with `adapter_name`."
        )
    return adapter_name, config


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put a model in eval mode, and each module back in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def is_close(found: Tensor, expected: Tensor) -> bool:
    """Whether two results of the same computation differ by no more than rounding explains."""
    tolerance = torch.finfo(expected.dtype).eps ** 0.5
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())
