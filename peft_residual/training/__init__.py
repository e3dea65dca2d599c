"""Training a soft prompt: the optimizer, the base model's dropout, and checks of the setup before the first step."""

from .checks import Finding, TrainingSetupCallback, check_training_setup
from .dropout import BaseDropoutOff, disable_base_dropout
from .optimizer import ResidualOptimizerFactory, create_residual_optimizer


__all__ = [
    "BaseDropoutOff",
    "Finding",
    "ResidualOptimizerFactory",
    "TrainingSetupCallback",
    "check_training_setup",
    "create_residual_optimizer",
    "disable_base_dropout",
]
