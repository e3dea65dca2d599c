"""Residual Prompt Tuning (Razdaibiedina et al., Findings of ACL 2023, arXiv:2305.03937) for Hugging Face PEFT.

Importing the package registers [`ResidualPromptTuningConfig`] with PEFT; `peft.get_peft_model` and all that follows
work from there.
"""

from .compat import check_peft


check_peft()

from .config import ResidualPromptTuningConfig  # noqa: E402
from .encoder import ResidualPromptEncoder  # noqa: E402
from .export import (  # noqa: E402
    convert_to_prompt_tuning,
    get_prompt_tensor,
    save_as_prompt_tuning,
    save_prompt_tensor,
)
from .initialization import most_common_token_ids, register_initialization  # noqa: E402
from .inspection import inspect_prompt, nearest_tokens  # noqa: E402
from .optimization import ResidualOptimizerFactory, create_residual_optimizer, disable_base_dropout  # noqa: E402
from .plotting import plot_map, plot_norms, plot_prompt, plot_similarity  # noqa: E402
from .prefix_tuning import save_as_prefix_tuning  # noqa: E402
from .registration import register  # noqa: E402
from .reparameterization import register_reparameterization  # noqa: E402
from .serving import embed_with_prompt, sglang_request, vllm_request  # noqa: E402
from .training_setup import TrainingSetupCallback, check_training_setup  # noqa: E402
from .validation import check_adapter  # noqa: E402
from .vocabulary import VocabularyExport, save_as_vocabulary  # noqa: E402


__version__ = "0.1.0"

__all__ = [
    "ResidualOptimizerFactory",
    "ResidualPromptEncoder",
    "ResidualPromptTuningConfig",
    "TrainingSetupCallback",
    "VocabularyExport",
    "check_adapter",
    "check_training_setup",
    "convert_to_prompt_tuning",
    "create_residual_optimizer",
    "disable_base_dropout",
    "embed_with_prompt",
    "get_prompt_tensor",
    "inspect_prompt",
    "most_common_token_ids",
    "nearest_tokens",
    "plot_map",
    "plot_norms",
    "plot_prompt",
    "plot_similarity",
    "register_initialization",
    "register_reparameterization",
    "save_as_prefix_tuning",
    "save_as_prompt_tuning",
    "save_as_vocabulary",
    "save_prompt_tensor",
    "sglang_request",
    "vllm_request",
]

register()
