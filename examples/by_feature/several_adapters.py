"""Several prompts on one frozen model: train them one after the other, and switch between them.

python examples/by_feature/several_adapters.py [--smoke]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from base import TaskArguments, base_code, load_data, make_config, make_trainer, test_score
from common import make_output_dir, parse, print_saved
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from peft_residual import create_residual_optimizer, disable_base_dropout, save_as_prompt_tuning


@dataclass
class AdaptersArguments(TaskArguments):
    """What to train, and on which data."""

    # New: a second task
    second_task: str = field(default="entailment", metadata={"help": "The task of the second prompt."})
    output_dir: Path = field(default=Path("build/by_feature/several_adapters"), metadata={"help": "Output folder."})


def main() -> None:
    args = parse(AdaptersArguments)
    if args.task == args.second_task:
        sys.exit(
            f"--task and --second_task are both {args.task!r}. Name two tasks: each adapter is named after its task."
        )
    make_output_dir(args)

    # Data
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    # New: a data set for each adapter
    data = {task: load_data(args, tokenizer, task) for task in (args.task, args.second_task)}

    # Model, config
    base = AutoModelForSeq2SeqLM.from_pretrained(args.model, dtype=torch.float32)
    # New: adapters have names; with another seed, the second one is not initialized like the first
    model = get_peft_model(base, make_config(args), adapter_name=args.task)
    model.add_adapter(args.second_task, make_config(args, prompt_tuning_init_seed=args.seed + 1))
    disable_base_dropout(model)

    # Train
    # New: the active adapter is trained and evaluated; `set_adapter` freezes the others
    for task in data:
        model.set_adapter(task)
        # The Trainer can reload the best checkpoint only of an adapter named "default", so the last state is kept.
        optimizer = create_residual_optimizer(model, learning_rate=args.learning_rate)
        settings = {"save_strategy": "no", "load_best_model_at_end": False}
        trainer = make_trainer(args, model, data[task], tokenizer, optimizer, **settings)
        trainer.train()

    # Evaluate
    scores = {}
    for task in data:
        model.set_adapter(task)
        scores[task] = test_score(args, model, data[task], tokenizer)

    # Save
    # New: one folder with a subfolder for each adapter
    folder = args.output_dir / "adapters"
    model.save_pretrained(folder)
    for task in data:
        save_as_prompt_tuning(model, args.output_dir / "merged" / task, adapter_name=task)

    # Reload
    # New: both adapters on one new model
    fresh = AutoModelForSeq2SeqLM.from_pretrained(args.model, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(fresh, folder / args.task, adapter_name=args.task)
    loaded.load_adapter(folder / args.second_task, adapter_name=args.second_task)
    print(f"\n{'task':20} {'trained':>8} {'loaded':>8}")
    for task in data:
        loaded.set_adapter(task)
        now = test_score(args, loaded, data[task], tokenizer)
        print(f"{task:20} {scores[task]:>8.1%} {now:>8.1%}")
    for task in data:
        print_saved(folder / task, args.output_dir / "merged" / task, base_code(args))


if __name__ == "__main__":
    main()
