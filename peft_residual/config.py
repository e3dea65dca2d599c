"""The configuration of residual prompt tuning, and every check of its fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import UnionType
from typing import Any, Optional, Union, get_args, get_origin, get_type_hints

from peft import PeftType, PromptTuningConfig, PromptTuningInit, TaskType
from peft.config import PromptLearningConfig

from .registry import INITIALIZATIONS, REPARAMETERIZATIONS


# What `adapter_config.json` says. In memory PEFT sees `PROMPT_TUNING`, so that it takes its prompt-tuning paths.
PEFT_TYPE_NAME = "RESIDUAL_PROMPT_TUNING"

# Fields that only one way to start a prompt reads, and the ways that read it.
_INIT_FIELDS = {
    "prompt_tuning_init_text": ("TEXT",),
    "prompt_tuning_init_class_labels": ("CLASS_LABELS",),
    "prompt_tuning_init_state_dict_path": ("PROMPT",),
}


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class ResidualPromptTuningConfig(PromptTuningConfig):
    """Configuration of a [`ResidualPromptEncoder`]: prompt tuning through a network with a skip connection.

    Residual Prompt Tuning (Razdaibiedina et al., Findings of ACL 2023, arXiv:2305.03937), section 3: the frozen
    model sees `E' = E + φ(E)`, where `E` is the raw prompt `[P, H]`, `φ` a small network, `P` is `num_virtual_tokens`
    and `H` is `token_dim`. The defaults are the paper's. All fields of [`~peft.PromptTuningConfig`] are available.

    Args:
        num_virtual_tokens (`int`): Prompt length `P`.
        encoder_reparameterization_type (`str`): The network `φ`: `"MLP1"`, `"MLP2"`, `"LSTM1"`, `"LSTM2"`, `"LSTM"`,
            `"TRANSFORMER"`, `"SUPERPOS"` (no `E`: each token is a trained weighted sum of frozen rows of the
            vocabulary), `"NONE"` (plain prompt tuning), or a name added by [`register_reparameterization`].
        encoder_hidden_size (`int`): Width of the network's hidden layer (the bottleneck `M`). For `"SUPERPOS"`, how
            many rows it mixes: 128 in its paper.
        encoder_shared (`bool`): One network for all virtual tokens, or one per token (MLP1 and MLP2).
        encoder_residual (`bool`): Whether to add the raw prompt to the network's output (the skip).
        encoder_layer_norm (`bool`): Whether the network has a LayerNorm: at its end, before the skip is added.
        encoder_norm_first (`bool`): Whether that LayerNorm stands at the network's beginning (MLP1 and MLP2): what the
            network adds to the prompt is then bound to no scale. Not in the paper.
        encoder_zero_init (`bool`): Whether the network's last weights start at zero (MLP1 and MLP2): training then
            starts from the very rows of the vocabulary, `E' = E`. Not in the paper.
        encoder_activation (`str`): A name of transformers' activation table, such as `"relu"` or `"tanh"`.
        encoder_dropout (`float`): Dropout probability inside the network, in `[0, 1)`.
        encoder_num_attention_heads (`int`): Attention heads of `"TRANSFORMER"`; must divide `H`.
        prompt_tuning_init (`str`): How the raw prompt starts: `"COMMON_VOCAB"`, `"SAMPLE_VOCAB"`, `"RANDOM"`,
            `"TEXT"`, `"CLASS_LABELS"`, `"PROMPT"`, or a name added by [`register_initialization`].
        init_vocab_size (`int`): How many of the most common rows `"COMMON_VOCAB"` draws from.
        prompt_tuning_init_token_ids (`list[int]`, *optional*): Token ids from the most common down, for a tokenizer
            whose ids are not ordered by frequency; [`most_common_token_ids`] counts them in texts.
        prompt_tuning_init_class_labels (`list[str]`, *optional*): The label words of `"CLASS_LABELS"`.
        prompt_tuning_init_state_dict_path (`str`, *optional*): Where `"PROMPT"` starts from: a saved adapter's folder,
            or a prompt tensor in a `.safetensors` or `.npy` file.
        prompt_tuning_init_seed (`int`, *optional*): Seed of the start of prompt and network. The seed of torch when
            None; the global random state is never advanced.

    Raises:
        ValueError: If a field has a value that cannot be right, or that the chosen network or start would ignore.
    """

    # Special ids of the model that the adapter is built into; not a field, set anew for each model.
    model_special_ids = tuple[int, ...]()

    num_virtual_tokens: int = field(default=10, metadata=_help("Number of virtual tokens, P."))
    num_transformer_submodules: Optional[int] = field(
        default=None,
        metadata=_help("1 when None: the prompt stands in front of the encoder's input only, the decoder gets none."),
    )
    encoder_reparameterization_type: str = field(
        default="MLP1",
        metadata=_help(
            "The network: MLP1, MLP2, LSTM1, LSTM2, LSTM, TRANSFORMER, SUPERPOS, NONE, or a registered name."
        ),
    )
    encoder_hidden_size: int = field(
        default=800,
        metadata=_help("Width of the network's hidden layer, M; rows that SUPERPOS mixes (its paper: 128)."),
    )
    encoder_shared: bool = field(
        default=True, metadata=_help("True: one network for all virtual tokens. False: one per token (MLP1, MLP2).")
    )
    encoder_residual: bool = field(
        default=True, metadata=_help("Whether the raw prompt is added to the network's output (the skip).")
    )
    encoder_layer_norm: bool = field(
        default=True, metadata=_help("Whether the network has a LayerNorm (at its end, before the skip).")
    )
    encoder_norm_first: bool = field(
        default=False, metadata=_help("Whether the LayerNorm stands at the network's beginning (MLP1, MLP2).")
    )
    encoder_zero_init: bool = field(
        default=False,
        metadata=_help("Whether the network's last weights start at zero, so that training starts at E (MLP1, MLP2)."),
    )
    encoder_activation: str = field(
        default="relu", metadata=_help("Activation: any name of transformers' activation table.")
    )
    encoder_dropout: float = field(default=0.0, metadata=_help("Dropout probability in the network, in [0, 1)."))
    encoder_num_attention_heads: int = field(
        default=8, metadata=_help("Attention heads of TRANSFORMER; must divide token_dim.")
    )
    prompt_tuning_init: Union[PromptTuningInit, str] = field(
        default="COMMON_VOCAB",
        metadata=_help(
            "How the raw prompt starts: COMMON_VOCAB, SAMPLE_VOCAB, RANDOM, TEXT, CLASS_LABELS, PROMPT, or a "
            "registered name."
        ),
    )
    init_vocab_size: int = field(
        default=5000, metadata=_help("COMMON_VOCAB draws from this many of the most common rows.")
    )
    prompt_tuning_init_token_ids: Optional[list[int]] = field(
        default=None,
        metadata=_help(
            "Token ids from the most common down (see most_common_token_ids). When None, ids are taken to be ordered "
            "by frequency, as in SentencePiece and byte-pair vocabularies."
        ),
    )
    prompt_tuning_init_class_labels: Optional[list[str]] = field(
        default=None, metadata=_help("Label words for prompt_tuning_init='CLASS_LABELS'.")
    )
    prompt_tuning_init_state_dict_path: Optional[str] = field(
        default=None,
        metadata=_help("Adapter folder, .safetensors or .npy file for prompt_tuning_init='PROMPT'."),
    )
    prompt_tuning_init_seed: Optional[int] = field(
        default=None, metadata=_help("Seed for the start of prompt and network; torch's own seed when None.")
    )

    def __post_init__(self) -> None:
        self._check_peft_fields()
        self._check_network_fields()
        self._check_init_fields()
        check_types(type(self), vars(self))  # last: the checks above say more
        if self.token_dim is not None:
            self.check_token_dim()
        if self.num_transformer_submodules is None:
            self.num_transformer_submodules = 1
        # PromptTuningConfig's own checks know fewer ways to start a prompt; ours above cover them.
        PromptLearningConfig.__post_init__(self)
        self.peft_type = PeftType.PROMPT_TUNING

    @property
    def total_virtual_tokens(self) -> int:
        """Rows of the prompt: `num_virtual_tokens` times `num_transformer_submodules` (1 unless set)."""
        return self.num_virtual_tokens * (self.num_transformer_submodules or 1)

    @property
    def has_skip(self) -> bool:
        """Whether the raw prompt is added to the network's output: if asked for, and the network has that option."""
        entry = REPARAMETERIZATIONS[self.encoder_reparameterization_type]
        return self.encoder_residual and "encoder_residual" not in entry.unused_fields

    @property
    def mixes_vocabulary(self) -> bool:
        """Whether the raw prompt holds weights `[P, M]` for `M` frozen rows of the vocabulary, as for `"SUPERPOS"`."""
        return REPARAMETERIZATIONS[self.encoder_reparameterization_type].mixes_vocabulary

    @property
    def embedding_width(self) -> int:
        """Columns of the raw prompt: `token_dim`, or one for each row that is mixed."""
        return self.encoder_hidden_size if self.mixes_vocabulary else self.token_dim

    @property
    def num_initial_rows(self) -> int:
        """Rows of width `token_dim` that a start makes: one for each virtual token, or the rows that are mixed."""
        return self.encoder_hidden_size if self.mixes_vocabulary else self.total_virtual_tokens

    def to_dict(self) -> dict[str, Any]:
        """The configuration as it is written to `adapter_config.json`, with `peft_type` `RESIDUAL_PROMPT_TUNING`."""
        values = {**super().to_dict(), "peft_type": PEFT_TYPE_NAME}
        if self.modules_to_save is not None:
            # PEFT adds the task's head to the list each time that a model is built.
            values["modules_to_save"] = list(dict.fromkeys(self.modules_to_save))
        return values

    def check_token_dim(self) -> None:
        """Check what depends on the model's width, which PEFT fills in when it builds the model.

        Raises:
            ValueError: If `token_dim` does not suit the network.
        """
        kind, width = self.encoder_reparameterization_type, self.token_dim
        self._check_positive_int("token_dim")
        if kind in ("LSTM1", "LSTM2", "LSTM") and width % 2:
            raise ValueError(
                f"encoder_reparameterization_type={kind!r} splits the width over two directions and needs an even "
                f"`token_dim`, got {width}. Use 'MLP1', 'MLP2' or 'TRANSFORMER'."
            )
        if kind == "TRANSFORMER" and width % self.encoder_num_attention_heads:
            divisors = [n for n in range(1, 65) if width % n == 0]
            raise ValueError(
                f"`encoder_num_attention_heads` must divide `token_dim`={width}, got "
                f"{self.encoder_num_attention_heads}. Use one of {divisors}."
            )

    # --- checks, one group of fields each -------------------------------------------------------------------------

    def _check_peft_fields(self) -> None:
        if self.peft_type not in (None, PEFT_TYPE_NAME, PeftType.PROMPT_TUNING):
            raise ValueError(
                f"`peft_type` of {type(self).__name__} is {PEFT_TYPE_NAME!r}, got {str(self.peft_type)!r}. Leave it "
                "out, or use the config class of that method."
            )
        if self.task_type not in list(TaskType):
            raise ValueError(
                f"`task_type` must be one of {', '.join(TaskType)}, got {self.task_type!r}. PEFT puts the prompt in "
                "front of the input according to the task; without one the prompt would not be used."
            )
        if self.auto_mapping is not None:
            raise ValueError(
                f"`auto_mapping`={self.auto_mapping!r} names code to import for models without a task, and has no "
                f"effect with task_type={str(self.task_type)!r}. Leave it out."
            )
        self._check_positive_int("num_virtual_tokens")
        submodules = self.num_transformer_submodules
        if submodules is not None and (type(submodules) is not int or submodules not in (1, 2)):
            raise ValueError(
                f"`num_transformer_submodules` must be 1, or 2 to keep rows for a decoder as PEFT does, got "
                f"{self.num_transformer_submodules!r}. Leave it out."
            )

    def _check_network_fields(self) -> None:
        entry = REPARAMETERIZATIONS[self.encoder_reparameterization_type]
        kind = self.encoder_reparameterization_type
        self._check_positive_int("encoder_hidden_size")
        self._check_positive_int("encoder_num_attention_heads")
        for name in (
            "encoder_shared",
            "encoder_residual",
            "encoder_layer_norm",
            "encoder_norm_first",
            "encoder_zero_init",
        ):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")
        dropout = self.encoder_dropout
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise ValueError(f"`encoder_dropout` is a probability in [0, 1), got {dropout!r}. Use 0.0 for none.")
        parameters = self._activation_parameters()
        if not self.encoder_shared:
            if not entry.per_token and "encoder_shared" not in entry.unused_fields:
                raise ValueError(
                    f"`encoder_shared=False` needs a network that works token by token, got "
                    f"encoder_reparameterization_type={kind!r}: each copy would see one token and could not mix "
                    "positions. Use 'MLP1' or 'MLP2', or set `encoder_shared=True`."
                )
            if parameters:
                raise ValueError(
                    f"`encoder_shared=False` needs an activation without weights, got encoder_activation="
                    f"{self.encoder_activation!r}: its weights would be shared by all tokens. Use 'relu' or 'tanh'."
                )
        for config_field in fields(self):
            value = getattr(self, config_field.name)
            if config_field.name in entry.unused_fields and value != config_field.default:
                raise ValueError(
                    f"`{config_field.name}`={value!r} has no effect with encoder_reparameterization_type={kind!r}. "
                    f"Leave it at {config_field.default!r}."
                )
        if self.encoder_norm_first and not self.encoder_layer_norm:
            raise ValueError(
                "`encoder_norm_first=True` has no effect with encoder_layer_norm=False. Leave one of them out."
            )
        if self.encoder_zero_init and not self.encoder_residual:
            raise ValueError(
                "`encoder_zero_init=True` with encoder_residual=False starts from a prompt of zeros. Leave one of "
                "them out."
            )

    def _activation_parameters(self) -> int:
        from transformers.activations import ACT2CLS, get_activation

        if not isinstance(self.encoder_activation, str) or self.encoder_activation not in ACT2CLS:
            raise ValueError(
                f"Unknown encoder_activation={self.encoder_activation!r}. Known: {', '.join(map(repr, ACT2CLS))}."
            )
        return len(list(get_activation(self.encoder_activation).parameters()))

    def _check_init_fields(self) -> None:
        self.prompt_tuning_init = str(getattr(self.prompt_tuning_init, "value", self.prompt_tuning_init))
        init = self.prompt_tuning_init
        INITIALIZATIONS[init]
        if self.mixes_vocabulary and init not in ("COMMON_VOCAB", "SAMPLE_VOCAB"):
            raise ValueError(
                f"encoder_reparameterization_type={self.encoder_reparameterization_type!r} mixes rows of the "
                f"vocabulary, and prompt_tuning_init={init!r} draws none. Use 'COMMON_VOCAB' or 'SAMPLE_VOCAB'."
            )
        self._check_positive_int("init_vocab_size")
        seed = self.prompt_tuning_init_seed
        if seed is not None and (type(seed) is not int or not 0 <= seed < 2**64):
            raise ValueError(
                f"`prompt_tuning_init_seed` must be None or an integer of at least 0 and below 2**64, got {seed!r}."
            )
        for name, kinds in _INIT_FIELDS.items():
            given = bool(getattr(self, name))
            if init in kinds and not given:
                raise ValueError(f"prompt_tuning_init={init!r} needs `{name}`, got {getattr(self, name)!r}. Set it.")
            # A name of the user's own may read any field, so only the built-in ways are checked.
            if given and init not in kinds and init in BUILT_IN_INITIALIZATIONS:
                raise ValueError(
                    f"`{name}` has no effect with prompt_tuning_init={init!r}. Leave it out, or use "
                    f"prompt_tuning_init={kinds[0]!r}."
                )
        if init in ("TEXT", "CLASS_LABELS") and not self.tokenizer_name_or_path:
            raise ValueError(
                f"prompt_tuning_init={init!r} needs `tokenizer_name_or_path`, got {self.tokenizer_name_or_path!r}. "
                "Name the base model's tokenizer."
            )
        if self.tokenizer_kwargs and not self.tokenizer_name_or_path:
            raise ValueError(
                f"`tokenizer_kwargs`={self.tokenizer_kwargs!r} has no effect without `tokenizer_name_or_path`. Set it "
                "too."
            )
        if isinstance(self.tokenizer_kwargs, dict) and "trust_remote_code" in self.tokenizer_kwargs:
            raise ValueError(
                f"`tokenizer_kwargs`={self.tokenizer_kwargs!r} asks for code of the tokenizer's to be run, which a "
                "downloaded config must not. Leave `trust_remote_code` out."
            )
        self._check_init_lists()

    def _check_init_lists(self) -> None:
        labels, token_ids = self.prompt_tuning_init_class_labels, self.prompt_tuning_init_token_ids
        if labels is not None:
            if not isinstance(labels, (list, tuple)) or not all(isinstance(label, str) and label for label in labels):
                raise ValueError(f"`prompt_tuning_init_class_labels` must be a list of words, got {labels!r}.")
            if len(labels) > self.num_virtual_tokens:
                raise ValueError(
                    f"`prompt_tuning_init_class_labels` has {len(labels)} labels for num_virtual_tokens="
                    f"{self.num_virtual_tokens}. Give at most one label per virtual token, or more tokens."
                )
        if token_ids is not None:
            is_list = isinstance(token_ids, (list, tuple))
            wrong = [i for i in token_ids if type(i) is not int or i < 0] if is_list else token_ids
            if not token_ids or wrong:
                raise ValueError(
                    "`prompt_tuning_init_token_ids` must be a list of token ids (integers of at least 0), got "
                    f"{wrong or token_ids!r}. `peft_residual.most_common_token_ids` makes one."
                )
            if self.prompt_tuning_init in ("RANDOM", "SAMPLE_VOCAB", "TEXT", "PROMPT"):
                raise ValueError(
                    f"`prompt_tuning_init_token_ids` has no effect with prompt_tuning_init="
                    f"{self.prompt_tuning_init!r}. Leave it out, or use prompt_tuning_init='COMMON_VOCAB'."
                )

    def _check_positive_int(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
            raise ValueError(f"`{name}` must be an integer of at least 1 (and below 2**31), got {value!r}.")


def check_types(config_class: type[PromptTuningConfig], values: Mapping[str, Any]) -> None:
    """Check the types of a config's values, as a JSON file may hold them, against the annotations of its class.

    A field may also hold None where that is its default (PEFT annotates `token_dim` as `int`).

    Args:
        config_class (`type`): The config class.
        values (`Mapping[str, Any]`): Values by field; fields without one are passed over.

    Raises:
        ValueError: If a value has another type than its field.
    """
    hints = get_type_hints(config_class)
    for config_field in fields(config_class):
        name, hint = config_field.name, hints[config_field.name]
        if name not in values or (values[name] is None and config_field.default is None):
            continue
        if not _has_type(values[name], hint):
            raise ValueError(f"`{name}` must be of type {_type_name(hint)}, got {values[name]!r}.")


def _has_type(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_has_type(value, alternative) for alternative in get_args(hint))
    if get_origin(hint) is list:
        is_list = isinstance(value, (list, tuple, set))
        return is_list and all(_has_type(item, get_args(hint)[0]) for item in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _type_name(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_type_name, get_args(hint)))
    if get_origin(hint) is list:
        return f"list of {_type_name(get_args(hint)[0])}"
    return "None" if hint is type(None) else str(hint.__name__)


BUILT_IN_INITIALIZATIONS = ("COMMON_VOCAB", "SAMPLE_VOCAB", "RANDOM", "TEXT", "CLASS_LABELS", "PROMPT")
