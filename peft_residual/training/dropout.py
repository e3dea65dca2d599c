"""Dropout of the frozen base model: find it, switch it off, put it back."""

from __future__ import annotations

from collections.abc import Iterator

from peft import PeftModel
from torch import nn


class BaseDropoutOff:
    """The frozen model's dropout, switched off until [`undo`] is called or the `with` block ends.

    See [`disable_base_dropout`].
    """

    def __init__(self, changed: list[tuple[nn.Module, str, float]]) -> None:
        self._changed = changed

    def undo(self) -> None:
        """Put every probability back."""
        for module, attribute, probability in self._changed:
            setattr(module, attribute, probability)
        self._changed = []

    def __enter__(self) -> BaseDropoutOff:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()


def disable_base_dropout(model: PeftModel) -> BaseDropoutOff:
    """Switch off the dropout of the frozen base model, which stays in train mode (gradient checkpointing needs that).

    In `.train()` a frozen model drops out too, and a prompt learns against that noise: off, residual prompt tuning of
    T5-base gains from 56.0 to 70.8 points (SuperPos-Prompt, PMLR 262). Both dropout modules and probabilities that a
    module hands to functions are set to 0, layer drop included. The adapter's own `encoder_dropout` and heads that are
    trained along keep theirs.

    Args:
        model ([`~peft.PeftModel`]): A model with a prompt; changed in place.

    Returns:
        [`BaseDropoutOff`]: Call its `undo()`, or use it as a context manager, to put the probabilities back.

    Raises:
        ValueError: If `model` is no `PeftModel`.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(f"`model` must be a PeftModel, got {type(model).__name__}. Unwrap it first.")
    active = list(active_dropout(model))
    for module, name, _ in active:
        setattr(module, name, 0.0)
    return BaseDropoutOff(active)


def active_dropout(model: PeftModel) -> Iterator[tuple[nn.Module, str, float]]:
    """Every probability above 0 at which the frozen base model drops out: module, attribute, value."""
    trained = [module for module in model.base_model.modules() if hasattr(module, "modules_to_save")]
    kept = {id(module) for wrapper in trained for module in wrapper.modules()}
    for module in model.base_model.modules():
        if id(module) in kept:
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd):
            names = ["p"]
        else:
            names = [name for name in vars(module) if "dropout" in name or name in ("layerdrop", "drop_prob")]
        for name in names:
            value = getattr(module, name)
            if isinstance(value, float) and value > 0:
                yield module, name, value
