"""The prompts of a batch, and what happens to masks, positions and the order of columns when they stand in front.

Pure functions of tensors: `B` rows, `P` the length of the longest prompt, `L` input tokens, `H` the width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


NO_ADAPTER = "__base__"  # PEFT's name, in `adapter_names`, for a row without an adapter


@dataclass(frozen=True)
class BatchPrompt:
    """The prompts of a batch: `B` rows, `P` the length of the longest prompt, `H` the width.

    Args:
        embeds (`torch.Tensor`): `[B, P, H]`; shorter prompts stand at the end of their row, behind filler.
        lengths (`torch.Tensor`, *optional*): `[B]`, int64, where they differ; None when all have `P`.
        is_shared (`bool`): Whether all rows have the active adapter's prompt.
    """

    embeds: Tensor
    lengths: Tensor | None = None
    is_shared: bool = False

    @property
    def filler(self) -> Tensor | None:
        """Which positions hold no prompt: `[B, P]`, bool; None where all hold one."""
        if self.lengths is None:
            return None
        length = self.embeds.shape[1]
        return torch.arange(length, device=self.embeds.device) < (length - self.lengths).unsqueeze(1)


def extend(tensor: Tensor, length: int, value: int | bool, name: str) -> Tensor:
    """Put `length` columns of `value` in front of a `[B, L]` tensor."""
    if not isinstance(tensor, Tensor) or tensor.ndim != 2:
        got = f"shape {list(tensor.shape)}" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
        raise ValueError(f"`{name}` must be a tensor of two dimensions (rows, tokens), got {got}. Pass it like that.")
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

    Padding behind the text goes on counting, as it does without a mask.
    """
    behind_text = mask.flip(-1).cumsum(-1).flip(-1) == 0
    skipped = (mask == 0) & ~behind_text
    return (torch.arange(mask.shape[1], device=mask.device) - skipped.long().cumsum(-1)).clamp(min=0)


def padding_first(moved: Tensor, length: int) -> Tensor:
    """The order `[B, P + L]` that brings what is moved to the front, before the prompt and the rest."""
    return extend(~moved, length, True, "attention_mask").long().argsort(dim=1, stable=True)


def reorder(tensor: Tensor, order: Tensor) -> Tensor:
    """Take columns of a `[B, P + L]` or `[B, P + L, H]` tensor in the given order, row by row."""
    if tensor.ndim == 3:
        order = order.unsqueeze(-1).expand(-1, -1, tensor.shape[-1])
    return tensor.gather(1, order)


def refuse_packing(position_ids: Tensor, mask: Tensor | None) -> None:
    """Raise a `ValueError` if positions `[B, L]` begin anew within a row."""
    if torch.compiler.is_compiling():
        return
    restarts = position_ids.diff(dim=-1) <= 0
    if mask is not None:
        restarts = restarts & mask[:, 1:].bool() & mask[:, :-1].bool()
    if restarts.any():
        raise ValueError(
            "`position_ids` restart within a row: several texts are packed into it, and only the first would stand "
            "behind the prompt. Turn packing off (`packing=False`, `padding_free=False`)."
        )
