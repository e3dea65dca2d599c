"""Many training runs in parallel processes: each result is kept at once, and finished runs are not repeated."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm


def read_records(path: Path, kind: type) -> dict[Any, dict[str, Any]]:
    """Read finished runs; a last line that was cut off is removed from the file.

    Args:
        path (`Path`): A JSONL file; need not exist.
        kind (`type`): The frozen dataclass of a run, whose fields each record has.
    """
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith("\n"):  # the process was killed while writing it
        path.write_text("".join(lines[:-1]))
        del lines[-1]
    records = [json.loads(line) for line in lines]
    return {kind(**{field.name: record[field.name] for field in fields(kind)}): record for record in records}


def run_all(
    kind: type, runs: Iterable[Any], train: Callable[[Any], dict[str, Any]], path: Path, processes: int
) -> dict[Any, dict[str, Any]]:
    """Train all runs that are not yet in a file of results, and append each result to that file.

    Args:
        kind (`type`): The frozen dataclass of a run.
        runs (`Iterable`): Runs of that type.
        train (`Callable`): Takes a run and returns its results; picklable.
        path (`Path`): A JSONL file, one line per run.
        processes (`int`): Parallel processes.

    Returns:
        `dict`: The record of every run in the file: the run's fields and its results.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    found = read_records(path, kind)
    missing = [run for run in dict.fromkeys(runs) if run not in found]
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(processes, mp_context=context) as pool,
        path.open("a") as file,
        tqdm(total=len(missing), desc="runs", smoothing=0.05) as progress,
    ):
        futures = {pool.submit(train, run): run for run in missing}
        for future in as_completed(futures):
            run = futures[future]
            found[run] = {**asdict(run), **future.result()}
            file.write(json.dumps(found[run]) + "\n")
            file.flush()
            progress.update()
    return found
