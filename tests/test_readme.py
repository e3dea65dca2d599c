"""The README: its code runs, its links and commands exist, and it has at most 170 lines."""

import re
from pathlib import Path

import pytest
from conftest import tiny_llama
from safetensors.torch import load_file
from transformers import AutoTokenizer


ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
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
