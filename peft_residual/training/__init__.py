"""Training a soft prompt well: the optimizer, the base model's dropout, and checks before the first step."""

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
