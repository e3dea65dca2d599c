"""What a trained prompt has learned: a report in numbers, and plots of it."""

from .callback import PromptReportCallback
from .nearest import NearestTokens, nearest_tokens
from .plots import plot_map, plot_norms, plot_prompt, plot_similarity
from .report import PromptReport, inspect_prompt


__all__ = [
    "NearestTokens",
    "PromptReport",
    "PromptReportCallback",
    "inspect_prompt",
    "nearest_tokens",
    "plot_map",
    "plot_norms",
    "plot_prompt",
    "plot_similarity",
]
