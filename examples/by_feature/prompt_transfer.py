"""Start a prompt from another task's prompt, and see how many steps that saves.

    python examples/by_feature/prompt_transfer.py [--smoke]
    python examples/by_feature/prompt_transfer.py --source entailment --task majority \\
        --max_steps 150 --eval_steps 25 --target_score 0.8

The prompt of `--source` as the frozen model saw it (network included) becomes the raw prompt of `--task`, with a fresh
network (SPoT: Vu et al., ACL 2022, with a network on top). Whether it helps depends on the tasks: with seed 0 the
first command reaches 90 % after 12 steps instead of 21, the second reaches 80 % after 150 steps from either start.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from base import TaskArguments, base_code, load_data, make_config, make_trainer, test_score
from common import make_output_dir, parse, print_saved
from peft import get_peft_model
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from peft_residual import create_residual_optimizer, disable_base_dropout, save_as_prompt_tuning


@dataclass
class TransferArguments(TaskArguments):
    """What to train on what."""

    # New: where to start from, and what to count
    task: str = field(default="word_in_context", metadata={"help": "The task that is learned from both starts."})
    source: str = field(default="entailment", metadata={"help": "The task whose prompt is the start."})
    target_score: float = field(default=0.9, metadata={"help": "Steps are counted until this exact match."})
    eval_steps: int = field(default=3, metadata={"help": "Steps between two looks at the validation split."})
    max_steps: int = field(default=30, metadata={"help": "Steps of each training."})
    output_dir: Path = field(default=Path("build/by_feature/prompt_transfer"), metadata={"help": "Output folder."})


def train(args: TransferArguments, task: str, name: str, tokenizer, **start):
    """Train a prompt for a task; return the model, the data, and exact match by step on the validation split."""
    # Data
    data = load_data(args, tokenizer, task)

    # Model, config
    base = AutoModelForSeq2SeqLM.from_pretrained(args.model, dtype=torch.float32)
    model = get_peft_model(base, make_config(args, **start))
    disable_base_dropout(model)

    # Train
    print(f"\n== {name} ==")
    optimizer = create_residual_optimizer(model, learning_rate=args.learning_rate)
    settings = {"eval_steps": args.eval_steps, "save_strategy": "no", "load_best_model_at_end": False}
    trainer = make_trainer(args, model, data, tokenizer, optimizer, **settings)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "eval_exact_match" in entry]
    return model, data, {entry["step"]: entry["eval_exact_match"] for entry in history}


def main() -> None:
    args = parse(TransferArguments)
    make_output_dir(args)
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    # New: the source's prompt
    source = args.output_dir / "source"
    model, _, _ = train(args, args.source, f"source: {args.source}", tokenizer)
    model.save_pretrained(source)

    # New: the same task from the vocabulary and from that prompt
    starts = {
        "vocabulary": {},
        args.source: {"prompt_tuning_init": "PROMPT", "prompt_tuning_init_state_dict_path": str(source)},
    }
    curves, scores = {}, {}
    for name, start in starts.items():
        model, data, curves[name] = train(args, args.task, f"{args.task}, from: {name}", tokenizer, **start)
        # Evaluate
        scores[name] = test_score(args, model, data, tokenizer)

    # Save, merge: the last model, which started from the source's prompt
    adapter, merged = args.output_dir / "adapter", args.output_dir / "merged"
    model.save_pretrained(adapter)
    save_as_prompt_tuning(model, merged)

    print(f"\n{args.task}, exact match on the validation split\n\n  step" + "".join(f"{name:>20}" for name in curves))
    for step in next(iter(curves.values())):
        print(f"{step:>6}" + "".join(f"{curve[step]:>20.1%}" for curve in curves.values()))
    print("  test" + "".join(f"{score:>20.1%}" for score in scores.values()))
    for name, curve in curves.items():
        reached = next((f"step {step}" for step, score in curve.items() if score >= args.target_score), "not reached")
        print(f"{args.target_score:.0%} from {name}: {reached}")
    print_saved(adapter, merged, base_code(args))


if __name__ == "__main__":
    main()
