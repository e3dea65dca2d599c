"""What a residual adapter's weight file holds: plain `dict[str, Tensor]` in and out.

`adapter_model.safetensors` holds, besides the modules that the user asked PEFT to save:

| Key | Tensor |
|---|---|
| `prompt_embeddings` | the projected prompt `[P, H]`, float32: PEFT's own key, all that inference needs |
| `residual_prompt_tuning.format_version` | integer, no dimensions |
| `residual_prompt_tuning.embedding.weight` | the raw prompt `[P, H]`; for SUPERPOS the weights `[P, M]` |
| `residual_prompt_tuning.network.*` | the weights of the network; for SUPERPOS the frozen `rows` `[M, H]` |

Files are read as safetensors (or `.npy` without objects); nothing is unpickled.
"""

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


FORMAT_VERSION = 1
PROJECTED_KEY = "prompt_embeddings"
PREFIX = "residual_prompt_tuning."
VERSION_KEY = PREFIX + "format_version"
EMBEDDING_KEY = "embedding.weight"
NETWORK_PREFIX = "network."
# PEFT saves other things under the same key for its other types, such as keys and values for PREFIX_TUNING.
_PROMPT_TYPES = ("RESIDUAL_PROMPT_TUNING", "PROMPT_TUNING", "P_TUNING", "CPT")


def pack(projected: Tensor, encoder_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Lay out one adapter for its file.

    Args:
        projected (`torch.Tensor`): The projected prompt, `[P, H]`.
        encoder_state (`Mapping[str, torch.Tensor]`): `embedding.weight` and `network.*`.

    Returns:
        `dict[str, torch.Tensor]`: The tensors under the keys of the table above.
    """
    packed = {PROJECTED_KEY: projected, VERSION_KEY: torch.tensor(FORMAT_VERSION)}
    packed.update({PREFIX + leaf: tensor for leaf, tensor in encoder_state.items()})
    return packed


def unpack(tensors: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Take one adapter's file apart.

    Returns:
        `tuple`: The projected prompt `[P, H]`, the encoder's state (`embedding.weight`, `network.*`), and the tensors
        that are not the prompt's (heads that were trained along).

    Raises:
        ValueError: If the version is unknown, or a part is missing.
    """
    projected = projected_prompt(tensors)
    version = tensors.get(VERSION_KEY)
    if version is not None and (version.numel() != 1 or version.item() != FORMAT_VERSION):
        raise ValueError(
            f"The checkpoint has format version {version.tolist()}, this peft_residual reads {FORMAT_VERSION}. "
            "Upgrade peft_residual."
        )
    if version is None or PREFIX + EMBEDDING_KEY not in tensors:
        raise ValueError(
            "The checkpoint holds a projected prompt without the raw prompt and its network, though its config says "
            "RESIDUAL_PROMPT_TUNING. It cannot be trained on or saved again. Use the folder that "
            "`model.save_pretrained` wrote, or start a new adapter from this one with prompt_tuning_init='PROMPT'."
        )
    state = {key.removeprefix(PREFIX): tensors[key] for key in tensors if key.startswith(PREFIX)}
    del state[VERSION_KEY.removeprefix(PREFIX)]
    others = {key: tensors[key] for key in tensors if key != PROJECTED_KEY and not key.startswith(PREFIX)}
    return projected, state, others


def projected_prompt(tensors: Mapping[str, Tensor]) -> Tensor:
    """The projected prompt of one adapter's file.

    Raises:
        ValueError: If there is none.
    """
    if PROJECTED_KEY not in tensors:
        raise ValueError(
            f"The checkpoint has no `{PROJECTED_KEY}`, it holds {sorted(tensors)}. It is not a prompt, or only half of "
            "one: save the adapter again."
        )
    return tensors[PROJECTED_KEY]


def format_version(tensors: Mapping[str, Tensor]) -> int | None:
    """The version of the layout that one adapter's file says it has; None for a plain prompt's."""
    version = tensors.get(VERSION_KEY)
    if version is None or version.numel() != 1 or version.is_floating_point():
        return None
    return int(version)


def strip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keep what plain prompt tuning needs: the projected prompt and the modules that were trained along."""
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(PREFIX)}


def check_leaves(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Compare an encoder's state with a checkpoint's, leaf by leaf.

    Raises:
        ValueError: If a leaf is missing, unknown or of another shape; names every such leaf.
    """

    def shape(tensors: Mapping[str, Tensor], leaf: str) -> str:
        return str(list(tensors[leaf].shape)) if leaf in tensors else "nothing"

    mismatches = [
        f"  {leaf}: expected {shape(expected, leaf)}, found {shape(found, leaf)}"
        for leaf in sorted(expected.keys() | found.keys())
        if shape(expected, leaf) != shape(found, leaf)
    ]
    if mismatches:
        raise ValueError(
            "The checkpoint was made with another network, prompt length or model width than this adapter's config "
            "describes:\n" + "\n".join(mismatches) + "\nBuild the model with the checkpoint's own "
            "`adapter_config.json` (`PeftModel.from_pretrained`), or give this config the same `encoder_*` and "
            "`num_virtual_tokens` values."
        )


def locate(source: str | os.PathLike[str], filename: str, **hub_kwargs: Any) -> Path:
    """Find a file of an adapter: in a local folder, else in a Hub repository (downloaded to the Hub's cache).

    Args:
        source (`str` or `os.PathLike`): A folder, or a Hub repository id.
        filename (`str`): The file's name in it.
        hub_kwargs: `subfolder`, `revision`, `token`, `cache_dir` and the like, as for `hf_hub_download`.

    Raises:
        ValueError: If there is no such file, or what came of it is damaged.
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
                f"`{folder}` holds {WEIGHTS_NAME}, a pickle, and no {filename}. Pickles are not read, they can run "
                "code. Save the adapter again with `safe_serialization=True` (the default)."
            )
        raise ValueError(
            f"`{folder}` has no {filename}: it is no adapter's folder, or half of one. Check the path, or save or "
            "download the adapter again."
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError, RepositoryNotFoundError

    try:
        path = Path(hf_hub_download(str(source), filename, **hub_kwargs))
    except HFValidationError:
        raise ValueError(f"`{source}` is neither a folder nor the id of a Hub repository. Check the path.") from None
    except (EntryNotFoundError, RepositoryNotFoundError) as error:
        raise ValueError(
            f"`{source}` is not a local folder, and the Hub gave no {filename} for it: {error}"
        ) from error
    except HTTPError as error:  # a refusal, or a connection that broke off, which is no `OSError`
        raise OSError(f"The Hub did not give {filename} of `{source}`. {error}") from error
    _check_download(path)
    return path


def _check_download(path: Path) -> None:
    """Compare a file in the Hub's cache with the hash that names it there; the client compares sizes alone."""
    blob = path.resolve()
    if blob.parent.name != "blobs":  # systems without symbolic links keep no hash
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
            f"`{path}` holds tensors of format {metadata.get('format')!r}, expected 'pt' (PyTorch). Save or download "
            "the adapter again."
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
    """A JSON object; of a key that stands twice, readers differ in which value they take."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"these keys stand twice: {sorted({key for key in keys if keys.count(key) > 1})}")
    return values


def read_prompt(source: str | os.PathLike[str]) -> tuple[Tensor, int | None]:
    """Read a saved prompt as a frozen model sees it.

    Args:
        source (`str` or `os.PathLike`): An adapter's folder or Hub id (residual, merged, or PEFT's own prompt tuning,
            P-tuning and CPT), or a `.safetensors` or `.npy` file with one prompt tensor.

    Returns:
        `tuple`: The prompt `[rows, H]`, float32, and the number of rows in front of the encoder where the adapter
        keeps a second set for the decoder (`num_transformer_submodules=2`), else None.

    Raises:
        ValueError: If nothing there can be read as a prompt.
    """
    source = Path(source)
    per_submodule = None
    if source.suffix == ".npy":
        prompt = _read_npy(source)
    elif source.suffix == ".safetensors":
        prompt = _only_prompt(read_tensors(source), source)
    else:
        tensors = read_tensors(locate(source, SAFETENSORS_WEIGHTS_NAME))
        values = read_config(locate(source, CONFIG_NAME))
        if values.get("peft_type") not in _PROMPT_TYPES:
            raise ValueError(
                f"`{source}` holds an adapter with `peft_type`={values.get('peft_type')!r}, which is no prompt in "
                f"front of the input. Use one of type {', '.join(_PROMPT_TYPES)}, or a file with a prompt tensor."
            )
        prompt = _only_prompt(tensors, source)
        if values.get("num_transformer_submodules") == 2:
            per_submodule = values.get("num_virtual_tokens")
            if type(per_submodule) is not int or 2 * per_submodule != len(prompt):
                raise ValueError(
                    f"`{source}` holds {len(prompt)} rows, but its config says num_virtual_tokens={per_submodule!r} "
                    "and num_transformer_submodules=2. The adapter is damaged: save it again."
                )
    if prompt.ndim != 2 or not prompt.is_floating_point():
        raise ValueError(
            f"`{source}` holds a tensor of shape {list(prompt.shape)} and type {prompt.dtype}, expected a prompt: two "
            "dimensions (virtual tokens, width) of floating-point numbers."
        )
    if not prompt.isfinite().all():
        raise ValueError(f"`{source}` holds NaN or infinite numbers, expected a finite prompt. Train it again.")
    return prompt.float(), per_submodule


def _only_prompt(tensors: Mapping[str, Tensor], source: Path) -> Tensor:
    if PROJECTED_KEY in tensors:
        return tensors[PROJECTED_KEY]
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    raise ValueError(f"`{source}` holds {sorted(tensors)}, expected `{PROJECTED_KEY}` or a single tensor.")


def _read_npy(path: Path) -> Tensor:
    import numpy

    if not path.is_file():
        raise ValueError(f"`{path}` does not exist. Check the path.")
    try:
        return torch.from_numpy(numpy.load(path, allow_pickle=False))
    except (ValueError, TypeError, EOFError, OSError) as error:
        raise ValueError(f"`{path}` is damaged or not an array of numbers ({error}). Save it again.") from error
