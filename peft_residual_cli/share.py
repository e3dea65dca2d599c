"""The commands `card` and `push`."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

from .shared import Outcome, Run


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
        from peft.utils import CONFIG_NAME

        from peft_residual.storage.model_card import read_results, update_card

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
        from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

        from peft_residual.storage.model_card import CARD_NAME, update_card
        from peft_residual.storage.validation import check_adapter

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


def _metric(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    if not name:
        raise ValueError
    return name, float(value)
