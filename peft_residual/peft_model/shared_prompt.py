"""Computes the prompt of a decoder-only model once per batch, with gradients, and not once per row.

In a causal model the prompt's keys and values depend on the prompt alone, and all rows have the same prompt. So the
base model runs on the prompt as a batch of one, and the rows continue from its keys and values. The last virtual token
is run with each row: its output predicts the row's first token, so that the model computes its own loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..compat import cache_name, keys_and_values, takes_cache_objects
from ..storage.sharded import is_sharded
from .base_model import accepts, continues_from_cache
from .checkpointing import RepeatableLayer, checkpointed_layers, with_cache
from .dropout import active_dropout
from .inputs import (
    Inputs,
    check_position_ids,
    extend,
    extend_mask,
    extend_positions,
    padding_first,
    positions_in,
    reorder,
    text_of,
)
from .label_logits import at_labels
from .mixed_batch import BatchPrompt


# Measured to be faster on a CPU: prompts of this length, if the model runs on this share of tokens less. Otherwise the
# second pass through the model costs more than it saves (`examples/benchmarks/training_step.py`).
SHORTEST_PROMPT = 20
SMALLEST_SAVING = 0.15

# Model types whose loss takes the logits where the mask is not 0, which would have to be as long as each other.
_LOSS_BY_MASK = ("qwen2_audio", "granite_speech", "granite_speech_plus")
# Inputs with which the usual way is taken
_OTHERS = (
    "output_hidden_states",
    "output_attentions",
    "past_key_values",
    "cache",
    "cache_position",
    "token_type_ids",
    "shift_labels",
)


def pays_to_share(prompt: BatchPrompt, inputs: Inputs) -> bool:
    """Whether sharing was measured to be faster at these sizes and on this device."""
    (rows, length), text_length = prompt.embeds.shape[:2], text_of(inputs).shape[1]
    saving = (rows - 1) * (length - 1) / (rows * (length + text_length))
    return prompt.embeds.device.type == "cpu" and length >= SHORTEST_PROMPT and saving >= SMALLEST_SAVING


def can_share(base_model: Any, prompt: BatchPrompt, inputs: Inputs) -> bool:
    """Whether the rows of a batch can continue from one prompt, with the outputs of the usual way.

    False with different prompts in a batch; with dropout in the base model, which would be the same for all rows; with
    gradient checkpointing, where transformers keeps no cache; for models whose cache is not only keys and values of
    all positions (state spaces, sliding windows) or whose prompt reads the text (PaliGemma); with left padding, if the
    model takes no `position_ids`; and for sharded and compiled models.
    """
    if not prompt.is_shared or prompt.embeds.shape[1] < 2 or not takes_cache_objects(base_model):
        return False
    if torch.compiler.is_compiling() or hasattr(base_model, "_orig_mod") or not continues_from_cache(base_model):
        return False
    if any(inputs.get(name) is not None for name in _OTHERS):
        return False
    kept = inputs.get("logits_to_keep")
    if isinstance(kept, Tensor):
        return False
    if kept and (not 0 < kept <= text_of(inputs).shape[1] or inputs.get("labels") is not None):
        return False
    if inputs.get("labels") is not None and base_model.config.model_type in _LOSS_BY_MASK:
        return False
    config = base_model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    has_windows = (
        any(kind != "full_attention" for kind in kinds)
        if kinds
        else any(getattr(config, name, None) for name in ("sliding_window", "window_size", "attention_window"))
    )
    is_stateful = getattr(base_model, "_is_stateful", False)
    if has_windows or is_stateful or getattr(config, "output_router_logits", False):
        return False
    mask = inputs.get("attention_mask")
    if mask is not None and not accepts(base_model, "position_ids") and not mask[:, 0].all():
        return False  # distances may be counted in columns, and padding would be between prompt and text
    if base_model.training:
        if checkpointed_layers(base_model) is None:
            return False
        if any(True for _ in active_dropout(base_model)):
            return False
    return not is_sharded(base_model)


def shared_forward(
    base_model: Any, word_embeddings: Any, prompt: BatchPrompt, inputs: Inputs, logits_at_labels: bool = False
) -> Any | None:
    """Run the base model with one prompt for all rows.

    Args:
        base_model, word_embeddings (`torch.nn.Module`): The base model and its word embeddings.
        prompt (`BatchPrompt`): The prompt, the same for all rows.
        inputs (`dict`): What the base model takes, without the prompt.
        logits_at_labels (`bool`): Whether only logits that predict a label are computed, if there are labels.

    Returns:
        `transformers.modeling_outputs.ModelOutput`: With logits `[B, P + L, V]` as in the usual way. None if the
        model's cache turns out to be of another type.
    """
    from transformers import Cache, DynamicCache

    inputs = dict(inputs)
    return_dict = inputs.get("return_dict")
    wants_dict = getattr(base_model.config, "return_dict", True) if return_dict is None else return_dict
    rows, length = text_of(inputs).shape[0], prompt.embeds.shape[1]
    input_ids, embeds = inputs.pop("input_ids", None), inputs.pop("inputs_embeds", None)
    embeds = word_embeddings(input_ids) if embeds is None else embeds
    mask, position_ids = inputs.pop("attention_mask", None), inputs.pop("position_ids", None)
    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device) if mask is None else mask
    inputs["attention_mask"] = extend_mask(mask, prompt)
    inputs["inputs_embeds"] = torch.cat([prompt.embeds[:, -1:].to(embeds), embeds], dim=1)
    if inputs.get("labels") is not None:
        inputs["labels"] = extend(inputs["labels"], 1, -100, "labels")
    # As in the usual way, padding in front of the text is moved in front of the virtual token that predicts the text.
    moved = mask.cumsum(-1) == 0
    order = padding_first(moved, 1)
    for name in ("inputs_embeds", "labels"):
        if inputs.get(name) is not None:
            inputs[name] = reorder(inputs[name], order)
    inputs["attention_mask"][:, length - 1 :] = reorder(inputs["attention_mask"][:, length - 1 :], order)
    if accepts(base_model, "position_ids"):
        if position_ids is None:
            inputs["position_ids"] = positions_in(base_model, inputs["attention_mask"])[:, length - 1 :].contiguous()
        else:
            check_position_ids(position_ids, mask)
            positions = extend_positions(position_ids.expand(rows, -1), prompt)[:, length - 1 :]
            inputs["position_ids"] = reorder(positions, order)
    # Positions, not a number: slices of hidden states make torch copy the output layer's weights for every row.
    if kept := inputs.pop("logits_to_keep", 0):
        inputs["logits_to_keep"] = torch.arange(-kept, 0, device=embeds.device)
    elif logits_at_labels:
        inputs = at_labels(inputs)
    # TRL's `fused_lm_head` computes the loss and figures of each token without logits.
    has_all_logits = "logits_to_keep" not in inputs and not inputs.get("fused_lm_head")
    few = {} if has_all_logits else {"logits_to_keep": torch.tensor([-1], device=embeds.device)}
    layers = (checkpointed_layers(base_model) if base_model.training else None) or []
    cache: Any = Cache(layer_class_to_replicate=RepeatableLayer) if layers else DynamicCache()
    with with_cache(base_model, layers):
        options = {"use_cache": not layers, "return_dict": True}
        first = base_model(inputs_embeds=prompt.embeds[:1, :-1].to(embeds), **{cache_name(): cache}, **few, **options)
        cache = _expanded(cache if layers else first.get(cache_name()), rows, length - 1)
        if cache is None:
            return None
        outputs = base_model(**{**inputs, cache_name(): cache, **options})
    # The model has computed its loss. What follows gives the logits the shape and order of the usual way.
    if outputs.get("logits") is None:
        for name, value in outputs.items():
            if isinstance(value, Tensor) and value.ndim == 2:  # of each token; zero where there is no label
                outputs[name] = nn.functional.pad(value, (length - 1, 0))
    elif has_all_logits:
        logits = torch.cat([first.logits.expand(rows, -1, -1), outputs.logits], dim=1)
        if moved.any():
            is_padding = torch.arange(embeds.shape[1] + 1, device=moved.device) < moved.sum(-1, keepdim=True)
            logits = reorder(logits, padding_first(is_padding, length - 1))
        outputs.logits = logits
    if layers or inputs.get("use_cache") is False:
        outputs = type(outputs)(**{name: value for name, value in outputs.items() if name != cache_name()})
    return outputs if wants_dict else outputs.to_tuple()


def _expanded(cache: Any, rows: int, length: int) -> Any | None:
    """The prompt's keys and values for every row, not copied; None if the cache is of another type."""
    from transformers import Cache, DynamicCache

    if type(cache) not in (Cache, DynamicCache):
        return None
    states = keys_and_values(cache)
    if not states or not all(
        isinstance(state, Tensor) and state.ndim == 4 and state.shape[2] == length for state in states
    ):
        return None
    expanded = [state.expand(rows, -1, -1, -1) for state in states]
    pairs = list(zip(expanded[::2], expanded[1::2]))
    return DynamicCache(pairs) if type(cache) is DynamicCache else Cache([RepeatableLayer(*pair) for pair in pairs])
