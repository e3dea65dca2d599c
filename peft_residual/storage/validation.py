"""Whether a saved adapter is whole: all that can be said of its files without the base model.

Every reader of a saved adapter comes through here before it builds anything. Files are read as JSON and safetensors:
nothing in them is executed, and paths that they name are not followed. What is not found: a changed bit inside the
numbers that changes the prompt by no more than other hardware's rounding would, or changes a head. Files carry no
checksum: casting them or stripping their network would break it, and the Hub and git keep their own.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from peft import PromptTuningConfig, TaskType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.prompt_tuning import PromptTuningInit
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import Tensor

from ..config import PEFT_TYPE_NAME, ResidualPromptTuningConfig, check_types
from ..encoder import check_projection
from ..networks import build_network
from ..registry import REPARAMETERIZATIONS
from . import checkpoint


_CONFIG_CLASSES: dict[str, type[PromptTuningConfig]] = {
    PEFT_TYPE_NAME: ResidualPromptTuningConfig,
    "PROMPT_TUNING": PromptTuningConfig,
}
# How models name the tables that PEFT saves along when tokens were added to the vocabulary.
_EMBEDDING_TABLE = re.compile(r"base_model\.(.+\.)?(\w*embed\w*|shared|wte|lm_head)\.weight")


def is_residual(source: str | os.PathLike[str], **hub_kwargs: Any) -> bool:
    """Whether a saved adapter is a residual one: by its config or, where that says nothing, by its weights.

    False for what cannot be read at all; PEFT says what is wrong with it.
    """
    try:
        kind = checkpoint.read_config(checkpoint.locate(source, CONFIG_NAME, **hub_kwargs)).get("peft_type")
    except (ValueError, OSError):
        kind = None
    if isinstance(kind, str) and kind in PEFT_TYPE_TO_CONFIG_MAPPING:
        return kind == PEFT_TYPE_NAME
    try:
        tensors = checkpoint.read_tensors(checkpoint.locate(source, SAFETENSORS_WEIGHTS_NAME, **hub_kwargs))
    except (ValueError, OSError):
        return False
    return any(key.startswith(checkpoint.PREFIX) for key in tensors)


def read_adapter(
    source: str | os.PathLike[str], config: PromptTuningConfig | None = None, **hub_kwargs: Any
) -> tuple[PromptTuningConfig, dict[str, Tensor]]:
    """Read a saved adapter, residual or plain prompt tuning, and check all but its numbers' agreement.

    Args:
        source (`str` or `os.PathLike`): The adapter's folder or Hub id.
        config ([`~peft.PromptTuningConfig`], *optional*): Instead of the one that was saved, which is not read.
        hub_kwargs: `subfolder`, `revision`, `token`, `cache_dir` and the like, as for `hf_hub_download`.

    Returns:
        `tuple`: The config, and the tensors of the weight file under their keys, on the CPU.

    Raises:
        ValueError: If a file is missing or damaged, or the two do not belong together; names the file.
    """
    if config is None:
        config = read_adapter_config(source, **hub_kwargs)
    path = checkpoint.locate(source, SAFETENSORS_WEIGHTS_NAME, **hub_kwargs)
    tensors = checkpoint.read_tensors(path)
    with naming(path):
        check_tensors(config, tensors)
    return config, tensors


def read_adapter_config(source: str | os.PathLike[str], **hub_kwargs: Any) -> PromptTuningConfig:
    """Read the config of a saved adapter; fields that this version does not know are passed over, as PEFT does.

    Raises:
        ValueError: If it is missing or damaged, or describes an adapter of another kind; names the file.
    """
    path = checkpoint.locate(source, CONFIG_NAME, **hub_kwargs)
    values = checkpoint.read_config(path)
    with naming(path):
        return _parse_config(values)


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Put the name of the file or folder in front of errors that do not say which it is."""
    try:
        yield
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"`{path}` is damaged or does not fit. {error}") from error


def _parse_config(values: Mapping[str, Any]) -> PromptTuningConfig:
    kind = values.get("peft_type")
    if not isinstance(kind, str) or kind not in _CONFIG_CLASSES:
        raise ValueError(f"`peft_type` must be one of {', '.join(_CONFIG_CLASSES)}, got {kind!r}.")
    config_class = _CONFIG_CLASSES[kind]
    check_types(config_class, values)
    if config_class is PromptTuningConfig:  # which checks neither
        for name, known in (("task_type", TaskType), ("prompt_tuning_init", PromptTuningInit)):
            if values.get(name) is not None and values[name] not in list(known):
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {values[name]!r}.")
    return config_class(**{f.name: values[f.name] for f in fields(config_class) if f.name in values})


def check_tensors(config: PromptTuningConfig, tensors: Mapping[str, Tensor]) -> None:
    """Check the tensors of a weight file against the adapter's config: names, shapes, types, finite numbers.

    Nothing of the sizes that the config asks for is allocated.

    Raises:
        ValueError: If something is missing, unknown, of another shape, or NaN or infinite; names the tensors.
    """
    prompt = checkpoint.projected_prompt(tensors)
    rows = config.num_virtual_tokens * (config.num_transformer_submodules or 1)
    width = prompt.shape[-1] if config.token_dim is None and prompt.ndim else config.token_dim
    if isinstance(config, ResidualPromptTuningConfig):
        _, state, _ = checkpoint.unpack(tensors)
        config = copy.copy(config)
        config.token_dim = width
        _check_state(config, state)
    if tuple(prompt.shape) != (rows, width) or not prompt.numel() or not prompt.is_floating_point():
        raise ValueError(
            f"`{checkpoint.PROJECTED_KEY}`: expected [{rows}, {width}] floating-point numbers (`num_virtual_tokens`, "
            f"`token_dim`), found {list(prompt.shape)} of type {prompt.dtype}. Config and weights are of two adapters "
            "or damaged: save or download the adapter again."
        )
    broken = [key for key, t in tensors.items() if t.is_floating_point() and not t.float().isfinite().all()]
    if broken:
        raise ValueError(
            f"NaN or infinite numbers in {', '.join(sorted(broken))}. The training diverged before the adapter was "
            "saved, or the file is damaged. Use an earlier checkpoint."
        )


def _check_state(config: ResidualPromptTuningConfig, state: Mapping[str, Tensor]) -> None:
    raw = torch.empty(config.total_virtual_tokens, config.embedding_width, device="meta")
    expected = {leaf: tensor for leaf, tensor in state.items() if leaf != checkpoint.EMBEDDING_KEY}
    # A network of the user's own may not be buildable without numbers; it is compared once it is built.
    if REPARAMETERIZATIONS[config.encoder_reparameterization_type].builder.__module__ == build_network.__module__:
        network = build_network(config, "meta").state_dict()
        expected = {checkpoint.NETWORK_PREFIX + leaf: tensor for leaf, tensor in network.items()}
    expected[checkpoint.EMBEDDING_KEY] = raw
    checkpoint.check_leaves(expected, state)
    wrong = [k for k, t in expected.items() if t.is_floating_point() != state[k].is_floating_point()]
    if wrong:
        raise ValueError(
            f"{', '.join(f'{k} of type {state[k].dtype}' for k in sorted(wrong))}: expected floating-point numbers. "
            "Save or download the adapter again."
        )


@dataclass(frozen=True)
class AdapterReport:
    """What [`check_adapter`] found.

    Attributes:
        source (`str`): The folder or Hub id.
        findings (`tuple[str, ...]`): What is wrong, each with its remedy; empty when the adapter is whole.
        notes (`tuple[str, ...]`): What is unusual and does no harm.
        peft_type (`str`, *optional*): `"RESIDUAL_PROMPT_TUNING"` or, merged, `"PROMPT_TUNING"`.
        format_version (`int`, *optional*): Of a residual adapter's weight file.
        peft_version (`str`, *optional*): The PEFT that saved it.
        base_model (`str`, *optional*): Name or path of the model that it was trained for.
        task_type (`str`, *optional*): PEFT's task.
        network (`str`, *optional*): `encoder_reparameterization_type`.
        num_virtual_tokens (`int`, *optional*): `P`.
        token_dim (`int`, *optional*): `H`.
        shapes (`dict[str, list[int]]`): The shape of every tensor.
        sizes (`dict[str, int]`): Bytes of each file that is read.
    """

    source: str
    findings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    peft_type: str | None = None
    format_version: int | None = None
    peft_version: str | None = None
    base_model: str | None = None
    task_type: str | None = None
    network: str | None = None
    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    shapes: dict[str, list[int]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return {"is_whole": self.is_whole, **asdict(self)}

    def to_json(self) -> str:
        """The report as a JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        """A few lines for a terminal."""
        numbers = sum(torch.Size(shape).numel() for shape in self.shapes.values())
        values = {
            "type": self.peft_type,
            "format": self.format_version,
            "saved by": self.peft_version and f"peft {self.peft_version}",
            "base model": self.base_model,
            "task": self.task_type,
            "network": self.network,
            "prompt": self.num_virtual_tokens
            and f"{self.num_virtual_tokens} virtual tokens of width {self.token_dim}",
            "tensors": self.shapes and f"{len(self.shapes)}, {numbers:,} numbers",
            **{name: f"{size:,} bytes" for name, size in self.sizes.items()},
        }
        lines = [f"{self.source}: {'whole' if self.is_whole else 'NOT WHOLE'}"]
        lines += [f"  {name}: {value}" for name, value in values.items() if value]
        lines += [f"  finding: {text}" for text in self.findings] + [f"  note: {text}" for text in self.notes]
        return "\n".join(lines)


def check_adapter(source: str | os.PathLike[str], **hub_kwargs: Any) -> AdapterReport:
    """Check whether a saved adapter is whole, without its base model: config, weights, and whether they agree.

    For a residual adapter this includes that raw prompt and network give the projected prompt.

    Args:
        source (`str` or `os.PathLike`): The folder or Hub id of a residual, merged or plain prompt tuning adapter.
        hub_kwargs: `subfolder`, `revision`, `token`, `cache_dir` and the like, as for `hf_hub_download`.

    Returns:
        [`AdapterReport`]: Whether it is whole, what it is, and what is wrong with it.

    Raises:
        Nothing: what cannot be read is a finding.
    """
    findings: list[str] = []
    values: dict[str, Any] = {}
    config: PromptTuningConfig | None = None
    tensors: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    try:
        path = checkpoint.locate(source, CONFIG_NAME, **hub_kwargs)
        sizes[CONFIG_NAME] = path.stat().st_size
        values = checkpoint.read_config(path)
        with naming(path):
            config = _parse_config(values)
    except (ValueError, OSError) as error:
        findings.append(str(error))
    try:
        path = checkpoint.locate(source, SAFETENSORS_WEIGHTS_NAME, **hub_kwargs)
        sizes[SAFETENSORS_WEIGHTS_NAME] = path.stat().st_size
        tensors = checkpoint.read_tensors(path)
        if config is not None:
            with naming(path):
                check_tensors(config, tensors)
                _check_agreement(config, tensors)
    except (ValueError, OSError) as error:
        findings.append(str(error))
    return AdapterReport(
        source=str(source),
        findings=tuple(dict.fromkeys(findings)),
        notes=tuple(_notes(Path(source, hub_kwargs.get("subfolder") or ""), values, config)),
        format_version=checkpoint.format_version(tensors),
        shapes={key: list(tensor.shape) for key, tensor in sorted(tensors.items())},
        sizes=sizes,
        **_describe(config),
    )


def _check_agreement(config: PromptTuningConfig, tensors: Mapping[str, Tensor]) -> None:
    """Check what loading checks against the live model: the projection, and the modules that were trained along."""
    if isinstance(config, ResidualPromptTuningConfig):
        projected, state, others = checkpoint.unpack(tensors)
        check_projection(config, state, projected)
    else:
        others = {key: tensor for key, tensor in tensors.items() if key != checkpoint.PROJECTED_KEY}
    modules = config.modules_to_save
    named = [key for key in others if key.startswith("base_model.") and not set(key) & set("/\\")]
    accounted = keys_of_modules(named, modules)
    tables = [key for key in named if _EMBEDDING_TABLE.fullmatch(key)]
    unknown = others.keys() - {*accounted, *tables}
    if unknown:
        raise ValueError(
            f"The weights hold {sorted(unknown)}, which neither the prompt nor `modules_to_save`={modules} accounts "
            "for. The file is damaged, or of another adapter: save or download it again."
        )
    if modules and not accounted:
        raise ValueError(
            f"The weights hold nothing of `modules_to_save`={modules}: a head would stay at its random start. Save "
            "the adapter again from the model that it was trained in."
        )


def keys_of_modules(keys: Iterable[str], modules: Collection[str] | None) -> list[str]:
    """The keys of tensors inside modules whose name ends with one of `modules`, as PEFT matches `modules_to_save`."""
    endings = tuple(modules or ())
    return [key for key in keys if any(key[: dot.start()].endswith(endings) for dot in re.finditer(r"\.", key))]


def _notes(folder: Path, values: Mapping[str, Any], config: PromptTuningConfig | None) -> Iterator[str]:
    if (folder / WEIGHTS_NAME).exists():
        yield f"{WEIGHTS_NAME} is a pickle, which can run code. It is not read, but other tools may: delete it."
    if config is not None:
        unknown = sorted(values.keys() - {f.name for f in fields(config)})
        if unknown:
            yield f"The config holds {unknown}, which this version does not know and passes over."
        if not config.base_model_name_or_path:
            yield "The config does not name the base model: `AutoPeftModel` classes cannot load it."


def _describe(config: PromptTuningConfig | None) -> dict[str, Any]:
    if config is None:
        return {}
    is_residual_config = isinstance(config, ResidualPromptTuningConfig)
    return {
        "peft_type": PEFT_TYPE_NAME if is_residual_config else "PROMPT_TUNING",
        "peft_version": config.peft_version,
        "base_model": config.base_model_name_or_path,
        "task_type": config.task_type and str(TaskType(config.task_type).value),
        "network": config.encoder_reparameterization_type if is_residual_config else None,
        "num_virtual_tokens": config.num_virtual_tokens,
        "token_dim": config.token_dim,
    }
