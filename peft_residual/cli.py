"""The command line `peft-residual`.

A command is a function that adds its options to a parser and returns the function to run. Its docstring is its help. To
add a command, write such a function and add it to `COMMANDS`.

Exit codes: 0 for success, 1 for an adapter that is not valid or an error, 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from .analysis.plots import plot_prompt
from .analysis.report import inspect_prompt
from .export.prefix_tuning import save_as_prefix_tuning
from .export.prompt_tuning import save_as_prompt_tuning, save_prompt_tensor
from .export.vocabulary import save_as_vocabulary
from .storage.files import locate
from .storage.model_card import CARD_NAME, MODEL_CLASSES, read_results, update_card
from .storage.saved_adapter import read_adapter_config
from .storage.validation import check_adapter


@dataclass(frozen=True)
class Outcome:
    """What a command prints, as text or as JSON, and its exit code."""

    text: str
    values: dict[str, Any]
    code: int = 0


Run = Callable[[Namespace], Outcome]
Command = Callable[[ArgumentParser], Run]


def check_command(parser: ArgumentParser) -> Run:
    """Check whether an adapter is valid, and show its type, format version, base model and sizes.

    Only the adapter's files are read, and nothing in them is executed. The exit code is 1 if anything is wrong.

    examples:
      peft-residual check adapter
      peft-residual check someone/some-adapter --revision v1 --json
    """
    _add_adapter(parser)

    def run(options: Namespace) -> Outcome:
        report = check_adapter(options.adapter, **_revision(options))
        return Outcome(str(report), report.to_dict(), code=0 if report.is_valid else 1)

    return run


def inspect_command(parser: ArgumentParser) -> Run:
    """Show norms of a prompt, the network's share, similarities, nearest words, distance from the initialization.

    Words and distances need the base model. Without --base, the one that the adapter names is loaded, if possible.

    examples:
      peft-residual inspect adapter
      peft-residual inspect adapter --base google/t5-v1_1-base -k 3 --plot prompt.png
      peft-residual inspect someone/some-adapter --no-base --json
    """
    _add_adapter(parser)
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--base", help="folder or Hub id of the base model (default: the one that the adapter names)")
    base.add_argument("--no-base", action="store_true", help="load no base model: no words, no distances")
    parser.add_argument("-k", type=int, default=5, help="nearest words per virtual token (default: %(default)s)")
    parser.add_argument("--plot", metavar="FILE", help="also save plots to a .png, .svg or .pdf file")

    def run(options: Namespace) -> Outcome:
        folder, tokenizer = _folder(options), None
        model: PeftModel | str = folder
        name = options.base or read_adapter_config(folder).base_model_name_or_path
        if name and not options.no_base:
            try:
                # The head is not needed to inspect the prompt.
                model, tokenizer = _load_model(folder, name, ignore_mismatched_sizes=True)
            except (ValueError, OSError) as error:
                if options.base:
                    raise
                _say(f"no base model, therefore no words: {error}")
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
    parser.add_argument("save_directory", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing adapter")

    def run(options: Namespace) -> Outcome:
        return _written(save_as_prompt_tuning(_folder(options), options.save_directory, overwrite=options.overwrite))

    return run


def export_command(parser: ArgumentParser) -> Run:
    """Save a prompt in another format, for tools that do not know this package. See docs/after-training.md.

    prefix-tuning   a causal model's prompt as keys and values: a prefix tuning adapter
    vocabulary      an ordinary checkpoint and tokenizer with the prompt as new tokens; prints its size first
    tensors         the prompt alone, in a .safetensors, .npy or .pt file

    prefix-tuning and vocabulary need the base model. Without --base, the one that the adapter names is loaded. For a
    plain prompt tuning adapter use `merge`.

    examples:
      peft-residual export prefix-tuning someone/some-adapter prefix --revision v1 --base gpt2
      peft-residual export vocabulary adapter checkpoint --token-format "<sentiment_{i}>"
      peft-residual export vocabulary adapter checkpoint --dry-run --json
      peft-residual export tensors adapter prompt.safetensors
    """
    parser.add_argument("format", choices=_EXPORTS)
    _add_adapter(parser)
    parser.add_argument("save_directory", help="folder to write; for tensors, the file")
    parser.add_argument("--base", help="folder or Hub id of the base model (default: the one that the adapter names)")
    parser.add_argument("--token-format", help="vocabulary: spelling of the new tokens (default: <task_{i}>)")
    parser.add_argument("--dry-run", action="store_true", help="vocabulary: only print what would be written")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing export")

    def run(options: Namespace) -> Outcome:
        if options.format != "vocabulary" and (options.token_format or options.dry_run):
            parser.error(f"--token-format and --dry-run are for vocabulary, not for {options.format}")
        if options.format == "tensors" and options.base:
            parser.error("tensors needs no base model: leave --base out")
        return _EXPORTS[options.format](options)

    return run


def card_command(parser: ArgumentParser) -> Run:
    """Write or update the model card of an adapter's folder (README.md). What you wrote in it stays.

    It has metadata, how to load the adapter, hyperparameters and the citation. Results are those of --metric, or else
    the last evaluation of a Trainer's checkpoint.

    examples:
      peft-residual card adapter --metric accuracy=0.93 --metric f1=0.91
      peft-residual card output/checkpoint-500
    """
    parser.add_argument("adapter", help="folder of the adapter")
    parser.add_argument(
        "--metric", metavar="NAME=VALUE", type=_metric, action="append", help="a result; can be repeated"
    )

    def run(options: Namespace) -> Outcome:
        results = dict(options.metric or ()) or read_results(options.adapter)
        path = update_card(options.adapter, results=results)
        if path is None:
            raise ValueError(
                f"`{options.adapter}` has no {CONFIG_NAME}: it is not an adapter's folder. Check the path."
            )
        return Outcome(str(path), {"card": str(path)})

    return run


def push_command(parser: ArgumentParser) -> Run:
    """Upload an adapter's folder to the Hub: weights, config and model card, which is written if there is none.

    An adapter that is not valid is not uploaded. The token is that of `hf auth login`, or HF_TOKEN.

    examples:
      peft-residual push adapter someone/some-adapter
      peft-residual push merged someone/some-adapter --revision merged --private
    """
    parser.add_argument("adapter", help="folder of the adapter")
    parser.add_argument("repo_id", help="id on the Hub; a missing repository is created")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", help="branch to push to, created if missing (default: main)")

    def run(options: Namespace) -> Outcome:
        from huggingface_hub import create_branch, create_repo, upload_folder

        if not os.path.isdir(options.adapter):
            raise ValueError(f"`{options.adapter}` is not a folder. Name the adapter's folder.")
        report = check_adapter(options.adapter)
        if not report.is_valid:
            return Outcome(str(report), report.to_dict(), code=1)
        if not Path(options.adapter, CARD_NAME).is_file():
            update_card(options.adapter)
        repo_id = create_repo(options.repo_id, private=options.private, exist_ok=True).repo_id
        if options.revision:
            create_branch(repo_id, branch=options.revision, exist_ok=True)
        files = [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, CARD_NAME]
        try:
            commit = upload_folder(
                repo_id=repo_id, folder_path=options.adapter, revision=options.revision, allow_patterns=files
            )
        except RuntimeError as error:  # the client wraps every error of an upload
            raise OSError(f"{error} {error.__cause__ or ''} Nothing was committed. Try again.") from error
        return Outcome(commit.commit_url, {"repo_id": repo_id, "commit": commit.oid, "url": commit.commit_url})

    return run


COMMANDS: dict[str, Command] = {
    "inspect": inspect_command,
    "merge": merge_command,
    "export": export_command,
    "check": check_command,
    "card": card_command,
    "push": push_command,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv (`Sequence[str]`, *optional*): The arguments; those of the process when None.

    Returns:
        `int`: The exit code. A wrong command line and `--help` end the process instead, as argparse does.
    """
    parser = ArgumentParser(
        "peft-residual", description="Inspect, export, check and share residual prompt tuning adapters."
    )
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for name, command in COMMANDS.items():
        text = inspect.getdoc(command) or ""
        raw = argparse.RawDescriptionHelpFormatter
        subparser = subparsers.add_parser(name, help=text.partition("\n")[0], description=text, formatter_class=raw)
        subparser.set_defaults(run=command(subparser))
        subparser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    from huggingface_hub.errors import HTTPError  # includes broken connections, which are not an `OSError`

    try:
        outcome: Outcome = options.run(options)
    except (ValueError, OSError, ImportError, HTTPError) as error:
        _say(f"error: {error}".replace("`overwrite=True`", "--overwrite"))
        return 1
    text = json.dumps(outcome.values, indent=2, ensure_ascii=False) if options.json else outcome.text
    sys.stdout.write(text + "\n")
    return outcome.code


def _add_adapter(parser: ArgumentParser) -> None:
    parser.add_argument("adapter", help="folder of the adapter, or its id on the Hub")
    parser.add_argument("--revision", help="branch, tag or commit of the adapter on the Hub (default: main)")


def _revision(options: Namespace) -> dict[str, str]:
    if options.revision and os.path.isdir(options.adapter):
        raise ValueError(f"--revision={options.revision} is for ids on the Hub, `{options.adapter}` is a folder.")
    return {"revision": options.revision} if options.revision else {}


def _folder(options: Namespace) -> str:
    """The folder of the adapter, for an id on the Hub the one in its cache."""
    revision = _revision(options)
    if os.path.isdir(options.adapter):
        return str(options.adapter)
    locate(options.adapter, SAFETENSORS_WEIGHTS_NAME, **revision)
    return str(locate(options.adapter, CONFIG_NAME, **revision).parent)


def _metric(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    if not name:
        raise ValueError
    return name, float(value)


def _export_prefix_tuning(options: Namespace) -> Outcome:
    model, _ = _load_base_and_adapter(options)
    return _written(save_as_prefix_tuning(model, options.save_directory, overwrite=options.overwrite))


def _export_vocabulary(options: Namespace) -> Outcome:
    model, tokenizer = _load_base_and_adapter(options)
    if tokenizer is None:
        raise ValueError("New tokens need the base model's tokenizer. Save it in the base model's folder.")
    spelling = {"token_format": options.token_format} if options.token_format else {}
    export = save_as_vocabulary(model, tokenizer, options.save_directory, dry_run=True, **spelling)
    size = f"{export.size:,} bytes to write, {export.free:,} bytes free"
    values = {
        "save_directory": str(export.folder),
        "prefix": export.prefixes["default"],
        "size": export.size,
        "free": export.free,
    }
    if options.dry_run:
        return Outcome(f"{export.folder}: {size}", values)
    _say(size)
    save_as_vocabulary(model, tokenizer, options.save_directory, overwrite=options.overwrite, **spelling)
    return Outcome(f"{export.folder}\n  put in front of a text: {export.prefixes['default']}", values)


def _export_tensors(options: Namespace) -> Outcome:
    return _written(save_prompt_tensor(_folder(options), options.save_directory, overwrite=options.overwrite))


_EXPORTS: dict[str, Run] = {
    "prefix-tuning": _export_prefix_tuning,
    "vocabulary": _export_vocabulary,
    "tensors": _export_tensors,
}


def _written(out: Path) -> Outcome:
    sizes = {path.name: path.stat().st_size for path in (sorted(out.iterdir()) if out.is_dir() else [out])}
    lines = [f"{out}", *(f"  {name}: {size:,} bytes" for name, size in sizes.items())]
    return Outcome("\n".join(lines), {"save_directory": str(out), "sizes": sizes})


def _load_base_and_adapter(options: Namespace) -> tuple[PeftModel, Any]:
    folder = _folder(options)
    name = options.base or read_adapter_config(folder).base_model_name_or_path
    if not name:
        raise ValueError(f"`{options.adapter}` does not name its base model. Use --base.")
    return _load_model(folder, name)


def _load_model(adapter: str, name: str, **kwargs: Any) -> tuple[PeftModel, Any]:
    """The adapter on its base model, and the base model's tokenizer or None."""
    import transformers
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    task_type = read_adapter_config(adapter).task_type
    model_class = getattr(transformers, MODEL_CLASSES.get(str(getattr(task_type, "value", task_type)), "AutoModel"))
    base = model_class.from_pretrained(name, trust_remote_code=False)
    model = PeftModel.from_pretrained(base, adapter, **kwargs)
    # For some model types transformers creates an empty tokenizer if none is saved.
    if not get_tokenizer_config(name):
        _say(f"`{name}` has no tokenizer, therefore ids instead of words")
        return model, None
    return model, transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def _say(message: str) -> None:
    sys.stderr.write(f"peft-residual: {message}\n")
