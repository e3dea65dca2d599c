"""Train a prompt for any decoder-only chat model on your own rows: a script to copy and change.

    python examples/finetune.py --train_file rows.jsonl --instruction "Answer in one word."
    python examples/smoke.py finetune.py    # a tiny model and a few rows, offline

A line of the file is {"messages": [...]}, or {"prompt": "...", "completion": "..."}. The tokenizer applies its chat
template, and the loss is on the assistant's tokens. `--resume` continues from the last checkpoint.
`peft-residual train` does the same from a config file, and `finetune_seq2seq.py` for T5 and the like.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from peft_residual import (
    ResidualOptimizerFactory,
    ResidualPromptTuningConfig,
    TrainingSetupCallback,
    disable_base_dropout,
    save_as_prompt_tuning,
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a folder or a Hub id")
    parser.add_argument("--train_file", required=True, help="JSONL file with `messages`, or `prompt` and `completion`")
    parser.add_argument("--validation_file", help="JSONL file (default: a tenth of train_file)")
    parser.add_argument("--instruction", required=True, help="text that the prompt starts from, best with examples")
    parser.add_argument(
        "--learning_rate", type=float, help="of the prompt (default: 0.15, in units of the embeddings)"
    )
    parser.add_argument("--epochs", type=float, default=3, help="how often each row is seen")
    parser.add_argument("--max_steps", type=int, default=-1, help="training steps, instead of --epochs")
    parser.add_argument("--batch_size", type=int, default=8, help="rows per training step")
    parser.add_argument("--max_length", type=int, default=1024, help="rows of more tokens are left out")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest answer that evaluation generates")
    parser.add_argument("--seed", type=int, default=0, help="of the prompt, its network and the order of rows")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in output_dir")
    parser.add_argument("--output_dir", type=Path, default=Path("build/finetune"), help="output folder")
    return parser.parse_args()


def as_messages(row: dict) -> list[dict]:
    """A row as a conversation. Change this if your columns have other names."""
    if row.get("messages"):
        return [{"role": message["role"], "content": message["content"]} for message in row["messages"]]
    if row.get("prompt") and row.get("completion"):
        answer = {"role": "assistant", "content": row["completion"]}
        return [{"role": "user", "content": row["prompt"]}, answer]
    sys.exit(f"A row has neither `messages` nor `prompt` and `completion`: {row}. Change as_messages().")


def turns(rows: Dataset) -> Iterator[dict]:
    """Each turn of the assistant with what was said before: what the model sees when it answers."""
    for messages in map(as_messages, rows):
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                yield {"prompt": messages[:i], "completion": [message]}


def load_data(args: argparse.Namespace, tokenizer, max_length: int) -> tuple[Dataset, Dataset]:
    """Load rows to train and to validate on, with the columns prompt and completion that TRL knows."""
    files = {"train": args.train_file, **({"validation": args.validation_file} if args.validation_file else {})}
    data = load_dataset("json", data_files=files)
    if not args.validation_file:
        parts = data["train"].train_test_split(0.1, seed=args.seed)
        data = {"train": parts["train"], "validation": parts["test"]}

    def fits(row: dict) -> bool:
        tokens = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)
        return len(tokens["input_ids"]) <= max_length

    kept = {split: Dataset.from_list(list(turns(rows))).filter(fits) for split, rows in data.items()}
    for split, rows in kept.items():
        print(f"{split}: {len(rows)} answers to learn, without rows of more than {max_length} tokens")
        if not len(rows):
            sys.exit(f"Nothing is left of {split}. Check the file, or raise --max_length.")
    return kept["train"], kept["validation"]


@torch.no_grad()
def answers(model, tokenizer, rows: Dataset, args: argparse.Namespace) -> list[str]:
    """Generate the answer to each row."""
    model.eval()
    tokenizer.padding_side = "left"  # generation continues at the right end of each row
    texts = []
    for start in tqdm(range(0, len(rows), args.batch_size), desc="Generating"):
        prompts = rows[start : start + args.batch_size]["prompt"]
        batch = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
        output = model.generate(**batch.to(model.device), max_new_tokens=args.max_new_tokens, do_sample=False)
        texts += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def main() -> None:
    args = parse_args()
    if args.output_dir.exists() and not args.resume:
        sys.exit(f"--output_dir {args.output_dir} exists. Choose another folder, or --resume its run.")

    # Data
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.chat_template is None:
        sys.exit(f"The tokenizer of {args.model} has no chat template. Use a chat model, or set one here.")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompt_length = len(tokenizer(args.instruction, add_special_tokens=False)["input_ids"])
    max_length = min(args.max_length, tokenizer.model_max_length - prompt_length)  # so that the prompt still fits
    train, validation = load_data(args, tokenizer, max_length)

    # Model
    base = AutoModelForCausalLM.from_pretrained(args.model)

    # Config: the prompt starts as the instruction, and is trained in units of the model's embeddings
    config = ResidualPromptTuningConfig(
        task_type="CAUSAL_LM",
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

    # Train
    training_args = SFTConfig(
        output_dir=str(args.output_dir / "trainer"),
        num_train_epochs=args.epochs,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=0.2,  # of all steps
        save_steps=0.2,
        save_total_limit=2,
        load_best_model_at_end=True,
        seed=args.seed,
        report_to=[],  # or "tensorboard", "wandb"
        max_length=max_length,
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),  # TRL turns it on by default, even on a CPU
    )
    trainer = SFTTrainer(
        base,
        training_args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        peft_config=config,
        callbacks=[TrainingSetupCallback(max_length)],
        optimizer_cls_and_kwargs=(ResidualOptimizerFactory, {"learning_rate": args.learning_rate}),
    )
    model = trainer.model
    disable_base_dropout(model)
    model.print_trainable_parameters()
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=args.resume)

    # Evaluate: by loss, and by what is generated
    print(
        f"\nvalidation loss: {before:.4f} with the instruction, {trainer.evaluate()['eval_loss']:.4f} after training"
    )
    texts = answers(model, tokenizer, validation, args)
    right = [text.strip() == row["completion"][0]["content"].strip() for text, row in zip(texts, validation)]
    print(f"generated answers equal to the row's: {sum(right) / len(right):.1%}; the first: {texts[0]!r}")

    # Save: the adapter, and the projected prompt alone, which PEFT loads without this package
    adapter, merged = args.output_dir / "adapter", args.output_dir / "merged"
    model.save_pretrained(adapter)
    save_as_prompt_tuning(model, merged, overwrite=args.resume)
    print(f"\nadapter to train on: {adapter}\nmerged: {merged}")

    # Reload
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(args.model), merged)
    print("first answer after reloading:", answers(reloaded, tokenizer, validation.select([0]), args))

    # Serve
    loading = f"AutoModelForCausalLM.from_pretrained({args.model!r})"
    print(f"with PEFT alone:\n    model = PeftModel.from_pretrained({loading}, {str(merged)!r})")
    print(f"in any engine, as new tokens of a checkpoint:\n    peft-residual export vocabulary {adapter} checkpoint")
    print(f"with PEFT, as keys and values:\n    peft-residual export prefix-tuning {adapter} prefix")
    print("in vLLM or SGLang, with each request: peft_residual.export.vllm_request, sglang_request")


if __name__ == "__main__":
    main()
