"""Time a batch whose rows have different prompts: one call with `adapter_names`, or one call for each adapter.

The model is a Llama of width 256 with random weights. Every call generates.

    python examples/benchmarks/mixed_batch.py
    python examples/benchmarks/mixed_batch.py --new_tokens 1 --threads 2
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from turns import SEED, Comparison, Settings, parse, relative_difference, report, take_turns

from peft_residual import ResidualPromptTuningConfig


@dataclass
class BatchSettings(Settings):
    repeats: int = field(default=5, metadata={"help": "Timed turns of each method, after two warm-up turns."})
    adapters: int = field(
        default=8, metadata={"help": "Number of adapters, with 5, 10, 15, 20, 5, ... virtual tokens."}
    )
    rows: int = field(default=64, metadata={"help": "Total number of rows."})
    length: int = field(default=12, metadata={"help": "Tokens of each row."})
    new_tokens: int = field(default=32, metadata={"help": "Tokens to generate."})


def build_model(settings: BatchSettings) -> PeftModel:
    """Build a frozen model with adapters of different lengths."""
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8000, num_key_value_heads=4, **sizes)).to(settings.device)
    for number in range(settings.adapters):
        config = ResidualPromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=5 + 5 * (number % 4), prompt_tuning_init_seed=number
        )
        if number == 0:
            model = get_peft_model(model, config, adapter_name="0")
        else:
            model.add_adapter(str(number), config)
    model.requires_grad_(False)
    return model.eval()


def measure(settings: BatchSettings) -> Comparison:
    """Check that both methods compute the same, and time them."""
    torch.manual_seed(SEED)
    model = build_model(settings)
    ids = torch.randint(3, 8000, (settings.rows, settings.length), device=settings.device)
    names = [str(row * settings.adapters // settings.rows) for row in range(settings.rows)]
    generation = {"max_new_tokens": settings.new_tokens, "min_new_tokens": settings.new_tokens, "do_sample": False}
    generation |= {"pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}

    def one_call() -> Tensor:
        return model.generate(input_ids=ids, adapter_names=names, **generation).logits[0]

    def call_for_each() -> Tensor:
        parts = []
        for name in dict.fromkeys(names):
            model.set_adapter(name, inference_mode=True)
            rows = ids[[row for row, other in enumerate(names) if other == name]]
            parts.append(model.generate(input_ids=rows, **generation).logits[0])
        return torch.cat(parts)

    rivals = {"one call, adapter_names": one_call, "a call for each adapter": call_for_each}
    difference = relative_difference(run() for run in rivals.values())
    times = take_turns(rivals, settings)
    title = (
        f"{settings.rows} rows of {settings.length} tokens, {settings.adapters} adapters, {settings.new_tokens} new"
    )
    return Comparison(title, settings, times, difference=difference)


if __name__ == "__main__":
    report(measure(parse(BatchSettings, __doc__)))
