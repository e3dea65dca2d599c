"""Time forward and backward of the encoder, compared to a Python loop over tokens and to PEFT's PromptEncoder.

By default, one network per virtual token is compared to a loop over separate modules with the same weights, and to
moving as many bytes through memory, which is the least that any implementation does. With `--shared`, one network for
all tokens is compared to a loop over the tokens and to P-tuning's MLP and LSTM of the same sizes.

    python examples/benchmarks/encoder.py
    python examples/benchmarks/encoder.py --tokens 10 --width 512 --hidden 400 --threads 1
    python examples/benchmarks/encoder.py --shared
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from peft import PromptEncoder, PromptEncoderConfig
from torch import Tensor, nn
from turns import SEED, Comparison, Settings, parse, relative_difference, report, take_turns

from peft_residual import ResidualPromptEncoder, ResidualPromptTuningConfig


@dataclass
class EncoderSettings(Settings):
    tokens: int = field(default=100, metadata={"help": "Virtual tokens, P."})
    width: int = field(default=768, metadata={"help": "Embedding width, H."})
    hidden: int = field(default=400, metadata={"help": "Hidden layer, M."})
    shared: bool = field(default=False, metadata={"help": "One network for all tokens."})


def build_encoder(settings: EncoderSettings) -> ResidualPromptEncoder:
    """Build the package's encoder with MLP1."""
    config = ResidualPromptTuningConfig(
        task_type="SEQ_2_SEQ_LM",
        num_virtual_tokens=settings.tokens,
        token_dim=settings.width,
        encoder_hidden_size=settings.hidden,
        encoder_shared=settings.shared,
        prompt_tuning_init="RANDOM",
    )
    return ResidualPromptEncoder(config, nn.Embedding(1, settings.width)).to(settings.device)


def build_p_tuning(kind: str, settings: EncoderSettings) -> PromptEncoder:
    """Build PEFT's prompt encoder with the same sizes."""
    config = PromptEncoderConfig(
        encoder_reparameterization_type=kind,
        num_virtual_tokens=settings.tokens,
        token_dim=settings.width,
        encoder_hidden_size=settings.hidden,
        num_transformer_submodules=1,
    )
    return PromptEncoder(config).to(settings.device)


def separate_modules(encoder: ResidualPromptEncoder) -> nn.ModuleList:
    """Build the networks of all tokens as separate modules with the same weights."""
    network = encoder.network
    tokens, width, hidden = network.down.weight.shape
    modules = nn.ModuleList(
        nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width), nn.LayerNorm(width))
        for _ in range(tokens)
    ).to(encoder.embedding.weight.device)
    with torch.no_grad():
        for token, module in enumerate(modules):
            for layer, stacked in zip((module[0], module[2], module[3]), (network.down, network.up, network.norm)):
                weight = stacked.weight[token]
                layer.weight.copy_(weight.mT if weight.ndim == 2 else weight)
                layer.bias.copy_(stacked.bias[token])
    return modules


def memory_traffic(network: nn.Module) -> Callable[[], object]:
    """Move what a forward and a backward pass must move: the weights are read twice, their gradients written once."""
    size = sum(parameter.numel() for parameter in network.parameters())
    first, second, written = (torch.ones(size, device=next(network.parameters()).device) for _ in range(3))
    return lambda: torch.add(first, second, out=written)


def measure(settings: EncoderSettings) -> Comparison:
    """Time forward and backward. Gradients are reset before each pass, which is not timed."""
    torch.manual_seed(SEED)
    encoder = build_encoder(settings)
    embedding = encoder.embedding.weight
    modules = [encoder.network] * settings.tokens if settings.shared else separate_modules(encoder)
    trained = nn.ModuleList([encoder, *modules])

    def loop() -> Tensor:
        return embedding + torch.stack([module(embedding[token]) for token, module in enumerate(modules)])

    rivals: dict[str, Callable[[], Tensor]] = {"residual": encoder, "Python loop": loop}
    difference = relative_difference(run().detach() for run in rivals.values())
    if settings.shared:
        positions = torch.arange(settings.tokens, device=settings.device).unsqueeze(0)
        for kind in ("MLP", "LSTM"):
            trained.append(build_p_tuning(kind, settings))
            # For one row of a batch; in training, PEFT runs it for each row.
            rivals[f"P-tuning {kind}, PEFT"] = lambda module=trained[-1]: module(positions)[0]
    direction = torch.randn_like(embedding)
    passes = {name: lambda run=run: run().backward(direction) for name, run in rivals.items()}
    if not settings.shared:
        passes["memory traffic alone"] = memory_traffic(encoder.network)
    times = take_turns(passes, settings, prepare=trained.zero_grad)
    title = (
        f"{'shared' if settings.shared else 'per token'}, P={settings.tokens} H={settings.width} M={settings.hidden}"
    )
    return Comparison(title, settings, times, difference=difference)


if __name__ == "__main__":
    report(measure(parse(EncoderSettings, __doc__)))
