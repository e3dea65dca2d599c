"""Time and peak memory of a training step: residual prompt tuning against PEFT's prompt tuning.

Random weights of a real model's size, the same batch, AdamW; the steps of both take turns, the median is taken.
Peak memory is that of a process of its own for each method (of the GPU where one is used).

    python examples/benchmarks/training_step.py
    python examples/benchmarks/training_step.py --size gpt2-small --dtype bfloat16 --device cuda --compile
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from torch import nn
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from peft_residual import ResidualPromptTuningConfig, create_residual_optimizer, disable_base_dropout


def t5_small() -> nn.Module:
    return T5ForConditionalGeneration(T5Config(decoder_start_token_id=0))


def t5_base() -> nn.Module:
    sizes = {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12}
    return T5ForConditionalGeneration(T5Config(**sizes, feed_forward_proj="gated-gelu", decoder_start_token_id=0))


def gpt2_small() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config())


SIZES = {
    "t5-small": ("SEQ_2_SEQ_LM", t5_small),
    "t5-base": ("SEQ_2_SEQ_LM", t5_base),
    "gpt2-small": ("CAUSAL_LM", gpt2_small),
}
METHODS = ("prompt tuning", "residual")


def make_step(method: str, options: argparse.Namespace) -> Callable[[], None]:
    """Build the model of a method; returns what runs one training step."""
    torch.manual_seed(0)
    task_type, build = SIZES[options.size]
    base = build().to(options.device, getattr(torch, options.dtype))
    sizes = {"task_type": task_type, "num_virtual_tokens": options.tokens}
    if method == "residual":
        config = ResidualPromptTuningConfig(**sizes, encoder_hidden_size=options.hidden)
    else:
        config = PromptTuningConfig(**sizes, num_transformer_submodules=1, prompt_tuning_init="SAMPLE_VOCAB")
    model = get_peft_model(base, config).train()
    disable_base_dropout(model)
    optimizer = make_optimizer(model)
    ids = torch.randint(3, 30000, (options.batch_size, options.length), device=options.device)
    labels = ids[:, :8].contiguous() if task_type == "SEQ_2_SEQ_LM" else ids
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    run = torch.compile(model) if options.compile else model

    def step() -> None:
        run(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if options.device == "cuda":
            torch.cuda.synchronize()

    return step


def make_optimizer(model: PeftModel) -> torch.optim.Optimizer:
    if isinstance(model.active_peft_config, ResidualPromptTuningConfig):
        return create_residual_optimizer(model)
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.3, weight_decay=1e-5)


def peak_memory(method: str, options: argparse.Namespace) -> float:
    """Peak memory in MiB of three steps in this process."""
    step = make_step(method, options)
    for _ in range(3):
        step()
    if options.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    """Parse the options, measure both methods, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="t5-small", help="size of the model (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=100, help="virtual tokens, P (default %(default)s)")
    parser.add_argument("--hidden", type=int, default=800, help="hidden layer, M (default %(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="rows (default %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens of each row (default %(default)s)")
    parser.add_argument("--dtype", default="float32", help="type of the frozen model (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    parser.add_argument("--compile", action="store_true", help="compile the model")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of each (default %(default)s)")
    parser.add_argument("--memory_of", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(peak_memory(options.memory_of, options))
        return

    steps = {method: make_step(method, options) for method in METHODS}
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    for repeat in tqdm(range(options.repeats + 2), desc="steps", leave=False):
        for method, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat >= 2:  # the first steps allocate and compile
                times[method].append(1e3 * (time.perf_counter() - start))
    memory = {}
    for method in METHODS:
        command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--memory_of", method]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        memory[method] = float(printed.splitlines()[-1])

    where = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{options.size}, batch {options.batch_size}, {options.length} tokens, P={options.tokens} M={options.hidden}"
    )
    print(f"torch {torch.__version__}, {where}, {options.dtype}, median of {options.repeats} steps, seed 0")
    print(f"{'method':15} {'ms per step':>12} {'peak MiB':>10}")
    medians = {method: statistics.median(times[method]) for method in METHODS}
    for method in METHODS:
        print(f"{method:15} {medians[method]:>12.1f} {memory[method]:>10.0f}")
    plain, residual = METHODS
    print(f"{'ratio':15} {medians[residual] / medians[plain]:>12.3f} {memory[residual] / memory[plain]:>10.3f}")


if __name__ == "__main__":
    main()
