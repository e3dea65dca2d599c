"""Time the prefill of a decoder-only model: PEFT's prompt tuning, the exported prefix and the prompt cache.

The text alone, without a prompt, is timed as well, as a lower bound.

    python examples/benchmarks/prefix_prefill.py
    python examples/benchmarks/prefix_prefill.py --prompt 20 --text 64 --threads 1
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass, field

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from turns import SEED, Comparison, Settings, parse, relative_difference, report, take_turns

from peft_residual import ResidualPromptTuningConfig, save_as_prefix_tuning, save_as_prompt_tuning


@dataclass
class PrefillSettings(Settings):
    repeats: int = field(default=30, metadata={"help": "Timed turns of each method, after two warm-up turns."})
    prompt: int = field(default=100, metadata={"help": "Virtual tokens, P."})
    text: int = field(default=12, metadata={"help": "Input tokens."})
    width: int = field(default=256, metadata={"help": "Hidden size of the Llama."})
    layers: int = field(default=6, metadata={"help": "Layers of the Llama."})
    vocabulary: int = field(default=32000, metadata={"help": "Vocabulary size of the Llama."})
    last_logits: bool = field(
        default=False, metadata={"help": "Compute only the logits of the last token, as in generation."}
    )


def build_models(settings: PrefillSettings, folder: str) -> dict[str, nn.Module]:
    """Build models with the same prompt: merged, loaded, exported as a prefix, and with a prompt cache."""
    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.width,
        intermediate_size=4 * settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    base = LlamaForCausalLM(config).to(settings.device).eval()
    prompt_config = ResidualPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=settings.prompt)
    model = get_peft_model(copy.deepcopy(base), prompt_config)
    model.save_pretrained(f"{folder}/residual")
    exports = {
        "merged, prompt tuning in PEFT": save_as_prompt_tuning(model, f"{folder}/merged"),
        "residual adapter": f"{folder}/residual",
        "exported prefix, PEFT": save_as_prefix_tuning(model, f"{folder}/prefix"),
        "prompt cache": f"{folder}/residual",
    }
    models = {name: PeftModel.from_pretrained(copy.deepcopy(base), path) for name, path in exports.items()}
    models["prompt cache"].enable_prompt_cache()
    models["text alone"] = base
    return {name: model.eval().requires_grad_(False) for name, model in models.items()}


@torch.no_grad()
def measure(settings: PrefillSettings) -> Comparison:
    """Check that all methods compute the same, and time them."""
    torch.manual_seed(SEED)
    with tempfile.TemporaryDirectory() as folder:
        models = build_models(settings, folder)
    ids = torch.randint(3, settings.vocabulary, (1, settings.text), device=settings.device)
    kept = {name: {"logits_to_keep": 1} if settings.last_logits else {} for name in models}
    if not settings.last_logits:  # as all others except prompt tuning
        kept["prompt cache"] = {"logits_to_keep": settings.text}

    def logits(name: str) -> Tensor:
        return models[name](input_ids=ids, **kept[name]).logits[:, -settings.text :]

    difference = relative_difference(logits(name) for name in models if name != "text alone")
    times = take_turns({name: lambda name=name: logits(name) for name in models}, settings)
    title = f"{settings.prompt} virtual and {settings.text} input tokens, Llama of {settings.layers} layers of "
    title += f"{settings.width}, logits of {'the last token' if settings.last_logits else 'all tokens'}"
    return Comparison(title, settings, times, difference=difference)


if __name__ == "__main__":
    report(measure(parse(PrefillSettings, __doc__)))
