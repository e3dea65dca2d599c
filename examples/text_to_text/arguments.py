"""What `train.py` can be told, and every check that needs no data."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from embedded.tasks import MODEL
from text_to_text.interruption import is_whole


FORM = ("encoder_reparameterization_type", "encoder_hidden_size", "encoder_shared")
FORM += ("encoder_norm_first", "encoder_zero_init")
NETWORK = (*FORM, "encoder_learning_rate")
UNUSED = {"prompt_tuning": NETWORK, "fine_tuning": ("num_virtual_tokens", *NETWORK)}


def about(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class Arguments:
    """What to train, how, on what."""

    task: str = field(
        default="embedded/sentiment", metadata=about("Family and name, such as glue/sst2; a wrong one lists all.")
    )
    method: Literal["residual", "prompt_tuning", "fine_tuning"] = field(
        default="residual", metadata=about("What is trained.")
    )
    model: str = field(default=str(MODEL), metadata=about("Encoder-decoder model: a folder or a Hub id."))
    data_dir: Path | None = field(
        default=None, metadata=about("Folder with a .parquet or .json file per split, instead of the Hub.")
    )
    k_per_class: int | None = field(default=None, metadata=about("Few-shot: training rows per class."))
    max_train_samples: int | None = field(default=None, metadata=about("Training rows at most."))
    max_eval_samples: int | None = field(default=None, metadata=about("Rows of validation, and of test, at most."))
    max_source_length: int = field(
        default=512, metadata=about("Tokens that the encoder reads, the prompt's included.")
    )
    num_virtual_tokens: int = field(default=10, metadata=about("Prompt length."))
    encoder_reparameterization_type: str = field(default="MLP1", metadata=about("The residual prompt's network."))
    encoder_hidden_size: int = field(default=800, metadata=about("Width of its hidden layer."))
    encoder_shared: bool = field(default=True, metadata=about("One network for all tokens, or one for each."))
    encoder_norm_first: bool = field(default=False, metadata=about("Whether its LayerNorm is at its beginning."))
    encoder_zero_init: bool = field(default=False, metadata=about("Whether its last weights start at zero."))
    learning_rate: float | None = field(
        default=None, metadata=about("0.3 for prompts, 3e-4 for full fine-tuning, if not given.")
    )
    encoder_learning_rate: float | None = field(default=None, metadata=about("Of the network, if not the prompt's."))
    weight_decay: float = field(default=1e-5, metadata=about("Weight decay."))
    num_epochs: int = field(default=20, metadata=about("Epochs at most."))
    patience: int = field(default=5, metadata=about("Epochs without a better score before training stops."))
    metric: str | None = field(
        default=None, metadata=about("The task's metric that selects; its first one, if not given.")
    )
    batch_size: int = field(default=8, metadata=about("Rows per step."))
    eval_batch_size: int = field(default=100, metadata=about("Rows at a time in evaluation."))
    bf16: bool = field(default=False, metadata=about("Mixed precision."))
    seed: int = field(default=0, metadata=about("Seed of training rows, their order, prompt and network."))
    output_dir: Path | None = field(default=None, metadata=about("build/text_to_text/TASK/METHOD, if not given."))
    overwrite: bool = field(default=False, metadata=about("Replace the output folder."))
    resume_from_checkpoint: Path | None = field(default=None, metadata=about("Checkpoint folder to go on from."))
    smoke: bool = field(default=False, metadata=about("A few rows and epochs, to see that everything runs."))

    def __post_init__(self):
        if self.learning_rate is None:
            self.learning_rate = 3e-4 if self.method == "fine_tuning" else 0.3
        if self.smoke:
            self.max_train_samples, self.max_eval_samples, self.num_epochs = 32, 16, 2
        self.output_dir = self.output_dir or Path("build/text_to_text") / self.task / self.method
        positive = "learning_rate", "k_per_class", "max_train_samples", "max_eval_samples", "num_epochs", "patience"
        for name in (*positive, "batch_size", "eval_batch_size", "num_virtual_tokens", "encoder_learning_rate"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:  # NaN is refused too
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
        if self.resume_from_checkpoint and not is_whole(self.resume_from_checkpoint):
            raise ValueError(
                f"`resume_from_checkpoint` {self.resume_from_checkpoint} is no whole checkpoint: it has no "
                "trainer_state.json. Give a folder such as OUTPUT_DIR/checkpoint-100."
            )
