"""Time saving, loading, merging and exporting: residual adapters against PEFT's prompt tuning and P-tuning.

GPT-2-small's size with random weights. The export as vocabulary writes the whole checkpoint, loads it again and
compares; nothing else here does.

    python examples/benchmarks/saving.py
    python examples/benchmarks/saving.py --loading
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from turns import SEED, Comparison, Settings, parse, report, take_turns

from peft_residual import (
    ResidualPromptTuningConfig,
    convert_to_prompt_tuning,
    save_as_prefix_tuning,
    save_as_prompt_tuning,
    save_as_vocabulary,
)
from peft_residual.export import save_prompt_tensor


PLAIN, P_TUNING, RESIDUAL = "prompt tuning, PEFT", "P-tuning, PEFT", "residual"


@dataclass
class SavingSettings(Settings):
    repeats: int = field(default=7, metadata={"help": "Timed turns of each, after two that are dropped."})
    loading: bool = field(default=False, metadata={"help": "Time loading; else saving, merging and exporting."})
    tokens: int = field(default=100, metadata={"help": "Virtual tokens, P."})
    hidden: int = field(default=800, metadata={"help": "Hidden layer, M."})
    layers: int = field(default=12, metadata={"help": "Layers of the GPT-2."})
    vocabulary: int = field(default=50257, metadata={"help": "Words of the GPT-2."})


def build_base(settings: SavingSettings) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_layer=settings.layers, vocab_size=settings.vocabulary)).to(settings.device)


def build_models(settings: SavingSettings) -> dict[str, PeftModel]:
    """An adapter of each kind, of the same length and width, each on a base of its own."""
    prompt: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": settings.tokens}
    configs = {
        PLAIN: PromptTuningConfig(**prompt),
        P_TUNING: PromptEncoderConfig(**prompt, encoder_hidden_size=settings.hidden),
        RESIDUAL: ResidualPromptTuningConfig(**prompt, encoder_hidden_size=settings.hidden),
    }
    return {name: get_peft_model(build_base(settings), config).eval() for name, config in configs.items()}


def build_tokenizer(settings: SavingSettings) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with as many words as the model has."""
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    words += [f"<unused_{i}>" for i in range(settings.vocabulary - len(words))]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def save(settings: SavingSettings, folder: Path) -> Comparison:
    """Time everything that writes; what is there is replaced."""
    adapters, tokenizer = build_models(settings), build_tokenizer(settings)
    model = adapters[RESIDUAL]
    encoder, config = model.prompt_encoder["default"], model.peft_config["default"]
    model.save_pretrained(folder / "residual")

    def undo_conversion() -> None:
        model.prompt_encoder["default"], model.peft_config["default"] = encoder, config

    writers: dict[str, Callable[[], object]] = {
        f"save: {name}": functools.partial(adapter.save_pretrained, folder / name)
        for name, adapter in adapters.items()
    }
    saved, prefix, checkpoint = folder / "residual", folder / "prefix", folder / "checkpoint"
    tensor = folder / "prompt.safetensors"
    writers |= {
        "merge in place": lambda: convert_to_prompt_tuning(model),
        "merge into a folder": lambda: save_as_prompt_tuning(model, folder / "merged", overwrite=True),
        "merge a folder": lambda: save_as_prompt_tuning(saved, folder / "merged", overwrite=True),
        "export: prompt tensor": lambda: save_prompt_tensor(model, tensor, overwrite=True),
        "export: prefix": lambda: save_as_prefix_tuning(model, prefix, overwrite=True),
        "export: vocabulary": lambda: save_as_vocabulary(model, tokenizer, checkpoint, overwrite=True),
    }
    times = take_turns(writers, settings, prepare=undo_conversion)
    return Comparison(_title(settings), settings, times)


def load(settings: SavingSettings, folder: Path) -> Comparison:
    """Time `PeftModel.from_pretrained` for what the package writes and what PEFT writes."""
    adapters = build_models(settings)
    for name, adapter in adapters.items():
        adapter.save_pretrained(folder / name)
    save_as_prompt_tuning(adapters[RESIDUAL], folder / "merged")
    save_as_prefix_tuning(adapters[RESIDUAL], folder / "prefix")
    options = {
        f"load: {PLAIN}": (PLAIN, {}),
        f"load: {P_TUNING}": (P_TUNING, {}),
        "load: residual": (RESIDUAL, {}),
        "load: residual, to train on": (RESIDUAL, {"is_trainable": True}),
        "load: merged, PEFT": ("merged", {}),
        "load: exported prefix, PEFT": ("prefix", {}),
    }
    base = build_base(settings)

    def loader(name: str, keywords: dict[str, bool]) -> Callable[[], PeftModel]:
        return lambda: PeftModel.from_pretrained(base, folder / name, **keywords)

    times = take_turns({title: loader(*option) for title, option in options.items()}, settings)
    return Comparison(_title(settings), settings, times)


def _title(settings: SavingSettings) -> str:
    return f"P={settings.tokens} H=768 M={settings.hidden}, GPT-2 of {settings.layers} layers"


def measure(settings: SavingSettings) -> Comparison:
    """Time saving or loading, in a folder that is gone afterwards."""
    torch.manual_seed(SEED)
    with tempfile.TemporaryDirectory() as folder:
        return (load if settings.loading else save)(settings, Path(folder))


if __name__ == "__main__":
    report(measure(parse(SavingSettings, __doc__)))
