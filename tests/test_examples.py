"""The examples run, offline, and say what they should."""

import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]


def run(script, *args):
    command = [sys.executable, "-W", "ignore", ROOT / "examples" / script, *args]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_demo_trains_resumes_merges_and_reloads(tmp_path):
    out = tmp_path / "demo"
    printed = run("demo.py", "--smoke", "--output_dir", out)
    assert "Interrupted." in printed
    assert "in a process without peft_residual: same" in printed
    assert (out / "curves.png").stat().st_size > 5000
    assert (out / "merged" / "adapter_model.safetensors").exists()
    again = subprocess.run(
        [sys.executable, ROOT / "examples" / "demo.py", "--smoke", "--output_dir", out], capture_output=True, text=True
    )
    assert again.returncode == 1 and "--overwrite" in again.stderr
    assert (out / "curves.png").exists()


def test_benchmark_of_per_token_networks_prints_a_ratio():
    sizes = ["--tokens", "4", "--width", "16", "--hidden", "8", "--repeats", "3", "--threads", "1"]
    assert "ratio" in run("benchmarks/per_token_networks.py", *sizes)
