"""Write the adapters of this folder and what they compute: `PYTHONPATH=CHECKOUT python write.py`.

They were written by commit 8e7af94 of version 0.1.0. Run it again only to add adapters for a new checkpoint format:
what has been released must load as it was written. `test_old_checkpoints.py` takes the base models and the batch from
here.
"""

import json
import platform
import re
from pathlib import Path

import torch
import transformers


HERE = Path(__file__).parent
SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 32}
SIZES |= {"num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
ADAPTERS = {
    # Base model, task, fields of the config.
    "bert-mlp1": ("bert", "SEQ_CLS", {"encoder_reparameterization_type": "MLP1", "encoder_hidden_size": 8}),
    "bert-mlp2-per-token": (
        "bert",
        "SEQ_CLS",
        {"encoder_reparameterization_type": "MLP2", "encoder_hidden_size": 4, "encoder_shared": False},
    ),
    "llama-superpos": (
        "llama",
        "CAUSAL_LM",
        {"encoder_reparameterization_type": "SUPERPOS", "encoder_hidden_size": 10},
    ),
    "llama-lstm": (
        "llama",
        "CAUSAL_LM",
        {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 8, "prompt_tuning_init": "COMMON_VOCAB"},
    ),
    "llama-transformer-with-norm": (
        "llama",
        "CAUSAL_LM",
        {"encoder_reparameterization_type": "TRANSFORMER", "encoder_hidden_size": 8, "modules_to_save": ["norm"]},
    ),
}
MERGED = "llama-lstm"
INIT_VOCAB_SIZE = 24


def build_base(name):
    """A tiny base model whose weights depend on torch's generator only, not on how transformers initializes models."""
    if name == "bert":
        config = transformers.BertConfig(**SIZES, num_labels=3)
        model = transformers.BertForSequenceClassification(config)
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=1))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.normal_(std=0.3, generator=generator)
    return model.eval()


def batch():
    ids = torch.tensor([[3, 9, 27, 5, 15], [7, 21, 31, 2, 6]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits(model):
    with torch.no_grad():
        return model.eval()(**batch()).logits


def machine():
    """What the last bits of a result depend on."""
    found = (
        re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if platform.system() == "Linux"
        else None
    )
    return {
        "torch": torch.__version__,
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "processor": found.group(1) if found else platform.processor(),
    }


def main():
    from peft import get_peft_model
    from safetensors.torch import save_file

    from peft_residual import ResidualPromptTuningConfig, get_prompt_tensor, save_as_prompt_tuning

    torch.set_num_threads(1)
    expected = {}
    for name, (base, task, options) in ADAPTERS.items():
        torch.manual_seed(1)
        fields = {"num_virtual_tokens": 4, "init_vocab_size": INIT_VOCAB_SIZE, "prompt_tuning_init_seed": 2, **options}
        model = get_peft_model(build_base(base), ResidualPromptTuningConfig(task_type=task, **fields))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            model(**batch()).logits.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(HERE / name)
        expected[f"{name}.logits"] = logits(model)
        expected[f"{name}.prompt"] = get_prompt_tensor(model)
        if name == MERGED:
            save_as_prompt_tuning(model, HERE / f"{name}-merged", overwrite=True)
            expected[f"{name}-merged.logits"] = expected[f"{name}.logits"].clone()
            expected[f"{name}-merged.prompt"] = expected[f"{name}.prompt"].clone()
    for card in HERE.glob("*/README.md"):
        card.unlink()
    save_file(expected, HERE / "expected.safetensors")
    (HERE / "machine.json").write_text(json.dumps(machine(), indent=2) + "\n")


if __name__ == "__main__":
    main()
