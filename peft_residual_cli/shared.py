"""What several commands share: their result, the adapter and its base model.

Here and in the commands, PEFT and `peft_residual` are imported by the functions that use them: it takes seconds.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class Outcome:
    """What a command prints, as text or as JSON, and its exit code."""

    text: str
    values: dict[str, Any]
    code: int = 0


Run = Callable[[Namespace], Outcome]
Command = Callable[[ArgumentParser], Run]


def add_adapter_arguments(parser: ArgumentParser) -> None:
    """Add the adapter and its revision."""
    parser.add_argument("adapter", help="folder of the adapter, or its id on the Hub")
    parser.add_argument("--revision", help="branch, tag or commit of the adapter on the Hub (default: main)")


def revision_of(options: Namespace) -> dict[str, str]:
    """The revision as keyword arguments of the readers."""
    if options.revision and os.path.isdir(options.adapter):
        raise ValueError(f"--revision={options.revision} is for ids on the Hub, `{options.adapter}` is a folder.")
    return {"revision": options.revision} if options.revision else {}


def folder_of(options: Namespace) -> str:
    """The folder of the adapter, for an id on the Hub the one in its cache."""
    from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

    from peft_residual.storage.files import locate

    revision = revision_of(options)
    if os.path.isdir(options.adapter):
        return str(options.adapter)
    locate(options.adapter, SAFETENSORS_WEIGHTS_NAME, **revision)
    return str(locate(options.adapter, CONFIG_NAME, **revision).parent)


def written(out: Path) -> Outcome:
    """The outcome of a command that has written a file or folder."""
    sizes = {path.name: path.stat().st_size for path in (sorted(out.iterdir()) if out.is_dir() else [out])}
    lines = [f"{out}", *(f"  {name}: {size:,} bytes" for name, size in sizes.items())]
    return Outcome("\n".join(lines), {"save_directory": str(out), "sizes": sizes})


def load_base_and_adapter(options: Namespace) -> tuple[PeftModel, Any]:
    """The adapter on the base model of `--base`, or on the one that it names, and the tokenizer or None."""
    from peft_residual.storage.saved_adapter import read_adapter_config

    folder = folder_of(options)
    name = options.base or read_adapter_config(folder).base_model_name_or_path
    if not name:
        raise ValueError(f"`{options.adapter}` does not name its base model. Use --base.")
    return load_model(folder, name)


def load_model(adapter: str, name: str, **kwargs: Any) -> tuple[PeftModel, Any]:
    """The adapter on its base model, and the base model's tokenizer or None."""
    import transformers
    from peft import PeftModel
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    from peft_residual.storage.model_card import MODEL_CLASSES
    from peft_residual.storage.saved_adapter import read_adapter_config

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    task_type = read_adapter_config(adapter).task_type
    model_class = getattr(transformers, MODEL_CLASSES.get(str(getattr(task_type, "value", task_type)), "AutoModel"))
    base = model_class.from_pretrained(name, trust_remote_code=False)
    model = PeftModel.from_pretrained(base, adapter, **kwargs)
    # For some model types transformers creates an empty tokenizer if none is saved.
    if not get_tokenizer_config(name):
        say(f"`{name}` has no tokenizer, therefore ids instead of words")
        return model, None
    return model, transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def say(message: str) -> None:
    """Print a message to the standard error."""
    sys.stderr.write(f"peft-residual: {message}\n")
