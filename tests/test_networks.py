"""The networks: per-token layers, sharing, dropout, activations, networks of the user's own."""

import math
import pickle

import pytest
import torch
from conftest import WIDTH, make_config, make_encoder, tiny_t5
from hosts import skip_before
from peft import PeftModel, get_peft_model
from torch import nn

from peft_residual import register_reparameterization
from peft_residual.networks import PerTokenLayerNorm, PerTokenLinear, build_network
from peft_residual.registry import REPARAMETERIZATIONS


KINDS = ("MLP1", "MLP2", "LSTM1", "LSTM2", "LSTM", "TRANSFORMER", "SUPERPOS", "NONE")


def configurations():
    """Every built-in network with every combination of the options that it takes."""
    for kind in KINDS:
        base = {"encoder_reparameterization_type": kind}
        if kind in ("SUPERPOS", "NONE"):
            yield base
            continue
        for shared in (True, False) if kind in ("MLP1", "MLP2") else (True,):
            for residual in (True, False):
                for norm in (True, False):
                    flags = {"encoder_residual": residual, "encoder_layer_norm": norm}
                    yield {**base, "encoder_shared": shared, **flags}
        if kind in ("MLP1", "MLP2"):
            yield {**base, "encoder_norm_first": True}


def label(options):
    return "-".join(str(v) if isinstance(v, str) else f"{k[8:]}={v:d}" for k, v in options.items())


CONFIGURATIONS = list(configurations())


# --- shapes and gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", (1, 4))
@pytest.mark.parametrize("options", CONFIGURATIONS, ids=label)
def test_projected_prompt_has_the_shape_of_the_raw_one(options, length):
    encoder = make_encoder(num_virtual_tokens=length, **options)
    embedding_width = 8 if options["encoder_reparameterization_type"] == "SUPERPOS" else WIDTH
    assert encoder.embedding.weight.shape == (length, embedding_width)
    assert encoder().shape == (length, WIDTH)
    assert encoder(torch.zeros(3, length, dtype=torch.long)).shape == (3, length, WIDTH)


@pytest.mark.parametrize("length", (1, 4))
@pytest.mark.parametrize("options", CONFIGURATIONS, ids=label)
def test_every_parameter_gets_a_gradient(options, length):
    encoder = make_encoder(num_virtual_tokens=length, **options)
    used = {}
    for _ in range(5):
        with torch.no_grad():
            encoder.embedding.weight.normal_()
        encoder.zero_grad()
        (encoder() * torch.randn(length, WIDTH)).sum().backward()
        for name, parameter in encoder.named_parameters():
            gets_one = parameter.grad is not None and bool((parameter.grad != 0).any())
            used[name] = used.get(name, False) or gets_one
    unused = [name for name, gets_one in used.items() if not gets_one]
    if length == 1 and "lstm" in options["encoder_reparameterization_type"].lower():
        # One token has no predecessor: the weights of the recurrence multiply zeros, by the LSTM's own equations.
        unused = [name for name in unused if ".weight_hh_" not in name]
    assert unused == []


@pytest.mark.parametrize("options", ({"encoder_norm_first": True}, {"encoder_layer_norm": False}, {}), ids=label)
@pytest.mark.parametrize("shared", (True, False))
@pytest.mark.parametrize("kind", ("MLP1", "MLP2"))
def test_a_network_with_zero_init_starts_at_the_raw_prompt_and_learns(kind, shared, options):
    encoder = make_encoder(
        encoder_reparameterization_type=kind, encoder_shared=shared, encoder_zero_init=True, **options
    )
    assert torch.equal(encoder(), encoder.embedding.weight)
    optimizer = torch.optim.AdamW(encoder.network.parameters(), lr=0.01, weight_decay=0.0)
    before = {name: parameter.detach().clone() for name, parameter in encoder.network.named_parameters()}
    direction = torch.randn(encoder.embedding.weight.shape)
    for _ in range(3):  # behind zeros, the weights in front get their first gradient at the second step
        optimizer.zero_grad()
        (encoder() * direction).sum().backward()
        optimizer.step()
    still = [name for name, parameter in encoder.network.named_parameters() if torch.equal(parameter, before[name])]
    assert still == []


@pytest.mark.parametrize("kind", ("MLP1", "MLP2"))
def test_a_token_is_projected_by_itself_through_an_mlp(kind):
    encoder = make_encoder(encoder_reparameterization_type=kind)
    before = encoder().detach()
    with torch.no_grad():
        encoder.embedding.weight[2] += 1
    changed = (encoder() != before).any(dim=1).tolist()
    assert changed == [False, False, True, False]


@pytest.mark.parametrize("kind", ("LSTM1", "LSTM2", "LSTM", "TRANSFORMER"))
def test_every_token_sees_every_other_through_a_sequence_network(kind):
    encoder = make_encoder(encoder_reparameterization_type=kind)
    before = encoder().detach()
    with torch.no_grad():
        encoder.embedding.weight[2] += 1
    assert (encoder() != before).any(dim=1).all()


def test_a_transformer_knows_positions():
    encoder = make_encoder(encoder_reparameterization_type="TRANSFORMER")
    with torch.no_grad():
        encoder.embedding.weight[:] = encoder.embedding.weight[0]
    assert not torch.allclose(encoder()[0], encoder()[1])


def test_mlp2_has_two_networks_with_weights_of_their_own():
    first, second = make_encoder(encoder_reparameterization_type="MLP2").network
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert a.data_ptr() != b.data_ptr(), name
        if not name.startswith("norm"):
            assert not torch.equal(a, b), name


def test_none_is_the_raw_prompt_and_has_no_network():
    encoder = make_encoder(encoder_reparameterization_type="NONE")
    assert torch.equal(encoder(), encoder.embedding.weight)
    assert [name for name, _ in encoder.named_parameters()] == ["embedding.weight"]


# --- one network per token ------------------------------------------------------------------------------------


def separate_modules(network, token):
    """Token `token`'s share of a stacked MLP, as ordinary modules."""
    hidden, width = network.up.weight.shape[1:]
    modules = nn.Sequential(
        nn.Linear(width, hidden), network.activation, nn.Linear(hidden, width), nn.LayerNorm(width)
    )
    stacks = (network.down, network.up, network.norm)
    with torch.no_grad():
        for module, stacked in zip((modules[0], modules[2], modules[3]), stacks, strict=True):
            weight = stacked.weight[token]
            module.weight.copy_(weight.mT if weight.ndim == 2 else weight)
            module.bias.copy_(stacked.bias[token])
    return modules


@pytest.mark.parametrize("kind", ("MLP1", "MLP2"))
def test_per_token_networks_equal_a_loop_over_separate_modules(kind):
    encoder = make_encoder(encoder_reparameterization_type=kind, encoder_shared=False)
    with torch.no_grad():
        for parameter in encoder.network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    halves = [encoder.network] if kind == "MLP1" else list(encoder.network)
    rows = []
    for token, row in enumerate(encoder.embedding.weight.detach()):
        output = row
        for half in halves:
            output = separate_modules(half, token)(output)
        rows.append(row + output)
    torch.testing.assert_close(encoder(), torch.stack(rows), rtol=1e-5, atol=1e-6)


def test_per_token_networks_start_different_for_every_token():
    encoder = make_encoder(encoder_shared=False)
    with torch.no_grad():
        encoder.embedding.weight[:] = encoder.embedding.weight[0]
    rows = encoder().detach()
    assert len({tuple(row.tolist()) for row in rows}) == len(rows)


@pytest.mark.parametrize("part", ("weight", "bias"))
def test_per_token_linear_starts_with_the_distribution_of_separate_linears(part):
    tokens, width, hidden = 200, 16, 32
    found = getattr(PerTokenLinear(tokens, width, hidden), part).detach()
    expected = torch.stack([getattr(nn.Linear(width, hidden), part).detach() for _ in range(tokens)])
    assert found.shape == (expected.mT.shape if part == "weight" else expected.shape)
    bound = 1 / math.sqrt(width)
    assert 0.99 * bound < found.abs().max() <= bound
    # Uniform in ±b has variance b²/3; the quantiles of the two samples agree, all tokens alike.
    assert found.var().item() == pytest.approx(bound**2 / 3, rel=0.05)
    assert found.mean().abs() < 0.03 * bound
    steps = torch.linspace(0.05, 0.95, 19)
    sample, other = (x.flatten()[: 2**16].quantile(steps) for x in (found, expected))
    assert (sample - other).abs().max() < 0.06 * bound
    deviations = found.flatten(1).std(dim=1)
    assert deviations.min() > 0.6 * bound / math.sqrt(3) and deviations.max() < 1.4 * bound / math.sqrt(3)


def test_per_token_layer_norm_starts_as_separate_layer_norms():
    inputs = torch.randn(5, WIDTH) * 3 + 1
    torch.testing.assert_close(PerTokenLayerNorm(5, WIDTH)(inputs), nn.LayerNorm(WIDTH)(inputs))


def test_weights_are_float32_on_the_cpu_whatever_the_default_type():
    torch.set_default_dtype(torch.bfloat16)
    try:
        network = build_network(make_config(token_dim=WIDTH), seed=0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {(p.dtype, p.device.type) for p in network.parameters()} == {(torch.float32, "cpu")}


# --- dropout --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", CONFIGURATIONS[:-2], ids=label)
def test_dropout_acts_in_training_only(options):
    encoder, without = make_encoder(encoder_dropout=0.5, **options), make_encoder(**options)
    without.load_state_dict(encoder.state_dict())
    assert not torch.equal(encoder.train()(), encoder())
    assert torch.equal(encoder.eval()(), without())


@pytest.mark.parametrize("kind", KINDS)
def test_without_dropout_training_and_evaluation_agree(kind):
    encoder = make_encoder(encoder_reparameterization_type=kind)
    assert torch.equal(encoder.train()(), encoder.eval()())


def test_dropout_keeps_the_skip():
    encoder = make_encoder(encoder_dropout=0.9, encoder_layer_norm=False).train()
    assert (encoder() == encoder.embedding.weight).any()
    assert (encoder() != encoder.embedding.weight).any()


# --- activations ----------------------------------------------------------------------------------------------


def activation_names():
    from transformers.activations import ACT2CLS

    return sorted(ACT2CLS)


@pytest.mark.parametrize("name", activation_names())
def test_every_activation_of_transformers_runs_and_trains(name):
    from transformers.activations import get_activation

    encoder = make_encoder(encoder_activation=name)
    network = encoder.network
    hidden = get_activation(name).float()(network.down(encoder.embedding.weight))
    expected = encoder.embedding.weight + network.norm(network.up(hidden))
    torch.testing.assert_close(encoder(), expected, rtol=1e-5, atol=1e-6)
    (encoder() * torch.randn(4, WIDTH)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize(
    "name",
    ("prelu", pytest.param("xielu", marks=skip_before((5, 10), "xielu is missing or cannot be built without data"))),
)
def test_the_weights_of_an_activation_are_trained_and_saved_with_the_network(name, tmp_path):
    model = get_peft_model(tiny_t5(), make_config(encoder_activation=name))
    weights = [p for n, p in model.named_parameters() if ".activation." in n and p.requires_grad]
    assert weights
    with torch.no_grad():
        for weight in weights:
            weight.add_(0.25)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_t5(), tmp_path)
    expected = model.prompt_encoder.state_dict()
    for leaf, tensor in loaded.prompt_encoder.state_dict().items():
        assert torch.equal(tensor, expected[leaf]), leaf


# --- networks of the user's own -------------------------------------------------------------------------------


def test_a_network_of_the_users_own_works_from_training_to_loading(own_names, tmp_path):
    @register_reparameterization("SCALE")
    def build_scale(config):
        return nn.Linear(config.token_dim, config.token_dim, bias=False)

    base = tiny_t5()
    model = get_peft_model(base, make_config(encoder_reparameterization_type="SCALE"))
    inputs = {"input_ids": torch.randint(3, 60, (2, 5)), "labels": torch.randint(3, 60, (2, 3))}
    model(**inputs).loss.backward()
    encoder = model.prompt_encoder["default"]
    assert all(p.grad.abs().sum() > 0 for p in encoder.parameters())
    torch.optim.SGD(encoder.parameters(), lr=0.1).step()
    raw = encoder.embedding.weight
    assert torch.equal(encoder(), raw + raw @ encoder.network.weight.T)

    expected = model.eval()(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_t5().eval(), tmp_path)
    loaded.base_model.load_state_dict(base.state_dict())
    assert torch.equal(loaded(**inputs).logits, expected)
    assert torch.equal(loaded.prompt_encoder["default"].network.weight, encoder.network.weight)


def test_a_network_of_the_users_own_can_be_one_per_token(own_names):
    @register_reparameterization("STACK", per_token=True)
    def build_stack(config):
        return PerTokenLinear(config.total_virtual_tokens, config.token_dim, config.token_dim)

    encoder = make_encoder(encoder_reparameterization_type="STACK", encoder_shared=False)
    assert encoder().shape == (4, WIDTH)


def test_a_network_of_the_users_own_says_what_it_does_not_read(own_names):
    @register_reparameterization("FIXED", unused_fields=("encoder_dropout",))
    def build_fixed(config):
        return nn.Linear(config.token_dim, config.token_dim)

    with pytest.warns(UserWarning, match=r"`encoder_dropout`=0\.1 has no effect with .*'FIXED'"):
        make_config(encoder_reparameterization_type="FIXED", encoder_dropout=0.1)
    with pytest.raises(ValueError, match=r"encoder_shared=False.*'FIXED'"):
        make_config(encoder_reparameterization_type="FIXED", encoder_shared=False)


def test_an_adapter_with_an_unregistered_network_is_refused_with_the_remedy(own_names, tmp_path):
    @register_reparameterization("GONE")
    def build_gone(config):
        return nn.Linear(config.token_dim, config.token_dim)

    get_peft_model(tiny_t5(), make_config(encoder_reparameterization_type="GONE")).save_pretrained(tmp_path)
    del REPARAMETERIZATIONS._entries["GONE"]
    with pytest.raises(ValueError, match=r"'GONE'.*register_reparameterization"):
        PeftModel.from_pretrained(tiny_t5(), tmp_path)


@pytest.mark.parametrize("name", ("MLP1", "NONE"))
def test_a_taken_name_is_refused_and_keeps_its_network(name, own_names):
    before = REPARAMETERIZATIONS[name]
    with pytest.raises(ValueError, match=f"{name!r} is already registered"):

        @register_reparameterization(name)
        def build_other(config):
            return nn.Identity()

    assert REPARAMETERIZATIONS[name] is before


# --- a network that does not suit the model -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"encoder_reparameterization_type": "LSTM1"}, ("LSTM1", "token_dim", "15", "even")),
        ({"encoder_reparameterization_type": "LSTM2"}, ("LSTM2", "token_dim", "15", "even")),
        ({"encoder_reparameterization_type": "LSTM"}, ("LSTM", "token_dim", "15", "even")),
        (
            {"encoder_reparameterization_type": "TRANSFORMER", "encoder_num_attention_heads": 4},
            ("encoder_num_attention_heads", "token_dim", "15", "4", "[1, 3, 5, 15]"),
        ),
    ],
)
def test_a_network_that_does_not_suit_the_models_width_is_refused_before_anything_is_built(
    options, words, monkeypatch
):
    for module in (nn.LSTM, nn.Linear):
        monkeypatch.setattr(module, "reset_parameters", lambda self: pytest.fail("a layer was built"))
    with pytest.raises(ValueError) as error:
        make_encoder(token_dim=15, **options)
    assert all(word in str(error.value) for word in words)


def test_a_network_that_does_not_suit_the_models_width_is_refused_by_get_peft_model():
    base = tiny_t5(d_model=15)
    with pytest.raises(ValueError, match="even `token_dim`, got 15"):
        get_peft_model(base, make_config(encoder_reparameterization_type="LSTM"))


@pytest.mark.parametrize("kind", KINDS)
def test_encoders_can_be_pickled(kind):
    encoder = make_encoder(encoder_reparameterization_type=kind)
    assert torch.equal(pickle.loads(pickle.dumps(encoder))(), encoder())


def test_a_network_is_built_from_the_embedding_width_of_the_model():
    model = get_peft_model(tiny_t5(), make_config())
    assert model.prompt_encoder["default"].network.down.in_features == WIDTH
