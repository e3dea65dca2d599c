"""Plugs residual prompt tuning into PEFT: the only file that changes anything in it.

An entry in each of two mappings makes PEFT read residual configs and save residual adapters. Three methods of
`PeftModel` are wrapped, because they refuse what residual adapters can do: `add_adapter` (gives the model its residual
class), `from_pretrained` and `load_adapter` (`is_trainable=True`, checks of the files). Wrappers call PEFT's method,
unchanged, for every other adapter. `docs/how-it-plugs-in.md` says why each is needed.
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
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from ..config import PEFT_TYPE, ResidualPromptTuningConfig
from ..encoder import ResidualPromptEncoder, is_in_use
from ..storage import checkpoint
from ..storage.saved_adapter import SavedAdapter, keys_of_modules, naming, read_residual_adapter
from . import causal_lm, tasks
from .adapters import ResidualAdapters
from .base_model import check_base_model, fill_in_sizes
from .learning_rate import watch_learning_rate


_LOCK = threading.Lock()
_MARK = "_residual_config_class"

_RESIDUAL_CLASSES: dict[type[PeftModel], type[ResidualAdapters]] = {
    residual.__mro__[3]: residual
    for residual in (
        causal_lm.PeftModelForCausalLM,
        tasks.PeftModelForSeq2SeqLM,
        tasks.PeftModelForSequenceClassification,
        tasks.PeftModelForTokenClassification,
        tasks.PeftModelForQuestionAnswering,
        tasks.PeftModelForFeatureExtraction,
    )
}

# Adapters of these types can be in one model. PEFT allows one type only, which it keeps in `model.peft_type`.
_COMPATIBLE_TYPES = (PEFT_TYPE, PeftType.PROMPT_TUNING)

# Heads that PEFT trains for a task, besides `modules_to_save`.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def register() -> None:
    """Plug into PEFT, once: a second call, a reload or concurrent calls change nothing more."""
    with _LOCK:
        PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = ResidualPromptTuningConfig  # type: ignore[index]
        PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = ResidualPromptEncoder  # type: ignore[index, assignment]
        _wrap("add_adapter", _add_adapter)
        _wrap("load_adapter", _load_adapter)
        _wrap("from_pretrained", _from_pretrained)


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


# --- add ------------------------------------------------------------------------------------------------------------


def _add_adapter(original: Any, model: Any, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> None:
    is_residual = isinstance(peft_config, ResidualPromptTuningConfig) and model.peft_type in _COMPATIBLE_TYPES
    if is_residual:
        _check_adapter_name(adapter_name, peft_config)
        check_base_model(model.base_model, peft_config.task_type)
        _adopt(model)
        fill_in_sizes(peft_config, model.base_model)
        if peft_config.inference_mode:
            warnings.warn(
                "The config of a new adapter has `inference_mode=True`, as saved configs do. It is set to False, "
                "because nothing is trained yet. To load weights, use `PeftModel.from_pretrained`.",
                stacklevel=4,
            )
            peft_config.inference_mode = False
    if isinstance(model, ResidualAdapters) and peft_config.peft_type in _COMPATIBLE_TYPES:
        model.peft_type = peft_config.peft_type
    original(model, adapter_name, peft_config, *args, **kwargs)
    if is_residual:
        # Of an adapter with the very same config, TRL's DPO makes a copy: of its weights, but not of buffers.
        source = next(
            (n for n, config in model.peft_config.items() if config is peft_config and n != adapter_name), None
        )
        if source is not None:
            for name, buffer in model.prompt_encoder[adapter_name].named_buffers():
                buffer.copy_(model.prompt_encoder[source].get_buffer(name))
        model.freeze_inactive_prompts()
        watch_learning_rate(model.prompt_encoder[adapter_name])


def _adopt(model: Any) -> None:
    """Give the instance its residual class, as torch's `fully_shard` does; PEFT's classes are not changed."""
    if isinstance(model, ResidualAdapters):
        return
    model.__class__ = _residual_class(type(model))
    model.merged_from = {}


def _residual_class(model_class: type[PeftModel]) -> type[PeftModel]:
    for known, residual in _RESIDUAL_CLASSES.items():
        if model_class is known:
            return residual
        if issubclass(model_class, known):  # a user's subclass
            return type(model_class.__name__, (residual, model_class), {})
    raise TypeError(
        f"{model_class.__name__} does not put a prompt in front of the input. Build the model with "
        "`peft.get_peft_model(model, config)`, which uses PEFT's class for the config's `task_type`."
    )


def _check_adapter_name(adapter_name: str, config: Any) -> None:
    if not adapter_name or set(adapter_name) & set("./\\"):
        raise ValueError(
            f"`adapter_name`={adapter_name!r} can be neither the name of a module nor of the folder that the adapter "
            "is saved to. Use a name without dots and slashes."
        )
    if adapter_name in _trained_heads(config):
        raise ValueError(
            f"`adapter_name`={adapter_name!r} is the name of a module in `modules_to_save`, and PEFT would mistake "
            "the prompt for it. Choose another name."
        )


def _trained_heads(config: Any) -> set[str]:
    return {*(config.modules_to_save or ()), *_HEADS.get(config.task_type, ())}


# --- load -----------------------------------------------------------------------------------------------------------


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
    saved = None
    if config is None or isinstance(config, ResidualPromptTuningConfig):
        # As in PEFT, the given config becomes the model's own; but not if it already is another model's.
        if config is not None and is_in_use(config):
            config = copy.deepcopy(config)
        saved = read_residual_adapter(model_id, config, **_hub_kwargs(kwargs))
    if saved is None:
        return original(cls, model, model_id, adapter_name, is_trainable, config, *args, **kwargs)
    with _loading(model, model_id, keep_modes=is_trainable):
        plain = _check_before_loading(model, "base_model.", adapter_name, saved, kwargs)
        encoder = saved.build_encoder()
        peft_model = original(cls, model, model_id, adapter_name, False, plain, *args, **kwargs)
        _adopt(peft_model)
        peft_model.install_encoder(adapter_name, saved.config, encoder)
    if is_trainable:
        peft_model.training = True
        peft_model.prompt_encoder.train()
        _make_trainable(peft_model, adapter_name)
    return peft_model


def _load_adapter(
    original: Any,
    model: PeftModel,
    model_id: str | os.PathLike[str],
    adapter_name: str,
    is_trainable: bool = False,
    *args: Any,
    **kwargs: Any,
) -> Any:
    existing = model.peft_config.get(adapter_name)
    saved = None
    if isinstance(existing, ResidualPromptTuningConfig) or (existing is None and model.peft_type in _COMPATIBLE_TYPES):
        saved = read_residual_adapter(model_id, existing, **_hub_kwargs(kwargs))
    if saved is None:
        return original(model, model_id, adapter_name, is_trainable, *args, **kwargs)
    if existing is not None:  # PEFT calls the encoder's hooks
        with naming(model_id):
            _check_heads(model, "", saved, kwargs)
            return original(model, model_id, adapter_name, is_trainable, *args, **kwargs)
    with _loading(model, model_id, keep_modes=is_trainable):
        plain = _check_before_loading(model, "", adapter_name, saved, kwargs)
        encoder = saved.build_encoder()
        try:
            model.add_adapter(adapter_name, plain)
            result = original(model, model_id, adapter_name, False, *args, **kwargs)
            _adopt(model)
            model.install_encoder(adapter_name, saved.config, encoder)
        except Exception:
            if adapter_name in model.peft_config:
                model.delete_adapter(adapter_name)  # it would run with a random prompt
            raise
    result.unexpected_keys[:] = [key for key in result.unexpected_keys if not key.startswith(checkpoint.PREFIX)]
    if is_trainable:
        _make_trainable(model, adapter_name)
    return result


def _check_before_loading(
    model: torch.nn.Module, prefix: str, adapter_name: str, saved: SavedAdapter, kwargs: Any
) -> PeftConfig:
    """Check everything that can be checked before the model is touched.

    Returns:
        [`~peft.PromptTuningConfig`]: The plain config with which PEFT can load the adapter: for inference, without
        asking for what the prompt was initialized from.
    """
    _check_adapter_name(adapter_name, saved.config)
    _check_heads(model, prefix, saved, kwargs)
    check_base_model(model.base_model if isinstance(model, PeftModel) else model, saved.config.task_type)
    return saved.config.to_prompt_tuning_config(inference_mode=True)


def _check_heads(model: torch.nn.Module, prefix: str, saved: SavedAdapter, kwargs: Any) -> None:
    """Refuse weights that the model has no place for, which PEFT would ignore, and heads without weights."""
    heads = _trained_heads(saved.config)
    if not heads and not saved.heads:
        return
    named = itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers())
    live = {
        (prefix + name).replace(".original_module.", "."): list(getattr(tensor, "ds_shape", tensor.shape))  # ZeRO-3
        for name, tensor in named
        if (prefix + name).startswith("base_model.") and ".modules_to_save." not in name
    }
    found = {key: list(tensor.shape) for key, tensor in saved.heads.items()}
    needed = keys_of_modules(live, heads)
    ignore_mismatched_sizes = kwargs.get("ignore_mismatched_sizes", False)
    mismatches = [
        f"  {key}: expected {live.get(key, 'nothing')}, found {found.get(key, 'nothing')}"
        for key in sorted({*found, *needed})
        if key not in live or key not in found or (live[key] != found[key] and not ignore_mismatched_sizes)
    ]
    if mismatches:
        raise ValueError(
            "The checkpoint's trained heads (`modules_to_save`) do not fit this base model, or are damaged:\n"
            + "\n".join(mismatches)
            + "\nUse the base model that the adapter was trained for, with as many labels, or save or download the "
            "adapter again."
        )


@contextmanager
def _loading(model: torch.nn.Module, model_id: str | os.PathLike[str], keep_modes: bool) -> Iterator[None]:
    """Name the source in errors, and undo what PEFT does to the rest of the model when it loads a prompt.

    It puts the whole model in eval mode, freezes the heads of the adapter that is being trained, and draws random
    numbers.
    """
    modes = [(module, module.training) for module in model.modules()] if keep_modes else []
    trained = [p for p in model.parameters() if p.requires_grad] if isinstance(model, PeftModel) else []
    try:
        with naming(model_id), torch.random.fork_rng(devices=[]):
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    for module, mode in modes:
        module.training = mode


def _make_trainable(model: Any, adapter_name: str) -> None:
    model.peft_config[adapter_name].inference_mode = False
    model.prompt_encoder[adapter_name].train(model.training)
    if adapter_name == model.active_adapter:
        model.set_adapter(adapter_name)


def _hub_kwargs(kwargs: Any) -> dict[str, Any]:
    hub_kwargs, _ = PeftModel._split_kwargs(kwargs)
    hub_kwargs.pop("use_auth_token", None)
    return {name: value for name, value in hub_kwargs.items() if value is not None}
