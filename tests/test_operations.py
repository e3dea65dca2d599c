"""The count of operations: three small models tell what a larger one needs; the page has every method."""

import json
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples/benchmarks"))

import operations  # noqa: E402
from operations import Batch, Model, count, measure  # noqa: E402


BATCH = Batch(tokens=6, rows=3, length=5)


def small_llama(layers, vocabulary):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    return operations.llama(layers, vocabulary, **sizes)


@pytest.mark.parametrize("method", operations.METHODS)
def test_three_small_models_tell_what_a_larger_one_needs(method):
    extrapolated = measure(method, Model(small_llama, layers=4, vocabulary=500), BATCH, vocabulary=120)
    counted = count(method, small_llama(4, 500), "CAUSAL_LM", BATCH)
    assert extrapolated.operations == counted.operations
    assert extrapolated.kept == pytest.approx(counted.kept, rel=0.01)


def test_operations_are_those_of_the_matrix_products():
    """Two products of `P x H x M` forward, four backward, of 2 operations each."""
    base, batch = small_llama(1, 120), Batch(tokens=6, rows=1, length=5)
    plain, residual = (count(method, base, "CAUSAL_LM", batch) for method in ("prompt tuning", "residual, not shared"))
    assert residual.operations - plain.operations == 12 * 6 * 32 * 800


def test_the_page_has_a_row_for_every_method(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["operations.py", "--smoke", "--output", str(tmp_path)])
    operations.main()
    page = (tmp_path / "operations.md").read_text()
    assert all(f"| {method} |" in page for method in operations.METHODS)
    assert page.strip() in capsys.readouterr().out
    (record,) = json.loads((tmp_path / "operations.json").read_text())
    assert set(record["figures"]) == set(operations.METHODS)
    assert (tmp_path / "operations.png").stat().st_size > 5000
