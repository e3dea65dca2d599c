"""Plugs residual prompt tuning into PEFT: the only file that changes anything in it.

Two mapping entries make PEFT build and read residual adapters. Three methods of `PeftModel` are wrapped, since they
refuse or cannot do what residual adapters can: `add_adapter` (gives the model its class of `base.py`),
`load_adapter` and `from_pretrained` (`is_trainable=True`, checks of the file). Wrappers hand everything that is not a
residual adapter to PEFT's own method, unchanged. `docs/how-it-plugs-in.md` says why each is needed.
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.prompt_tuning import PromptEmbedding
from peft.tuners.tuners_utils import BasePromptEncoder
from torch import Tensor

from ..config import PEFT_TYPE_NAME, ResidualPromptTuningConfig
from ..encoder import ResidualPromptEncoder
from ..storage import checkpoint, validation
from .base import RESIDUAL_MODEL_CLASSES, ResidualPeftModel
from .learning_rate import watch_learning_rate


_LOCK = threading.Lock()
_MARK = "_residual_config_class"

# PEFT removes the adapter's name from keys right after it has collected them, and does not say of which config.
_saving_residual: ContextVar[bool] = ContextVar("_saving_residual", default=False)
# Whether an adapter that is added is one that is being loaded; a new one cannot be for inference.
_loading: ContextVar[bool] = ContextVar("_loading", default=False)

# Heads that PEFT trains along, by task, besides those of `modules_to_save`.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def register() -> None:
    """Plug into PEFT, once: a second call, a reload and concurrent calls change nothing more."""
    with _LOCK:
        PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE_NAME] = ResidualPromptTuningConfig
        current = PEFT_TYPE_TO_TUNER_MAPPING[PeftType.PROMPT_TUNING]
        if getattr(current, _MARK, None) is not ResidualPromptTuningConfig:
            PEFT_TYPE_TO_TUNER_MAPPING[PeftType.PROMPT_TUNING] = _make_dispatcher(current)
        _wrap("add_adapter", _add_adapter)
        _wrap("load_adapter", _load_adapter)
        _wrap("from_pretrained", _from_pretrained)


def _make_dispatcher(previous: type[BasePromptEncoder]) -> type[BasePromptEncoder]:
    """The class that PEFT finds for prompt tuning: residual configs to our encoder, others to `previous`."""

    def handler(config: PeftConfig) -> type[BasePromptEncoder]:
        return ResidualPromptEncoder if isinstance(config, ResidualPromptTuningConfig) else previous

    class PromptEmbeddingDispatcher(PromptEmbedding):
        def __new__(cls, config: PeftConfig, word_embeddings: torch.nn.Module) -> Any:
            return handler(config)(config, word_embeddings)

        @classmethod
        def _get_adapter_state_dict(cls, model: Any, config: PeftConfig, *args: Any, **kwargs: Any) -> Any:
            _saving_residual.set(handler(config) is ResidualPromptEncoder)
            return handler(config)._get_adapter_state_dict(model, config, *args, **kwargs)

        @classmethod
        def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
            # Keys of a residual adapter and of its heads never hold the name, only words that may be equal to it.
            return key if _saving_residual.get() else previous._remove_adapter_name_from_key(key, adapter_name)

        @classmethod
        def _remap_adapter_state_dict_for_load(cls, model: Any, config: PeftConfig, *args: Any, **kwargs: Any) -> Any:
            return handler(config)._remap_adapter_state_dict_for_load(model, config, *args, **kwargs)

    setattr(PromptEmbeddingDispatcher, _MARK, ResidualPromptTuningConfig)
    return PromptEmbeddingDispatcher


def _wrap(name: str, wrapper: Any) -> None:
    current = PeftModel.__dict__[name]
    if getattr(getattr(current, "__func__", current), _MARK, None) is ResidualPromptTuningConfig:
        return
    is_classmethod = isinstance(current, classmethod)
    original = current.__func__ if is_classmethod else current

    @functools.wraps(original)
    def wrapped(self_or_cls: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self_or_cls, *args, **kwargs)

    setattr(wrapped, _MARK, ResidualPromptTuningConfig)
    setattr(PeftModel, name, classmethod(wrapped) if is_classmethod else wrapped)


def _add_adapter(
    original: Any, model: PeftModel, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any
) -> None:
    if not isinstance(peft_config, ResidualPromptTuningConfig):
        original(model, adapter_name, peft_config, *args, **kwargs)
        return
    model_class = _residual_class(type(model))
    if not adapter_name or set(adapter_name) & set("./\\"):
        raise ValueError(
            f"`adapter_name`={adapter_name!r} cannot name a module, nor the folder that the adapter is saved to. Use "
            "a name without dots and slashes."
        )
    heads = {*(peft_config.modules_to_save or ()), *_HEADS.get(peft_config.task_type, ())}
    if adapter_name in heads:
        raise ValueError(
            f"`adapter_name`={adapter_name!r} is the name of a module that is trained along (`modules_to_save`), and "
            "PEFT would take the prompt for it. Choose another name."
        )
    if peft_config.inference_mode and not _loading.get():
        warnings.warn(
            "The config of a new adapter says `inference_mode=True`, as saved configs do; it is set to False, since "
            "there is nothing trained to run. To load weights, use `PeftModel.from_pretrained`.",
            stacklevel=4,
        )
        peft_config.inference_mode = False
    peft_config.model_special_ids = _special_ids(model.base_model)
    original(model, adapter_name, peft_config, *args, **kwargs)
    # As torch's `fully_shard` does, the instance changes its class: PEFT's classes stay as they are.
    model.__class__ = model_class
    # PEFT keeps the base model's table under a second name, and FSDP2 cannot load a checkpoint that has both: here the
    # second is an attribute that is no submodule.
    if "word_embeddings" in model._modules:
        vars(model)["word_embeddings"] = model._modules.pop("word_embeddings")
    model.freeze_inactive_prompts()
    watch_learning_rate(model.prompt_encoder[adapter_name])


def _residual_class(model_class: type[PeftModel]) -> type[PeftModel]:
    if issubclass(model_class, ResidualPeftModel):
        return model_class
    for known, residual in RESIDUAL_MODEL_CLASSES.items():
        if model_class is known:
            return residual
        if issubclass(model_class, known):  # a subclass of the user's
            return type(f"Residual{model_class.__name__}", (residual, model_class), {})
    raise TypeError(
        f"{model_class.__name__} does not put a prompt in front of the input. Build the model with "
        "`peft.get_peft_model(model, config)`, which takes PEFT's class for the config's `task_type`."
    )


def _load_adapter(
    original: Any,
    model: PeftModel,
    model_id: str | os.PathLike[str],
    adapter_name: str,
    is_trainable: bool = False,
    *args: Any,
    **kwargs: Any,
) -> Any:
    is_new = adapter_name not in model.peft_config
    if not _is_residual(model, model_id, adapter_name, kwargs):
        return original(model, model_id, adapter_name, is_trainable, *args, **kwargs)
    config, tensors = validation.read_adapter(model_id, model.peft_config.get(adapter_name), **_hub_kwargs(kwargs))
    with validation.naming(model_id):
        _check_modules_to_save(model, config, tensors, kwargs.get("ignore_mismatched_sizes", False))
        if not is_new:
            return original(model, model_id, adapter_name, is_trainable, *args, **kwargs)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # PEFT refuses to load a prompt for training. Loading it for inference does not need what it started from.
        with _loading_adapter(model, keep_modes=is_trainable):
            try:
                result = original(model, model_id, adapter_name, False, *args, **kwargs)
            except Exception:
                if adapter_name in model.peft_config:
                    model.delete_adapter(adapter_name)  # a half-loaded adapter would answer from its random start
                raise
            finally:
                for parameter in trained:  # PEFT has frozen the heads of the adapter that is being trained
                    parameter.requires_grad_(True)
    if is_trainable:
        model.peft_config[adapter_name].inference_mode = False
        if adapter_name == model.active_adapter:
            model.set_adapter(adapter_name)
    return result


def _from_pretrained(
    original: Any,
    cls: type[PeftModel],
    model: torch.nn.Module,
    model_id: str | os.PathLike[str],
    adapter_name: str = "default",
    is_trainable: bool = False,
    config: PeftConfig | None = None,
    *args: Any,
    **kwargs: Any,
) -> PeftModel:
    hub_kwargs = _hub_kwargs(kwargs)
    if config is None and (is_trainable or os.path.isdir(model_id)):
        is_residual = validation.is_residual(model_id, **hub_kwargs)
    else:
        is_residual = isinstance(config, ResidualPromptTuningConfig)
    if not is_residual:
        return original(cls, model, model_id, adapter_name, is_trainable, config, *args, **kwargs)
    validation.read_adapter(model_id, config, **hub_kwargs)  # before a model is touched
    config = copy.deepcopy(config)  # PEFT switches the config to inference: not the one of a live model
    with validation.naming(model_id), _loading_adapter(model, keep_modes=is_trainable):
        peft_model = original(cls, model, model_id, adapter_name, False, config, *args, **kwargs)
    if is_trainable:
        peft_model.training = True
        peft_model.prompt_encoder.train()
        peft_model.peft_config[adapter_name].inference_mode = False
        peft_model.set_adapter(adapter_name)
    return peft_model


def _is_residual(model: PeftModel, model_id: str | os.PathLike[str], adapter_name: str, kwargs: Any) -> bool:
    if adapter_name in model.peft_config:
        return isinstance(model.peft_config[adapter_name], ResidualPromptTuningConfig)
    if model.peft_type != PeftType.PROMPT_TUNING:  # PEFT refuses to mix them
        return False
    return validation.is_residual(model_id, **_hub_kwargs(kwargs))


def _check_modules_to_save(
    model: PeftModel, config: PeftConfig, tensors: dict[str, Tensor], ignore_mismatched_sizes: bool
) -> None:
    """Refuse weights that the model has no place for, which PEFT would pass over, and a head that has none."""
    named = itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers())
    live = {
        name.replace(".original_module.", "."): list(getattr(tensor, "ds_shape", tensor.shape))  # whole under ZeRO-3
        for name, tensor in named
        if name.startswith("base_model.") and ".modules_to_save." not in name
    }
    found = {key: list(tensor.shape) for key, tensor in checkpoint.unpack(tensors)[2].items()}
    needed = validation.keys_of_modules(live, config.modules_to_save)
    mismatches = [
        f"  {key}: expected {live.get(key, 'nothing')}, found {found.get(key, 'nothing')}"
        for key in sorted({*found, *needed})
        if key not in live or key not in found or (live[key] != found[key] and not ignore_mismatched_sizes)
    ]
    if mismatches:
        raise ValueError(
            "The checkpoint's modules that were trained along (`modules_to_save`) are not this base model's, or are "
            "damaged:\n" + "\n".join(mismatches) + "\nUse the base model that the adapter was trained for, with as "
            "many labels, or save or download the adapter again."
        )


def _hub_kwargs(kwargs: Any) -> dict[str, Any]:
    hub_kwargs, _ = PeftModel._split_kwargs(kwargs)
    hub_kwargs.pop("use_auth_token", None)
    return {name: value for name, value in hub_kwargs.items() if value is not None}


def _special_ids(base_model: Any) -> tuple[int, ...]:
    """Every `*_token_id` that the model's configuration names."""
    values = base_model.config.to_dict() if hasattr(base_model.config, "to_dict") else {}
    ids: set[int] = set()
    for name, value in values.items():
        if name.endswith(("_token_id", "_token_ids")):
            ids.update(i for i in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(i, int))
    return tuple(sorted(ids))


@contextmanager
def _loading_adapter(model: torch.nn.Module, keep_modes: bool) -> Iterator[None]:
    """Tell `add_adapter` that weights will follow; undo the `eval()` that PEFT ends loading for inference with."""
    modes = [(module, module.training) for module in model.modules()] if keep_modes else []
    token = _loading.set(True)
    try:
        yield
    finally:
        _loading.reset(token)
    for module, mode in modes:
        module.training = mode
