"""The prompts of a batch: the active adapter's for all rows, or, with `adapter_names`, one adapter per row."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from .adapters import ResidualAdapters


NO_ADAPTER = "__base__"  # PEFT's name, in `adapter_names`, for a row without an adapter


@dataclass(frozen=True)
class BatchPrompt:
    """The prompts of a batch: `B` rows, `P` the length of the longest prompt, `H` the width.

    Args:
        embeds (`torch.Tensor`): `[B, P, H]`; shorter prompts are at the end of their row, after filler.
        lengths (`torch.Tensor`, *optional*): `[B]`, int64, if they differ; None if all are `P`.
        is_shared (`bool`): Whether all rows have the active adapter's prompt.
    """

    embeds: Tensor
    lengths: Tensor | None = None
    is_shared: bool = False

    @property
    def filler(self) -> Tensor | None:
        """Which positions are not part of a prompt: `[B, P]`, bool; None if there are none."""
        if self.lengths is None:
            return None
        length = self.embeds.shape[1]
        return torch.arange(length, device=self.embeds.device) < (length - self.lengths).unsqueeze(1)


def mixed_prompt(model: ResidualAdapters, batch_size: int, adapter_names: Sequence[str]) -> BatchPrompt:
    """Each row's prompt by the name of its adapter: residual, merged and plain prompts of any lengths.

    Raises:
        ValueError: If `adapter_names` does not name an adapter, or `"__base__"`, for each row.
    """
    if isinstance(adapter_names, str) or len(adapter_names) != batch_size:
        raise ValueError(
            f"`adapter_names` must be a list of one name for each of the {batch_size} rows, got {adapter_names!r}. "
            f"Use {NO_ADAPTER!r} for rows without an adapter."
        )
    known = {repr(name) for name in (*model.peft_config, NO_ADAPTER)}
    unknown = sorted({repr(name) for name in adapter_names} - known)
    if unknown:
        raise ValueError(
            f"`adapter_names` contains {', '.join(unknown)}, but the adapters are {sorted(model.peft_config)}. Load "
            f"what is missing with `load_adapter`, or use {NO_ADAPTER!r} for rows without an adapter."
        )
    names = list(dict.fromkeys(adapter_names))
    prompts = [_prompt_by_name(model, name) for name in names]
    lengths = [prompt.shape[0] for prompt in prompts]
    table = torch.stack([nn.functional.pad(p, (0, 0, max(lengths) - p.shape[0], 0)) for p in prompts])
    rows = torch.tensor([names.index(name) for name in adapter_names], device=table.device)
    row_lengths = torch.tensor(lengths, device=table.device)[rows]
    return BatchPrompt(table[rows], row_lengths if len(set(lengths)) > 1 else None)


def _prompt_by_name(model: ResidualAdapters, name: str) -> Tensor:
    weight = model.word_embeddings.weight
    if name == NO_ADAPTER:
        return weight.new_zeros(0, weight.shape[1], dtype=torch.float32)
    encoder = model.prompt_encoder[name]
    indices = torch.arange(model.peft_config[name].num_virtual_tokens, device=encoder.embedding.weight.device)
    return encoder(indices).to(weight.device, torch.float32)


@contextmanager
def heads_per_row(model: ResidualAdapters, adapter_names: Sequence[str] | None) -> Iterator[None]:
    """Send each row through its own adapter's trained heads, or through the base model's heads if it has none."""
    handles = []
    if adapter_names is not None:
        hook = functools.partial(_run_per_row, adapter_names)
        wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
        handles = [wrapper.register_forward_hook(hook, with_kwargs=True) for wrapper in wrappers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run_per_row(
    adapter_names: Sequence[str],
    wrapper: ModulesToSaveWrapper,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> Tensor:
    """Forward hook: what the wrapper returns with each row in its own adapter's module."""
    repeats = len(args[0]) // len(adapter_names)  # the beams of a row are adjacent
    names = [name for name in adapter_names for _ in range(repeats)]
    rows: list[Any] = [None] * len(names)
    for name in dict.fromkeys(names):
        own = name in wrapper.modules_to_save
        module = wrapper.modules_to_save[name] if own else wrapper.original_module
        index = [i for i, other in enumerate(names) if other == name]
        for i, row in zip(index, module(args[0][index], *args[1:], **kwargs), strict=True):
            rows[i] = row
    return torch.stack(rows)
