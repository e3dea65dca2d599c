"""Settings of transformers' `generate`, as they must be changed with a prompt in front of the input."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import assists_from_embeddings, cache_name, default_setting, generates_in_both_directions
from .adapters import ResidualAdapters
from .base_model import accepts
from .inputs import Inputs


# The settings with which `generate` proposes candidates, also before the first step.
_PROPOSING = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")

# The settings with which `generate` can continue from a given cache with one row for each row of the input.
_CONTINUING = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "use_cache": True,
    "cache_implementation": "dynamic",
}


def setting(name: str, inputs: Inputs, base_model: Any) -> Any:
    """A setting, looked up as transformers does: argument, then `generation_config`, then the model's own."""
    configs = (inputs.get("generation_config"), base_model.generation_config)
    default = default_setting(name)
    values = [inputs.get(name), *(value for config in configs if (value := getattr(config, name, None)) != default)]
    return next((value for value in values if value is not None), default)


def can_continue_from_cache(inputs: Inputs, base_model: Any) -> bool:
    """Whether `generate` with these arguments can continue from a cache that it is given."""
    if proposes_candidates(inputs, base_model):
        return False
    return all(setting(name, inputs, base_model) in (None, default) for name, default in _CONTINUING.items())


def proposes_candidates(inputs: Inputs, base_model: Any) -> bool:
    """Whether `generate` with these arguments checks several proposed tokens at a time."""
    return any(setting(name, inputs, base_model) for name in _PROPOSING)


def check_assistant(assistant: Any, base_model: Any) -> None:
    """Check that an `assistant_model` can propose tokens.

    Raises:
        ValueError: If it has a prompt, or if the base model is an encoder-decoder model.
    """
    if isinstance(assistant, ResidualAdapters) and assistant.active_residual_config() is not None:
        raise ValueError(
            "`assistant_model` has a prompt of its own, which cannot be combined with this model's. Pass its base "
            "model, `assistant_model.get_base_model()`: it only proposes tokens, and this model decides."
        )
    if assistant is not None and base_model.config.is_encoder_decoder:
        raise ValueError(
            "`assistant_model` cannot be used with a prompt in front of an encoder's input, which the assistant's "
            "encoder would get too. Generate without it, or with `prompt_lookup_num_tokens`."
        )


def check_direction(inputs: Inputs, base_model: Any) -> None:
    """Raise a `ValueError` for settings that a model with the architecture of a bidirectional one may not have."""
    if getattr(base_model.config, "is_decoder", False):
        return
    if not generates_in_both_directions():
        raise ValueError(
            f"{base_model.config.model_type!r} reads in both directions, and this transformers cannot generate with a "
            "prompt in front of such a model. Load it with `is_decoder=True`, or install transformers>=5.10."
        )
    names = [*_PROPOSING, "cache_implementation"] if accepts(base_model, "past_key_values") else _PROPOSING
    given = [name for name in names if setting(name, inputs, base_model)]
    if given:
        raise ValueError(
            f"`{given[0]}` cannot be used with {base_model.config.model_type!r}, which reads in both directions: each "
            "new token would change those before it. Leave it out, or load the model with `is_decoder=True`."
        )


def first_token(inputs: Inputs, base_model: Any) -> Tensor:
    """The text `[1, 1]` with which transformers starts if it is given none.

    Raises:
        ValueError: If the text was given in another form, or the model has no token to start with.
    """
    bos = setting("bos_token_id", inputs, base_model)
    others = [n for n in ("inputs_embeds", "encoder_outputs", "attention_mask") if inputs.get(n) is not None]
    if others or bos is None:
        got = f"got `{others[0]}`" if others else "and the model has no `bos_token_id` to start with"
        raise ValueError(f"`generate` needs `input_ids`, {got}. Pass the tokenized text.")
    return torch.full((1, 1), bos, device=base_model.device)


def refuse_assistance(inputs: Inputs, base_model: Any) -> None:
    """Raise a `ValueError` for assisted generation where transformers fails with a prompt or gives wrong tokens."""
    if assists_from_embeddings():
        return
    for name in _PROPOSING:
        if setting(name, inputs, base_model):
            raise ValueError(
                f"`{name}` with a prompt needs transformers 5.18 or later, which can start assisted generation from "
                "embeddings. Leave it out, or install transformers>=5.18."
            )


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
            setattr(settings, length_name, default_setting(length_name))
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


def taking_embeds(base_model: Any, word_embeddings: nn.Module, inputs: Inputs) -> Any:
    """The base model, with a `generate` that takes the text's ids and the embeddings of prompt and text.

    transformers' own way lacks classes that prepare no embeddings, candidates that are proposed before the first step,
    and models without a cache, which need the prompt at every step. For those, a view with its own preparation.

    Args:
        base_model (`transformers.PreTrainedModel`): Not changed.
        word_embeddings (`torch.nn.Module`): The base model's word embeddings.
        inputs (`dict`): The arguments of `generate`: `input_ids` `[B, L]`, and `inputs_embeds` `[B, E, H]` and
            `attention_mask` `[B, E]` of prompt and text.

    Raises:
        ValueError: If the class prepares no embeddings, or no mask, and transformers cannot generate without.
    """
    base_model = getattr(base_model, "_orig_mod", base_model)  # a compiled model generates with this one
    prepare = base_model.prepare_inputs_for_generation
    proposes = proposes_candidates(inputs, base_model)
    if "inputs_embeds" in inspect.signature(prepare).parameters and not proposes:
        return base_model
    if not assists_from_embeddings():
        raise ValueError(
            f"{type(base_model).__name__} cannot generate with a prompt on this transformers, which gives it no "
            "embeddings. Install transformers>=5.18."
        )
    from transformers.generation.utils import ALL_CACHE_NAMES

    text_length, mask = inputs["input_ids"].shape[1], inputs["attention_mask"]

    def prepare_inputs_for_generation(
        input_ids: Tensor, inputs_embeds: Tensor, is_first_iteration: bool = False, **kwargs: Any
    ) -> Inputs:
        length, new_ids = inputs_embeds.shape[1], input_ids[:, text_length:]
        missing = length + new_ids.shape[1] - mask.shape[1]
        if kwargs.get("attention_mask") is not None and len(mask) == len(input_ids):
            kwargs["attention_mask"] = nn.functional.pad(mask, (0, missing), value=1)  # assisted decoding cuts it off
        kwargs["is_first_iteration"] = is_first_iteration
        if not is_first_iteration and (proposes or any(_is_filled(kwargs.get(name)) for name in ALL_CACHE_NAMES)):
            return prepare(input_ids, **kwargs)
        # Prepared as ids, of which those that have embeddings do not matter, and to which the model may append others.
        start = 0
        if not is_first_iteration:
            kwargs["next_sequence_length"] = None
        elif kwargs.get("next_sequence_length") is not None:
            start = length - kwargs["next_sequence_length"]
        ids = nn.functional.pad(new_ids, (length, 0))
        prepared = prepare(ids, **kwargs)
        if prepared["input_ids"].shape[1] > ids.shape[1] and cache_name() in prepared:
            # XLM appends a token that is not part of the text: its keys and values may not be kept.
            prepared.update({cache_name(): None, "use_cache": False})
        if kwargs.get("attention_mask") is not None and "attention_mask" not in prepared:
            raise ValueError(
                f"{type(base_model).__name__} does not use `attention_mask` when it generates, and padding would be "
                "read as text. Generate from rows of different lengths one by one, without padding."
            )
        embeds = word_embeddings(prepared["input_ids"][:, length - start :])
        prepared["inputs_embeds"] = torch.cat([inputs_embeds[:, start:], embeds.to(inputs_embeds)], dim=1)
        return {**prepared, "input_ids": None}

    def _get_candidate_generator(model_kwargs: Inputs, **kwargs: Any) -> Any:
        of_text = {
            name: value for name, value in model_kwargs.items() if name not in ("inputs_embeds", "position_ids")
        }
        return base_model._get_candidate_generator(model_kwargs=of_text, **kwargs)

    own = {"_get_candidate_generator": _get_candidate_generator} if proposes else {}
    return _view(base_model, prepare_inputs_for_generation=prepare_inputs_for_generation, **own)


def penalizing_text(base_model: Any, input_ids: Tensor, inputs: Inputs) -> Any:
    """The base model, with a `generate` whose penalties on tokens of the input see the text's ids, not embeddings."""
    names = ("encoder_repetition_penalty", "encoder_no_repeat_ngram_size")
    if all(setting(name, inputs, base_model) in (None, default) for name, default in zip(names, (1.0, 0))):
        return base_model
    base_model = getattr(base_model, "_orig_mod", base_model)
    get_processors = base_model._get_logits_processor

    def _get_logits_processor(**kwargs: Any) -> Any:
        return get_processors(**{**kwargs, "encoder_input_ids": input_ids})

    return _view(base_model, _get_logits_processor=_get_logits_processor)


def _view(base_model: Any, **methods: Any) -> Any:
    """The base model with other methods and shared weights, for one call. Other threads see no change."""
    view = object.__new__(type(base_model))  # FSDP2's classes make an object of another class when they are copied
    view.__dict__.update(vars(base_model), **methods)
    return view


def _is_filled(cache: Any) -> bool:
    return cache is not None and any(getattr(layer, "is_initialized", True) for layer in getattr(cache, "layers", [1]))
