"""Count what a training step computes and keeps: the same figures on every machine.

    python examples/benchmarks/operations.py              # all tables and the picture, a few minutes on a CPU
    python examples/benchmarks/operations.py --smoke

*Operations* are floating-point operations of matrix products and attention in forward and backward pass (torch's
`FlopCounterMode`). *Kept* is the size of all tensors that autograd keeps for the backward pass, without the model's
weights. Both are linear in the number of layers and in the vocabulary, so that a model of one layer, one of two, and
one with a larger vocabulary tell those of any model of that width.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from peft import (
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_residual import ResidualPromptTuningConfig, disable_base_dropout


def llama(layers: int, vocabulary: int, **sizes: Any) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, vocab_size=vocabulary, **sizes))


def smollm2(layers: int, vocabulary: int) -> nn.Module:
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    return llama(layers, vocabulary, **sizes)


def llama_1b(layers: int, vocabulary: int) -> nn.Module:
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
    return llama(layers, vocabulary, **sizes)


def gpt2(layers: int, vocabulary: int) -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_layer=layers, vocab_size=vocabulary))


def t5_small(layers: int, vocabulary: int) -> nn.Module:
    sizes = {"num_layers": layers, "num_decoder_layers": layers, "vocab_size": vocabulary}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


@dataclass(frozen=True)
class Model:
    """A real model's sizes.

    Args:
        build (`Callable`): Takes a number of layers and of vocabulary rows, and returns a model of its width.
        layers, vocabulary (`int`): The real numbers.
        task_type (`str`): The task.
    """

    build: Callable[[int, int], nn.Module]
    layers: int
    vocabulary: int
    task_type: str = "CAUSAL_LM"


MODELS = {
    "SmolLM2-135M": Model(smollm2, 30, 49152),
    "GPT-2 small": Model(gpt2, 12, 50257),
    "Llama-3.2-1B": Model(llama_1b, 16, 128256),
    "T5-small": Model(t5_small, 6, 32128, "SEQ_2_SEQ_LM"),
}


@dataclass(frozen=True)
class Batch:
    """Sizes of a batch: `tokens` virtual tokens, `rows` rows of `length`, labels on the last `labels` of them."""

    tokens: int = 100
    rows: int = 8
    length: int = 32
    labels: int = 2


ENCODER_DECODER_METHODS = ("prompt tuning", "residual", "residual, M=128", "P-tuning", "prefix tuning", "LoRA")
METHODS = (
    "prompt tuning",
    "residual",
    "residual, logits at labels",
    "residual, not shared",
    "P-tuning",
    "prefix tuning",
    "LoRA",
)


def make_config(method: str, task_type: str, tokens: int) -> PeftConfig:
    """The config of a method; networks have the paper's hidden layer of 800."""
    sizes = {"task_type": task_type, "num_virtual_tokens": tokens}
    if method == "LoRA":
        return LoraConfig(task_type=task_type, r=8)
    if method == "P-tuning":
        return PromptEncoderConfig(**sizes, num_transformer_submodules=1, encoder_hidden_size=800)
    if method == "prefix tuning":
        return PrefixTuningConfig(**sizes)
    if method == "prompt tuning":
        return PromptTuningConfig(**sizes, num_transformer_submodules=1)
    hidden = 128 if method.endswith("M=128") else 800
    return ResidualPromptTuningConfig(**sizes, prompt_tuning_init="RANDOM", encoder_hidden_size=hidden)


@dataclass(frozen=True)
class Figures:
    """What one training step needs: floating-point operations, and bytes kept for the backward pass."""

    operations: float
    kept: float

    def plus(self, other: Figures, factor: float) -> Figures:
        return Figures(self.operations + factor * other.operations, self.kept + factor * other.kept)


def count(method: str, base: nn.Module, task_type: str, batch: Batch) -> Figures:
    """Run one step of a method and count."""
    model = get_peft_model(base, make_config(method, task_type, batch.tokens)).train()
    disable_base_dropout(model)
    if method.startswith("residual") and task_type == "CAUSAL_LM":
        model.share_prompt(method != "residual, not shared")
        model.compute_logits_at_labels(method.endswith("logits at labels"))
    ids = torch.randint(3, 100, (batch.rows, batch.length), generator=torch.Generator().manual_seed(0))
    labels = ids[:, :8].clone() if task_type == "SEQ_2_SEQ_LM" else ids.clone()
    if task_type == "CAUSAL_LM":
        labels[:, : -batch.labels] = -100
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        loss.backward()
    return Figures(counter.get_total_flops(), sum(size for size, _ in kept.values()))


def measure(method: str, model: Model, batch: Batch, vocabulary: int = 1000) -> Figures:
    """What a step of a real model needs, from three small ones."""

    def of(layers: int, rows: int) -> Figures:
        gc.collect()  # models have reference cycles, and the last one may be large
        torch.manual_seed(0)
        return count(method, model.build(layers, rows), model.task_type, batch)

    one = of(1, vocabulary)
    layer = of(2, vocabulary).plus(one, -1)
    row = of(1, 2 * vocabulary).plus(one, -1)
    whole = one.plus(layer, model.layers - 1)
    return whole.plus(row, model.vocabulary / vocabulary - 1)


BATCHES = (Batch(), Batch(tokens=20, length=64), Batch(tokens=20, rows=32, length=64), Batch(length=256))
ENCODER_BATCH = Batch(length=128)
LENGTHS = (10, 20, 50, 100, 200)

INTRODUCTION = """# Operations and memory of a training step

Written by `python examples/benchmarks/operations.py`; change that, not this page. These figures are the same on every
machine: floating-point operations (torch's counter) and the tensors that autograd keeps for the backward pass, in
float32, for random weights of the models' sizes. *Times* are relative to PEFT's prompt tuning in the same table.

![Operations and kept tensors by prompt length, relative to PEFT's prompt tuning](operations.png)

`residual` is the default of a decoder-only model with a long prompt: the prompt is computed once per batch.
`residual, logits at labels` adds `model.compute_logits_at_labels()`. LoRA has no virtual tokens, so it computes less
than any prompt in front of each row.

Encoder-decoder and bidirectional models cannot share the prompt, because its states depend on the text. There the
network is all that residual prompt tuning adds: `12·P·H·M` operations a step, which no other order of computing it
avoids.
"""


def table(title: str, found: dict[str, Figures]) -> str:
    """Format the figures of one model and batch as a Markdown table."""
    first = found["prompt tuning"]
    lines = [f"### {title}\n", "| Method | GFLOP | times | kept, MiB | times |", "|---|---:|---:|---:|---:|"]
    for method, figures in found.items():
        operations, kept = figures.operations / first.operations, figures.kept / first.kept
        size = f"{figures.operations / 1e9:,.1f} | {operations:.4f} | {figures.kept / 2**20:,.0f} | {kept:.3f}"
        lines.append(f"| {method} | {size} |")
    return "\n".join(lines) + "\n"


def picture(by_length: dict[str, dict[int, Figures]], title: str) -> Figure:
    """Plot operations and kept tensors by prompt length, relative to prompt tuning."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("operations", "kept")):
        for method, figures in by_length.items():
            first = by_length["prompt tuning"]
            ratios = [getattr(figures[length], name) / getattr(first[length], name) for length in figures]
            axes.plot(list(figures), ratios, marker="o", markersize=4, label=method)
        axes.set(xscale="log", ylim=(0, None), xlabel="virtual tokens, P", ylabel="times prompt tuning")
        axes.set(title={"operations": "Operations", "kept": "Kept for the backward pass"}[name])
        axes.set_xticks(LENGTHS, map(str, LENGTHS))
        axes.xaxis.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.suptitle(title)
    return figure


def main() -> None:
    """Count everything, and write the JSON, the page and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one small model and batch")
    parser.add_argument("--output", type=Path, default=Path("build/cost"), help="folder (default %(default)s)")
    options = parser.parse_args()
    plan = [(name, batch) for name in ("SmolLM2-135M", "GPT-2 small") for batch in BATCHES]
    plan += [("Llama-3.2-1B", BATCHES[0]), ("Llama-3.2-1B", BATCHES[-1]), ("T5-small", ENCODER_BATCH)]
    lengths: tuple[int, ...] = LENGTHS
    if options.smoke:
        plan, lengths = [("SmolLM2-135M", Batch(tokens=20, rows=2, length=8))], (20,)
    options.output.mkdir(parents=True, exist_ok=True)
    records, parts = [], [INTRODUCTION]
    for name, batch in tqdm(plan, desc="models"):
        shares = MODELS[name].task_type == "CAUSAL_LM"
        methods = METHODS if shares else ENCODER_DECODER_METHODS
        found = {method: measure(method, MODELS[name], batch) for method in methods}
        labels = f"labels on {batch.labels}" if shares else "8 target tokens"
        parts.append(table(f"{name}, P={batch.tokens}, {batch.rows} rows of {batch.length} tokens, {labels}", found))
        records.append({"model": name, **asdict(batch), "figures": {m: asdict(f) for m, f in found.items()}})
    drawn = plan[0][0]
    by_length = {
        method: {length: measure(method, MODELS[drawn], Batch(tokens=length)) for length in lengths}
        for method in tqdm(METHODS, desc="lengths")
    }
    title = f"A training step of {drawn}'s size, 8 rows of 32 tokens, labels on 2"
    picture(by_length, title).savefig(options.output / "operations.png", dpi=110)
    text = "\n".join(parts)
    (options.output / "operations.md").write_text(text)
    (options.output / "operations.json").write_text(json.dumps(records, indent=1))
    print(text)


if __name__ == "__main__":
    main()
