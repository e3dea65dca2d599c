"""The options of `train`: a YAML file, then flags over it, both read by TRL's parser.

Two classes hold them. `TrainOptions` is ours and imports nothing, so that paths and rows are checked at once. All
other names are those of TRL's `SFTConfig`, whose import takes seconds.
"""

from __future__ import annotations

import difflib
import json
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Optional


if TYPE_CHECKING:
    from trl.trainer.sft_config import SFTConfig


def _option(help: str, default: Any = MISSING) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class TrainOptions:
    """What `peft-residual train` takes beside the options of TRL's `SFTConfig`. The help texts document the fields."""

    model_name_or_path: str = _option("folder or Hub id of a decoder-only model")
    train_file: str = _option("JSONL file; each row has `messages`, or `prompt` and `completion`")
    output_dir: str = _option("folder to write: checkpoints, `adapter`, `merged`")
    validation_file: Optional[str] = _option("JSONL file to validate on", None)
    validation_share: float = _option("share of train_file to validate on if there is no validation_file", 0.1)
    prompt_tuning_init_text: Optional[str] = _option(
        "instruction that the prompt starts from, best with a few examples and their answers", None
    )
    num_virtual_tokens: Optional[int] = _option(
        "length of the prompt; by default that of the instruction, or 10", None
    )
    encoder_hidden_size: int = _option("width of the network's hidden layer", 128)
    learning_rate: Optional[float] = _option("of the prompt; by default 0.15, in units of the embeddings", None)
    encoder_learning_rate: Optional[float] = _option("of the network; by default 0.004 / 0.15 of the prompt's", None)
    max_length: Optional[int] = _option("most tokens of a row; by default what the model takes, at most 1024", None)
    skip_long_rows: bool = _option("leave rows above max_length out; by default they are an error", False)
    use_chat_template: bool = _option(
        "put `prompt` and `completion` into the tokenizer's chat template, if it has one", True
    )
    chat_template_path: Optional[str] = _option("Jinja file with a chat template, for a tokenizer without one", None)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "of the frozen weights; auto: as they were saved", "auto"
    )
    merge: bool = _option("also save the trained prompt for PEFT alone, in output_dir/merged", True)
    resume: bool = _option("continue from the last checkpoint in output_dir", False)
    dry_run: bool = _option("check everything, print what would happen, and stop", False)
    json: bool = _option("print JSON", False)


# Where the defaults of SFTConfig do not suit a prompt; a config can set them otherwise.
TRAINER_DEFAULTS: dict[str, tuple[Any, str]] = {
    "num_train_epochs": (3, "how often each row is seen"),
    "per_device_train_batch_size": (8, "rows of a step, on each device"),
    "gradient_accumulation_steps": (1, "steps whose gradients are added up"),
    "lr_scheduler_type": ("constant", "a soft prompt needs its large rate to the end"),
    "eval_strategy": ("epoch", "when to validate"),
    "save_strategy": ("epoch", "when to write a checkpoint; the same as eval_strategy, to keep the best"),
    "save_total_limit": (2, "checkpoints to keep: the best and the last"),
    "logging_steps": (10, "steps between two lines of the log"),
    "seed": (42, "of the order of rows, the prompt and its network"),
}
# Options of SFTConfig that would have no effect here, or a wrong one.
_REFUSED = {
    "packing": "a row has one prompt, so it must not hold several texts; leave it out",
    "padding_free": "a row has one prompt, so it must not hold several texts; leave it out",
    "assistant_only_loss": "the loss is always on the assistant's tokens alone; leave it out",
    "completion_only_loss": "the loss is always on the completion alone; leave it out",
    "model_init_kwargs": "the model is loaded with `dtype`; leave it out",
    "resume_from_checkpoint": "use `resume`, which takes the last checkpoint in output_dir",
}


@dataclass(frozen=True)
class CommandLine:
    """What was asked for: our options, and the flags and values of the file that are left for `SFTConfig`."""

    options: TrainOptions
    flags: list[str]
    values: dict[str, Any]
    path: str | None
    in_file: frozenset[str]

    def trainer_arguments(self, **defaults: Any) -> SFTConfig:
        """The rest of the options, as TRL's `SFTConfig`.

        Args:
            defaults: Values of options that were not given.

        Raises:
            ValueError: If an option is unknown, has a wrong type, or would have no effect.
        """
        from trl.trainer.sft_config import SFTConfig

        parser = _parser(SFTConfig, where=self.path)
        chosen = {name: value for name, (value, _) in TRAINER_DEFAULTS.items()}
        parser.set_defaults(**{**chosen, **defaults}, output_dir=self.options.output_dir)
        unknown = [*parser.set_defaults_with_config(**self.values), *parser.parse_known_args(self.flags)[1]]
        if names := _names(unknown):
            known = [f.name for f in (*fields(TrainOptions), *fields(SFTConfig))]
            close = difflib.get_close_matches(names[0], known, n=1)
            meant = f"Did you mean `{close[0]}`?" if close else "`peft-residual train --help` lists our own."
            raise ValueError(f"There is no option `{names[0]}`{self._origin(names[0])}. {meant}")
        for name in [*_names(self.flags), *self.values]:
            if name in _REFUSED:
                raise ValueError(f"`{name}`{self._origin(name)} cannot be set: {_REFUSED[name]}.")
        arguments: SFTConfig
        (arguments,) = parser.parse_args_into_dataclasses(self.flags, look_for_args_file=False)
        return arguments

    def _origin(self, name: str) -> str:
        return f" in {self.path}" if name in self.in_file else ""


def _names(flags: Sequence[str]) -> list[str]:
    """The options among words of a command line."""
    return [word[2:].partition("=")[0].replace("-", "_") for word in flags if word.startswith("--")]


def parse(flags: Sequence[str], description: str) -> CommandLine:
    """Read the options of `train`.

    Args:
        flags (`Sequence[str]`): The words after `train`: optionally a YAML file, then flags.
        description (`str`): For `--help`.

    Returns:
        [`CommandLine`]: Only our options are checked: see [`CommandLine.trainer_arguments`].

    Raises:
        ImportError: If TRL is not installed.
        ValueError: If the file cannot be read, or an option is missing or has a wrong type.
    """
    path, flags = (flags[0], flags[1:]) if flags and not flags[0].startswith("-") else (None, flags)
    values = _read_yaml(path) if path else {}
    ours = {f.name for f in fields(TrainOptions)}
    # As flags, values are checked like flags. Lists and mappings cannot be written so.
    scalars = {name: value for name, value in values.items() if not isinstance(value, (list, dict, type(None)))}
    others = {name: value for name, value in values.items() if name not in scalars and name not in ours}
    for name in values.keys() & ours:
        if isinstance(values[name], (list, dict)):
            raise ValueError(f"`{name}` in {path} must be one value, got {values[name]!r}. Write `{name}: value`.")
    words = [*(f"--{name}={value}" for name, value in scalars.items()), *flags]
    parser = _parser(TrainOptions, where=path, description=description)
    options, rest = parser.parse_args_into_dataclasses(words, return_remaining_strings=True, look_for_args_file=False)
    return CommandLine(options, rest, others, path, frozenset(values))


def _parser(options: Any, where: str | None, **settings: Any) -> Any:
    """TRL's parser, with errors as exceptions: a usage of hundreds of options says little."""
    try:
        from trl.scripts.utils import TrlParser
    except ImportError as error:
        raise ImportError("`peft-residual train` needs TRL: pip install 'peft-residual[train]'.") from error

    class Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
        pass

    class Parser(TrlParser):
        def error(self, message: str) -> NoReturn:
            source = f" (in {where} or on the command line)" if where else ""
            raise ValueError(f"{message}{source}. `peft-residual train --help` lists the options.")

    usage = "peft-residual train [CONFIG.yaml] [--option value ...]"
    form: dict[str, Any] = {"usage": usage, "formatter_class": Help, "allow_abbrev": False}
    return Parser(options, prog="peft-residual train", **form, **settings)


def _read_yaml(path: str) -> dict[str, Any]:
    import yaml  # type: ignore[import-untyped]

    file = Path(path)
    if not file.is_file():
        raise ValueError(f"There is no file `{path}`. `peft-residual init {path}` writes one to fill in.")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"`{path}` is not YAML: {error}. Correct it.") from error
    if not isinstance(values, dict):
        raise ValueError(f"`{path}` must hold lines of `option: value`, got {type(values).__name__}.")
    return {str(name): value for name, value in values.items()}


def template() -> str:
    """A commented config with every option of ours and the defaults that were chosen for TRL's."""
    lines = [
        "# peft-residual train THIS_FILE --dry-run   checks it and says what would happen",
        "# peft-residual train THIS_FILE             trains; `--option value` takes precedence over this file",
        "",
    ]
    left_out = ("resume", "dry_run", "json")  # flags for one run
    lines += [line for f in fields(TrainOptions) if f.name not in left_out for line in _lines(f)]
    lines += ["", "# Any option of TRL's SFTConfig can be set too. These differ from its defaults, or often change:"]
    lines += [f"{name}: {value}  # {help}" for name, (value, help) in TRAINER_DEFAULTS.items()]
    return "\n".join(lines) + "\n"


_EXAMPLES = {
    "model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "train_file": "train.jsonl",
    "output_dir": "output",
}


def _lines(option: Field[Any]) -> tuple[str, str]:
    return f"# {option.metadata['help']}", f"{option.name}: {json.dumps(_EXAMPLES.get(option.name, option.default))}"
