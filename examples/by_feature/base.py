"""Train one residual prompt for one task of the embedded model; the other scripts in this folder build on this one.

    python examples/by_feature/base.py [--smoke]

The others repeat `main` and mark what they add with `# New:`. They import data, settings and Trainer from here.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `common` and `embedded`

import torch
import transformers
from common import (
    Arguments,
    check_columns,
    exact_match,
    make_output_dir,
    parse,
    print_saved,
    room_for_text,
    training_arguments,
)
from datasets import DatasetDict
from embedded.tasks import MODEL, TASKS, load_task
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from peft_residual import (
    ResidualPromptTuningConfig,
    TrainingSetupCallback,
    create_residual_optimizer,
    disable_base_dropout,
    save_as_prompt_tuning,
)


# The other tasks are held out: no setting may be chosen by their results.
DEVELOPMENT_TASKS = [name for name, task in TASKS.items() if task.development]


@dataclass
class TaskArguments(Arguments):
    """What to train, and on which data."""

    model: str = field(default=str(MODEL), metadata={"help": "Encoder-decoder model: a folder or a Hub id."})
    task: str = field(default="sentiment", metadata={"help": f"One of {', '.join(DEVELOPMENT_TASKS)}."})
    max_steps: int = field(default=150, metadata={"help": "Training steps."})
    output_dir: Path = field(default=Path("build/by_feature/base"), metadata={"help": "Output folder."})


def load_data(args: TaskArguments, tokenizer, task: str) -> DatasetDict:
    """Load and tokenize the splits of a task."""
    if task not in DEVELOPMENT_TASKS:
        sys.exit(f"There is no task {task!r} for development. Choose one of {', '.join(DEVELOPMENT_TASKS)}.")
    data = load_task(task, seed=args.seed)
    if args.smoke:
        data = DatasetDict({name: split.select(range(32)) for name, split in data.items()})
    check_columns(data, ["text", "label"])

    def tokenize(rows):
        inputs = tokenizer(rows["text"], truncation=True, max_length=room_for_text(tokenizer, args))
        return {**inputs, "labels": tokenizer(rows["label"])["input_ids"]}

    return data.map(tokenize, batched=True, remove_columns=["text", "label"])


def make_config(args: TaskArguments, **changes) -> ResidualPromptTuningConfig:
    """Create the prompt's configuration; `changes` replace its defaults."""
    values = {
        "task_type": "SEQ_2_SEQ_LM",
        "num_virtual_tokens": args.num_virtual_tokens,
        "tokenizer_name_or_path": args.model,
        "prompt_tuning_init_seed": args.seed,
    }
    return ResidualPromptTuningConfig(**{**values, **changes})


def make_trainer(
    args: TaskArguments, model, data: DatasetDict, tokenizer, optimizer, callbacks=(), **changes
) -> Seq2SeqTrainer:
    """Create a Trainer that scores generated texts; `changes` replace its default arguments.

    It takes an optimizer because `Seq2SeqTrainer`, unlike `Trainer`, has no `optimizer_cls_and_kwargs`.
    """
    transformers.set_seed(args.seed)  # the order of rows
    settings = {
        **training_arguments(args),
        "metric_for_best_model": "exact_match",
        "predict_with_generate": True,
        "generation_max_length": 10,
        **changes,
    }
    return Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(**settings),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        compute_metrics=exact_match(tokenizer),
        optimizers=(optimizer, None),
        callbacks=[TrainingSetupCallback(room_for_text(tokenizer, args)), *callbacks],
    )


def test_score(args: TaskArguments, model, data: DatasetDict, tokenizer) -> float:
    """Compute exact match on the test split with the active adapter."""
    trainer = make_trainer(args, model, data, tokenizer, optimizer=None)
    return trainer.evaluate(data["test"])["eval_exact_match"]


def load_merged(args: TaskArguments, merged: Path) -> PeftModel:
    """Load a merged adapter; PEFT alone is enough."""
    return PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(args.model, dtype=torch.float32), merged)


def base_code(args: TaskArguments) -> str:
    """Return the expression that loads the frozen model, for printing."""
    return f"AutoModelForSeq2SeqLM.from_pretrained({args.model!r})"


def main() -> None:
    args = parse(TaskArguments)
    make_output_dir(args)

    # Data
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = load_data(args, tokenizer, args.task)

    # Model, config
    base = AutoModelForSeq2SeqLM.from_pretrained(args.model, dtype=torch.float32)
    model = get_peft_model(base, make_config(args))
    disable_base_dropout(model)

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
    print(f"test exact match after reloading: {test_score(args, load_merged(args, merged), data, tokenizer):.1%}")
    print_saved(adapter, merged, base_code(args))


if __name__ == "__main__":
    main()
