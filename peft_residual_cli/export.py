"""The commands `merge` and `export`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from .shared import Outcome, Run, add_adapter_arguments, folder_of, load_base_and_adapter, say, written


def merge_command(parser: ArgumentParser) -> Run:
    """Save a residual adapter as a plain prompt tuning adapter, which loads without this package.

    The base model is not needed. The source is not changed.

    examples:
      peft-residual merge adapter merged
      peft-residual merge someone/some-adapter merged --overwrite
    """
    add_adapter_arguments(parser)
    parser.add_argument("save_directory", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing adapter")

    def run(options: Namespace) -> Outcome:
        from peft_residual.export import save_as_prompt_tuning

        return written(save_as_prompt_tuning(folder_of(options), options.save_directory, overwrite=options.overwrite))

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
    add_adapter_arguments(parser)
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


def _export_prefix_tuning(options: Namespace) -> Outcome:
    from peft_residual.export import save_as_prefix_tuning

    model, _ = load_base_and_adapter(options)
    return written(save_as_prefix_tuning(model, options.save_directory, overwrite=options.overwrite))


def _export_vocabulary(options: Namespace) -> Outcome:
    from peft_residual.export import save_as_vocabulary

    model, tokenizer = load_base_and_adapter(options)
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
    say(size)
    save_as_vocabulary(model, tokenizer, options.save_directory, overwrite=options.overwrite, **spelling)
    return Outcome(f"{export.folder}\n  put in front of a text: {export.prefixes['default']}", values)


def _export_tensors(options: Namespace) -> Outcome:
    from peft_residual.export import save_prompt_tensor

    return written(save_prompt_tensor(folder_of(options), options.save_directory, overwrite=options.overwrite))


_EXPORTS: dict[str, Run] = {
    "prefix-tuning": _export_prefix_tuning,
    "vocabulary": _export_vocabulary,
    "tensors": _export_tensors,
}
