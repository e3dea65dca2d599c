"""The commands `check` and `inspect`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import replace
from typing import TYPE_CHECKING

from .shared import Outcome, Run, add_adapter_arguments, folder_of, load_model, revision_of, say


if TYPE_CHECKING:
    from peft import PeftModel


def check_command(parser: ArgumentParser) -> Run:
    """Check whether an adapter is valid, and show its type, format version, base model and sizes.

    Only the adapter's files are read, and nothing in them is executed. The exit code is 1 if anything is wrong.

    examples:
      peft-residual check adapter
      peft-residual check someone/some-adapter --revision v1 --json
    """
    add_adapter_arguments(parser)

    def run(options: Namespace) -> Outcome:
        from peft_residual.storage.validation import check_adapter

        report = check_adapter(options.adapter, **revision_of(options))
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
    add_adapter_arguments(parser)
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--base", help="folder or Hub id of the base model (default: the one that the adapter names)")
    base.add_argument("--no-base", action="store_true", help="load no base model: no words, no distances")
    parser.add_argument("-k", type=int, default=5, help="nearest words per virtual token (default: %(default)s)")
    parser.add_argument("--plot", metavar="FILE", help="also save plots to a .png, .svg or .pdf file")

    def run(options: Namespace) -> Outcome:
        from peft_residual.analysis import inspect_prompt, plot_prompt
        from peft_residual.storage.saved_adapter import read_adapter_config

        folder, tokenizer = folder_of(options), None
        model: PeftModel | str = folder
        name = options.base or read_adapter_config(folder).base_model_name_or_path
        if name and not options.no_base:
            try:
                # The head is not needed to inspect the prompt.
                model, tokenizer = load_model(folder, name, ignore_mismatched_sizes=True)
            except (ValueError, OSError) as error:
                if options.base:
                    raise
                say(f"no base model, therefore no words: {error}")
        report = replace(inspect_prompt(model, tokenizer, k=options.k), name=options.adapter)
        if options.plot:
            plot_prompt(report, options.plot)
        return Outcome(str(report), report.to_dict())

    return run
