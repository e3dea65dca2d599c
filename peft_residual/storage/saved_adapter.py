"""Reads a saved adapter once and checks it: everything that can be checked without the base model.

Files are read as JSON and safetensors: nothing in them is executed, and paths in them are not followed. Not detected:
a changed bit that changes the prompt by no more than rounding would, or that changes a head. Files have no checksum:
it would be invalid after casting them or removing the network, and the Hub and git have their own.
"""

from __future__ import annotations

import copy
import inspect
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PromptTuningConfig, TaskType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.prompt_tuning import PromptTuningInit
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from ..config import PEFT_TYPE, ResidualPromptTuningConfig
from ..config_checks import check_types
from ..encoder import ResidualPromptEncoder
from . import checkpoint
from .files import locate, read_config, read_tensors


_CONFIG_CLASSES: dict[str, type[PromptTuningConfig]] = {
    PEFT_TYPE.value: ResidualPromptTuningConfig,
    "PROMPT_TUNING": PromptTuningConfig,
}


@dataclass(frozen=True)
class SavedAdapter:
    """A saved adapter, residual or plain prompt tuning: its files, read once and checked.

    Attributes:
        config ([`~peft.PromptTuningConfig`]): The saved config, or the one that was given instead.
        projected (`torch.Tensor`): The projected prompt `[P, H]`.
        state (`dict[str, torch.Tensor]`): A residual adapter's `embedding.weight` and `network.*`; else empty.
        heads (`dict[str, torch.Tensor]`): The trained heads (`modules_to_save`).
    """

    config: Any
    projected: Tensor
    state: dict[str, Tensor]
    heads: dict[str, Tensor]

    def build_encoder(self) -> ResidualPromptEncoder:
        """Build a residual adapter's encoder, frozen, on the CPU.

        Raises:
            ValueError: If embedding and network do not result in the projected prompt.
        """
        return ResidualPromptEncoder.from_state(_with_width(self.config, self.projected), self.state, self.projected)


def read_adapter(
    source: str | os.PathLike[str], config: PromptTuningConfig | None = None, **hub_kwargs: Any
) -> SavedAdapter:
    """Read a saved adapter, residual or plain prompt tuning.

    Args:
        source (`str` or `os.PathLike`): The adapter's folder or Hub id.
        config ([`~peft.PromptTuningConfig`], *optional*): Used instead of the saved one, which is not read.
        hub_kwargs: `subfolder`, `revision`, `token`, `cache_dir` and the like, as for `hf_hub_download`.

    Raises:
        ValueError: If a file is missing or damaged, or config and weights do not fit; names the file.
    """
    if config is None:
        config = read_adapter_config(source, **hub_kwargs)
    path = locate(source, SAFETENSORS_WEIGHTS_NAME, **hub_kwargs)
    tensors = read_tensors(path)
    with naming(path):
        return check_tensors(config, tensors)


def read_residual_adapter(
    source: str | os.PathLike[str], config: PromptTuningConfig | None = None, **hub_kwargs: Any
) -> SavedAdapter | None:
    """[`read_adapter`] for a residual adapter; None for any other and for what cannot be read, which PEFT reports.

    An adapter counts as residual by its config or, if that is damaged, by its weights.
    """
    if config is None:
        try:
            path = locate(source, CONFIG_NAME, **hub_kwargs)
            values = read_config(path)
        except (ValueError, OSError):
            values = {}
        kind = values.get("peft_type")
        if kind == PEFT_TYPE:
            with naming(path):
                config = parse_config(values)
        elif (isinstance(kind, str) and kind in PEFT_TYPE_TO_CONFIG_MAPPING) or not _has_residual_weights(
            source, **hub_kwargs
        ):
            return None
    return read_adapter(source, config, **hub_kwargs)


def _has_residual_weights(source: str | os.PathLike[str], **hub_kwargs: Any) -> bool:
    try:
        tensors = read_tensors(locate(source, SAFETENSORS_WEIGHTS_NAME, **hub_kwargs))
    except (ValueError, OSError):
        return False
    return any(key.startswith(checkpoint.PREFIX) for key in tensors)


def read_adapter_config(source: str | os.PathLike[str], **hub_kwargs: Any) -> PromptTuningConfig:
    """Read the config of a saved adapter. Unknown fields are ignored, as PEFT does.

    Raises:
        ValueError: If it is missing or damaged, or describes an adapter of another kind; names the file.
    """
    path = locate(source, CONFIG_NAME, **hub_kwargs)
    values = read_config(path)
    with naming(path):
        return parse_config(values)


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Prepend the name of the file or folder to errors that do not contain it."""
    try:
        yield
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"`{path}` is damaged or does not fit. {error}") from error


def parse_config(values: Mapping[str, Any]) -> PromptTuningConfig:
    """Make a config of the values of an `adapter_config.json`.

    Raises:
        ValueError: If it is of another kind, or a value cannot be right.
    """
    kind = values.get("peft_type")
    if not isinstance(kind, str) or kind not in _CONFIG_CLASSES:
        raise ValueError(f"`peft_type` must be one of {', '.join(_CONFIG_CLASSES)}, got {kind!r}.")
    config_class = _CONFIG_CLASSES[kind]
    check_types(config_class, values)
    if config_class is PromptTuningConfig:  # which checks neither
        for name, known in (("task_type", TaskType), ("prompt_tuning_init", PromptTuningInit)):
            if values.get(name) is not None and values[name] not in list(known):
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {values[name]!r}.")
    known_names = inspect.signature(config_class).parameters
    return config_class(**{name: value for name, value in values.items() if name in known_names})


def check_tensors(config: PromptTuningConfig, tensors: Mapping[str, Tensor]) -> SavedAdapter:
    """Check the tensors of a weight file against the adapter's config: names, shapes, types, finite numbers.

    Nothing is allocated in the sizes that the config asks for.

    Raises:
        ValueError: If something is missing, unknown, of another shape, or NaN or infinite; names the tensors.
    """
    state: dict[str, Tensor] = {}
    if isinstance(config, ResidualPromptTuningConfig):
        config.check_task_type()
        projected, state, heads = checkpoint.unpack(tensors)
        # The network is compared when it is built. First its size, which is then no larger than the file allows.
        embedding_width = _with_width(config, projected).embedding_width
        embedding = torch.empty(config.total_virtual_tokens, embedding_width, device="meta")
        key = checkpoint.EMBEDDING_KEY
        checkpoint.check_leaves({key: embedding}, {key: state[key]})
    else:
        projected = checkpoint.projected_prompt(tensors)
        heads = {key: tensor for key, tensor in tensors.items() if key != checkpoint.PROJECTED_KEY}
    rows = config.num_virtual_tokens * (config.num_transformer_submodules or 1)
    width = _with_width(config, projected).token_dim
    if tuple(projected.shape) != (rows, width) or not projected.numel() or not projected.is_floating_point():
        raise ValueError(
            f"`{checkpoint.PROJECTED_KEY}`: expected [{rows}, {width}] floating-point numbers (`num_virtual_tokens`, "
            f"`token_dim`), found {list(projected.shape)} of type {projected.dtype}. Config and weights are of two "
            "adapters or damaged: save or download the adapter again."
        )
    # A sum is cheap, and finite only if no number is NaN or infinite. Finite numbers may overflow it.
    floats = {key: tensor.float() for key, tensor in tensors.items() if tensor.is_floating_point()}
    broken = [key for key, tensor in floats.items() if not (tensor.sum().isfinite() or tensor.isfinite().all())]
    if broken:
        raise ValueError(
            f"NaN or infinite numbers in {', '.join(sorted(broken))}. The training diverged before the adapter was "
            "saved, or the file is damaged. Use an earlier checkpoint."
        )
    return SavedAdapter(config, projected, state, heads)


def _with_width(config: Any, projected: Tensor) -> Any:
    """The config with the prompt's width where it names none, as PEFT fills it in for a model."""
    if config.token_dim is None and projected.ndim:
        config = copy.copy(config)
        config.token_dim = projected.shape[-1]
    return config


def keys_of_modules(keys: Iterable[str], modules: Collection[str] | None) -> list[str]:
    """The keys of tensors inside modules whose name ends with one of `modules`, as PEFT matches `modules_to_save`."""
    endings = tuple(modules or ())
    return [key for key in keys if any(key[: dot.start()].endswith(endings) for dot in re.finditer(r"\.", key))]
