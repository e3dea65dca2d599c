"""Settings of transformers' `generate`, as they must be changed with a prompt in front of the input."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from .inputs import Inputs


# The settings with which `generate` can continue from a given cache with one row for each row of the input.
_CONTINUING = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "use_cache": True,
    "cache_implementation": "dynamic",
    "prompt_lookup_num_tokens": None,
    "assistant_model": None,
    "prefill_chunk_size": None,
}


def setting(name: str, inputs: Inputs, base_model: Any) -> Any:
    """A setting, looked up as transformers does: argument, then `generation_config`, then the model's own."""
    configs = (inputs.get("generation_config"), base_model.generation_config)
    values = [inputs.get(name), *(getattr(config, name, None) for config in configs)]
    return next((value for value in values if value is not None), None)


def can_continue_from_cache(inputs: Inputs, base_model: Any) -> bool:
    """Whether `generate` with these arguments can continue from a cache that it is given."""
    return all(setting(name, inputs, base_model) in (None, default) for name, default in _CONTINUING.items())


def mask_of_padding(input_ids: Tensor, inputs: Inputs, base_model: Any) -> Tensor:
    """The attention mask that transformers infers from `input_ids` `[B, L]`; it cannot infer it from embeddings."""
    pad, eos = (setting(name, inputs, base_model) for name in ("pad_token_id", "eos_token_id"))
    eos_ids = eos if isinstance(eos, (list, tuple)) else [eos]
    if pad is None or pad in eos_ids:
        return torch.ones_like(input_ids)
    return (input_ids != pad).long()


def count_new_tokens(inputs: Inputs, base_model: Any, text_length: int) -> None:
    """Replace `max_length` and `min_length`, which count the text, by numbers of new tokens, in place.

    Given ids and embeddings, transformers would subtract the embeddings' length from both.

    Raises:
        ValueError: If `max_length` leaves no token to generate.
    """
    settings = copy.deepcopy(inputs.get("generation_config"))
    for length_name, new_name in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        length, new_tokens = (setting(name, inputs, base_model) for name in (length_name, new_name))
        inputs.pop(length_name, None)
        if settings is not None:
            setattr(settings, length_name, None)
        if not length or new_tokens is not None:
            continue
        if length_name == "max_length" and length <= text_length:
            raise ValueError(
                f"`max_length`={length} includes the {text_length} tokens of `input_ids` and leaves none to "
                "generate. Use a larger one, or `max_new_tokens`."
            )
        if settings is None:
            inputs[new_name] = max(length - text_length, 0)
        else:
            setattr(settings, new_name, max(length - text_length, 0))
    if settings is not None:
        inputs["generation_config"] = settings
