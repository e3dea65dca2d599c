"""The pages of `docs/`: their code and both sides of their diffs run, their tables of fields match the configs."""

import ast
import copy
import importlib
import re
import shlex
import sys
import textwrap
import types
from dataclasses import fields
from pathlib import Path

import peft
import pytest
import torch
from conftest import make_config, make_encoder, tiny_bert, tiny_gpt2, tiny_llama
from fresh_process import run_python
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from scenarios import SCENARIOS, outputs_of
from text_tokenizers import bytes_behind_a_start_token
from torch.distributed.fsdp import fully_shard
from trainers import Rows, arguments
from transformers import Trainer

import peft_residual
from peft_residual import ResidualPromptTuningConfig, get_prompt_tensor, register_reparameterization
from peft_residual.registry import INITIALIZATIONS, REPARAMETERIZATIONS
from peft_residual_cli import main


ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES]


def blocks(page, *languages):
    """The code blocks of a page, in order, also those inside of lists."""
    found = re.findall(r"^( *)```(\w+)\n(.*?)^\1```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [(language, textwrap.dedent(code)) for _, language, code in found if language in languages]


def side(diff, sign):
    """What a diff says before (`-`) or after (`+`)."""
    return "\n".join(line[1:] for line in diff.splitlines() if line[0] in (sign, " "))


@pytest.fixture
def run_page(own_names, tmp_path, monkeypatch):
    """Run the Python blocks of a page and both sides of its diffs, in order, with these names; return all names."""
    monkeypatch.chdir(tmp_path)

    def run(name, **names):
        ours = {exported: getattr(peft_residual, exported) for exported in peft_residual.__all__}
        namespace = {"torch": torch, "Trainer": Trainer, **vars(peft), **ours, **names}
        found = blocks(DOCS / name, "python", "diff")
        assert found
        for language, code in found:
            for text in [code] if language == "python" else [side(code, "-"), side(code, "+")]:
                exec(compile(text, f"{name}: {text}", "exec"), namespace)
        return namespace

    return run


def block_with(page, text):
    """The only Python block of a page that contains a text."""
    (code,) = [code for _, code in blocks(DOCS / page, "python") if text in code]
    return code


# --- pages ----------------------------------------------------------------------------------------------------------


def test_configuration(run_page):
    names = run_page("configuration.md", tokenizer=bytes_behind_a_start_token())
    assert names["config"].prompt_tuning_init_token_ids == names["token_ids"] != []


def test_the_table_of_fields_has_the_defaults_and_leaves_none_out():
    config = ResidualPromptTuningConfig(task_type="SEQ_2_SEQ_LM")
    text = (DOCS / "configuration.md").read_text().partition("## Networks")[0]
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ([^|]+) \|", text, flags=re.MULTILINE)
    seen = set()
    for names, values in rows:
        names = re.findall(r"`(\w+)`", names)
        values = [value.strip("` ") for value in values.split(",")]
        for name, value in zip(names, values * len(names) if len(values) == 1 else values, strict=True):
            assert repr(getattr(config, name)) == value.replace('"', "'"), name
            seen.add(name)
    own = {f.name for f in fields(config)} - {f.name for f in fields(peft.PromptTuningConfig)}
    assert own - seen == set(), "fields that the table leaves out"


def test_every_built_in_name_is_in_a_table():
    text = (DOCS / "configuration.md").read_text()
    built_in = [
        name
        for registry in (REPARAMETERIZATIONS, INITIALIZATIONS)
        for name in registry.names()
        if registry[name].builder.__module__.startswith("peft_residual.")
    ]
    assert len(built_in) == 14
    assert [name for name in built_in if not re.search(rf'^\| .*`"{name}"`.* \|', text, flags=re.MULTILINE)] == []


def test_training(run_page, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval (pip install lm-eval)")
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda model, tasks: tasks)  # whose data are on the Hub
    scenario = SCENARIOS["gpt2"]
    base = scenario.build()
    model = get_peft_model(copy.deepcopy(base), make_config(task_type="CAUSAL_LM"))
    model.save_pretrained("adapter")
    factory = (peft_residual.ResidualOptimizerFactory, {"learning_rate": 0.3})
    args = arguments(tmp_path / "out", max_steps=1, save_steps=1)
    Trainer(model, args, train_dataset=Rows(scenario), optimizer_cls_and_kwargs=factory).train()
    names = run_page(
        "training.md",
        model=model,
        base=base,
        tokenizer=bytes_behind_a_start_token(),
        args=arguments(tmp_path / "out", max_steps=2),
        rows=Rows(scenario),
    )
    assert names["trainer"].state.global_step == 2 and names["model"].prompt_encoder["default"].is_trainable


def test_troubleshooting(run_page, tmp_path):
    model = get_peft_model(tiny_llama(vocab_size=264, attention_dropout=0.5), make_config(task_type="CAUSAL_LM"))
    names = run_page(
        "troubleshooting.md",
        model=model,
        args=arguments(tmp_path),
        tokenizer=bytes_behind_a_start_token(),
        optimizer=peft_residual.create_residual_optimizer(model),
    )
    assert names["finding"].remedy
    assert names["difference"] < 1e-5 and names["model"].peft_config["default"].peft_type == "PROMPT_TUNING"


def test_after_training(run_page, monkeypatch):
    base, tokenizer = tiny_llama(vocab_size=264, max_position_embeddings=128), bytes_behind_a_start_token()
    base.generation_config.eos_token_id = None
    config = make_config(task_type="CAUSAL_LM", num_virtual_tokens=10)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    for folder in ("adapter", "other-adapter"):
        model.save_pretrained(folder)
    batch = tokenizer(["the food was great"] * 3, return_tensors="pt")
    sent = []
    monkeypatch.setitem(sys.modules, "requests", types.SimpleNamespace(post=lambda url, json: sent.append(json)))
    # The Hub's part is in `test_hub.py`; here a folder of the id's name stands in for it.
    monkeypatch.setattr(PeftModel, "push_to_hub", lambda self, repo_id: self.save_pretrained(repo_id))
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, **kwargs: None)
    names = run_page(
        "after-training.md", model=model, base=base, tokenizer=tokenizer, batch=batch, url="http://localhost"
    )
    (prefix,) = re.findall(r"# '<task_0><task_1>\.\.\.(<task_9><s>)'", (DOCS / "after-training.md").read_text())
    assert names["export"].prefixes["default"].endswith(prefix)
    assert "input_embeds" in sent[0] and Path("prompt.png").stat().st_size > 0


def test_training_at_scale(run_page, tmp_path):
    model = get_peft_model(tiny_llama(), make_config(task_type="CAUSAL_LM"))
    blocks_of_it = list(model.base_model.model.layers)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        names = run_page(
            "training-at-scale.md", model=model, blocks_of_the_base_model=blocks_of_it, fully_shard=fully_shard
        )
        assert all(hasattr(p, "full_tensor") for group in names["optimizer"].param_groups for p in group["params"])
    finally:
        torch.distributed.destroy_process_group()


def test_an_adapter_for_t5_base_has_as_many_weights_as_the_page_says():
    (millions,) = re.findall(r"10 tokens has ([\d.]+) million weights", (DOCS / "training-at-scale.md").read_text())
    defaults = {"num_virtual_tokens": 10, "encoder_hidden_size": 800, "token_dim": 768}
    weights = sum(
        parameter.numel() for parameter in make_encoder(**defaults, prompt_tuning_init="RANDOM").parameters()
    )
    config = ResidualPromptTuningConfig(task_type="SEQ_2_SEQ_LM")
    assert (config.num_virtual_tokens, config.encoder_hidden_size) == (10, 800)
    assert f"{weights / 1e6:.1f}" == millions


@pytest.mark.parametrize("config_class", (peft.PromptTuningConfig, peft.PromptEncoderConfig))
def test_migrating(config_class, run_page, tmp_path):
    scenario = SCENARIOS["gpt2"]
    base = scenario.build()
    theirs = get_peft_model(copy.deepcopy(base), config_class(task_type="CAUSAL_LM", num_virtual_tokens=20)).eval()
    theirs.save_pretrained("their-adapter")
    get_peft_model(tiny_bert(), config_class(task_type="SEQ_CLS", num_virtual_tokens=4)).save_pretrained(
        "their-classifier"
    )
    ours = get_peft_model(copy.deepcopy(base), make_config(task_type="CAUSAL_LM"))
    ours.save_pretrained("adapter")
    classifier = tiny_bert()
    untrained = classifier.classifier.weight.clone()
    names = run_page(
        "migrating.md",
        base=base,
        model=ours,
        args=arguments(tmp_path / "out", max_steps=2, save_steps=1),
        rows=Rows(scenario),
        classifier=classifier,
        load_file=load_file,
    )
    assert names["trainer"].state.global_step == 3
    assert torch.equal(names["saved"]["base_model.classifier.weight"], classifier.classifier.weight)
    assert not torch.equal(untrained, classifier.classifier.weight)
    # From their prompt, with a network that adds nothing at first, merged and back in PEFT: nothing has changed.
    assert type(names["model"].peft_config["default"]) is peft.PromptTuningConfig
    batch = scenario.batch(labels=False)
    assert torch.allclose(outputs_of(names["model"], batch), outputs_of(theirs, batch), rtol=0, atol=1e-6)


def test_a_fresh_network_adds_rows_of_the_length_that_the_page_says(tmp_path):
    theirs = get_peft_model(tiny_gpt2(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    theirs.save_pretrained(tmp_path)
    start = {"prompt_tuning_init": "PROMPT", "prompt_tuning_init_state_dict_path": str(tmp_path)}
    model = get_peft_model(tiny_gpt2(), make_config(task_type="CAUSAL_LM", encoder_hidden_size=800, **start))
    raw = model.prompt_encoder["default"].embedding.weight
    assert torch.equal(raw, theirs.prompt_encoder["default"].embedding.weight)
    added = (get_prompt_tensor(model) - raw).norm(dim=1)
    assert torch.allclose(added, torch.full((4,), raw.shape[1] ** 0.5), rtol=1e-3)


def test_the_tables_of_fields_are_those_of_the_configs():
    defaults = {}
    for config_class in (peft.PromptEncoderConfig, peft.PromptTuningConfig, ResidualPromptTuningConfig):
        defaults[config_class] = {f.name: str(getattr(f.default, "value", f.default)) for f in fields(config_class)}
    p_tuning, prompt_tuning, ours = defaults.values()
    theirs = {**p_tuning, **prompt_tuning}
    row = r"^\| (`\w+`(?:, `\w+`)*) \| (`\S+`|no such field) \| (`\S+`|no such field) \|"
    seen = set()
    for names, *said in re.findall(row, (DOCS / "migrating.md").read_text(), flags=re.MULTILINE):
        for name in re.findall(r"`(\w+)`", names):
            found = [f"`{known[name]}`" if name in known else "no such field" for known in (theirs, ours)]
            assert said == found, name
            seen.add(name)
    assert theirs.keys() - seen == set(), "fields that the tables leave out"


def test_extending(run_page, tmp_path, monkeypatch):
    scenario = SCENARIOS["gpt2"]
    base = scenario.build()
    model = get_peft_model(copy.deepcopy(base), make_config(task_type="CAUSAL_LM"))
    model.save_pretrained("adapter")
    args = arguments(tmp_path / "out")
    monkeypatch.setitem(sys.modules, "my_networks", types.ModuleType("my_networks"))
    names = run_page("extending.md", base=base, model=model, args=args, rows=Rows(scenario), Trainer=Trainer)
    names["test_my_network"](base, tmp_path / "test")
    for name, shared in (("MATRIX", True), ("MATRIX", False), ("DEEP_2", True), ("DEEP_4", True)):
        options = {"encoder_reparameterization_type": name, "encoder_shared": shared, "encoder_hidden_size": 800}
        assert make_encoder(**options, prompt_tuning_init="MEAN_OF_WORDS")().shape == (4, 16)
    assert len(make_encoder(encoder_reparameterization_type="DEEP_4").network) == 4


def test_the_network_of_the_page_is_that_of_pefts_p_tuning(own_names):
    exec(block_with("extending.md", "def p_tuning_mlp"), {})
    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4, "encoder_hidden_size": 8, "token_dim": 16}
    theirs = peft.PromptEncoder(peft.PromptEncoderConfig(**settings, num_transformer_submodules=1))
    ours = make_encoder(**settings, encoder_reparameterization_type="P_TUNING_MLP", encoder_residual=False)
    ours.network.load_state_dict(theirs.mlp_head.state_dict())
    ours.embedding.load_state_dict(theirs.embedding.state_dict())
    assert torch.equal(ours(), theirs(torch.arange(4)))


def test_random_numbers_that_are_not_saved_are_refused_in_another_process(own_names, tmp_path):
    @register_reparameterization("UNSAVED")
    class Unsaved(torch.nn.Linear):
        def __init__(self, config):
            super().__init__(config.token_dim, config.token_dim)
            self.register_buffer("offset", torch.randn(config.token_dim), persistent=False)

        def forward(self, prompt):
            return super().forward(prompt) + self.offset

    config = make_config(task_type="CAUSAL_LM", encoder_reparameterization_type="UNSAVED")
    get_peft_model(tiny_gpt2(), config).save_pretrained(tmp_path)
    torch.manual_seed(1)  # as another process has another seed
    with pytest.raises(ValueError, match="do not result in its own projected prompt"):
        PeftModel.from_pretrained(tiny_gpt2(), tmp_path)


def test_the_command_line_knows_a_network_whose_module_is_imported_for_it(own_names, tmp_path):
    network = block_with("extending.md", "def p_tuning_mlp")
    (command,) = re.findall(r'^python -c "(.+)" check adapter$', (DOCS / "extending.md").read_text(), re.MULTILINE)
    (tmp_path / "my_networks.py").write_text(network)
    exec(network, {})
    config = make_config(task_type="CAUSAL_LM", encoder_reparameterization_type="P_TUNING_MLP")
    get_peft_model(tiny_gpt2(), config).save_pretrained(tmp_path / "adapter")
    process = run_python(command, "check", "adapter", cwd=tmp_path)
    assert process.returncode == 0 and "network: P_TUNING_MLP" in process.stdout, process.stderr


# --- all pages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_code_of_every_page_compiles_and_imports_what_there_is(page):
    for _, code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("peft", "peft_residual"):
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_the_index_names_every_page_once():
    linked = re.findall(r"\]\(([\w-]+\.md)\)", (DOCS / "README.md").read_text())
    assert sorted([*linked, "README.md"]) == [page.name for page in PAGES]


def anchors(document):
    """How a heading is linked to."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_to_headings_lead_to_one(document):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", document.read_text()):
        if not target.startswith("http"):
            assert anchor in anchors((document.parent / target) if target else document), f"{target}#{anchor}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(document):
    for path in re.findall(r"\b(?:examples|tests|peft_residual|docs)/[\w/]+\.(?:py|yaml|md)\b", document.read_text()):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_command_lines_are_right(page, capsys, tmp_path, monkeypatch):
    """There is no such adapter here, so they end with an error message and not with the usage."""
    monkeypatch.chdir(tmp_path)
    for command in re.findall(r"(?:^|`)peft-residual (\w+ [^`\n]+)", page.read_text(), re.MULTILINE):
        assert main(shlex.split(command, comments=True)) == 1, command
        assert "usage" not in capsys.readouterr().err
