"""Whether a saved adapter is valid: a report for people and scripts, without the base model."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PromptTuningConfig, TaskType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import Tensor

from . import checkpoint
from .files import locate, read_config, read_tensors
from .saved_adapter import SavedAdapter, check_tensors, keys_of_modules, naming, parse_config


# How models name the embedding tables that PEFT saves if tokens were added to the vocabulary.
_EMBEDDING_TABLE = re.compile(r"base_model\.(.+\.)?(\w*embed\w*|shared|wte|lm_head)\.weight")


@dataclass(frozen=True)
class AdapterReport:
    """What [`check_adapter`] found.

    Attributes:
        source (`str`): The folder or Hub id.
        findings (`tuple[str, ...]`): What is wrong, each with its remedy; empty for a valid adapter.
        notes (`tuple[str, ...]`): What is unusual but harmless.
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
    def is_valid(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return {"is_valid": self.is_valid, **asdict(self)}

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
        lines = [f"{self.source}: {'valid' if self.is_valid else 'NOT VALID'}"]
        lines += [f"  {name}: {value}" for name, value in values.items() if value]
        lines += [f"  finding: {text}" for text in self.findings] + [f"  note: {text}" for text in self.notes]
        return "\n".join(lines)


def check_adapter(source: str | os.PathLike[str], **hub_kwargs: Any) -> AdapterReport:
    """Check whether a saved adapter is valid, without its base model: config, weights, and whether they agree.

    For a residual adapter this includes that prompt embedding and network result in the projected prompt.

    Args:
        source (`str` or `os.PathLike`): The folder or Hub id of a residual, merged or plain prompt tuning adapter.
        hub_kwargs: `subfolder`, `revision`, `token`, `cache_dir` and the like, as for `hf_hub_download`.

    Returns:
        [`AdapterReport`]: Whether it is valid, what it is, and what is wrong with it. A file that cannot be read is a
        finding, not an error.
    """
    findings: list[str] = []
    values: dict[str, Any] = {}
    config: PromptTuningConfig | None = None
    tensors: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    try:
        path = locate(source, CONFIG_NAME, **hub_kwargs)
        sizes[CONFIG_NAME] = path.stat().st_size
        values = read_config(path)
        with naming(path):
            config = parse_config(values)
    except (ValueError, OSError) as error:
        findings.append(str(error))
    try:
        path = locate(source, SAFETENSORS_WEIGHTS_NAME, **hub_kwargs)
        sizes[SAFETENSORS_WEIGHTS_NAME] = path.stat().st_size
        tensors = read_tensors(path)
        if config is not None:
            with naming(path):
                _check_agreement(check_tensors(config, tensors))
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


def _check_agreement(adapter: SavedAdapter) -> None:
    """Check what loading checks with the live model: the projection, and the trained heads."""
    if adapter.state:
        adapter.build_encoder()
    modules = adapter.config.modules_to_save
    named = [key for key in adapter.heads if key.startswith("base_model.") and not set(key) & set("/\\")]
    expected = keys_of_modules(named, modules)
    tables = [key for key in named if _EMBEDDING_TABLE.fullmatch(key)]
    unknown = adapter.heads.keys() - {*expected, *tables}
    if unknown:
        raise ValueError(
            f"The weights contain {sorted(unknown)}, which belong neither to the prompt nor to modules_to_save="
            f"{modules}. The file is damaged, or of another adapter: save or download it again."
        )
    if modules and not expected:
        raise ValueError(
            f"The weights contain nothing of `modules_to_save`={modules}: a head would stay at its random "
            "initialization. Save the adapter again from the model that it was trained in."
        )


def _notes(folder: Path, values: Mapping[str, Any], config: PromptTuningConfig | None) -> Iterator[str]:
    if (folder / WEIGHTS_NAME).exists():
        yield f"{WEIGHTS_NAME} is a pickle, which can run code. It is not read here, but other tools may: delete it."
    if config is not None:
        unknown = sorted(values.keys() - inspect.signature(type(config)).parameters.keys())
        if unknown:
            yield f"The config contains {unknown}, which this version does not know and ignores."
        if not config.base_model_name_or_path:
            yield "The config does not name the base model: `AutoPeftModel` classes cannot load it."


def _describe(config: PromptTuningConfig | None) -> dict[str, Any]:
    if config is None:
        return {}
    return {
        "peft_type": str(getattr(config.peft_type, "value", config.peft_type)),
        "peft_version": config.peft_version,
        "base_model": config.base_model_name_or_path,
        "task_type": config.task_type and str(TaskType(config.task_type).value),
        "network": getattr(config, "encoder_reparameterization_type", None),
        "num_virtual_tokens": config.num_virtual_tokens,
        "token_dim": config.token_dim,
    }
