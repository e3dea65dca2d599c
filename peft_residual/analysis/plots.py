"""Plots of a prompt: the similarity of its tokens, their place among words, their norms.

Needs matplotlib (`pip install "peft-residual[plots]"`), which is imported when a plot is made.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .report import PromptReport


if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PROMPT, _EMBEDDING, _WORDS = "tab:red", "tab:blue", "0.45"


def plot_similarity(report: PromptReport, axes: Any = None) -> Figure:
    """Plot a heat map of the cosine similarities between the projected tokens.

    Args:
        report ([`PromptReport`]): What [`inspect_prompt`] returned.
        axes (`matplotlib.axes.Axes`, *optional*): Where to draw; a new figure when None.

    Returns:
        `matplotlib.figure.Figure`: The figure; `figure.savefig(path)` saves it.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    axes = _axes(axes)
    image = axes.imshow(report.similarity.numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
    axes.figure.colorbar(image, ax=axes, label="cosine similarity", fraction=0.046, pad=0.04)
    axes.set(title="Similarity of the virtual tokens", xlabel="virtual token", ylabel="virtual token")
    _number(axes.xaxis, len(report.similarity))
    _number(axes.yaxis, len(report.similarity))
    return axes.figure


def plot_map(report: PromptReport, axes: Any = None) -> Figure:
    """Plot the virtual tokens and the words nearest to them in two dimensions, with the nearest word of each token.

    Vectors are normalized and shown along their first two principal components; the axes' labels give each component's
    share of the variance. The prompt embedding, if there is one, is connected to the projected prompt by lines.

    Args:
        report ([`PromptReport`]): What [`inspect_prompt`] returned for a model, not for a folder.
        axes (`matplotlib.axes.Axes`, *optional*): Where to draw; a new figure when None.

    Returns:
        `matplotlib.figure.Figure`: The figure; `figure.savefig(path)` saves it.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the report has no nearest words.
    """
    if not report.nearest:
        raise ValueError(
            f"The report on {report.name!r} has no nearest tokens to plot. Inspect a model, not a folder "
            "(command line: use `--base`)."
        )
    axes = _axes(axes)
    prompts = [prompt for prompt in (report.projected, report.embedding) if prompt is not None]
    nearest = report.nearest["projected"]["cosine"]
    places, shares = _principal(torch.cat([*prompts, nearest.rows.flatten(0, 1)]))
    count = len(report.projected)
    projected, embedding, words = places[:count], places[count : -nearest.ids.numel()], places[-nearest.ids.numel() :]
    axes.scatter(*words.T, s=12, color=_WORDS, label="nearest words")
    first_words = words.unflatten(0, nearest.ids.shape)[:, 0].tolist()
    for word, place in {tokens[0]: place for tokens, place in zip(nearest.tokens, first_words)}.items():
        axes.annotate(_plain(word), place, xytext=(3, 3), textcoords="offset points", fontsize=8, color=_WORDS)
    for start, end in zip(embedding.tolist(), projected.tolist()):
        axes.plot(*zip(start, end), color=_EMBEDDING, linewidth=0.6, alpha=0.5, zorder=0)
    if len(embedding):
        axes.scatter(*embedding.T, s=36, facecolors="none", edgecolors=_EMBEDDING, label="prompt embedding")
    axes.scatter(*projected.T, s=36, color=_PROMPT, label="projected prompt")
    for index, place in enumerate(projected.tolist()):
        axes.annotate(str(index), place, xytext=(5, -9), textcoords="offset points", fontsize=9, color=_PROMPT)
    axes.set(
        title="Virtual tokens among words (directions)",
        xlabel=f"first component ({shares[0]:.0%})",
        ylabel=f"second component ({shares[1]:.0%})",
    )
    axes.margins(0.12)
    axes.legend(fontsize=8, loc="best")
    return axes.figure


def plot_norms(report: PromptReport, axes: Any = None) -> Figure:
    """Plot the norm of each virtual token as a bar, and the range of the words' norms as a band.

    Args:
        report ([`PromptReport`]): What [`inspect_prompt`] returned.
        axes (`matplotlib.axes.Axes`, *optional*): Where to draw; a new figure when None.

    Returns:
        `matplotlib.figure.Figure`: The figure; `figure.savefig(path)` saves it.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    axes = _axes(axes)
    bars = [("projected prompt", report.norms, _PROMPT)]
    if report.embedding_norms is not None:
        bars.insert(0, ("prompt embedding", report.embedding_norms, _EMBEDDING))
    width = 0.8 / len(bars)
    for index, (label, norms, color) in enumerate(bars):
        places = torch.arange(len(norms)) + (index + 0.5) * width - 0.4
        axes.bar(places, norms, width, color=color, label=label, zorder=2)
    quantiles = report.vocabulary_norm_quantiles
    if quantiles is not None:
        low, middle, high = (quantiles[share] for share in ("0.05", "0.5", "0.95"))
        axes.axhspan(low, high, color=_WORDS, alpha=0.2, linewidth=0, label="words, 5 to 95 %")
        axes.axhline(middle, color=_WORDS, linewidth=1, label="words, median")
    axes.set(title="Norms of the virtual tokens", xlabel="virtual token", ylabel="Euclidean norm")
    axes.margins(x=0.02, y=0.25)  # room for the legend
    _number(axes.xaxis, len(report.norms))
    axes.legend(fontsize=8, loc="upper right", ncols=2)
    return axes.figure


def plot_prompt(report: PromptReport, path: str | os.PathLike[str] | None = None) -> Figure:
    """Plot everything in one figure: similarity, norms and, for a report on a model, the map.

    Args:
        report ([`PromptReport`]): What [`inspect_prompt`] returned.
        path (`str` or `os.PathLike`, *optional*): Where to save it; the suffix is the format.

    Returns:
        `matplotlib.figure.Figure`: The figure.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If matplotlib does not know the format.
    """
    plots = [plot_similarity, plot_norms, *([plot_map] if report.nearest else [])]
    figure = _figure(5.6 * len(plots), 4.8)
    for plot, axes in zip(plots, figure.subplots(1, len(plots))):
        plot(report, axes)
    figure.suptitle(f"{report.name}: {len(report.projected)} virtual tokens of width {report.projected.shape[1]}")
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Plots need matplotlib: pip install "peft-residual[plots]"') from error
    return Figure(figsize=(width, height), layout="constrained")  # not pyplot's: no window, no global state


def _axes(axes: Any) -> Any:
    return _figure(6.4, 4.8).subplots() if axes is None else axes


def _principal(vectors: Tensor) -> tuple[Tensor, list[float]]:
    """The first two principal components `[N, 2]` of normalized vectors `[N, H]`, and their shares of the variance."""
    directions = nn.functional.normalize(vectors, dim=1)
    centred = directions - directions.mean(dim=0)
    left, lengths, _ = torch.linalg.svd(centred, full_matrices=False)
    shares = lengths.square() / lengths.square().sum()
    return left[:, :2] * lengths[:2], shares[:2].tolist()


def _number(axis: Any, count: int) -> None:
    """Label every virtual token on an axis if there is room, else some."""
    if count <= 20:
        axis.set_ticks(range(count))
    else:
        axis.get_major_locator().set_params(integer=True)


def _plain(word: str) -> str:
    """Without the marker of a word's start. A dollar sign would begin a formula."""
    return (word.lstrip("▁Ġ") or word).replace("$", r"\$")
