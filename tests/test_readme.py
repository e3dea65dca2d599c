"""The README is true: its code runs, its links lead somewhere, its defaults are the config's."""

import re
from pathlib import Path

import pytest

from peft_residual import ResidualPromptTuningConfig


ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
MODEL = ROOT / "examples" / "embedded" / "model"


def test_code_runs_as_it_stands_on_the_embedded_model(own_names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 4
    namespace = {}
    for block in blocks:
        exec(block.replace("google/t5-v1_1-base", str(MODEL)), namespace)
    assert (tmp_path / "merged" / "adapter_model.safetensors").exists()
    assert namespace["prompt"].shape == (10, 128)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_within_the_repository_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target


def test_defaults_in_the_table_are_those_of_the_config():
    config = ResidualPromptTuningConfig(task_type="SEQ_2_SEQ_LM")
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ([^|]+) \|", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert len(rows) >= 8
    for names, values in rows:
        names = re.findall(r"`(\w+)`", names)
        values = [value.strip("` ") for value in values.split(",")]
        for name, value in zip(names, values * len(names) if len(values) == 1 else values):
            assert repr(getattr(config, name)) == value.replace('"', "'"), name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_make_targets_that_are_named_exist(document):
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for target in re.findall(r"(?:^|`)make ([a-z]+)", document.read_text(), flags=re.MULTILINE):
        assert target in targets
