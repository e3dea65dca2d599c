"""Measure time and peak memory of a training step, compared to PEFT's prompt tuning, P-tuning and LoRA.

The models have random weights and the size of real ones. All methods use AdamW and the same batch, and take turns.
Peak memory is measured in a separate process for each method (GPU memory, if a GPU is used).

    python examples/benchmarks/training_step.py
    python examples/benchmarks/training_step.py --size smollm2-135m --length 32 --labels 2
    python examples/benchmarks/training_step.py --size gpt2-small --dtype bfloat16 --device cuda --compile
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from turns import SEED, Comparison, Settings, parse, report, synchronize, take_turns

from peft_residual import ResidualPromptTuningConfig, create_residual_optimizer, disable_base_dropout


def tiny() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )


def t5_small() -> nn.Module:
    return T5ForConditionalGeneration(T5Config(decoder_start_token_id=0))


def t5_base() -> nn.Module:
    sizes = {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12}
    return T5ForConditionalGeneration(T5Config(**sizes, feed_forward_proj="gated-gelu", decoder_start_token_id=0))


def gpt2_small() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config())


def smollm2_135m() -> nn.Module:
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=9, num_key_value_heads=3))


def llama_1b() -> nn.Module:
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=32, num_key_value_heads=8))


def tiny_llama() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))


SIZES = {
    "tiny": ("SEQ_2_SEQ_LM", tiny),
    "t5-small": ("SEQ_2_SEQ_LM", t5_small),
    "t5-base": ("SEQ_2_SEQ_LM", t5_base),
    "gpt2-small": ("CAUSAL_LM", gpt2_small),
    "smollm2-135m": ("CAUSAL_LM", smollm2_135m),
    "llama-3.2-1b": ("CAUSAL_LM", llama_1b),
    "tiny-llama": ("CAUSAL_LM", tiny_llama),
}
# "residual" shares the prompt between rows if that was measured to be faster; "shared" and "not shared" decide.
METHODS = (
    "prompt tuning",
    "residual",
    "residual, not shared",
    "residual, shared",
    "residual, shared, logits at labels",
    "P-tuning",
    "LoRA",
)


@dataclass
class StepSettings(Settings):
    size: Literal["tiny", "t5-small", "t5-base", "gpt2-small", "smollm2-135m", "llama-3.2-1b", "tiny-llama"] = field(
        default="t5-small", metadata={"help": "Size of the model."}
    )
    methods: list[str] = field(
        default_factory=lambda: list(METHODS[:2]), metadata={"help": "Methods to compare.", "choices": METHODS}
    )
    tokens: int = field(default=100, metadata={"help": "Virtual tokens, P."})
    hidden: int = field(default=800, metadata={"help": "Hidden layer, M."})
    batch_size: int = field(default=8, metadata={"help": "Rows."})
    length: int = field(default=128, metadata={"help": "Tokens of each row."})
    labels: int = field(default=0, metadata={"help": "Labeled tokens at the end of each row; 0 for all."})
    dtype: str = field(default="float32", metadata={"help": "Dtype of the frozen model."})
    compile: bool = field(default=False, metadata={"help": "Compile the model."})
    memory: bool = field(
        default=True, metadata={"help": "Measure peak memory, in a separate process for each method."}
    )
    kept: bool = field(default=False, metadata={"help": "Also print what is kept for the backward pass."})
    print_memory: bool = field(default=False, metadata={"help": "Used internally by these processes."})


def make_config(method: str, settings: StepSettings) -> PeftConfig:
    """Create the config of a method; all prompts have the same length, all networks the same width."""
    task_type = SIZES[settings.size][0]
    if method == "LoRA":
        return LoraConfig(task_type=task_type, r=8)
    prompt = {"task_type": task_type, "num_virtual_tokens": settings.tokens}
    if method.startswith("residual"):
        return ResidualPromptTuningConfig(**prompt, encoder_hidden_size=settings.hidden)
    if method == "P-tuning":
        return PromptEncoderConfig(**prompt, num_transformer_submodules=1, encoder_hidden_size=settings.hidden)
    return PromptTuningConfig(**prompt, num_transformer_submodules=1, prompt_tuning_init="SAMPLE_VOCAB")


def make_optimizer(model: PeftModel) -> torch.optim.Optimizer:
    if isinstance(model.active_peft_config, ResidualPromptTuningConfig):
        return create_residual_optimizer(model)
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.3, weight_decay=1e-5)


def make_training(method: str, settings: StepSettings) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Any]]:
    """Build the model of a method, its optimizer and a batch."""
    torch.manual_seed(SEED)
    task_type, build = SIZES[settings.size]
    with torch.device(settings.device):
        base = build().to(getattr(torch, settings.dtype))
    model = get_peft_model(base, make_config(method, settings)).train()
    disable_base_dropout(model)
    if method.startswith("residual, ") and task_type == "CAUSAL_LM":
        model.share_prompt("not shared" not in method)
        model.compute_logits_at_labels("logits at labels" in method)
    optimizer = make_optimizer(model)
    ids = torch.randint(3, 30000, (settings.batch_size, settings.length), device=settings.device)
    labels = ids[:, :8].contiguous() if task_type == "SEQ_2_SEQ_LM" else ids.clone()
    if settings.labels and task_type == "CAUSAL_LM":
        labels[:, : -settings.labels] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return model, optimizer, batch


def make_step(method: str, settings: StepSettings) -> Callable[[], None]:
    """Build the model of a method, and return a function that runs one training step."""
    model, optimizer, batch = make_training(method, settings)
    run = torch.compile(model) if settings.compile else model

    def step() -> None:
        run(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def kept_for_backward(method: str, settings: StepSettings) -> float:
    """Return the size of all tensors that autograd keeps for the backward pass, without the model's own, in MiB.

    Unlike times, it is the same on every machine.
    """
    model, _, batch = make_training(method, settings)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**batch)
    return sum(kept.values()) / 2**20


def peak_memory(method: str, settings: StepSettings) -> float:
    """Return the peak memory of three steps in this process, in MiB."""
    step = make_step(method, settings)
    for _ in range(3):
        step()
    synchronize(settings.device)
    if settings.device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return torch.cuda.max_memory_allocated() / 2**20


def peak_memory_alone(method: str, settings: StepSettings) -> float:
    """Return the peak memory of three steps in a separate process, in MiB."""
    told = {**asdict(settings), "print_memory": True, "methods": method}
    command = [sys.executable, "-W", "ignore", __file__, *(f"--{name}={value}" for name, value in told.items())]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(printed.splitlines()[-1])


def measure(settings: StepSettings) -> Comparison:
    """Time the steps of all methods in turns, then measure the memory of each in a separate process."""
    steps = {method: make_step(method, settings) for method in settings.methods}
    times = take_turns(steps, settings)
    memory = {}
    if settings.memory:
        for method in tqdm(settings.methods, desc="peak memory", leave=False):
            memory[method] = peak_memory_alone(method, settings)
    title = f"{settings.size}, {settings.batch_size} rows of {settings.length} tokens, P={settings.tokens}"
    return Comparison(f"{title} M={settings.hidden}, {settings.dtype}", settings, times, memory)


def main() -> None:
    """Measure, or (in a separate process) print the memory of one method."""
    settings = parse(StepSettings, __doc__)
    if settings.print_memory:
        print(peak_memory(settings.methods[0], settings))
    else:
        report(measure(settings))
        if settings.kept:
            for method in settings.methods:
                print(f"{method}: {kept_for_backward(method, settings):,.0f} MiB kept for the backward pass")


if __name__ == "__main__":
    main()
