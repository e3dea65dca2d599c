"""Training a soft prompt: the optimizer, the base model's dropout, checks of the setup before the first step, and
distillation."""

from .checks import Finding, TrainingSetupCallback, check_training_setup
from .distillation import distillation_loss
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
    "distillation_loss",
]
