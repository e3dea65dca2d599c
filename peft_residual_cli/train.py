"""The commands `train` and `init`."""

from __future__ import annotations

import contextlib
import inspect
import shlex
import signal
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import parse, template
from .plan import Plan, make_plan
from .shared import Outcome, Run


if TYPE_CHECKING:
    from datasets import Dataset

    from .rows import Row


def init_command(parser: ArgumentParser) -> Run:
    """Write a commented config for `train`.

    examples:
      peft-residual init configs/support.yaml
      peft-residual init configs/support.yaml --overwrite
    """
    parser.add_argument("path", nargs="?", default="train.yaml", help="file to write (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")

    def run(options: Namespace) -> Outcome:
        path = Path(options.path)
        if path.exists() and not options.overwrite:
            raise ValueError(f"`{path}` exists. Name another file, or pass `overwrite=True` to replace it.")
        path.write_text(template(), encoding="utf-8")
        text = f"{path}: fill in model_name_or_path, train_file and the instruction, then run\n"
        return Outcome(f"{text}  peft-residual train {shlex.quote(str(path))} --dry-run", {"config": str(path)})

    return run


def train_command(parser: ArgumentParser) -> Run:
    """Train a prompt for a decoder-only model on a JSONL file of yours, with TRL's SFTTrainer.

    A row has `messages`, or `prompt` and `completion`. The tokenizer applies its chat template, and the loss is on the
    assistant's tokens. Everything is checked before the model is loaded. Ctrl-C saves, and says how to resume.

    Options come from a YAML file (`peft-residual init` writes one) and from flags, which take precedence: those below,
    and all of TRL's SFTConfig. `--dry-run` checks everything and says what would happen.

    examples:
      peft-residual train train.yaml --dry-run
      peft-residual train train.yaml --num_train_epochs 5 --output_dir output-5
      peft-residual train train.yaml --resume
    """
    del parser  # TRL's parser reads the options, of which most are TRL's
    return train


def train(options: Namespace) -> Outcome:
    """Run `train` with the words that follow it on the command line (`options.flags`)."""
    try:
        command = parse(options.flags, inspect.getdoc(train_command) or "")
        options.json = command.options.json
        plan = make_plan(command)
    except (ValueError, OSError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    if command.options.dry_run:
        values = {**plan.sizes, "rows": len(plan.data.train), "validation_rows": len(plan.data.validation)}
        values |= {"steps": plan.steps, "max_length": plan.max_length, "longest": max(plan.data.lengths)}
        return Outcome(str(plan), {**values, "num_virtual_tokens": plan.config.num_virtual_tokens})
    # The Trainer prints its log.
    with contextlib.redirect_stdout(sys.stderr if options.json else sys.stdout):
        return _run(plan, shlex.join(flag for flag in options.flags if flag != "--resume"))


def _run(plan: Plan, flags: str) -> Outcome:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl.trainer.sft_trainer import SFTTrainer

    from peft_residual import (
        ResidualOptimizerFactory,
        TrainingSetupCallback,
        disable_base_dropout,
        save_as_prompt_tuning,
    )

    class StopOnInterrupt(TrainerCallback):
        """Ctrl-C ends the training after its step, with a checkpoint. A second one ends the process."""

        pressed = False

        def press(self, number: int, frame: Any) -> None:
            self.pressed = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.pressed:
                control.should_save = control.should_training_stop = True

    def dataset(rows: list[Row]) -> Dataset | None:
        return Dataset.from_list([{"prompt": r.prompt, "completion": r.completion} for r in rows]) if rows else None

    options, out = plan.options, Path(plan.options.output_dir)
    rates = {"learning_rate": options.learning_rate, "encoder_learning_rate": options.encoder_learning_rate}
    optimizer: Any = (ResidualOptimizerFactory, rates)
    interrupt = StopOnInterrupt()
    trainer: Any = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(options.model_name_or_path, dtype=options.dtype, trust_remote_code=False),
        plan.arguments,
        train_dataset=dataset(plan.data.train),
        eval_dataset=dataset(plan.data.validation),
        processing_class=plan.tokenizer,
        peft_config=plan.config,
        callbacks=[TrainingSetupCallback(plan.max_length), interrupt],
        optimizer_cls_and_kwargs=optimizer,
    )
    disable_base_dropout(trainer.model)
    former = signal.signal(signal.SIGINT, interrupt.press)
    try:
        trainer.train(resume_from_checkpoint=plan.checkpoint)
    finally:
        signal.signal(signal.SIGINT, former)
    step = trainer.state.global_step
    if interrupt.pressed:
        checkpoint = str(out / f"checkpoint-{step}")
        again = f"peft-residual train {flags} --resume"
        return Outcome(
            f"Interrupted at step {step}, which is saved in {checkpoint}. To resume:\n  {again}",
            {"step": step, "checkpoint": checkpoint, "resume": again},
            code=130,
        )
    trainer.save_model(str(out / "adapter"))
    values: dict[str, Any] = {"step": step, "adapter": str(out / "adapter")}
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if losses:
        values["eval_loss"] = min(losses) if plan.arguments.load_best_model_at_end else losses[-1]
    if options.merge and trainer.is_world_process_zero():
        save_as_prompt_tuning(out / "adapter", out / "merged", overwrite=options.resume)
        values["merged"] = str(out / "merged")
    return Outcome("\n".join(f"{name}: {value}" for name, value in values.items()), values)
