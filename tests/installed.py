"""What a new user does, with the installed package: README's examples, a merge, the command line, saving and loading.

Run by `nox -s wheel` in a folder outside of the checkout, with runtime dependencies only. Models are tiny and local.
"""

import re
import subprocess
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


ROOT = Path(__file__).resolve().parents[1]
T5 = ROOT / "examples" / "embedded" / "model"


@torch.no_grad()
def by_full_forwards(model, ids, count):
    """Greedy tokens, each from a pass over the whole text without a cache."""
    for _ in range(count):
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def command(*argv):
    """What the installed command prints."""
    path = Path(sys.executable).parent / "peft-residual"
    return subprocess.run([path, *argv], check=True, capture_output=True, text=True).stdout


def make_llama(tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.3, **sizes)
    LlamaForCausalLM(config).save_pretrained("llama")
    tokenizer.save_pretrained("llama")


def main():
    tokenizer = AutoTokenizer.from_pretrained(T5)
    make_llama(tokenizer)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    for block, folder in zip(blocks, ("llama", str(T5)), strict=True):
        exec(re.sub(r'^name = ".*"$', f"name = {folder!r}", block, count=1, flags=re.MULTILINE), {})

    import peft_residual

    assert ROOT not in Path(peft_residual.__file__).resolve().parents, "the checkout, and not the wheel"
    ids = tokenizer(["the food was great"], return_tensors="pt").input_ids
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    generated = {}
    for folder in ("adapter", "merged"):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("llama"), folder).eval()
        model.base_model.generation_config.eos_token_id = None
        # What the warning of `compat.warn_of_stock_generation` says to do; residual adapters need nothing.
        stock = {"use_cache": False} if folder == "merged" and peft_residual.compat.cache_name() == "cache" else {}
        generated[folder] = model.generate(input_ids=ids, **settings, **stock)
        assert torch.equal(generated[folder], by_full_forwards(model, ids, 8)), folder
    assert torch.equal(generated["adapter"], generated["merged"])
    assert f"peft-residual {peft_residual.__version__} (peft " in command("--version")
    assert "adapter: valid" in command("check", "adapter")
    command("merge", "adapter", "merged-by-command")
    assert (
        Path("merged-by-command/adapter_model.safetensors").read_bytes()
        == Path("merged/adapter_model.safetensors").read_bytes()
    )
    assert "10 virtual tokens" in command("inspect", "t5-adapter", "--base", str(T5))
    print(command("--version"), generated["adapter"].tolist())


if __name__ == "__main__":
    main()
