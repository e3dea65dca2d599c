"""Compare how well and how fast methods learn: residual prompt tuning and others on the embedded model's tasks.

    python examples/benchmarks/learning.py --short     # a short run, 2 minutes on 2 CPU cores
    python examples/benchmarks/learning.py             # everything in the docs, one hour

Each run trains one method on one task with one learning rate and one seed, on one thread. The seed determines the
training rows, their order and the initialization, so that methods can be compared in pairs. Accuracy is exact match.
Finished runs are kept in the output folder and not repeated, so this can be interrupted and started again.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `embedded`

import learning_methods
import training_runs
from datasets import disable_progress_bars
from embedded.tasks import MODEL, TASKS, load_task
from learning_methods import METHODS, PAPER, PLAIN, RECOMMENDED, SETTINGS, ZERO_START, Run
from learning_report import write_report
from learning_statistics import cells
from peft import get_peft_model
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, logging

from peft_residual import disable_base_dropout


# When the model is evaluated, in percent of the steps.
EVALUATED = (5, 10, 15, 20, 30, 40, 50, 60, 80, 100)


@functools.cache
def frozen_model() -> tuple[Any, Any]:
    """Load the embedded model and its tokenizer."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    return AutoModelForSeq2SeqLM.from_pretrained(MODEL, dtype=torch.float32), AutoTokenizer.from_pretrained(MODEL)


@functools.cache
def split_of(task: str, split: str, shots: int | None = None, seed: int = 0) -> dict[str, torch.Tensor]:
    """Load a split as padded tensors. All label words have the same number of tokens."""
    _, tokenizer = frozen_model()
    size = None if shots is None else shots * len(TASKS[task].labels)
    rows = load_task(task, train_size=size, seed=seed)[split]
    inputs = tokenizer(list(rows["text"]), return_tensors="pt", padding=True)
    return {**inputs, "labels": tokenizer(list(rows["label"]), return_tensors="pt")["input_ids"]}


def rows_of(split: dict[str, torch.Tensor], indices: torch.Tensor) -> dict[str, torch.Tensor]:
    """Select rows of a split, without unneeded padding."""
    rows = {name: tensor[indices] for name, tensor in split.items()}
    longest = int(rows["attention_mask"].sum(-1).max())
    return {name: tensor if name == "labels" else tensor[:, :longest] for name, tensor in rows.items()}


@torch.no_grad()
def exact_match(model: Any, split: dict[str, torch.Tensor]) -> float:
    """Compute exact match of greedy decoding: each token of the label has the largest logit."""
    model.eval()
    correct = model(**split).logits.argmax(-1) == split["labels"]
    model.train()
    return round(correct.all(-1).float().mean().item(), 6)


def train(run: Run) -> dict[str, Any]:
    """Train and evaluate; return the curve, accuracies, CPU seconds per step and trained parameters."""
    base, _ = frozen_model()
    method = METHODS[run.method]
    torch.manual_seed(run.seed)
    model = get_peft_model(copy.deepcopy(base), method.config(run)).train()
    disable_base_dropout(model)
    optimizer = method.optimizer(model, run.learning_rate)
    scheduler = None
    if method.schedule is not None:
        schedule = functools.partial(method.schedule, steps=run.steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)

    split = split_of(run.task, "train", run.shots, run.seed)
    generator = torch.Generator().manual_seed(run.seed)
    epochs = -(-run.steps * run.batch_size // len(split["labels"]))
    order = torch.cat([torch.randperm(len(split["labels"]), generator=generator) for _ in range(epochs)])
    evaluated = {max(1, run.steps * share // 100) for share in EVALUATED}
    half = {name: tensor[:100] for name, tensor in split_of(run.task, "validation").items()}
    curve, seconds = [], 0.0
    for step in range(1, run.steps + 1):
        start = time.process_time()  # CPU time, which does not depend on other processes
        batch = rows_of(split, order[(step - 1) * run.batch_size : step * run.batch_size])
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        seconds += time.process_time() - start
        if step in evaluated:
            curve.append((step, exact_match(model, half)))
    return {
        "curve": curve,
        "validation": exact_match(model, split_of(run.task, "validation")),
        "test": exact_match(model, split_of(run.task, "test")),
        "seconds_per_step": seconds / run.steps,
        "trained": model.get_nb_trainable_parameters()[0],
    }


def run_all(runs: Iterable[Run], folder: Path, processes: int) -> dict[Run, dict[str, Any]]:
    """Train all runs that are not yet in the folder's file of results, and append each result to that file.

    The file name contains a hash of the methods, so that results of other methods are not reused.
    """
    name = f"runs-{hashlib.sha256(Path(learning_methods.__file__).read_bytes()).hexdigest()[:12]}.jsonl"
    return training_runs.run_all(Run, runs, train, folder / name, processes)


SEEDS = range(5)
RATES = (0.0003, 0.003, 0.03, 0.3, 3.0)
# A development task that plain prompt tuning does not solve in these steps, and all held-out tasks.
HELD_OUT = tuple(name for name, task in TASKS.items() if not task.development)
COMPARED = ("topic", *HELD_OUT)
ALL = [name for name in METHODS if name not in SETTINGS]
PROMPTS = (PLAIN, "SuperPos", PAPER, RECOMMENDED)


def at_own_rate(methods: Iterable[str], tasks: Iterable[str], **settings: Any) -> list[Run]:
    """Each method at its best rate on development tasks."""
    return [
        Run(task, method, METHODS[method].learning_rate, seed, **settings)
        for method, seed, task in product(methods, SEEDS, tasks)
    ]


def at_rates(methods: Iterable[str], tasks: Iterable[str], rates: Iterable[float]) -> list[Run]:
    """Each method at each rate."""
    return [Run(task, method, rate, seed) for method, seed, task, rate in product(methods, SEEDS, tasks, rates)]


def suites() -> dict[str, list[Run]]:
    """All comparisons, the most important first."""
    return {
        "rates": at_rates(ALL, COMPARED, RATES),
        "shots": [run for shots in (5, 20, 100) for run in at_own_rate(PROMPTS, HELD_OUT, shots=shots)],
        "starts": [
            run
            for init in ("SAMPLE_VOCAB", "TEXT", "RANDOM")
            for run in at_own_rate((PLAIN, PAPER, RECOMMENDED), HELD_OUT, init=init)
        ],
        "length": [run for tokens in (10, 100) for run in at_own_rate(PROMPTS, HELD_OUT, tokens=tokens)],
        "settings": at_own_rate((RECOMMENDED, PLAIN, PAPER, ZERO_START, *SETTINGS), HELD_OUT),
    }


def main() -> None:
    """Parse the options, train missing runs, and write measurements, page and plots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--suites", nargs="+", choices=suites(), help="comparisons to run in addition to the rates (default: all)"
    )
    which.add_argument("--short", action="store_true", help="one seed of two tasks, each method at its own rate")
    which.add_argument("--smoke", action="store_true", help="two steps of a few runs, to see that everything runs")
    parser.add_argument(
        "--processes", type=int, default=2, help="parallel runs, one thread each (default %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("build/learning"), help="output folder (default %(default)s)"
    )
    options = parser.parse_args()
    if options.processes < 1:
        parser.error(f"--processes must be at least 1, got {options.processes}")

    chosen = {
        name: runs
        for name, runs in suites().items()
        if name == "rates" or not options.suites or name in options.suites
    }
    command, note = "python examples/benchmarks/learning.py", ""
    if options.suites:
        command += f" --suites {' '.join(options.suites)}"
    if options.short or options.smoke:
        methods, tasks = (ALL, COMPARED[:2]) if options.short else (PROMPTS, COMPARED[:1])
        chosen = {"rates": [run for run in at_own_rate(methods, tasks) if run.seed == 0]}
        command += " --short"
        note = "A short look: one seed, and each method at one learning rate. It says little."
    if options.smoke:
        chosen = {"rates": [replace(run, steps=2) for run in chosen["rates"]]}
        command, note = command.replace("short", "smoke"), "Two training steps: these figures mean nothing."
    records = run_all([run for runs in chosen.values() for run in runs], options.output, options.processes)
    measured = {
        "command": command,
        "note": note,
        "hardware": f"{options.processes} processes of one CPU thread each, torch {torch.__version__}",
        "suites": {name: cells(records[run] for run in runs) for name, runs in chosen.items()},
    }
    (options.output / "learning.json").write_text(json.dumps(measured))
    write_report(options.output)
    print((options.output / "learning.md").read_text())
    print(f"written: {', '.join(str(path) for path in sorted(options.output.glob('learning*')))}")


if __name__ == "__main__":
    main()
