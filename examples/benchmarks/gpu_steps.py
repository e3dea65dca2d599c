"""Time training steps of Llama-3.2-1B's size (random weights, bfloat16) on a GPU, at several sizes in one process.

    python examples/benchmarks/gpu_steps.py
    python examples/benchmarks/gpu_steps.py --device cpu --size tiny-llama --repeats 2   # to see that it runs

The memory of a method is the peak of one step beyond what all models, gradients and optimizers hold between steps.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from training_step import StepSettings, make_step
from turns import Comparison, parse, synchronize, table, take_turns


METHODS = ("prompt tuning", "residual, not shared", "residual, shared", "residual, shared, logits at labels")


@dataclass
class GridSettings(StepSettings):
    device: str = field(default="cuda", metadata={"help": "cuda or cpu."})
    size: str = field(default="llama-3.2-1b", metadata={"help": "Size of the model."})
    dtype: str = field(default="bfloat16", metadata={"help": "Dtype of the frozen model."})
    labels: int = field(default=2, metadata={"help": "Labeled tokens at the end of each row; 0 for all."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Methods to compare."})
    prompts: list[int] = field(default_factory=lambda: [20, 100, 200], metadata={"help": "Numbers of virtual tokens."})
    lengths: list[int] = field(default_factory=lambda: [64, 256], metadata={"help": "Tokens of each row."})
    batch_sizes: list[int] = field(default_factory=lambda: [8, 32], metadata={"help": "Rows."})


def compare(settings: GridSettings) -> Comparison:
    """Time the methods in turns at one size, then measure the memory of a step of each."""
    steps = {method: make_step(method, settings) for method in settings.methods}
    times = take_turns(steps, settings)
    memory = {}
    for method, step in steps.items() if settings.device != "cpu" else ():
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        synchronize(settings.device)
        memory[method] = (torch.cuda.max_memory_allocated() - held) / 2**20
    title = f"P={settings.tokens}, {settings.batch_size} rows of {settings.length} tokens"
    return Comparison(title + (", compiled" if settings.compile else ""), settings, times, memory)


def grid(settings: GridSettings) -> Iterator[GridSettings]:
    """All sizes, one after the other."""
    for tokens, length, rows in itertools.product(settings.prompts, settings.lengths, settings.batch_sizes):
        yield replace(settings, tokens=tokens, length=length, batch_size=rows)


def main() -> None:
    """Measure every size and print its table at once."""
    settings = parse(GridSettings, __doc__)
    name = "CPU" if settings.device == "cpu" else torch.cuda.get_device_name()
    print(
        f"{settings.size}, {settings.dtype}, {name}, torch {torch.__version__}, median of {settings.repeats} turns\n"
    )
    for at_size in grid(settings):
        print(table(compare(at_size)), end="\n\n", flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
