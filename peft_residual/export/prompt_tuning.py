"""The projected prompt of a trained adapter as a tensor, as a file, and as an adapter that PEFT loads on its own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PromptEmbedding, PromptTuningConfig, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from ..compat import warn_of_stock_generation
from ..config import PEFT_TYPE, ResidualPromptTuningConfig
from ..storage import atomic, checkpoint, model_card
from ..storage.files import read_prompt
from ..storage.saved_adapter import read_adapter
from ..storage.sharded import is_sharded
from .shared import find_adapter


def get_prompt_tensor(model: PeftModel, adapter_name: str | None = None) -> Tensor:
    """Return the projected prompt: what the frozen model sees in place of the virtual tokens.

    Args:
        model ([`~peft.PeftModel`]): A model with a residual or plain prompt tuning adapter.
        adapter_name (`str`, *optional*): The adapter; the active one when None.

    Returns:
        `torch.Tensor`: `[P, H]`, on the CPU, detached; float32 for a residual adapter.

    Raises:
        ValueError: If there is no such adapter, or it is of another type.
    """
    adapter_name, _ = find_adapter(model, adapter_name, PromptTuningConfig)
    return model.get_prompt_embedding_to_save(adapter_name)


def convert_to_prompt_tuning(model: PeftModel, adapter_name: str | None = None) -> None:
    """Merge a residual adapter into a plain prompt tuning adapter, in place: the network is dropped.

    The model's outputs stay the same. What it saves from now on loads without this package. Further training is plain
    prompt tuning, and needs a new optimizer: an existing one refers to the old parameters.

    Args:
        model ([`~peft.PeftModel`]): The model.
        adapter_name (`str`, *optional*): The residual adapter to convert; the active one when None.

    Raises:
        ValueError: If there is no such adapter, it is not a residual adapter, or its weights are sharded.
    """
    adapter_name, config = find_adapter(model, adapter_name, ResidualPromptTuningConfig)
    encoder: Any = model.prompt_encoder[adapter_name]
    if is_sharded(encoder):
        raise ValueError(
            f"The weights of adapter {adapter_name!r} are sharded by FSDP2 or ZeRO-3, which keep references to them. "
            "Save it with `model.save_pretrained` and merge the folder with `save_as_prompt_tuning`."
        )
    if config.task_type == "CAUSAL_LM":
        warn_of_stock_generation()
    plain_config = config.to_prompt_tuning_config()
    prompt = get_prompt_tensor(model, adapter_name)
    with torch.random.fork_rng(devices=[]):  # PEFT draws a prompt, which is replaced on the next line
        embedding = PromptEmbedding(plain_config, model.word_embeddings)
    embedding.embedding.weight = torch.nn.Parameter(prompt.to(encoder.embedding.weight.device))
    embedding.requires_grad_(encoder.is_trainable).train(encoder.training)
    model.merged_from[adapter_name] = config
    model.prompt_encoder[adapter_name] = embedding
    model.peft_config[adapter_name] = plain_config


def save_as_prompt_tuning(
    model_or_path: PeftModel | str | os.PathLike[str],
    save_directory: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    overwrite: bool = False,
    **hub_kwargs: Any,
) -> Path:
    """Save a residual adapter as a plain prompt tuning adapter, which PEFT loads without this package.

    The source is not changed. Trained heads (`modules_to_save`) are saved too.

    Args:
        model_or_path ([`~peft.PeftModel`], `str` or `os.PathLike`): A model, or the folder or Hub id of a saved
            residual adapter; these need no base model.
        save_directory (`str` or `os.PathLike`): The folder to write, completely or not at all: `adapter_config.json`,
            a model card, and `adapter_model.safetensors` with the prompt `[P, H]` in float32.
        adapter_name (`str`, *optional*): A model's adapter; the active one when None.
        overwrite (`bool`): Whether to replace an existing folder.
        hub_kwargs: `revision`, `subfolder`, `token` and the like for a folder or Hub id, as in `from_pretrained`.

    Returns:
        `pathlib.Path`: The folder.

    Raises:
        ValueError: If the source is not a residual adapter, or is damaged.
        FileExistsError: If `save_directory` exists and `overwrite` is False, or it is not an adapter's folder.
    """
    if isinstance(model_or_path, PeftModel):
        adapter_name, config = find_adapter(model_or_path, adapter_name, ResidualPromptTuningConfig)
        tensors = checkpoint.strip(get_peft_model_state_dict(model_or_path, adapter_name=adapter_name))
    else:
        saved = read_adapter(model_or_path, **hub_kwargs)
        config, tensors = saved.config, {checkpoint.PROJECTED_KEY: saved.projected, **saved.heads}
        if not isinstance(config, ResidualPromptTuningConfig):
            raise ValueError(
                f"`{model_or_path}` contains an adapter of type {config.peft_type.value!r}, expected "
                f"{PEFT_TYPE.value!r}. Only residual adapters have a network to merge."
            )
        saved.build_encoder()  # checks that embedding and network result in the projected prompt
    if config.task_type == "CAUSAL_LM":
        warn_of_stock_generation()
    plain_config = config.to_prompt_tuning_config(inference_mode=True)
    return write_adapter(save_directory, plain_config, tensors, trained_as=config, overwrite=overwrite)


def save_prompt_tensor(
    model_or_path: PeftModel | str | os.PathLike[str],
    save_path: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    overwrite: bool = False,
    **hub_kwargs: Any,
) -> Path:
    """Save the projected prompt `[P, H]`, float32, as a single file.

    Args:
        model_or_path ([`~peft.PeftModel`], `str` or `os.PathLike`): A model with a residual or plain prompt tuning
            adapter, or the folder or Hub id of a saved one.
        save_path (`str` or `os.PathLike`): The file to write, completely or not at all. Its suffix is the format:
            `.safetensors` (one tensor, `prompt_embeddings`), `.npy` (NumPy), or `.pt` (`torch.load`; vLLM decodes
            prompt embeddings from it, see `serving.py` for whole requests).
        adapter_name (`str`, *optional*): A model's adapter; the active one when None.
        overwrite (`bool`): Whether to replace an existing file.
        hub_kwargs: `revision`, `subfolder`, `token` and the like for a folder or Hub id, as in `from_pretrained`.

    Returns:
        `pathlib.Path`: The file.

    Raises:
        ValueError: If the suffix is another one, or there is no such prompt.
        FileExistsError: If `save_path` exists and `overwrite` is False.
    """
    save_path = atomic.resolve(save_path)
    if save_path.suffix not in _TENSOR_WRITERS:
        raise ValueError(f"`save_path`={str(save_path)!r} must end in one of {sorted(_TENSOR_WRITERS)}.")
    rows: int | None
    if isinstance(model_or_path, PeftModel):
        adapter_name, config = find_adapter(model_or_path, adapter_name, PromptTuningConfig)
        prompt, rows = get_prompt_tensor(model_or_path, adapter_name), config.num_virtual_tokens
    else:
        prompt, rows = read_prompt(model_or_path, **hub_kwargs)
    prompt = prompt[:rows]  # PEFT keeps a second set of rows for a decoder, which never sees them
    with atomic.new_file(save_path, overwrite=overwrite) as path:
        # clone: torch would write the whole storage of a view
        _TENSOR_WRITERS[save_path.suffix](prompt.float().contiguous().clone(), path)
    return save_path


def _write_npy(prompt: Tensor, path: Path) -> None:
    import numpy

    numpy.save(path, prompt.numpy(), allow_pickle=False)


_TENSOR_WRITERS: dict[str, Callable[[Tensor, Path], None]] = {
    ".safetensors": lambda prompt, path: save_file({checkpoint.PROJECTED_KEY: prompt}, path, {"format": "pt"}),
    ".npy": _write_npy,
    ".pt": torch.save,
}


def write_adapter(
    save_directory: str | os.PathLike[str],
    config: PeftConfig,
    tensors: dict[str, Tensor],
    *,
    trained_as: PromptTuningConfig,
    overwrite: bool,
) -> Path:
    """Write a folder that PEFT loads, completely or not at all. Its card describes the adapter that was trained."""
    save_directory = atomic.resolve(save_directory)
    with atomic.new_folder(save_directory, marker=CONFIG_NAME, overwrite=overwrite) as folder:
        save_file({k: t.contiguous() for k, t in tensors.items()}, folder / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
        (folder / CONFIG_NAME).write_text(json.dumps(config.to_dict(), indent=2, sort_keys=True), encoding="utf-8")
        model_card.update_card(folder, trained_as=trained_as.to_dict())
    return save_directory
