"""The pictures show the report's numbers, and need matplotlib only when they are made."""

import builtins

import numpy
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from scenarios import SCENARIOS

from peft_residual import convert_to_prompt_tuning, inspect_prompt
from peft_residual.analysis import plot_map, plot_norms, plot_prompt, plot_similarity


@pytest.fixture(scope="module")
def report(tokenizer):
    torch.manual_seed(0)
    return inspect_prompt(SCENARIOS["t5"].model(), tokenizer, k=3)


@pytest.fixture(scope="module")
def plain_report(tokenizer):
    model = SCENARIOS["t5"].model()
    convert_to_prompt_tuning(model)
    return inspect_prompt(model, tokenizer, k=3)


def test_the_heat_map_shows_the_similarities_from_minus_one_to_one(report):
    figure = plot_similarity(report)
    axes, bar = figure.axes
    (image,) = axes.images
    numpy.testing.assert_array_equal(image.get_array(), report.similarity.numpy())
    assert image.get_clim() == (-1, 1) and bar.get_ylabel() == "cosine similarity"
    assert list(axes.get_xticks()) == [0, 1, 2, 3]


def test_the_bars_are_the_norms(report):
    (axes,) = plot_norms(report).axes
    raw, projected = axes.containers
    assert [bar.get_height() for bar in raw] == pytest.approx(report.embedding_norms.tolist())
    assert [bar.get_height() for bar in projected] == pytest.approx(report.norms.tolist())
    middles = [bar.get_x() + bar.get_width() / 2 for bar in projected]
    assert middles == pytest.approx([place + 0.2 for place in range(4)])
    labels = {text.get_text() for text in axes.get_legend().get_texts()}
    assert labels == {"prompt embedding", "projected prompt", "words, 5 to 95 %", "words, median"}


def test_the_map_keeps_the_distances_that_two_dimensions_can_show(report):
    (axes,) = plot_map(report).axes
    words, raw, projected = (collection.get_offsets() for collection in axes.collections)
    assert (len(words), len(raw), len(projected)) == (12, 4, 4)
    units = [torch.nn.functional.normalize(p, dim=1) for p in (report.projected, report.embedding)]
    flat = numpy.linalg.norm(numpy.asarray(raw) - numpy.asarray(projected), axis=1)
    assert (flat <= (units[0] - units[1]).norm(dim=1).numpy() + 1e-5).all()
    shares = [float(axis.get_label_text().split("(")[1].rstrip("%)")) for axis in (axes.xaxis, axes.yaxis)]
    assert 100 >= shares[0] >= shares[1] > 0
    named = {text.get_text() for text in axes.texts}
    assert named == {tokens[0] for tokens in report.nearest["projected"]["cosine"].tokens} | set("0123")


def test_pictures_of_a_plain_prompt_show_one_prompt(plain_report):
    assert len(plot_norms(plain_report).axes[0].containers) == 1
    assert len(plot_map(plain_report).axes[0].collections) == 2


def test_a_folders_report_has_all_pictures_but_the_map(tmp_path):
    SCENARIOS["t5"].model().save_pretrained(tmp_path)
    report = inspect_prompt(tmp_path)
    titles = [axes.get_title() for axes in plot_prompt(report).axes if axes.get_title()]
    assert titles == ["Similarity of the virtual tokens", "Norms of the virtual tokens"]
    with pytest.raises(ValueError, match=r"no nearest tokens.*--base"):
        plot_map(report)


def test_all_pictures_are_saved_in_one_file_of_the_format_of_its_name(report, tmp_path):
    figure = plot_prompt(report, tmp_path / "prompt.png")
    assert isinstance(figure, Figure) and len(figure.axes) == 4
    pixels = imread(tmp_path / "prompt.png")
    assert pixels.shape[0] > 500 and pixels.std() > 0.05
    plot_prompt(report, tmp_path / "prompt.svg")
    assert "<svg" in (tmp_path / "prompt.svg").read_text()
    with pytest.raises(ValueError, match="foo"):
        plot_prompt(report, tmp_path / "prompt.foo")


def test_a_picture_is_drawn_where_it_is_told(report):
    axes = Figure().subplots()
    assert plot_norms(report, axes) is axes.figure and axes.containers


def test_dollar_signs_in_words_are_not_formulas(report, tmp_path):
    for tokens in report.nearest["projected"]["cosine"].tokens:
        tokens[0] = "$\\nonsense$"
    plot_prompt(report, tmp_path / "prompt.png")


def test_many_tokens_are_not_all_numbered():
    report = inspect_prompt(SCENARIOS["t5"].model(num_virtual_tokens=50))
    figure = plot_norms(report)
    figure.canvas.draw()
    assert 1 < len(figure.axes[0].get_xticks()) < 20


def test_without_matplotlib_the_error_says_what_to_install(report, monkeypatch):
    real = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ImportError, match=r'pip install "peft-residual\[plots\]"'):
        plot_similarity(report)
