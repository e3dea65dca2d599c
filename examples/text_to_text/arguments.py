"""The command line arguments of `train.py`, and all checks that need no data."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from embedded.tasks import MODEL
from text_to_text.interruption import is_complete


FORM = ("encoder_reparameterization_type", "encoder_hidden_size", "encoder_shared")
FORM += ("encoder_norm_first", "encoder_zero_init")
NETWORK = (*FORM, "encoder_learning_rate")
UNUSED = {"prompt_tuning": NETWORK, "fine_tuning": ("num_virtual_tokens", *NETWORK)}


def about(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class Arguments:
    """What to train, how, and on which data."""

    task: str = field(
        default="embedded/sentiment", metadata=about("Family and name, such as glue/sst2. An unknown name lists all.")
    )
    method: Literal["residual", "prompt_tuning", "fine_tuning"] = field(
        default="residual", metadata=about("What to train.")
    )
    model: str = field(default=str(MODEL), metadata=about("Encoder-decoder model: a folder or a Hub id."))
    data_dir: Path | None = field(
        default=None, metadata=about("Folder with a .parquet or .json file per split, used instead of the Hub.")
    )
    k_per_class: int | None = field(default=None, metadata=about("Few-shot: training rows per class."))
    max_train_samples: int | None = field(default=None, metadata=about("Maximum number of training rows."))
    max_eval_samples: int | None = field(
        default=None, metadata=about("Maximum number of validation rows, and of test rows.")
    )
    max_source_length: int = field(
        default=512, metadata=about("Maximum number of encoder tokens, including the prompt.")
    )
    num_virtual_tokens: int = field(default=10, metadata=about("Prompt length."))
    encoder_reparameterization_type: str = field(default="MLP1", metadata=about("Network of the residual prompt."))
    encoder_hidden_size: int = field(default=800, metadata=about("Width of the network's hidden layer."))
    encoder_shared: bool = field(default=True, metadata=about("One network for all virtual tokens, or one for each."))
    encoder_norm_first: bool = field(default=False, metadata=about("Whether the network begins with its LayerNorm."))
    encoder_zero_init: bool = field(
        default=False, metadata=about("Whether the network's last weights are initialized to zero.")
    )
    learning_rate: float | None = field(
        default=None, metadata=about("Default: 0.3 for prompts, 3e-4 for full fine-tuning.")
    )
    encoder_learning_rate: float | None = field(
        default=None, metadata=about("Learning rate of the network. Default: that of the prompt.")
    )
    weight_decay: float = field(default=1e-5, metadata=about("Weight decay."))
    num_epochs: int = field(default=20, metadata=about("Maximum number of epochs."))
    patience: int = field(default=5, metadata=about("Training stops after this many epochs without a better score."))
    metric: str | None = field(
        default=None, metadata=about("Metric that selects the best epoch. Default: the task's first one.")
    )
    batch_size: int = field(default=8, metadata=about("Rows per training step."))
    eval_batch_size: int = field(default=100, metadata=about("Rows per evaluation step."))
    bf16: bool = field(default=False, metadata=about("Train in bfloat16 mixed precision."))
    seed: int = field(default=0, metadata=about("Seed of the training rows, their order, the prompt and the network."))
    output_dir: Path | None = field(default=None, metadata=about("Default: build/text_to_text/TASK/METHOD."))
    overwrite: bool = field(default=False, metadata=about("Replace the output folder."))
    resume_from_checkpoint: Path | None = field(default=None, metadata=about("Checkpoint folder to resume from."))
    smoke: bool = field(default=False, metadata=about("A few rows and epochs, to see that everything runs."))

    def __post_init__(self):
        if self.learning_rate is None:
            self.learning_rate = 3e-4 if self.method == "fine_tuning" else 0.3
        if self.smoke:
            self.max_train_samples, self.max_eval_samples, self.num_epochs = 32, 16, 2
        self.output_dir = self.output_dir or Path("build/text_to_text") / self.task / self.method
        positive = "learning_rate", "k_per_class", "max_train_samples", "max_eval_samples", "num_epochs", "patience"
        for name in (*positive, "batch_size", "eval_batch_size", "num_virtual_tokens", "encoder_learning_rate"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:  # also true for NaN
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)}.")
        defaults = {option.name: option.default for option in fields(self)}
        for name in UNUSED.get(self.method, ()):
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"`{name}` has no effect with `method` {self.method}. Leave it out.")
        if self.max_source_length < self.num_virtual_tokens + 2:
            raise ValueError(
                f"`max_source_length` {self.max_source_length} leaves no room for text beside "
                f"{self.num_virtual_tokens} virtual tokens."
            )
        if self.resume_from_checkpoint and not is_complete(self.resume_from_checkpoint):
            raise ValueError(
                f"`resume_from_checkpoint` {self.resume_from_checkpoint} is not a complete checkpoint: it has "
                "no trainer_state.json. Pass a folder such as OUTPUT_DIR/checkpoint-100."
            )
