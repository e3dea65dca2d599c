"""Write the page and the plots for the measurements of `learning.py`, without training.

    python examples/benchmarks/learning_report.py docs --include README.md

reads `docs/learning.json`, writes `learning.md` and its plots to the same folder, and inserts the summary into the
README, between `<!-- learning -->` and `<!-- /learning -->`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `embedded`

from embedded.tasks import TASKS
from learning_methods import PAPER, PLAIN, RECOMMENDED, ZERO_START
from learning_statistics import Measurements, difference
from matplotlib.figure import Figure


def verdict(mean: float, width: float) -> str:
    """Format a difference with its interval, and a star if the interval does not contain zero."""
    star = "*" if abs(mean) > width else ""
    return f"{mean:+.1f} ± {width:.1f}{star}" if math.isfinite(width) else f"{mean:+.1f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a Markdown table; all columns except the first are aligned to the right."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def summary_table(rates: Measurements) -> str:
    """One row per method: over all rates, at its best rate, how fast, how large."""
    rows = []
    for method in rates.methods:
        best = rates.at_best(method)
        shares = rates.steps_to_plain(method)
        reached = {task: share for task, share in shares.items() if share is not None}
        times = [
            share * rates.best(method, task)["ms_per_step"] / rates.best(PLAIN, task)["ms_per_step"]
            for task, share in reached.items()
        ]
        where = "" if len(reached) == len(rates.tasks) else f" ({len(reached)} of {len(rates.tasks)} tasks)"
        rows.append(
            [
                method,
                f"{rates.where(method=method).mean():.1f}",
                f"{rates.spread_over_rates(method):.1f}",
                f"{statistics.mean(map(statistics.mean, best.values())):.1f}",
                f"{statistics.mean(map(statistics.pstdev, best.values())):.1f}",
                f"{statistics.median(reached.values()):.2f}{where}" if reached else "never",
                f"{statistics.median(times):.2f}" if times else "never",
                f"{rates.where(method=method).cells[0]['trained']:,}",
            ]
        )
    head = ("", "all rates", "spread over rates", "best rate", "spread over seeds", "steps", "time", "trained")
    return table(head, rows)


def task_table(rates: Measurements) -> str:
    """One row per method, one column per task, at the method's own best rate."""
    rows = []
    for method in rates.methods:
        best = rates.at_best(method)
        row = [f"{statistics.mean(best[t]):.1f} ({rates.best(method, t)['learning_rate']:g})" for t in rates.tasks]
        rows.append([method, *row])
    return table(("method", *rates.tasks), rows)


def rate_table(rates: Measurements) -> str:
    """One row per method, one column per learning rate, mean over tasks and seeds."""
    rows = []
    for method in rates.methods:
        at_rates = [rates.where(method=method, learning_rate=rate) for rate in rates.rates]
        rows.append([method, *(f"{found.mean():.1f}" if found.cells else "" for found in at_rates)])
    return table(("method", *(f"{rate:g}" for rate in rates.rates)), rows)


def difference_table(rates: Measurements, methods: Sequence[str], rivals: Sequence[str]) -> str:
    """Paired differences at each method's own best rate: a row per rival and method, a column per task."""
    rows = []
    for method in methods:
        for rival in rivals:
            ours, theirs = rates.at_best(method), rates.at_best(rival)
            by_task = [verdict(*difference({t: ours[t]}, {t: theirs[t]})) for t in rates.tasks]
            rows.append([f"{method} over {rival}", *by_task, verdict(*difference(ours, theirs))])
    return table(("", *rates.tasks, "all"), rows)


def setting_table(found: Measurements, name: str, label: Callable[[Any], str] = str) -> str:
    """One row per method, one column per value of a setting: mean, and standard deviation over seeds, over tasks."""
    values = list(dict.fromkeys(cell[name] for cell in found.cells))
    rows = []
    for method in found.methods:
        of_values = [found.where(**{name: value}).at_best(method).values() for value in values]
        means = [statistics.mean(map(statistics.mean, tasks)) for tasks in of_values]
        spreads = [statistics.mean(map(statistics.pstdev, tasks)) for tasks in of_values]
        rows.append([method, *(f"{mean:.1f} ± {spread:.1f}" for mean, spread in zip(means, spreads, strict=True))])
    return table(("", *map(label, values)), rows)


def change_table(settings: Measurements) -> str:
    """One row per setting at its rate: each task, their mean, and the difference from the recommended setting."""
    recommended = settings.at_best(RECOMMENDED)
    rows = []
    for method in settings.methods:
        own = settings.at_best(method)
        row = [method, f"{settings.best(method, settings.tasks[0])['learning_rate']:g}"]
        row += [f"{statistics.mean(own[task]):.1f}" for task in settings.tasks]
        row += [f"{statistics.mean(map(statistics.mean, own.values())):.1f}"]
        rows.append([*row, "" if method == RECOMMENDED else verdict(*difference(own, recommended))])
    return table(("", "rate", *settings.tasks, "mean", "over recommended"), rows)


def include(text: str, mark: str, content: str) -> str:
    """Insert content between `<!-- mark -->` and `<!-- /mark -->`.

    Raises:
        ValueError: If a mark is missing.
    """
    pattern = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(
            f"The marks `<!-- {mark} -->` and `<!-- /{mark} -->` are missing. Add them where the table belongs."
        )
    return pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)


# --- plots ----------------------------------------------------------------------------------------------------------

SHOWN = (PLAIN, "P-tuning", "SuperPos", PAPER, ZERO_START, RECOMMENDED)


def _shown(found: Measurements) -> list[str]:
    return [method for method in SHOWN if method in found.methods]


def rates_picture(rates: Measurements) -> Figure:
    """Accuracy by learning rate, mean over tasks and seeds."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for method in rates.methods:
        own = rates.where(method=method)
        points = [(rate, own.where(learning_rate=rate).mean()) for rate in own.rates]
        style = {"linewidth": 2.2} if method in SHOWN else {"linewidth": 1, "linestyle": "--"}
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=method, **style)
    axes.set(xscale="log", xlabel="learning rate", ylabel="exact match on test, %", ylim=(-2, 102))
    axes.set_title("Mean over tasks and seeds")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def curves_picture(rates: Measurements) -> Figure:
    """Validation accuracy by step on each task, at each method's own best rate, mean over seeds."""
    figure = Figure(figsize=(10, 3.2 * math.ceil(len(rates.tasks) / 2)), layout="constrained")
    grid = figure.subplots(math.ceil(len(rates.tasks) / 2), 2, squeeze=False).flat
    for axes, task in zip(grid, rates.tasks, strict=False):
        for method in _shown(rates):
            cell = rates.best(method, task)
            percent = [100 * accuracy for accuracy in cell["curve"]]
            label = f"{method}, {cell['learning_rate']:g}"
            axes.plot(cell["curve_steps"], percent, marker="o", markersize=3, label=label)
        axes.set(title=task, xlabel="step", ylabel="exact match on validation, %", ylim=(-2, 102))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return figure


def shots_picture(shots: Measurements) -> Figure:
    """Accuracy by training rows per class on each task, mean and standard deviation over seeds."""
    figure = Figure(figsize=(3.4 * len(shots.tasks), 3.4), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(shots.tasks), squeeze=False).flat, shots.tasks, strict=True):
        for method in _shown(shots):
            cells_of_task = shots.where(method=method, task=task).cells
            percent = [[100 * accuracy for accuracy in cell["test"]] for cell in cells_of_task]
            sizes = [cell["shots"] for cell in cells_of_task]
            means, spreads = list(map(statistics.mean, percent)), list(map(statistics.pstdev, percent))
            axes.errorbar(sizes, means, spreads, marker="o", markersize=4, capsize=3, label=method)
        axes.set(title=task, xscale="log", xlabel="training rows per class", ylim=(-2, 102))
        axes.set_xticks(sizes, map(str, sizes))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("exact match on test, %")
    figure.axes[0].legend(fontsize=7)
    return figure


# --- page -----------------------------------------------------------------------------------------------------------

PAGE = """# Does it learn?

Written by `{command}` from its measurements; change that, not this page. {note}

The [embedded model](../examples/embedded/README.md), frozen, and the tasks {tasks}. Every method gets the same rows
in the same order: {steps} steps of {rows} rows, AdamW, weight decay 1e-5, a constant learning rate, no dropout in the
frozen model, the last step and no choice of a checkpoint; {tokens} virtual tokens. Accuracy is exact match on 500 test
rows. Seeds: {seeds}. {hardware}.

- **residual (paper)**: the defaults of `ResidualPromptTuningConfig`: one MLP for all tokens, M=800, a LayerNorm at its
  end. Prompt and network are trained at the rate that is shown.
- **residual (recommended)**: `encoder_shared=False`, `encoder_hidden_size=128`: the paper's form with a small network
  for each token.
- **residual, zero start**: `encoder_norm_first=True`, `encoder_zero_init=True`, `encoder_hidden_size=128`. The network
  is trained at 0.01, the prompt at the rate that is shown. So a wrong rate of the prompt leaves a network that learns:
  read its "all rates" and "spread over rates" that way.
- **prompt tuning**, **P-tuning** (MLP), **prefix tuning** and **LoRA** (r=8) are PEFT's. LoRA is there for scale: it
  changes the model's own layers. **SuperPos** mixes 128 rows.

Settings were chosen on development tasks. The zero start came first, from two seeds of sentiment, topic,
question_answering and counting. In a first run of this comparison it was no better than prompt tuning at best rates;
the recommended setting was then chosen from five seeds of topic, counting and majority. No setting was chosen by
results on {held_out}.

## At a glance

{summary}

*All rates*: mean over {rates}. *Spread over rates*: their standard deviation. *Best rate*: each method at its own best
rate of each task, chosen on validation rows. *Steps*, *time*: what the mean curve takes to reach the final validation
accuracy of prompt tuning at its best rate, as a part of prompt tuning's steps and CPU time; medians over tasks.
*Trained*: parameters.

Differences in points at best rates, with 95 % intervals of the pairs that share a seed; a star marks a difference
larger than the seeds' noise:

{differences}

## Learning rates

![Accuracy by learning rate](learning-rates.png)

{by_rate}

## Each task

At each method's own best learning rate, which stands in brackets.

![Accuracy by step on each task](learning-curves.png)

{by_task}
"""
SHOTS = """
## Few rows

Training rows per class on the held-out tasks, each method at the rate that suited it on development tasks.

![Accuracy by training rows per class](learning-shots.png)

{by_shots}
"""
LENGTH = """
## Length of the prompt

Held-out tasks, rates as above.

{by_tokens}
"""
STARTS = """
## Starts

Held-out tasks, rates as above. `TEXT` is a description of the task; `RANDOM` is each library's own.

{by_init}
"""
SETTINGS = """
## Other settings

Held-out tasks, each setting at one learning rate. "Zero start" is `encoder_zero_init`, "norm first"
`encoder_norm_first`; what has no method's name is the recommended setting with that change.

{changes}
"""


def page(measured: dict[str, Any]) -> str:
    """Format the page of tables, with links to the plots."""
    found = {name: Measurements(suite) for name, suite in measured["suites"].items()}
    rates = found["rates"]
    rivals = [method for method in (PLAIN, "P-tuning", "SuperPos") if method in rates.methods]
    text = PAGE.format(
        **{name: measured[name] for name in ("command", "note", "hardware")},
        tasks=", ".join(rates.tasks),
        steps=rates.cells[0]["steps"],
        rows=rates.cells[0]["batch_size"],
        tokens=rates.cells[0]["tokens"],
        seeds=", ".join(map(str, rates.seeds)),
        held_out=", ".join(task for task in rates.tasks if not TASKS[task].development) or "others",
        rates=", ".join(f"{rate:g}" for rate in rates.rates),
        summary=summary_table(rates),
        differences=difference_table(
            rates, [m for m in (RECOMMENDED, ZERO_START, PAPER) if m in rates.methods], rivals
        ),
        by_rate=rate_table(rates),
        by_task=task_table(rates),
    )
    if "shots" in found:
        text += SHOTS.format(by_shots=setting_table(found["shots"], "shots"))
    if "length" in found:
        text += LENGTH.format(by_tokens=setting_table(found["length"], "tokens", "{} tokens".format))
    if "starts" in found:
        text += STARTS.format(by_init=setting_table(found["starts"], "init"))
    if "settings" in found:
        text += SETTINGS.format(changes=change_table(found["settings"]))
    return text.replace(". \n", ".\n")


def write_report(folder: Path, includes: Sequence[Path] = ()) -> None:
    """Write the page and the plots for `folder/learning.json` to the same folder, and the summary to other pages.

    Args:
        folder (`Path`): Folder of the measurements.
        includes (`Sequence[Path]`): Markdown files that contain the summary.
    """
    measured = json.loads((folder / "learning.json").read_text())
    (folder / "learning.md").write_text(page(measured))
    rates = Measurements(measured["suites"]["rates"])
    rates_picture(rates).savefig(folder / "learning-rates.png", dpi=110)
    curves_picture(rates).savefig(folder / "learning-curves.png", dpi=110)
    if "shots" in measured["suites"]:
        shots_picture(Measurements(measured["suites"]["shots"])).savefig(folder / "learning-shots.png", dpi=110)
    for path in includes:
        path.write_text(include(path.read_text(), "learning", summary_table(rates)))


def main() -> None:
    """Parse the options and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of learning.json")
    parser.add_argument("--include", type=Path, nargs="+", default=[], help="pages that contain the summary")
    options = parser.parse_args()
    write_report(options.folder, options.include)


if __name__ == "__main__":
    main()
