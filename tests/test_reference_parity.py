"""The method's formulas in plain torch, written from the paper, against the package's networks: values and gradients.

Nothing of the package runs inside the oracle. It takes the weights by name from the encoder's state dict, and applies
Razdaibiedina et al. (2023), section 3, `E' = E + φ(E)`; the LSTM of Hochreiter & Schmidhuber (1997) as Graves (2013)
writes it; the transformer layer of Vaswani et al. (2017), section 3.1; and the weighted sum of frozen rows of
SuperPos-Prompt (Ali Sadraei Javaheri et al., 2024). Letters: `P` tokens, `H` width, `M` hidden.
"""

import math

import pytest
import torch
from conftest import WIDTH, make_encoder


KINDS = ("MLP1", "MLP2", "LSTM1", "LSTM2", "LSTM", "TRANSFORMER", "SUPERPOS", "NONE")
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
ACTIVATIONS = {
    "relu": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "tanh": lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
}


def select(state, prefix):
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def affine(x, layer):
    """`W x + b`, for one layer, or token by token for layers stacked along the first dimension."""
    weight, bias = layer["weight"], layer["bias"]
    if weight.ndim == 2:
        return x @ weight.T + bias
    return torch.stack([x[p] @ weight[p] + bias[p] for p in range(len(x))])


def layer_norm(x, norm):
    if not norm:
        return x
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
    return (x - mean) / (variance + 1e-5).sqrt() * norm["weight"] + norm["bias"]


def mlp(x, state, activation, norm_first):
    norm = select(state, "norm.")
    if norm_first:
        return affine(activation(affine(layer_norm(x, norm), select(state, "down."))), select(state, "up."))
    return layer_norm(affine(activation(affine(x, select(state, "down."))), select(state, "up.")), norm)


def lstm_direction(x, lstm, suffix):
    sigmoid, tanh = ACTIVATIONS["sigmoid"], ACTIVATIONS["tanh"]
    size = lstm[f"weight_hh_{suffix}"].shape[1]
    hidden, cell, outputs = x.new_zeros(size), x.new_zeros(size), []
    for token in x:
        gates = lstm[f"weight_ih_{suffix}"] @ token + lstm[f"bias_ih_{suffix}"]
        gates = gates + lstm[f"weight_hh_{suffix}"] @ hidden + lstm[f"bias_hh_{suffix}"]
        entry, forget, candidate, output = gates.split(size)
        cell = sigmoid(forget) * cell + sigmoid(entry) * tanh(candidate)
        hidden = sigmoid(output) * tanh(cell)
        outputs.append(hidden)
    return torch.stack(outputs)


def lstm(x, state, activation, num_layers, head):
    weights = select(state, "lstm.")
    for layer in range(num_layers):
        forward = lstm_direction(x, weights, f"l{layer}")
        backward = lstm_direction(x.flip(0), weights, f"l{layer}_reverse").flip(0)
        x = torch.cat([forward, backward], dim=-1)
    if head:
        x = affine(activation(affine(x, select(state, "head.0."))), select(state, "head.2."))
    return layer_norm(x, select(state, "norm."))


def transformer_layer(x, state, activation, num_heads):
    width = x.shape[-1]
    size = width // num_heads
    joint = affine(x, select(state, "query_key_value."))
    query, key, value = joint[:, :width], joint[:, width : 2 * width], joint[:, 2 * width :]
    heads = []
    for columns in (slice(h * size, (h + 1) * size) for h in range(num_heads)):
        scores = (query[:, columns] @ key[:, columns].T / math.sqrt(size)).exp()
        heads.append(scores / scores.sum(-1, keepdim=True) @ value[:, columns])
    x = layer_norm(x + affine(torch.cat(heads, dim=-1), select(state, "output.")), select(state, "attention_norm."))
    hidden = activation(affine(x, select(state, "feed_forward.0.")))
    return layer_norm(x + affine(hidden, select(state, "feed_forward.3.")), select(state, "feed_forward_norm."))


def transformer(x, state, activation, num_heads):
    x = x + state["positions"]
    for layer in ("layers.0.", "layers.1."):
        x = transformer_layer(x, select(state, layer), activation, num_heads)
    return layer_norm(x, select(state, "norm."))


def reference(state, config):
    """The projected prompt `[P, H]` of an encoder's state."""
    raw, network = state["embedding.weight"], select(state, "network.")
    activation = ACTIVATIONS[config.encoder_activation]
    kind = config.encoder_reparameterization_type
    if kind == "NONE":
        return raw
    if kind == "SUPERPOS":
        return torch.stack([sum(weight * row for weight, row in zip(token, network["rows"])) for token in raw])
    if kind == "MLP1":
        output = mlp(raw, network, activation, config.encoder_norm_first)
    elif kind == "MLP2":
        hidden = mlp(raw, select(network, "0."), activation, config.encoder_norm_first)
        output = mlp(hidden, select(network, "1."), activation, config.encoder_norm_first)
    elif kind == "TRANSFORMER":
        output = transformer(raw, network, activation, config.encoder_num_attention_heads)
    else:
        output = lstm(raw, network, activation, num_layers=1 if kind == "LSTM1" else 2, head=kind == "LSTM")
    return raw + output if config.encoder_residual else output


def spread(encoder):
    """Move every weight off its start: norms start at one and zero, where a forgotten one would not show."""
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return encoder


def build(**options):
    """An encoder with a hidden layer of 32: with 8, some gradients cancel to below float32's rounding."""
    if options.get("encoder_reparameterization_type") not in ("LSTM1", "LSTM2", "NONE"):
        options = {"encoder_hidden_size": 32, **options}
    return make_encoder(**options)


def relative_error(found, expected):
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def assert_parity(encoder, dtype):
    encoder = spread(encoder).to(dtype)
    leaves = dict(encoder.named_parameters())
    # The oracle computes in float64 whatever the encoder does, so that the error is the encoder's alone.
    state = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    buffers = {name: buffer.double() for name, buffer in encoder.named_buffers()}
    found, expected = encoder(), reference({**state, **buffers}, encoder.config)
    assert found.dtype == dtype and found.shape == expected.shape
    assert relative_error(found, expected) <= TOLERANCE[dtype]

    direction = torch.randn(found.shape, dtype=dtype)
    found = torch.autograd.grad((found * direction).sum(), list(leaves.values()))
    expected = torch.autograd.grad((expected * direction.double()).sum(), list(state.values()))
    errors = {name: relative_error(a, b) for name, a, b in zip(leaves, found, expected, strict=True)}
    assert {name: error for name, error in errors.items() if error > TOLERANCE[dtype]} == {}


def configurations():
    for kind in KINDS:
        if kind in ("SUPERPOS", "NONE"):
            yield {"encoder_reparameterization_type": kind}
            continue
        for shared in (True, False) if kind in ("MLP1", "MLP2") else (True,):
            for residual in (True, False):
                for norm in (True, False):
                    yield {
                        "encoder_reparameterization_type": kind,
                        "encoder_shared": shared,
                        "encoder_residual": residual,
                        "encoder_layer_norm": norm,
                    }


def label(value):
    return "-".join(str(v) if isinstance(v, str) else f"{k[8:]}={v:d}" for k, v in value.items())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("length", (1, 5))
@pytest.mark.parametrize("options", list(configurations()), ids=label)
def test_encoder_equals_the_formulas(options, length, dtype):
    assert_parity(build(num_virtual_tokens=length, **options), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", ("tanh", "sigmoid"))
@pytest.mark.parametrize("kind", ("MLP1", "MLP2", "LSTM", "TRANSFORMER"))
def test_encoder_equals_the_formulas_with_other_activations(kind, activation, dtype):
    options = {"encoder_reparameterization_type": kind, "encoder_activation": activation}
    assert_parity(build(**options), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shared", (True, False))
@pytest.mark.parametrize("kind", ("MLP1", "MLP2"))
def test_encoder_equals_the_formulas_with_the_norm_first(kind, shared, dtype):
    options = {"encoder_reparameterization_type": kind, "encoder_shared": shared, "encoder_norm_first": True}
    assert_parity(build(**options), dtype)


@pytest.mark.parametrize("heads", (1, 2, WIDTH))
def test_transformer_equals_the_formulas_with_other_head_counts(heads):
    options = {"encoder_reparameterization_type": "TRANSFORMER", "encoder_num_attention_heads": heads}
    assert_parity(build(**options), torch.float64)


def test_the_papers_defaults_are_the_formula_at_their_real_size():
    encoder = build(num_virtual_tokens=10, encoder_hidden_size=800, token_dim=64)
    assert sum(p.numel() for p in encoder.parameters()) == 2 * 64 * 800 + 800 + 64 + 2 * 64 + 64 * 10
    assert_parity(encoder, torch.float32)
