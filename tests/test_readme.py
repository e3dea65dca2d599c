"""The README: its code runs, its links and commands exist, and it has at most 170 lines."""

import re
import runpy
from pathlib import Path

import pytest
import setuptools
from conftest import tiny_llama
from safetensors.torch import load_file
from transformers import AutoTokenizer

import peft_residual


ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
T5 = ROOT / "examples" / "embedded" / "model"


def test_code_runs_as_it_stands_with_local_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(T5)
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained("llama")
    tokenizer.save_pretrained("llama")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    for block, folder in zip(blocks, ("llama", str(T5))):
        code, replaced = re.subn(r'^name = ".*"$', f"name = {folder!r}", block, flags=re.MULTILINE)
        assert replaced == 1
        exec(code, {})
    for folder, width in (("merged", 16), ("t5-merged", 128)):
        prompt = load_file(f"{folder}/adapter_model.safetensors")
        assert {name: tuple(tensor.shape) for name, tensor in prompt.items()} == {"prompt_embeddings": (10, width)}


def test_it_is_short_enough_to_be_read():
    assert len(README.read_text().splitlines()) <= 170


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_within_the_repository_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_make_targets_that_are_named_exist(document):
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for target in re.findall(r"(?:^|`)make ([a-z]+)", document.read_text(), flags=re.MULTILINE):
        assert target in targets


def test_pypi_shows_the_readme_with_links_that_lead_to_the_projects_home(monkeypatch):
    found = {}
    monkeypatch.setattr(setuptools, "setup", found.update)
    runpy.run_path(str(ROOT / "setup.py"))
    targets = re.findall(r"\]\(([^)]+)\)", found["long_description"])
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []
    home = re.search(r'^Homepage = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    ours = [re.split("/(?:blob|raw)/main/", target)[1] for target in targets if target.startswith(f"{home}/")]
    assert len(ours) > 10 and all((ROOT / target.partition("#")[0]).exists() for target in ours)
    assert f"]({home}/raw/main/docs/learning-rates.png)" in found["long_description"]


def test_files_that_name_the_projects_home_or_version_name_the_same():
    home = re.search(r'^Homepage = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"repository-code: {home}\n" in citation and f"\nversion: {peft_residual.__version__}\n" in citation
    for path in (ROOT / "SECURITY.md", *(ROOT / ".github" / "ISSUE_TEMPLATE").iterdir()):
        for found in re.findall(r"https://github\.com/peft-residual/[\w-]+", path.read_text()):
            assert found == home, path


def test_the_workflow_runs_the_sessions_and_targets_that_there_are():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    sessions = re.findall(r"^@nox\.session\n(?:@.*\n)*def (\w+)", (ROOT / "noxfile.py").read_text(), re.MULTILINE)
    assert re.search(r"session: \[(.+)\]", workflow)[1].split(", ") == sessions
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {"quality", "test", "build"} <= set(re.findall(r"run: make (\w+)", workflow)) <= set(targets)
