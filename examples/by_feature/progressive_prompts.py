"""A sequence of tasks: each one gets a new prompt after the frozen prompts of the earlier tasks.

    python examples/by_feature/progressive_prompts.py [--smoke]

Progressive Prompts (Razdaibiedina et al., ICLR 2023, arXiv:2301.12314), except that new prompts are appended. A later
task can use what earlier prompts have learned, and nothing is forgotten: earlier prompts never change, and the first
rows of the last prompt are the prompts of all earlier tasks.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from base import TaskArguments, base_code, load_data, make_config, make_trainer, test_score
from common import make_output_dir, parse, print_saved
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from peft_residual import (
    create_residual_optimizer,
    disable_base_dropout,
    get_prompt_tensor,
    register_reparameterization,
    save_as_prompt_tuning,
)
from peft_residual.networks import MLP


@dataclass
class ProgressiveArguments(TaskArguments):
    """What to train, and on which data."""

    # New: the tasks
    tasks: list[str] = field(
        default_factory=lambda: ["entailment", "word_in_context", "question_answering"],
        metadata={"help": "Tasks, in order."},
    )
    max_steps: int = field(default=60, metadata={"help": "Training steps of each task."})
    output_dir: Path = field(default=Path("build/by_feature/progressive_prompts"), metadata={"help": "Output folder."})


# New: earlier prompts are buffers of a custom network, so they are saved and loaded with it, but not trained
@register_reparameterization("PROGRESSIVE")
class Progressive(nn.Module):
    """Return earlier prompts unchanged in the first rows, and `E + MLP(E)` in the rows after them."""

    def __init__(self, config):
        super().__init__()
        self.mlp = MLP(config)
        rows = config.total_virtual_tokens
        self.register_buffer("earlier", torch.zeros(rows, config.token_dim))
        self.register_buffer("is_earlier", torch.zeros(rows, 1, dtype=torch.bool))

    def keep(self, prompt: torch.Tensor) -> None:
        """Store an earlier prompt `[rows, H]` as the first rows."""
        self.earlier[: len(prompt)] = prompt
        self.is_earlier[: len(prompt)] = True

    def forward(self, prompt: torch.Tensor) -> torch.Tensor:
        return torch.where(self.is_earlier, self.earlier, prompt + self.mlp(prompt))


def main() -> None:
    args = parse(ProgressiveArguments)
    if len(set(args.tasks)) < len(args.tasks):
        sys.exit(
            f"--tasks {' '.join(args.tasks)} names a task twice. Name each task once: folders are named after tasks."
        )
    make_output_dir(args)

    # Data
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = {task: load_data(args, tokenizer, task) for task in args.tasks}

    earlier, scores = None, {}
    for number, task in enumerate(args.tasks, start=1):
        print(f"\n== {task} ==")
        # Model, config
        base = AutoModelForSeq2SeqLM.from_pretrained(args.model, dtype=torch.float32)
        config = make_config(
            args,
            num_virtual_tokens=number * args.num_virtual_tokens,  # New: includes the earlier prompts
            prompt_tuning_init_seed=args.seed + number,  # otherwise all prompts would be initialized alike
            encoder_reparameterization_type="PROGRESSIVE",
            encoder_residual=False,  # the network adds the skip itself, for the new rows only
        )
        model = get_peft_model(base, config)
        disable_base_dropout(model)
        # New: the prompts of earlier tasks
        if earlier is not None:
            model.prompt_encoder["default"].network.keep(earlier)

        # Train
        optimizer = create_residual_optimizer(model, learning_rate=args.learning_rate)
        folder = str(args.output_dir / "trainer" / task)
        trainer = make_trainer(args, model, data[task], tokenizer, optimizer, output_dir=folder)
        trainer.train()

        # Evaluate
        scores[task] = test_score(args, model, data[task], tokenizer)

        # Save
        model.save_pretrained(args.output_dir / "adapters" / task)
        save_as_prompt_tuning(model, args.output_dir / "merged" / task)

        # New: the next task's prompt comes after this one
        prompt = get_prompt_tensor(model)
        if earlier is not None and not torch.equal(prompt[: len(earlier)], earlier):
            sys.exit("Earlier prompts have changed.")
        earlier = prompt

    # Reload
    # New: evaluate each task again, after all of them have been trained
    print(f"\n{'task':20} {'tokens':>6} {'then':>8} {'now':>8}  first rows of the last prompt")
    for task in args.tasks:
        fresh = AutoModelForSeq2SeqLM.from_pretrained(args.model, dtype=torch.float32)
        loaded = PeftModel.from_pretrained(fresh, args.output_dir / "adapters" / task, is_trainable=True)
        prompt = get_prompt_tensor(loaded)
        same = "the same" if torch.equal(prompt, earlier[: len(prompt)]) else "DIFFERENT"
        now = test_score(args, loaded, data[task], tokenizer)
        print(f"{task:20} {len(prompt):>6} {scores[task]:>8.1%} {now:>8.1%}  {same}")
    for task in args.tasks:
        print_saved(args.output_dir / "adapters" / task, args.output_dir / "merged" / task, base_code(args))


if __name__ == "__main__":
    main()
