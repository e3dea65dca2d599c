"""Reads the files of a saved adapter, from a folder or the Hub, as JSON and safetensors: nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..compat import connection_error
from .checkpoint import PROJECTED_KEY


# PEFT saves other things under the same key for its other types, such as keys and values for PREFIX_TUNING.
_PROMPT_TYPES = ("RESIDUAL_PROMPT_TUNING", "PROMPT_TUNING", "P_TUNING", "CPT")


def locate(source: str | os.PathLike[str], filename: str, **hub_kwargs: Any) -> Path:
    """Find a file of an adapter: in a local folder, else in a Hub repository (downloaded to the Hub's cache).

    Args:
        source (`str` or `os.PathLike`): A folder, or a Hub repository id.
        filename (`str`): The file's name in it.
        hub_kwargs: `subfolder`, `revision`, `token`, `cache_dir` and the like, as for `hf_hub_download`.

    Raises:
        ValueError: If there is no such file, or the download is damaged.
        OSError: If the Hub cannot be reached or refuses.
    """
    subfolder = hub_kwargs.get("subfolder") or ""
    folder = Path(source, subfolder)
    if folder.is_dir():
        path = folder / filename
        if path.is_file():
            return path
        if filename == SAFETENSORS_WEIGHTS_NAME and (folder / WEIGHTS_NAME).is_file():
            raise ValueError(
                f"`{folder}` contains {WEIGHTS_NAME}, a pickle, and no {filename}. Pickles can run code and are not "
                "read. Save the adapter again with `safe_serialization=True` (the default)."
            )
        raise ValueError(
            f"`{folder}` has no {filename}: not an adapter's folder, or an incomplete one. Check the path, or save "
            "or download the adapter again."
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        path = Path(hf_hub_download(str(source), filename, **hub_kwargs))
    except HFValidationError:
        raise ValueError(f"`{source}` is neither a folder nor the id of a Hub repository. Check the path.") from None
    except (EntryNotFoundError, RepositoryNotFoundError) as error:
        if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, connection_error()):
            raise OSError(f"The Hub did not give {filename} of `{source}`. {error}") from error
        raise ValueError(
            f"`{source}` is not a local folder, and the Hub gave no {filename} for it: {error}"
        ) from error
    except connection_error() as error:  # an HTTP error status, or a broken connection that is not an `OSError`
        raise OSError(f"The Hub did not give {filename} of `{source}`. {error}") from error
    _check_download(path)
    return path


def _check_download(path: Path) -> None:
    """Compare a file in the Hub's cache with the hash that is its name there. The client compares only sizes."""
    blob = path.resolve()
    if blob.parent.name != "blobs":  # without symbolic links there is no hash
        return
    data = blob.read_bytes()
    git_hash = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    if blob.name not in (hashlib.sha256(data).hexdigest(), git_hash):
        raise ValueError(
            f"`{blob}` is damaged: its hash is not the one that the Hub gave. Delete this file to download it again."
        )


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU.

    Raises:
        ValueError: If it is missing or damaged.
    """
    if not os.path.isfile(path):
        raise ValueError(f"`{path}` does not exist. Check the path.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {"format": "pt"}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"`{path}` is damaged or not a safetensors file ({error}). Save or download it again."
        ) from error
    if metadata.get("format") != "pt":
        raise ValueError(
            f"`{path}` contains tensors of format {metadata.get('format')!r}, expected 'pt' (PyTorch). Save or "
            "download the adapter again."
        )
    return tensors


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read an `adapter_config.json`.

    Raises:
        ValueError: If it is not a JSON object.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{path}` is damaged: not JSON ({error}). Save or download the adapter again.") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"`{path}` is damaged: expected a JSON object, found {type(values).__name__}. Save or download the "
            "adapter again."
        )
    return values


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without duplicate keys: readers differ in which of the values they take."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate keys: {sorted({key for key in keys if keys.count(key) > 1})}")
    return values


def read_prompt(source: str | os.PathLike[str], **hub_kwargs: Any) -> tuple[Tensor, int | None]:
    """Read a saved projected prompt.

    Args:
        source (`str` or `os.PathLike`): An adapter's folder or Hub id (residual, merged, or PEFT's own prompt tuning,
            P-tuning and CPT), or a `.safetensors` or `.npy` file with one prompt tensor.
        hub_kwargs: `subfolder`, `revision`, `token` and the like for a folder or Hub id, as for `hf_hub_download`.

    Returns:
        `tuple`: The prompt `[rows, H]`, float32. And the number of rows for the encoder, if the adapter has a second
        set of rows for the decoder (`num_transformer_submodules=2`), else None.

    Raises:
        ValueError: If nothing there can be read as a prompt.
    """
    source = Path(source)
    per_submodule = None
    if source.suffix == ".npy":
        prompt = _read_npy(source)
    elif source.suffix == ".safetensors":
        prompt = _single_prompt(read_tensors(source), source)
    else:
        tensors = read_tensors(locate(source, SAFETENSORS_WEIGHTS_NAME, **hub_kwargs))
        values = read_config(locate(source, CONFIG_NAME, **hub_kwargs))
        if values.get("peft_type") not in _PROMPT_TYPES:
            raise ValueError(
                f"`{source}` contains an adapter with `peft_type`={values.get('peft_type')!r}, which puts no prompt "
                f"in front of the input. Use one of type {', '.join(_PROMPT_TYPES)}, or a file with a prompt tensor."
            )
        prompt = _single_prompt(tensors, source)
        if values.get("num_transformer_submodules") == 2:
            per_submodule = values.get("num_virtual_tokens")
            if type(per_submodule) is not int or 2 * per_submodule != len(prompt):
                raise ValueError(
                    f"`{source}` has {len(prompt)} rows, but its config says num_virtual_tokens={per_submodule!r} "
                    "and num_transformer_submodules=2. The adapter is damaged: save it again."
                )
    if prompt.ndim != 2 or not prompt.is_floating_point():
        raise ValueError(
            f"`{source}` contains a tensor of shape {list(prompt.shape)} and type {prompt.dtype}, expected a prompt: "
            "two dimensions (virtual tokens, width) of floating-point numbers."
        )
    if not prompt.isfinite().all():
        raise ValueError(f"`{source}` contains NaN or infinite numbers, expected a finite prompt. Train it again.")
    return prompt.float(), per_submodule


def _single_prompt(tensors: Mapping[str, Tensor], source: Path) -> Tensor:
    if PROJECTED_KEY in tensors:
        return tensors[PROJECTED_KEY]
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    raise ValueError(f"`{source}` contains {sorted(tensors)}, expected `{PROJECTED_KEY}` or a single tensor.")


def _read_npy(path: Path) -> Tensor:
    import numpy

    if not path.is_file():
        raise ValueError(f"`{path}` does not exist. Check the path.")
    try:
        return torch.from_numpy(numpy.load(path, allow_pickle=False))
    except (ValueError, TypeError, EOFError, OSError) as error:
        raise ValueError(f"`{path}` is damaged or not an array of numbers ({error}). Save it again.") from error
