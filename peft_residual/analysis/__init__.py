"""What a trained prompt has learned: a report in numbers, and plots of it."""

from .plots import plot_map, plot_norms, plot_prompt, plot_similarity
from .report import NearestTokens, PromptReport, inspect_prompt, nearest_tokens


__all__ = [
    "NearestTokens",
    "PromptReport",
    "inspect_prompt",
    "nearest_tokens",
    "plot_map",
    "plot_norms",
    "plot_prompt",
    "plot_similarity",
]
