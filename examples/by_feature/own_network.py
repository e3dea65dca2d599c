"""A network of one's own, in five lines.

    python examples/by_feature/own_network.py [--smoke]

Saving, loading and merging are those of the built-in networks. Whoever loads the adapter to train on must import the
module that registers the network first; the merged prompt needs neither it nor this package.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from base import TaskArguments, base_code, load_data, make_config, make_trainer, test_score
from common import make_output_dir, parse, print_saved
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from peft_residual import (
    create_residual_optimizer,
    disable_base_dropout,
    get_prompt_tensor,
    register_reparameterization,
    save_as_prompt_tuning,
)


@dataclass
class NetworkArguments(TaskArguments):
    """What to train on what."""

    output_dir: Path = field(default=Path("build/by_feature/own_network"), metadata={"help": "Output folder."})


# New: a builder takes the config and returns a module that maps the prompt [P, H] to [P, H]; the skip is added to it
@register_reparameterization("GATED", unused_fields=("encoder_activation", "encoder_num_attention_heads"))
def gated(config):
    width, hidden = config.token_dim, config.encoder_hidden_size
    gate = torch.nn.Sequential(torch.nn.Linear(width, 2 * hidden), torch.nn.GLU())
    return torch.nn.Sequential(gate, torch.nn.Linear(hidden, width), torch.nn.LayerNorm(width))


def main() -> None:
    args = parse(NetworkArguments)
    make_output_dir(args)

    # Data
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = load_data(args, tokenizer, args.task)

    # Model, config
    base = AutoModelForSeq2SeqLM.from_pretrained(args.model, dtype=torch.float32)
    # New: the network by its name
    model = get_peft_model(base, make_config(args, encoder_reparameterization_type="GATED", encoder_hidden_size=256))
    disable_base_dropout(model)
    print(model.prompt_encoder["default"].network)

    # Train
    optimizer = create_residual_optimizer(model, learning_rate=args.learning_rate)
    trainer = make_trainer(args, model, data, tokenizer, optimizer)
    trainer.train()

    # Evaluate
    print(f"\ntest exact match: {test_score(args, model, data, tokenizer):.1%}")

    # Save, merge
    adapter, merged = args.output_dir / "adapter", args.output_dir / "merged"
    model.save_pretrained(adapter)
    save_as_prompt_tuning(model, merged)

    # New: the adapter's config names the network, so it is found again
    fresh = AutoModelForSeq2SeqLM.from_pretrained(args.model, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(fresh, adapter, is_trainable=True)
    same = torch.equal(get_prompt_tensor(loaded), get_prompt_tensor(model))
    print(f"loaded to train on, with its network: the prompt is {'the same' if same else 'ANOTHER ONE'}")
    print_saved(adapter, merged, base_code(args))


if __name__ == "__main__":
    main()
