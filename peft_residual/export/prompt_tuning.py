"""After training: the projected prompt as a tensor, as a file, and as an adapter that stock PEFT loads."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PromptEmbedding, PromptTuningConfig, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from ..config import PEFT_TYPE, ResidualPromptTuningConfig
from ..storage import atomic, checkpoint, files, model_card
from ..storage.saved_adapter import read_adapter
from ..storage.sharded import is_sharded


def get_prompt_tensor(model: PeftModel, adapter_name: str = "default") -> Tensor:
    """Return what the frozen model sees in place of the virtual tokens.

    Args:
        model ([`~peft.PeftModel`]): With a residual or a plain prompt tuning adapter.
        adapter_name (`str`): Which adapter.

    Returns:
        `torch.Tensor`: The projected prompt `[P, H]`, on the CPU, detached; float32 for a residual adapter.

    Raises:
        ValueError: If there is no such adapter, or it is of another kind.
    """
    require_adapter(model, adapter_name, PromptTuningConfig)
    return model.get_prompt_embedding_to_save(adapter_name)


def convert_to_prompt_tuning(model: PeftModel, adapter_name: str = "default") -> None:
    """Turn a residual adapter into a plain prompt tuning adapter, in place: the network is dropped.

    The model computes the same. What it saves from now on loads without this package. Training on is then plain prompt
    tuning; an optimizer made before holds the old parameters and must be made anew.

    Args:
        model ([`~peft.PeftModel`]): The model.
        adapter_name (`str`): The residual adapter to convert.

    Raises:
        ValueError: If there is no such adapter, it is no residual adapter, or its weights are spread over processes.
    """
    require_adapter(model, adapter_name, ResidualPromptTuningConfig)
    encoder = model.prompt_encoder[adapter_name]
    if is_sharded(encoder):
        raise ValueError(
            f"The weights of adapter {adapter_name!r} are spread over processes (FSDP2 or ZeRO-3), which hold on to "
            "them. Save it with `model.save_pretrained` and merge the folder with `save_as_prompt_tuning`."
        )
    plain_config = model.peft_config[adapter_name].to_prompt_tuning_config()
    prompt = get_prompt_tensor(model, adapter_name)
    with torch.random.fork_rng(devices=[]):  # the start that PEFT draws is replaced on the next lines
        embedding = PromptEmbedding(plain_config, model.word_embeddings)
    embedding.embedding.weight = torch.nn.Parameter(prompt.to(encoder.embedding.weight.device))
    embedding.requires_grad_(encoder.is_trainable).train(encoder.training)
    model.merged_from[adapter_name] = model.peft_config[adapter_name]
    model.prompt_encoder[adapter_name] = embedding
    model.peft_config[adapter_name] = plain_config


def save_as_prompt_tuning(
    model_or_adapter_folder: PeftModel | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    overwrite: bool = False,
) -> Path:
    """Save a residual adapter as a plain prompt tuning adapter, which stock PEFT loads without this package.

    The source is not changed. Heads that were trained along (`modules_to_save`) are taken over. The folder appears
    whole or not at all.

    Args:
        model_or_adapter_folder ([`~peft.PeftModel`], `str` or `os.PathLike`): A model, or the folder (or Hub id) of a
            saved residual adapter; a folder needs no base model.
        out (`str` or `os.PathLike`): The folder to write: `adapter_config.json`, a model card, and
            `adapter_model.safetensors` with the prompt `[P, H]` in float32.
        adapter_name (`str`): Which adapter of a model.
        overwrite (`bool`): Whether to replace a folder that exists.

    Returns:
        `pathlib.Path`: The folder.

    Raises:
        ValueError: If the source is no residual adapter, or is damaged.
        FileExistsError: If `out` exists and `overwrite` is False, or it is no adapter's folder.
    """
    if isinstance(model_or_adapter_folder, PeftModel):
        model = model_or_adapter_folder
        require_adapter(model, adapter_name, ResidualPromptTuningConfig)
        config = model.peft_config[adapter_name]
        tensors = get_peft_model_state_dict(model, adapter_name=adapter_name)
    else:
        config, tensors = _read_folder(model_or_adapter_folder)
    plain_config = config.to_prompt_tuning_config(inference_mode=True)
    return write_adapter(out, plain_config, checkpoint.strip(tensors), trained_as=config, overwrite=overwrite)


def save_prompt_tensor(
    model_or_adapter_folder: PeftModel | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    overwrite: bool = False,
) -> Path:
    """Save the projected prompt `[P, H]`, float32, as a file. It appears whole or not at all.

    Args:
        model_or_adapter_folder ([`~peft.PeftModel`], `str` or `os.PathLike`): A model with a residual or plain prompt
            tuning adapter, or the folder (or Hub id) of a saved one.
        out (`str` or `os.PathLike`): The file; its name says the format. `.safetensors`: one tensor,
            `prompt_embeddings`. `.npy`: NumPy. `.pt`: what `torch.load` reads, the format that vLLM decodes prompt
            embeddings from (see `serving.py` for whole requests).
        adapter_name (`str`): Which adapter of a model.
        overwrite (`bool`): Whether to replace a file that exists.

    Returns:
        `pathlib.Path`: The file.

    Raises:
        ValueError: If the name ends otherwise, or there is no such prompt.
        FileExistsError: If `out` exists and `overwrite` is False.
    """
    out = atomic.resolve(out)
    if out.suffix not in _TENSOR_WRITERS:
        raise ValueError(f"`out`={str(out)!r} must end in one of {sorted(_TENSOR_WRITERS)}, which name the format.")
    if isinstance(model_or_adapter_folder, PeftModel):
        prompt = get_prompt_tensor(model_or_adapter_folder, adapter_name)
        rows = model_or_adapter_folder.peft_config[adapter_name].num_virtual_tokens
    else:
        prompt, rows = files.read_prompt(model_or_adapter_folder)
    prompt = prompt[:rows]  # PEFT keeps a second set for the decoder, which sees none of it
    with atomic.new_file(out, overwrite=overwrite) as path:
        # A copy of its own: torch would write the whole storage of a view.
        _TENSOR_WRITERS[out.suffix](prompt.float().contiguous().clone(), path)
    return out


def _write_npy(prompt: Tensor, path: Path) -> None:
    import numpy

    numpy.save(path, prompt.numpy(), allow_pickle=False)


_TENSOR_WRITERS: dict[str, Callable[[Tensor, Path], None]] = {
    ".safetensors": lambda prompt, path: save_file({checkpoint.PROJECTED_KEY: prompt}, path, {"format": "pt"}),
    ".npy": _write_npy,
    ".pt": torch.save,
}


def _read_folder(folder: str | os.PathLike[str]) -> tuple[ResidualPromptTuningConfig, dict[str, Tensor]]:
    saved = read_adapter(folder)
    config, tensors = saved.config, {checkpoint.PROJECTED_KEY: saved.projected, **saved.heads}
    if not isinstance(config, ResidualPromptTuningConfig):
        raise ValueError(
            f"`{folder}` holds an adapter of type {config.peft_type.value!r}, expected {PEFT_TYPE.value!r}. Only "
            "residual adapters have a network to merge."
        )
    return config, tensors


def write_adapter(
    out: str | os.PathLike[str],
    config: PeftConfig,
    tensors: dict[str, Tensor],
    *,
    trained_as: PromptTuningConfig,
    overwrite: bool,
) -> Path:
    """Write a folder that PEFT loads, whole or not at all; its model card describes the adapter that was trained."""
    out = atomic.resolve(out)
    with atomic.new_folder(out, marker=CONFIG_NAME, overwrite=overwrite) as folder:
        save_file({k: t.contiguous() for k, t in tensors.items()}, folder / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
        (folder / CONFIG_NAME).write_text(json.dumps(config.to_dict(), indent=2, sort_keys=True), encoding="utf-8")
        model_card.update_card(folder, trained_as=trained_as.to_dict())
    return out


def require_adapter(model: Any, adapter_name: str, config_class: type[PromptTuningConfig]) -> None:
    """Raise a `ValueError` unless the model has such an adapter, of this kind."""
    if not isinstance(model, PeftModel):
        raise ValueError(f"`model` must be a PeftModel, got {type(model).__name__}. Unwrap it first.")
    config = model.peft_config.get(adapter_name)
    if config is None:
        raise ValueError(f"No adapter is named {adapter_name!r}. There are: {sorted(model.peft_config)}.")
    if not isinstance(config, config_class):
        raise ValueError(
            f"Adapter {adapter_name!r} is configured by {type(config).__name__}, expected {config_class.__name__}. "
            "Name another adapter with `adapter_name`."
        )


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Run without dropout; each module gets its mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def is_close(found: Tensor, expected: Tensor) -> bool:
    """Whether two results of one computation differ by no more than the order of its steps explains."""
    tolerance = torch.finfo(expected.dtype).eps ** 0.5
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())
