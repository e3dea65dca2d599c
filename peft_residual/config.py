"""`ResidualPromptTuningConfig`: the settings of residual prompt tuning. `config_checks.py` checks their values."""

from __future__ import annotations

import re
import warnings
from dataclasses import InitVar, dataclass, fields
from enum import Enum
from types import MappingProxyType
from typing import Any, Optional

from peft import PeftType, PromptTuningConfig, TaskType
from peft.config import PromptLearningConfig

from .config_checks import check_fields, unused_fields
from .registry import REPARAMETERIZATIONS


class ResidualPeftType(str, Enum):
    """The `peft_type` of residual adapters. PEFT's own enum cannot be extended; its mappings take any string."""

    RESIDUAL_PROMPT_TUNING = "RESIDUAL_PROMPT_TUNING"


PEFT_TYPE = ResidualPeftType.RESIDUAL_PROMPT_TUNING


@dataclass
class ResidualPromptTuningConfig(PromptTuningConfig):
    """Configuration of a [`ResidualPromptEncoder`]: prompt tuning through a network with a skip connection.

    Residual Prompt Tuning (Razdaibiedina et al., Findings of ACL 2023, arXiv:2305.03937), section 3: the frozen
    model sees `E' = E + φ(E)`, where `E` is the prompt embedding `[P, H]`, `φ` a small network, `P` is
    `num_virtual_tokens` and `H` is `token_dim`. The defaults are the paper's. All fields of
    [`~peft.PromptTuningConfig`] are available.

    A field that another setting makes unused causes a warning, so that sweeps over network types can keep the other
    fields as they are.

    Args:
        num_virtual_tokens (`int`, *optional*): Prompt length `P`. With `prompt_tuning_init="TEXT"`, None takes the
            length of the text.
        num_transformer_submodules (`int`, *optional*): 1 when None: the prompt is prepended to the encoder's input
            only, the decoder gets none. 2 keeps rows for a decoder, as PEFT does.
        encoder_reparameterization_type (`str`): The network `φ`: `"MLP1"`, `"MLP2"`, `"LSTM1"`, `"LSTM2"`, `"LSTM"`,
            `"TRANSFORMER"`, `"SUPERPOS"` (each token is a trained weighted sum of frozen rows of the vocabulary),
            `"NONE"` (plain prompt tuning), or a name added by [`register_reparameterization`].
        encoder_hidden_size (`int`): Width of the network's hidden layer (the bottleneck `M`). For `"SUPERPOS"`, the
            number of rows that it mixes: 128 in its paper.
        encoder_shared (`bool`): One network for all virtual tokens, or one per token (MLP1 and MLP2).
        encoder_residual (`bool`): Whether to add the prompt embedding to the network's output (the skip connection).
        encoder_layer_norm (`bool`): Whether the network has a LayerNorm: at its end, before the skip is added.
        encoder_norm_first (`bool`): Whether that LayerNorm comes first in the network (MLP1 and MLP2). The network's
            output can then have any scale. Not in the paper.
        encoder_zero_init (`bool`): Whether the network's last weights are initialized with zeros (MLP1 and MLP2), so
            that training starts at `E' = E`. Not in the paper.
        encoder_scale (`float`, *optional*): The unit `s` of prompt and network: `E' = s·(e + φ(e))`, trained as `e`.
            None measures the root mean square of the base model's word embeddings when the model is built, and records
            it here: `e` then has values around 1 with every base model, so that settings carry over. 1.0 is the paper.
        encoder_activation (`str`): A name of transformers' activation table, such as `"relu"` or `"tanh"`.
        encoder_dropout (`float`): Dropout probability inside the network, in `[0, 1)`.
        encoder_num_attention_heads (`int`): Attention heads of `"TRANSFORMER"`; must divide `H`.
        prompt_tuning_init (`str`): How the prompt embedding is initialized: `"COMMON_VOCAB"`, `"SAMPLE_VOCAB"`,
            `"RANDOM"`, `"TEXT"`, `"CLASS_LABELS"`, `"PROMPT"`, or a name added by [`register_initialization`].
        prompt_tuning_init_vocab_size (`int`): `"COMMON_VOCAB"` samples from this number of the most common rows.
        prompt_tuning_init_token_ids (`list[int]`, *optional*): Token ids, the most common first, for a tokenizer
            whose ids are not ordered by frequency. [`most_common_token_ids`] counts them in texts.
        prompt_tuning_init_class_labels (`list[str]`, *optional*): The label words of `"CLASS_LABELS"`.
        prompt_tuning_init_state_dict_path (`str`, *optional*): The prompt that `"PROMPT"` starts from: a saved
            adapter's folder, or a prompt tensor in a `.safetensors` or `.npy` file.
        prompt_tuning_init_seed (`int`, *optional*): Seed of the initialization of prompt and network. When None,
            torch's seed. The global random state is never advanced.
        init_vocab_size (`int`, *optional*): The former name of `prompt_tuning_init_vocab_size`.

    Raises:
        ValueError: If a field has a value that cannot be right.
    """

    num_virtual_tokens: int = 10
    num_transformer_submodules: Optional[int] = None
    encoder_reparameterization_type: str = "MLP1"
    encoder_hidden_size: int = 800
    encoder_shared: bool = True
    encoder_residual: bool = True
    encoder_layer_norm: bool = True
    encoder_norm_first: bool = False
    encoder_zero_init: bool = False
    encoder_scale: Optional[float] = 1.0
    encoder_activation: str = "relu"
    encoder_dropout: float = 0.0
    encoder_num_attention_heads: int = 8
    prompt_tuning_init: str = "COMMON_VOCAB"  # not PEFT's enum: `HfArgumentParser` would allow its members only
    prompt_tuning_init_vocab_size: int = 5000
    prompt_tuning_init_token_ids: Optional[list[int]] = None
    prompt_tuning_init_class_labels: Optional[list[str]] = None
    prompt_tuning_init_state_dict_path: Optional[str] = None
    prompt_tuning_init_seed: Optional[int] = None
    init_vocab_size: InitVar[Optional[int]] = None

    def __post_init__(self, init_vocab_size: int | None) -> None:
        if init_vocab_size is not None:
            self.prompt_tuning_init_vocab_size = init_vocab_size
        given: Any = vars(self)["peft_type"]
        is_from_file = given is not None  # users leave it out, PEFT's loader passes it
        # Not PromptTuningConfig's checks: they know fewer initializations.
        PromptLearningConfig.__post_init__(self)
        if given not in (None, PEFT_TYPE, PeftType.PROMPT_TUNING):
            raise ValueError(
                f"`peft_type` of {type(self).__name__} is {PEFT_TYPE.value!r}, got {str(given)!r}. Leave it "
                "out, or use the config class of that method."
            )
        self.prompt_tuning_init = str(getattr(self.prompt_tuning_init, "value", self.prompt_tuning_init))
        if vars(self)["num_virtual_tokens"] is None and not is_from_file:  # files must not choose what is loaded
            self.num_virtual_tokens = self._length_of_text()
        check_fields(self, is_from_file)
        if self.num_transformer_submodules is None:
            self.num_transformer_submodules = 1
        self.peft_type = PEFT_TYPE
        if not is_from_file:
            for message in unused_fields(self):
                warnings.warn(message, stacklevel=3)

    @property
    def is_prompt_learning(self) -> bool:
        """True. PEFT asks before it builds a model.

        Raises:
            ValueError: If `task_type` is None: PEFT would build a model that does not use the prompt.
        """
        self.check_task_type()
        return True

    def check_task_type(self) -> None:
        """Check that there is a task, without which no model can be built.

        Raises:
            ValueError: If `task_type` is None.
        """
        if self.task_type is None:
            raise ValueError(
                f"`task_type` must be one of {', '.join(TaskType)}, got None. PEFT puts the prompt in front of the "
                "input according to the task; without one the prompt would not be used."
            )

    def load_tokenizer(self) -> Any:
        """Load the tokenizer that `tokenizer_name_or_path` names."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.tokenizer_name_or_path, **(self.tokenizer_kwargs or {}))

    def _length_of_text(self) -> int:
        if self.prompt_tuning_init != "TEXT" or not self.prompt_tuning_init_text or not self.tokenizer_name_or_path:
            raise ValueError(
                "`num_virtual_tokens`=None takes the length of a text, and needs prompt_tuning_init='TEXT' with "
                "`prompt_tuning_init_text` and `tokenizer_name_or_path`. Set them, or a number."
            )
        return len(self.load_tokenizer()(self.prompt_tuning_init_text, add_special_tokens=False)["input_ids"]) or 1

    @property
    def total_virtual_tokens(self) -> int:
        """Rows of the prompt: `num_virtual_tokens` times `num_transformer_submodules` (1 unless set)."""
        return self.num_virtual_tokens * (self.num_transformer_submodules or 1)

    @property
    def has_skip(self) -> bool:
        """Whether the prompt embedding is added to the network's output: if set, and if the network can have it."""
        entry = REPARAMETERIZATIONS[self.encoder_reparameterization_type]
        return self.encoder_residual and "encoder_residual" not in entry.unused_fields

    @property
    def scale(self) -> float:
        """The unit of prompt and network; 1 if the prompt embedding holds mixing weights, which have no unit.

        Raises:
            ValueError: If `encoder_scale` is None: no model has been built with this config yet.
        """
        if self.mixes_vocabulary:
            return 1.0
        if self.encoder_scale is None:
            raise ValueError(
                "`encoder_scale` is None: it is measured when a new model is built, and an adapter's config has the "
                "number that was measured. Set it, or save or download the adapter again."
            )
        return self.encoder_scale

    @property
    def mixes_vocabulary(self) -> bool:
        """Whether the prompt embedding holds weights `[P, M]` for `M` frozen rows of the vocabulary (`"SUPERPOS"`)."""
        return REPARAMETERIZATIONS[self.encoder_reparameterization_type].mixes_vocabulary

    @property
    def embedding_width(self) -> int:
        """Columns of the prompt embedding: `token_dim`, or one for each row that is mixed."""
        return self.encoder_hidden_size if self.mixes_vocabulary else self.token_dim

    @property
    def num_initial_rows(self) -> int:
        """Rows `[., H]` that an initialization makes: one per virtual token, or the rows that are mixed."""
        return self.encoder_hidden_size if self.mixes_vocabulary else self.total_virtual_tokens

    def to_prompt_tuning_config(self, inference_mode: bool = False) -> PromptTuningConfig:
        """The config of the merged, plain prompt tuning adapter, without how its prompt was initialized."""
        left_out = ("peft_type", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs")
        values = {f.name: getattr(self, f.name) for f in fields(PromptTuningConfig) if f.name not in left_out}
        # PEFT adds the task's head to the list, in place, each time that a model is built.
        modules_to_save = self.modules_to_save and list(dict.fromkeys(self.modules_to_save))
        return PromptTuningConfig(**{**values, "modules_to_save": modules_to_save, "inference_mode": inference_mode})

    def to_dict(self) -> dict[str, Any]:
        """The configuration as it is written to `adapter_config.json`.

        `trust_remote_code` in `tokenizer_kwargs` is left out: it is the decision of whoever writes it in code, and is
        refused in a config that is loaded.
        """
        values: dict[str, Any] = super().to_dict()
        if self.modules_to_save is not None:
            # PEFT adds the task's head to the list each time that a model is built.
            values["modules_to_save"] = list(dict.fromkeys(self.modules_to_save))
        if self.tokenizer_kwargs:
            values["tokenizer_kwargs"].pop("trust_remote_code", None)
        return values


def _set_help() -> None:
    """Give each field its text in the docstring as help, which `HfArgumentParser` shows."""
    described = re.findall(
        r"^        (\w+) \(.+?\): (.+(?:\n {12}.+)*)", ResidualPromptTuningConfig.__doc__ or "", re.M
    )
    texts = {name: " ".join(text.split()) for name, text in described}
    for config_field in fields(ResidualPromptTuningConfig):
        if config_field.name in texts:
            config_field.metadata = MappingProxyType({"help": texts[config_field.name]})


_set_help()
