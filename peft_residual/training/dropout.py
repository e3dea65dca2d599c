"""Disabling the dropout of the frozen base model while a prompt is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

from peft import PeftModel
from torch import nn


class BaseDropoutOff(ExitStack):
    """Keeps the base model's dropout disabled until [`undo`] is called or the `with` block ends.

    Returned by [`disable_base_dropout`].
    """

    def undo(self) -> None:
        """Restore all dropout probabilities."""
        self.close()


def disable_base_dropout(model: PeftModel) -> BaseDropoutOff:
    """Disable the dropout of the frozen base model. The model stays in train mode: gradient checkpointing needs it.

    In `.train()` a frozen model applies dropout too, and the prompt is trained against that noise. Without it,
    residual prompt tuning of T5-base gains from 56.0 to 70.8 points (SuperPos-Prompt, PMLR 262). All probabilities are
    set to 0: those of dropout modules, those that modules pass to functions, and layer drop. The adapter's own
    `encoder_dropout` and the trained heads (`modules_to_save`) keep theirs.

    Args:
        model ([`~peft.PeftModel`]): A model with a prompt; changed in place.

    Returns:
        [`BaseDropoutOff`]: Call `undo()`, or use it as a context manager, to restore the probabilities.

    Raises:
        ValueError: If `model` is not a `PeftModel`.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(f"`model` must be a PeftModel, got {type(model).__name__}. Unwrap it first.")
    disabled = BaseDropoutOff()
    for module, attribute, probability in list(active_dropout(model)):
        setattr(module, attribute, 0.0)
        disabled.callback(setattr, module, attribute, probability)
    return disabled


def active_dropout(model: PeftModel) -> Iterator[tuple[nn.Module, str, float]]:
    """Find all dropout probabilities above 0 in the frozen base model, as (module, attribute, value)."""
    heads = [module for module in model.base_model.modules() if hasattr(module, "modules_to_save")]
    trained = {id(module) for head in heads for module in head.modules()}
    for module in model.base_model.modules():
        if id(module) in trained:
            continue
        names = [name for name in vars(module) if "dropout" in name or name in ("layerdrop", "drop_prob")]
        if isinstance(module, nn.modules.dropout._DropoutNd):
            names = ["p"]
        for name in names:
            value = getattr(module, name)
            if isinstance(value, float) and value > 0:
                yield module, name, value
