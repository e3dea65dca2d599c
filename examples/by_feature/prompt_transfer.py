"""Initialize a prompt from another task's prompt, and count the training steps that this saves.

    python examples/by_feature/prompt_transfer.py [--smoke]
    python examples/by_feature/prompt_transfer.py --source entailment --task majority \\
        --max_steps 150 --eval_steps 25 --target_score 0.8

The projected prompt of `--source` becomes the prompt embedding of `--task`, with a new network (SPoT: Vu et al., ACL
2022, plus a network). Whether this helps depends on the tasks. With seed 0, the first command reaches 90 % after 12
steps instead of 21; the second one reaches 80 % after 150 steps with either initialization.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from base import TaskArguments, base_code, load_data, load_merged, make_config, make_trainer, test_score
from common import make_output_dir, parse, print_saved
from peft import get_peft_model
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from peft_residual import create_residual_optimizer, disable_base_dropout, save_as_prompt_tuning


@dataclass
class TransferArguments(TaskArguments):
    """What to train, and on which data."""

    # New: the source task, and until when steps are counted
    task: str = field(
        default="word_in_context", metadata={"help": "The task that is trained with both initializations."}
    )
    source: str = field(default="entailment", metadata={"help": "The task whose prompt is used for initialization."})
    target_score: float = field(default=0.9, metadata={"help": "Steps are counted until this exact match is reached."})
    eval_steps: int = field(default=3, metadata={"help": "Steps between evaluations on the validation split."})
    max_steps: int = field(default=30, metadata={"help": "Training steps of each run."})
    output_dir: Path = field(default=Path("build/by_feature/prompt_transfer"), metadata={"help": "Output folder."})


def train(args: TransferArguments, task: str, name: str, tokenizer, **init):
    """Train a prompt for a task, and return the model, the data, and exact match on the validation split by step."""
    # Data
    data = load_data(args, tokenizer, task)

    # Model, config
    base = AutoModelForSeq2SeqLM.from_pretrained(args.model, dtype=torch.float32)
    model = get_peft_model(base, make_config(args, **init))
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

    # New: train the prompt of the source task
    source = args.output_dir / "source"
    model, _, _ = train(args, args.source, f"source: {args.source}", tokenizer)
    model.save_pretrained(source)

    # New: train the task twice, initialized from the vocabulary and from that prompt
    inits = {
        "vocabulary": {},
        args.source: {"prompt_tuning_init": "PROMPT", "prompt_tuning_init_state_dict_path": str(source)},
    }
    curves, scores = {}, {}
    for name, init in inits.items():
        model, data, curves[name] = train(args, args.task, f"{args.task}, from: {name}", tokenizer, **init)
        # Evaluate
        scores[name] = test_score(args, model, data, tokenizer)

    # Save the last model, which was initialized from the source's prompt
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

    # Reload
    print(f"test exact match after reloading: {test_score(args, load_merged(args, merged), data, tokenizer):.1%}")
    print_saved(adapter, merged, base_code(args))


if __name__ == "__main__":
    main()
