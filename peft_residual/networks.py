"""The networks `φ` that a prompt embedding is trained through: Razdaibiedina et al. (2023), section 3.

Letters for dimensions: `P` virtual tokens, `H` width of the word embeddings (`token_dim`), `M` width of the hidden
layer (`encoder_hidden_size`). A network maps the prompt embedding `E` `[P, H]` to `φ(E)` `[P, H]`, in float32. The
encoder adds the skip: the frozen model sees the projected prompt `E' = E + φ(E)`. A network that mixes vocabulary rows
has no skip and maps weights `[P, M]` to `[P, H]`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ResidualPromptTuningConfig
from .registry import REPARAMETERIZATIONS


Builder = Callable[[ResidualPromptTuningConfig], nn.Module]

_RANDOM_STATE_LOCK = threading.RLock()

# Config fields that some of the networks below do not use.
_ATTENTION = ("encoder_num_attention_heads",)
_HIDDEN_LAYER = ("encoder_hidden_size", "encoder_activation")
_MLP_OPTIONS = ("encoder_norm_first", "encoder_zero_init")
_LAYER_OPTIONS = ("encoder_shared", "encoder_residual", "encoder_layer_norm", "encoder_dropout")


def register_reparameterization(
    name: str, *, per_token: bool = False, unused_fields: tuple[str, ...] = (), mixes_vocabulary: bool = False
) -> Callable[[Builder], Builder]:
    """Register a custom network under a name that `encoder_reparameterization_type` then accepts.

    The decorated function (or class) takes the config and returns a module that maps the prompt embedding `[P, H]` to
    `[P, H]`, without the skip. Adapters with this network are saved and loaded like any other. A process that loads
    one must register the name first.

    Args:
        name (`str`): The value of `encoder_reparameterization_type`.
        per_token (`bool`): Whether the network supports `encoder_shared=False` (one network per virtual token).
        unused_fields (`tuple[str, ...]`): Config fields that the network does not use; setting one of them then
            warns. If `encoder_residual` is among them, there is no skip.
        mixes_vocabulary (`bool`): Whether the module maps weights `[P, M]` to `[P, H]`, using `M` frozen rows of the
            vocabulary. The module must have a buffer `rows` `[M, H]`, which the encoder fills. There is no skip then.

    Raises:
        ValueError: If the name is taken by another network.
    """
    if mixes_vocabulary:
        unused_fields = (*unused_fields, "encoder_residual")  # weights [P, M] cannot be added to rows [P, H]
    return REPARAMETERIZATIONS.add(
        name, per_token=per_token, unused_fields=unused_fields, mixes_vocabulary=mixes_vocabulary
    )


def build_network(config: ResidualPromptTuningConfig, seed: int, device: str = "cpu") -> nn.Module:
    """Build the network that `config` describes, with new weights in float32.

    Modules draw their weights from torch's default CPU generator: it is seeded, and its state restored afterwards. On
    the device `"meta"` nothing is allocated or drawn: the network then only tells the shapes of its weights.
    """
    with _RANDOM_STATE_LOCK, torch.random.fork_rng(devices=[]), torch.device(device):
        torch.default_generator.manual_seed(seed)
        return REPARAMETERIZATIONS[config.encoder_reparameterization_type].builder(config).float()


def build_network_to_load(config: ResidualPromptTuningConfig, seed: int) -> nn.Module:
    """Build the network whose weights will be loaded: on `"meta"`, except for custom networks, which may not allow it.

    The seed gives a custom network's buffers that are not saved the values that they had in training.
    """
    builder = REPARAMETERIZATIONS[config.encoder_reparameterization_type].builder
    return build_network(config, seed, device="meta" if builder.__module__ == __name__ else "cpu")


class PerTokenLinear(nn.Module):
    """`P` separate linear layers in one batched product: token `p` goes through layer `p`.

    Initialized like `nn.Linear`: weight and bias are uniform in ±1/√in_features.

    Args:
        num_tokens (`int`): Number of layers, `P`.
        in_features (`int`): Input width of each layer.
        out_features (`int`): Output width of each layer.
    """

    def __init__(self, num_tokens: int, in_features: int, out_features: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_features)
        self.weight = nn.Parameter(torch.empty(num_tokens, in_features, out_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num_tokens, out_features).uniform_(-bound, bound))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `[P, in_features]` to `[P, out_features]`."""
        # The weights are `[in, out]`, transposed compared to `nn.Linear`: more than twice as fast on a CPU.
        return torch.baddbmm(self.bias.unsqueeze(1), inputs.unsqueeze(1), self.weight).squeeze(1)


class PerTokenLayerNorm(nn.Module):
    """`P` separate LayerNorms over the last dimension: token `p` goes through norm `p`."""

    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_tokens, width))
        self.bias = nn.Parameter(torch.zeros(num_tokens, width))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `[P, H]` to `[P, H]`."""
        return F.layer_norm(inputs, inputs.shape[-1:]) * self.weight + self.bias


def _linear(config: ResidualPromptTuningConfig, in_features: int, out_features: int) -> nn.Module:
    if config.encoder_shared:
        return nn.Linear(in_features, out_features)
    return PerTokenLinear(config.total_virtual_tokens, in_features, out_features)


def _norm(config: ResidualPromptTuningConfig) -> nn.Module:
    if not config.encoder_layer_norm:
        return nn.Identity()
    if config.encoder_shared:
        return nn.LayerNorm(config.token_dim)
    return PerTokenLayerNorm(config.total_virtual_tokens, config.token_dim)


def _activation(config: ResidualPromptTuningConfig) -> nn.Module:
    from transformers.activations import get_activation

    return get_activation(config.encoder_activation)


class MLP(nn.Module):
    """A bottleneck MLP: `norm(dropout(up(activation(down(x)))))`, `down` from `H` to `M`, `up` from `M` to `H`.

    With `config.encoder_norm_first` it is `dropout(up(activation(down(norm(x)))))`.

    Args:
        config ([`ResidualPromptTuningConfig`]): Sizes, activation, dropout, norm.
        zero_init (`bool`): Whether the last layer with weights, and with it the output, is initialized to zero.
    """

    def __init__(self, config: ResidualPromptTuningConfig, zero_init: bool = False) -> None:
        super().__init__()
        self.norm_first = config.encoder_norm_first
        self.down = _linear(config, config.token_dim, config.encoder_hidden_size)
        self.activation = _activation(config)
        self.up = _linear(config, config.encoder_hidden_size, config.token_dim)
        self.dropout = nn.Dropout(config.encoder_dropout)
        self.norm = _norm(config)
        if zero_init:
            # If a LayerNorm follows `up`, zero the norm: a LayerNorm has huge gradients at a zero input.
            last = self.norm if config.encoder_layer_norm and not self.norm_first else self.up
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def forward(self, prompt: Tensor) -> Tensor:
        """Map `[P, H]` to `[P, H]`."""
        if self.norm_first:
            return self.dropout(self.up(self.activation(self.down(self.norm(prompt)))))
        return self.norm(self.dropout(self.up(self.activation(self.down(prompt)))))


@register_reparameterization("MLP1", per_token=True, unused_fields=_ATTENTION)
def build_mlp1(config: ResidualPromptTuningConfig) -> nn.Module:
    """One bottleneck MLP."""
    return MLP(config, zero_init=config.encoder_zero_init)


@register_reparameterization("MLP2", per_token=True, unused_fields=_ATTENTION)
def build_mlp2(config: ResidualPromptTuningConfig) -> nn.Module:
    """Two bottleneck MLPs with separate weights."""
    return nn.Sequential(MLP(config), MLP(config, zero_init=config.encoder_zero_init))


class LSTM(nn.Module):
    """A bidirectional LSTM over the prompt, `H/2` per direction; with `head`, followed by a two-layer MLP."""

    def __init__(self, config: ResidualPromptTuningConfig, num_layers: int, head: bool = False) -> None:
        super().__init__()
        width, hidden = config.token_dim, config.encoder_hidden_size
        between_layers = config.encoder_dropout if num_layers > 1 else 0.0
        self.lstm = nn.LSTM(width, width // 2, num_layers, dropout=between_layers, bidirectional=True)
        layers = [nn.Linear(width, hidden), _activation(config), nn.Linear(hidden, width)] if head else []
        self.head = nn.Sequential(*layers)
        self.dropout = nn.Dropout(config.encoder_dropout)
        self.norm = _norm(config)

    def forward(self, prompt: Tensor) -> Tensor:
        """Map `[P, H]` to `[P, H]`."""
        return self.norm(self.dropout(self.head(self.lstm(prompt)[0])))


@register_reparameterization("LSTM1", unused_fields=_ATTENTION + _HIDDEN_LAYER + _MLP_OPTIONS)
def build_lstm1(config: ResidualPromptTuningConfig) -> nn.Module:
    """One bidirectional LSTM layer."""
    return LSTM(config, num_layers=1)


@register_reparameterization("LSTM2", unused_fields=_ATTENTION + _HIDDEN_LAYER + _MLP_OPTIONS)
def build_lstm2(config: ResidualPromptTuningConfig) -> nn.Module:
    """Two bidirectional LSTM layers."""
    return LSTM(config, num_layers=2)


@register_reparameterization("LSTM", unused_fields=_ATTENTION + _MLP_OPTIONS)
def build_lstm(config: ResidualPromptTuningConfig) -> nn.Module:
    """Two bidirectional LSTM layers and an MLP head."""
    return LSTM(config, num_layers=2, head=True)


class TransformerLayer(nn.Module):
    """A post-norm transformer encoder layer (Vaswani et al., 2017, section 3.1).

    `nn.TransformerEncoderLayer` uses different kernels with and without gradients, so the saved prompt would not be
    bit-identical to the trained one.
    """

    def __init__(self, config: ResidualPromptTuningConfig) -> None:
        super().__init__()
        width, hidden = config.token_dim, config.encoder_hidden_size
        self.num_heads = config.encoder_num_attention_heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, hidden),
            _activation(config),
            nn.Dropout(config.encoder_dropout),
            nn.Linear(hidden, width),
        )
        self.attention_norm = nn.LayerNorm(width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.encoder_dropout)

    def attend(self, inputs: Tensor) -> Tensor:
        """Multi-head self-attention over all positions, `[P, H]` to `[P, H]`."""
        heads = self.query_key_value(inputs).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.permute(1, 2, 0, 3)  # [num_heads, P, H / num_heads] each
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        attended = self.dropout(scores.softmax(-1)) @ value
        return self.output(attended.transpose(0, 1).flatten(1))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `[P, H]` to `[P, H]`."""
        inputs = self.attention_norm(inputs + self.dropout(self.attend(inputs)))
        return self.feed_forward_norm(inputs + self.dropout(self.feed_forward(inputs)))


@register_reparameterization("TRANSFORMER", unused_fields=_MLP_OPTIONS)
class Transformer(nn.Module):
    """Two transformer encoder layers over the prompt plus learned positions."""

    def __init__(self, config: ResidualPromptTuningConfig) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.empty(config.total_virtual_tokens, config.token_dim).normal_(std=0.02))
        self.layers = nn.Sequential(TransformerLayer(config), TransformerLayer(config))
        self.norm = _norm(config)

    def forward(self, prompt: Tensor) -> Tensor:
        """Map `[P, H]` to `[P, H]`."""
        return self.norm(self.layers(prompt + self.positions))


@register_reparameterization(
    "SUPERPOS",
    unused_fields=("encoder_activation", "encoder_scale", *_ATTENTION, *_MLP_OPTIONS, *_LAYER_OPTIONS),
    mixes_vocabulary=True,
)
class Superposition(nn.Module):
    """Weighted sums of frozen vocabulary rows; the prompt embedding holds the weights.

    SuperPos-Prompt (Ali Sadraei Javaheri et al., 2024, PMLR 262, arXiv:2406.05279), without a softmax.
    """

    rows: Tensor

    def __init__(self, config: ResidualPromptTuningConfig) -> None:
        super().__init__()
        # A buffer, so that the rows are saved with the adapter, which then does not depend on the base model's table.
        self.register_buffer("rows", torch.zeros(config.encoder_hidden_size, config.token_dim))

    def forward(self, weights: Tensor) -> Tensor:
        """Map `[P, M]` to `[P, H]`."""
        return weights @ self.rows


@register_reparameterization("NONE", unused_fields=_ATTENTION + _HIDDEN_LAYER + _MLP_OPTIONS + _LAYER_OPTIONS)
def build_none(config: ResidualPromptTuningConfig) -> nn.Module:
    """No network: plain prompt tuning."""
    return nn.Identity()
