"""Ctrl-C saves a checkpoint and prints the command that resumes from it."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path

from transformers import TrainerCallback


class SaveOnInterrupt(TrainerCallback):
    """On Ctrl-C, finish the step (or the evaluation) and save; on a second Ctrl-C, stop at once."""

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


def is_complete(checkpoint: Path) -> bool:
    """Check that a checkpoint is complete: the Trainer writes its state last."""
    return (checkpoint / "trainer_state.json").is_file()


def last_checkpoint(output_dir: Path) -> Path | None:
    """Find the last complete checkpoint of a run."""
    complete = [path for path in output_dir.glob("checkpoint-*") if is_complete(path)]
    return max(complete, key=lambda path: int(path.name.split("-")[1]), default=None)


def exit_with_command(output_dir: Path) -> None:
    """Print the command that resumes from the last complete checkpoint, and exit."""
    last = last_checkpoint(output_dir)
    if last is None:
        print("\nInterrupted before the first checkpoint. Start again with --overwrite.")
        sys.exit(130)
    words = [word for word in sys.argv if word != "--overwrite"]
    print("\nResume with:\n" + shlex.join(["python", *words, "--resume_from_checkpoint", str(last)]))
    sys.exit(130)
