"""Masks, positions and the order of columns with a prompt in front of the input.

Pure functions of tensors: `B` rows, `P` the length of the longest prompt, `L` input tokens, `H` the width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base_model import first_position
from .mixed_batch import BatchPrompt


Inputs = dict[str, Any]


def text_of(inputs: Inputs) -> Tensor:
    """The input as it was given: `input_ids` `[B, L]` or `inputs_embeds` `[B, L, H]`."""
    given = inputs.get("input_ids")
    if given is None:
        given = inputs.get("inputs_embeds")
    if given is None:
        raise ValueError("Neither `input_ids` nor `inputs_embeds` was given. Pass one of them.")
    return given


def extend(tensor: Tensor, length: int, value: int | bool, name: str) -> Tensor:
    """Put `length` columns of `value` in front of a `[B, L]` tensor."""
    if not isinstance(tensor, Tensor) or tensor.ndim != 2:
        got = f"shape {list(tensor.shape)}" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
        raise ValueError(f"`{name}` must be a tensor of two dimensions (rows, tokens), got {got}.")
    return torch.cat([tensor.new_full((tensor.shape[0], length), value), tensor], dim=1)


def extend_mask(mask: Tensor, prompt: BatchPrompt) -> Tensor:
    """Put the prompt's own mask in front: `[B, P + L]`."""
    length, filler = prompt.embeds.shape[1], prompt.filler
    extended = extend(mask, length, 1, "attention_mask")
    if filler is not None:
        extended[:, :length].masked_fill_(filler, 0)
    return extended


def extend_positions(position_ids: Tensor, prompt: BatchPrompt) -> Tensor:
    """Count the prompt in front: `[B, P + L]`."""
    rows, length = prompt.embeds.shape[:2]
    own = torch.arange(length, device=position_ids.device).expand(rows, -1)
    if prompt.lengths is None:
        return torch.cat([own, position_ids + length], dim=1)
    lengths = prompt.lengths.unsqueeze(1)
    return torch.cat([(own - length + lengths).clamp(min=0), position_ids + lengths], dim=1)


def positions_of(mask: Tensor) -> Tensor:
    """Positions that count neither padding in front of the text nor gaps in it; same shape as the mask.

    Padding after the text is counted, as transformers' models do it themselves.
    """
    after_text = mask.flip(-1).cumsum(-1).flip(-1) == 0
    skipped = (mask == 0) & ~after_text
    return (torch.arange(mask.shape[1], device=mask.device) - skipped.long().cumsum(-1)).clamp(min=0)


def positions_in(base_model: Any, mask: Tensor) -> Tensor:
    """The `position_ids` `[B, L]` that a decoder-only model would give to the tokens of a mask by itself."""
    return positions_of(mask) + first_position(base_model)


def padding_first(moved: Tensor, length: int) -> Tensor:
    """The order `[B, P + L]` that moves the given tokens `[B, L]` to the front, before the prompt and the rest."""
    return extend(~moved, length, True, "attention_mask").long().argsort(dim=1, stable=True)


def reorder(tensor: Tensor, order: Tensor) -> Tensor:
    """Take columns of a `[B, P + L]` or `[B, P + L, H]` tensor in the given order, row by row."""
    if tensor.ndim == 3:
        order = order.unsqueeze(-1).expand(-1, -1, tensor.shape[-1])
    return tensor.gather(1, order)


def check_position_ids(position_ids: Tensor, mask: Tensor | None) -> None:
    """Raise a `ValueError` for positions that are not `[B, L]`, or that restart within a row."""
    if position_ids.ndim != 2:
        raise ValueError(
            f"`position_ids` must have two dimensions (rows, tokens), got shape {list(position_ids.shape)}. Leave "
            "them out: they are computed from the mask."
        )
    if torch.compiler.is_compiling():
        return
    restarts = position_ids.diff(dim=-1) <= 0
    if mask is not None:
        restarts = restarts & mask[:, 1:].bool() & mask[:, :-1].bool()
    if restarts.any():
        raise ValueError(
            "`position_ids` restart within a row: several texts are packed into it, and only the first would come "
            "after the prompt. Turn packing off (`packing=False`, `padding_free=False`)."
        )
