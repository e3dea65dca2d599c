"""`distillation_loss`: teaches a prompt to do what a longer one, or the model without one, does."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..peft_model.base_model import accepts, in_eval_mode
from ..peft_model.causal_lm import PeftModelForCausalLM
from ..peft_model.inputs import positions_in


def distillation_loss(
    model: PeftModelForCausalLM,
    inputs: Mapping[str, Tensor],
    *,
    teacher: str | None,
    student: str | None,
) -> Tensor:
    """Mean Kullback-Leibler divergence of one adapter's predictions from another's, in nats per token.

    Both are adapters of one model, and read the same text after their own prompts. The teacher runs in eval mode and
    without gradients, with the [prompt cache][~PeftModelForCausalLM.enable_prompt_cache] if it is on. Afterwards a
    named student is the active adapter.

    Args:
        model (`PeftModelForCausalLM`): With a residual adapter that is active.
        inputs (`Mapping`): `input_ids`, `attention_mask` and `labels` `[B, L]`, as a data collator gives them. The
            predictions of tokens with a label (not -100) are compared.
        teacher, student (`str`, *optional*): Names of adapters; None for the base model without a prompt.

    Returns:
        `torch.Tensor`: A number in float32, with gradients to the student.

    Raises:
        ValueError: If no token behind the first of a row has a label.
    """
    predicts = nn.functional.pad(inputs["labels"][:, 1:] != -100, (0, 1))
    if not predicts.any():
        raise ValueError("`labels` has no label behind the first token of a row, so there is nothing to compare.")
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad(), in_eval_mode(model):
        wanted = _log_probabilities(model, teacher, texts, predicts)
    found = _log_probabilities(model, student, texts, predicts)
    return nn.functional.kl_div(found, wanted, log_target=True, reduction="batchmean")


def _log_probabilities(model: Any, name: str | None, texts: dict[str, Tensor], predicts: Tensor) -> Tensor:
    """Of the whole vocabulary at the positions that predict a token with a label: `[N, V]`, float32."""
    kept = predicts.shape[1] - int(predicts.any(dim=0).long().argmax())  # nothing before them is needed
    options: dict[str, Any] = {"logits_to_keep": kept, "use_cache": False}
    if name is None:  # the base model alone does not compute positions from the mask
        options["position_ids"] = positions_in(model.base_model, texts["attention_mask"])
    elif model.active_adapter != name:
        model.set_adapter(name)
    options = {option: value for option, value in options.items() if accepts(model.base_model, option)}
    with model.disable_adapter() if name is None else contextlib.nullcontext():
        logits = model(**texts, **options).logits
    return logits[:, -kept:][predicts[:, -kept:]].float().log_softmax(-1)
