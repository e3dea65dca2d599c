"""Causal language modeling: the loss is computed on the answer only, and evaluation generates.

    python examples/causal_lm.py             # AG News; downloads model and data
    python examples/smoke.py causal_lm.py    # a tiny model and a few rows, offline

`sft.py` does the same with TRL.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from datasets import DatasetDict, load_dataset
from peft import PeftModel, get_peft_model
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
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


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="a folder or a Hub id")
    parser.add_argument("--dataset", default="fancyzhx/ag_news", help="a folder with a file per split, or a Hub id")
    parser.add_argument("--text_column", default="text", help="column with the text")
    parser.add_argument("--label_column", default="label", help="column with the class ids")
    parser.add_argument("--label_names", nargs="+", help="names of the classes, if the data set has none")
    parser.add_argument("--question", default="\nTopic:", help="what stands between the text and the answer")
    parser.add_argument("--num_virtual_tokens", type=int, default=10, help="prompt length")
    parser.add_argument("--learning_rate", type=float, default=0.03, help="of the prompt and its network")
    parser.add_argument("--max_steps", type=int, default=1000, help="training steps")
    parser.add_argument("--batch_size", type=int, default=32, help="rows per training step")
    parser.add_argument("--seed", type=int, default=0, help="of the prompt, its network and the order of rows")
    parser.add_argument("--output_dir", type=Path, default=Path("build/causal_lm"), help="output folder")
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


def load_data(args: argparse.Namespace) -> DatasetDict:
    """Load the splits train, validation and test, with the columns prompt and completion."""
    data = load_dataset(args.dataset)
    if "validation" not in data:
        parts = data["train"].train_test_split(0.01, seed=args.seed)
        data = DatasetDict(train=parts["train"], validation=parts["test"], test=data["test"])
    check_columns(data, [args.text_column, args.label_column])
    names = label_names(data, args.label_column, args.label_names)

    def write(row):
        return {"prompt": row[args.text_column] + args.question, "completion": f" {names[row[args.label_column]]}"}

    return data.map(write, remove_columns=data["train"].column_names)


@torch.no_grad()
def answers(model, tokenizer, rows, batch_size: int) -> list[str]:
    """Generate an answer to the prompt of each row."""
    model.eval()
    tokenizer.padding_side = "left"  # generation continues at the right end of each row
    texts = []
    for start in tqdm(range(0, len(rows), batch_size), desc="Generating"):
        batch = tokenizer(rows[start : start + batch_size]["prompt"], padding=True, return_tensors="pt")
        output = model.generate(**batch.to(model.device), max_new_tokens=8, do_sample=False)
        texts += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def exact_match(model, tokenizer, rows, batch_size: int) -> float:
    """Compute the share of rows whose generated answer is correct."""
    texts = answers(model, tokenizer, rows, batch_size)
    return sum(text.strip() == row["completion"].strip() for text, row in zip(texts, rows, strict=True)) / len(rows)


def main() -> None:
    args = parse_args()
    if args.output_dir.exists():
        sys.exit(f"--output_dir {args.output_dir} exists. Choose another folder.")

    # Data
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="right")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    longest = min(tokenizer.model_max_length, 512)
    max_length = longest - args.num_virtual_tokens  # of a text, so that the prompt still fits
    if args.num_virtual_tokens >= longest // 2:
        sys.exit(f"--num_virtual_tokens {args.num_virtual_tokens} leaves no room for text in {longest} tokens.")
    data = load_data(args)

    def tokenize(row):
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        # A long text keeps its end, where the question is.
        question = tokenizer(row["prompt"])["input_ids"][-(max_length - len(answer)) :]
        return {"input_ids": question + answer, "labels": [-100] * len(question) + answer}

    tokens = data.map(tokenize, remove_columns=data["train"].column_names)

    # Model
    base = AutoModelForCausalLM.from_pretrained(args.model)

    # Config
    config = ResidualPromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=args.num_virtual_tokens,
        tokenizer_name_or_path=args.model,  # its special and unused tokens are left out of the initialization
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
        seed=args.seed,
        report_to=[],
    )
    trainer = Trainer(
        model,
        training_args,
        train_dataset=tokens["train"],
        eval_dataset=tokens["validation"],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[TrainingSetupCallback(max_length)],
        optimizer_cls_and_kwargs=(ResidualOptimizerFactory, {"learning_rate": args.learning_rate}),
    )
    trainer.train()

    # Evaluate
    rows = data["test"].shuffle(seed=args.seed).select(range(min(1000, len(data["test"]))))
    print(f"\ntest exact match: {exact_match(model, tokenizer, rows, 2 * args.batch_size):.1%}")

    # Save: the adapter, and the projected prompt alone, which PEFT loads without this package
    adapter, merged = args.output_dir / "adapter", args.output_dir / "merged"
    model.save_pretrained(adapter)
    save_as_prompt_tuning(model, merged)
    print(f"\nadapter to train on: {adapter}\nmerged: {merged}")

    # Reload
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(args.model), merged)
    print("first answers after reloading:", answers(reloaded, tokenizer, rows.select(range(2)), batch_size=2))
    loading = f"AutoModelForCausalLM.from_pretrained({args.model!r})"
    print(f"to reload with PEFT alone:\n    model = PeftModel.from_pretrained({loading}, {str(merged)!r})")


if __name__ == "__main__":
    main()
