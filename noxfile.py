"""`nox` (or `make matrix`) runs the core tests with other versions of PEFT's world, and the wheel on its own.

`nox -s oldest` runs one session, `nox -s oldest -- -n 2` gives pytest two processes, and `nox --force-python 3.13`
uses another Python that is installed. A session needs nothing but a package index. `newest_released` may fail: it
tells what is new.
"""

import re
import shutil
import sys
from pathlib import Path

import nox


nox.options.default_venv_backend = "venv"
ROOT = Path(__file__).parent
PINS = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
TORCH = f"torch=={PINS['torch']}"  # the only one that was tested
TOOLS = [
    requirement
    for name in ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "matplotlib")
    # The pinned hypothesis and matplotlib need Python 3.11.
    for requirement in (f"{name}=={PINS[name]}; python_version >= '3.11'", f"{name}; python_version < '3.11'")
]
# Not core: they need trl, scikit-learn, bitsandbytes or DeepSpeed, or test documents, examples and learning.
NOT_CORE = (
    *("distributed", "docs", "embedded", "examples", "learning", "operations", "precision", "readme", "real_learning"),
    *("reproduce", "text_to_text", "text_to_text_training", "train", "trl"),
)


def core_tests(session: nox.Session, *hosts: str) -> None:
    """Install the package with these hosts, and run the core tests."""
    session.install(".", TORCH, *TOOLS, *hosts)
    session.run("python", "-m", "pip", "list")
    env = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    ignored = [f"--ignore=tests/test_{name}.py" for name in NOT_CORE]
    session.run("python", "-m", "pytest", "-q", *ignored, *session.posargs, env=env)


@nox.session
def oldest(session: nox.Session) -> None:
    """The oldest versions in `pyproject.toml`."""
    dependencies = (ROOT / "pyproject.toml").read_text().partition("\ndependencies = [")[2].partition("]")[0]
    floors = re.findall(r'"(\w+)>=([\d.]+)', dependencies)
    core_tests(session, *(f"{name}=={number}" for name, number in floors if name != "torch"))


@nox.session
@nox.parametrize("transformers", ["4.57.6", "5.0.0", "5.10.4"])
def middle(session: nox.Session, transformers: str) -> None:
    """Versions between: the last transformers 4, the first 5, and one that starts no assisted generation."""
    core_tests(session, f"transformers=={transformers}")


@nox.session
def newest_pinned(session: nox.Session) -> None:
    """The known-good set."""
    core_tests(session, "-c", "constraints.txt")


@nox.session
def newest_released(session: nox.Session) -> None:
    """What an index gives today, without bounds."""
    core_tests(session, "--upgrade", "transformers", "peft", "accelerate", "datasets", "huggingface_hub")


@nox.session
def wheel(session: nox.Session) -> None:
    """The built wheel in an environment with nothing but its runtime dependencies, outside of the checkout."""
    folder = session.create_tmp()
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)  # files of former builds
    session.run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ".", external=True)
    (path,) = Path(folder).glob("*.whl")
    session.install(TORCH, str(path))
    session.chdir(folder)
    session.run("python", str(ROOT / "tests" / "installed.py"), env={"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""})
