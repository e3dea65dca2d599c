"""The command line `peft-residual`.

It is a package beside `peft_residual`, since importing that one imports PEFT, which takes seconds. So `--help`,
`--version` and a wrong command line are answered at once. A command imports what it needs when it runs.

A command is a function that adds its options to a parser and returns the function to run. Its docstring is its help.
To add a command, write such a function and add it to `COMMANDS`.

Exit codes: 0 for success, 1 for an adapter that is not valid or an error, 2 for a wrong command line, 130 for Ctrl-C.
"""

from __future__ import annotations

import argparse
import inspect
import json
import platform
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from importlib.metadata import version

from .check import check_command, inspect_command
from .export import export_command, merge_command
from .share import card_command, push_command
from .shared import Command, Outcome, say
from .train import init_command, train_command


COMMANDS: dict[str, Command] = {
    "init": init_command,
    "train": train_command,
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
        "peft-residual", description="Train, inspect, export, check and share residual prompt tuning adapters."
    )
    parser.add_argument("--version", action="version", version=_versions())
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for name, command in COMMANDS.items():
        text = inspect.getdoc(command) or ""
        raw = argparse.RawDescriptionHelpFormatter
        subparser = subparsers.add_parser(name, help=text.partition("\n")[0], description=text, formatter_class=raw)
        subparser.set_defaults(run=command(subparser))
        subparser.add_argument("--json", action="store_true", help="print JSON")
    words = list(sys.argv[1:] if argv is None else argv)
    own = 1 if words[:1] == ["train"] else len(words)  # of `train`, TRL's parser reads the rest
    options = parser.parse_args(words[:own])
    options.flags = words[own:]
    try:
        outcome: Outcome = options.run(options)
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except Exception as error:
        known = isinstance(error, (ValueError, OSError, ImportError))
        if not known and not isinstance(error, _connection_errors()):  # the second question imports the package
            raise
        say(f"error: {error}".replace("`overwrite=True`", "--overwrite"))
        return 1
    text = json.dumps(outcome.values, indent=2, ensure_ascii=False) if options.json else outcome.text
    sys.stdout.write(text + "\n")
    return outcome.code


def _connection_errors() -> tuple[type[Exception], ...]:
    """The error of a connection to the Hub: none if the Hub's client was not even imported."""
    if "huggingface_hub" not in sys.modules:
        return ()
    from peft_residual.compat import connection_error

    return (connection_error(),)


def _versions() -> str:
    """The package's version and its hosts', for reports of bugs."""
    hosts = ", ".join(f"{name} {version(name)}" for name in ("peft", "transformers", "torch"))
    return f"peft-residual {version('peft-residual')} ({hosts}, Python {platform.python_version()})"
