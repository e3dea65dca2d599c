"""Write the results of finished runs as `table.json` and `table.md`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import mean, stdev

from reproduce.plan import Run, Table
from text_to_text.data import find_task


def write_table(table: Table, runs: list[Run], output_dir: Path) -> str:
    """Write both files, and return the Markdown."""
    cells = collect(table, runs)
    markdown = as_markdown(table, cells)
    write(
        output_dir / "table.json", json.dumps({"title": table.title, "source": table.source, "cells": cells}, indent=2)
    )
    write(output_dir / "table.md", markdown)
    return markdown


def write(path: Path, text: str) -> None:
    """Write a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text)
    os.replace(scratch, path)


def collect(table: Table, runs: list[Run]) -> list[dict]:
    """Return a record for each cell: test scores by seed, mean and standard deviation of its metric, in percent."""
    cells: dict[tuple[str, str], dict] = {}
    for run in runs:
        metric = run.settings["metric"] or find_task(run.task).metrics[0]
        published = table.columns[run.column].get("published", {}).get(run.task)
        new = {"task": run.task, "column": run.column, "metric": metric, "published": published, "test": {}}
        cell = cells.setdefault((run.task, run.column), new)
        scores = run.scores()
        if scores is not None:
            cell["test"][run.seed] = {name: 100 * value for name, value in scores.items() if name != "loss"}
    for cell in cells.values():
        values = [scores[cell["metric"]] for scores in cell["test"].values()]
        cell["mean"] = mean(values) if values else None
        cell["std"] = stdev(values) if len(values) > 1 else None
    return list(cells.values())


def as_markdown(table: Table, cells: list[dict]) -> str:
    """Format mean ± standard deviation (seeds), and the published results next to them."""
    place = {(cell["task"], cell["column"]): cell for cell in cells}
    columns = []
    for name, column in table.columns.items():
        columns.append((name, name, "mean"))
        if column.get("published"):
            columns.append((f"{name}, published", name, "published"))
    lines = [["task", "metric", *(head for head, _, _ in columns)], ["---"] * (2 + len(columns))]
    for task in table.tasks:
        figures = [shown(place[task, name], key) for _, name, key in columns]
        lines.append([task, place[task, columns[0][1]]["metric"], *figures])
    means = []
    for _, name, key in columns:
        values = [place[task, name][key] for task in table.tasks]
        means.append(number(None if None in values else mean(values)))
    lines.append(["mean of all tasks", "", *means])
    done, total = sum(len(cell["test"]) for cell in cells), len(cells) * len(table.seeds)
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        f"# {table.title}\n\n{done} of {total} runs are finished. Test split, per cent: mean ± standard deviation "
        f"(seeds).\n\n{text}\n" + (f"\nPublished: {table.source}\n" if table.source else "")
    )


def shown(cell: dict, key: str) -> str:
    spread = "" if key != "mean" or cell["std"] is None else f" ± {cell['std']:.1f}"
    seeds = f" ({len(cell['test'])})" if key == "mean" and cell["test"] else ""
    return number(cell[key]) + spread + seeds


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"  # noqa: RUF001
