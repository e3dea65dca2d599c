"""A loaded, frozen adapter in one graph (`torch.compile`, `torch.export`) computes what it computes in eager mode."""

import pytest
import torch
from peft import PeftModel
from scenarios import SCENARIOS, outputs_of


def loaded(name, folder, **overrides):
    """A loaded adapter in eval mode, and a batch without labels."""
    scenario = SCENARIOS[name]
    scenario.model(**overrides).save_pretrained(folder)
    batch = scenario.batch(labels=False)
    if name == "t5":
        batch["decoder_input_ids"] = batch["input_ids"][:, :3]
    if name in ("t5", "llama"):
        batch["use_cache"] = False  # `torch.export` knows no caches
    return PeftModel.from_pretrained(scenario.build(), folder).eval(), batch


def compiled(model, batch):
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="eager")


def exported(model, batch, strict=True):
    with torch.no_grad():
        return torch.export.export(model, (), batch, strict=strict).module()


def exported_without_dynamo(model, batch):
    return exported(model, batch, strict=False)


def outputs(run, batch):
    with torch.no_grad():
        return next(value for key, value in run(**batch).items() if key != "loss")


GRAPHS = [compiled, exported, exported_without_dynamo]


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.__name__)
@pytest.mark.parametrize(
    "name, kind",
    [
        ("llama", "MLP1"),
        ("llama", "TRANSFORMER"),
        ("t5", "MLP1"),
        ("bert-sequence", "MLP2"),
        ("bert-token", "SUPERPOS"),
    ],
)
def test_a_loaded_adapter_in_one_graph_equals_eager(name, kind, graph, tmp_path):
    model, batch = loaded(name, tmp_path, encoder_reparameterization_type=kind)
    expected = outputs_of(model, batch)
    assert torch.equal(outputs(graph(model, batch), batch), expected)


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.__name__)
def test_an_adapter_that_never_ran_in_eager_mode(graph, tmp_path):
    model, batch = loaded("llama", tmp_path)
    ran = outputs(graph(model, batch), batch)
    assert torch.equal(ran, outputs_of(model, batch))


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.__name__)
def test_weights_that_changed_before_are_in_the_graph(graph, tmp_path):
    model, batch = loaded("llama", tmp_path)
    before = outputs_of(model, batch)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.mul_(1.5)
    ran = outputs(graph(model, batch), batch)
    assert torch.equal(ran, outputs_of(model, batch))
    assert not torch.equal(ran, before)


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.__name__)
def test_an_adapter_in_half_precision(graph, tmp_path):
    model, batch = loaded("llama", tmp_path)
    model.to(torch.bfloat16)
    ran = outputs(graph(model, batch), batch)
    assert torch.equal(ran, outputs_of(model, batch))


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.__name__)
def test_no_graph_has_the_networks_dropout(graph, tmp_path):
    model, batch = loaded("llama", tmp_path, encoder_dropout=0.5)
    expected = outputs_of(model, batch)
    model.prompt_encoder.train()
    assert torch.equal(outputs(graph(model, batch), batch), expected)


def load_weights(model, folder):
    encoder = model.prompt_encoder["default"]
    encoder.load_state_dict({name: 1.5 * tensor for name, tensor in encoder.state_dict().items()})


def write_in_place(model, folder):
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.mul_(1.5)


def train_and_freeze(model, folder):
    model.set_requires_grad("default")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(**SCENARIOS["llama"].batch()).loss.backward()
    optimizer.step()
    model.set_requires_grad("default", False)


def load_another(model, folder):
    SCENARIOS["llama"].model(prompt_tuning_init_seed=1).save_pretrained(folder)
    model.load_adapter(folder, "default")


@pytest.mark.parametrize(
    "change", [load_weights, write_in_place, train_and_freeze, load_another], ids=lambda change: change.__name__
)
def test_a_compiled_adapter_notices_new_weights(change, tmp_path):
    model, batch = loaded("llama", tmp_path / "a")
    run = compiled(model, batch)
    before = outputs(run, batch)
    change(model, tmp_path / "b")
    after = outputs(run, batch)
    assert not torch.equal(after, before)
    assert torch.equal(after, outputs_of(model, batch))
