"""Plan the runs of a table: read it from YAML, turn it into calls of `text_to_text/train.py`, check them."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from text_to_text.arguments import Arguments
from text_to_text.data import find_task
from transformers import HfArgumentParser


TABLES = Path(__file__).resolve().parent / "tables"
# Arguments that `table.py` passes to a run; they are not settings of the table.
MECHANICS = ("output_dir", "overwrite", "resume_from_checkpoint")


@dataclass(frozen=True)
class Table:
    """The contents of a YAML file in `tables/`.

    Args:
        title (`str`): Title.
        tasks (`list[str]`): One row for each task, named as in `train.py --task`.
        seeds (`list[int]`): One run of each cell for each seed.
        columns (`dict[str, dict]`): Name to `options` of `train.py` and `published` results by task, in percent.
        options (`dict`): Options of `train.py` for all runs; a column's own options override them.
        source (`str`): Source of the published results.
    """

    title: str
    tasks: list[str]
    seeds: list[int]
    columns: dict[str, dict[str, Any]]
    options: dict[str, Any]
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("tasks", "seeds", "columns"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"`{name}` must name at least one, and none twice, got {values!r}.")
        for name, column in self.columns.items():
            unknown = [
                *(set(column) - {"options", "published"}),
                *(set(column.get("published", {})) - set(self.tasks)),
            ]
            if unknown:
                raise ValueError(
                    f"Column {name!r} has {', '.join(map(repr, unknown))}. It may have `options`, and `published` "
                    "with a figure for each of some of the tasks."
                )


@dataclass(frozen=True)
class Run:
    """One call of `train.py`: its cell and seed, its folder, its command line, and the settings that result."""

    column: str
    task: str
    seed: int
    folder: Path
    words: list[str]
    settings: dict[str, Any]

    def scores(self) -> dict | None:
        """Return the test scores, or None if the run is not finished."""
        path = self.folder / "scores.json"
        return json.loads(path.read_text())["test"] if path.is_file() else None


def load_table(name: str, smoke: bool = False) -> Table:
    path = TABLES / f"{name}.yaml"
    path = path if path.is_file() else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in TABLES.glob("*.yaml")))
        sys.exit(f"There is no table {name!r}. There are: {known}. Or give the path of a YAML file.")
    values = yaml.safe_load(path.read_text())
    wanted = {field.name for field in fields(Table)}
    if not isinstance(values, dict) or set(values) - wanted or wanted - {"source"} - set(values):
        sys.exit(f"{path} must hold {', '.join(sorted(wanted))}, and holds {', '.join(map(str, values))}.")
    table = Table(**values)
    return small(table) if smoke else table


def small(table: Table) -> Table:
    """Reduce a table to a few rows of an embedded task and one seed, without published results."""
    options = {name: value for name, value in table.options.items() if name not in ("model", "data_dir")}
    columns = {name: {"options": column.get("options", {})} for name, column in table.columns.items()}
    return Table(table.title, ["embedded/sentiment"], table.seeds[:1], columns, {**options, "smoke": True})


def plan(table: Table, output_dir: Path) -> list[Run]:
    """List all runs, seed by seed, so that a table that is stopped early has all cells. Options are checked here."""
    return [
        make_run(table, column, task, seed, output_dir / column / task / f"seed-{seed}")
        for seed in table.seeds
        for task in table.tasks
        for column in table.columns
    ]


def make_run(table: Table, column: str, task: str, seed: int, folder: Path) -> Run:
    options = {**table.options, **table.columns[column].get("options", {}), "task": task, "seed": seed}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(words)
    find_task(task).selected_by(arguments.metric)
    settings = {name: value for name, value in asdict(arguments).items() if name not in MECHANICS}
    settings = json.loads(json.dumps(settings, default=str))
    return Run(column, task, seed, folder, [*words, "--output_dir", str(folder)], settings)


def check_settings(runs: list[Run]) -> None:
    """Stop if a run was started with other settings, so that one table does not mix different settings."""
    for run in runs:
        path = run.folder / "settings.json"
        then = json.loads(path.read_text()) if path.is_file() else run.settings
        for name in run.settings:
            if then.get(name) != run.settings[name]:
                sys.exit(
                    f"{run.folder} was started with {name}={then.get(name)!r}, the table says "
                    f"{run.settings[name]!r}. Choose another --output_dir, or delete that folder."
                )
