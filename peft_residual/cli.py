"""The command line `peft-residual`.

A command is a function that adds its options to a parser and returns what to run; its docstring is its help. To add a
command, write such a function and name it in `COMMANDS`.

Exit codes: 0 done, 1 something is wrong with an adapter or cannot be done, 2 the command line is wrong.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peft import PeftModel

from .export import save_as_prompt_tuning
from .inspection import inspect_prompt
from .plotting import plot_prompt
from .validation import check_adapter, read_adapter_config


@dataclass(frozen=True)
class Outcome:
    """What a command has to say: for people, for programs (`--json`), and its exit code."""

    text: str
    values: dict[str, Any]
    code: int = 0


Run = Callable[[Namespace], Outcome]
Command = Callable[[ArgumentParser], Run]

_MODEL_CLASSES = {
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def check_command(parser: ArgumentParser) -> Run:
    """Say whether an adapter is whole, and what it is: kind, format version, base model, sizes.

    Reads the adapter's files alone; nothing in them is executed. The exit code is 1 if anything is wrong.

    examples:
      peft-residual check adapter
      peft-residual check someone/some-adapter --json
    """
    _add_adapter(parser)

    def run(options: Namespace) -> Outcome:
        report = check_adapter(options.adapter)
        return Outcome(str(report), report.to_dict(), code=0 if report.is_whole else 1)

    return run


def inspect_command(parser: ArgumentParser) -> Run:
    """Look inside a prompt: norms, the network's share, similarities, nearest words, distance from the start.

    Words and start need the base model. Without --base, the one that the adapter names is loaded if it can be.

    examples:
      peft-residual inspect adapter
      peft-residual inspect adapter --base google/t5-v1_1-base -k 3 --plot prompt.png
      peft-residual inspect someone/some-adapter --no-base --json
    """
    _add_adapter(parser)
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--base", help="folder or Hub id of the base model (default: the one that the adapter names)")
    base.add_argument("--no-base", action="store_true", help="load no base model: no words, no start")
    parser.add_argument("-k", type=int, default=5, help="nearest words per virtual token (default: %(default)s)")
    parser.add_argument("--plot", metavar="FILE", help="also draw pictures, into a .png, .svg or .pdf file")

    def run(options: Namespace) -> Outcome:
        model, tokenizer = options.adapter, None
        name = options.base or read_adapter_config(options.adapter).base_model_name_or_path
        if name and not options.no_base:
            try:
                model, tokenizer = _load_model(options.adapter, name)
            except (ValueError, OSError) as error:
                if options.base:
                    raise
                _say(f"no base model, so no words: {error}")
        report = replace(inspect_prompt(model, tokenizer, k=options.k), name=options.adapter)
        if options.plot:
            plot_prompt(report, options.plot)
        return Outcome(str(report), report.to_dict())

    return run


def merge_command(parser: ArgumentParser) -> Run:
    """Save a residual adapter as a plain prompt tuning adapter, which loads without this package.

    The base model is not needed. The source is not changed.

    examples:
      peft-residual merge adapter merged
      peft-residual merge someone/some-adapter merged --overwrite
    """
    _add_adapter(parser)
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it holds an adapter")

    def run(options: Namespace) -> Outcome:
        out = save_as_prompt_tuning(options.adapter, options.out, overwrite=options.overwrite)
        sizes = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
        lines = [f"{out}", *(f"  {name}: {size:,} bytes" for name, size in sizes.items())]
        return Outcome("\n".join(lines), {"out": str(out), "sizes": sizes})

    return run


COMMANDS: dict[str, Command] = {"inspect": inspect_command, "merge": merge_command, "check": check_command}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv (`Sequence[str]`, *optional*): The arguments; those of the process when None.

    Returns:
        `int`: The exit code. A wrong command line and `--help` end the process instead, as argparse does.
    """
    parser = ArgumentParser("peft-residual", description="Inspect, merge and check residual prompt tuning adapters.")
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for name, command in COMMANDS.items():
        text = inspect.getdoc(command) or ""
        raw = argparse.RawDescriptionHelpFormatter
        subparser = subparsers.add_parser(name, help=text.partition("\n")[0], description=text, formatter_class=raw)
        subparser.set_defaults(run=command(subparser))
        subparser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    try:
        outcome: Outcome = options.run(options)
    except (ValueError, OSError, ImportError) as error:
        _say(f"error: {error}")
        return 1
    text = json.dumps(outcome.values, indent=2, ensure_ascii=False) if options.json else outcome.text
    sys.stdout.write(text + "\n")
    return outcome.code


def _add_adapter(parser: ArgumentParser) -> None:
    parser.add_argument("adapter", help="folder of the adapter, or its id on the Hub")


def _load_model(adapter: str, name: str) -> tuple[PeftModel, Any]:
    """The adapter on its base model, and the base model's tokenizer or None."""
    import transformers
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    task_type = read_adapter_config(adapter).task_type
    model_class = getattr(transformers, _MODEL_CLASSES.get(str(getattr(task_type, "value", task_type)), "AutoModel"))
    base = model_class.from_pretrained(name, trust_remote_code=False)
    # A head of another size than the adapter's does not matter for looking at the prompt.
    model = PeftModel.from_pretrained(base, adapter, ignore_mismatched_sizes=True)
    # Without a saved tokenizer transformers makes an empty one up, for some types of model.
    if not get_tokenizer_config(name):
        _say(f"`{name}` has no tokenizer, so ids in place of words")
        return model, None
    return model, transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def _say(message: str) -> None:
    sys.stderr.write(f"peft-residual: {message}\n")
