"""What a training would do, checked before the model is loaded: files, rows, tokens, sizes."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import CommandLine, TrainOptions
from .rows import Row, read_rows
from .tokens import in_chat, measure, split


if TYPE_CHECKING:
    from trl.trainer.sft_config import SFTConfig

    from peft_residual import ResidualPromptTuningConfig

LONGEST = 1024  # tokens of a row, if the config does not say: TRL's default


@dataclass(frozen=True)
class Data:
    """Rows to train and to validate on, and the length of each in tokens."""

    train: list[Row]
    validation: list[Row]
    lengths: list[int]
    left_out: int


@dataclass(frozen=True)
class Plan:
    """Everything that a training needs but the model's weights."""

    options: TrainOptions
    arguments: SFTConfig
    tokenizer: Any
    config: ResidualPromptTuningConfig
    data: Data
    max_length: int
    checkpoint: str | None
    sizes: dict[str, int]

    @property
    def steps(self) -> int:
        """Steps of the optimizer, on one device."""
        if self.arguments.max_steps > 0:
            return self.arguments.max_steps
        batches = math.ceil(len(self.data.train) / self.arguments.per_device_train_batch_size)
        return math.ceil(
            math.ceil(batches / self.arguments.gradient_accumulation_steps) * self.arguments.num_train_epochs
        )

    def __str__(self) -> str:
        from peft_residual.peft_model.learning_rate import recommended_learning_rates

        options, data, sizes, lengths = self.options, self.data, self.sizes, self.data.lengths
        prompt, network = recommended_learning_rates(self.config)
        rate = options.learning_rate or prompt
        start = "the instruction" if options.prompt_tuning_init_text else "common tokens"
        answers = f"{len(data.train):,} to train on, {len(data.validation):,} to validate on"
        return "\n".join(
            [
                f"model      {options.model_name_or_path}: {sizes['parameters']:,} parameters, frozen",
                f"prompt     {self.config.num_virtual_tokens} virtual tokens that start from {start}, "
                f"{sizes['trainable']:,} trained parameters",
                f"answers    {answers}, {data.left_out:,} lines left out",
                f"tokens     {min(lengths)} to {max(lengths)} a row, {sum(lengths) / len(lengths):.0f} on average; "
                f"at most {self.max_length}",
                f"steps      {self.steps:,} of {self.arguments.per_device_train_batch_size} rows, "
                f"{self.arguments.gradient_accumulation_steps} accumulated",
                f"rates      {rate:g} for the prompt, "
                f"{options.encoder_learning_rate or rate * network / prompt:g} for its network",
                f"memory     {_mib(sizes['memory'])} for weights and optimizer; activations come on top",
                f"disk       about {_mib(sizes['disk'])} in {options.output_dir}, {_mib(sizes['free'])} free",
            ]
        )


def make_plan(command: CommandLine) -> Plan:
    """Check the files, then the rows, then the other options, the tokenizer and the model's config.

    The order is that of the time which a check takes. Nothing is written, and no weights are read.

    Raises:
        ValueError: If anything is wrong: says where and what to do.
    """
    options = command.options
    checkpoint = _check_output(options)
    train = read_rows(options.train_file, "train_file")
    validation = read_rows(options.validation_file, "validation_file") if options.validation_file else []
    if not 0 <= options.validation_share < 1:
        raise ValueError(f"`validation_share` must be at least 0 and below 1, got {options.validation_share}.")
    if not options.validation_file and options.validation_share and len(train) < 2:
        raise ValueError(
            f"`train_file`: `{options.train_file}` has one row, so none is left to validate on. Set "
            "`validation_share: 0`, or give a `validation_file`."
        )

    tokenizer, model_config = _load_tokenizer(options)
    train, validation = ([in_chat(rows, options, tokenizer) for rows in part] for part in (train, validation))
    prompt_length = _prompt_length(options, tokenizer)
    max_length = _max_length(options, model_config, prompt_length)
    arguments = _arguments(command, max_length)
    train, left_out, lengths = measure(train, options.train_file, options, tokenizer, max_length)
    if options.validation_file:
        validation, more, _ = measure(validation, options.validation_file, options, tokenizer, max_length)
        left_out += more
    else:
        train, validation = split(train, options.validation_share, arguments.seed)
    config, sizes = _sizes(options, arguments, tokenizer, model_config, prompt_length)
    data = Data([*chain(*train)], [*chain(*validation)], lengths, left_out)
    return Plan(options, arguments, tokenizer, config, data, max_length, checkpoint, sizes)


def _check_output(options: TrainOptions) -> str | None:
    """The checkpoint to resume from, or None."""
    folder = Path(options.output_dir)
    if not options.resume:
        # Of several processes, the first may have written already.
        if os.environ.get("RANK", "0") == "0" and (folder.is_file() or (folder.is_dir() and any(folder.iterdir()))):
            raise ValueError(
                f"`output_dir`: `{folder}` exists. Name another folder, or continue its run with --resume."
            )
        return None
    found = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    if not found:
        raise ValueError(f"`resume`: `{folder}` has no checkpoint. Leave --resume out to start from the beginning.")
    return str(max(found, key=lambda path: int(path.name.rpartition("-")[2])))


def _load_tokenizer(options: TrainOptions) -> tuple[Any, Any]:
    """The tokenizer and the config of the model."""
    from transformers import AutoConfig, AutoTokenizer

    name = options.model_name_or_path
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`model_name_or_path`: `{name}` cannot be read. Check the folder or the id on the Hub. {error}"
        ) from error
    if config.is_encoder_decoder:
        raise ValueError(
            f"`model_name_or_path`: `{name}` is an encoder-decoder model, and this command trains decoder-only ones. "
            "Use examples/finetune_seq2seq.py."
        )
    if path := options.chat_template_path:
        if not Path(path).is_file():
            raise ValueError(f"`chat_template_path`: there is no file `{path}`. Check the path.")
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    if tokenizer.eos_token is None:
        raise ValueError(f"The tokenizer of `{name}` has no token for the end of an answer. Set its `eos_token`.")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer, config


def _prompt_length(options: TrainOptions, tokenizer: Any) -> int:
    text = options.prompt_tuning_init_text
    if options.num_virtual_tokens is not None and options.num_virtual_tokens < 1:
        raise ValueError(f"`num_virtual_tokens` must be at least 1, got {options.num_virtual_tokens}.")
    return options.num_virtual_tokens or (len(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else 10)


def _max_length(options: TrainOptions, model_config: Any, prompt_length: int) -> int:
    """Most tokens of a row: with the prompt, it must fit into the model's positions."""
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    room = (positions or LONGEST + prompt_length) - prompt_length
    if room < 2:
        raise ValueError(f"A prompt of {prompt_length} tokens leaves no room for rows in {positions} positions.")
    if options.max_length and positions and options.max_length > room:
        raise ValueError(
            f"`max_length`: {options.max_length} tokens and a prompt of {prompt_length} do not fit into the model's "
            f"{positions} positions. Set at most {room}."
        )
    return options.max_length or min(room, LONGEST)


def _arguments(command: CommandLine, max_length: int) -> SFTConfig:
    import torch

    validates = bool(command.options.validation_file or command.options.validation_share)
    defaults: dict[str, Any] = {
        "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),  # TRL's default is True on a CPU too
        "load_best_model_at_end": validates,
        "max_length": max_length,
    }
    return command.trainer_arguments(**defaults, **({} if validates else {"eval_strategy": "no"}))


def _sizes(
    options: TrainOptions, arguments: SFTConfig, tokenizer: Any, model_config: Any, prompt_length: int
) -> tuple[ResidualPromptTuningConfig, dict[str, int]]:
    """The config of the prompt, and parameters and bytes of the run."""
    import torch
    from transformers import AutoModelForCausalLM

    from peft_residual import ResidualPromptEncoder, ResidualPromptTuningConfig

    text = options.prompt_tuning_init_text
    network = {
        "encoder_norm_first": True,
        "encoder_zero_init": True,
        "encoder_hidden_size": options.encoder_hidden_size,
    }
    common: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": prompt_length, **network}
    start: dict[str, Any] = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": text} if text else {}
    config = ResidualPromptTuningConfig(
        **common,
        **start,
        encoder_scale=None,
        tokenizer_name_or_path=options.model_name_or_path,
        prompt_tuning_init_seed=arguments.seed,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=False)
        width = model.get_input_embeddings().embedding_dim
        like = ResidualPromptTuningConfig(**common, prompt_tuning_init="RANDOM", token_dim=width)
        encoder = ResidualPromptEncoder(like, torch.nn.Embedding(2, width))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in encoder.parameters() if parameter.requires_grad)
    dtype = getattr(model_config, "dtype", None) if options.dtype == "auto" else getattr(torch, options.dtype)
    # A checkpoint has the weights, Adam's two moments and the tokenizer. One more than is kept is written.
    checkpoint = 3 * 4 * trainable + 128 * len(tokenizer)
    folder = Path(options.output_dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    sizes = {
        "parameters": parameters,
        "trainable": trainable,
        "memory": parameters * (dtype or torch.float32).itemsize + 16 * trainable,
        "disk": checkpoint * ((arguments.save_total_limit or 3) + 2),
        "free": shutil.disk_usage(existing).free,
    }
    if sizes["disk"] > sizes["free"]:
        raise ValueError(
            f"`output_dir`: about {_mib(sizes['disk'])} will be written, and `{existing}` has {_mib(sizes['free'])} "
            "free. Free some space or name another folder."
        )
    return config, sizes


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
