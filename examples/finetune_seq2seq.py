"""Train a prompt for any encoder-decoder model on your own rows: a script to copy and change.

    python examples/finetune_seq2seq.py --train_file rows.jsonl --instruction "Answer in one word:"
    python examples/smoke.py finetune_seq2seq.py    # the embedded model and a few rows, offline

A line of the file is {"prompt": "...", "completion": "..."}. `--resume` continues from the last checkpoint.
`finetune.py` is the same for decoder-only chat models.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, load_dataset
from peft import PeftModel, get_peft_model
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSeq2SeqLM,
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
    parser.add_argument("--model", default="google/t5-v1_1-base", help="a folder or a Hub id")
    parser.add_argument("--train_file", required=True, help="JSONL file with `prompt` and `completion`")
    parser.add_argument("--validation_file", help="JSONL file (default: a tenth of train_file)")
    parser.add_argument("--instruction", required=True, help="text that the prompt starts from, best with examples")
    parser.add_argument(
        "--learning_rate", type=float, help="of the prompt (default: 0.15, in units of the embeddings)"
    )
    parser.add_argument("--epochs", type=float, default=3, help="how often each row is seen")
    parser.add_argument("--max_steps", type=int, default=-1, help="training steps, instead of --epochs")
    parser.add_argument("--batch_size", type=int, default=8, help="rows per training step")
    parser.add_argument("--max_length", type=int, default=512, help="longer texts are cut")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest answer, to train on and to generate")
    parser.add_argument("--seed", type=int, default=0, help="of the prompt, its network and the order of rows")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in output_dir")
    parser.add_argument("--output_dir", type=Path, default=Path("build/finetune_seq2seq"), help="output folder")
    return parser.parse_args()


def load_data(args: argparse.Namespace) -> DatasetDict:
    """Load the splits train and validation, with the columns prompt and completion."""
    files = {"train": args.train_file, **({"validation": args.validation_file} if args.validation_file else {})}
    data = load_dataset("json", data_files=files)
    for split, rows in data.items():
        if missing := {"prompt", "completion"} - {*rows.column_names}:
            sys.exit(f"{split} has no column {min(missing)!r}, it has {rows.column_names}. Rename the columns.")
    if not args.validation_file:
        parts = data["train"].train_test_split(0.1, seed=args.seed)
        data = DatasetDict(train=parts["train"], validation=parts["test"])
    return data


@torch.no_grad()
def answers(model, tokenizer, rows: Dataset, args: argparse.Namespace) -> list[str]:
    """Generate the answer to each row."""
    model.eval()
    texts = []
    for start in tqdm(range(0, len(rows), args.batch_size), desc="Generating"):
        prompts = rows[start : start + args.batch_size]["prompt"]
        batch = tokenizer(prompts, padding=True, truncation=True, max_length=args.max_length, return_tensors="pt")
        output = model.generate(**batch.to(model.device), max_new_tokens=args.max_new_tokens, do_sample=False)
        texts += tokenizer.batch_decode(output, skip_special_tokens=True)
    return texts


def main() -> None:
    args = parse_args()
    if args.output_dir.exists() and not args.resume:
        sys.exit(f"--output_dir {args.output_dir} exists. Choose another folder, or --resume its run.")

    # Data
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = load_data(args)

    def tokenize(batch):
        inputs = tokenizer(batch["prompt"], truncation=True, max_length=args.max_length)
        targets = tokenizer(text_target=batch["completion"], truncation=True, max_length=args.max_new_tokens)
        return {**inputs, "labels": targets["input_ids"]}

    tokens = data.map(tokenize, batched=True, remove_columns=data["train"].column_names)

    # Model
    base = AutoModelForSeq2SeqLM.from_pretrained(args.model, dtype=torch.float32)

    # Config: the prompt starts as the instruction, and is trained in units of the model's embeddings
    config = ResidualPromptTuningConfig(
        task_type="SEQ_2_SEQ_LM",
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=args.instruction,
        num_virtual_tokens=None,  # as many as the instruction has
        tokenizer_name_or_path=args.model,
        prompt_tuning_init_seed=args.seed,
        encoder_scale=None,
        encoder_norm_first=True,
        encoder_zero_init=True,
        encoder_hidden_size=128,
    )
    model = get_peft_model(base, config)
    disable_base_dropout(model)
    model.print_trainable_parameters()

    # Train
    training_args = TrainingArguments(
        output_dir=str(args.output_dir / "trainer"),
        num_train_epochs=args.epochs,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=0.2,  # of all steps
        save_steps=0.2,
        save_total_limit=2,
        logging_steps=10,
        load_best_model_at_end=True,
        prediction_loss_only=True,
        seed=args.seed,
        report_to=[],  # or "tensorboard", "wandb"
    )
    trainer = Trainer(
        model,
        training_args,
        train_dataset=tokens["train"],
        eval_dataset=tokens["validation"],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[TrainingSetupCallback(args.max_length)],
        optimizer_cls_and_kwargs=(ResidualOptimizerFactory, {"learning_rate": args.learning_rate}),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=args.resume)

    # Evaluate: by loss, and by what is generated
    print(
        f"\nvalidation loss: {before:.4f} with the instruction, {trainer.evaluate()['eval_loss']:.4f} after training"
    )
    texts = answers(model, tokenizer, data["validation"], args)
    right = [text.strip() == row["completion"].strip() for text, row in zip(texts, data["validation"])]
    print(f"generated answers equal to the row's: {sum(right) / len(right):.1%}; the first: {texts[0]!r}")

    # Save: the adapter, and the projected prompt alone, which PEFT loads without this package
    adapter, merged = args.output_dir / "adapter", args.output_dir / "merged"
    model.save_pretrained(adapter)
    save_as_prompt_tuning(model, merged, overwrite=args.resume)
    print(f"\nadapter to train on: {adapter}\nmerged: {merged}")

    # Reload
    reloaded = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(args.model), merged)
    print("first answer after reloading:", answers(reloaded, tokenizer, data["validation"].select([0]), args))

    # Serve
    loading = f"AutoModelForSeq2SeqLM.from_pretrained({args.model!r})"
    print(f"with PEFT alone:\n    model = PeftModel.from_pretrained({loading}, {str(merged)!r})")
    print(f"as new tokens of an ordinary checkpoint:\n    peft-residual export vocabulary {adapter} checkpoint")


if __name__ == "__main__":
    main()
