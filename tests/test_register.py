"""The plug: importing the package changes nothing for other methods, and is safe however it is done."""

import copy
import json
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from conftest import make_config, tiny_t5
from fresh_process import run_python
from peft import PeftModelForSeq2SeqLM, PromptEmbedding, PromptTuningConfig, get_peft_model

from peft_residual import ResidualPromptEncoder


def last_printed(result):
    """What a process printed last, as JSON."""
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.strip().splitlines()[-1])


STOCK_METHODS = """
import hashlib, json, os, sys, tempfile
os.environ["HF_HUB_OFFLINE"] = "1"
if sys.argv[1] == "with":
    import peft_residual
import torch
from peft import *
from transformers import T5Config, T5ForConditionalGeneration
torch.set_num_threads(1)

def digest(tensors):
    pairs = sorted((k, t.detach().float().contiguous().numpy().tobytes()) for k, t in tensors.items())
    return hashlib.sha256(b"".join(k.encode() + data for k, data in pairs)).hexdigest()

report = []
configs = [
    PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4),
    PromptEncoderConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4, encoder_hidden_size=8),
    LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"], init_lora_weights=False),
]
for config in configs:
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
                                               decoder_start_token_id=0))
    model = get_peft_model(base, config, adapter_name="dense")
    ids = torch.arange(3, 13).view(2, 5)
    loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.eval()
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).logits
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(base, folder + "/dense")
        config_text = open(folder + "/dense/adapter_config.json").read()
    report.append([
        type(model).__name__, type(model).__module__, [type(m).__name__ for m in model.modules()], digest(gradients),
        digest({"logits": logits, "loss": loss[None]}), digest(get_peft_model_state_dict(model, adapter_name="dense")),
        digest(loaded.state_dict()), model.get_nb_trainable_parameters(), config_text, type(loaded).__name__,
    ])
print(json.dumps(report))
"""


def test_other_methods_are_the_same_with_and_without_the_package():
    # Not in a fork of a process that has imported PEFT: here the package is imported first.
    command = [sys.executable, "-W", "ignore", "-c", STOCK_METHODS, "with"]
    env = {**os.environ, "PYTHONHASHSEED": "0"}  # PEFT writes sets in their order
    with_package = subprocess.run(command, capture_output=True, text=True, env=env)
    assert last_printed(with_package) == last_printed(run_python(STOCK_METHODS, "without"))


def test_plain_prompt_tuning_keeps_its_classes():
    model = get_peft_model(tiny_t5(), PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3))
    assert type(model) is PeftModelForSeq2SeqLM
    assert type(model.prompt_encoder["default"]) is PromptEmbedding
    residual = get_peft_model(tiny_t5(), make_config())
    assert isinstance(residual, PeftModelForSeq2SeqLM)
    assert type(residual.prompt_encoder["default"]) is ResidualPromptEncoder


def test_importing_again_and_reloading_change_nothing_more():
    code = """
    import importlib, json, sys
    import torch, peft
    from peft import PeftModel, get_peft_model
    import peft_residual
    from peft_residual.peft_model import register as registration
    before = (dict(peft.PEFT_TYPE_TO_TUNER_MAPPING), PeftModel.add_adapter, PeftModel.load_adapter)
    peft_residual.register()
    importlib.reload(registration).register()
    importlib.reload(peft_residual)
    same = before == (dict(peft.PEFT_TYPE_TO_TUNER_MAPPING), PeftModel.add_adapter, PeftModel.load_adapter)
    old_config = peft_residual.ResidualPromptTuningConfig
    for name in [name for name in sys.modules if name.startswith("peft_residual")]:
        del sys.modules[name]
    import peft_residual  # as if it were imported for the first time: new classes
    sys.path.insert(0, "tests")
    from conftest import tiny_t5
    kinds = []
    for config in (old_config, peft_residual.ResidualPromptTuningConfig):
        model = get_peft_model(tiny_t5(), config(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3))
        state = peft.get_peft_model_state_dict(model)
        kinds.append([type(model.prompt_encoder["default"]).__name__, len(state)])
    print(json.dumps([same, kinds]))
    """
    assert last_printed(run_python(code)) == [True, [["ResidualPromptEncoder", 9]] * 2]


def test_six_threads_build_models_of_both_kinds():
    wrong, barrier = [], threading.Barrier(6)

    def build(index):
        barrier.wait()
        for _ in range(5):
            plain = index % 2
            config = PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3) if plain else make_config()
            try:
                model = get_peft_model(tiny_t5(), config)
                expected = PromptEmbedding if plain else ResidualPromptEncoder
                if type(model.prompt_encoder["default"]) is not expected:
                    wrong.append(type(model.prompt_encoder["default"]))
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=build, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    "breakage, missing",
    [
        (
            "del tuners_utils.BasePromptEncoder._remap_adapter_state_dict_for_load",
            "_remap_adapter_state_dict_for_load",
        ),
        ("del tuners_utils.BasePromptEncoder", "BasePromptEncoder._get_adapter_state_dict"),
        ("del peft.PeftModel.load_adapter", "PeftModel.load_adapter"),
        ("del peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.PROMPT_TUNING]", "PEFT_TYPE_TO_TUNER_MAPPING"),
    ],
)
def test_a_peft_without_the_hooks_is_refused_at_import(breakage, missing):
    code = f"""
    import json
    import peft
    from peft.tuners import tuners_utils
    {breakage}
    try:
        import peft_residual
        message = "imported"
    except ImportError as error:
        message = str(error)
    print(json.dumps(message))
    """
    message = last_printed(run_python(code))
    assert missing in message and "pip install 'peft>=0.21.2,<0.22'" in message


def test_global_random_state_is_not_touched_by_building():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    base = tiny_t5()
    torch.manual_seed(3)
    get_peft_model(base, make_config())
    assert torch.equal(torch.rand(4), expected)


def test_the_word_embeddings_are_registered_once():
    """Under a second name, as in PEFT, FSDP2 cannot load its own checkpoints."""
    model = get_peft_model(tiny_t5(), make_config())
    model.add_adapter("other", make_config())
    assert not any(name.startswith("word_embeddings") for name in model.state_dict())
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.word_embeddings.weight is twin.base_model.encoder.embed_tokens.weight
