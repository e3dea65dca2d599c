"""Reproduce a table of a paper with one command: every cell is a run of `text_to_text/train.py` for each seed.

python examples/reproduce/table.py superglue-t5-base --dry_run   # print what would run and what is finished
python examples/reproduce/table.py superglue-t5-base             # the same command resumes after an interruption
python examples/reproduce/table.py superglue-t5-base --smoke     # on the embedded model, offline, one minute

Each run is a separate process with its own folder and log. A run is finished when it has written its scores, its last
file. `table.md` and `table.json` are updated after every run.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `reproduce` and `text_to_text`

from reproduce.plan import Run, Table, check_settings, load_table, plan
from reproduce.results import write, write_table
from text_to_text.interruption import last_checkpoint


TRAIN = Path(__file__).resolve().parents[1] / "text_to_text" / "train.py"
INTERRUPTED = (130, -signal.SIGINT)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", help="a name in tables/, or the path of a YAML file")
    parser.add_argument("--output_dir", type=Path, help="default: build/reproduce/TABLE")
    parser.add_argument(
        "--columns", nargs="+", help="run only these columns, for example to divide a table among machines"
    )
    parser.add_argument("--tasks", nargs="+", help="run only these tasks")
    parser.add_argument("--seeds", nargs="+", type=int, help="run only these seeds")
    parser.add_argument("--dry_run", action="store_true", help="list the runs without running them")
    parser.add_argument(
        "--smoke", action="store_true", help="every column with the embedded model and a few rows, offline"
    )
    return parser.parse_args(words)


def chosen(args: argparse.Namespace, table: Table, runs: list[Run]) -> list[Run]:
    for name in ("columns", "tasks", "seeds"):
        given, known = getattr(args, name) or [], list(getattr(table, name))
        for value in given:
            if value not in known:
                sys.exit(f"--{name} {value} is not in the table. It has: {', '.join(map(str, known))}.")
        runs = [run for run in runs if not given or getattr(run, name.removesuffix("s")) in given]
    return runs


def launch(run: Run) -> int:
    """Run until the end, from the last complete checkpoint if there is one, and return the exit status."""
    write(run.folder / "settings.json", json.dumps(run.settings, indent=2))
    checkpoint = last_checkpoint(run.folder)
    resume = ["--resume_from_checkpoint", str(checkpoint)] if checkpoint else ["--overwrite"]
    # Ctrl-C also reaches the run, which then finishes its step and saves: wait for it.
    previous = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        with (run.folder / "log.txt").open("a") as log:
            command = [sys.executable, str(TRAIN), *run.words, *resume]
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT).wait()
    finally:
        signal.signal(signal.SIGINT, previous)


def main(words: list[str] | None = None) -> None:
    args = parse(words)
    table = load_table(args.table, args.smoke)
    name = Path(args.table).stem + ("-smoke" if args.smoke else "")
    output_dir = args.output_dir or Path("build/reproduce") / name
    everything = plan(table, output_dir)
    runs = chosen(args, table, everything)
    check_settings(everything)

    waiting = [run for run in runs if run.scores() is None]
    print(f"{table.title}: {len(runs)} runs, {len(runs) - len(waiting)} of them finished.")
    if args.dry_run:
        for run in waiting:
            print(shlex.join(["python", str(TRAIN), *run.words]))
        return
    failed = []
    with tqdm(total=len(runs), initial=len(runs) - len(waiting), unit="run") as bar:
        for run in waiting:
            bar.set_description(f"{run.column}, {run.task}, seed {run.seed}")
            status = launch(run)
            if status in INTERRUPTED:
                sys.exit("Interrupted. The same command resumes from here.")
            if status != 0:
                failed.append(run)
            write_table(table, everything, output_dir)
            bar.update()
    print(write_table(table, everything, output_dir))
    print(f"written to {output_dir}: table.json, table.md, and a folder per run")
    if failed:
        logs = "\n".join(str(run.folder / "log.txt") for run in failed)
        sys.exit(f"{len(failed)} runs failed; the same command runs them again. Their logs:\n{logs}")


if __name__ == "__main__":
    main()
