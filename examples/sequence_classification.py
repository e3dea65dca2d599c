"""Sequence classification with BERT: a residual prompt in front of the text, and a trained classification head.

python examples/sequence_classification.py             # SST-2; downloads model and data
python examples/smoke.py sequence_classification.py    # a tiny model and a few rows, offline
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from datasets import DatasetDict, load_dataset
from peft import PeftModel, get_peft_model
from sklearn.metrics import accuracy_score
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from peft_residual import (
    ResidualOptimizerFactory,
    ResidualPromptTuningConfig,
    TrainingSetupCallback,
    disable_base_dropout,
    save_as_prompt_tuning,
)
from peft_residual.initialization import most_common_token_ids


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="google-bert/bert-base-uncased", help="a folder or a Hub id")
    parser.add_argument("--dataset", default="nyu-mll/glue", help="a folder with a file per split, or a Hub id")
    parser.add_argument("--subset", default="sst2", help="configuration of a data set on the Hub")
    parser.add_argument("--text_column", default="sentence", help="column with the text")
    parser.add_argument("--label_column", default="label", help="column with the class ids")
    parser.add_argument("--label_names", nargs="+", help="names of the classes, if the data set has none")
    parser.add_argument("--num_virtual_tokens", type=int, default=10, help="prompt length")
    parser.add_argument("--learning_rate", type=float, default=0.03, help="of the prompt and its network")
    parser.add_argument("--head_learning_rate", type=float, default=1e-3, help="of the classification head")
    parser.add_argument("--max_steps", type=int, default=1000, help="training steps")
    parser.add_argument("--batch_size", type=int, default=32, help="rows per training step")
    parser.add_argument("--seed", type=int, default=0, help="of the prompt, its network and the order of rows")
    parser.add_argument("--output_dir", type=Path, default=Path("build/sequence_classification"), help="output folder")
    return parser.parse_args()


def check_columns(data: DatasetDict, columns: list[str]) -> None:
    """Stop if a split lacks a column."""
    for split, rows in data.items():
        for column in columns:
            if column not in rows.column_names:
                sys.exit(f"Split {split!r} has no column {column!r}, it has {rows.column_names}. See --help.")


def label_names(data: DatasetDict, column: str, given: list[str] | None) -> list[str]:
    """Return the names of the classes, given or from the data set. Stop if a row has a label without a name."""
    names = given or getattr(data["train"].features[column], "names", None)
    if not names:
        sys.exit(f"Column {column!r} has no names for its classes. Pass --label_names, one per class.")
    for split, rows in data.items():
        for row, label in enumerate(rows[column]):
            if label not in range(len(names)):
                known = f"expected 0 to {len(names) - 1}: {names}"
                sys.exit(
                    f"Row {row} of split {split!r} has label {label!r}, {known}. Pass --label_names, one per class."
                )
    return names


def main() -> None:
    args = parse_args()
    if args.output_dir.exists():
        sys.exit(f"--output_dir {args.output_dir} exists. Choose another folder.")

    # Data
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    longest = min(tokenizer.model_max_length, 512)
    max_length = longest - args.num_virtual_tokens  # of a text, so that the prompt still fits
    if args.num_virtual_tokens >= longest // 2:
        sys.exit(f"--num_virtual_tokens {args.num_virtual_tokens} leaves no room for text in {longest} tokens.")
    data = load_dataset(args.dataset, args.subset)
    # GLUE's test splits have no labels: half of the validation split selects the checkpoint, half is the test split.
    halves = data["validation"].train_test_split(0.5, seed=args.seed)
    data = DatasetDict(train=data["train"], validation=halves["train"], test=halves["test"])
    check_columns(data, [args.text_column, args.label_column])
    names = label_names(data, args.label_column, args.label_names)
    # BERT's token ids are not sorted by frequency, so the most common tokens are counted.
    common_ids = most_common_token_ids(data["train"][:10_000][args.text_column], tokenizer)

    def tokenize(rows):
        inputs = tokenizer(rows[args.text_column], truncation=True, max_length=max_length)
        return {**inputs, "labels": rows[args.label_column]}

    data = data.map(tokenize, batched=True, remove_columns=data["train"].column_names)
    collator = DataCollatorWithPadding(tokenizer)

    # Model
    base = AutoModelForSequenceClassification.from_pretrained(
        args.model, num_labels=len(names), id2label=dict(enumerate(names))
    )

    # Config
    config = ResidualPromptTuningConfig(
        task_type="SEQ_CLS",  # PEFT also trains and saves the classification head
        num_virtual_tokens=args.num_virtual_tokens,
        tokenizer_name_or_path=args.model,  # its special and unused tokens are left out of the initialization
        prompt_tuning_init_token_ids=common_ids,
        prompt_tuning_init_seed=args.seed,
    )
    model = get_peft_model(base, config)
    disable_base_dropout(model)
    model.print_trainable_parameters()

    # Train
    training_args = TrainingArguments(
        output_dir=str(args.output_dir / "trainer"),
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=4 * args.batch_size,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=0.2,  # of all steps
        save_steps=0.2,
        save_total_limit=2,
        logging_steps=0.2,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        seed=args.seed,
        report_to=[],
    )
    rates = {"learning_rate": args.learning_rate, "modules_to_save_learning_rate": args.head_learning_rate}
    trainer = Trainer(
        model,
        training_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=collator,
        compute_metrics=lambda p: {"accuracy": accuracy_score(p.label_ids, p.predictions.argmax(-1))},
        callbacks=[TrainingSetupCallback(max_length)],
        optimizer_cls_and_kwargs=(ResidualOptimizerFactory, rates),
    )
    trainer.train()

    # Evaluate
    print(f"\ntest accuracy: {trainer.evaluate(data['test'])['eval_accuracy']:.1%}")

    # Save: the adapter, and the projected prompt alone, which PEFT loads without this package
    adapter, merged = args.output_dir / "adapter", args.output_dir / "merged"
    model.save_pretrained(adapter)
    save_as_prompt_tuning(model, merged)
    print(f"\nadapter to train on: {adapter}\nmerged: {merged}")

    # Reload
    base = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=len(names))
    reloaded = PeftModel.from_pretrained(base, merged).eval()
    with torch.no_grad():
        logits = reloaded(**collator([data["test"][i] for i in range(2)])).logits
    print("first predictions after reloading:", ", ".join(names[i] for i in logits.argmax(-1).tolist()))
    loading = f"AutoModelForSequenceClassification.from_pretrained({args.model!r}, num_labels={len(names)})"
    print(f"to reload with PEFT alone:\n    model = PeftModel.from_pretrained({loading}, {str(merged)!r})")


if __name__ == "__main__":
    main()
