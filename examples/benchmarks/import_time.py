"""Time `import peft_residual` on top of `import peft`, both in the same process, with a new process in each turn.

Processor time is measured, so that other work on the machine has less influence.

    python examples/benchmarks/import_time.py
    python examples/benchmarks/import_time.py --repeats 21
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field

from tqdm.auto import tqdm
from turns import Comparison, Settings, parse, report


CODE = """
import time
start = time.process_time()
import peft
print(time.process_time() - start)
import peft_residual
print(time.process_time() - start)
"""


@dataclass
class ImportSettings(Settings):
    repeats: int = field(default=11, metadata={"help": "Number of processes, after one warm-up process."})


def measure(settings: ImportSettings) -> Comparison:
    """Import in new processes; the first one fills the caches of files and bytecode."""
    times: dict[str, list[float]] = {"import peft": [], "import peft, peft_residual": []}
    for _ in tqdm(range(settings.repeats + 1), desc="processes", leave=False):
        command = [sys.executable, "-W", "ignore", "-c", CODE]
        printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        for taken, seconds in zip(times.values(), printed.split()[-2:], strict=True):
            taken.append(1e3 * float(seconds))
    return Comparison("processor time", settings, {name: taken[1:] for name, taken in times.items()})


if __name__ == "__main__":
    report(measure(parse(ImportSettings, __doc__)))
