"""Where versions of PEFT and transformers differ: the only file that knows, besides the ranges in `pyproject.toml`.

Each function says with which version of its host it can go. What is needed of PEFT beyond its public API is checked at
import, before any other module of the package is imported.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor


if TYPE_CHECKING:
    from transformers.cache_utils import DynamicLayer as DynamicLayer
    from transformers.modeling_layers import GradientCheckpointingLayer as GradientCheckpointingLayer
else:
    # Before transformers 4.54 no layer can be checkpointed with a cache, and nothing is an instance of these classes.
    # The fallbacks can go when 4.54 is the oldest transformers.
    try:
        from transformers.cache_utils import DynamicLayer
        from transformers.modeling_layers import GradientCheckpointingLayer
    except ImportError:
        DynamicLayer = GradientCheckpointingLayer = type("Missing", (), {})

REQUIREMENT = "peft>=0.21.2,<0.22"
# Oldest and newest versions that the core tests ran with (`make matrix`); newer ones are used with a warning.
TESTED = {"peft": ("0.21.2", "0.21"), "transformers": ("4.51.3", "5.24")}

# The methods that are wrapped, overridden or called, and the first parameters that each must take.
_METHODS = {
    "PeftModel": {
        "_setup_prompt_encoder": "adapter_name",
        "_split_kwargs": "kwargs",
        "_upload_modified_files": "working_dir",
        "add_adapter": "adapter_name peft_config",
        "create_or_update_model_card": "output_dir",
        "delete_adapter": "adapter_name",
        "disable_adapter": "",
        "from_pretrained": "model model_id adapter_name is_trainable config",
        "get_prompt": "batch_size task_ids max_cache_len",
        "get_prompt_embedding_to_save": "adapter_name",
        "load_adapter": "model_id adapter_name is_trainable",
        "save_pretrained": "save_directory safe_serialization selected_adapters save_embedding_layers is_main_process",
        "set_adapter": "adapter_name inference_mode",
        "set_requires_grad": "adapter_names requires_grad",
    },
    "BasePromptEncoder": {
        "_get_adapter_state_dict": "model config adapter_name state_dict unwanted_adapter_names",
        "_load_adapter_state_dict": "state_dict",
        "_remap_adapter_state_dict_for_load": "model config adapter_name state_dict",
        "_remove_adapter_name_from_key": "key adapter_name",
    },
    "AuxiliaryTrainingWrapper": {"enable_adapters": "enabled"},
}


def check_peft() -> None:
    """Check that the installed PEFT has the methods and mappings that the package plugs into.

    Raises:
        ImportError: If one is missing or takes other arguments: names it, the version found and the version needed.
    """
    import peft
    from peft import mapping
    from peft.tuners import tuners_utils
    from peft.utils import other

    classes: dict[str, Any] = {
        "PeftModel": getattr(peft, "PeftModel", None),
        "BasePromptEncoder": getattr(tuners_utils, "BasePromptEncoder", None),
        "AuxiliaryTrainingWrapper": getattr(other, "AuxiliaryTrainingWrapper", None),
    }
    problems = []
    for owner, methods in _METHODS.items():
        for name, parameters in methods.items():
            method = getattr(classes[owner], name, None)
            if method is None:
                problems.append(f"{owner}.{name} is missing")
            elif not _takes(method, parameters.split()):
                problems.append(f"{owner}.{name} does not take ({', '.join(parameters.split())})")
    for name in ("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING"):
        if peft.PeftType.PROMPT_TUNING not in getattr(mapping, name, {}):
            problems.append(f"{name}[PROMPT_TUNING] is missing")
    if problems:
        raise ImportError(
            f"peft_residual cannot plug into peft {version('peft')}: {'; '.join(problems)}. Install a version that "
            f"fits: pip install '{REQUIREMENT}'."
        )


def warn_of_untested_hosts() -> None:
    """Warn, in one sentence, of a PEFT or transformers that is newer than all that were tested."""
    newer = [
        f"{name} {version(name)} (tested: {oldest} to {newest})"
        for name, (oldest, newest) in TESTED.items()
        if _release(version(name))[:2] > _release(newest)
    ]
    if newer:
        warnings.warn(
            f"peft_residual was not tested with {' and '.join(newer)}. If outputs or errors look wrong, install a "
            "tested version or a newer peft_residual.",
            stacklevel=3,
        )


def _release(number: str) -> tuple[int, ...]:
    """The numbers of a version: `(5, 24, 0)` for `5.24.0.dev0`."""
    return tuple(int(part) for part in number.split(".")[:3] if part.isdigit())


def _takes(method: Any, parameters: list[str]) -> bool:
    found = [name for name in inspect.signature(method).parameters if name not in ("self", "cls")]
    return found[: len(parameters)] == parameters


# --- transformers: generation ---------------------------------------------------------------------------------------


@functools.cache
def cache_name() -> str:
    """What transformers calls the keys and values, in arguments and outputs.

    `"cache"` from 5.24 on. Can go, as `"cache"`, when 5.24 is the oldest transformers.
    """
    from transformers import GenerationMixin

    parameters = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def with_cache_name(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs with the cache under transformers' own name. Both names at once stay, for transformers to refuse.

    Can go when transformers takes only one name.
    """
    if "past_key_values" not in inputs or cache_name() in inputs:
        return inputs
    inputs = dict(inputs)
    inputs[cache_name()] = inputs.pop("past_key_values")
    return inputs


@functools.cache
def default_setting(name: str) -> Any:
    """The value that means "not set" in a `GenerationConfig`: None, before transformers 5 a number for some.

    Can go, as None, when 5.0 is the oldest transformers.
    """
    from transformers import GenerationConfig

    return getattr(GenerationConfig(), name, None)


def generates_from_a_filled_cache() -> bool:
    """Whether `generate` takes the length of a filled cache into account; transformers 5.0 to 5.2 does not.

    Can go when 5.3 is the oldest transformers.
    """
    return not (5, 0) <= _release(version("transformers")) < (5, 3)


def assists_from_embeddings() -> bool:
    """Whether assisted generation (`prompt_lookup_num_tokens`, `assistant_model`) starts from embeddings.

    Before 5.2 it fails, then it gives wrong tokens (5.15 still does). Nor can classes that prepare no embeddings
    generate from them. Can go when 5.18 is the oldest transformers.
    """
    return _release(version("transformers")) >= (5, 18)


def generates_in_both_directions() -> bool:
    """Whether bidirectional architectures with a causal head generate.

    4.51 fails with embeddings, and 5.0 gives wrong tokens, with words too. 4.57 and 5.10 are right; those between are
    not known. Can go when 5.10 is the oldest transformers.
    """
    return not (_release(version("transformers")) < (4, 57) or (5, 0) <= _release(version("transformers")) < (5, 10))


def warn_of_stock_generation(stacklevel: int = 3) -> None:
    """Warn where stock PEFT generates wrong tokens from plain prompts: 0.21.2 with transformers 5.24 or later.

    PEFT looks for the cache under its former name, and puts the prompt in front of every token. Can go with PEFT 0.21.
    """
    if cache_name() == "cache" and _release(version("peft")) < (0, 22):
        warnings.warn(
            f"PEFT {version('peft')} itself generates wrong tokens from plain (merged) prompts and prefixes of causal "
            f"models on transformers {version('transformers')}, without an error. Residual adapters generate the "
            "right ones. For the others install transformers<5.24; plain prompts also work with `use_cache=False`.",
            stacklevel=stacklevel,
        )


# --- transformers: caches -------------------------------------------------------------------------------------------


def takes_cache_objects(base_model: Any) -> bool:
    """Whether a causal model takes transformers' `Cache`, and not tuples (as GPT-2 in 4.51).

    Can go when 4.53 is the oldest transformers.
    """
    return bool(getattr(base_model, "_supports_cache_class", True))


def cache_of(base_model: Any, pairs: Sequence[tuple[Tensor, Tensor]]) -> Any:
    """Keys and values of each layer as a causal model takes them.

    The tuple can go with [`takes_cache_objects`].
    """
    from transformers import DynamicCache

    if not takes_cache_objects(base_model):
        return tuple(pairs) or None
    return DynamicCache(pairs) if pairs else DynamicCache()


def keys_and_values(cache: Any) -> list[Any]:
    """Key and value of each layer of a dynamic cache, or of a tuple, in turn.

    Tuples, `key_cache` and `value_cache` can go when 4.54 is the oldest transformers.
    """
    if isinstance(cache, tuple):
        return [state for pair in cache for state in pair]
    if hasattr(cache, "layers"):
        return [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return [state for pair in zip(cache.key_cache, cache.value_cache) for state in pair]


def has_sliding_layers(cache: Any, base_model: Any) -> bool:
    """Whether a layer of the model that filled a dynamic cache attends within a window.

    The look at the config can go when 4.54 is the oldest transformers: before it, caches do not tell.
    """
    if hasattr(cache, "is_sliding"):
        return any(cache.is_sliding)
    return bool(getattr(base_model.config.get_text_config(), "sliding_window", None))


def is_wrong_with_a_filled_cache(base_model: Any) -> bool:
    """Whether a text behind a filled cache is computed wrongly: Doge; PaliGemma and BertGeneration, which read ahead.

    Can go when 5.18 is the oldest transformers: PaliGemma's config tells from 5.0 on, BertGeneration gives no cache if
    it reads ahead, and Doge is right.
    """
    is_old = _release(version("transformers")) < (5, 18)
    return is_old and getattr(base_model.config, "model_type", None) in ("bert-generation", "doge", "paligemma")


# --- transformers: loading ------------------------------------------------------------------------------------------


def dtype_argument(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The argument of `from_pretrained` for the weights' type. `torch_dtype` can go when 4.56 is the oldest."""
    return {"dtype" if _release(version("transformers")) >= (4, 56) else "torch_dtype": dtype}


def tied_weight_names(base_model: Any) -> set[str]:
    """Names of the weights that are tied to another one.

    `_tied_weights_keys` can go when 5.0 is the oldest transformers.
    """
    if hasattr(base_model, "get_expanded_tied_weights_keys"):
        return set(base_model.get_expanded_tied_weights_keys(all_submodels=True))
    return set(base_model._tied_weights_keys or ()) if base_model.config.tie_word_embeddings else set()


# --- huggingface_hub ------------------------------------------------------------------------------------------------


def connection_error() -> type[Exception]:
    """The base class of the errors of huggingface_hub's HTTP client: a status, or a broken connection.

    Before 1.0 the client is requests, whose errors are `OSError`s. Can go, as httpx's `HTTPError`, when 1.0 is the
    oldest huggingface_hub.
    """
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # imported there

    if not issubclass(HTTPError, OSError):
        return HTTPError
    from requests import RequestException

    return RequestException
