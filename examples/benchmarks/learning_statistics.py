"""Statistics of the measurements of `learning.py`: table cells, best rates, speed, paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

from learning_methods import PLAIN
from scipy import stats


Record = dict[str, Any]

# Settings of a run except its seed: runs with equal settings form one cell of a table.
CELL = ("task", "method", "learning_rate", "tokens", "shots", "init", "steps", "batch_size")


def cells(records: Iterable[Record]) -> list[Record]:
    """Join runs that differ only in their seed: test accuracies by seed, mean curve, median time."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[name] for name in CELL), []).append(record)
    joined = []
    for key, group in groups.items():
        group.sort(key=lambda record: record["seed"])
        curves = [[accuracy for _, accuracy in record["curve"]] for record in group]
        joined.append(
            {
                **dict(zip(CELL, key, strict=True)),
                "seeds": [record["seed"] for record in group],
                "test": [record["test"] for record in group],
                "validation": round(statistics.mean(record["validation"] for record in group), 5),
                "curve_steps": [step for step, _ in group[0]["curve"]],
                "curve": [round(statistics.mean(values), 4) for values in zip(*curves, strict=True)],
                "ms_per_step": round(1e3 * statistics.median(record["seconds_per_step"] for record in group), 2),
                "trained": group[0]["trained"],
            }
        )
    return joined


class Measurements:
    """The cells of one suite, with the statistics for its tables.

    Args:
        found (`list[dict]`): Cells of one suite.
    """

    def __init__(self, found: Iterable[Record]) -> None:
        self.cells = list(found)
        self.tasks = list(dict.fromkeys(cell["task"] for cell in self.cells))
        self.methods = list(dict.fromkeys(cell["method"] for cell in self.cells))
        self.rates = sorted({cell["learning_rate"] for cell in self.cells})
        self.seeds = self.cells[0]["seeds"] if self.cells else []

    def where(self, **wanted: Any) -> Measurements:
        """Select the cells with these settings."""
        return Measurements(cell for cell in self.cells if all(cell[name] == value for name, value in wanted.items()))

    def best(self, method: str, task: str) -> Record:
        """Return a method's cell at its best learning rate on a task, by validation; the smallest of equal rates."""
        candidates = self.where(method=method, task=task).cells
        return max(candidates, key=lambda cell: (cell["validation"], -cell["learning_rate"]))

    def mean(self) -> float:
        """Mean test accuracy of all cells and seeds, in percent."""
        return 100 * statistics.mean(accuracy for cell in self.cells for accuracy in cell["test"])

    def spread_over_rates(self, method: str) -> float:
        """Standard deviation over learning rates of the mean over seeds, mean over tasks, in points."""
        of_tasks = [
            statistics.pstdev(
                100 * statistics.mean(cell["test"]) for cell in self.where(method=method, task=task).cells
            )
            for task in self.tasks
        ]
        return statistics.mean(of_tasks)

    def at_best(self, method: str) -> dict[str, list[float]]:
        """Test accuracies by seed at the best rate, in percent, by task."""
        return {task: [100 * a for a in self.best(method, task)["test"]] for task in self.tasks}

    def steps_to_plain(self, method: str) -> dict[str, float | None]:
        """Return by task the share of steps that a method needs to reach prompt tuning's final validation accuracy.

        Both methods at their own best rates, on mean curves. None if it is not reached.
        """
        shares: dict[str, float | None] = {}
        for task in self.tasks:
            goal = self.best(PLAIN, task)["curve"][-1]
            cell = self.best(method, task)
            points = zip(cell["curve_steps"], cell["curve"], strict=True)
            reached = [step for step, accuracy in points if accuracy >= goal]
            shares[task] = reached[0] / cell["steps"] if reached else None
        return shares


def difference(first: dict[str, list[float]], second: dict[str, list[float]]) -> tuple[float, float]:
    """Mean of the paired differences and the half width of their 95 % interval (Student's t over the seeds).

    Pairs have the same task and seed, and therefore the same training rows and order. Tasks are averaged first.
    """
    by_seed = [
        statistics.mean(first[task][seed] - second[task][seed] for task in first)
        for seed in range(len(next(iter(first.values()))))
    ]
    if len(by_seed) < 2:
        return by_seed[0], math.inf
    width = stats.t.ppf(0.975, len(by_seed) - 1) * statistics.stdev(by_seed) / math.sqrt(len(by_seed))
    return statistics.mean(by_seed), float(width)
