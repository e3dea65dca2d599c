"""A custom network in five lines.

    python examples/by_feature/custom_network.py [--smoke]

Saving, loading and merging work as with the built-in networks. A process that loads the adapter must import the module
that registers the network first. The merged prompt needs neither that module nor this package.
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
    """What to train, and on which data."""

    output_dir: Path = field(default=Path("build/by_feature/custom_network"), metadata={"help": "Output folder."})


# New: a function that takes the config and returns a module [P, H] -> [P, H]; the skip is added to its output
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
    # New: the network is selected by its name
    model = get_peft_model(base, make_config(args, encoder_reparameterization_type="GATED", encoder_hidden_size=256))
    disable_base_dropout(model)
    print(model.prompt_encoder["default"].network)

    # Train
    optimizer = create_residual_optimizer(model, learning_rate=args.learning_rate)
    trainer = make_trainer(args, model, data, tokenizer, optimizer)
    trainer.train()

    # Evaluate
    print(f"\ntest exact match: {test_score(args, model, data, tokenizer):.1%}")

    # Save: the adapter, and the projected prompt alone, which PEFT loads without this package
    adapter, merged = args.output_dir / "adapter", args.output_dir / "merged"
    model.save_pretrained(adapter)
    save_as_prompt_tuning(model, merged)

    # Reload
    # New: with its network, which is named in the adapter's config
    fresh = AutoModelForSeq2SeqLM.from_pretrained(args.model, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(fresh, adapter, is_trainable=True)
    same = torch.equal(get_prompt_tensor(loaded), get_prompt_tensor(model))
    print(f"reloaded with its network: the prompt is {'the same' if same else 'DIFFERENT'}")
    print_saved(adapter, merged, base_code(args))


if __name__ == "__main__":
    main()
