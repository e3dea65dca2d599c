"""Exports of a trained prompt, in formats that load without this package."""

from .prefix_tuning import save_as_prefix_tuning
from .prompt_tuning import convert_to_prompt_tuning, get_prompt_tensor, save_as_prompt_tuning, save_prompt_tensor
from .serving import embed_with_prompt, sglang_request, vllm_request
from .vocabulary import VocabularyExport, save_as_vocabulary


__all__ = [
    "VocabularyExport",
    "convert_to_prompt_tuning",
    "embed_with_prompt",
    "get_prompt_tensor",
    "save_as_prefix_tuning",
    "save_as_prompt_tuning",
    "save_as_vocabulary",
    "save_prompt_tensor",
    "sglang_request",
    "vllm_request",
]
