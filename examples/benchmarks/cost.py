"""Measure what residual prompt tuning costs: run all benchmarks of this folder, and write a page of tables.

Writes `cost.json` (all times, medians, ratios, hardware), `cost.md` and `cost-growth.png` to `--output`. With
`--device cuda`, the names are `cost-cuda.json` and so on. The JSON is updated after each measurement.

    python examples/benchmarks/cost.py
    python examples/benchmarks/cost.py --short --threads 1
    python examples/benchmarks/cost.py --device cuda --output build/cost
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Optional

import encoder
import import_time
import mixed_batch
import prefix_prefill
import saving
import torch
import training_step
from matplotlib.figure import Figure
from tqdm.auto import tqdm
from turns import SEED, WARM_UPS, Comparison, Settings, over_first, parse, table


@dataclass
class CostSettings(Settings):
    repeats: Optional[int] = field(
        default=None, metadata={"help": "Timed turns of each method (default 30, short 7, smoke 2)."}
    )
    short: bool = field(default=False, metadata={"help": "Fewer sizes and turns: 4 minutes on 2 CPU cores."})
    smoke: bool = field(default=False, metadata={"help": "Tiny sizes and two turns, to see that everything runs."})
    output: Path = field(default=Path("build/cost"), metadata={"help": "Output folder."})


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurements; triples are `P, H, M`: virtual tokens, embedding width, hidden layer."""

    repeats: int = 30
    slow_repeats: int = 7  # of measurements that take seconds
    encoders: tuple[tuple[int, int, int], ...] = ((10, 768, 800), (100, 128, 50), (100, 512, 64), (100, 768, 400))
    models: tuple[str, ...] = ("t5-small", "gpt2-small")
    methods: tuple[str, ...] = ("prompt tuning", "residual", "residual, not shared", "P-tuning", "LoRA")
    batch: tuple[int, int] = (8, 128)
    prompt: int = 100
    layers: int = 12
    vocabulary: int = 50257
    adapters: tuple[int, int] = (8, 64)
    new_tokens: tuple[int, ...] = (1, 32)
    growth_from: tuple[int, int, int] = (100, 512, 64)
    growth: tuple[tuple[int, ...], ...] = (
        (10, 30, 100, 300, 1000),
        (128, 256, 512, 1024, 2048),
        (16, 64, 200, 400, 800),
    )
    step_growth: tuple[int, ...] = (10, 30, 100, 300, 1000)


FULL = Sizes()
SHORT = replace(
    FULL,
    repeats=7,
    slow_repeats=3,
    models=("t5-small",),
    layers=2,
    new_tokens=(8,),
    growth=((10, 100, 1000), (128, 512, 1024), (16, 64, 400)),
    step_growth=(10, 100),
)
SMOKE = Sizes(
    repeats=2,
    slow_repeats=1,
    encoders=((3, 16, 4),),
    models=("tiny",),
    methods=training_step.METHODS[:2],
    batch=(2, 8),
    prompt=3,
    layers=1,
    vocabulary=300,
    adapters=(2, 4),
    new_tokens=(2,),
    growth_from=(3, 16, 4),
    growth=((3, 6), (16, 32), (4, 8)),
    step_growth=(3, 6),
)


def plan(settings: CostSettings, sizes: Sizes) -> dict[str, list[Callable[[], Comparison]]]:
    """Return all measurements as functions, by section of the page."""
    where = {"threads": settings.threads, "device": settings.device}
    often, seldom = {**where, "repeats": sizes.repeats}, {**where, "repeats": sizes.slow_repeats}
    rows, length = sizes.batch
    adapters, mixed_rows = sizes.adapters
    files = {"layers": sizes.layers, "vocabulary": sizes.vocabulary, "tokens": sizes.prompt}
    start = sizes.growth_from
    grown = {
        (*start[:axis], value, *start[axis + 1 :]) for axis, values in enumerate(sizes.growth) for value in values
    }

    def encoders(all_sizes: Any) -> list[Callable[[], Comparison]]:
        names = ("tokens", "width", "hidden")
        each = [(is_shared, dict(zip(names, triple))) for is_shared in (True, False) for triple in all_sizes]
        return [
            partial(encoder.measure, encoder.EncoderSettings(**often, **size, shared=shared)) for shared, size in each
        ]

    def step(**options: Any) -> Callable[[], Comparison]:
        step_settings = training_step.StepSettings(**often, batch_size=rows, length=length, **options)
        return partial(training_step.measure, step_settings)

    def prefill(last_logits: bool) -> Callable[[], Comparison]:
        sizes_of_prefill = {"prompt": sizes.prompt, "layers": min(sizes.layers, 6), "last_logits": last_logits}
        return partial(prefix_prefill.measure, prefix_prefill.PrefillSettings(**often, **sizes_of_prefill))

    def mixed(new_tokens: int) -> Callable[[], Comparison]:
        sizes_of_batch = {"adapters": adapters, "rows": mixed_rows, "new_tokens": new_tokens}
        return partial(mixed_batch.measure, mixed_batch.BatchSettings(**seldom, **sizes_of_batch))

    def disk(loading: bool) -> Callable[[], Comparison]:
        return partial(saving.measure, saving.SavingSettings(**seldom, **files, loading=loading))

    return {
        "training step": [step(size=s, methods=list(sizes.methods), tokens=sizes.prompt) for s in sizes.models],
        "encoder": encoders(sizes.encoders),
        "inference": [prefill(False), prefill(True), *map(mixed, sizes.new_tokens)],
        "saving": [disk(loading=False), disk(loading=True)],
        "growth": encoders(sorted(grown)),
        "growth of a step": [step(size=sizes.models[0], tokens=count, memory=False) for count in sizes.step_growth],
        "import": [partial(import_time.measure, import_time.ImportSettings(**seldom))],
    }


def hardware(settings: CostSettings) -> dict[str, Any]:
    """Describe the hardware and the versions."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(": ")[1] for line in lines if line.startswith("model name")), processor)
    return {
        "device": "CPU" if settings.device == "cpu" else torch.cuda.get_device_name(),
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": settings.threads,
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "peft", "transformers", "peft-residual")},
        "seed": SEED,
        "warm_ups": WARM_UPS,
    }


# --- page and picture -----------------------------------------------------------------------------------------------

INTRODUCTION = """# What it costs

Written by `python examples/benchmarks/cost.py {options}`; change that, not this page.{warning}

{measured_with}.

Rivals take turns in one loop. Medians are over {sizes.repeats} turns ({sizes.slow_repeats} of files, mixed batches and
the import), without the warm-ups. *Times the first* is a median over that of the first rival of the group. *Single
turns* are the quotients within a turn, the middle half of them: where they hold 1.000, the two were not told apart.

| | times as long, or as much |
|---|---:|"""
TEXTS = {
    "training step": """## A training step

Forward, backward and AdamW with random weights of a real model's size. Peak memory is that of a process of its own
for each method. LoRA (r=8) is there for scale: it takes no room in the input. Other sizes: `training_step.py`.""",
    "encoder": """## The network alone

Forward and backward of what stands in front of the frozen model, against a Python loop over modules with the same
weights, and against PEFT's P-tuning with the same P, H and M: three linear layers where ours has two, or an LSTM of
two layers. It is timed for one row; in training, PEFT runs it for every row of the batch.

Networks of single tokens meet one vector each, so all the time goes into memory: weights are read twice, gradients
written. *Memory traffic alone* moves as many bytes and computes nothing: no implementation can be faster.
What is saved against the loop are its many calls, which count less as networks grow. One size: `encoder.py`.""",
    "inference": """## Inference

A merged adapter *is* PEFT's prompt tuning, and a residual adapter that was loaded projects once. Behind an exported
prefix or the prompt cache, only the text is computed (`prefix_prefill.py`). A batch whose rows have different prompts
takes one call (`mixed_batch.py`).""",
    "saving": """## Saving, loading, merging, exporting

The export of a prefix runs the model to check itself. The export of a vocabulary writes the whole checkpoint, loads it
again and compares: that is its time (`saving.py`).""",
    "growth": """## How it grows

![Time of the network by P, H and M, and of a training step by P, on logarithmic axes]({picture})

Forward and backward of the network, medians in milliseconds.""",
    "growth of a step": "A training step, by the prompt's length:",
    "import": """## Import

What `import peft_residual` adds to `import peft`: processor time, in fresh processes (`import_time.py`).""",
}
# Section and method of the ratios (of medians) at the top of the page.
GLANCE = [
    ("training step", "residual"),
    ("encoder", "Python loop"),
    ("inference", "exported prefix, PEFT"),
    ("inference", "prompt cache"),
    ("inference", "a call for each adapter"),
]


def page(
    results: dict[str, list[Comparison]],
    measured_with: dict[str, Any],
    settings: CostSettings,
    sizes: Sizes,
    name: str,
) -> str:
    """Format the page of tables."""
    options = [f"--{option}" for option in ("short", "smoke") if getattr(settings, option)]
    options += [f"--threads {settings.threads}", f"--device {settings.device}"]
    parts = [
        INTRODUCTION.format(
            options=" ".join(options),
            warning=" These sizes are tiny and these figures mean nothing." if settings.smoke else "",
            measured_with=", ".join(f"{key} {value}" for key, value in measured_with.items()),
            sizes=sizes,
        )
    ]
    for section, rival in GLANCE:
        for comparison in results[section]:
            if rival in comparison.times:
                first = next(iter(comparison.times))
                parts.append(f"| {rival} against {first}: {comparison.title} | {comparison.ratios[rival]:.3f} |")
    for comparison in results["training step"]:
        ratio = over_first(comparison.memory)["residual"]
        parts.append(f"| peak memory, residual against prompt tuning: {comparison.title} | {ratio:.3f} |")
    for section, comparisons in results.items():
        tables = growth_table(comparisons) if section == "growth" else table(*comparisons)
        parts.append(f"\n{TEXTS[section].format(picture=f'{name}-growth.png')}\n\n{tables}")
    return "\n".join(parts) + "\n"


def growth_lines(comparisons: list[Comparison]) -> dict[str, dict[tuple[int, int, int], float]]:
    """Collect the medians by line of the plot and by size."""
    lines: dict[str, dict[tuple[int, int, int], float]] = {}
    for comparison in comparisons:
        size = (comparison.settings.tokens, comparison.settings.width, comparison.settings.hidden)
        for rival, median in comparison.medians.items():
            if not rival.startswith("P-tuning"):
                rival += ", shared" if comparison.settings.shared else ", per token"
            lines.setdefault(rival, {})[size] = median
    return lines


def growth_table(comparisons: list[Comparison]) -> str:
    """Format a Markdown table with a row for each size and a column for each network."""
    lines = growth_lines(comparisons)
    rows = [f"| P | H | M | {' | '.join(lines)} |", "|---:" * (3 + len(lines)) + "|"]
    for size in next(iter(lines.values())):
        medians = [f"{line[size]:.2f}" for line in lines.values()]
        rows.append(f"| {' | '.join([*map(str, size), *medians])} |")
    return "\n".join(rows)


def growth_picture(results: dict[str, list[Comparison]], start: tuple[int, int, int]) -> Figure:
    """Plot the time of the network by P, H and M, and of a training step by P."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    *panels, last = figure.subplots(2, 2).flat
    for axis, (axes, name) in enumerate(zip(panels, ("virtual tokens, P", "embedding width, H", "hidden layer, M"))):
        for label, line in growth_lines(results["growth"]).items():
            others = [i for i in range(3) if i != axis]
            points = [(size[axis], ms) for size, ms in line.items() if all(size[i] == start[i] for i in others)]
            style = "-" if label.startswith("residual") else "--"
            axes.plot(*zip(*points), style, marker="o", markersize=4, label=label)
        fixed = ", ".join(f"{letter}={start[i]}" for i, letter in enumerate("PHM") if i != axis)
        axes.set(title=f"The network, forward and backward ({fixed})", xlabel=name)
    panels[0].legend(fontsize=8)
    steps = results["growth of a step"]
    for rival in steps[0].times:
        points = [(comparison.settings.tokens, comparison.medians[rival]) for comparison in steps]
        last.plot(*zip(*points), marker="o", markersize=4, label=rival)
    last.set(title=f"A training step, size of {steps[0].settings.size}", xlabel="virtual tokens, P")
    last.legend(fontsize=8)
    for axes in (*panels, last):
        axes.set(xscale="log", yscale="log", ylabel="milliseconds")
        measured = sorted(set(axes.lines[0].get_xdata()))
        axes.set_xticks(measured, map(str, measured))
        axes.xaxis.minorticks_off()
        axes.grid(alpha=0.3)
    return figure


def main() -> None:
    """Measure everything, and write the JSON, the page and the plot."""
    settings = parse(CostSettings, __doc__)
    sizes = SMOKE if settings.smoke else SHORT if settings.short else FULL
    if settings.repeats:
        sizes = replace(sizes, repeats=settings.repeats, slow_repeats=settings.repeats)
    name = "cost" if settings.device == "cpu" else f"cost-{settings.device}"
    settings.output.mkdir(parents=True, exist_ok=True)
    measurements, measured_with = plan(settings, sizes), hardware(settings)
    results: dict[str, list[Comparison]] = {section: [] for section in measurements}
    with tqdm(total=sum(map(len, measurements.values()))) as progress:
        for section, measures in measurements.items():
            for measure in measures:
                progress.set_description(section)
                results[section].append(measure())
                progress.update()
                written = {s: [comparison.to_json() for comparison in done] for s, done in results.items()}
                whole = {"hardware": measured_with, "sections": written}
                (settings.output / f"{name}.json").write_text(json.dumps(whole, indent=1))
    growth_picture(results, sizes.growth_from).savefig(settings.output / f"{name}-growth.png", dpi=110)
    text = page(results, measured_with, settings, sizes, name)
    (settings.output / f"{name}.md").write_text(text)
    print(text)
    print(f"written: {', '.join(str(path) for path in sorted(settings.output.glob(f'{name}*')))}")


if __name__ == "__main__":
    main()
