"""Residual Prompt Tuning (Razdaibiedina et al., Findings of ACL 2023, arXiv:2305.03937) for Hugging Face PEFT.

Importing the package registers [`ResidualPromptTuningConfig`] with PEFT; `peft.get_peft_model` and everything after it
then work as for PEFT's own methods. What is not exported here is reached through its folder, for example
`peft_residual.export.vllm_request`.
"""

from .compat import check_peft, warn_of_stock_generation, warn_of_untested_hosts


check_peft()

from .analysis import inspect_prompt  # noqa: E402
from .config import ResidualPromptTuningConfig  # noqa: E402
from .encoder import ResidualPromptEncoder  # noqa: E402
from .export import (  # noqa: E402
    convert_to_prompt_tuning,
    get_prompt_tensor,
    save_as_prefix_tuning,
    save_as_prompt_tuning,
    save_as_vocabulary,
)
from .initialization import register_initialization  # noqa: E402
from .networks import register_reparameterization  # noqa: E402
from .peft_model.register import register  # noqa: E402
from .training import (  # noqa: E402
    ResidualOptimizerFactory,
    TrainingSetupCallback,
    check_training_setup,
    create_residual_optimizer,
    disable_base_dropout,
)


__version__ = "0.1.0"

__all__ = [
    "ResidualOptimizerFactory",
    "ResidualPromptEncoder",
    "ResidualPromptTuningConfig",
    "TrainingSetupCallback",
    "check_training_setup",
    "convert_to_prompt_tuning",
    "create_residual_optimizer",
    "disable_base_dropout",
    "get_prompt_tensor",
    "inspect_prompt",
    "register_initialization",
    "register_reparameterization",
    "save_as_prefix_tuning",
    "save_as_prompt_tuning",
    "save_as_vocabulary",
]

register()
warn_of_untested_hosts()
warn_of_stock_generation()
