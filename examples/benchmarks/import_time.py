"""Time `import peft_residual` against `import peft`: fresh processes in turns, medians and their ratio.

Processor time is counted, so that other work on the machine shows less. The last line has less noise still: what the
package adds, timed in the same process right after peft.

    python examples/benchmarks/import_time.py
    python examples/benchmarks/import_time.py --repeats 21
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys


CODE = """
import importlib, sys, time
for name in sys.argv[1:]:
    start = time.process_time()
    importlib.import_module(name)
    print(time.process_time() - start)
"""


def seconds(*modules: str) -> list[float]:
    """Import modules one after the other in a fresh process and return what each import took."""
    command = [sys.executable, "-W", "ignore", "-c", CODE, *modules]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [float(line) for line in output.split()[-len(modules) :]]


def main() -> None:
    """Parse the options, import in turns, print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=11, help="processes of each (default %(default)s)")
    options = parser.parse_args()

    seconds("peft_residual")  # fills the caches of files and bytecode
    alone, with_package, added = [], [], []
    for _ in range(options.repeats):
        alone += seconds("peft")
        with_package += seconds("peft_residual")
        first, second = seconds("peft", "peft_residual")
        added.append(1 + second / first)
    print(f"median of {options.repeats} fresh processes each, in turns; processor seconds")
    print(f"  import peft                       {statistics.median(alone):6.3f}")
    print(f"  import peft_residual              {statistics.median(with_package):6.3f}")
    print(f"  ratio                             {statistics.median(with_package) / statistics.median(alone):6.3f}")
    print(f"  ratio, both in the same process   {statistics.median(added):6.3f}")


if __name__ == "__main__":
    main()
