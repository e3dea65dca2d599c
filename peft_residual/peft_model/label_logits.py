"""Computes logits and loss only at the positions that predict a label.

With labels on a few tokens, the output layer of a model with a large vocabulary costs as much as many of its layers,
and its logits need more memory than all activations. Positions without a label do not change the loss.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from .inputs import Inputs


# Inputs with which the caller has chosen what is computed. TRL's `fused_lm_head` leaves out logits by itself.
_OTHER_CHOICES = ("logits_to_keep", "shift_labels", "fused_lm_head")


def check_label_logits(base_model: Any) -> None:
    """Check that the base model computes its loss with transformers' function, which takes shifted labels.

    Raises:
        ValueError: If it does not, or if it cannot leave out logits.
    """
    from transformers.loss.loss_utils import ForCausalLMLoss

    parameters = inspect.signature(base_model.forward).parameters.values()
    passes_arguments = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    takes_positions = any(parameter.name == "logits_to_keep" for parameter in parameters)
    if not (passes_arguments and takes_positions and getattr(base_model, "loss_function", None) is ForCausalLMLoss):
        raise ValueError(
            f"{type(base_model).__name__} cannot compute logits at labels only: that needs a `forward` with "
            "`logits_to_keep` and transformers' own loss for causal language models. Train it with all logits."
        )


def at_labels(inputs: Inputs) -> Inputs:
    """Ask the base model for logits where any row has a label. Unchanged without labels, or if logits are chosen."""
    labels = inputs.get("labels")
    if labels is None or any(inputs.get(name) is not None for name in _OTHER_CHOICES):
        return inputs
    predicted = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    columns = (predicted != -100).any(dim=0).nonzero().flatten()
    if not len(columns):
        return inputs
    return {**inputs, "logits_to_keep": columns, "shift_labels": predicted[:, columns]}
