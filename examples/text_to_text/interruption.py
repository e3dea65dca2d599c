"""Ctrl-C without loss: the checkpoint is whole, and the command to go on is printed."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path

from transformers import TrainerCallback


class SaveOnInterrupt(TrainerCallback):
    """The first Ctrl-C finishes the step (or the evaluation) and saves; a second one stops at once."""

    pressed = False

    def press(self, *_):
        self.pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nInterrupted: a checkpoint is written after this step. Press again to stop at once.", flush=True)

    def on_train_begin(self, args, state, control, **kwargs):
        signal.signal(signal.SIGINT, self.press)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_save or self.pressed

    def on_save(self, args, state, control, **kwargs):
        if self.pressed:
            raise KeyboardInterrupt

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGINT, signal.default_int_handler)


def is_whole(checkpoint: Path) -> bool:
    """The Trainer writes its state after everything else."""
    return (checkpoint / "trainer_state.json").is_file()


def last_checkpoint(output_dir: Path) -> Path | None:
    """The last whole checkpoint of a run."""
    whole = [path for path in output_dir.glob("checkpoint-*") if is_whole(path)]
    return max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)


def exit_with_command(output_dir: Path) -> None:
    """Say how to go on from the last whole checkpoint."""
    last = last_checkpoint(output_dir)
    if last is None:
        print("\nInterrupted before the first checkpoint. Start again with --overwrite.")
        sys.exit(130)
    words = [word for word in sys.argv if word != "--overwrite"]
    print("\nGo on with:\n" + shlex.join(["python", *words, "--resume_from_checkpoint", str(last)]))
    sys.exit(130)
