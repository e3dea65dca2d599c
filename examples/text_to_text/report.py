"""Write the scores of a run: `scores.json` and `scores.png`."""

from __future__ import annotations

import json
import os
from pathlib import Path


def report(output_dir: Path, title: str, metrics: tuple[str, ...], scores: dict) -> None:
    """Write scores and curves.

    Args:
        output_dir (`Path`): Folder to write to.
        title (`str`): Title of the plot.
        metrics (`tuple[str, ...]`): Metrics to plot; the first one selected the best epoch.
        scores (`dict`): Has `epochs` (a dict per epoch), `best` (one of them) and `test`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name in metrics:
        points = [(entry["epoch"], entry[name]) for entry in scores["epochs"]]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"{name}, validation")
    best, main = scores["best"], metrics[0]
    axes.plot(best["epoch"], best[main], "k*", markersize=12, label="best: loaded at the end")
    axes.axhline(scores["test"][main], color="gray", linestyle="--", label=f"{main}, test")
    axes.set(xlabel="epoch", ylabel="score", title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    figure.savefig(output_dir / "scores.png", dpi=120)
    plt.close(figure)
    # Last and atomically: if scores.json exists, all other files of the run exist too.
    scratch = output_dir / ".scores.json"
    scratch.write_text(json.dumps(scores, indent=2, default=str))
    os.replace(scratch, output_dir / "scores.json")
