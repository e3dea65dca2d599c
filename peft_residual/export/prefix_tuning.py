"""Saves a causal model's prompt as a prefix tuning adapter: the keys and values that it leaves in the cache."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model_state_dict
from torch import Tensor

from ..compat import cache_name, cache_of, keys_and_values, warn_of_stock_generation
from ..storage import checkpoint
from .prompt_tuning import get_prompt_tensor, write_adapter
from .shared import evaluating, find_adapter, is_close


PROBE_LENGTH = 8


def save_as_prefix_tuning(
    model: PeftModel,
    save_directory: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Save a causal model's prompt as a prefix tuning adapter, which PEFT loads without this package.

    In a causal model the text that follows does not change the prompt's keys and values. So the frozen model runs once
    on the prompt, and the keys and values are the adapter: at inference no prompt is computed. Before anything is
    written, the outputs for a probe text are compared with those after the prompt itself.

    PEFT puts the prefix in front of a row's padding. Its `generate` does not count padding in positions, so each row's
    output is what it is without the other rows. The same holds for `forward` in models that compute positions from the
    mask (OPT, BLOOM). For other models, pass a left-padded batch to `forward` with `position_ids` that do not count
    padding.

    Args:
        model ([`~peft.PeftModel`]): A causal language model with a residual or plain prompt tuning adapter; unchanged.
        save_directory (`str` or `os.PathLike`): The folder to write, completely or not at all: `adapter_config.json`,
            a model card, and `adapter_model.safetensors` with `[P, layers * 2 * key heads * head width]` numbers in
            the model's dtype.
        adapter_name (`str`, *optional*): The adapter; the active one when None.
        overwrite (`bool`): Whether to replace an existing folder.

    Returns:
        `pathlib.Path`: The folder.

    Raises:
        ValueError: If there is no such prompt, the model is not a causal language model, or its cache cannot be PEFT's
            prefix: keys and values differ in shape between layers, depend on the length of the text, or are missing.
        FileExistsError: If `save_directory` exists and `overwrite` is False, or it is not an adapter's folder.
    """
    adapter_name, config = find_adapter(model, adapter_name, PromptTuningConfig)
    if config.task_type != "CAUSAL_LM":
        raise ValueError(
            f"Adapter {adapter_name!r} has task_type={str(config.task_type)!r}; only the prompt of a causal "
            "language model (CAUSAL_LM) can be replaced by its keys and values. Use `save_as_prompt_tuning`."
        )
    warn_of_stock_generation()
    base_model = model.get_base_model()
    _refuse_moving_positions(base_model)
    prompt = get_prompt_tensor(model, adapter_name)
    with evaluating(base_model):
        states = _run_prompt(base_model, prompt)
        _check_equivalence(base_model, prompt, states)
    _warn_of_windows(base_model)
    key_heads, tokens, head_width = states[0].shape[1:]
    prefix_config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=config.base_model_name_or_path or getattr(base_model, "name_or_path", None),
        revision=config.revision,
        inference_mode=True,
        modules_to_save=config.modules_to_save,
        num_virtual_tokens=tokens,
        num_transformer_submodules=1,
        num_layers=len(states) // 2,
        num_attention_heads=key_heads,
        token_dim=key_heads * head_width,
        encoder_hidden_size=key_heads * head_width,
    )
    # PEFT's order: token by token, layer by layer, key before value, head by head.
    flat = torch.stack([tensor[0].transpose(0, 1) for tensor in states], dim=1).reshape(tokens, -1)
    saved = checkpoint.strip(get_peft_model_state_dict(model, adapter_name=adapter_name))
    tensors = {**saved, checkpoint.PROJECTED_KEY: flat.cpu()}
    return write_adapter(save_directory, prefix_config, tensors, trained_as=config, overwrite=overwrite)


@torch.no_grad()
def _run_prompt(base_model: Any, prompt: Tensor) -> list[Tensor]:
    """Key and value of each layer in turn, `[1, key heads, P, head width]`."""
    cache = cache_of(base_model, ())  # without a config: layers with a sliding window keep the whole prompt too
    try:
        outputs = base_model(inputs_embeds=_as_input(base_model, prompt), **{cache_name(): cache}, use_cache=True)
    except (AttributeError, IndexError, TypeError, ValueError) as error:  # a model with its own type of cache
        raise ValueError(
            f"{type(base_model).__name__} does not put its keys and values in transformers' cache ({error}), which "
            "a prefix tuning adapter needs. Use `save_as_prompt_tuning` or `save_as_vocabulary`."
        ) from error
    states = keys_and_values(outputs.get(cache_name(), ()) if cache is None else cache)
    tensors = [state for state in states if isinstance(state, Tensor)]
    shapes = {tuple(tensor.shape) for tensor in tensors}
    layers = base_model.config.get_text_config().num_hidden_layers
    if len(tensors) != 2 * layers or len(shapes) != 1:
        raise ValueError(
            f"{type(base_model).__name__} leaves {len(tensors)} keys and values of shapes {sorted(shapes)} for its "
            f"{layers} layers; a prefix tuning adapter has one key and one value per layer, all of one shape. Use "
            "`save_as_prompt_tuning` or `save_as_vocabulary`."
        )
    return tensors


@torch.no_grad()
def _check_equivalence(base_model: Any, prompt: Tensor, states: list[Tensor]) -> None:
    """Check that a text has the same outputs after the keys and values as after the prompt."""
    embeddings = base_model.get_input_embeddings()
    ids = torch.linspace(0, embeddings.num_embeddings - 1, PROBE_LENGTH).long().unsqueeze(0)
    text = embeddings(ids.to(embeddings.weight.device))
    cache = cache_of(base_model, list(zip(states[::2], states[1::2])))
    try:
        found = base_model(inputs_embeds=text, **{cache_name(): cache}, use_cache=True).logits
    except (IndexError, RuntimeError) as error:  # a model that needs another type of cache
        raise ValueError(
            f"{type(base_model).__name__} cannot continue from the prompt's keys and values ({error}), so they cannot "
            "replace it. Use `save_as_prompt_tuning` or `save_as_vocabulary`."
        ) from error
    inputs = torch.cat([_as_input(base_model, prompt), text], dim=1)
    expected = base_model(inputs_embeds=inputs, use_cache=False).logits[:, len(prompt) :]
    if not is_close(found, expected):
        raise ValueError(
            f"{type(base_model).__name__} computes other logits after the prompt's keys and values than after the "
            "prompt, so they cannot replace it. Use `save_as_prompt_tuning` or `save_as_vocabulary`."
        )


def _as_input(base_model: Any, prompt: Tensor) -> Tensor:
    return prompt.to(base_model.get_input_embeddings().weight).unsqueeze(0)


def _refuse_moving_positions(base_model: Any) -> None:
    """Refuse rotary positions whose angles depend on the length of the whole text."""
    text_config = base_model.config.get_text_config()
    found = str(getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None))
    for kind in ("dynamic", "longrope"):
        if f"'{kind}'" in found:
            raise ValueError(
                f"{type(base_model).__name__} has rotary positions of type {kind!r}, with which the prompt's keys "
                "depend on the length of the text after it: they cannot be computed once. Use "
                "`save_as_prompt_tuning` or `save_as_vocabulary`."
            )


def _warn_of_windows(base_model: Any) -> None:
    text_config = base_model.config.get_text_config()
    window = getattr(text_config, "sliding_window", None)
    kinds = getattr(text_config, "layer_types", None)
    if window and (kinds is None or "sliding_attention" in kinds):
        warnings.warn(
            f"{type(base_model).__name__} attends within a window of {window} tokens, and PEFT puts the prefix in "
            "front of a row's padding, which the window counts. Left-padded batches are exact as long as prompt, "
            "padding and text fit the window. Rows without padding are always exact.",
            stacklevel=3,
        )
