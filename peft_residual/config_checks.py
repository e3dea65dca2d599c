"""Checks of a config's values. Errors name the field, the value and the remedy."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from .registry import INITIALIZATIONS, REPARAMETERIZATIONS


BUILT_IN_INITIALIZATIONS = ("COMMON_VOCAB", "SAMPLE_VOCAB", "RANDOM", "TEXT", "CLASS_LABELS", "PROMPT")

# Fields that only some initializations read. The first of them is suggested in messages.
_INIT_FIELDS = {
    "prompt_tuning_init_text": ("TEXT",),
    "prompt_tuning_init_class_labels": ("CLASS_LABELS",),
    "prompt_tuning_init_state_dict_path": ("PROMPT",),
    "prompt_tuning_init_token_ids": ("COMMON_VOCAB", "CLASS_LABELS"),
}


def check_fields(config: Any, is_from_file: bool) -> None:
    """Check every field of a [`ResidualPromptTuningConfig`].

    Args:
        config ([`ResidualPromptTuningConfig`]): The config; not changed.
        is_from_file (`bool`): Whether its values were loaded, and may ask for nothing that runs code.

    Raises:
        ValueError: If a value cannot be right.
    """
    _check_peft_fields(config, is_from_file)
    _check_network_fields(config)
    _check_init_fields(config)
    check_types(type(config), vars(config))  # last: the messages of the other checks say more
    if config.token_dim is not None:
        check_token_dim(config)


def check_token_dim(config: Any) -> None:
    """Check what depends on the model's width, which PEFT fills in when it builds the model.

    Raises:
        ValueError: If `token_dim` does not suit the network.
    """
    kind, width = config.encoder_reparameterization_type, config.token_dim
    _check_positive_int(config, "token_dim")
    if kind in ("LSTM1", "LSTM2", "LSTM") and width % 2:
        raise ValueError(
            f"encoder_reparameterization_type={kind!r} splits the width over two directions and needs an even "
            f"`token_dim`, got {width}. Use 'MLP1', 'MLP2' or 'TRANSFORMER'."
        )
    if kind == "TRANSFORMER" and width % config.encoder_num_attention_heads:
        divisors = [n for n in range(1, 65) if width % n == 0]
        raise ValueError(
            f"`encoder_num_attention_heads` must divide `token_dim`={width}, got "
            f"{config.encoder_num_attention_heads}. Use one of {divisors}."
        )


def check_width(config: Any, word_embeddings: Any) -> None:
    """Check that the prompt has the width of the base model's word embeddings.

    Raises:
        ValueError: If it has not.
    """
    width = getattr(word_embeddings, "embedding_dim", config.token_dim)
    if width != config.token_dim:
        raise ValueError(
            f"`token_dim`={config.token_dim} does not fit the model, whose word embeddings have width {width}. "
            f"Load the adapter into the base model that it was trained for, or set token_dim={width}."
        )


def _check_peft_fields(config: Any, is_from_file: bool) -> None:
    _check_positive_int(config, "num_virtual_tokens")
    submodules = config.num_transformer_submodules
    if submodules is not None and (type(submodules) is not int or submodules not in (1, 2)):
        raise ValueError(
            "`num_transformer_submodules` must be 1, or 2 to keep rows for a decoder as PEFT does, got "
            f"{submodules!r}. Leave it out."
        )
    if is_from_file and isinstance(config.tokenizer_kwargs, dict) and "trust_remote_code" in config.tokenizer_kwargs:
        raise ValueError(
            f"`tokenizer_kwargs`={config.tokenizer_kwargs!r} asks to run the tokenizer's own code, which a loaded "
            "config must not do. Leave `trust_remote_code` out, and set it in code if you trust the source."
        )


def _check_network_fields(config: Any) -> None:
    kind = config.encoder_reparameterization_type
    entry = REPARAMETERIZATIONS[kind]
    _check_positive_int(config, "encoder_hidden_size")
    _check_positive_int(config, "encoder_num_attention_heads")
    dropout = config.encoder_dropout
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"`encoder_dropout` is a probability in [0, 1), got {dropout!r}. Use 0.0 for none.")
    scale = config.encoder_scale
    if scale is not None and (
        isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf
    ):
        raise ValueError(
            f"`encoder_scale` must be a positive number, or None to measure the model's embeddings, got {scale!r}."
        )
    has_weights = _activation_has_weights(config)
    if not config.encoder_shared and "encoder_shared" not in entry.unused_fields:
        if not entry.per_token:
            raise ValueError(
                "`encoder_shared=False` needs a network that works token by token, got "
                f"encoder_reparameterization_type={kind!r}: each copy would see one token and could not mix "
                "positions. Use 'MLP1' or 'MLP2', or set `encoder_shared=True`."
            )
        if has_weights:
            raise ValueError(
                "`encoder_shared=False` needs an activation without weights, got encoder_activation="
                f"{config.encoder_activation!r}: its weights would be shared by all tokens. Use 'relu' or 'tanh'."
            )
    unused = "encoder_zero_init" in entry.unused_fields
    if config.encoder_zero_init and not config.encoder_residual and not unused:
        raise ValueError(
            "`encoder_zero_init=True` with encoder_residual=False starts from a prompt of zeros. Leave one of "
            "them out."
        )


def _activation_has_weights(config: Any) -> bool:
    from transformers.activations import ACT2CLS, get_activation

    if not isinstance(config.encoder_activation, str) or config.encoder_activation not in ACT2CLS:
        raise ValueError(
            f"Unknown encoder_activation={config.encoder_activation!r}. Known: {', '.join(map(repr, ACT2CLS))}."
        )
    return any(True for _ in get_activation(config.encoder_activation).parameters())


def _check_init_fields(config: Any) -> None:
    init = config.prompt_tuning_init
    INITIALIZATIONS[init]
    if config.mixes_vocabulary and init not in ("COMMON_VOCAB", "SAMPLE_VOCAB"):
        raise ValueError(
            f"encoder_reparameterization_type={config.encoder_reparameterization_type!r} mixes rows of the "
            f"vocabulary, and prompt_tuning_init={init!r} samples none. Use 'COMMON_VOCAB' or 'SAMPLE_VOCAB'."
        )
    _check_positive_int(config, "prompt_tuning_init_vocab_size")
    seed = config.prompt_tuning_init_seed
    if seed is not None and (type(seed) is not int or not 0 <= seed < 2**64):
        raise ValueError(
            f"`prompt_tuning_init_seed` must be None or an integer of at least 0 and below 2**64, got {seed!r}."
        )
    for name, kinds in _INIT_FIELDS.items():
        if kinds == (init,) and not getattr(config, name):
            raise ValueError(f"prompt_tuning_init={init!r} needs `{name}`, got {getattr(config, name)!r}. Set it.")
    if init in ("TEXT", "CLASS_LABELS") and not config.tokenizer_name_or_path:
        raise ValueError(
            f"prompt_tuning_init={init!r} needs `tokenizer_name_or_path`, got {config.tokenizer_name_or_path!r}. "
            "Name the base model's tokenizer."
        )
    labels, token_ids = config.prompt_tuning_init_class_labels, config.prompt_tuning_init_token_ids
    if labels is not None:
        if not isinstance(labels, (list, tuple)) or not all(isinstance(label, str) and label for label in labels):
            raise ValueError(f"`prompt_tuning_init_class_labels` must be a list of words, got {labels!r}.")
        if len(labels) > config.num_virtual_tokens:
            raise ValueError(
                f"`prompt_tuning_init_class_labels` has {len(labels)} labels for num_virtual_tokens="
                f"{config.num_virtual_tokens}. Give at most one label per virtual token, or more tokens."
            )
    if token_ids is not None:
        is_list = isinstance(token_ids, (list, tuple))
        wrong = [i for i in token_ids if type(i) is not int or i < 0] if is_list else token_ids
        if not token_ids or wrong:
            raise ValueError(
                "`prompt_tuning_init_token_ids` must be a list of token ids (integers of at least 0), got "
                f"{wrong or token_ids!r}. `peft_residual.initialization.most_common_token_ids` makes one."
            )


def unused_fields(config: Any) -> Iterator[str]:
    """A message for each field that was set and that another setting makes unused."""
    kind, init = config.encoder_reparameterization_type, config.prompt_tuning_init
    unused = REPARAMETERIZATIONS[kind].unused_fields
    for config_field in fields(config):
        name, value = config_field.name, getattr(config, config_field.name)
        if name in unused and value != config_field.default:
            yield f"`{name}`={value!r} has no effect with encoder_reparameterization_type={kind!r}."
    if config.encoder_norm_first and not config.encoder_layer_norm and "encoder_norm_first" not in unused:
        yield "`encoder_norm_first=True` has no effect with encoder_layer_norm=False."
    for name, kinds in _INIT_FIELDS.items():
        # A custom initialization may read any field.
        if getattr(config, name) and init not in kinds and init in BUILT_IN_INITIALIZATIONS:
            yield f"`{name}` has no effect with prompt_tuning_init={init!r}, only with {kinds[0]!r}."
    if config.tokenizer_kwargs and not config.tokenizer_name_or_path:
        yield (
            f"`tokenizer_kwargs`={config.tokenizer_kwargs!r} has no effect without `tokenizer_name_or_path`. Set it "
            "too."
        )


def _check_positive_int(config: Any, name: str) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise ValueError(f"`{name}` must be an integer of at least 1 (and below 2**31), got {value!r}.")


def check_types(config_class: type, values: Mapping[str, Any]) -> None:
    """Check the types of a config's values, for example from a JSON file, against the annotations of its class.

    A field may also be None if that is its default (PEFT annotates `token_dim` as `int`).

    Args:
        config_class (`type`): The config class.
        values (`Mapping[str, Any]`): Values by field; fields without a value are skipped.

    Raises:
        ValueError: If a value has another type than its field.
    """
    hints = _type_hints(config_class)
    for config_field in fields(config_class):
        name, hint = config_field.name, hints[config_field.name]
        if name not in values or (values[name] is None and config_field.default is None):
            continue
        if not _has_type(values[name], hint):
            raise ValueError(f"`{name}` must be of type {_type_name(hint)}, got {values[name]!r}.")


@functools.cache
def _type_hints(config_class: type) -> dict[str, Any]:
    return get_type_hints(config_class)


def _has_type(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_has_type(value, alternative) for alternative in get_args(hint))
    if get_origin(hint) is list:
        is_list = isinstance(value, (list, tuple, set))
        return is_list and all(_has_type(item, get_args(hint)[0]) for item in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _type_name(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_type_name, get_args(hint)))
    if get_origin(hint) is list:
        return f"list of {_type_name(get_args(hint)[0])}"
    return "None" if hint is type(None) else str(hint.__name__)
