"""Shared by `demo.py` and `by_feature/`: arguments, checks of user input, training arguments, metrics."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import DatasetDict
from transformers import HfArgumentParser


@dataclass
class Arguments:
    """Arguments of every script; scripts add their own and change defaults."""

    model: str = field(default="", metadata={"help": "The frozen model: a folder or a Hub id."})
    num_virtual_tokens: int = field(default=10, metadata={"help": "Prompt length."})
    learning_rate: float = field(default=0.3, metadata={"help": "Learning rate of the prompt."})
    max_steps: int = field(default=1000, metadata={"help": "Training steps."})
    batch_size: int = field(default=32, metadata={"help": "Rows per training step."})
    seed: int = field(default=0, metadata={"help": "Seed of the prompt, its network and the order of rows."})
    output_dir: Path = field(default=Path("build/example"), metadata={"help": "Output folder."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the output folder of an earlier run."})
    smoke: bool = field(default=False, metadata={"help": "A few rows and steps, to see that everything runs."})


ArgumentsType = TypeVar("ArgumentsType", bound=Arguments)
_MARK = ".written-by-an-example"


def parse(arguments: type[ArgumentsType]) -> ArgumentsType:
    """Parse the command line."""
    (args,) = HfArgumentParser(arguments).parse_args_into_dataclasses()
    if args.smoke:
        args.max_steps, args.batch_size = 4, 8
    return args


def make_output_dir(args: Arguments) -> None:
    """Create the output folder. An existing one is only replaced with `--overwrite`, and if an example wrote it."""
    folder = args.output_dir
    if folder.exists() and not args.overwrite:
        sys.exit(f"--output_dir {folder} exists. Choose another folder, or pass --overwrite.")
    if folder.exists() and not (folder / _MARK).exists():
        sys.exit(f"--output_dir {folder} was not written by an example and is not replaced. Choose another folder.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / _MARK).touch()


def check_columns(data: DatasetDict, columns: Sequence[str]) -> None:
    """Stop if a split is empty or lacks a column."""
    for name, split in data.items():
        for column in columns:
            if column not in split.column_names:
                sys.exit(f"Split {name!r} has no column {column!r}, it has {split.column_names}.")
        if len(split) == 0:
            sys.exit(f"Split {name!r} is empty. Use another data set.")


def room_for_text(tokenizer: Any, args: Arguments) -> int:
    """Return the maximum number of tokens of a text, so that the prompt fits into the model too."""
    longest = min(tokenizer.model_max_length, 512)
    if args.num_virtual_tokens >= longest // 2:
        sys.exit(f"--num_virtual_tokens {args.num_virtual_tokens} leaves no room for text in {longest} tokens.")
    return longest - args.num_virtual_tokens


def training_arguments(args: Arguments) -> dict[str, Any]:
    """Return the training arguments that differ from the Trainer's defaults."""
    every = max(1, args.max_steps // 5)
    return {
        "output_dir": str(args.output_dir / "trainer"),
        "max_steps": args.max_steps,
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": 4 * args.batch_size,
        "lr_scheduler_type": "constant",
        "eval_strategy": "steps",
        "eval_steps": every,
        "save_steps": every,
        "save_total_limit": 2,
        "logging_steps": every,
        "load_best_model_at_end": True,
        "seed": args.seed,
        "report_to": [],
        "disable_tqdm": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def decode(tokenizer: Any, ids: Any) -> list[str]:
    """Decode rows of token ids, in which -100 stands for padding."""
    ids = [[token if token >= 0 else tokenizer.pad_token_id for token in row] for row in ids.tolist()]
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def exact_match(tokenizer: Any) -> Callable[[Any], dict[str, float]]:
    """Return a metric function: the share of rows whose generated text equals the label."""

    def compute(prediction: Any) -> dict[str, float]:
        texts = decode(tokenizer, prediction.predictions), decode(tokenizer, prediction.label_ids)
        return {"exact_match": sum(given == label for given, label in zip(*texts, strict=True)) / len(texts[0])}

    return compute


def print_saved(adapter: Path, merged: Path, base: str) -> None:
    """Print what was saved and the code that loads it; `base` is the expression that loads the frozen model."""
    kilobytes = (merged / "adapter_model.safetensors").stat().st_size / 1024
    print(f"\nadapter to train on: {adapter}")
    print(f"merged: {merged} ({kilobytes:.1f} KB). To load it with PEFT alone:")
    print(f"    model = PeftModel.from_pretrained({base}, {str(merged)!r})")
