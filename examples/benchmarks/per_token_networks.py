"""Time one network per virtual token: the package's batched computation against a Python loop of separate modules.

Both run forward and backward (`encoder_shared=False`, MLP1) on the same values, in turns, and the median is taken.

    python examples/benchmarks/per_token_networks.py
    python examples/benchmarks/per_token_networks.py --tokens 10 --width 512 --hidden 400 --threads 1
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from peft_residual import ResidualPromptEncoder, ResidualPromptTuningConfig


def build_encoder(tokens: int, width: int, hidden: int) -> ResidualPromptEncoder:
    """The package's encoder with one network per token."""
    config = ResidualPromptTuningConfig(
        task_type="SEQ_2_SEQ_LM",
        num_virtual_tokens=tokens,
        token_dim=width,
        encoder_hidden_size=hidden,
        encoder_shared=False,
        prompt_tuning_init="RANDOM",
    )
    return ResidualPromptEncoder(config, nn.Embedding(1, width))


def build_loop(encoder: ResidualPromptEncoder) -> nn.ModuleList:
    """The same networks as separate modules with the same weights."""
    network = encoder.network
    tokens, width, hidden = network.down.weight.shape
    modules = nn.ModuleList(
        nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width), nn.LayerNorm(width))
        for _ in range(tokens)
    )
    with torch.no_grad():
        for token, module in enumerate(modules):
            for layer, stacked in zip((module[0], module[2], module[3]), (network.down, network.up, network.norm)):
                weight = stacked.weight[token]
                layer.weight.copy_(weight.mT if weight.ndim == 2 else weight)
                layer.bias.copy_(stacked.bias[token])
    return modules


def milliseconds(module: nn.Module, run: Callable[[], Tensor], direction: Tensor) -> float:
    """Time one forward and backward pass; gradients are dropped before, as an optimizer's `zero_grad` does."""
    module.zero_grad()
    start = time.perf_counter()
    run().backward(direction)
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    """Parse the options, check that both compute the same, time them, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=100, help="virtual tokens, P (default %(default)s)")
    parser.add_argument("--width", type=int, default=768, help="embedding width, H (default %(default)s)")
    parser.add_argument("--hidden", type=int, default=400, help="hidden layer, M (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="timed passes of each (default %(default)s)")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    encoder = build_encoder(options.tokens, options.width, options.hidden)
    modules = build_loop(encoder)
    raw = encoder.embedding.weight

    def loop() -> Tensor:
        return raw + torch.stack([module(raw[token]) for token, module in enumerate(modules)])

    torch.testing.assert_close(encoder(), loop(), rtol=1e-4, atol=1e-5)
    direction = torch.randn_like(raw)
    batched_times, loop_times = [], []
    for repeat in range(options.repeats + 2):
        times = milliseconds(encoder, encoder, direction), milliseconds(modules, loop, direction)
        if repeat >= 2:  # the first passes allocate
            batched_times.append(times[0])
            loop_times.append(times[1])

    batched, separate = statistics.median(batched_times), statistics.median(loop_times)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, median of {options.repeats}, milliseconds")
    print(f"P={options.tokens} H={options.width} M={options.hidden}, forward and backward, float32")
    print(f"  separate modules in a loop  {separate:9.2f}   (fastest {min(loop_times):.2f})")
    print(f"  batched, peft_residual      {batched:9.2f}   (fastest {min(batched_times):.2f})")
    print(f"  ratio                       {separate / batched:9.1f}")


if __name__ == "__main__":
    main()
