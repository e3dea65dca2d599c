"""Merging: what is saved is what was trained, and stock PEFT loads it in a process without this package."""

import json

import numpy
import pytest
import torch
from conftest import make_config, tiny_gpt2, tiny_t5
from fresh_process import run_python
from peft import (
    LoraConfig,
    PeftModel,
    PeftModelForSeq2SeqLM,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from scenarios import SCENARIOS, fresh, outputs_of, train

from peft_residual import convert_to_prompt_tuning, get_prompt_tensor, inspect_prompt, save_as_prompt_tuning
from peft_residual.export import save_prompt_tensor
from peft_residual.storage.files import read_prompt


T5 = SCENARIOS["t5"]
P = 4

# Runs in a fresh Python: stock PEFT only.
STOCK_PROCESS = """
import sys
import torch
from peft import PeftModel
torch.set_num_threads(1)
for path in sys.argv[1:]:
    base, batch = torch.load(f"{path}/in.pt", weights_only=False)
    model = PeftModel.from_pretrained(base, f"{path}/merged").eval()
    with torch.no_grad():
        outputs = model(**batch)
    torch.save(next(v for k, v in outputs.items() if k != "loss"), f"{path}/out.pt")
assert not any(name.startswith("peft_residual") for name in sys.modules)
"""


def outputs_in_stock_process(folders):
    """Outputs of the `merged` adapter in each folder, on the base and batch of its `in.pt`."""
    run_python(STOCK_PROCESS, *folders).check_returncode()
    return [torch.load(folder / "out.pt") for folder in folders]


CASES = [(name, dtype) for name in SCENARIOS for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize("name, dtype", CASES, ids=str)
def test_live_loaded_and_merged_agree_to_the_last_bit(name, dtype, tmp_path):
    scenario = SCENARIOS[name]
    base = scenario.build().to(dtype)
    model = scenario.model(fresh(base))
    assert model.prompt_encoder["default"].embedding.weight.dtype == torch.float32
    batch = scenario.batch()
    live = outputs_of(model, batch)

    model.save_pretrained(tmp_path / "full")
    assert torch.equal(outputs_of(PeftModel.from_pretrained(fresh(base), tmp_path / "full"), batch), live)
    save_as_prompt_tuning(model, tmp_path / "merged")
    save_as_prompt_tuning(tmp_path / "full", tmp_path / "merged-from-folder")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        both = [(tmp_path / folder / file).read_bytes() for folder in ("merged", "merged-from-folder")]
        assert both[0] == both[1]
    assert torch.equal(outputs_of(model, batch), live), "saving changes nothing in the model"


def test_merged_adapters_give_the_same_in_a_process_that_never_imports_the_package(tmp_path):
    folders, expected = [], []
    for name, dtype in CASES:
        scenario, folder = SCENARIOS[name], tmp_path / f"{name}-{dtype}"
        base = scenario.build().to(dtype)
        model = scenario.model(fresh(base))
        batch = scenario.batch(labels=name in ("t5", "gpt2", "llama", "bert-sequence"))
        expected.append(outputs_of(model, batch))
        save_as_prompt_tuning(model, folder / "merged")
        torch.save((base, batch), folder / "in.pt")
        folders.append(folder)
    for (name, _), live, stock in zip(CASES, expected, outputs_in_stock_process(folders)):
        # In these tasks stock PEFT's outputs have the prompt's positions too, ours do not.
        if name in ("bert-token", "bert-question", "bert-features"):
            stock = stock[:, P:]
        assert torch.equal(stock, live), name


@pytest.mark.parametrize("kind", ["MLP1", "MLP2", "LSTM", "TRANSFORMER"])
def test_what_is_saved_does_not_depend_on_mode_or_autocast(kind):
    model = T5.model(encoder_reparameterization_type=kind, encoder_dropout=0.5)
    expected = get_peft_model_state_dict(model.eval())
    with torch.no_grad():
        assert torch.equal(expected["prompt_embeddings"], model.prompt_encoder["default"]())
    model.train()
    assert not torch.equal(expected["prompt_embeddings"], model.prompt_encoder["default"]()), "dropout is on"
    with torch.autocast("cpu", torch.bfloat16):
        for mode in (True, False):
            saved = get_peft_model_state_dict(model.train(mode))
            assert saved.keys() == expected.keys()
            assert all(torch.equal(saved[key], expected[key]) for key in saved)
        with torch.no_grad():
            live = model.eval().prompt_encoder["default"]()  # what the frozen model sees under autocast
    assert torch.equal(live, expected["prompt_embeddings"])


def test_saved_prompt_of_a_half_precision_encoder_is_the_live_one():
    model = T5.model()
    model.to(torch.bfloat16).eval()
    live = model.prompt_encoder["default"]()
    assert live.dtype == torch.float32
    assert torch.equal(get_peft_model_state_dict(model)["prompt_embeddings"], live)
    train(model, T5, steps=1)  # and it can be trained on


def test_weight_file_holds_prompt_raw_prompt_network_and_version(tmp_path):
    model = T5.model()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    encoder = model.prompt_encoder["default"]
    assert torch.equal(tensors["prompt_embeddings"], encoder())
    assert torch.equal(tensors["residual_prompt_tuning.embedding.weight"], encoder.embedding.weight)
    assert torch.equal(tensors["residual_prompt_tuning.network.down.weight"], encoder.network.down.weight)
    assert tensors["residual_prompt_tuning.format_version"].item() == 1


def test_merged_folder_is_plain_prompt_tuning(tmp_path):
    scenario = SCENARIOS["bert-sequence"]
    model = scenario.model(prompt_tuning_init_seed=3)
    save_as_prompt_tuning(model, tmp_path / "merged")
    tensors = load_file(tmp_path / "merged" / "adapter_model.safetensors")
    assert set(tensors) == {"prompt_embeddings", "base_model.classifier.weight", "base_model.classifier.bias"}
    values = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    stock = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=1).to_dict()
    assert values.keys() == stock.keys()
    assert values["peft_type"] == "PROMPT_TUNING" and values["inference_mode"] is True
    assert not model.peft_config["default"].inference_mode


def test_prompt_tensor_is_what_the_model_sees():
    model = T5.model()
    prompt = get_prompt_tensor(model)
    assert prompt.shape == (P, 16) and prompt.dtype == torch.float32 and not prompt.requires_grad
    embeds = model.word_embeddings(T5.batch()["input_ids"])
    inputs = torch.cat([prompt.expand(2, -1, -1), embeds], dim=1)
    mask = torch.cat([torch.ones(2, P), T5.batch()["attention_mask"]], dim=1)
    with torch.no_grad():
        expected = model.base_model(inputs_embeds=inputs, attention_mask=mask, labels=T5.batch()["labels"]).logits
    assert torch.equal(outputs_of(model, T5.batch()), expected)
    model.add_adapter("plain", PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3))
    assert get_prompt_tensor(model, "plain").shape[1] == 16


def test_merged_tensors_take_the_prompt_and_less_than_a_kilobyte(tmp_path):
    for rows in (4, 100):
        save_as_prompt_tuning(T5.model(num_virtual_tokens=rows, prompt_tuning_init="RANDOM"), tmp_path / str(rows))
        size = (tmp_path / str(rows) / "adapter_model.safetensors").stat().st_size
        assert rows * 16 * 4 < size < rows * 16 * 4 + 1024


def read_pt(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    ("suffix", "read"),
    [
        (".safetensors", lambda path: load_file(path)["prompt_embeddings"]),
        (".npy", lambda path: torch.from_numpy(numpy.load(path))),
        (".pt", read_pt),
    ],
)
def test_prompt_is_saved_as_a_file_from_a_model_or_a_folder(suffix, read, tmp_path):
    model = T5.model()
    model.save_pretrained(tmp_path / "full")
    out = save_prompt_tensor(model, tmp_path / f"prompt{suffix}")
    assert torch.equal(read(out), get_prompt_tensor(model)) and read(out).dtype == torch.float32
    assert out.stat().st_size < P * 16 * 4 + 2048
    from_folder = save_prompt_tensor(tmp_path / "full", tmp_path / f"again{suffix}")
    assert torch.equal(read(from_folder), read(out))
    if suffix != ".pt":  # a pickle, which this package does not read
        assert torch.equal(read_prompt(out)[0], read(out)), "a later prompt can start from it"


def test_rows_that_no_model_sees_are_left_out(tmp_path):
    config = PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=50)
    model = get_peft_model(tiny_t5(), config)  # which has 50 more rows for the decoder
    model.save_pretrained(tmp_path / "plain")
    for source, name in ((model, "model.pt"), (tmp_path / "plain", "folder.pt")):
        out = save_prompt_tensor(source, tmp_path / name)
        assert torch.equal(read_pt(out), get_prompt_tensor(model)[:50])
        assert out.stat().st_size < 50 * 16 * 4 + 2048, "nor are they in the file"


def test_prompt_files_are_replaced_only_when_told_to(tmp_path):
    model = T5.model()
    out = save_prompt_tensor(model, tmp_path / "prompt.npy")
    before = out.read_bytes()
    train(model, T5, steps=1)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_prompt_tensor(model, out)
    assert out.read_bytes() == before
    save_prompt_tensor(model, out, overwrite=True)
    assert out.read_bytes() != before
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(FileExistsError, match="is a folder"):
        save_prompt_tensor(model, tmp_path / "folder.npy", overwrite=True)
    with pytest.raises(ValueError, match=r"prompt\.bin' must end in one of \['\.npy', '\.pt', '\.safetensors'\]"):
        save_prompt_tensor(model, tmp_path / "prompt.bin")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.npy", "prompt.npy"]


def test_conversion_in_place_drops_the_network_and_keeps_the_rest(tmp_path):
    model = T5.model()
    live = outputs_of(model, T5.batch())
    model.add_adapter("other", make_config())
    state = torch.get_rng_state()
    convert_to_prompt_tuning(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(outputs_of(model, T5.batch()), live)
    assert type(model.peft_config["default"]) is PromptTuningConfig
    assert [name for name, _ in model.prompt_encoder["default"].named_parameters()] == ["embedding.weight"]
    assert model.get_nb_trainable_parameters()[0] == P * 16
    train(model, T5, steps=1)
    assert not torch.equal(outputs_of(model, T5.batch()), live)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    loaded = PeftModel.from_pretrained(fresh(model.base_model), tmp_path)
    assert type(loaded) is PeftModelForSeq2SeqLM
    assert torch.equal(outputs_of(loaded, T5.batch()), outputs_of(model, T5.batch()))


def test_existing_folder_is_replaced_only_when_told_to(tmp_path):
    model = T5.model()
    out = tmp_path / "merged"
    save_as_prompt_tuning(model, out)
    before = (out / "adapter_model.safetensors").read_bytes()
    train(model, T5, steps=1)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_as_prompt_tuning(model, out)
    assert (out / "adapter_model.safetensors").read_bytes() == before
    save_as_prompt_tuning(model, out, overwrite=True)
    assert (out / "adapter_model.safetensors").read_bytes() != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged"], "nothing is left beside it"


def test_a_folder_that_holds_no_adapter_is_never_replaced(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(FileExistsError, match=r"has no adapter_config\.json"):
        save_as_prompt_tuning(T5.model(), tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "precious"
    out = tmp_path / "out"
    save_as_prompt_tuning(T5.model(), out)
    monkeypatch.chdir(out)
    save_as_prompt_tuning(T5.model(), ".", overwrite=True)
    assert (out / "adapter_config.json").exists()


def test_failing_write_leaves_the_old_folder(tmp_path, monkeypatch):
    from peft_residual.export import prompt_tuning as export

    model, out = T5.model(), tmp_path / "merged"
    save_as_prompt_tuning(model, out)
    before = (out / "adapter_model.safetensors").read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(export.json, "dumps", fail)
    with pytest.raises(OSError, match="disk full"):
        save_as_prompt_tuning(model, out, overwrite=True)
    assert (out / "adapter_model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged"]


def test_wrong_sources_are_refused_before_anything_is_written(tmp_path):
    out = tmp_path / "out"
    plain = get_peft_model(tiny_t5(), PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3))
    plain.save_pretrained(tmp_path / "plain")
    lora = get_peft_model(tiny_t5(), LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q"]))
    cases = [
        (lambda: save_as_prompt_tuning(plain, out), "PromptTuningConfig, expected ResidualPromptTuningConfig"),
        (lambda: save_as_prompt_tuning(tmp_path / "plain", out), "type 'PROMPT_TUNING', expected 'RESIDUAL"),
        (lambda: save_as_prompt_tuning(tmp_path / "missing", out), "neither a folder nor the id of a Hub repository"),
        (lambda: save_as_prompt_tuning(T5.model(), out, adapter_name="x"), r"no adapter 'x'.*\['default'\]"),
        (lambda: convert_to_prompt_tuning(lora), "LoraConfig"),
        (lambda: get_prompt_tensor(lora), "LoraConfig"),
        (lambda: get_prompt_tensor(tiny_t5()), "must be a PeftModel"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    assert not out.exists()


def test_half_a_checkpoint_is_refused_by_name(tmp_path):
    T5.model().save_pretrained(tmp_path / "full")
    weights = tmp_path / "full" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for size in (0, 4, 60, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors.* is damaged"):
            save_as_prompt_tuning(tmp_path / "full", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- which adapter ---------------------------------------------------------------------------------------------------


def test_no_name_means_the_active_adapter(tmp_path):
    model = get_peft_model(tiny_gpt2(), make_config(task_type="CAUSAL_LM"), adapter_name="task")
    model.add_adapter("other", make_config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    for name, length in (("task", 4), ("other", 3)):
        model.set_adapter(name)
        expected = model.get_prompt_embedding_to_save(name)
        assert len(expected) == length and torch.equal(get_prompt_tensor(model), expected)
        merged = load_file(save_as_prompt_tuning(model, tmp_path / name) / "adapter_model.safetensors")
        tensor = load_file(save_prompt_tensor(model, tmp_path / f"{name}.safetensors"))
        assert torch.equal(merged["prompt_embeddings"], expected) and torch.equal(
            tensor["prompt_embeddings"], expected
        )
        assert inspect_prompt(model).name == name
    convert_to_prompt_tuning(model)
    assert model.peft_config["other"].peft_type == "PROMPT_TUNING"
    assert model.peft_config["task"].peft_type == "RESIDUAL_PROMPT_TUNING"


def test_without_one_active_adapter_a_name_is_needed():
    model = get_peft_model(tiny_gpt2(), make_config(task_type="CAUSAL_LM"), adapter_name="task")
    model.delete_adapter("task")
    with pytest.raises(ValueError, match=r"`adapter_name` is None, and the active adapter is \[\]"):
        get_prompt_tensor(model)


def test_an_adapter_in_a_subfolder_is_exported_and_inspected(tmp_path):
    model = get_peft_model(tiny_gpt2(), make_config(task_type="CAUSAL_LM"), adapter_name="task")
    model.save_pretrained(tmp_path / "saved")
    expected = model.get_prompt_embedding_to_save("task")
    merged = save_as_prompt_tuning(tmp_path / "saved", tmp_path / "merged", subfolder="task")
    assert torch.equal(load_file(merged / "adapter_model.safetensors")["prompt_embeddings"], expected)
    file = save_prompt_tensor(tmp_path / "saved", tmp_path / "prompt.safetensors", subfolder="task")
    assert torch.equal(load_file(file)["prompt_embeddings"], expected)
    assert torch.equal(inspect_prompt(tmp_path / "saved", subfolder="task").projected, expected)


def test_a_damaged_adapter_is_not_merged(tmp_path):
    get_peft_model(tiny_gpt2(), make_config(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "saved")
    weights = tmp_path / "saved" / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors["prompt_embeddings"] = tensors["prompt_embeddings"] + 1
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="do not result in its own projected prompt"):
        save_as_prompt_tuning(tmp_path / "saved", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
