"""Disabling the dropout of the frozen base model while a prompt is trained."""

from __future__ import annotations

from contextlib import ExitStack

from peft import PeftModel

from ..peft_model.dropout import active_dropout


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
    for module, attribute, probability in list(active_dropout(model.base_model)):
        setattr(module, attribute, 0.0)
        disabled.callback(setattr, module, attribute, probability)
    return disabled
