"""Resume an interrupted training run: the final weights are bit-identical to those of an uninterrupted run.

    python examples/by_feature/resume.py [--smoke]

trains once without and once with an interruption, and compares the weights. Ctrl-C prints the command that resumes:

    python examples/by_feature/resume.py --resume_from build/by_feature/resume/interrupted
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from base import TaskArguments, base_code, load_data, load_merged, make_config, make_trainer, test_score
from common import make_output_dir, parse, print_saved
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from peft_residual import create_residual_optimizer, disable_base_dropout, save_as_prompt_tuning


@dataclass
class ResumeArguments(TaskArguments):
    """What to train, and on which data."""

    # New: the run to resume
    resume_from: Path | None = field(default=None, metadata={"help": "Folder of the interrupted run to resume."})
    output_dir: Path = field(default=Path("build/by_feature/resume"), metadata={"help": "Output folder."})


# New: simulates a crash or a stopped job
class Interrupt(TrainerCallback):
    """Stop at the first checkpoint in the second half of the training."""

    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= args.max_steps // 2


def last_checkpoint(folder: Path) -> str:
    """Find the last checkpoint in a folder, and check that it has everything that resuming needs."""
    checkpoint = get_last_checkpoint(folder) if folder.is_dir() else None
    if checkpoint is None:
        sys.exit(f"--resume_from {folder} holds no checkpoint (checkpoint-<step>). Name the folder of a run.")
    for name in ("trainer_state.json", "optimizer.pt", "adapter_model.safetensors"):
        if not Path(checkpoint, name).is_file():
            sys.exit(f"{checkpoint} has no {name}: it is incomplete or has no training state. Delete it.")
    return checkpoint


def train(args: ResumeArguments, data, tokenizer, folder: Path, checkpoint: str | None = None, callbacks=()):
    """Train with a new model and a new Trainer, as in a new process."""
    base = AutoModelForSeq2SeqLM.from_pretrained(args.model, dtype=torch.float32)
    model = get_peft_model(base, make_config(args))
    disable_base_dropout(model)
    optimizer = create_residual_optimizer(model, learning_rate=args.learning_rate)
    trainer = make_trainer(args, model, data, tokenizer, optimizer, callbacks, output_dir=str(folder))
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        if get_last_checkpoint(folder) is None:
            print("\nInterrupted before the first checkpoint: there is nothing to resume from.")
        else:
            command = [option for option in sys.argv if option != "--overwrite"]
            print("\nInterrupted. To resume:\n    python", shlex.join([*command, "--resume_from", str(folder)]))
        sys.exit(130)
    return model


def main() -> None:
    args = parse(ResumeArguments)
    if args.resume_from is None:
        make_output_dir(args)

    # Data
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = load_data(args, tokenizer, args.task)

    # Model, config, train
    if args.resume_from is not None:
        # New: this is all that resuming takes
        folder = args.resume_from
        model = train(args, data, tokenizer, folder, last_checkpoint(folder))
    else:
        # New: train with and without an interruption
        straight, folder = args.output_dir / "straight", args.output_dir / "interrupted"
        train(args, data, tokenizer, straight)
        train(args, data, tokenizer, folder, callbacks=[Interrupt()])
        checkpoint = last_checkpoint(folder)
        print(f"\nInterrupted. A new model and a new Trainer resume from {checkpoint}.")
        model = train(args, data, tokenizer, folder, checkpoint)
        one, other = (
            load_file(f / f"checkpoint-{args.max_steps}/adapter_model.safetensors") for f in (straight, folder)
        )
        same = one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        print(f"\nweights at step {args.max_steps}, with and without interruption: {'same' if same else 'DIFFERENT'}")
        if not same:
            sys.exit(1)

    # Evaluate
    print(f"\ntest exact match: {test_score(args, model, data, tokenizer):.1%}")

    # Save
    adapter, merged = folder / "adapter", folder / "merged"
    model.save_pretrained(adapter)
    save_as_prompt_tuning(model, merged, overwrite=True)

    # Reload
    print(f"test exact match after reloading: {test_score(args, load_merged(args, merged), data, tokenizer):.1%}")
    print_saved(adapter, merged, base_code(args))


if __name__ == "__main__":
    main()
