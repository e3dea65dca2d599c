"""After training: a causal model's prompt as the keys and values that it leaves behind, a prefix tuning adapter."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model_state_dict
from torch import Tensor

from ..storage import checkpoint
from .prompt_tuning import evaluating, get_prompt_tensor, is_close, require_adapter, write_adapter


PROBE_LENGTH = 8


def save_as_prefix_tuning(
    model: PeftModel, out: str | os.PathLike[str], *, adapter_name: str = "default", overwrite: bool = False
) -> Path:
    """Save a causal model's prompt as a prefix tuning adapter, which stock PEFT loads without this package.

    In a causal model nothing that follows changes what the prompt's own positions compute. So the prompt is run once
    through the frozen model, and its keys and values are the adapter: no prompt is computed at inference. Before
    anything is written, the model is run with them on a probe text and compared with the prompt itself.

    Stock PEFT puts the prefix in front of a row's padding. Its `generate` counts positions without the padding, so
    each row gets what it gets alone; so does `forward` in models that read positions off the mask (OPT, BLOOM). To the
    `forward` of others pass `position_ids` that do not count padding, along with a left-padded batch.

    Args:
        model ([`~peft.PeftModel`]): A causal language model with a residual or plain prompt tuning adapter; unchanged.
        out (`str` or `os.PathLike`): The folder to write: `adapter_config.json`, a model card, and
            `adapter_model.safetensors` with `[P, layers * 2 * key heads * head width]` numbers in the model's type. It
            appears whole or not at all.
        adapter_name (`str`): Which adapter of the model.
        overwrite (`bool`): Whether to replace a folder that exists.

    Returns:
        `pathlib.Path`: The folder.

    Raises:
        ValueError: If there is no such prompt, the model is no causal language model, or its keys and values cannot be
            PEFT's prefix: they differ in shape from layer to layer, depend on the length of the text, or are none.
        FileExistsError: If `out` exists and `overwrite` is False, or it is no adapter's folder.
    """
    require_adapter(model, adapter_name, PromptTuningConfig)
    config = model.peft_config[adapter_name]
    if config.task_type != "CAUSAL_LM":
        raise ValueError(
            f"Adapter {adapter_name!r} has task_type={str(config.task_type)!r}; only a causal language model's prompt "
            "(CAUSAL_LM) leaves keys and values that stand for it. Use `save_as_prompt_tuning`."
        )
    base_model = model.get_base_model()
    _refuse_moving_positions(base_model)
    prompt = get_prompt_tensor(model, adapter_name)
    with evaluating(base_model):
        keys_and_values = _run_prompt(base_model, prompt)
        _check_equivalence(base_model, prompt, keys_and_values)
    _warn_of_windows(base_model)
    key_heads, tokens, head_width = keys_and_values[0].shape[1:]
    prefix_config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=config.base_model_name_or_path or getattr(base_model, "name_or_path", None),
        revision=config.revision,
        inference_mode=True,
        modules_to_save=config.modules_to_save,
        num_virtual_tokens=tokens,
        num_transformer_submodules=1,
        num_layers=len(keys_and_values) // 2,
        num_attention_heads=key_heads,
        token_dim=key_heads * head_width,
        encoder_hidden_size=key_heads * head_width,
    )
    # PEFT's order: token by token, layer by layer, key before value, head by head.
    flat = torch.stack([tensor[0].transpose(0, 1) for tensor in keys_and_values], dim=1).reshape(tokens, -1)
    saved = checkpoint.strip(get_peft_model_state_dict(model, adapter_name=adapter_name))
    tensors = {**saved, checkpoint.PROJECTED_KEY: flat.cpu()}
    return write_adapter(out, prefix_config, tensors, trained_as=config, overwrite=overwrite)


@torch.no_grad()
def _run_prompt(base_model: Any, prompt: Tensor) -> list[Tensor]:
    """Key and value of each layer in turn, `[1, key heads, P, head width]`."""
    from transformers import DynamicCache

    cache = DynamicCache()  # without a config: layers with a window keep all of the prompt too
    try:
        base_model(inputs_embeds=_as_input(base_model, prompt), past_key_values=cache, use_cache=True)
    except (AttributeError, IndexError, TypeError, ValueError) as error:  # a model with a cache of its own kind
        raise ValueError(
            f"{type(base_model).__name__} does not leave its keys and values in transformers' cache ({error}), as a "
            "prefix tuning adapter needs it. Use `save_as_prompt_tuning` or `save_as_vocabulary`."
        ) from error
    states = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
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
def _check_equivalence(base_model: Any, prompt: Tensor, keys_and_values: list[Tensor]) -> None:
    """Check that a text behind keys and values gets what it gets behind the prompt."""
    from transformers import DynamicCache

    embeddings = base_model.get_input_embeddings()
    ids = torch.linspace(0, embeddings.num_embeddings - 1, PROBE_LENGTH).long().unsqueeze(0)
    text = embeddings(ids.to(embeddings.weight.device))
    cache = DynamicCache(list(zip(keys_and_values[::2], keys_and_values[1::2])))
    found = base_model(inputs_embeds=text, past_key_values=cache, use_cache=True).logits
    inputs = torch.cat([_as_input(base_model, prompt), text], dim=1)
    expected = base_model(inputs_embeds=inputs, use_cache=False).logits[:, len(prompt) :]
    if not is_close(found, expected):
        raise ValueError(
            f"{type(base_model).__name__} computes other logits behind the prompt's keys and values than behind the "
            "prompt, so they cannot stand for it. Use `save_as_prompt_tuning` or `save_as_vocabulary`."
        )


def _as_input(base_model: Any, prompt: Tensor) -> Tensor:
    return prompt.to(base_model.get_input_embeddings().weight).unsqueeze(0)


def _refuse_moving_positions(base_model: Any) -> None:
    """Some rotary positions turn keys by an angle that depends on the length of the whole text."""
    text_config = base_model.config.get_text_config()
    found = str(getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None))
    for kind in ("dynamic", "longrope"):
        if f"'{kind}'" in found:
            raise ValueError(
                f"{type(base_model).__name__} has rotary positions of type {kind!r}, under which the prompt's keys "
                "depend on the length of the text behind it: they cannot be computed once. Use "
                "`save_as_prompt_tuning` or `save_as_vocabulary`."
            )


def _warn_of_windows(base_model: Any) -> None:
    text_config = base_model.config.get_text_config()
    window = getattr(text_config, "sliding_window", None)
    kinds = getattr(text_config, "layer_types", None)
    if window and (kinds is None or "sliding_attention" in kinds):
        warnings.warn(
            f"{type(base_model).__name__} attends within a window of {window} tokens, and stock PEFT puts the prefix "
            "in front of a row's padding, which the window counts. Left-padded batches are exact while prompt, "
            "padding and text are no longer than the window; rows without padding always are.",
            stacklevel=3,
        )
