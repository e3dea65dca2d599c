"""Shared by the benchmarks: time several methods in turns, compare their medians, and format a table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from tqdm.auto import tqdm
from transformers import HfArgumentParser


WARM_UPS = 2
SEED = 0


@dataclass
class Settings:
    """Settings of every benchmark; each one adds its own."""

    threads: int = field(default=2, metadata={"help": "CPU threads."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    repeats: int = field(default=15, metadata={"help": "Timed turns of each method, after two warm-up turns."})


SettingsType = TypeVar("SettingsType", bound=Settings)


def parse(settings: type[SettingsType], description: str) -> SettingsType:
    """Parse the command line and set the number of threads."""
    (parsed,) = HfArgumentParser(settings, description=description.splitlines()[0]).parse_args_into_dataclasses()
    torch.set_num_threads(parsed.threads)
    return parsed


@dataclass
class Comparison:
    """Times and memory of methods that did the same work in turns; ratios are relative to the first method.

    Attributes:
        title (`str`): The workload and its sizes.
        settings ([`Settings`]): All settings.
        times (`dict[str, list[float]]`): Milliseconds of each turn, by method.
        memory (`dict[str, float]`): Peak memory in MiB, by method, if it was measured.
        difference (`float`, *optional*): Largest difference between results, relative to the largest value.
    """

    title: str
    settings: Settings
    times: dict[str, list[float]]
    memory: dict[str, float] = field(default_factory=dict)
    difference: float | None = None

    @property
    def medians(self) -> dict[str, float]:
        return {rival: statistics.median(times) for rival, times in self.times.items()}

    @property
    def ratios(self) -> dict[str, float]:
        """Each median divided by the median of the first method."""
        return over_first(self.medians)

    @property
    def spreads(self) -> dict[str, tuple[float, float]]:
        """Interquartile ranges of the ratios within single turns, in which the machine's state is similar."""
        first = next(iter(self.times.values()))
        return {rival: _middle_half([t / f for t, f in zip(times, first)]) for rival, times in self.times.items()}

    def to_json(self) -> dict[str, Any]:
        """Return everything as a dict for `json.dump`."""
        derived = {"medians": self.medians, "ratios": self.ratios, "spreads": self.spreads}
        return {**asdict(self), **derived, "memory_ratios": over_first(self.memory)}


def over_first(values: Mapping[str, float]) -> dict[str, float]:
    """Divide every value by the first one."""
    return {name: value / next(iter(values.values())) for name, value in values.items()}


def _middle_half(values: list[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def take_turns(
    rivals: Mapping[str, Callable[[], object]], settings: Settings, prepare: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Time each method once per turn. Every other turn is reversed, so that no method always follows the same one.

    Args:
        rivals (`Mapping[str, Callable]`): The functions to time, by name.
        settings ([`Settings`]): Number of turns, and the device.
        prepare (`Callable`): Called before each function; not timed.

    Returns:
        `dict[str, list[float]]`: Milliseconds of each turn, without the warm-up turns, which allocate and compile.
    """
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in tqdm(range(settings.repeats + WARM_UPS), desc="turns", leave=False):
        for name in list(rivals)[:: -1 if turn % 2 else 1]:
            prepare()
            synchronize(settings.device)
            start = time.perf_counter()
            rivals[name]()
            synchronize(settings.device)
            if turn >= WARM_UPS:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def synchronize(device: str) -> None:
    """Wait for the GPU, if one is used."""
    if device != "cpu":
        torch.cuda.synchronize()


def relative_difference(tensors: Iterable[torch.Tensor]) -> float:
    """Return the largest difference of tensors from the first one, relative to its largest value."""
    first, *others = tensors
    return max(((other - first).abs().max() / first.abs().max()).item() for other in others)


def table(*comparisons: Comparison) -> str:
    """Format a Markdown table with a row for each method of each comparison."""
    has_memory = any(comparison.memory for comparison in comparisons)
    columns = ["", "", "median, ms", "fastest", "times the first", "single turns, middle half"]
    columns += ["peak, MiB", "times the first"] if has_memory else []
    lines = [f"| {' | '.join(columns)} |", "|---|---|" + "---:|" * (len(columns) - 2)]
    for comparison in comparisons:
        title = comparison.title
        memory_ratios = over_first(comparison.memory)
        for rival, median in comparison.medians.items():
            low, high = comparison.spreads[rival]
            spread = f"{low:.3f} to {high:.3f}" if rival != next(iter(comparison.times)) else ""
            cells = [title, rival, f"{median:.2f}", f"{min(comparison.times[rival]):.2f}"]
            cells += [f"{comparison.ratios[rival]:.3f}", spread]
            cells += [f"{comparison.memory[rival]:.0f}", f"{memory_ratios[rival]:.3f}"] if has_memory else []
            lines.append(f"| {' | '.join(cells)} |")
            title = ""
    return "\n".join(lines)


def report(comparison: Comparison) -> None:
    """Print a comparison with its settings."""
    settings = comparison.settings
    print(f"torch {torch.__version__}, {settings.device}, {settings.threads} CPU threads, seed {SEED}")
    print(f"median of {settings.repeats} turns\n\n{table(comparison)}")
    if comparison.difference is not None:
        print(f"\nresults differ by {comparison.difference:.1e} of the largest number")
